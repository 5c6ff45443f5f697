"""What the commands load: a model whose weights are all those of its files, and data that somebody named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from support.tiny_models import TINY_MODELS, build
from support.word_tokenizer import WORDS, word_tokenizer

from hf_lossless_lr.commands.cli import main
from hf_lossless_lr.commands.loading import load_model
from hf_lossless_lr.errors import ConfigurationError

COUNT = 20


def rows(start=0):
    numbers = range(start, start + COUNT)
    texts = [" ".join(WORDS[k % len(WORDS)] for k in (n, n // len(WORDS), 7 * n)) for n in numbers]
    return [{"sentence": text, "label": n % 3} for n, text in zip(numbers, texts, strict=True)]


def lines(path, data):
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    TINY_MODELS["bert-sequence-classification"]()[0].save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(trained, tmp_path):
    """A copy to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "model"))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def load(folder, head="SequenceClassification"):
    return load_model(f"AutoModelFor{head}", str(folder), "float32")


class TestModels:
    def test_that_are_whole_are_loaded(self, trained):
        model = load(trained)
        state = load_file(trained / "model.safetensors")
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items() if name in state)

    @pytest.mark.parametrize(
        "tensor", ["classifier.weight", "bert.pooler.dense.bias", "bert.encoder.layer.1.output.dense.weight"]
    )
    def test_that_lack_a_tensor_of_any_module_are_refused(self, checkpoint, tensor):
        change_tensors(checkpoint, lambda tensors: tensors.pop(tensor))
        with pytest.raises(ConfigurationError, match=rf"lacks {tensor}, which .* would fill with random numbers"):
            load(checkpoint)

    def test_of_other_shapes_are_refused_with_the_shapes(self, checkpoint):
        change_config(checkpoint, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
        with pytest.raises(ConfigurationError, match=r"classifier\.weight \(\(3, 32\), not \(2, 32\)\).*config\.json"):
            load(checkpoint)

    @pytest.mark.parametrize("tensor", ["bert.encoder.layer.2.output.dense.weight", "adapter.lora_A.weight"])
    def test_with_tensors_that_the_class_has_no_place_for_are_refused(self, checkpoint, tensor):
        change_tensors(checkpoint, lambda tensors: tensors.update({tensor: torch.zeros(3, 3)}))
        with pytest.raises(ConfigurationError, match=rf"has no place for {tensor}, so .*save_pretrained"):
            load(checkpoint)

    @pytest.mark.parametrize("head", ["TokenClassification", "QuestionAnswering", "MultipleChoice", "MaskedLM"])
    def test_trained_with_another_head_are_refused(self, trained, head):
        """The head of BERT's sequence classifier has the names and shapes of its token classifier's."""
        with pytest.raises(ConfigurationError, match=r"BertForSequenceClassification.*--task"):
            load(trained, head)

    def test_may_be_read_without_their_head(self, trained):
        found = load_model("AutoModel", str(trained), "float32")
        assert type(found).__name__ == "BertModel"

    def test_of_another_head_with_the_same_tensors_are_refused(self, tmp_path):
        options = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
        options |= dict.fromkeys(["pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"], 0)
        model = build("ModernBertForSequenceClassification", "ModernBertConfig", intermediate_size=48, **options)
        model.save_pretrained(tmp_path)
        assert type(load(tmp_path)).__name__ == "ModernBertForSequenceClassification"
        with pytest.raises(ConfigurationError, match="trained as ModernBertForSequenceClassification, and Modern"):
            load(tmp_path, "TokenClassification")

    def test_may_bring_what_transformers_passes_over(self, checkpoint):
        """Buffers of former versions."""
        change_tensors(checkpoint, lambda t: t.update({"bert.embeddings.position_ids": torch.arange(40)[None]}))
        assert load(checkpoint).num_labels == 3

    def test_may_bring_a_pooler_that_their_head_does_not_look_at(self, tmp_path):
        """As dslim/bert-base-NER does."""
        TINY_MODELS["bert-token-classification"]()[0].save_pretrained(tmp_path)
        change_tensors(tmp_path, lambda tensors: tensors.update({"bert.pooler.dense.bias": torch.zeros(32)}))
        assert type(load(tmp_path, "TokenClassification")).__name__ == "BertForTokenClassification"

    def test_without_a_tokenizer_are_refused(self, checkpoint, tmp_path, capsys):
        for file in checkpoint.glob("tokenizer*"):
            file.unlink()
        data = lines(tmp_path / "a.jsonl", rows())
        options = ["--task", "text-classification", "--dataset", "json", "--data_files", data]
        assert main(["compress", str(checkpoint), *options, "--output", str(tmp_path / "out")]) == 1
        assert "has no tokenizer in it" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("command", ["compress", "verify", "evaluate"])
    def test_are_checked_by_every_command(self, command, checkpoint, trained, tmp_path, capsys):
        change_tensors(checkpoint, lambda tensors: tensors.pop("classifier.bias"))
        data = ["--dataset", "json", "--data_files", lines(tmp_path / "a.jsonl", rows())]
        models = {"compress": [checkpoint], "verify": [trained, checkpoint], "evaluate": [checkpoint]}[command]
        task = "mnli" if command == "evaluate" else "text-classification"
        output = ["--output", str(tmp_path / "out")] if command == "compress" else []
        assert main([command, *map(str, models), "--task", task, *data, *output]) == 1
        assert "lacks classifier.bias" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


class TestData:
    @pytest.fixture
    def command(self, trained, tmp_path, monkeypatch):
        """In a folder with files that nobody named."""
        stray = tmp_path / "here"
        stray.mkdir()
        lines(stray / "train.jsonl", rows(300))
        lines(stray / "validation.jsonl", rows(600))
        monkeypatch.chdir(stray)
        output = ["--output", str(tmp_path / "out")]
        return ["compress", str(trained), "--task", "text-classification", *output, "--dataset"]

    @pytest.mark.parametrize("option", ["calibration_split", "eval_split", "refit_split"])
    @pytest.mark.parametrize("split", ["validation", "test"])
    def test_of_a_split_of_files_are_refused(self, option, split, command, tmp_path, capsys):
        files = ["--data_files", lines(tmp_path / "a.jsonl", rows())]
        assert main([*command, "json", *files, f"--{option}", split]) == 1
        assert f"--{option}: files in a format (json) have no splits. Name" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("options", [[], ["--eval_split", "validation"], ["--eval_data_files", "train.jsonl"]])
    def test_that_a_loader_finds_by_itself_are_refused(self, options, command, tmp_path, capsys):
        assert main([*command, "json", *options]) == 1
        assert "--data_files: name the files; --dataset json is a format." in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("name", ["verify", "evaluate"])
    def test_that_a_loader_finds_by_itself_judge_nothing(self, name, command, trained, capsys):
        models = [str(trained)] * (2 if name == "verify" else 1)
        assert main([name, *models, "--task", "mnli", "--dataset", "json"]) == 1
        assert "--data_files: name the files" in capsys.readouterr().err

    def test_may_be_held_out_files_of_any_split_name(self, command, tmp_path):
        files = ["--data_files", lines(tmp_path / "a.jsonl", rows()), "--eval_split", "train"]
        files += ["--eval_data_files", lines(tmp_path / "b.jsonl", rows(60))]
        assert main([*command, "json", *files]) == 0

    def test_of_a_saved_data_set_without_splits_have_none(self, command, tmp_path, capsys):
        Dataset.from_list(rows()).save_to_disk(str(tmp_path / "data"))
        assert main([*command, str(tmp_path / "data"), "--eval_split", "test", "--eval_examples", "4"]) == 1
        assert "--eval_split: the data set in " in capsys.readouterr().err
