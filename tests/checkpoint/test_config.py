"""The choices of a user: every wrong one is an error that names the field and says what is allowed."""

import json
import re
from dataclasses import MISSING, asdict, fields

import pytest
from transformers import BertConfig, HfArgumentParser

from hf_lossless_lr.checkpoint.config import (
    FORMAT_VERSION,
    METHOD,
    WRITTEN_METHOD,
    LosslessLowRankConfig,
    ModuleRecord,
)
from hf_lossless_lr.checkpoint.options import (
    DEFAULT_KEEP_RATIO,
    MEASURED_OBJECTIVES,
    METRICS,
    OBJECTIVES,
    CompressionOptions,
)
from hf_lossless_lr.errors import CheckpointError, ConfigurationError, LosslessLowRankError
from hf_lossless_lr.layers.storage import STORAGE_CHOICES

NAN, INF = float("nan"), float("inf")
SIZED = ("budget", "uniform")
PAPER = ("paper-lossless", "paper-compact")
MANIFEST = {
    "encoder.layer.0.attention.self.query": {"rank": 7, "storage": "pivoted"},
    "classifier": {"rank": 1, "storage": "two-factor"},
}


def of(objective, **options):
    """A config of an objective, with what that takes."""
    given = {"ranks": ["query=3"]} if objective == "ranks" else {}
    return LosslessLowRankConfig(objective=objective, **given, **options)


both_classes = pytest.mark.parametrize("cls", [CompressionOptions, LosslessLowRankConfig])


def full_config():
    """A value other than the default in every field that allows one beside the others."""
    return LosslessLowRankConfig(
        objective="uniform",
        keep_ratio=0.25,
        size="bytes",
        formats=["int8", "int4"],
        embeddings="int8",
        forms=["channel"],
        compute="stored",
        part="vision_model",
        scope="model",
        metric="activation",
        target_modules=["q_proj", "re:.*fc\\d"],
        ignore=["lm_head"],
        damping=0.1,
        storage="two-factor",
        rank_multiple=8,
        max_examples=300,
        selection_fraction=0.25,
        labels="model",
        seed=3,
        batch_size=4,
        loss_margin=0.5,
        accuracy_margin=0.02,
        confidence=0.9,
        epsilon_tolerance=1e-3,
        modules=MANIFEST,
    )


# --- values ---------------------------------------------------------------------------------------------------------

OUT_OF_RANGE = {
    "keep_ratio": ("a number in (0, 1]", [0, 0.0, -0.1, 1.1, NAN, INF, "0.5", True, [0.5]]),
    "damping": ("a number in [0, inf)", [-1e-9, NAN, INF, None, "0.03", False]),
    "loss_margin": ("a number in [0, inf)", [-0.01, NAN, INF, None, "x", True]),
    "accuracy_margin": ("a number in [0, 1]", [-0.01, 1.01, NAN, INF, None, "x", True]),
    "confidence": ("a number in (0.5, 1)", [0.5, 1, 1.0, 0.4, 95, NAN, None, "0.95"]),
    "epsilon_tolerance": ("a number in (0, inf)", [0, -1.0, NAN, INF, None, "x"]),
    "selection_fraction": ("a number in [0, 1)", [-0.1, 1, 1.0, NAN, INF, "0.5", True]),
    "rank_multiple": ("an integer of at least 1", [0, -8, 8.0, "8", True]),
    "max_examples": ("an integer of at least 1", [0, -8, 8.0, "8", True]),
    "batch_size": ("an integer of at least 1", [0, -1, 2.5, "32", True, None]),
    "seed": ("an integer of at least 0", [-1, 0.0, "0", False, None]),
}
IN_RANGE = {
    "keep_ratio": [1e-6, 0.5, 1, 1.0],
    "damping": [0, 0.0, 1e-3, 10],
    "loss_margin": [0, 0.0, 5.0],
    "accuracy_margin": [0, 0.005, 1],
    "confidence": [0.501, 0.95, 0.999],
    "epsilon_tolerance": [1e-12, 1],
    "selection_fraction": [0, 0.0, 0.125, 0.99],
    "rank_multiple": [1, 64],
    "max_examples": [1, 10_000],
    "batch_size": [1, 512],
    "seed": [0, 12345],
}


def cases(table):
    return [
        pytest.param(name, *rest, value, id=f"{name}={value!r}")
        for name, entry in table.items()
        for *rest, values in [entry if isinstance(entry, tuple) else (entry,)]
        for value in values
    ]


@both_classes
@pytest.mark.parametrize(("name", "allowed", "value"), cases(OUT_OF_RANGE))
def test_a_value_out_of_range_is_an_error_that_names_field_range_and_value(cls, name, allowed, value):
    with pytest.raises(ConfigurationError, match="^" + re.escape(f"{name}: must be {allowed}, got {value!r}.")):
        cls(**{name: value})


@pytest.mark.parametrize(("name", "value"), cases(IN_RANGE))
def test_a_value_in_range_is_kept(name, value):
    assert getattr(LosslessLowRankConfig(**{name: value}), name) == value


def test_every_number_of_the_options_is_tested_above():
    numbers = {f.name for f in fields(CompressionOptions) if "int" in str(f.type) or "float" in str(f.type)}
    assert numbers == {*OUT_OF_RANGE, "epsilon"}


CHOICES = {"objective": OBJECTIVES, "metric": METRICS, "storage": STORAGE_CHOICES}


@both_classes
@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("value", ["nonsense", "", 3, ["budget"]])
def test_an_unknown_choice_is_an_error_that_lists_the_known_ones(cls, name, value):
    text = f"{name}: {value!r} is unknown; choose one of {', '.join(CHOICES[name])}."
    with pytest.raises(ConfigurationError, match="^" + re.escape(text)):
        cls(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [("objective", "bugdet", "budget"), ("metric", "kroneker", "kronecker"), ("storage", "two_factor", "two-factor")],
)
def test_a_misspelt_choice_gets_a_suggestion(name, value, meant):
    with pytest.raises(ConfigurationError, match=f"Did you mean '{meant}'"):
        LosslessLowRankConfig(**{name: value})


@pytest.mark.parametrize("name", CHOICES)
def test_every_listed_choice_is_accepted(name):
    configs = [of(value) if name == "objective" else LosslessLowRankConfig(**{name: value}) for value in CHOICES[name]]
    assert [getattr(config, name) for config in configs] == list(CHOICES[name])


@pytest.mark.parametrize("name", ["target_modules", "ignore"])
@pytest.mark.parametrize("value", [[], "", ["a", ""], ["a", 3], 3, {}, {"a": 1}, ()])
def test_patterns_that_are_none_are_an_error(name, value):
    text = f"{name}: must be None, a pattern or a non-empty list of patterns, got {value!r}."
    with pytest.raises(ConfigurationError, match="^" + re.escape(text)):
        LosslessLowRankConfig(**{name: value})


@pytest.mark.parametrize("name", ["target_modules", "ignore"])
@pytest.mark.parametrize(
    ("value", "kept"),
    [(None, None), ("a", ["a"]), (["b", "a"], ["b", "a"]), (("b", "a"), ["b", "a"]), ({"b", "a"}, ["a", "b"])],
)
def test_patterns_become_a_list(name, value, kept):
    assert getattr(LosslessLowRankConfig(**{name: value}), name) == kept


# --- defaults and contradictions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_defaults_follow_the_objective(objective):
    config = of(objective)
    assert config.keep_ratio == (DEFAULT_KEEP_RATIO if objective in SIZED else None)
    assert config.metric == ("identity" if objective in PAPER else "kronecker")


@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if o not in SIZED])
def test_a_keep_ratio_for_an_objective_that_finds_the_size_is_an_error(objective):
    text = f"keep_ratio=0.5 contradicts objective='{objective}', which chooses the size by itself; leave"
    with pytest.raises(ConfigurationError, match=text):
        of(objective, keep_ratio=0.5)


@pytest.mark.parametrize("objective", PAPER)
@pytest.mark.parametrize("metric", [m for m in METRICS if m != "identity"])
def test_another_metric_for_the_objectives_of_the_paper_is_an_error(objective, metric):
    text = f"metric='{metric}' contradicts objective='{objective}': the paper's algorithms use metric='identity'"
    with pytest.raises(ConfigurationError, match=text):
        LosslessLowRankConfig(objective=objective, metric=metric)


@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if o not in PAPER])
def test_an_epsilon_for_an_objective_that_is_not_of_the_paper_is_an_error(objective):
    text = f"epsilon=0.1 contradicts objective='{objective}': it is used by 'paper-lossless' and 'paper-compact' only"
    with pytest.raises(ConfigurationError, match=text):
        of(objective, epsilon=0.1)


@pytest.mark.parametrize("objective", PAPER)
def test_the_objectives_of_the_paper_take_an_epsilon(objective):
    assert LosslessLowRankConfig(objective=objective, epsilon=1e-3).epsilon == 1e-3
    assert LosslessLowRankConfig(objective=objective).epsilon is None


@pytest.mark.parametrize("value", [0, -1e-3, NAN, INF, "x", True])
def test_an_epsilon_out_of_range_is_an_error(value):
    with pytest.raises(ConfigurationError, match=re.escape(f"epsilon: must be a number in (0, inf), got {value!r}.")):
        LosslessLowRankConfig(objective="paper-compact", epsilon=value)


@both_classes
@pytest.mark.parametrize(
    ("options", "refit", "fraction"),
    [
        ({}, True, 1 / 16),
        ({"objective": "uniform"}, True, 1 / 16),
        ({"objective": "lossless"}, True, 0.5),
        ({"objective": "compact"}, True, 0.5),
        ({"objective": "compact", "metric": "activation"}, False, 0.5),
        ({"objective": "lossless", "refit": False}, False, 0.5),
        ({"metric": "activation"}, False, 0.0),
        ({"metric": "identity", "objective": "uniform"}, False, 0.0),
        ({"objective": "paper-lossless"}, False, 0.0),
        ({"objective": "paper-compact", "metric": "identity"}, False, 0.0),
        ({"refit": False}, False, 0.0),
        ({"refit": True}, True, 1 / 16),
        ({"refit": True, "metric": "activation"}, True, 1 / 16),
        ({"refit": False, "selection_fraction": 0.3}, False, 0.3),
        ({"selection_fraction": 0}, True, 0),
        ({"objective": "compact", "selection_fraction": 0.2}, True, 0.2),
        ({"objective": "paper-lossless", "selection_fraction": 0.2}, False, 0.2),
    ],
)
def test_refit_and_selection_follow_metric_and_objective_unless_chosen(cls, options, refit, fraction):
    config = cls(**options)
    assert config.refit is refit
    assert config.selection_fraction == fraction


@both_classes
@pytest.mark.parametrize(
    "options",
    [{"metric": m} for m in METRICS if m not in ("kronecker", "activation")]
    + [{"objective": o} for o in PAPER]
    + [{"objective": "compact", "metric": "fisher"}],
)
def test_a_refit_without_its_metric_or_for_the_paper_is_an_error(cls, options):
    metric = options.get("metric", "identity" if options.get("objective") in PAPER else "kronecker")
    text = (
        f"refit=True contradicts metric={metric!r}, objective={options.get('objective', 'budget')!r}: it needs "
        "metric='kronecker' or 'activation', and none of the paper's objectives."
    )
    with pytest.raises(ConfigurationError, match="^" + re.escape(text)):
        cls(refit=True, **options)


@both_classes
@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"query": 64, "re:.*=x": 3}, {"query": 64, "re:.*=x": 3}),
        (["query=64", "*.dense=7"], {"query": 64, "*.dense": 7}),
        ("query=64", {"query": 64}),
        ([], {}),
        ({}, {}),
    ],
)
def test_given_ranks_make_an_objective_of_their_own(cls, given, found):
    config = cls(ranks=given)
    assert config.given_ranks == found
    assert config.objective == "ranks"
    assert config.keep_ratio is None
    assert cls(**{**asdict(config), "objective": "ranks"}).given_ranks == found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": {"query": 0}}, "ranks: must map patterns of layers to whole numbers above 0"),
        ({"ranks": {"query": 2.5}}, "ranks: must map patterns of layers to whole numbers above 0"),
        ({"ranks": ["query"]}, "ranks: must map patterns of layers to whole numbers above 0"),
        ({"ranks": 64}, "ranks: must map patterns of layers to whole numbers above 0"),
        ({"ranks": ["query=3", "query=4"]}, "ranks: 'query' is given twice"),
        ({"objective": "ranks"}, "objective='ranks' takes the ranks of layers"),
        ({"objective": "uniform", "ranks": {"query": 3}}, "ranks contradicts objective='uniform'"),
        ({"objective": "paper-lossless", "embeddings": "int8"}, "embeddings='int8' contradicts objective='paper-loss"),
        ({"keep_ratio": 0.5, "ranks": {"query": 3}}, "keep_ratio=0.5 contradicts objective='ranks'"),
    ],
)
def test_given_ranks_that_are_none_or_contradict_another_option_are_an_error(options, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        LosslessLowRankConfig(**options)


@both_classes
@pytest.mark.parametrize("objective", MEASURED_OBJECTIVES)
@pytest.mark.parametrize("fraction", [0, 0.0])
def test_an_objective_that_measures_without_a_selection_split_is_an_error(cls, objective, fraction):
    text = f"selection_fraction=0 contradicts objective={objective!r}, which chooses by measurement."
    with pytest.raises(ConfigurationError, match="^" + re.escape(text)):
        cls(objective=objective, selection_fraction=fraction)


@pytest.mark.parametrize("value", ["yes", 1, 0, 2.5])
def test_a_refit_that_is_neither_true_nor_false_is_an_error(value):
    with pytest.raises(
        ConfigurationError, match="^" + re.escape(f"refit: must be True, False or None, got {value!r}.")
    ):
        LosslessLowRankConfig(refit=value)


def test_an_error_of_the_configuration_is_a_value_error():
    with pytest.raises(ValueError, match="keep_ratio") as caught:
        LosslessLowRankConfig(keep_ratio=2)
    assert isinstance(caught.value, LosslessLowRankError)


# --- the manifest ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (
            {"rank": 3},
            "modules['a.b']: expected the keys ['rank', 'storage'], and perhaps 'format' and 'form', got {'rank': 3}.",
        ),
        ({}, "modules['a.b']: expected the keys ['rank', 'storage'], and perhaps 'format' and 'form', got {}."),
        (
            {"rank": 3, "storage": "pivoted", "x": 1},
            "modules['a.b']: expected the keys ['rank', 'storage'], and perhaps 'format' and 'form', got {'rank': 3, "
            "'storage': 'pivoted', 'x': 1}.",
        ),
        (None, "modules['a.b']: expected the keys ['rank', 'storage'], and perhaps 'format' and 'form', got None."),
        (3, "modules['a.b']: expected the keys ['rank', 'storage'], and perhaps 'format' and 'form', got 3."),
        (
            ["rank", "storage"],
            "modules['a.b']: expected the keys ['rank', 'storage'], and perhaps 'format' and 'form', got "
            "['rank', 'storage'].",
        ),
        ({"rank": 0, "storage": "pivoted"}, "modules['a.b']: rank must be a positive integer, got 0."),
        ({"rank": -2, "storage": "pivoted"}, "modules['a.b']: rank must be a positive integer, got -2."),
        ({"rank": 2.0, "storage": "pivoted"}, "modules['a.b']: rank must be a positive integer, got 2.0."),
        ({"rank": "2", "storage": "pivoted"}, "modules['a.b']: rank must be a positive integer, got '2'."),
        ({"rank": True, "storage": "pivoted"}, "modules['a.b']: rank must be a positive integer, got True."),
        ({"rank": None, "storage": "pivoted"}, "modules['a.b']: rank must be a positive integer, got None."),
        (
            {"rank": 2, "storage": "auto"},
            "modules['a.b']: storage must be one of pivoted, two-factor, got 'auto'.",
        ),
        ({"rank": 2, "storage": None}, "modules['a.b']: storage must be one of pivoted, two-factor, got None."),
    ],
)
def test_a_malformed_record_is_an_error_that_names_the_module(record, text):
    with pytest.raises(CheckpointError, match="^" + re.escape(text)):
        LosslessLowRankConfig(modules={"good": {"rank": 1, "storage": "pivoted"}, "a.b": record})


@pytest.mark.parametrize("modules", [["a"], None, "a", 3])
def test_a_manifest_that_is_no_mapping_is_an_error(modules):
    text = f"modules: the manifest must map names to records, got {modules!r}."
    with pytest.raises(CheckpointError, match="^" + re.escape(text)):
        LosslessLowRankConfig(modules=modules)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, -1, "1", None, 1.5])
def test_an_unreadable_format_version_is_an_error_that_says_what_to_do(version):
    text = (
        f"the checkpoint has format version {version!r}; this package reads versions up to {FORMAT_VERSION}. "
        "Upgrade with `pip install -U hf-lossless-lr`."
    )
    with pytest.raises(CheckpointError, match="^" + re.escape(text)):
        LosslessLowRankConfig(format_version=version)


@pytest.mark.parametrize("method", ["gptq", "", None])
def test_another_quantization_method_is_an_error(method):
    with pytest.raises(ConfigurationError, match=re.escape(f"quant_method: must be '{METHOD}', got {method!r}.")):
        LosslessLowRankConfig(quant_method=method)


def test_record_gives_rank_and_storage_of_a_module():
    assert LosslessLowRankConfig(modules=MANIFEST).record("classifier") == ModuleRecord(1, "two-factor")


def test_the_manifest_is_a_copy():
    given = {"a": {"rank": 2, "storage": "pivoted"}}
    config = LosslessLowRankConfig(modules=given)
    given["a"]["rank"] = 5
    given["b"] = given["a"]
    assert config.modules == {"a": {"rank": 2, "storage": "pivoted"}}


def test_two_configs_do_not_share_their_manifest():
    LosslessLowRankConfig().modules["a"] = {"rank": 1, "storage": "pivoted"}
    assert LosslessLowRankConfig().modules == {}


# --- there and back -------------------------------------------------------------------------------------------------


def test_the_full_config_of_these_tests_leaves_no_field_at_its_default():
    config = full_config()
    at_default = {f.name for f in fields(config) if f.default is not MISSING and getattr(config, f.name) == f.default}
    assert at_default == {"epsilon", "format_version", "quant_method", "ranks"}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_dictionary_gives_the_config_back(objective):
    config = of(objective, modules=MANIFEST)
    assert LosslessLowRankConfig.from_dict(config.to_dict()) == config


def test_a_dictionary_holds_every_field():
    config = full_config()
    assert config.to_dict() == asdict(config) | {"quant_method": WRITTEN_METHOD}
    assert LosslessLowRankConfig.from_dict(config.to_dict()) == config
    assert LosslessLowRankConfig.from_dict(asdict(config)) == config


def test_json_gives_the_config_back(tmp_path):
    config = full_config()
    assert LosslessLowRankConfig.from_dict(json.loads(config.to_json_string())) == config
    config.to_json_file(tmp_path / "config.json")
    assert LosslessLowRankConfig.from_dict(json.loads((tmp_path / "config.json").read_text())) == config


def test_the_config_travels_in_the_config_of_a_model(tmp_path):
    config = full_config()
    BertConfig(quantization_config=config).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == WRITTEN_METHOD
    assert LosslessLowRankConfig.from_dict(stored) == config


def test_a_dictionary_of_the_config_is_a_copy():
    config = full_config()
    config.to_dict()["modules"]["classifier"]["rank"] = 99
    assert config.record("classifier").rank == 1


def test_keyword_arguments_override_the_dictionary():
    config = LosslessLowRankConfig.from_dict(full_config().to_dict(), seed=9, damping=0.2)
    assert (config.seed, config.damping, config.rank_multiple) == (9, 0.2, 8)


def test_keyword_arguments_that_override_are_validated():
    with pytest.raises(ConfigurationError, match="seed: must be an integer"):
        LosslessLowRankConfig.from_dict(full_config().to_dict(), seed=-1)


def test_unused_keyword_arguments_are_returned_if_asked():
    config, unused = LosslessLowRankConfig.from_dict(
        {"seed": 4}, return_unused_kwargs=True, batch_size=2, device="cpu"
    )
    assert (config.seed, config.batch_size, unused) == (4, 2, {"device": "cpu"})


def test_an_unknown_field_is_an_error_with_a_suggestion():
    text = "LosslessLowRankConfig has no field 'keep_ration'. Did you mean 'keep_ratio'?"
    with pytest.raises(ConfigurationError, match=re.escape(text)):
        LosslessLowRankConfig.from_dict({"keep_ration": 0.5})
    with pytest.raises(ConfigurationError, match=re.escape(text)):
        LosslessLowRankConfig(keep_ration=0.5)


def test_all_formats_stand_alone():
    with pytest.raises(ConfigurationError, match="formats: 'auto' means all of them, and stands alone"):
        LosslessLowRankConfig(formats=["auto", "int8"])


def test_an_unknown_field_like_no_other_is_an_error_that_lists_the_known_ones():
    text = "LosslessLowRankConfig has no field 'zzz'. Known are: " + ", ".join(
        sorted(f.name for f in fields(LosslessLowRankConfig))
    )
    with pytest.raises(ConfigurationError, match=re.escape(text)):
        LosslessLowRankConfig.from_dict({"zzz": 1})


# --- the command line -----------------------------------------------------------------------------------------------


def parse(*arguments):
    (options,) = HfArgumentParser(CompressionOptions).parse_args_into_dataclasses(list(arguments))
    return options


def test_the_command_line_without_arguments_gives_the_defaults():
    assert parse() == CompressionOptions()


def test_the_command_line_takes_every_option():
    options = full_config()
    arguments = []
    for f in fields(CompressionOptions):
        value = getattr(options, f.name)
        if value is not None:
            arguments += [f"--{f.name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    assert asdict(parse(*arguments)) == {f.name: getattr(options, f.name) for f in fields(CompressionOptions)}


def test_the_command_line_takes_ranks():
    assert parse("--ranks", "query=64", "re:.*fc=3").given_ranks == {"query": 64, "re:.*fc": 3}


def test_the_command_line_takes_an_epsilon():
    assert parse("--objective", "paper-compact", "--epsilon", "1e-3").epsilon == 1e-3


@pytest.mark.parametrize("name", CHOICES)
def test_the_command_line_rejects_an_unknown_choice_and_lists_the_known_ones(name, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(f"--{name}", "nonsense")
    message = capsys.readouterr().err
    assert f"argument --{name}: invalid choice: 'nonsense'" in message
    assert all(choice in message for choice in CHOICES[name])


@pytest.mark.parametrize("name", ["keep_ratio", "rank_multiple", "seed"])
def test_the_command_line_rejects_a_word_for_a_number(name, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(f"--{name}", "many")
    assert re.search(rf"argument --{name}\S*: invalid \w+ value: 'many'", capsys.readouterr().err)


def test_the_command_line_validates_as_the_config_does():
    with pytest.raises(ConfigurationError, match="keep_ratio: must be a number in"):
        parse("--keep_ratio", "1.5")


@pytest.mark.parametrize("option", fields(CompressionOptions), ids=lambda option: option.name)
def test_every_option_has_a_help_text_and_its_documentation(option):
    assert option.metadata["help"]
    assert f"        {option.name}: " in CompressionOptions.__doc__
