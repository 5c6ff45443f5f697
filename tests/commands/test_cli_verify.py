"""`hf-lossless-lr verify`: a verdict on any pair of checkpoints."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import TINY_MODELS
from support.word_tokenizer import WORDS, word_tokenizer
from transformers import AutoModel

from hf_lossless_lr.commands.cli import main

COUNT = 300  # with 200, even no change at all leaves an upper bound above one point


def texts(start, count):
    return [
        f"{WORDS[n % len(WORDS)]} {WORDS[n // len(WORDS)]} {WORDS[7 * n % 13]}" for n in range(start, start + count)
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model that is as often right as it thinks, and a disturbed copy of it."""
    folder = tmp_path_factory.mktemp("place")
    model, tokenizer = TINY_MODELS["bert-sequence-classification"]()[0].eval(), word_tokenizer()
    lines = texts(0, COUNT)
    encoded = tokenizer(lines, padding=True, return_tensors="pt")
    with torch.no_grad():
        model.classifier.bias -= model(**encoded).logits.mean(0)  # no class is the usual one
        factor = 3 / model(**encoded).logits.std()
        for parameter in model.classifier.parameters():
            parameter.mul_(factor)  # quite sure of its answers
        chances = model(**encoded).logits.softmax(-1)
        labels = torch.multinomial(chances, 1, generator=torch.Generator().manual_seed(0)).squeeze(1).tolist()
    data = folder / "validation.jsonl"
    data.write_text("".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in zip(lines, labels, strict=True)))
    for name in ("dense", "other"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return SimpleNamespace(dense=str(folder / "dense"), other=str(folder / "other"), data=str(data))


@pytest.fixture
def verify(place):

    def run(compressed, *options):
        where = ("--task", "text-classification", "--dataset", "json", "--data_files", place.data)
        return main(["verify", place.dense, compressed, *where, *options])

    return run


class TestVerify:
    def test_of_the_same_model_is_lossless(self, verify, place, capsys):
        assert verify(place.dense, "--require", "lossless") == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith("lossless@(0.01 nats, 1 point): on 300 held-out examples")

    def test_of_a_worse_model_is_lossy(self, verify, place, capsys):
        assert verify(place.other) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith("lossy: ")

    def test_that_falls_short_of_what_is_required_exits_with_4(self, verify, place, capsys):
        assert verify(place.other, "--require", "lossless") == 4
        assert "the verdict is lossy, not lossless" in capsys.readouterr().err
        assert verify(place.dense, "--require", "improved") == 4

    def test_takes_margins_and_a_number_of_examples(self, verify, place, capsys):
        assert verify(place.dense, "--loss_margin", "0.5", "--accuracy_margin", "0.1", "--examples", "50") == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith("lossless@(0.5 nats, 10 points): on 50 ")

    def test_writes_the_certificate(self, verify, place, tmp_path):
        assert verify(place.other, "--json", str(tmp_path / "c.json")) == 0
        certificate = json.loads((tmp_path / "c.json").read_text())
        assert (certificate["status"], certificate["examples"]) == ("lossy", COUNT)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--examples", "20"), "20 examples are too few"),
            (("--confidence", "1.5"), "confidence: must be a number in"),
            (("--data_files", "/no/such.jsonl"), "cannot load the data set"),
            (("--examples", "0"), "--examples: must be at least 1, got 0."),
            (("--task", "image-classification"), "with AutoModelForImageClassification; does it fit --task? Unrecog"),
            (("--json", "/no/such/file"), "--json: there is no folder /no/such"),
        ],
    )
    def test_explains_what_is_wrong(self, options, message, verify, place, capsys):
        assert verify(place.dense, *options) == 1
        assert message in capsys.readouterr().err

    def test_refuses_the_data_that_made_the_model(self, verify, place, tmp_path, capsys):
        """The report beside a compressed checkpoint has the fingerprint of its calibration data."""
        held_out = tmp_path / "held_out.jsonl"
        held_out.write_text("".join(json.dumps({"text": t, "label": 0}) + "\n" for t in texts(COUNT, 10)))
        arguments = ["compress", place.dense, "--task", "text-classification", "--dataset", "json", "--refit", "false"]
        arguments += [
            "--data_files",
            place.data,
            "--eval_data_files",
            str(held_out),
            "--output",
            str(tmp_path / "out"),
        ]
        assert main(arguments) == 0
        assert verify(str(tmp_path / "out")) == 1
        assert "made from" in capsys.readouterr().err
        assert verify(str(tmp_path / "out"), "--examples", "100") == 0
        assert "not those that its report" not in capsys.readouterr().err
        file = tmp_path / "out" / "model.safetensors"
        tensors = load_file(file)
        tensors["classifier.bias"] += 1
        save_file(tensors, file, metadata={"format": "pt"})
        assert verify(str(tmp_path / "out"), "--examples", "100") == 0
        assert "are not those that its report is about" in capsys.readouterr().err


def test_compares_representations_of_models_without_a_head(place, tmp_path, capsys):
    models = [AutoModel.from_pretrained(name) for name in (place.dense, place.other)]
    for name, model in zip(("dense", "other"), models, strict=True):
        model.save_pretrained(tmp_path / name)
        word_tokenizer().save_pretrained(tmp_path / name)
    options = ["--task", "feature-extraction", "--dataset", "json", "--data_files", place.data]
    found = {}
    for name in ("dense", "other"):
        paths = [str(tmp_path / "dense"), str(tmp_path / name)]
        assert main(["verify", *paths, *options, "--json", str(tmp_path / "found.json")]) == 0
        found[name] = json.loads((tmp_path / "found.json").read_text())
    assert found["dense"]["status"] == "lossless"
    assert found["dense"]["loss"] == [0.0, 0.0]
    assert found["other"]["status"] == "lossy"
    encoded = word_tokenizer()(texts(0, COUNT), padding=True, return_tensors="pt")
    with torch.no_grad():
        states = [model.eval()(**encoded).last_hidden_state for model in models]
    distance = 1 - torch.cosine_similarity(*states, dim=-1)[encoded["attention_mask"].bool()].mean()
    assert found["other"]["loss"][1] == pytest.approx(float(distance), rel=1e-3)
