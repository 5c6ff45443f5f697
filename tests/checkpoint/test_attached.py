"""The README of a checkpoint: what it says, and when `save_pretrained` and `push_to_hub` write it."""

import copy
import inspect
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig
from support.adapters import takes_adapters
from support.compressions import auto_class, build, check_same_model, compress, compressed, factorized_layers
from support.reports import CERTIFICATE, REPORT, certified, layer, options, uncertified
from support.tiny_models import TINY_MODELS, split_batch
from transformers import BertForSequenceClassification, PreTrainedModel
from transformers.utils import logging

from hf_lossless_lr import CompressionReport, LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.checkpoint.attached_card import CHANGED_WEIGHTS, attach_card
from hf_lossless_lr.checkpoint.cards import card_of
from hf_lossless_lr.report.records import REPORT_NAME, Difference
from hf_lossless_lr.report.sentence import verdict_sentence

NAME = "bert-sequence-classification"


def metadata(card):
    return yaml.safe_load(card.replace("\r\n", "\n").split("---\n")[1])


def table(card, header):
    """The rows of the table with this header: the first cell to the others."""
    lines = card.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(f"| {header} |"))
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        first, *others = [cell.strip() for cell in line.strip("|").split("|")]
        rows[first] = others
    return rows


def code_blocks(card):
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


class TestCard:
    def test_has_metadata_that_parse_and_name_no_base_model_of_their_own(self):
        assert metadata(card_of(REPORT)) == {
            "library_name": "transformers",
            "tags": ["hf-lossless-lr", "low-rank", "compressed"],
        }
        assert metadata(card_of(REPORT, "someone/bert"))["base_model"] == "someone/bert"
        assert "# someone/bert with 75 % of its parameters" in card_of(REPORT, "someone/bert")
        assert "# BertForSequenceClassification with 75 % of its parameters" in card_of(REPORT)

    @pytest.mark.parametrize(
        "report", [REPORT, certified(status="inconclusive"), uncertified("nothing was compressed")]
    )
    def test_states_the_verdict(self, report):
        assert f"**Verdict:** {verdict_sentence(report)}\n" in card_of(report)

    def test_shows_both_models_as_measured(self):
        rows = table(card_of(REPORT), "")
        layers = REPORT.layers.values()
        assert rows == {
            "targeted parameters": [
                "960",
                f"{sum(layer.parameters for layer in layers)} ({100 * REPORT.keep_ratio:.1f} %)",
            ],
            "parameters": ["12,000", "9,000 (75.0 %)"],
            "loss (nats)": ["0.2700", "0.2721"],
            "accuracy": ["89.33 %", "89.13 %"],
            "expected calibration error": ["0.0155", "0.0202"],
            "fitted temperature": ["1.055", "1.078"],
        }

    def test_shows_the_differences_with_their_bounds_and_margins(self):
        assert table(card_of(REPORT), "difference, positive is worse") == {
            "loss (nats)": ["+0.0021", "-0.0002", "+0.0042", "0.01"],
            "loss at fitted temperatures (nats)": ["+0.0018", "-0.0004", "+0.0039", "0.01"],
            "accuracy drop (points)": ["+0.20", "-0.22", "+0.61", "1"],
            "changed answers": ["1.73 %", "", "", ""],
            "KL divergence (nats)": ["0.0037", "", "", ""],
        }
        about = "at 95 % confidence, from 3,000 held-out examples with 3,100 labelled units"
        assert about in card_of(REPORT)
        assert "beyond its margin is 0.0012." in card_of(REPORT)

    def test_says_where_there_is_no_bound(self):
        card = card_of(certified(loss_increase=Difference(0.1, -math.inf, math.inf)))
        assert table(card, "difference, positive is worse")["loss (nats)"] == ["+0.1000", "unknown", "unknown", "0.01"]

    def test_leaves_out_what_a_head_does_not_have(self):
        nothing = dict.fromkeys(
            ("accuracy", "accuracy_drop", "temperatures", "tempered_loss_increase", "calibration_error", "changed")
        )
        report = certified(**nothing, divergence=None, clusters="batches")
        report = replace(
            report,
            dense=replace(report.dense, accuracy=None),
            compressed=replace(report.compressed, accuracy=None),
        )
        card = card_of(report)
        assert set(table(card, "")) == {"targeted parameters", "parameters", "loss (nats)"}
        assert set(table(card, "difference, positive is worse")) == {"loss (nats)"}
        assert "batches are taken as independent" in card

    def test_without_a_certificate_claims_nothing(self):
        card = card_of(uncertified("5 examples are too few"))
        assert set(table(card, "")) == {"targeted parameters", "parameters", "loss (nats)", "accuracy"}
        assert "difference, positive is worse" not in card
        assert "confidence" not in card

    def test_gives_the_reasons_against_the_verdict_and_its_limits(self):
        card = card_of(certified(reasons=("the logits are less extreme", "it rains")))
        assert "Note: the logits are less extreme.\n\nNote: it rains." in card
        assert "data of another kind" in card
        assert "speed" in card

    def test_says_how_to_load_the_model(self):
        code = code_blocks(card_of(REPORT))[0]
        compile(code, "card", "exec")
        assert code.startswith("import hf_lossless_lr  # pip install hf-lossless-lr")
        assert "from transformers import BertForSequenceClassification\n" in code
        assert "BertForSequenceClassification.from_pretrained(" in code

    def test_does_not_pretend_that_a_class_of_the_user_is_in_transformers(self):
        code = code_blocks(card_of(replace(REPORT, model="MyModel")))[0]
        assert "from your_code import MyModel\n" in code

    def test_lists_what_stayed_dense_by_reason(self):
        card = card_of(REPORT)
        assert "11 of 12 targeted layers are factorized" in card
        assert f"they keep {100 * REPORT.keep_ratio:.2f} % of their parameters" in card
        assert f"the whole model keeps {100 * REPORT.model_keep_ratio:.2f} %." in card
        lines = [line for line in card.splitlines() if line.startswith("* ")]
        assert lines == [
            "* pooler (9.0 % of the model): `bert.pooler.dense`",
            "* task head (1.0 % of the model): `classifier`",
            "* small (0.5 % of the model): `extra.*.fc` (2)",
            "* targeted, but left dense by the choice of ranks: `bert.encoder.layer.2.attention.self.key`",
        ]

    def test_of_a_model_without_a_dense_layer_lists_none(self):
        card = card_of(replace(REPORT, skipped={}, layers={"a.0.b": layer(2)}))
        assert "1 of 1 targeted layers are factorized" in card
        assert "Not factorized" not in card

    def test_names_the_data_and_the_versions(self):
        card = card_of(REPORT)
        assert table(card, "part of the data") == {
            "calibration": ["1,480", f"`{'ca' * 32}`"],
            "held out": ["3,000", f"`{'e1' * 32}`"],
            "selection": ["", f"`{'5e' * 32}`"],
        }
        assert f"`{'de' * 32}`" in card
        assert "Versions: python 3.11.7, torch 2.13.0." in card

    @pytest.mark.parametrize(
        ("changes", "written"),
        [
            ({}, "()"),
            ({"keep_ratio": 0.3, "ignore": ["a", "b"]}, "(keep_ratio=0.3, ignore=['a', 'b'])"),
            ({"objective": "compact"}, "(objective='compact')"),
            ({"objective": "compact", "loss_margin": 0.02}, "(objective='compact', loss_margin=0.02)"),
            ({"objective": "paper-lossless", "epsilon": 0.1}, "(objective='paper-lossless', epsilon=0.1)"),
            ({"refit": False, "selection_fraction": 0.25}, "(refit=False, selection_fraction=0.25)"),
            ({"metric": "activation"}, None),
        ],
    )
    def test_reproduces_the_configuration_from_what_is_not_default(self, changes, written):
        code = code_blocks(card_of(replace(REPORT, config=options(**changes))))[1]
        line = next(line for line in code.splitlines() if line.startswith("config = "))
        assert written is None or line == f"config = LosslessLowRankConfig{written}"
        config = eval(line.removeprefix("config = "), {"LosslessLowRankConfig": LosslessLowRankConfig})
        assert config == LosslessLowRankConfig(**changes)
        compile(code, "card", "exec")

    def test_is_the_same_text_for_the_same_result_whatever_it_took(self):
        assert card_of(REPORT) == card_of(replace(REPORT, seconds={"statistics": 1.0}))


@pytest.fixture(scope="module")
def small():
    """A compressed BERT with its batch and its report; treat them as read-only."""
    model, batch = build(NAME)
    model, report = compress(model, batch)
    return SimpleNamespace(model=model, batch=batch, report=report, dense=build(NAME)[0])


def files(folder):
    return {path.name for path in folder.iterdir()}


def saved_report(folder):
    return CompressionReport.from_json((folder / REPORT_NAME).read_text())


def change_weights(model):
    with torch.no_grad():
        model.classifier.weight.add_(1)


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


USERS_CARDS = {
    "text": b"my own words",
    "empty": b"",
    "with metadata": b"---\nlicense: mit\n---\n# Mine\n",
    "with broken metadata": b"---\nlicense: [\n---\n# Mine\n",
    "with odd metadata": b"---\n- a list\n---\n# Mine\n",
    "with Windows line ends": b"---\r\nlicense: mit\r\n---\r\n# Mine\r\n",
    "in Latin-1": "---\nlicense: mit\n---\n# Für mich\n".encode("latin-1"),
    "ours, edited": card_of(REPORT).replace("## Layers", "## Layers, as I see them").encode(),
    "ours, continued": (card_of(REPORT) + "\nMore.\n").encode(),
}


class TestSave:
    def test_writes_card_and_report_beside_the_weights(self, small, tmp_path):
        small.model.save_pretrained(tmp_path / "out")
        assert files(tmp_path / "out") == {"config.json", "model.safetensors", "README.md", REPORT_NAME}
        assert saved_report(tmp_path / "out") == small.report
        assert (tmp_path / "out" / "README.md").read_text() == card_of(small.report)

    @pytest.mark.parametrize("case", USERS_CARDS)
    def test_never_replaces_the_card_of_a_user(self, case, small, tmp_path):
        (tmp_path / "README.md").write_bytes(USERS_CARDS[case])
        small.model.save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_bytes() == USERS_CARDS[case]
        assert saved_report(tmp_path) == small.report

    def test_replaces_its_own_card_and_keeps_metadata_that_were_added(self, small, tmp_path):
        old = card_of(certified(examples=77777), "someone/bert")
        added = old.replace("library_name: transformers", "license: mit\nlibrary_name: transformers\nlanguage: en")
        (tmp_path / "README.md").write_text(added.replace("- compressed", "- compressed\n- mine"))
        small.model.save_pretrained(tmp_path)
        card = (tmp_path / "README.md").read_text()
        assert verdict_sentence(small.report) in card
        assert "77,777" not in card
        assert metadata(card) == {
            "library_name": "transformers",
            "license": "mit",
            "language": "en",
            "base_model": "someone/bert",
            "tags": ["hf-lossless-lr", "low-rank", "compressed", "mine"],
        }
        small.model.save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text() == card

    def test_on_another_process_writes_nothing(self, small, tmp_path):
        """But what Transformers itself writes there: older versions write the weights."""
        for name in ("model", "dense"):
            getattr(small, name).save_pretrained(tmp_path / name, is_main_process=False)
        assert files(tmp_path / "model") == files(tmp_path / "dense")

    def test_has_the_signature_and_the_text_of_any_model(self, small):
        assert inspect.signature(small.model.save_pretrained) == inspect.signature(small.dense.save_pretrained)
        assert small.model.save_pretrained.__doc__ == PreTrainedModel.save_pretrained.__doc__

    @pytest.mark.parametrize("by_name", [True, False])
    def test_passes_every_argument_on(self, by_name, small, tmp_path, monkeypatch):
        calls = []

        def save(self, *args, **kwargs):
            calls.append(inspect.signature(original).bind(self, *args, **kwargs).arguments)
            Path(calls[-1]["save_directory"]).mkdir()

        original = PreTrainedModel.save_pretrained
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
        state = small.model.state_dict()
        expected = {
            "save_directory": tmp_path / "out",
            "is_main_process": True,
            "state_dict": state,
            "push_to_hub": False,
            "max_shard_size": "1MB",
            "variant": "x",
        }
        if by_name:
            small.model.save_pretrained(**expected, commit_message="hello")
        else:
            small.model.save_pretrained(*expected.values(), commit_message="hello")
        (found,) = calls
        assert found.pop("self") is small.model
        assert found.pop("kwargs") == {"commit_message": "hello"}
        passed = found.pop("state_dict")
        assert passed.keys() == state.keys()
        assert all(tensor is state[name] for name, tensor in passed.items())
        assert found == {name: value for name, value in expected.items() if name != "state_dict"}
        assert saved_report(tmp_path / "out") == small.report

    def test_to_a_file_does_what_transformers_does(self, small, tmp_path):
        (tmp_path / "file").write_text("mine")
        small.model.save_pretrained(tmp_path / "file")
        assert (tmp_path / "file").read_text() == "mine"
        assert files(tmp_path) == {"file"}

    def test_that_fails_writes_neither(self, small, tmp_path, monkeypatch):
        def fail(*_, **__):
            raise OSError("the disk is full")

        monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
        with pytest.raises(OSError, match="the disk is full"):
            small.model.save_pretrained(tmp_path)
        assert files(tmp_path) == set()

    def test_of_a_model_with_nothing_compressed_is_that_of_any_model(self, tmp_path):
        model, batch = build(NAME)
        model, report = compress(model, batch, objective="compact", loss_margin=0.0, accuracy_margin=0.0)
        assert not factorized_layers(model)
        assert report.uncertified == "nothing was compressed"
        model.save_pretrained(tmp_path)
        assert files(tmp_path) == {"config.json", "model.safetensors"}

    @takes_adapters
    def test_of_adapters_leaves_the_folder_to_them(self, small, tmp_path):
        model = copy.deepcopy(small.model)
        model.add_adapter(LoraConfig(target_modules=["up", "down"], r=2))
        model.save_pretrained(tmp_path)
        assert "adapter_config.json" in files(tmp_path)
        assert REPORT_NAME not in files(tmp_path)


class TestChangedWeights:
    """A certificate is about the weights that were measured, and no others."""

    @pytest.mark.parametrize("change", [change_weights, PreTrainedModel.half], ids=["trained", "cast"])
    def test_lose_the_certificate(self, change, small, tmp_path):
        model = copy.deepcopy(small.model)
        change(model)
        model.save_pretrained(tmp_path)
        report = saved_report(tmp_path)
        assert report.certificate is None
        assert report.uncertified == CHANGED_WEIGHTS
        assert report.layers == small.report.layers
        assert CHANGED_WEIGHTS in (tmp_path / "README.md").read_text()

    def test_take_the_certificate_from_an_older_card(self, small, tmp_path):
        model = attached(copy.deepcopy(small.model), certified())
        model.save_pretrained(tmp_path)
        assert "lossless@" in (tmp_path / "README.md").read_text()
        assert saved_report(tmp_path) == certified()
        change_weights(model)
        model.save_pretrained(tmp_path)
        assert "lossless@" not in (tmp_path / "README.md").read_text()
        assert saved_report(tmp_path).verdict == "none"

    def test_are_told_by_the_state_dict_that_is_saved(self, small, tmp_path):
        model = attached(copy.deepcopy(small.model), certified())
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.save_pretrained(tmp_path / "same", state_dict=dict(state))
        assert saved_report(tmp_path / "same").verdict == "lossless@(0.01 nats, 1 point)"
        state["classifier.bias"] = state["classifier.bias"] + 1
        model.save_pretrained(tmp_path / "other", state_dict=state)
        assert saved_report(tmp_path / "other").verdict == "none"

    def test_are_assumed_where_the_tensors_cannot_be_read(self, small, tmp_path, monkeypatch):
        model = attached(copy.deepcopy(small.model), certified())
        state = model.state_dict() | {"classifier.weight": model.classifier.weight.to("meta")}
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", lambda *_, **__: None)
        model.save_pretrained(tmp_path, state_dict=state)
        assert saved_report(tmp_path).verdict == "none"

    def test_are_warned_about(self, small, tmp_path, caplog, monkeypatch):
        monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
        logging.set_verbosity_warning()
        try:
            logger = logging.get_logger("hf_lossless_lr.checkpoint.attached_card")
            type(logger).warning_once.cache_clear()
            model = copy.deepcopy(small.model)
            change_weights(model)
            with caplog.at_level("WARNING"):
                model.save_pretrained(tmp_path)
        finally:
            logging.set_verbosity_error()
        assert f"{CHANGED_WEIGHTS}; its model card has no certificate." in caplog.text


def attached(model, report):
    attach_card(model, report)
    return model


def calibrated():
    model, batch = TINY_MODELS[NAME](24)
    first, *others = split_batch(batch, 8)
    compressor = LowRankCompressor(LosslessLowRankConfig(refit=False))
    compressor.calibrate(model, others, eval_dataset=[first])
    return model, compressor


class TestEnd:
    """Without its compression, a model saves as any other."""

    def test_of_a_restored_model(self, tmp_path):
        model, compressor = calibrated()
        compressor.compress_to()
        model.save_pretrained(tmp_path / "compressed")
        assert REPORT_NAME in files(tmp_path / "compressed")
        compressor.restore()
        assert not {"save_pretrained", "_upload_modified_files", "dequantize"} & set(vars(model))
        model.save_pretrained(tmp_path / "dense")
        assert files(tmp_path / "dense") == {"config.json", "model.safetensors"}

    def test_of_a_dequantized_model(self, small, tmp_path):
        model = copy.deepcopy(small.model)
        model.save_pretrained(tmp_path / "compressed")
        model.dequantize()
        assert not {"save_pretrained", "_upload_modified_files", "dequantize"} & set(vars(model))
        model.save_pretrained(tmp_path / "dense")
        assert files(tmp_path / "dense") == {"config.json", "model.safetensors"}

    def test_each_ratio_has_its_own_report(self, tmp_path):
        _, compressor = calibrated()
        for keep_ratio in (0.6, 0.4):
            compressor.compress_to(keep_ratio).save_pretrained(tmp_path / str(keep_ratio))
            assert saved_report(tmp_path / str(keep_ratio)) == compressor.report
        assert saved_report(tmp_path / "0.6").keep_ratio > saved_report(tmp_path / "0.4").keep_ratio


class TestCopies:
    @pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
    @pytest.mark.parametrize("saved_before", [True, False])
    def test_save_themselves_with_the_report(self, duplicate, saved_before, small, tmp_path):
        model = attached(copy.deepcopy(small.model), certified())
        if saved_before:  # which attaches more
            model.save_pretrained(tmp_path / "before")
        other = duplicate(model)
        other.save_pretrained(tmp_path / "other")
        assert saved_report(tmp_path / "other") == certified()
        change_weights(other)
        other.save_pretrained(tmp_path / "changed")
        again = BertForSequenceClassification.from_pretrained(tmp_path / "changed").eval()
        check_same_model(other, again, small.batch)
        assert not torch.equal(model.classifier.weight, other.classifier.weight)
        assert saved_report(tmp_path / "changed").verdict == "none"
        model.save_pretrained(tmp_path / "model")
        assert saved_report(tmp_path / "model") == certified()

    def test_of_every_kind_of_model_can_be_made(self, tmp_path):
        for name in ("gpt2", "t5", "swin"):
            model = compressed(name)[0]
            pickled(model).save_pretrained(tmp_path / name)
            auto_class(name).from_pretrained(tmp_path / name)
            assert f"from transformers import {type(model).__name__}\n" in (tmp_path / name / "README.md").read_text()


class Hub:
    """A Hub of one repository in memory, which answers like the real one and counts commits."""

    def __init__(self, **contents):
        self.files = {name.replace("_", "."): text for name, text in contents.items()}
        self.commits = []

    def create_repo(self, repo_id, **_):
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id, operations, **options):
        new = {operation.path_in_repo: Path(operation.path_or_fileobj).read_bytes() for operation in operations}
        self.commits.append({"files": set(new), **options})
        self.files |= new
        return f"https://example.org/{repo_id}"

    @property
    def card(self):
        return self.files["README.md"].decode()

    @property
    def report(self):
        return CompressionReport.from_json(self.files[REPORT_NAME].decode())


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Put a fake Hub in the place of the real one; what asks for its card goes the way of Transformers."""

    def start(**contents):
        hub = Hub(**contents)

        def download(repo_id, filename, **_):
            if filename not in hub.files:
                raise LocalEntryNotFoundError(f"{repo_id} has no {filename}")
            (tmp_path / "downloaded").write_bytes(hub.files[filename])
            return str(tmp_path / "downloaded")

        monkeypatch.setattr("transformers.utils.hub.hf_api", lambda *_, **__: hub)
        monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda *_, **__: hub)
        monkeypatch.setattr("huggingface_hub.repocard.hf_hub_download", download)
        return hub

    return start


def by_push(model, tmp_path, **options):
    model.push_to_hub("someone/small", **options)


def by_save(model, tmp_path, **options):
    model.save_pretrained(tmp_path / "small", push_to_hub=True, repo_id="someone/small", **options)


@pytest.mark.parametrize("push", [by_push, by_save])
class TestPush:
    def test_uploads_card_report_and_weights_in_one_commit(self, push, small, hub, tmp_path):
        server = hub()
        push(small.model, tmp_path)
        (commit,) = server.commits
        assert commit["files"] == {"config.json", "model.safetensors", "README.md", REPORT_NAME}
        assert server.card.rstrip() == card_of(small.report).rstrip()
        assert server.report == small.report

    def test_of_a_dense_model_uploads_the_template(self, push, small, hub, tmp_path):
        server = hub()
        push(copy.deepcopy(small.model).dequantize(), tmp_path)
        assert "This model card has been automatically generated" in server.card
        assert REPORT_NAME not in server.files

    def test_keeps_the_options_of_the_commit(self, push, small, hub, tmp_path):
        server = hub()
        push(small.model, tmp_path, commit_message="Smaller", create_pr=True)
        assert server.commits[0]["commit_message"] == "Smaller"
        assert server.commits[0]["create_pr"] is True

    @pytest.mark.parametrize("case", ["text", "with metadata", "ours, edited"])
    def test_leaves_the_card_that_a_user_wrote_on_the_hub(self, case, push, small, hub, tmp_path):
        server = hub(README_md=USERS_CARDS[case])
        push(small.model, tmp_path)
        assert ModelCard(server.card).text == ModelCard(USERS_CARDS[case].decode()).text
        assert server.report == small.report

    def test_leaves_a_template_that_a_user_filled_in(self, push, small, hub, tmp_path):
        server = hub()
        push(copy.deepcopy(small.model).dequantize(), tmp_path / "first")
        filled = server.card.replace("[More Information Needed]", "me", 1)
        server.files["README.md"] = filled.encode()
        push(small.model, tmp_path)
        assert server.card == filled

    def test_replaces_an_untouched_template_and_its_own_older_card(self, push, small, hub, tmp_path):
        server = hub()
        push(copy.deepcopy(small.model).dequantize(), tmp_path / "dense")
        push(attached(copy.deepcopy(small.model), certified(examples=77777)), tmp_path / "first")
        assert "77,777" in server.card
        push(attached(copy.deepcopy(small.model), certified(examples=88888)), tmp_path / "second")
        assert "77,777" not in server.card
        assert "88,888" in server.card
        assert server.report.certificate.examples == 88888

    def test_claims_nothing_about_weights_that_were_changed(self, push, small, hub, tmp_path):
        server = hub()
        model = attached(copy.deepcopy(small.model), certified())
        push(model, tmp_path / "first")
        assert "lossless@" in server.card
        change_weights(model)
        push(model, tmp_path / "second")
        assert "lossless@" not in server.card
        assert CHANGED_WEIGHTS in server.card
        assert server.report.verdict == "none"

    def test_of_a_copy_uploads_the_copy(self, push, small, hub, tmp_path):
        server = hub()
        push(small.model, tmp_path / "first")
        before = server.files["model.safetensors"]
        other = copy.deepcopy(small.model)
        change_weights(other)
        push(other, tmp_path / "second")
        assert server.files["model.safetensors"] != before


class TestPushOfAFolder:
    def test_uploads_the_card_of_the_user_that_is_there_and_leaves_it(self, small, hub, tmp_path):
        server = hub()
        (tmp_path / "small").mkdir()
        (tmp_path / "small" / "README.md").write_bytes(USERS_CARDS["with Windows line ends"])
        by_save(small.model, tmp_path)
        assert (tmp_path / "small" / "README.md").read_bytes() == USERS_CARDS["with Windows line ends"]
        assert "# Mine" in server.card
        assert metadata(server.card)["license"] == "mit"
        assert server.report == small.report

    def test_whose_card_has_broken_metadata_works(self, small, hub, tmp_path):
        server = hub()
        (tmp_path / "small").mkdir()
        (tmp_path / "small" / "README.md").write_bytes(USERS_CARDS["with broken metadata"])
        by_save(small.model, tmp_path)
        assert (tmp_path / "small" / "README.md").read_bytes() == USERS_CARDS["with broken metadata"]
        assert server.card.encode() == USERS_CARDS["with broken metadata"]

    def test_that_was_saved_before_uploads_its_report(self, small, hub, tmp_path):
        server = hub()
        small.model.save_pretrained(tmp_path / "small")
        by_save(small.model, tmp_path)
        assert server.report == small.report
        assert server.card == (tmp_path / "small" / "README.md").read_text()

    def test_keeps_tags_that_are_asked_for(self, small, hub, tmp_path):
        server = hub()
        by_push(small.model, tmp_path, tags=["mine", "low-rank"])
        assert metadata(server.card)["tags"] == ["hf-lossless-lr", "low-rank", "compressed", "mine"]


class TestBaseModel:
    @pytest.fixture
    def cache(self, tmp_path, monkeypatch):
        """A cache of the Hub with `someone/bert` in it."""
        folder = tmp_path / "cache" / "models--someone--bert"
        (folder / "snapshots" / "abc").mkdir(parents=True)
        (folder / "snapshots" / "abc" / "config.json").write_text("{}")
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("abc")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)

    def saved(self, small, name, tmp_path):
        model = copy.deepcopy(small.model)
        model.name_or_path = name
        attach_card(model, small.report)
        model.save_pretrained(tmp_path / "out")
        return (tmp_path / "out" / "README.md").read_text()

    @pytest.mark.usefixtures("cache")
    def test_is_the_model_on_the_hub_that_was_loaded(self, small, tmp_path):
        card = self.saved(small, "someone/bert", tmp_path)
        assert metadata(card)["base_model"] == "someone/bert"

    @pytest.mark.usefixtures("cache")
    @pytest.mark.parametrize("name", ["", "someone/other", "/home/me/secret/model", "../secret", "a/b/c/secret"])
    def test_is_not_made_up_and_betrays_no_folder(self, name, small, tmp_path):
        card = self.saved(small, name, tmp_path)
        assert "base_model" not in metadata(card)
        assert name == "" or name not in card

    @pytest.mark.usefixtures("cache")
    def test_is_not_a_folder_of_that_name(self, small, tmp_path):
        (tmp_path / "someone" / "bert").mkdir(parents=True)
        assert "base_model" not in metadata(self.saved(small, "someone/bert", tmp_path))


def test_the_report_that_is_written_is_json_that_others_can_read(small, tmp_path):
    small.model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / REPORT_NAME).read_text())["verdict"] == small.report.verdict
    assert CERTIFICATE.verdict == "lossless@(0.01 nats, 1 point)"
