"""The documents: their links lead somewhere, the README is short and its code runs, and every option is described."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from support.tiny_models import bert_sequence_classification
from support.word_tokenizer import WORDS, word_tokenizer
from transformers import AutoModelForSequenceClassification

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.commands.cli import build_parser
from hf_lossless_lr.evaluation.glue import GLUE_LABELS
from hf_lossless_lr.evaluation.registry import EVALUATION_TASKS

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = sorted([README, *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
OWN_FIELDS = {
    "modules",
    "unfused",
    "narrowed",
    "format_version",
    "quant_method",
    "compute",
    "part",
}  # no choices of a compression


def broken_links(text, folder):
    """Relative links that lead to no file, or to no heading of it."""
    broken = []
    for target in LINK.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = folder / path if path else None
        if file is not None and not file.exists():
            broken.append(target)
        elif anchor:
            lines = (text if file is None else file.read_text(encoding="utf-8")).splitlines()
            if anchor not in {anchor_of(line) for line in lines if line.startswith("#")}:
                broken.append(target)
    return broken


def anchor_of(heading):
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lstrip("#").strip().lower()).replace(" ", "-")


def code_blocks(path):
    return [
        re.sub(r"^  ", "", code, flags=re.MULTILINE) if code.startswith("  ") else code
        for code in re.findall(r"^ *```python\n(.*?)^ *```$", path.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    ]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
class TestEveryDocument:
    def test_links_lead_somewhere(self, path):
        assert broken_links(path.read_text(encoding="utf-8"), path.parent) == []

    def test_code_compiles(self, path):
        for code in code_blocks(path):
            ast.parse(code)

    def test_names_scripts_that_exist(self, path):
        for script in re.findall(r"\b(?:examples|studies)/[\w/]+\.\w+", path.read_text(encoding="utf-8")):
            assert (ROOT / script).is_file(), script

    def test_is_reached_from_the_readme_or_the_index(self, path):
        links = LINK.findall(README.read_text(encoding="utf-8"))
        links += [f"docs/{link}" for link in LINK.findall((ROOT / "docs" / "index.md").read_text(encoding="utf-8"))]
        assert path in (README, ROOT / "docs" / "index.md") or f"docs/{path.name}" in links


def test_the_link_check_finds_what_is_broken(tmp_path):
    (tmp_path / "a.md").write_text("# A b\n")
    text = "[x](a.md) [x](a.md#a-b) [x](b.md) [x](a.md#c) [x](https://x.org/b.md)\n```\n[x](c.md)\n```\n"
    assert broken_links(text, tmp_path) == ["b.md", "a.md#c"]


def test_the_readme_is_short_and_says_how_to_begin():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    for words in ("pip install", "make demo", "make test", "import hf_lossless_lr", "## When not to use it"):
        assert words in text


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    """On a tiny model and a few sentences in place of those of the hub."""
    (code,) = code_blocks(README)
    bert_sequence_classification()[0].save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"sentence": f"{WORDS[n % 50]} {WORDS[n % 49]} {WORDS[n % 47]}", "label": n % 3} for n in range(1100)]
    data = DatasetDict(train=Dataset.from_list(rows[:1024]), validation=Dataset.from_list(rows[1024:]))
    monkeypatch.setattr("datasets.load_dataset", lambda *names: data)
    monkeypatch.chdir(tmp_path)
    name = next(line for line in code.splitlines() if line.startswith("name = "))
    exec(compile(code.replace(name, f"name = {str(tmp_path / 'model')!r}"), "README.md", "exec"), {})
    assert capsys.readouterr().out.strip().startswith(("lossless@", "improved", "inconclusive", "lossy"))
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "half").num_labels == 3


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
def test_the_code_of_the_page_after_compression_runs(tmp_path, monkeypatch):
    """From top to bottom, on a tiny model and a few sentences."""
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    tokenizer, rows = word_tokenizer(), [{"words": f"{WORDS[n]} {WORDS[-n]}", "labels": n % 3} for n in range(16)]
    data = Dataset.from_list([{**tokenizer(row["words"]), "labels": row["labels"]} for row in rows])
    dense, _ = bert_sequence_classification()
    dense.save_pretrained("my-model")
    model = LowRankCompressor(LosslessLowRankConfig()).compress(dense, data, processing_class=tokenizer)
    for part in (model, tokenizer):
        part.save_pretrained("my-model-half")
    adapted = get_peft_model(type(model).from_pretrained("my-model"), LoraConfig(target_modules=["query"]))
    adapted.save_pretrained("adapter-of-my-model")
    names = {"train_dataset": data, "held_out": data}
    for code in code_blocks(ROOT / "docs" / "after_compression.md"):
        exec(compile(code, "after_compression.md", "exec"), names)
    for name in ("trained", "sharded", "merged", "adapted"):
        folder = f"my-model-half-{name}"
        assert AutoModelForSequenceClassification.from_pretrained(folder).config.quantization_config.modules
    assert not hasattr(
        AutoModelForSequenceClassification.from_pretrained("my-model-dense").config, "quantization_config"
    )
    assert names["classify"]("good")[0]["label"] in model.config.label2id


def test_every_option_is_described_with_its_default():
    text = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    rows = {row[0]: row[1] for row in re.findall(r"^\| `(\w+)` \| (.*?) \| ", text, re.MULTILINE)}
    for option in (f for f in fields(LosslessLowRankConfig) if f.name not in OWN_FIELDS):
        assert option.name in rows, option.name
        shown = f'"{option.default}"' if isinstance(option.default, str) else str(option.default)
        if isinstance(option.default, float) and option.default < 0.001:
            shown = f"{option.default:f}".rstrip("0")
        if option.default is not None:
            assert shown in rows[option.name]


def test_the_checkpoint_that_does_not_name_its_classes_gets_the_right_names():
    """TextAttack evaluates this model with the labels of GLUE mapped as {0: 1, 1: 2, 2: 0}."""
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (names,) = re.findall(r"id2label = dict\(enumerate\((\[.*?\])\)\)", text)
    assert [ast.literal_eval(names).index(label) for label in GLUE_LABELS["mnli"]] == [1, 2, 0]


def test_every_task_and_command_is_described():
    evaluation, cli = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("evaluation.md", "cli.md"))
    assert [task for task in EVALUATION_TASKS if f"`{task}`" not in evaluation] == []
    commands = next(action for action in build_parser()._actions if action.dest == "command").choices
    assert [command for command in commands if f"| `{command}` |" not in cli] == []
