"""MMLU: prompts to the byte, letters against a slow oracle, and the loss that calibration and certificate see."""

import json
import math
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from support.mmlu_questions import DEV, LETTERS, SUBJECTS, TEST, byte_tokenizer, dev_rows, llama, questions
from support.score_checks import check_right_answers
from support.tiny_models import IGNORED, build
from support.tolerances import FLOAT32, ROUNDING
from support.word_tokenizer import word_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lossless_lr import DataError, verify
from hf_lossless_lr.evaluation.mmlu import METRICS, MMLU, _hub_dev, mmlu, mmlu_prompt
from hf_lossless_lr.evaluation.scores import compare
from hf_lossless_lr.evaluation.task import ScoringOptions

mmlu_module = import_module("hf_lossless_lr.evaluation.mmlu")  # the room has a function of this name


def gpt2(seed=0):
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 1024, "vocab_size": 270}
    return build("GPT2LMHeadModel", "GPT2Config", seed, bos_token_id=0, eos_token_id=1, initializer_range=0.3, **sizes)


MODELS = {"llama": llama, "gpt2": gpt2}


TASK = mmlu(DEV)


def prompt_of(row, shots=5, dev=None):
    """The prompt, spelled out apart from the package."""

    def asked(entry):
        a, b, c, d = entry["choices"]
        return f"{entry['question'].strip()}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:"

    same = [entry for entry in dev or dev_rows() if entry["subject"] == row["subject"]][:shots]
    solved = "".join(asked(entry) + " " + "ABCD"[entry["answer"]] + "\n\n" for entry in same)
    subject = " ".join(row["subject"].split("_"))
    return f"The following are multiple choice questions (with answers) about {subject}.\n\n" + solved + asked(row)


def slow_likelihoods(model, tokenizer, text):
    """Log-probability of each letter after a text: one token of one sequence at a time, in float64."""
    bare = {"add_special_tokens": False}
    begin = [0] if tokenizer("x")["input_ids"][0] == 0 else []
    context = begin + tokenizer(text, **bare)["input_ids"]
    result = []
    for letter in LETTERS:
        tokens, total = list(context), 0.0
        for token in tokenizer(" " + letter, **bare)["input_ids"]:
            with torch.no_grad():
                logits = model(torch.tensor([tokens])).logits[0, -1].double()
            total += float(logits[token] - logits.logsumexp(0))
            tokens.append(token)
        result.append(total)
    return result


class TestPrompt:
    def test_is_the_usual_text_to_the_byte(self):
        shot = {
            "question": "Is it?",
            "subject": "high_school_us_history",
            "choices": ["yes", "no", "3", ""],
            "answer": 3,
        }
        row = {**shot, "question": " Why so?\nThus: ", "choices": ["a b", "c", "d", "e"], "answer": 0}
        assert mmlu_prompt(row, [shot, {**shot, "answer": 0}]) == (
            "The following are multiple choice questions (with answers) about high school us history.\n\n"
            "Is it?\nA. yes\nB. no\nC. 3\nD. \nAnswer: D\n\n"
            "Is it?\nA. yes\nB. no\nC. 3\nD. \nAnswer: A\n\n"
            "Why so?\nThus:\nA. a b\nB. c\nC. d\nD. e\nAnswer:"
        )

    def test_shows_the_first_five_of_the_subject_in_order_and_then_the_answer(self):
        tokenizer = byte_tokenizer()
        examples = TASK.prepare(TEST, tokenizer, 2048)
        assert len(examples) == len(TEST)
        for row, example in zip(questions(), examples, strict=True):
            text = tokenizer.decode(example["input_ids"])
            assert text == "<s>" + prompt_of(row) + " " + LETTERS[row["answer"]]
            assert example["attention_mask"] == [1] * len(example["input_ids"])
            assert "q15" not in text  # the sixth

    def test_never_shows_the_question_itself(self):
        tokenizer = byte_tokenizer()
        for row, example in zip(dev_rows(), TASK.prepare(DEV, tokenizer, 2048), strict=True):
            others = [entry for entry in dev_rows() if entry != row]
            text = tokenizer.decode(example["input_ids"])
            assert text == "<s>" + prompt_of(row, dev=others) + " " + LETTERS[row["answer"]]
            assert text.count(row["question"]) == 1

    def test_is_not_ended_by_a_special_token(self):
        tokenizer = byte_tokenizer(eos=True)
        example = TASK.prepare(TEST, tokenizer, 2048)[0]
        assert tokenizer("x")["input_ids"][-1] == 1
        assert 1 not in example["input_ids"]
        assert example["input_ids"] == TASK.prepare(TEST, byte_tokenizer(), 2048)[0]["input_ids"]

    def test_has_the_solved_examples_of_the_hub_by_default(self, monkeypatch):
        asked = []
        monkeypatch.setattr(mmlu_module, "_hub_dev", lambda: asked.append("dev") or DEV)
        assert (
            MMLU.prepare(TEST, byte_tokenizer(), 2048).to_list()
            == TASK.prepare(TEST, byte_tokenizer(), 2048).to_list()
        )
        assert asked == ["dev"]
        assert MMLU.dataset == ("cais/mmlu", "all", "dev", "test")

    def test_loads_the_split_dev_of_the_hub_once(self, monkeypatch):
        calls = []
        monkeypatch.setattr(mmlu_module, "load_split", lambda *arguments: calls.append(arguments) or DEV)
        _hub_dev.cache_clear()
        try:
            assert _hub_dev() is _hub_dev() is DEV
        finally:
            _hub_dev.cache_clear()
        assert calls == [("cais/mmlu", "all", None, "dev", None)]


class TestLength:
    @pytest.mark.parametrize("letters", ["whole", "two"])
    @pytest.mark.parametrize("shots", [5, 4, 2, 0])
    def test_drops_the_last_solved_examples_until_the_answer_fits(self, shots, letters):
        tokenizer, row = byte_tokenizer(letters), questions()[0]
        whole = len(tokenizer(prompt_of(row, shots) + " A")["input_ids"])
        for length, kept in ((whole, shots), (whole - 1, shots - 1)):
            if kept >= 0:
                (example,) = TASK.prepare(TEST.select([0]), tokenizer, length)
                text = "<s>" + prompt_of(row, kept) + " " + LETTERS[row["answer"]]
                assert tokenizer.decode(example["input_ids"]) == text

    def test_cuts_the_beginning_of_a_question_that_is_too_long_alone(self):
        tokenizer, row = byte_tokenizer(), questions()[0]
        (example,) = TASK.prepare(TEST.select([0]), tokenizer, 30)
        assert len(example["input_ids"]) == 30
        assert tokenizer.decode(example["input_ids"]) == (prompt_of(row, 0) + " " + LETTERS[row["answer"]])[-31:]

    def test_is_fitted_to_the_longest_letter_so_that_all_follow_the_same_prompt(self):
        tokenizer, rows = byte_tokenizer("mixed"), [{**questions()[0], "answer": answer} for answer in (0, 1)]
        length = len(tokenizer(prompt_of(rows[0], 3) + " A")["input_ids"])
        for row, example in zip(rows, TASK.prepare(Dataset.from_list(rows), tokenizer, length), strict=True):
            text = "<s>" + prompt_of(row, 2) + " " + LETTERS[row["answer"]]
            assert tokenizer.decode(example["input_ids"]) == text

    def test_is_that_of_what_is_scored_too(self):
        tokenizer, model = byte_tokenizer(), llama().double()
        scores = TASK.score(model, TEST, tokenizer, ScoringOptions(4, 150))
        for row, counts in zip(questions(), scores.counts, strict=True):
            shots = max(n for n in range(6) if len(tokenizer(prompt_of(row, n) + " A")["input_ids"]) <= 150)
            assert shots < 5
            expected = slow_likelihoods(model, tokenizer, prompt_of(row, shots))
            assert counts[0] == pytest.approx(-expected[row["answer"]], rel=1e-9)


def expected_counts(model, tokenizer):
    subjects = sorted(SUBJECTS)
    result = []
    for row in questions():
        likelihoods = slow_likelihoods(model, tokenizer, prompt_of(row))
        tokens = len(tokenizer(" " + LETTERS[row["answer"]], add_special_tokens=False)["input_ids"])
        one_hot = [float(row["subject"] == subject) for subject in subjects]
        right = float(max(range(4), key=likelihoods.__getitem__) == row["answer"])
        result.append([-likelihoods[row["answer"]], tokens, *(right * one for one in one_hot), *one_hot])
    return np.array(result)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]().double()


class TestScores:
    @pytest.mark.parametrize("letters", ["whole", "two", "mixed"])
    def test_are_those_of_one_prompt_at_a_time(self, model, letters):
        tokenizer = byte_tokenizer(letters)
        scores = TASK.score(model, TEST, tokenizer, ScoringOptions(4, 2048))
        np.testing.assert_allclose(scores.counts, expected_counts(model, tokenizer), rtol=1e-9)
        assert 0 < scores.values()["accuracy"][0] < 1

    def test_do_not_depend_on_the_batch_size_the_side_of_the_padding_or_the_order(self, model):
        tokenizer = byte_tokenizer("mixed")
        alone = TASK.score(model, TEST, tokenizer, ScoringOptions(1, 2048)).counts
        for size in (2, 3, 100):
            got = TASK.score(model, TEST, byte_tokenizer("mixed", padding_side="left"), ScoringOptions(size, 2048))
            np.testing.assert_allclose(got.counts, alone, rtol=ROUNDING)
        reverse = TEST.select(range(len(TEST))[::-1])
        got = TASK.score(model, reverse, tokenizer, ScoringOptions(3, 2048))
        np.testing.assert_allclose(got.counts[::-1], alone, rtol=ROUNDING)

    def test_run_the_model_once_a_question_where_letters_differ_in_the_last_token_alone(self):
        for letters, expected in (("whole", len(TEST)), ("two", len(TEST)), ("mixed", 2 * len(TEST))):
            model, seen = llama(), []
            model.lm_head.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(len(output)))
            TASK.score(model, TEST, byte_tokenizer(letters), ScoringOptions(4, 2048))
            assert sum(seen) == expected

    def test_have_metrics_of_their_sums(self):
        counts = np.zeros((6, 2 + 2 * 2))  # two subjects: 4 questions with 3 right, 2 questions with 0 right
        counts[:, 0], counts[:, 1] = [1, 2, 3, 4, 5, 9], 2
        counts[:4, 4], counts[4:, 5], counts[:3, 2] = 1, 1, 1
        values = {metric.name: float(metric.of_sums(counts.sum(0))) for metric in METRICS}
        assert values == {"accuracy": 3 / 6, "accuracy_by_subject": (3 / 4 + 0 / 2) / 2, "loss": 24 / 12}
        assert [metric.name for metric in METRICS if not metric.higher_is_better] == ["loss"]
        (by_subject,) = (metric for metric in METRICS if metric.name == "accuracy_by_subject")
        assert by_subject.of_sums(counts[:4].sum(0)) == 3 / 4  # the other subject has no question
        both = by_subject.of_sums(np.stack([counts.sum(0), counts[:4].sum(0)]))
        np.testing.assert_array_equal(both, [3 / 8, 3 / 4])

    def test_of_one_question_have_no_standard_error(self):
        scores = TASK.score(llama(), TEST.select([0]), byte_tokenizer(), ScoringOptions(4, 2048))
        assert [math.isnan(error) for _, error in scores.values().values()] == [True] * 3

    def test_of_two_models_are_compared_on_the_same_questions(self):
        scores = [TASK.score(llama(seed), TEST, byte_tokenizer(), ScoringOptions(4, 2048)) for seed in (0, 1)]
        check_right_answers(scores[0], "accuracy")
        difference = compare(*scores, 0.95)
        for name, (dense, _) in scores[0].values().items():
            sign = -1 if name == "loss" else 1
            assert difference[name].mean == pytest.approx(sign * (dense - scores[1].values()[name][0]))
            assert difference[name].lower <= difference[name].mean <= difference[name].upper
        assert all(value.mean == 0 for value in compare(scores[0], scores[0], 0.95).values())


class TestLabels:
    def test_are_the_tokens_of_the_right_letter_alone(self):
        for letters in ("whole", "two", "mixed"):
            tokenizer = byte_tokenizer(letters)
            for row, example in zip(questions(), TASK.prepare(TEST, tokenizer, 2048), strict=True):
                answer = tokenizer(" " + LETTERS[row["answer"]], add_special_tokens=False)["input_ids"]
                assert example["labels"] == [IGNORED] * (len(example["input_ids"]) - len(answer)) + answer
                assert example["input_ids"][-len(answer) :] == answer

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_are_padded_on_the_right_as_ignored(self, side):
        tokenizer = byte_tokenizer(padding_side=side)
        examples = list(TASK.prepare(TEST, tokenizer, 2048).select([0, 1, 2, 3]))
        batch = TASK.collator(tokenizer)([{**example, "idx": 3} for example in examples])
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        longest = max(len(example["input_ids"]) for example in examples)
        fills = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
        assert min(len(example["input_ids"]) for example in examples) < longest
        for name, fill in fills.items():
            padded = [example[name] + [fill] * (longest - len(example[name])) for example in examples]
            assert batch[name].tolist() == padded
        tokenizer.pad_token = "</s>"
        assert TASK.collator(tokenizer)(examples)["input_ids"].max(0).values[-1] > 0
        short = min(examples, key=lambda example: len(example["input_ids"]))
        row = TASK.collator(tokenizer)(examples)["input_ids"][examples.index(short)]
        assert row[len(short["input_ids"]) :].tolist() == [1] * (longest - len(short["input_ids"]))

    @pytest.mark.parametrize("letters", ["whole", "mixed"])
    def test_give_the_model_the_loss_that_is_scored(self, model, letters):
        tokenizer = byte_tokenizer(letters)
        batch = TASK.collator(tokenizer)(list(TASK.prepare(TEST, tokenizer, 2048)))
        with torch.no_grad():
            loss = float(model(**batch).loss)
        scores = TASK.score(model, TEST, tokenizer, ScoringOptions(3, 2048))
        assert scores.values()["loss"][0] == pytest.approx(loss, rel=FLOAT32)

    def test_give_a_certificate_the_loss_that_is_scored(self):
        tokenizer, data = byte_tokenizer(), Dataset.from_list(questions((20, 20, 10)))
        dense, other = llama(0), llama(1)
        examples = TASK.prepare(data, tokenizer, 2048)
        certificate = verify(dense, other, examples, batch_size=4, data_collator=TASK.collator(tokenizer))
        scores = [TASK.score(model, data, tokenizer, ScoringOptions(8, 2048)) for model in (dense, other)]
        assert certificate.loss == pytest.approx([s.values()["loss"][0] for s in scores], rel=FLOAT32)
        increase = compare(*scores, 0.95)["loss"].mean
        assert certificate.loss_increase.mean == pytest.approx(increase, rel=1e-3)
        assert (certificate.examples, certificate.units, certificate.clusters) == (50, 50, "examples")


def changed(**columns):
    return Dataset.from_list([{**row, **columns} for row in questions()])


REFUSED = {
    "a missing column": (
        TEST.remove_columns("subject"),
        "the data set: has no column subject; it has question, choices",
    ),
    "no rows": (TEST.select([]), "the data set: is empty"),
    "no question": (changed(question=None), "the data set: row 0 has no question or no subject"),
    "no subject": (changed(subject=None), "row 0 has no question or no subject"),
    "three choices": (changed(choices=["a", "b", "c"]), r"row 0 has the choices \['a', 'b', 'c'\]; there must be 4"),
    "choices as a text": (changed(choices="abcd"), "row 0 has the choices 'abcd'; there must be 4"),
    "an answer of 4": (changed(answer=4), "row 0 has the answer 4; it must be 0, 1, 2 or 3"),
    "an answer of -1": (changed(answer=-1), "row 0 has the answer -1; it must be"),
    "a letter as answer": (changed(answer="A"), "row 0 has the answer 'A'; it must be"),
    "no answer": (changed(answer=None), "row 0 has the answer None; it must be"),
    "another subject": (changed(subject="law"), "there are no dev examples of the subject 'law'"),
}


class TestRefusal:
    @pytest.mark.parametrize("case", REFUSED)
    def test_of_bad_questions(self, case):
        data, text = REFUSED[case]
        with pytest.raises(DataError, match=text):
            TASK.prepare(data, byte_tokenizer(), 2048)
        with pytest.raises(DataError, match=text):
            TASK.score(llama(), data, byte_tokenizer(), ScoringOptions(2, 2048))

    def test_names_the_row_that_is_wrong(self):
        rows = questions()
        rows[3] = {**rows[3], "answer": 7}
        with pytest.raises(DataError, match="row 3 has the answer 7"):
            TASK.prepare(Dataset.from_list(rows), byte_tokenizer(), 2048)

    def test_of_bad_solved_examples(self):
        with pytest.raises(DataError, match="the dev examples: row 0 has the answer 4"):
            mmlu(changed(answer=4)).prepare(TEST, byte_tokenizer(), 2048)

    def test_of_a_tokenizer_without_the_letters(self):
        with pytest.raises(DataError, match="does not tell the letters A, B, C, D apart"):
            TASK.prepare(TEST, word_tokenizer(), 2048)

    @pytest.mark.parametrize(("letters", "length"), [("whole", 1), ("mixed", 2)])
    def test_of_a_length_without_room_for_a_question(self, letters, length):
        with pytest.raises(DataError, match=f"max_length is {length}, which leaves no room"):
            TASK.prepare(TEST, byte_tokenizer(letters), length)
        assert len(TASK.prepare(TEST, byte_tokenizer(letters), length + 1)) == len(TEST)

    def test_of_prompts_longer_than_the_model_takes(self):
        with pytest.raises(DataError, match=r"an input has \d+ tokens, LlamaForCausalLM takes 100; pass a max_length"):
            TASK.score(llama(max_position_embeddings=100), TEST, byte_tokenizer(), ScoringOptions(2, 2048))


@pytest.mark.testbed
def test_the_testbed_has_the_shots_and_the_letters(testbed):
    files = {name: str(testbed / "data" / "mmlu" / f"{name}.jsonl") for name in ("dev", "test")}
    rows = {name: [json.loads(line) for line in Path(file).read_text().splitlines()] for name, file in files.items()}
    task = mmlu(Dataset.from_list(rows["dev"]))
    tokenizer = AutoTokenizer.from_pretrained(testbed / "llama-small")
    model = AutoModelForCausalLM.from_pretrained(testbed / "llama-small", dtype=torch.float32).double()
    few = [row for row in rows["test"] if row["subject"] == "anatomy"][:4]
    scores = task.score(model, Dataset.from_list(few), tokenizer, ScoringOptions(4, 512))
    for row, counts in zip(few, scores.counts, strict=True):
        shots = max(n for n in range(6) if len(tokenizer(prompt_of(row, n, rows["dev"]) + " A")["input_ids"]) <= 512)
        likelihoods = slow_likelihoods(model, tokenizer, prompt_of(row, shots, rows["dev"]))
        assert counts[0] == pytest.approx(-likelihoods[row["answer"]], rel=1e-9)
