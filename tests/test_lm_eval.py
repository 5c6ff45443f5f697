"""The command line of lm-eval on compressed checkpoints: with a stand-in, and with lm-eval itself."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from datasets import Dataset
from support.mmlu_questions import LETTERS, SUBJECTS, byte_tokenizer, dev_rows, llama, questions
from transformers import AutoModelForCausalLM

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.evaluation.mmlu import mmlu
from hf_lossless_lr.evaluation.task import ScoringOptions
from hf_lossless_lr.layers.factorized import is_factorized
from hf_lossless_lr.lm_eval import main

OPTIONS = ScoringOptions(5, 1024)
QUESTIONS = 6  # of each subject
ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = """dataset_path: json
output_type: multiple_choice
test_split: test
fewshot_split: dev
fewshot_config:
  sampler: first_n
doc_to_text: "{{{{question.strip()}}}}\\nA. {{{{choices[0]}}}}\\nB. {{{{choices[1]}}}}\\n\\
  C. {{{{choices[2]}}}}\\nD. {{{{choices[3]}}}}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
task: local_{subject}
description: "The following are multiple choice questions (with answers) about {words}.\\n\\n"
dataset_kwargs:
  data_files:
    dev: {dev}
    test: {test}
"""


def run(arguments):
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "hf_lossless_lr.lm_eval", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


class TestCommand:
    def test_hands_its_arguments_and_the_exit_code_on(self, monkeypatch):
        def cli_evaluate():
            seen.extend(sys.argv[1:])
            sys.exit(5)

        arguments, seen = ["run", "--model", "hf", "--model_args", "pretrained=a folder,dtype=float32"], []
        for name, members in (("lm_eval", {}), ("lm_eval.__main__", {"cli_evaluate": cli_evaluate})):
            stand_in = ModuleType(name)
            vars(stand_in).update(members)
            monkeypatch.setitem(sys.modules, name, stand_in)
        monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        assert (seen, caught.value.code) == (arguments, 5)

    def test_says_how_to_install_lm_eval(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "lm_eval", None)
        monkeypatch.delitem(sys.modules, "lm_eval.__main__", raising=False)
        with pytest.raises(SystemExit, match=r"install it with: pip install 'hf-lossless-lr\[lm-eval\]'"):
            main()


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_lm_eval_answers_mmlu_as_the_evaluation_does(tmp_path):
    """In a process of its own, which could not load the checkpoint if the format were not known before."""
    rows, tokenizer, task = (
        questions((QUESTIONS,) * len(SUBJECTS)),
        byte_tokenizer(),
        mmlu(Dataset.from_list(dev_rows())),
    )
    model = llama(num_hidden_layers=2)
    compressor = LowRankCompressor(LosslessLowRankConfig(keep_ratio=0.5))
    examples = task.prepare(Dataset.from_list(rows), tokenizer, 1024)
    compressor.compress(model, examples, data_collator=task.collator(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert any(is_factorized(module) for module in model.modules())

    for subject in SUBJECTS:
        files = {
            name: write_lines(tmp_path / f"{subject}_{name}.jsonl", [row for row in part if row["subject"] == subject])
            for name, part in (("dev", dev_rows()), ("test", rows))
        }
        text = TEMPLATE.format(subject=subject, words=subject.replace("_", " "), **files)
        (tmp_path / f"local_{subject}.yaml").write_text(text)
    arguments = ["--model", "hf", "--model_args", f"pretrained={tmp_path / 'model'},dtype=float32"]
    arguments += ["--tasks", ",".join(f"local_{subject}" for subject in SUBJECTS), "--include_path", tmp_path]
    arguments += ["--num_fewshot", "5", "--batch_size", "4", "--device", "cpu"]
    arguments += ["--output_path", tmp_path / "results", "--log_samples"]
    result = run(arguments)
    assert result.returncode == 0, result.stderr[-3000:]

    for subject in SUBJECTS:
        (file,) = (tmp_path / "results").rglob(f"samples_local_{subject}_*.jsonl")
        samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        scores = task.score(model, data := Dataset.from_list([s["doc"] for s in samples]), tokenizer, OPTIONS)
        assert len(data) == QUESTIONS
        theirs = np.array([[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples])
        right = theirs[range(QUESTIONS), data["answer"]]
        np.testing.assert_allclose(scores.counts[:, 0], -right, rtol=1e-4)
        assert scores.values()["accuracy"][0] == pytest.approx(np.mean([sample["acc"] for sample in samples]))
        arguments = [sample["arguments"]["gen_args_0"] for sample in samples]
        prompts = [tokenizer.decode(e["input_ids"]) for e in task.prepare(data, tokenizer, 1024)]
        expected = [
            "<s>" + a["arg_0"] + " " + LETTERS[s["doc"]["answer"]] for a, s in zip(arguments, samples, strict=True)
        ]
        assert prompts == expected
