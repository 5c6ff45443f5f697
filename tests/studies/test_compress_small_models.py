"""The study of the paper's tasks: fine-tune a tiny model on local data, compress it, and score it before and after."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from support.tiny_models import bert_question_answering, bert_token_classification
from support.word_tokenizer import WORDS, word_tokenizer
from transformers import AutoConfig

from hf_lossless_lr import CompressionReport

STUDIES = Path(__file__).resolve().parents[2] / "studies"
TAGS = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"]


def run(name, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        return runpy.run_path(str(STUDIES / f"{name}.py"), run_name="__main__")


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def answers(count, words=6):
    """Questions on eight articles; the answer is a word of the passage."""
    rows = []
    for number in range(count):
        passage = [WORDS[(number + 7 * place) % len(WORDS)] for place in range(words)]
        start = sum(len(word) + 1 for word in passage[: number % words])
        rows.append(
            {
                "title": f"article {number // 4}",
                "question": WORDS[number % len(WORDS)],
                "context": " ".join(passage),
                "answers": {"text": [passage[number % words]], "answer_start": [start]},
            }
        )
    return rows


def tagged(count, seed):
    tokens = [[WORDS[(n + (5 + seed) * place) % len(WORDS)] for place in range(5)] for n in range(count)]
    return [{"tokens": row, "ner_tags": [(n + place) % 7 for place in range(5)]} for n, row in enumerate(tokens)]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def save(folder, model):
    model.save_pretrained(folder)
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = 40
    tokenizer.save_pretrained(folder)
    return folder


def test_of_answers_calibrates_on_other_articles_than_it_scores(place, capsys):
    write(place / "data" / "validation.jsonl", answers(32))
    options = ["--task", "squad", "--data", place / "data", "--keep-ratio", 0.6, "--output", place / "out"]
    model = save(place / "model", bert_question_answering()[0])
    defined = run("compress_small_models", "--model", model, *options)
    printed = capsys.readouterr().out
    assert "exact_match" in printed
    assert "of the targeted parameters; " in printed
    assert (place / "out" / "model.safetensors").is_file()
    calibration, held_out = defined["load_parts"](place / "data")
    assert not set(calibration["title"]) & set(held_out["title"])
    assert (len(calibration), len(held_out)) == (16, 16)


def test_of_entities_trains_a_head_and_scores_it(place, capsys):
    for seed, part in enumerate(("train", "validation")):
        write(place / "data" / f"{part}.jsonl", tagged(40, seed))
    encoder, task = save(place / "model", bert_token_classification()[0]), ["--task", "conll2003"]
    options = [*task, "--data", place / "data", "--output", place / "tagger", "--epochs", 1, "--max-length", 32]
    run("finetune_small_models", "--model", encoder, *options)
    assert list(AutoConfig.from_pretrained(place / "tagger").id2label.values()) == TAGS
    options = ["--data", place / "data", "--keep-ratio", 0.7, "--examples", 36, "--output", place / "out"]
    run("compress_small_models", "--model", place / "tagger", *task, *options)
    assert "conlleval_f1" in capsys.readouterr().out
    report = CompressionReport.from_json((place / "out" / "compression_report.json").read_text())
    assert 0.5 < report.keep_ratio <= 0.7
    assert report.held_out["examples"] == 36
