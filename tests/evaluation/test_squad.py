"""SQuAD: windows, the search for the best span, exact match and F1, against slow oracles and hand-made examples."""

import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from support.score_checks import check_right_answers
from support.squad_oracle import official
from support.tiny_models import VOCABULARY, build, generator
from support.word_tokenizer import CLS, SEP, WORDS, word_tokenizer
from torch import nn

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor, verify
from hf_lossless_lr.errors import DataError, NumericalError
from hf_lossless_lr.evaluation.hf_metrics import load_metric
from hf_lossless_lr.evaluation.scores import compare
from hf_lossless_lr.evaluation.squad import SQUAD, SQUAD_V2, predicted_answer
from hf_lossless_lr.evaluation.squad_scores import answer_scores, normalize_answer
from hf_lossless_lr.evaluation.task import ScoringOptions

LENGTH = 24
TASKS = {"v1.1": SQUAD, "v2.0": SQUAD_V2}


class Reader(nn.Module):
    """A question answerer whose logits depend on each token alone, wherever it stands."""

    def __init__(self, start=None, end=None, seed=0, fill=None):
        super().__init__()
        noise = torch.randn(2, VOCABULARY, generator=generator(seed))
        self.table = nn.Parameter(noise if fill is None else torch.full_like(noise, fill), requires_grad=False)
        for row, values in enumerate((start or {}, end or {})):
            for word, value in values.items():
                self.table[row, word] = value

    device = torch.device("cpu")

    def forward(self, input_ids, attention_mask=None, start_positions=None, end_positions=None):
        logits = torch.where(attention_mask.bool(), self.table[:, input_ids], 100.0)  # padding looks best
        return SimpleNamespace(start_logits=logits[0], end_logits=logits[1])


def question_answerer(seed=0, model_class="BertForQuestionAnswering", **options):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"max_position_embeddings": 160, "initializer_range": 0.5, "vocab_size": VOCABULARY}
    return build(model_class, model_class.replace("ForQuestionAnswering", "Config"), seed, **sizes | options)


def example(question, context, *answers, **columns):
    starts = [re.search(rf"\b{answer}\b", context).start() for answer in answers]
    return {
        "question": question,
        "context": context,
        "answers": {"text": list(answers), "answer_start": starts},
        **columns,
    }


def some_examples(count, seed=0, unanswerable=False, longest=40):
    """Questions of 1 to 5 words on passages of 3 to `longest` different words, with one to three answers."""
    draw, rows = random.Random(seed), []
    for number in range(count):
        words = draw.sample(WORDS, draw.randint(3, longest))
        context = " ".join(words)
        answers = []
        for _ in range(draw.randint(1, 3)):
            first = draw.randrange(len(words))
            answers.append(" ".join(words[first : first + draw.randint(1, 4)]))
        if unanswerable and number % 3 == 0:
            answers = []
        rows.append(example(" ".join(draw.sample(WORDS, draw.randint(1, 5))), context, *answers, id=str(number)))
    return rows


def dataset(rows):
    return Dataset.from_list(rows)


def tokenizer(side="right", types=False):
    result = word_tokenizer()
    result.padding_side = side
    result.model_input_names = ["input_ids", "token_type_ids", "attention_mask"] if types else result.model_input_names
    return result


def score(task, model, rows, batch_size=4, max_length=LENGTH, **options):
    return task.score(model, dataset(rows), tokenizer(**options), ScoringOptions(batch_size, max_length))


def value(scores, name):
    return scores.values()[name][0]


# --- slow oracles: the scripts written down again, one window and one pair at a time ---


def slow_windows(row, side, max_length=LENGTH, stride=LENGTH // 2):
    """Token ids of each window, and the characters of its tokens (None outside of the passage)."""
    question = [WORDS.index(word) + 5 for word in row["question"].split()]
    spans = [match.span() for match in re.finditer(r"[^\s-]+", row["context"])]
    room = max_length - len(question) - 3
    windows, first = [], 0
    while True:
        part = spans[first : first + room]
        ids = [WORDS.index(row["context"][a:b]) + 5 for a, b in part]
        if side == "right":
            windows.append(([CLS, *question, SEP, *ids, SEP], [None] * (len(question) + 2) + part + [None]))
        else:
            windows.append(([CLS, *ids, SEP, *question, SEP], [None, *part] + [None] * (len(question) + 2)))
        if first + room >= len(spans):
            return windows
        first += room - stride


def slow_prediction(model, row, v2, side):
    found, null = [], None
    for ids, spans in slow_windows(row, side):
        with torch.no_grad():
            outputs = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long))
        start, end = outputs.start_logits[0].tolist(), outputs.end_logits[0].tolist()
        if null is None or start[0] + end[0] < null:
            null = start[0] + end[0]
        for i in sorted(range(len(ids)), key=lambda token: -start[token])[:20]:
            for j in sorted(range(len(ids)), key=lambda token: -end[token])[:20]:
                if spans[i] is not None and spans[j] is not None and i <= j < i + 30:
                    found.append((start[i] + end[j], row["context"][spans[i][0] : spans[j][1]]))
    best, text = max(found, key=lambda pair: pair[0], default=(0.0, "empty"))
    return "" if v2 and null - best > 0 else text


def oracle(model, rows, v2, side="right"):
    return np.array([official(row, slow_prediction(model, row, v2, side), v2) for row in rows])


def exact_and_f1(scores):
    """Exact match and F1 of each example, whether it has an answer or not."""
    counts = scores.counts.reshape(len(scores.counts), -1, 3).sum(1)
    assert (counts[:, 2] == 1).all()
    return counts[:, :2]


class TestScore:
    @pytest.mark.parametrize("name", TASKS)
    @pytest.mark.parametrize("seed", range(3))
    def test_is_that_of_the_slow_search_and_the_official_script(self, name, seed):
        v2 = name == "v2.0"
        rows, model = some_examples(30, seed, v2), question_answerer(seed)
        expected = oracle(model, rows, v2)
        scores = score(TASKS[name], model, rows)
        assert exact_and_f1(scores) == pytest.approx(expected, abs=1e-6)
        assert 0 < expected[:, 1].mean() < 1
        assert value(scores, "exact_match") == pytest.approx(expected[:, 0].mean())
        assert value(scores, "f1") == pytest.approx(expected[:, 1].mean())

    @pytest.mark.parametrize("name", TASKS)
    def test_is_that_of_the_metric_of_the_same_answers(self, name, tmp_path):
        v2 = name == "v2.0"
        rows, model = some_examples(30, 4, v2), question_answerer(4)
        answers = [slow_prediction(model, row, v2, "right") for row in rows]
        predictions = [{"id": row["id"], "prediction_text": text} for row, text in zip(rows, answers, strict=True)]
        metric = load_metric("squad_v2" if v2 else "squad", cache_dir=tmp_path)
        got = metric.compute(predictions=predictions[::-1], references=rows)
        for key, figures in score(TASKS[name], model, rows).values().items():
            assert (got[key], got[f"{key}_standard_error"]) == pytest.approx(figures, abs=1e-9)

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("types", [False, True])
    @pytest.mark.parametrize("name", TASKS)
    def test_is_the_same_for_any_padding_and_with_token_types(self, name, types, side):
        v2 = name == "v2.0"
        rows, model = some_examples(25, 7, v2), Reader(seed=3)
        expected = oracle(model, rows, v2, side)
        assert exact_and_f1(score(TASKS[name], model, rows, side=side, types=types)) == pytest.approx(expected)
        assert 0 < expected[:, 1].mean() < 1

    @pytest.mark.parametrize("name", TASKS)
    def test_does_not_depend_on_the_batch_size_nor_on_the_order(self, name):
        rows, model = some_examples(20, 1, name == "v2.0"), question_answerer(1)
        counts = score(TASKS[name], model, rows, batch_size=1).counts
        assert score(TASKS[name], model, rows, batch_size=32).counts == pytest.approx(counts)
        assert score(TASKS[name], model, rows[::-1], batch_size=3).counts == pytest.approx(counts[::-1])

    def test_takes_models_without_token_types(self):
        model = question_answerer(model_class="DistilBertForQuestionAnswering", dim=32, n_heads=4, n_layers=1)
        rows = some_examples(9)
        assert exact_and_f1(score(SQUAD, model, rows, types=True)) == pytest.approx(oracle(model, rows, False))

    def test_leaves_the_training_mode_and_the_weights_alone(self):
        model = question_answerer(hidden_dropout_prob=0.5).train()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        rows = some_examples(6)
        first = score(SQUAD, model, rows).counts
        assert model.training
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert np.array_equal(first, score(SQUAD, model.eval(), rows).counts)  # no dropout either way

    def test_finds_an_answer_in_the_second_window(self):
        context = " ".join(WORDS[:30])
        model = Reader(start={5 + 25: 9.0}, end={5 + 26: 9.0}, fill=0.0)
        rows = [example("w50 w51", context, f"{WORDS[25]} {WORDS[26]}")]
        assert len(SQUAD.prepare(dataset(rows), tokenizer(), LENGTH)) > 1
        assert value(score(SQUAD, model, rows), "exact_match") == 1

    def test_cuts_the_answer_at_the_end_of_a_window(self):
        """A span whose start and end share no window is not found."""
        context = " ".join(WORDS[:30])
        model = Reader(start={5: 9.0}, end={5 + 29: 9.0}, fill=0.0)
        scores = score(SQUAD, model, [example("w50", context, context)])
        assert value(scores, "exact_match") == 0
        assert 0 < value(scores, "f1") < 1

    def test_finds_no_answer_of_more_than_30_tokens(self):
        words = WORDS[:40]
        for tokens, found in ((30, 1), (31, 0)):
            model = Reader(start={5: 9.0}, end={5 + tokens - 1: 9.0}, fill=0.0)
            rows = [example("w50", " ".join(words), " ".join(words[:tokens]))]
            assert value(score(SQUAD, model, rows, max_length=64), "exact_match") == found

    def test_of_v2_is_split_by_whether_there_is_an_answer(self):
        context = " ".join(WORDS[:6])
        model = Reader(start={5: 9.0, CLS: 0.0}, end={5: 9.0, CLS: 0.0}, fill=-9.0)
        rows = [example("w50", context, "w5"), example("w51", context, "w5 w6"), example("w52", context)]
        values = {name: figure for name, (figure, _) in score(SQUAD_V2, model, rows).values().items()}
        assert list(values) == [
            f"{part}{name}" for part in ("", "HasAns_", "NoAns_") for name in ("f1", "exact_match")
        ]
        assert values["exact_match"] == pytest.approx(1 / 3)
        assert values["f1"] == pytest.approx((1 + 2 / 3) / 3)
        assert values["HasAns_exact_match"] == pytest.approx(1 / 2)
        assert values["HasAns_f1"] == pytest.approx((1 + 2 / 3) / 2)
        assert values["NoAns_exact_match"] == values["NoAns_f1"] == 0

    def test_of_v2_takes_no_answer_where_its_lowest_score_is_above_the_best_span(self):
        rows = [example("w50", " ".join(WORDS[:6])), example("w50", " ".join(WORDS[6:12]), "w11")]
        for null, answered in ((1.0, False), (-1.0, True)):
            model = Reader(start={11: 0.0, CLS: null}, end={11: 0.0, CLS: 0.0}, fill=-9.0)
            values = score(SQUAD_V2, model, rows).values()
            assert values["HasAns_exact_match"][0] == answered
            assert values["NoAns_exact_match"][0] == 1  # the other passage does not have that word

    def test_of_v1_always_answers(self):
        model = Reader(start={CLS: 50.0}, end={CLS: 50.0})
        rows = [example("w50", "w7", "w7")]
        assert value(score(SQUAD, model, rows), "f1") == 1
        assert value(score(SQUAD_V2, model, rows), "f1") == 0

    def test_has_metrics_that_can_be_compared(self):
        rows = some_examples(24, 2, True)
        dense, other = (score(SQUAD_V2, question_answerer(seed), rows) for seed in (2, 3))
        difference = compare(dense, other, 0.95)["f1"]
        assert difference.lower <= difference.mean <= difference.upper
        assert difference.mean == pytest.approx(value(dense, "f1") - value(other, "f1"))


def window(start, end, characters, null=0):
    return np.array([start, end], dtype=np.float32).T, np.array(characters), null


OUT = (-1, -1)


class TestPredictedAnswer:
    context = "one two three"
    spans = (OUT, (0, 3), (4, 7), (8, 13))

    def predict(self, *windows, v2=False):
        return predicted_answer(self.context, windows, v2)

    def test_joins_the_best_start_and_end_in_order(self):
        assert self.predict(window([0, 5, 6, 1], [0, 9, 1, 2], self.spans)) == "one"
        assert self.predict(window([0, 5, 6, 1], [0, 2, 1, 9], self.spans)) == "two three"

    def test_never_takes_a_token_outside_of_the_passage(self):
        assert self.predict(window([99, 1, 0, 0], [99, 0, 0, 1], self.spans)) == "one two three"

    def test_takes_the_best_window(self):
        low, high = ([0, 3, 0, 0], [0, 3, 0, 0]), ([0, 0, 0, 4], [0, 0, 0, 4])
        assert self.predict(window(*low, self.spans), window(*high, self.spans)) == "three"
        assert self.predict(window(*high, self.spans), window(*low, self.spans)) == "three"

    def test_looks_at_the_20_best_starts_and_ends(self):
        """Ends come before starts, but for one pair: that of the first token, whose start is the 20th or the 21st."""
        context, characters = "abc" * 20, [(i, i + 1) for i in range(60)]
        ends = [9.0] * 20 + [0.0] * 40
        for better, found in ((19, True), (20, False)):
            starts = [5.0] + [0.0] * 39 + [9.0] * better + [0.0] * (20 - better)
            for logits in ((starts, ends), (ends[::-1], starts[::-1])):
                answer = predicted_answer(context, [window(*logits, characters)], False)
                assert (answer != "empty") == found

    def test_is_a_fixed_word_where_no_pair_of_candidates_is_a_span(self):
        characters = [OUT] * 20 + [(0, 3)]
        logits = [*range(30, 10, -1), 0]
        assert self.predict(window(logits, logits, characters)) == "empty"
        assert self.predict(window([0, 1], [0, 1], [OUT, OUT])) == "empty"
        assert self.predict(window([0, 1], [0, 1], [OUT, OUT]), v2=True) == "empty"
        assert self.predict(window([0.5, 1], [0, 1], [OUT, OUT]), v2=True) == ""

    def test_of_v2_compares_with_the_lowest_null_score(self):
        spans = self.spans
        first, second = window([4, 5, 0, 0], [4, 5, 0, 0], spans), window([9, 0, 0, 0], [9, 0, 0, 0], spans)
        assert self.predict(first, second, v2=True) == "one"
        assert self.predict(second, v2=True) == ""
        assert self.predict(window([5, 5, 0, 0], [5, 5, 0, 0], spans), v2=True) == "one"  # a tie is an answer

    def test_of_v2_reads_the_null_score_where_the_cls_token_is(self):
        row = ([0, 5, 0, 0], [0, 5, 0, 0], self.spans)
        assert self.predict(window(*row), v2=True) == "one"
        logits = window([5, 0, 0, 9], [5, 0, 0, 9], ((0, 3), (4, 7), (8, 13), OUT), null=3)
        assert self.predict(logits, v2=True) == ""

    def test_of_v2_skips_tokens_without_characters(self):
        characters = (OUT, (0, 0), (4, 7), OUT)
        row = ([0, 9, 1, 0], [0, 9, 1, 0], characters)
        assert self.predict(window(*row), v2=True) == "one two"
        assert self.predict(window(*row)) == ""


NORMALIZED = {
    "The  Eiffel-Tower!": "eiffeltower",
    "an apple, a day": "apple day",
    "theory of Another": "theory of another",
    "a.an.the": "aanthe",
    "the": "",
    "U.S.": "us",
    "’quoted’": "’quoted’",  # ASCII punctuation alone
    "\tthe\n End ": "end",
}

# prediction, correct answers, exact match, F1 (v1.1), the same of v2.0
SCORED = {
    "an article does not matter": ("the Eiffel Tower", ["Eiffel Tower"], 1, 1, 1, 1),
    "punctuation does not matter": ("Eiffel Tower.", ["eiffel tower"], 1, 1, 1, 1),
    "the best answer counts": ("in 1889", ["March 1889", "1889", "the year 1889"], 0, 2 / 3, 0, 2 / 3),
    "each by its own best answer": ("b c d", ["b", "b c d e", "x"], 0, 6 / 7, 0, 6 / 7),
    "words count with multiplicity": ("b b c", ["b c c"], 0, 2 / 3, 0, 2 / 3),
    "nothing in common": ("b", ["c"], 0, 0, 0, 0),
    "nothing predicted": ("", ["b"], 0, 0, 0, 0),
    "articles alone": ("a", ["the"], 1, 0, 0, 0),
}


class TestAnswerScores:
    @pytest.mark.parametrize("text", NORMALIZED)
    def test_normalize_case_punctuation_articles_and_blanks(self, text):
        assert normalize_answer(text) == NORMALIZED[text]

    @pytest.mark.parametrize("case", SCORED)
    def test_of_hand_made_answers(self, case):
        prediction, golds, exact, f1, v2_exact, v2_f1 = SCORED[case]
        if case == "articles alone":
            v2_exact, v2_f1 = 1, 1  # there is no other answer than none
        assert answer_scores(prediction, golds, False) == (exact, pytest.approx(f1))
        assert answer_scores(prediction, golds, True) == (v2_exact, pytest.approx(v2_f1))

    def test_of_an_unanswerable_question(self):
        assert answer_scores("", [], True) == (1, 1)
        assert answer_scores("the", [], True) == (1, 1)
        assert answer_scores("b", [], True) == (0, 0)
        assert answer_scores("", ["the", "b"], True) == (0, 0)  # answers without words do not count

    @pytest.mark.parametrize("v2", [False, True])
    def test_agree_with_the_official_script(self, v2):
        draw = random.Random(0)
        pieces = ["the", "A", "an", "b", "B.", "c,", "d-e", "f!", "", "’", "g"]
        for _ in range(500):
            texts = [" ".join(draw.choices(pieces, k=draw.randint(0, 4))) for _ in range(draw.randint(2, 4))]
            row = {"answers": {"text": texts[1:]}}
            assert answer_scores(texts[0], texts[1:], v2) == pytest.approx(official(row, texts[0], v2))


class TestPrepare:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_gives_the_windows_of_the_slow_oracle(self, side):
        rows = some_examples(12, 4)
        examples = SQUAD.prepare(dataset(rows), tokenizer(side), LENGTH)
        expected = [ids for row in rows for ids, _ in slow_windows(row, side)]
        assert sorted(examples["input_ids"]) == sorted(expected)
        assert set(examples.column_names) == {"input_ids", "attention_mask", "start_positions", "end_positions"}

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_labels_the_first_answer_in_the_windows_that_have_all_of_it(self, side):
        rows = some_examples(40, 5, True)
        examples = iter(SQUAD_V2.prepare(dataset(rows), tokenizer(side), LENGTH))
        inside = outside = at_the_end = 0
        for row in rows:
            for ids, spans in slow_windows(row, side):
                got = next(examples)
                assert got["input_ids"] == ids
                start, end = got["start_positions"], got["end_positions"]
                wanted = (0, 0)
                if row["answers"]["text"]:
                    first = row["answers"]["answer_start"][0]
                    last = first + len(row["answers"]["text"][0])
                    begins = [i for i, span in enumerate(spans) if span and span[0] == first]
                    ends = [i for i, span in enumerate(spans) if span and span[1] == last]
                    wanted = (begins[0], ends[0]) if begins and ends else (0, 0)
                assert (start, end) == wanted
                inside, outside = inside + (wanted != (0, 0)), outside + (wanted == (0, 0))
                at_the_end += wanted != (0, 0) and not any(spans[start + 1 :])
        assert min(inside, outside) > 20
        assert at_the_end
        assert next(examples, None) is None

    def test_labels_an_answer_that_is_a_part_of_a_token(self):
        row = example("w50", "w5 w6 w7", "w6")
        row["answers"] = {"text": ["6"], "answer_start": [4]}
        assert SQUAD.prepare(dataset([row]), tokenizer(), LENGTH)[0]["start_positions"] == 4
        row["answers"] = {"text": ["5 w"], "answer_start": [1]}
        got = SQUAD.prepare(dataset([row]), tokenizer(), LENGTH)[0]
        assert (got["start_positions"], got["end_positions"]) == (3, 4)

    def test_of_a_passage_without_words_labels_the_cls_token(self):
        row = {"question": "w5", "context": " ", "answers": {"text": [""], "answer_start": [0]}}
        assert SQUAD.prepare(dataset([row]), tokenizer(), LENGTH)[0]["start_positions"] == 0

    def test_points_to_the_end_where_the_cls_token_is(self):
        from tokenizers import processors

        backwards = word_tokenizer()
        backwards.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="$A [SEP] [CLS]",
            pair="$A [SEP] $B:1 [SEP]:1 [CLS]",
            special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
        )
        got = SQUAD_V2.prepare(dataset([example("w5", "w6 w7")]), backwards, LENGTH)[0]
        assert got["input_ids"][-1] == CLS
        assert got["start_positions"] == got["end_positions"] == len(got["input_ids"]) - 1
        model = Reader(start={6: 1.0, CLS: 2.0}, end={6: 1.0, CLS: 2.0}, fill=0.0)
        scores = SQUAD_V2.score(model, dataset([example("w5", "w6 w7")]), backwards, ScoringOptions(2, LENGTH))
        assert scores.values()["NoAns_f1"][0] == 1

    def test_ignores_blanks_before_the_question(self):
        """A tokenizer may make tokens of them, as this one does."""
        from tokenizers import Regex, pre_tokenizers

        blanks = word_tokenizer()
        blanks.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "isolated")
        first, second = SQUAD.prepare(
            dataset([example("   w5", "w6", "w6"), example("w5", "w6", "w6")]), blanks, LENGTH
        )
        assert first == second

    def test_cuts_to_what_the_tokenizer_allows(self):
        short = tokenizer()
        short.model_max_length = 16
        rows = [example("w50", " ".join(WORDS[:20]), "w7")]
        assert max(map(len, SQUAD.prepare(dataset(rows), short, 384)["input_ids"])) == 16

    def test_shares_128_tokens_between_the_windows_of_the_field(self):
        context = " ".join(random.Random(0).choices(WORDS, k=500))
        examples = SQUAD.prepare(dataset([example("w5", context, "w7")]), tokenizer(), SQUAD.max_length)
        first, second = examples["input_ids"][:2]
        assert len(first) == 384
        assert first[3:-1][-128:] == second[3:-1][:128]
        assert first[3:-1][-129:-1] != second[3:-1][:128]

    def test_collates_to_what_a_model_takes(self):
        examples = SQUAD.prepare(dataset(some_examples(4)), tokenizer(), LENGTH)
        batch = SQUAD.collator(tokenizer())(list(examples))
        assert question_answerer()(**batch).loss.isfinite()


def broken(**columns):
    return [{**example("w5", "w6 w7", "w7"), **columns}]


BAD = {
    "no context": (
        [{"question": "w5", "answers": {"text": ["w"], "answer_start": [0]}}],
        "the data set has no context",
    ),
    "no two": ([{"question": "w5"}], "has no context and no answers, but question"),
    "answers as text": (broken(answers="w7"), r"example 0: answers must be .*not w7"),
    "answers without text": (broken(answers={"answer_start": [0]}), "example 0: answers must be"),
    "answers without answer_start": (broken(answers={"text": ["w7"]}), "example 0: answers must be"),
    "one text": (broken(answers={"text": "w7", "answer_start": [3]}), "example 0: answers must be"),
    "a list of answers": (broken(answers=[{"text": "w7", "answer_start": 3}]), "example 0: answers must be"),
    "more texts": (broken(answers={"text": ["w7", "w6"], "answer_start": [3]}), "2 answers have 1 values"),
    "beyond the end": (
        broken(answers={"text": ["w7"], "answer_start": [4]}),
        "starts at character 4, but the context",
    ),
    "negative": (broken(answers={"text": ["w7"], "answer_start": [-1]}), "starts at character -1"),
    "a long question": ([example(" ".join(WORDS[:20]), "w6 w7", "w7")], "a question of 20 tokens leaves no room"),
}


class TestErrors:
    @pytest.mark.parametrize("case", BAD)
    def test_of_data_say_what_is_wrong(self, case):
        rows, message = BAD[case]
        with pytest.raises(DataError, match=message):
            SQUAD.prepare(dataset(rows), tokenizer(), LENGTH)
        with pytest.raises(DataError, match=message):
            score(SQUAD, Reader(), rows)

    def test_number_the_example(self):
        rows = [*some_examples(3), *broken(answers={"text": ["w7"], "answer_start": [99]})]
        with pytest.raises(DataError, match="example 3: the answer"):
            score(SQUAD, Reader(), rows, batch_size=2)

    def test_of_v1_name_the_task_for_questions_without_an_answer(self):
        with pytest.raises(DataError, match=r"example 1 has no answer.*use SQUAD_V2"):
            SQUAD.prepare(dataset([example("w5", "w6", "w6"), example("w5", "w6")]), tokenizer(), LENGTH)

    def test_of_an_empty_data_set(self):
        empty = dataset(some_examples(2)).select([])
        for use in (SQUAD.prepare, lambda *data: SQUAD.score(Reader(), *data[:2], ScoringOptions(2, LENGTH))):
            with pytest.raises(DataError, match="the data set is empty"):
                use(empty, tokenizer(), LENGTH)

    def test_of_a_slow_tokenizer(self):
        slow = type("Slow", (), {"is_fast": False})()
        with pytest.raises(DataError, match=r"Slow does not give. Load a fast tokenizer"):
            SQUAD.prepare(dataset(some_examples(2)), slow, LENGTH)

    def test_of_a_model_of_another_task(self):
        model = build("BertModel", "BertConfig", hidden_size=32, num_attention_heads=4, num_hidden_layers=1)
        with pytest.raises(DataError, match="BertModel gives no start_logits"):
            score(SQUAD, model, some_examples(2))

    def test_of_logits_that_are_not_numbers(self):
        with pytest.raises(NumericalError, match="the logits of a window are not numbers"):
            score(SQUAD, Reader(fill=float("nan")), some_examples(2))


class TestCompression:
    def test_takes_what_is_prepared(self):
        model, dense = question_answerer(), question_answerer()
        train, held_out = (dataset(some_examples(24, seed, True)) for seed in (8, 9))
        parts = [SQUAD_V2.prepare(data, tokenizer(), LENGTH) for data in (train, held_out)]
        collator = SQUAD_V2.collator(tokenizer())
        compressor = LowRankCompressor(LosslessLowRankConfig(keep_ratio=0.5, batch_size=8))
        model = compressor.compress(model, parts[0], eval_dataset=parts[1], data_collator=collator)
        assert compressor.report.held_out["examples"] == len(parts[1])
        certificate = verify(dense, model, parts[1], data_collator=collator, batch_size=8)
        assert certificate.loss[0] == pytest.approx(compressor.report.dense.loss)
        options = ScoringOptions(8, LENGTH)
        before, after = (SQUAD_V2.score(m, held_out, tokenizer(), options) for m in (dense, model))
        assert compare(before, after, 0.95).keys() == before.values().keys()
        check_right_answers(before, "exact_match")
