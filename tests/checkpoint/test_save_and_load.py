"""Compressed checkpoints: written by `save_pretrained`, read by `from_pretrained`, refused when something is wrong."""

import copy
import functools
import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.compressions import (
    answers,
    auto_class,
    build,
    check_same_answers,
    check_same_model,
    check_same_state,
    compress,
    compressed,
    factorized_layers,
    folder_content,
)
from support.tiny_models import TINY_MODELS
from support.tolerances import BFLOAT16, FLOAT32
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertModel,
)
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import validate_quantization_for_training

import hf_lossless_lr
from hf_lossless_lr import LosslessLowRankConfig
from hf_lossless_lr.checkpoint.config import FORMAT_VERSION
from hf_lossless_lr.checkpoint.contents import check_loaded
from hf_lossless_lr.errors import CheckpointError, ConfigurationError, TargetError
from hf_lossless_lr.report.records import REPORT_NAME

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DIFFERENT = ("bert-sequence-classification", "albert", "gpt2", "resnet")  # linear, shared, transposed, convolutions
LAYER_TYPES = (nn.Linear, Conv1D, nn.Conv2d)


def loaded(model_class, folder, **options):
    """A model in evaluation mode, loaded without a missing, unexpected or mismatched tensor."""
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


def in_dtype(model, batch, dtype, folder):
    """A dense model as `from_pretrained(dtype=...)` gives it: `Module.to` would cast rotary tables as well."""
    if dtype is torch.float32:
        return model, batch
    model.save_pretrained(folder)
    model = type(model).from_pretrained(folder, dtype=dtype).eval()
    return model, {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Gives a model's batch, the model compressed, its report, and its checkpoint; treat them as read-only."""

    @functools.cache
    def make(name, storage="pivoted", dtype="float32"):
        folder = tmp_path_factory.mktemp(name)
        model, batch = in_dtype(*build(name), DTYPES[dtype], folder / "dense")
        model, report = compress(model, batch, storage=storage)
        model.save_pretrained(folder / "compressed")
        return SimpleNamespace(model=model, batch=batch, report=report, folder=folder / "compressed")

    return make


@pytest.fixture(scope="session")
def bert(checkpoint):
    return checkpoint("bert-sequence-classification")


class TestRoundTrip:
    @pytest.mark.parametrize(
        ("name", "storage", "dtype"),
        [
            *((name, "pivoted", "float32") for name in TINY_MODELS),
            *((name, "two-factor", "bfloat16") for name in TINY_MODELS),
            *((name, "two-factor", "float32") for name in DIFFERENT),
            *((name, "pivoted", "bfloat16") for name in DIFFERENT),
        ],
    )
    def test_gives_the_same_model_bit_for_bit(self, name, storage, dtype, checkpoint):
        saved = checkpoint(name, storage, dtype)
        assert {parameter.dtype for parameter in saved.model.parameters()} >= {DTYPES[dtype]}
        assert 0.4 < saved.report.keep_ratio <= 0.5
        layers = factorized_layers(saved.model)
        assert {layer.storage for layer in layers.values() if layer.form == "channel"} == {storage}
        for model_class in (type(saved.model), auto_class(name)):
            again = loaded(model_class, saved.folder)
            assert type(again) is type(saved.model)
            assert factorized_layers(again).keys() == layers.keys()
            check_same_model(saved.model, again, saved.batch)

    @pytest.mark.parametrize("name", TINY_MODELS)
    def test_can_be_repeated_with_the_same_files(self, name, checkpoint, tmp_path):
        """The card and the report among them."""
        saved = checkpoint(name)
        again = loaded(type(saved.model), saved.folder)
        again.save_pretrained(tmp_path)
        assert folder_content(tmp_path) == folder_content(saved.folder)
        assert {"README.md", REPORT_NAME} <= {path.name for path in tmp_path.iterdir()}

    def test_of_other_weights_has_no_certificate(self, bert, tmp_path):
        again = loaded(type(bert.model), bert.folder)
        with torch.no_grad():
            again.classifier.weight.mul_(2)
        again.save_pretrained(tmp_path)
        assert "were changed after they were measured" in (tmp_path / "README.md").read_text(encoding="utf-8")

    def test_with_a_report_that_cannot_be_read_is_one_without_it(self, bert, tmp_path, caplog):
        broken = tmp_path / "broken"
        shutil.copytree(bert.folder, broken)
        (broken / REPORT_NAME).write_text("{}")
        loaded(type(bert.model), broken).save_pretrained(tmp_path / "again")
        assert "cannot be used" in caplog.text
        assert not (tmp_path / "again" / REPORT_NAME).exists()

    def test_keeps_the_configuration_and_the_manifest(self, bert):
        again = loaded(type(bert.model), bert.folder).config.quantization_config
        assert again == bert.model.config.quantization_config
        assert again.keep_ratio == 0.5
        assert {name: record["rank"] for name, record in again.modules.items()} == {
            name: layer.rank for name, layer in factorized_layers(bert.model).items()
        }

    @pytest.mark.parametrize("name", ["bert-sequence-classification", "llama", "gpt2", "t5"])
    def test_in_shards_gives_the_same_answers(self, name, checkpoint, tmp_path):
        saved = checkpoint(name)
        saved.model.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
        check_same_model(saved.model, loaded(type(saved.model), tmp_path), saved.batch)

    def test_can_change_the_dtype_of_the_factors(self, bert):
        again = loaded(type(bert.model), bert.folder, dtype=torch.bfloat16)
        layer = next(iter(factorized_layers(again).values()))
        assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
        assert layer.permutation.dtype == torch.int32
        mine, others = answers(bert.model, bert.batch)["logits"], answers(again, bert.batch)["logits"]
        assert others.dtype == torch.bfloat16
        torch.testing.assert_close(others.float(), mine, rtol=BFLOAT16, atol=BFLOAT16 * float(mine.abs().max()))

    def test_uploads_files_that_load(self, bert, tmp_path, monkeypatch):
        class Hub:
            """Keeps what is committed in a folder."""

            def create_repo(self, repo_id, **_):
                return SimpleNamespace(repo_id=repo_id)

            def create_commit(self, repo_id, operations, **_):
                for operation in operations:
                    shutil.copy(operation.path_or_fileobj, tmp_path / operation.path_in_repo)
                return f"https://example.org/{repo_id}"

        card = SimpleNamespace(save=lambda path: Path(path).write_text("a card"))
        monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
        monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: card)
        assert bert.model.push_to_hub("someone/bert-small") == "https://example.org/someone/bert-small"
        assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
        check_same_model(bert.model, loaded(AutoModelForSequenceClassification, tmp_path), bert.batch)

    def test_of_a_dense_model_is_none_of_our_business(self, tmp_path):
        model, batch = build("bert-sequence-classification")
        model.save_pretrained(tmp_path)
        again = loaded(AutoModelForSequenceClassification, tmp_path)
        assert not factorized_layers(again)
        assert not hasattr(again.config, "quantization_config")
        check_same_model(model, again, batch)


@torch.no_grad()
def states(model, batch):
    """The hidden states of a model and of its encoder and decoder; of a copy, as transformers leaves hooks in it."""
    model = copy.deepcopy(model)
    inputs = {name: value for name, value in batch.items() if not name.endswith(("labels", "positions"))}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = batch["input_ids"]
    if inputs.get("input_ids", torch.zeros(1, 1)).ndim == 3:  # multiple choice
        inputs = {name: value.flatten(0, 1) for name, value in inputs.items()}
    outputs = model(**inputs, output_hidden_states=True)
    found = {name: outputs.get(name) for name in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")}
    return [state for states in found.values() if states is not None for state in states]


def check_same_states(model, other, batch):
    mine, others = states(model, batch), states(other, batch)
    assert len(mine) == len(others) > 2
    assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))


def check_only_head_or_pooler(info):
    """No more is missing than a head or a pooler that was never there."""
    assert not info["unexpected_keys"] or all("encoder" not in key for key in info["unexpected_keys"])
    assert all(".layer" not in key and "encoder." not in key for key in info["missing_keys"]), info
    assert not info["mismatched_keys"]


class TestAnotherClass:
    @pytest.mark.parametrize("name", TINY_MODELS)
    def test_without_the_head_loads_a_checkpoint_that_has_one(self, name, checkpoint, tmp_path):
        saved = checkpoint(name)
        body, info = AutoModel.from_pretrained(saved.folder, output_loading_info=True)
        check_only_head_or_pooler(info)
        assert len(factorized_layers(body)) == len(factorized_layers(saved.model))
        source = saved.model if saved.model.base_model is saved.model else saved.model.base_model
        check_same_states(source, body.eval(), saved.batch)
        body.save_pretrained(tmp_path / "body")
        check_same_states(source, AutoModel.from_pretrained(tmp_path / "body").eval(), saved.batch)

    @pytest.mark.parametrize("name", [name for name in TINY_MODELS if name != "t5"])  # its base has no prefix
    def test_with_a_head_loads_a_checkpoint_that_has_none(self, name, checkpoint, tmp_path):
        saved = checkpoint(name)
        model = copy.deepcopy(saved.model)  # to save a body notes its class in the configuration
        model.base_model.save_pretrained(tmp_path)
        try:
            again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
        except CheckpointError:
            model.dequantize().base_model.save_pretrained(tmp_path / "dense")
            _, info = type(model).from_pretrained(tmp_path / "dense", output_loading_info=True)
            with pytest.raises(AssertionError):
                check_only_head_or_pooler(info)
            pytest.skip("nor does this version of Transformers load the dense model so")
        check_only_head_or_pooler(info)
        assert factorized_layers(again).keys() == factorized_layers(model).keys()
        check_same_states(model.base_model, again.base_model.eval(), saved.batch)

    def test_that_has_none_of_the_layers_is_refused(self, bert):
        with pytest.raises(
            CheckpointError, match=r"none of the compressed modules .* exists in DistilBertModel: bert\.encoder"
        ):
            DistilBertModel.from_pretrained(bert.folder)

    def test_that_has_other_layers_is_refused(self, tmp_path):
        compressed("bert-sequence-classification", target_modules=["bert.pooler.dense"])[0].save_pretrained(tmp_path)
        with pytest.raises(
            CheckpointError, match=r"none of the compressed .* in BertForTokenClassification: bert\.pooler\.dense"
        ):
            BertForTokenClassification.from_pretrained(tmp_path)


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


class TestInMemory:
    @pytest.mark.parametrize("name", DIFFERENT)
    @pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
    def test_a_copy_answers_the_same_and_stands_for_itself(self, name, duplicate, checkpoint):
        model = checkpoint(name).model
        other = duplicate(model)
        check_same_model(model, other, checkpoint(name).batch)
        other.dequantize()
        assert not factorized_layers(other)
        assert not hasattr(other.config, "quantization_config")
        assert factorized_layers(model)
        assert hasattr(model.config, "quantization_config")

    def test_a_loaded_model_is_not_flagged_as_quantized(self, bert):
        for model in (bert.model, loaded(type(bert.model), bert.folder)):
            assert not getattr(model, "is_quantized", False)
            assert getattr(model, "hf_quantizer", None) is None
            assert getattr(model, "quantization_method", None) is None
            assert not getattr(model.config, "_is_quantized", False)
            validate_quantization_for_training(model)

    @pytest.mark.parametrize("cast", ["float", "half", "bfloat16", "double"])
    def test_casts_work(self, bert, cast, tmp_path):
        model = getattr(loaded(type(bert.model), bert.folder), cast)()
        dtypes = {parameter.dtype for parameter in model.parameters()}
        assert len(dtypes) == 1
        model.save_pretrained(tmp_path)
        check_same_state(model.state_dict(), loaded(type(model), tmp_path).state_dict())

    def test_parameters_are_those_of_the_file(self, bert):
        stored = load_file(bert.folder / "model.safetensors")
        guards = {f"{name}.{key}" for name in factorized_layers(bert.model) for key in ("weight", "permutation")}
        assert guards < stored.keys()
        assert sum(t.numel() for key, t in stored.items() if key not in guards) == bert.model.num_parameters()


class TestDequantizing:
    @pytest.mark.parametrize(
        ("name", "storage"),
        [*((name, "pivoted") for name in TINY_MODELS), *((name, "two-factor") for name in DIFFERENT)],
    )
    def test_gives_a_plain_model_with_the_same_answers(self, name, storage, checkpoint, tmp_path):
        saved = checkpoint(name, storage)
        types = {path: type(module) for path, module in build(name)[0].named_modules()}
        model = copy.deepcopy(saved.model)
        names = factorized_layers(model)
        assert model.dequantize() is model
        assert {path: type(module) for path, module in model.named_modules()} == types
        assert {types[name] for name in names} <= set(LAYER_TYPES)
        assert not hasattr(model.config, "quantization_config")
        assert "dequantize" not in vars(model)
        check_same_answers(saved.model, model, saved.batch, 10 * FLOAT32)
        model.save_pretrained(tmp_path)
        assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
        again = loaded(auto_class(name), tmp_path)
        assert not factorized_layers(again)
        check_same_model(model, again, saved.batch)

    def test_of_a_loaded_model_gives_what_that_of_the_saved_one_gives(self, bert):
        again, mine = loaded(type(bert.model), bert.folder), copy.deepcopy(bert.model)
        check_same_state(again.dequantize().state_dict(), mine.dequantize().state_dict())

    def test_gives_a_model_that_can_be_compressed_again(self, bert):
        model = copy.deepcopy(bert.model).dequantize()
        model, report = compress(model, bert.batch, keep_ratio=0.4)
        assert report.keep_ratio <= 0.4

    def test_changes_the_dtype_if_asked(self, bert):
        model = copy.deepcopy(bert.model).dequantize(dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}

    def test_keeps_the_training_mode_of_each_layer(self, bert):
        model = copy.deepcopy(bert.model).train()
        name = next(iter(factorized_layers(model)))
        model.get_submodule(name).eval()
        model.dequantize()
        assert not model.get_submodule(name).training
        assert sum(not module.training for module in model.modules()) == 1

    def test_of_a_dense_model_is_refused(self):
        model, _ = build("bert-sequence-classification")
        with pytest.raises(TargetError, match="BertForSequenceClassification has no factorized or rounded layers"):
            hf_lossless_lr.dequantize(model)


WITHOUT_THE_PACKAGE = """
import json, sys
import transformers
answers = {}
for folder, auto_class in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        getattr(transformers, auto_class).from_pretrained(folder)
        answers[folder] = ["loaded", ""]
    except Exception as error:
        answers[folder] = [type(error).__name__, str(error)]
assert "hf_lossless_lr" not in sys.modules
print(json.dumps(answers))
getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1])
"""
STOCK = {name: auto_class(name) for name in ("bert-sequence-classification", "llama", "gpt2", "swin")}


@pytest.fixture(scope="module")
def outcome(checkpoint, tmp_path_factory):
    """All four checkpoints loaded in one process that never imports this package; its last load is not guarded."""
    arguments = []
    for name, model_class in STOCK.items():
        arguments += [str(checkpoint(name).folder), model_class.__name__]
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, *arguments]
    folder = tmp_path_factory.mktemp("elsewhere")
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


class TestTransformersWithoutThisPackage:
    @pytest.mark.parametrize("name", STOCK)
    def test_refuses_the_checkpoint(self, outcome, checkpoint, name):
        error, text = json.loads(outcome.stdout.splitlines()[-1])[str(checkpoint(name).folder)]
        assert error == "RuntimeError"
        assert "ignore_mismatched_sizes" in text

    def test_says_what_is_missing(self, outcome):
        assert "got lossless_lr: pip install hf-lossless-lr, then import hf_lossless_lr" in outcome.stderr

    def test_ends_with_an_error_that_names_the_layers_and_the_sizes(self, outcome):
        assert outcome.returncode != 0
        assert "MISMATCH" in outcome.stderr
        assert "size mismatch - ckpt: torch.Size([1]) vs model:torch.Size([32, 32])" in outcome.stderr
        assert "attention.self.query.weight" in outcome.stderr


QUERY = "bert.encoder.layer.0.attention.self.query"
WIDE = "bert.encoder.layer.1.intermediate.dense"


def set_manifest(**changes):
    return lambda config: config.update(changes)


def set_record(name=QUERY, **changes):
    return lambda config: config["modules"][name].update(changes)


def drop_record_field(config):
    del config["modules"][QUERY]["storage"]


def rename_record(config):
    config["modules"]["bert.encoder.layer.9.attention.self.query"] = config["modules"].pop(QUERY)


def add_record(name):
    return lambda config: config["modules"].update({name: {"rank": 3, "storage": "pivoted"}})


BAD_MANIFESTS = {
    "unknown module": (
        rename_record,
        r"lists 'bert.encoder.layer.9.attention.self.query', which BertForSequenceClassification does not have. The "
        r"config.json was edited",
    ),
    "a module that is no layer": (
        add_record("bert.embeddings.word_embeddings"),
        r"record of 'bert.embeddings.word_embeddings' does not fit the model: layers of type Embedding cannot be",
    ),
    "a layer that is stored dense": (
        add_record("bert.pooler.dense"),
        r"has no tensors for 'bert.pooler.dense' as its manifest describes it",
    ),
    "rank too high": (
        set_record(rank=32),
        rf"record of '{QUERY}' does not fit the model: rank: a pivoted layer with 32 inputs and 32 outputs takes "
        "ranks from 1 to 31, got 32",
    ),
    "wrong rank": (
        set_record(rank=3),
        rf"tensor '{QUERY}.down.weight' has the shape .*, but the manifest asks for \(3",
    ),
    "rank of zero": (set_record(rank=0), rf"modules\['{QUERY}'\]: rank must be a positive integer, got 0"),
    "rank that is no number": (set_record(rank="7"), r"rank must be a positive integer, got '7'"),
    "wrong storage": (set_record(storage="two-factor"), rf"has an extra tensor '{QUERY}.permutation'"),
    "unknown storage": (set_record(storage="three"), r"storage must be one of pivoted, two-factor, got 'three'"),
    "missing field": (
        drop_record_field,
        r"expected the keys \['rank', 'storage'\], and perhaps 'format' and 'form', got \{'rank'",
    ),
    "unknown field": (set_record(scale=2), r"expected the keys \['rank', 'storage'\]"),
    "newer format": (
        set_manifest(format_version=FORMAT_VERSION + 1),
        rf"has format version {FORMAT_VERSION + 1}; .* up to {FORMAT_VERSION}. Upgrade with `pip install -U",
    ),
    "a list": (set_manifest(modules=[QUERY]), r"modules: the manifest must map names to records, got \['bert"),
    "nothing": (set_manifest(modules={}), "the manifest of this checkpoint lists no module"),
}


def drop(*keys):
    def change(tensors):
        for key in keys:
            del tensors[key]

    return change


def put(key, value):
    return lambda tensors: tensors.update({key: value})


def transpose(key):
    return lambda tensors: tensors.update({key: tensors[key].T.contiguous()})


def edit(key, change):
    return lambda tensors: tensors.update({key: change(tensors[key]).contiguous()})


def with_one(value):
    return lambda tensor: tensor.flatten().index_fill(0, torch.tensor([5]), value).view_as(tensor)


BAD_FILES = {
    "no up": (drop(f"{QUERY}.up.weight"), rf"lacks the tensor '{QUERY}.up.weight'; it is incomplete or was edited"),
    "no down": (drop(f"{QUERY}.down.weight"), rf"lacks the tensor '{QUERY}.down.weight'"),
    "no bias": (drop(f"{QUERY}.bias"), rf"lacks the tensor '{QUERY}.bias'"),
    "no permutation": (drop(f"{QUERY}.permutation"), rf"lacks the tensor '{QUERY}.permutation'"),
    "no guard": (drop(f"{QUERY}.weight"), rf"lacks the tensor '{QUERY}.weight'"),
    "no module": (
        drop(*(f"{WIDE}.{key}" for key in ("down.weight", "up.weight", "permutation", "weight", "bias"))),
        rf"has no tensors for '{WIDE}' as its manifest describes it",
    ),
    "extra tensor": (
        put(f"{QUERY}.scale", torch.ones(2)),
        rf"has an extra tensor '{QUERY}.scale', unknown to the man",
    ),
    "wrong shape": (
        transpose(f"{QUERY}.up.weight"),
        rf"the tensor '{QUERY}.up.weight' has the shape .*, but the mani",
    ),
    "dense weight": (put(f"{QUERY}.weight", torch.ones(32, 32)), rf"'{QUERY}.weight' has the shape \(32, 32\), but"),
    "a place twice": (
        edit(f"{QUERY}.permutation", lambda order: order[[0, 0, *range(2, 32)]]),
        rf"the tensor '{QUERY}.permutation' in .*model.safetensors is no permutation of 0 to 31: a place is missing",
    ),
    "a place out of range": (
        edit(f"{QUERY}.permutation", lambda order: torch.where(order == 31, 32, order).int()),
        rf"'{QUERY}.permutation' in .*model.safetensors is no permutation of 0 to 31",
    ),
    "a negative place": (
        edit(f"{WIDE}.permutation", lambda order: torch.where(order == 31, -1, order).int()),
        rf"'{WIDE}.permutation' in .*model.safetensors is no permutation of 0 to 31",
    ),
    "places as other numbers": (
        edit(f"{QUERY}.permutation", torch.Tensor.float),
        rf"'{QUERY}.permutation' in .*model.safetensors has the dtype torch.float32 and the shape \(32,\); it must be",
    ),
    "factors as whole numbers": (
        edit(f"{QUERY}.down.weight", torch.Tensor.int),
        rf"'{QUERY}.down.weight' in .*model.safetensors has the dtype I32; it must be in floating point",
    ),
    **{
        f"{value} in {tensor}": (
            edit(tensor, with_one(value)),
            rf"the tensor '{tensor}' in .*model.safetensors has values that are NaN or infinite in torch.float32",
        )
        for tensor, value in {
            f"{QUERY}.up.weight": math.nan,
            f"{WIDE}.down.weight": -math.inf,
            f"{WIDE}.bias": math.inf,
            "classifier.weight": math.nan,
        }.items()
    },
}


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


class TestRefusal:
    @pytest.fixture
    def folder(self, bert, tmp_path):
        return Path(shutil.copytree(bert.folder, tmp_path / "copy"))

    def check_refused(self, folder, text, **options):
        before = folder_content(folder)
        with pytest.raises(CheckpointError, match=text):
            AutoModelForSequenceClassification.from_pretrained(folder, **options)
        assert folder_content(folder) == before

    @pytest.mark.parametrize("case", BAD_MANIFESTS)
    def test_of_a_manifest_that_is_wrong_says_what_is(self, folder, case):
        change, text = BAD_MANIFESTS[case]
        edit_config(folder, change)
        self.check_refused(folder, text)

    @pytest.mark.parametrize("case", BAD_FILES)
    def test_of_a_file_that_is_wrong_names_the_tensor(self, folder, case):
        change, text = BAD_FILES[case]
        edit_tensors(folder / "model.safetensors", change)
        self.check_refused(folder, text)

    def test_is_not_switched_off_by_ignoring_mismatched_sizes(self, folder):
        change, text = BAD_FILES["wrong shape"]
        edit_tensors(folder / "model.safetensors", change)
        self.check_refused(folder, text, ignore_mismatched_sizes=True)

    def test_of_a_wrong_tensor_in_one_of_several_shards(self, bert, tmp_path):
        bert.model.save_pretrained(tmp_path, max_shard_size="20KB")
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
        key = f"{WIDE}.down.weight"
        edit_tensors(tmp_path / index[key], transpose(key))
        self.check_refused(tmp_path, f"the tensor '{key}' has the shape")

    @pytest.mark.parametrize("share", [0.0, 0.0001, 0.5, 0.999])
    def test_of_a_file_that_was_cut_off_names_it(self, folder, share):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
        self.check_refused(folder, "model.safetensors is cut off, damaged or no safetensors file")

    def test_of_a_dtype_that_is_too_narrow_says_so(self, folder):
        edit_tensors(folder / "model.safetensors", edit(f"{WIDE}.down.weight", with_one(1e30)))
        self.check_refused(folder, r"NaN or infinite in torch.float16.*or its numbers are too", dtype=torch.float16)

    def test_passes_over_what_is_not_in_memory(self, bert):
        check_loaded(copy.deepcopy(bert.model).to("meta"), None)

    def test_of_another_storage_than_the_stored_one_works_both_ways(self, checkpoint, tmp_path):
        two_factor = checkpoint("bert-sequence-classification", "two-factor").folder
        folder = Path(shutil.copytree(two_factor, tmp_path / "copy"))
        edit_config(folder, set_record(storage="pivoted"))
        self.check_refused(folder, rf"lacks the tensor '{QUERY}.permutation'")

    def test_of_factors_that_the_manifest_does_not_list_is_as_loud(self, folder):
        edit_config(folder, lambda config: config["modules"].pop(QUERY))
        with pytest.raises(CheckpointError, match="which its manifest does not list"):
            AutoModelForSequenceClassification.from_pretrained(folder)

    def test_of_a_misspelt_field_suggests_the_right_one(self, folder):
        edit_config(folder, lambda config: config.update(metrik=config.pop("metric")))
        with pytest.raises(ConfigurationError, match=r"has no field 'metrik'\. Did you mean 'metric'\?"):
            AutoModelForSequenceClassification.from_pretrained(folder)

    def test_to_compress_while_loading_says_how_to_compress(self, tmp_path):
        model, _ = build("bert-sequence-classification")
        model.save_pretrained(tmp_path)
        with pytest.raises(ConfigurationError, match=r"cannot compress while loading.*LowRankCompressor\(config\)"):
            BertForSequenceClassification.from_pretrained(tmp_path, quantization_config=LosslessLowRankConfig())

    def test_of_a_second_configuration_keeps_that_of_the_checkpoint(self, bert):
        with pytest.warns(UserWarning, match="The `quantization_config` from the model will be used"):
            model = BertForSequenceClassification.from_pretrained(
                bert.folder, quantization_config=LosslessLowRankConfig(keep_ratio=0.1)
            )
        assert model.config.quantization_config.keep_ratio == 0.5


class TestTraining:
    def test_reaches_every_factor_and_saves(self, bert, tmp_path):
        model = loaded(type(bert.model), bert.folder).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # or chance decides whether the loss falls
        before = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        first = model(**bert.batch).loss
        first.backward()
        layers = factorized_layers(model)
        for name, layer in layers.items():
            assert layer.down.weight.grad.abs().sum() > 0, name
            assert layer.up.weight.grad.abs().sum() > 0, name
        optimizer.step()
        assert model.eval()(**bert.batch).loss < first
        assert all(not torch.equal(layer.down.weight, before[f"{name}.down.weight"]) for name, layer in layers.items())
        model.save_pretrained(tmp_path)
        check_same_model(model, loaded(type(model), tmp_path), bert.batch)


@pytest.mark.parametrize("of", [copy.deepcopy, lambda config: config], ids=["copy", "itself"])
def test_the_configuration_of_a_compressed_model_loads_another_one(of, bert):
    model = loaded(type(bert.model), bert.folder)
    before = model.config.to_dict()
    for model_class in (type(model), AutoModelForSequenceClassification):
        again = model_class.from_pretrained(bert.folder, config=of(model.config))
        check_same_model(model, again, bert.batch)
    assert model.config.to_dict() == before


def test_a_config_of_a_compressed_checkpoint_alone_loads(bert):
    config = AutoConfig.from_pretrained(bert.folder)
    assert config.quantization_config["quant_method"].startswith("lossless_lr: ")
    assert json.loads(bert.model.config.to_json_string())["quantization_config"]["modules"].keys() >= {QUERY, WIDE}
