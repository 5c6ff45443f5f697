"""CoNLL-2003: tags and their names, F1 of whole entities, against seqeval on the whole and hand-made examples."""

import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from support.tiny_models import IGNORED, VOCABULARY, build
from support.word_tokenizer import CLS, SEP, WORDS, word_tokenizer
from torch import nn

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor, verify
from hf_lossless_lr.errors import ConfigurationError, DataError, NumericalError
from hf_lossless_lr.evaluation.conll import CONLL2003, align_tags
from hf_lossless_lr.evaluation.hf_metrics import load_metric
from hf_lossless_lr.evaluation.scores import compare
from hf_lossless_lr.evaluation.task import ScoringOptions

pytest.importorskip("seqeval", reason="entities are scored by seqeval")

NAMES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
LENGTH = 32


class Tagger(nn.Module):
    """Tags word w5 as 0, w6 as 1 and so on, wherever it stands; other tokens as the last tag."""

    device = torch.device("cpu")

    def __init__(self, names):
        super().__init__()
        self.config = SimpleNamespace(id2label=dict(enumerate(names)))

    def forward(self, input_ids, attention_mask=None):
        last = len(self.config.id2label) - 1
        tags = torch.where((input_ids >= 5) & (input_ids <= 5 + last), input_ids - 5, last)
        return SimpleNamespace(logits=nn.functional.one_hot(tags, last + 1).float())


def named(model, names):
    model.config.id2label = dict(enumerate(names))
    return model


def tagger(names=tuple(NAMES), seed=0):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"max_position_embeddings": 40, "initializer_range": 0.5, "vocab_size": VOCABULARY}
    return named(build("BertForTokenClassification", "BertConfig", seed, num_labels=len(names), **sizes), names)


def dataset(rows, names=None, **columns):
    """Sentences as pairs of a text and its tags; the tags are names, or numbers with or without names."""
    data = {"tokens": [text.split() for text, _ in rows], "ner_tags": [list(tags) for _, tags in rows], **columns}
    kind = ClassLabel(names=names) if names else None
    features = Features({"tokens": List(Value("string")), "ner_tags": List(kind)}) if names else None
    return Dataset.from_dict(data, features=features)


def numbers(tags, names=NAMES):
    return [names.index(tag) for tag in tags.split()]


def some_sentences(count, seed=0, longest=12):
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = [draw.choice(WORDS) for _ in range(draw.randint(1, longest))]
        words = [f"{word}-{draw.choice(WORDS)}" if draw.random() < 0.3 else word for word in words]  # of two pieces
        rows.append((" ".join(words), [draw.randrange(len(NAMES)) for _ in words]))
    return rows


def score(model, data, batch_size=4, max_length=LENGTH, side="right"):
    words = word_tokenizer()
    words.padding_side = side
    return CONLL2003.score(model, data, words, ScoringOptions(batch_size, max_length))


def values(*arguments, **options):
    return {name: figure for name, (figure, _) in score(*arguments, **options).values().items()}


def slow_predictions(model, rows):
    """Names of the tags that the model gives the first piece of each word, one sentence at a time."""
    names, result = list(model.config.id2label.values()), []
    for text, _ in rows:
        ids, firsts = [CLS], []
        for word in text.split():
            firsts.append(len(ids))
            ids += [WORDS.index(piece) + 5 for piece in word.split("-")]
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, SEP]]), attention_mask=torch.ones(1, len(ids) + 1)).logits[0]
        result.append([names[int(logits[first].argmax())] for first in firsts])
    return result


class TestScore:
    @pytest.mark.parametrize("seed", range(4))
    def test_is_that_of_seqeval_on_all_sentences(self, seed):
        from seqeval.metrics import classification_report, f1_score
        from seqeval.metrics.v1 import precision_recall_fscore_support
        from seqeval.scheme import IOB2

        rows, model = some_sentences(40, seed), tagger(seed=seed)
        true, predicted = [[NAMES[tag] for tag in tags] for _, tags in rows], slow_predictions(model, rows)
        got = values(model, dataset(rows, NAMES))
        strict = precision_recall_fscore_support(true, predicted, average="micro", scheme=IOB2)
        assert [got[name] for name in ("precision", "recall", "f1")] == pytest.approx(strict[:3], abs=1e-6)
        report = classification_report(true, predicted, mode="strict", scheme=IOB2, output_dict=True)
        assert got["f1"] == pytest.approx(report["micro avg"]["f1-score"], abs=1e-6)
        assert got["conlleval_f1"] == pytest.approx(f1_score(true, predicted), abs=1e-6)
        assert 0 < got["f1"] < 1
        assert got["f1"] != got["conlleval_f1"]

    def test_is_that_of_the_metric_of_the_same_tags(self, tmp_path):
        rows, model = some_sentences(40, 6), tagger(seed=6)
        true = [[NAMES[tag] for tag in tags] for _, tags in rows]
        metric = load_metric("seqeval", cache_dir=tmp_path)
        got = metric.compute(predictions=slow_predictions(model, rows), references=true)
        for key, figures in score(model, dataset(rows, NAMES)).values().items():
            assert (got[key], got[f"{key}_standard_error"]) == pytest.approx(figures, abs=1e-9)

    def test_is_that_of_each_sentence(self):
        from seqeval.metrics.v1 import precision_recall_fscore_support
        from seqeval.scheme import IOB2

        rows, model = some_sentences(12, 5), tagger(seed=5)
        counts = score(model, dataset(rows, NAMES)).counts
        for (_, tags), predicted, row in zip(rows, slow_predictions(model, rows), counts, strict=True):
            true = [[NAMES[tag] for tag in tags]]
            options = {"average": "micro", "scheme": IOB2, "zero_division": 0}
            precision, recall, _, support = precision_recall_fscore_support(true, [predicted], **options)
            assert row[2] == support
            assert row[0] == pytest.approx(recall * row[2])
            assert row[0] == pytest.approx(precision * row[1])

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_does_not_depend_on_batches_order_and_padding(self, side):
        draw, model, rows = random.Random(2), Tagger(NAMES), []
        for _ in range(17):
            tags = draw.choices(range(5), k=draw.randint(1, 9))  # most words are tagged right
            rows.append((" ".join(f"w{5 + (tag if draw.random() < 0.8 else 0)}" for tag in tags), tags))
        expected = score(model, dataset(rows, NAMES), batch_size=1).counts
        assert np.array_equal(score(model, dataset(rows, NAMES), batch_size=32, side=side).counts, expected)
        turned = score(model, dataset(rows[::-1], NAMES), batch_size=3, side=side).counts
        assert np.array_equal(turned[::-1], expected)
        assert expected[:, 0].any()

    def test_of_a_batch_is_that_of_single_sentences_for_a_real_model(self):
        rows, model = some_sentences(17, 3), tagger(seed=1)
        single = score(model, dataset(rows, NAMES), batch_size=1).counts
        assert np.array_equal(score(model, dataset(rows, NAMES), batch_size=8).counts, single)

    @pytest.mark.parametrize(
        ("text", "tags", "right", "found", "true"),
        [
            ("w6 w7 w5 w8", "B-PER I-PER O B-LOC", 2, 2, 2),  # as tagged
            ("w6 w5 w5 w8", "B-PER I-PER O B-LOC", 1, 2, 2),  # cut short
            ("w6 w7 w5 w8", "B-PER I-PER O B-PER", 1, 2, 2),  # another type
            ("w5 w7 w5", "O B-PER O", 0, 0, 1),  # an entity needs a B- tag
            ("w6 w9 w5", "B-PER O O", 1, 1, 1),  # as I-LOC is not a part of it
            ("w6 w6 w5", "B-PER I-PER O", 0, 2, 1),  # two entities
            ("w5 w5", "O O", 0, 0, 0),
            ("w6 w7", "B-PER I-PER", 1, 1, 1),  # up to the end
        ],
    )
    def test_counts_whole_entities(self, text, tags, right, found, true):
        counts = score(Tagger(NAMES), dataset([(text, numbers(tags))], NAMES)).counts
        assert counts[0, :3].tolist() == [right, found, true]

    def test_of_conlleval_begins_an_entity_with_an_inside_tag(self):
        rows = [("w5 w7 w7", numbers("O B-PER I-PER"))]
        counts = score(Tagger(NAMES), dataset(rows, NAMES)).counts
        assert counts[0].tolist() == [0, 0, 1, 1, 1, 1]
        assert values(Tagger(NAMES), dataset(rows, NAMES)) == {"f1": 0, "precision": 0, "recall": 0, "conlleval_f1": 1}

    def test_has_precision_recall_and_f1_of_the_sums(self):
        rows = [("w6 w8 w8", numbers("B-PER O O")), ("w5 w6", numbers("B-LOC B-PER"))]  # 2 of 4 found, 2 of 3 true
        got = values(Tagger(NAMES), dataset(rows, NAMES))
        assert got == pytest.approx({"f1": 4 / 7, "precision": 1 / 2, "recall": 2 / 3, "conlleval_f1": 4 / 7})
        assert next(iter(got)) == "f1"

    def test_reads_the_first_piece_of_each_word(self):
        rows = [("w6-w5-w5 w5-w6", numbers("B-PER O"))]
        assert values(Tagger(NAMES), dataset(rows, NAMES))["f1"] == 1

    def test_counts_words_that_are_cut_off_as_missed(self):
        rows = [("w5 w6 w6 w6", numbers("O B-PER B-PER B-PER"))]
        assert values(Tagger(NAMES), dataset(rows, NAMES), max_length=4)["recall"] == pytest.approx(1 / 3)
        assert values(Tagger(NAMES), dataset(rows, NAMES), max_length=4)["precision"] == 1

    def test_counts_words_without_a_piece_as_outside(self):
        rows = [("w6 - w6 w7", numbers("B-PER O B-PER I-PER"))]
        assert values(Tagger(NAMES), dataset(rows, NAMES)) == {"f1": 1, "precision": 1, "recall": 1, "conlleval_f1": 1}

    def test_takes_a_sentence_without_words(self):
        rows = [("w6", numbers("B-PER")), ("", []), ("w5", numbers("O"))]
        assert score(Tagger(NAMES), dataset(rows, NAMES)).counts[:, 2].tolist() == [1, 0, 0]

    def test_compares_by_name_and_not_by_number(self):
        other = ["B-LOC", "O", "I-PER", "I-LOC", "B-PER"]
        rows = [("w9 w7 w6", numbers("B-PER I-PER O")), ("w5 w8", numbers("B-LOC I-LOC"))]
        assert values(Tagger(other), dataset(rows, NAMES))["f1"] == 1
        assert values(Tagger(NAMES), dataset(rows, NAMES))["f1"] < 1

    def test_cuts_to_what_the_tokenizer_allows(self):
        words = word_tokenizer()
        words.model_max_length = 4
        examples = CONLL2003.prepare(dataset(some_sentences(5), NAMES), words, 512)
        assert max(map(len, examples["input_ids"])) == 4

    def test_takes_models_without_token_types(self):
        words = word_tokenizer()
        words.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
        data = dataset([("w6 w7", numbers("B-PER I-PER"))], NAMES)
        assert "token_type_ids" in CONLL2003.prepare(data, words, LENGTH).column_names
        scores = CONLL2003.score(Tagger(NAMES), data, words, ScoringOptions(4, LENGTH))
        assert scores.counts[0, :3].tolist() == [1, 1, 1]

    def test_leaves_the_training_mode_alone(self):
        model, data = tagger().train(), dataset(some_sentences(20), NAMES)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        counts = score(model, data).counts
        assert all(module.training for module in model.modules())
        assert np.array_equal(counts, score(model.eval(), data).counts)  # no dropout either way

    def test_has_metrics_that_can_be_compared(self):
        data = dataset(some_sentences(30), NAMES)
        dense, other = score(tagger(seed=1), data), score(tagger(seed=2), data)
        difference = compare(dense, other, 0.95)["f1"]
        assert difference.lower <= difference.mean <= difference.upper


OTHER = ["B-LOC", "O", "I-PER", "I-LOC", "B-PER"]
ROWS = [("w5 w6", numbers("B-PER I-PER")), ("w7", numbers("B-LOC"))]
DEFAULT = [f"LABEL_{number}" for number in range(5)]


class TestAlignTags:
    def test_gives_tags_the_numbers_of_the_model(self):
        got = align_tags(dataset(ROWS, NAMES), Tagger(OTHER))
        assert list(got["ner_tags"]) == [[4, 2], [0]]
        assert got.features["ner_tags"].feature.names == OTHER
        assert list(got["tokens"]) == [["w5", "w6"], ["w7"]]

    def test_is_the_same_the_second_time(self):
        once = align_tags(dataset(ROWS, NAMES), Tagger(OTHER))
        assert list(align_tags(once, Tagger(OTHER))["ner_tags"]) == list(once["ner_tags"])

    def test_takes_names(self):
        rows = [(text, [NAMES[tag] for tag in tags]) for text, tags in ROWS]
        assert list(align_tags(dataset(rows), Tagger(OTHER))["ner_tags"]) == [[4, 2], [0]]

    def test_takes_mere_numbers_for_those_of_the_model(self):
        got = align_tags(dataset(ROWS), Tagger(OTHER))
        assert list(got["ner_tags"]) == [tags for _, tags in ROWS]
        assert got.features["ner_tags"].feature.names == OTHER

    def test_takes_the_names_of_the_data_where_the_model_has_none(self):
        got = align_tags(dataset(ROWS, NAMES), Tagger(DEFAULT))
        assert list(got["ner_tags"]) == [tags for _, tags in ROWS]
        assert got.features["ner_tags"].feature.names == NAMES

    def test_orders_the_names_of_a_model_by_number(self):
        model = Tagger(OTHER)
        model.config.id2label = dict(reversed(model.config.id2label.items()))
        assert list(align_tags(dataset(ROWS, NAMES), model)["ner_tags"]) == [[4, 2], [0]]

    def test_keeps_other_columns_and_other_names_of_the_columns(self):
        data = dataset(ROWS, NAMES).rename_columns({"tokens": "words", "ner_tags": "tags"}).add_column("id", [7, 8])
        got = align_tags(data, Tagger(OTHER))
        assert list(got["id"]) == [7, 8]
        assert list(got["tags"]) == [[4, 2], [0]]


def misspelt(names):
    return [name.replace("PER", "PERSON") for name in names]


BAD = {  # data, model's names, message
    "no tags": (Dataset.from_dict({"tokens": [["w5"]]}), NAMES, "none of the columns ner_tags, tags, labels"),
    "no words": (Dataset.from_dict({"ner_tags": [[1]]}), NAMES, "none of the columns tokens, words"),
    "fewer tags": (dataset([("w5 w6", [1])]), NAMES, "example 0 has 2 words, but 1 tags"),
    "no list": (
        Dataset.from_dict({"tokens": [["w5"], ["w6"]], "ner_tags": [[0], None]}),
        NAMES,
        "1 words, but 0 tags",
    ),
    "empty": (dataset(ROWS, NAMES).select([]), NAMES, "the data set is empty"),
    "out of range": (dataset([*ROWS, ("w5", [5])]), NAMES, "example 2 has the tag 5, but the model has 5: O, B-PER"),
    "negative": (dataset([("w5", [-1])], NAMES), NAMES, "example 0 has the tag -1"),
    "unknown name": (
        dataset([("w5 w6", ["O", "B-MISC"])]),
        NAMES,
        "example 0 has the tag 'B-MISC', but the model has",
    ),
    "fractions": (dataset([("w5", [0.5])]), NAMES, r"example 0 has the tag 0\.5"),
    "more tags": (dataset(ROWS, [*NAMES, "B-X"]), NAMES, "the data set has 6 tags: O, B-PER.* but the model has 5: O"),
    "fewer tags than the model": (dataset(ROWS, NAMES), [*NAMES, "B-X"], "the data set has 5 tags: .* has 6: O"),
    "other names": (dataset(ROWS, NAMES), misspelt(NAMES), "the data set has 5 tags: .* has 5: O, B-PERSON"),
    "no names": (
        dataset(ROWS),
        DEFAULT,
        "neither the data set nor the model names its tags; the model has 5: LABEL_0",
    ),
}


class TestErrors:
    @pytest.mark.parametrize("case", BAD)
    def test_of_data_say_what_is_wrong(self, case):
        data, names, message = BAD[case]
        for use in (align_tags, lambda data, model: score(model, data)):
            with pytest.raises(DataError, match=message):
                use(data, Tagger(names))

    def test_of_preparing_tags_that_are_no_numbers(self):
        for tag in ("O", -1):
            with pytest.raises(DataError, match=rf"example 0 has the tag {tag!r}.*align_tags"):
                CONLL2003.prepare(dataset([("w5", [tag])]), word_tokenizer(), LENGTH)

    def test_of_tags_of_another_scheme(self):
        names = ["O", "B-PER", "E-PER", "S-PER", "PER"]
        with pytest.raises(DataError, match=r"must be O, or B- or I- and a type \(IOB2\), not E-PER, S-PER, PER"):
            score(Tagger(names), dataset(ROWS, names))

    def test_of_a_slow_tokenizer(self):
        slow = type("Slow", (), {"is_fast": False})()
        with pytest.raises(DataError, match=r"Slow does not give\. Load a fast tokenizer"):
            CONLL2003.prepare(dataset(ROWS, NAMES), slow, LENGTH)

    def test_without_seqeval_say_what_to_install(self, monkeypatch):
        for module in ("seqeval", "seqeval.scheme", "seqeval.metrics", "seqeval.metrics.sequence_labeling"):
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ConfigurationError, match=r"pip install hf-lossless-lr\[eval\]"):
            score(Tagger(NAMES), dataset(ROWS, NAMES))

    def test_of_logits_that_are_not_numbers(self):
        model = tagger()
        model.classifier.bias.data.fill_(float("nan"))
        with pytest.raises(NumericalError, match="the logits of a sentence are not numbers"):
            score(model, dataset(ROWS, NAMES))


class TestPrepare:
    def test_labels_the_first_piece_of_each_word(self):
        examples = CONLL2003.prepare(dataset([("w5-w6 w7", [3, 4])], NAMES), word_tokenizer(), LENGTH)
        assert examples["input_ids"] == [[CLS, 5, 6, 7, SEP]]
        assert examples["labels"] == [[IGNORED, 3, IGNORED, 4, IGNORED]]

    def test_collates_to_what_a_model_takes(self):
        examples = CONLL2003.prepare(dataset(some_sentences(4), NAMES), word_tokenizer(), LENGTH)
        batch = CONLL2003.collator(word_tokenizer())(list(examples))
        assert tagger()(**batch).loss.isfinite()


class TestCompression:
    def test_takes_what_is_prepared(self):
        model, dense = tagger(), tagger()
        train, held_out = (dataset(some_sentences(32, seed), NAMES) for seed in (8, 9))
        parts = [CONLL2003.prepare(data, word_tokenizer(), LENGTH) for data in (train, held_out)]
        collator = CONLL2003.collator(word_tokenizer())
        compressor = LowRankCompressor(LosslessLowRankConfig(keep_ratio=0.5, batch_size=8))
        model = compressor.compress(model, parts[0], eval_dataset=parts[1], data_collator=collator)
        assert compressor.report.held_out["examples"] == 32
        certificate = verify(dense, model, parts[1], data_collator=collator, batch_size=8)
        assert certificate.loss[0] == pytest.approx(compressor.report.dense.loss)
        assert compare(score(dense, held_out), score(model, held_out), 0.95).keys() == values(model, held_out).keys()
