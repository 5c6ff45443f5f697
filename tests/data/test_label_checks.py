"""Labels that a head cannot take are named before any work, with the example and what to do."""

import itertools
from copy import deepcopy
from itertools import chain

import pytest
import torch
from datasets import Dataset
from support.example_data import ListDataset, StreamDataset
from support.tiny_models import IGNORED, TINY_MODELS, as_examples, build, other_inputs
from support.word_tokenizer import word_tokenizer
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    FSMTConfig,
    FSMTForConditionalGeneration,
    TapasConfig,
    TapasForSequenceClassification,
)

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor, verify
from hf_lossless_lr.data.digests import examine
from hf_lossless_lr.data.label_checks import position_limit
from hf_lossless_lr.data.loaders import STREAM_LIMIT, make_dataloader
from hf_lossless_lr.data.splits import split_data
from hf_lossless_lr.errors import DataError

COUNT = 20
CLASSIFIER, TAGGER, CAUSAL = "bert-sequence-classification", "bert-token-classification", "llama"


def examples_of(name, **changes):
    model, batch = TINY_MODELS[name](COUNT)
    examples = as_examples(batch)
    return model, [{**example, **changes} for example in examples]


def refused(model, examples, **options):
    with pytest.raises(DataError) as caught:
        LowRankCompressor().compress(model, examples, **options)
    return str(caught.value)


WRONG = {  # model, what becomes of example 7, and the message
    "a name": (
        CLASSIFIER,
        lambda e: {"labels": "great"},
        "example 7 has the label 'great', which model.config.label2id",
    ),
    "a number as text": (CLASSIFIER, lambda e: {"labels": "1"}, "example 7 has the label '1', which"),
    "a float": (CLASSIFIER, lambda e: {"labels": 1.0}, "example 7 has the label 1.0, a float, but the model chooses"),
    "too large": (CLASSIFIER, lambda e: {"labels": 3}, "example 7 has the label 3, but the model's are 0 to 2"),
    "negative": (CLASSIFIER, lambda e: {"labels": -1}, "example 7 has the label -1, but the model's are 0 to 2"),
    "null": (CLASSIFIER, lambda e: {"labels": None}, "example 7 has no label (labels is null). Leave it out"),
    "several": (CLASSIFIER, lambda e: {"labels": [0, 1]}, "example 7 has 2 labels, but the model has 3 classes"),
    "whole numbers of several classes": (CLASSIFIER, lambda e: {"labels": [0, 1, 0]}, "give floats (multi-label)"),
    "too few tags": (TAGGER, lambda e: {"labels": e["labels"][:-1]}, "example 7 has 8 labels for 9 tokens."),
    "a tag too large": (TAGGER, lambda e: {"labels": [5, *e["labels"][1:]]}, "example 7 has the label 5, but"),
    "a tag that is a float": (TAGGER, lambda e: {"labels": [0.5, *e["labels"][1:]]}, "example 7 has the label 0.5, a"),
    "a null tag": (TAGGER, lambda e: {"labels": [None, *e["labels"][1:]]}, "example 7 has no label (labels is null)"),
    "a name as tag": (TAGGER, lambda e: {"labels": ["B-X", *e["labels"][1:]]}, "example 7 has the label 'B-X'"),
    "no word": (
        CAUSAL,
        lambda e: {"labels": [61, *e["labels"][1:]]},
        "example 7 has the label 61, but the model's are",
    ),
    "too few words": (CAUSAL, lambda e: {"labels": e["labels"][1:]}, "example 7 has 8 labels for 9 tokens."),
    "too long": (
        CLASSIFIER,
        lambda e: {name: e[name] * 5 for name in ("input_ids", "attention_mask")},
        "example 7 has 45 tokens, but the model has positions for 40. Tokenize with truncation=True",
    ),
}


class TestRefusal:
    @pytest.mark.parametrize("kind", [list, ListDataset])
    @pytest.mark.parametrize("case", WRONG)
    def test_names_the_example_before_any_work(self, case, kind, monkeypatch):
        monkeypatch.setattr("hf_lossless_lr.pipeline.compressor.calibrate", lambda *_: pytest.fail("work was done"))
        name, change, text = WRONG[case]
        model, examples = examples_of(name)
        examples[7] = examples[7] | change(examples[7])
        said = refused(
            model,
            kind(examples),
            data_collator=list_of if case in ("too few tags", "too few words", "too long") else None,
        )
        assert said.startswith("calib_dataset: ")
        assert text in said

    @pytest.mark.parametrize("label", [3, -1])
    def test_names_the_row_of_a_ready_made_batch(self, label):
        model, batch = TINY_MODELS[CLASSIFIER](COUNT)
        batches = [
            {name: value[start : start + 4].clone() for name, value in batch.items()} for start in (0, 4, 8, 12)
        ]
        batches[2]["labels"][1] = label
        assert f"calib_dataset: row 1 of batch 2 has the label {label}, but" in refused(model, batches)

    def test_is_of_the_held_out_data_too(self):
        model, examples = examples_of(CLASSIFIER)
        others = as_examples(other_inputs(TINY_MODELS[CLASSIFIER](COUNT)[1]))
        others[3]["labels"] = 9
        text = "eval_dataset: example 3 has the label 9, but the model's are 0 to 2"
        assert text in refused(model, examples, eval_dataset=others)
        with pytest.raises(DataError, match=text):
            verify(model, deepcopy(model), others)

    def test_is_of_tokens_that_the_model_does_not_know(self):
        model, examples = examples_of(CLASSIFIER)
        examples = [example | {"input_ids": [10**6, *example["input_ids"][1:]]} for example in examples]
        assert "batch 0: it has a token, a position or a type that BertForSequenceClassification has" in refused(
            model, examples
        )

    def test_is_of_one_class_for_a_whole_text_where_each_token_has_a_label(self):
        model, examples = examples_of("llama")
        text = "example 0 has the label 1, one for all of it, but LlamaForCausalLM answers for each token"
        assert text in refused(model, [example | {"labels": 1} for example in examples])

    def test_sees_what_a_collator_of_the_user_makes(self):
        model, batch = TINY_MODELS[CLASSIFIER](COUNT)
        rows = [{"row": index} for index in range(COUNT)]

        def collate(items):
            chosen = torch.tensor([item["row"] for item in items])
            return {name: value[chosen] for name, value in batch.items()}

        batch["labels"][11] = 4
        loader = torch.utils.data.DataLoader(rows, batch_size=4, collate_fn=collate)
        assert "example 11 has the label 4" in refused(model, loader)

    def test_of_data_without_any_label_comes_before_the_work(self, monkeypatch):
        monkeypatch.setattr("hf_lossless_lr.pipeline.compressor.calibrate", lambda *_: pytest.fail("work was done"))
        model, examples = examples_of(CAUSAL, labels=[IGNORED] * 9)
        assert refused(model, examples) == "calib_dataset: no example has a label: every label is -100."
        good = examples_of(CAUSAL)[1]
        others = [example | {"input_ids": example["input_ids"][::-1]} for example in examples]
        assert "eval_dataset: no example has a label" in refused(model, good, eval_dataset=others)


def list_of(items):
    """A collator that takes examples of several lengths."""
    return DataCollatorForTokenClassification(word_tokenizer())(items)


list_of.__module__ = "transformers"  # one that takes labels as they are


class TestMapping:
    def test_of_names_is_that_of_the_model(self):
        model, examples = examples_of(CLASSIFIER)
        model.config.label2id = {"bad": 0, "fair": 1, "good": 2}
        named = [e | {"labels": ("bad", "fair", "good")[e["labels"]]} for e in examples]
        got = [batch["labels"].tolist() for batch in make_dataloader(Dataset.from_list(named), model, batch_size=5)]
        assert [*chain(*got)] == [example["labels"] for example in examples]
        renamed = [{("label" if name == "labels" else name): value for name, value in e.items()} for e in named]
        got = [batch["labels"].tolist() for batch in make_dataloader(renamed, model, batch_size=5)]
        assert [*chain(*got)] == [example["labels"] for example in examples]

    def test_may_be_given_by_the_names_of_the_classes_alone(self):
        model, examples = examples_of(CLASSIFIER)
        model.config.label2id, model.config.id2label = None, {0: "bad", 1: "fair", 2: "good"}
        named = [e | {"labels": ("bad", "fair", "good")[e["labels"]]} for e in examples]
        got = [batch["labels"].tolist() for batch in make_dataloader(named, model, batch_size=5)]
        assert [*chain(*got)] == [example["labels"] for example in examples]

    def test_of_tags_is_that_of_the_model(self):
        model, examples = examples_of(TAGGER)
        names = {f"T{number}": number for number in range(5)}
        model.config.label2id = names
        named = [e | {"labels": [f"T{n}" if n >= 0 else n for n in e["labels"]]} for e in examples]
        collator = DataCollatorForTokenClassification(word_tokenizer())
        got = [b["labels"].tolist() for b in make_dataloader(named, model, batch_size=5, data_collator=collator)]
        assert [*chain(*got)] == [example["labels"] for example in examples]

    def test_leaves_names_to_a_collator_of_the_user(self):
        model, examples = examples_of(CLASSIFIER)
        named = [e | {"labels": ("A", "B", "C")[e["labels"]]} for e in examples]

        def collate(items):
            columns = {name: torch.tensor([e[name] for e in items]) for name in ("input_ids", "attention_mask")}
            return columns | {"labels": torch.tensor(["ABC".index(e["labels"]) for e in items])}

        got = [b["labels"].tolist() for b in make_dataloader(named, model, batch_size=5, data_collator=collate)]
        assert [*chain(*got)] == [example["labels"] for example in examples]


class TestAcceptance:
    def test_of_floats_for_a_regression_and_for_several_labels(self):
        options = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
        for labels, classes in ((0.5, 1), ([0.0, 1.0, 1.0], 3)):
            model = build(
                "BertForSequenceClassification", "BertConfig", intermediate_size=48, num_labels=classes, **options
            )
            examples = [example | {"labels": labels} for example in examples_of(CLASSIFIER)[1]]
            assert all(examine(make_dataloader(examples, model, batch_size=4), model, "x")[1])

    @pytest.mark.parametrize("name", sorted(TINY_MODELS))
    def test_of_every_tiny_model(self, name):
        model, batch = TINY_MODELS[name](COUNT)
        for data in (as_examples(batch), [batch]):
            assert all(examine(make_dataloader(data, model, batch_size=4), model, "x")[1])

    def test_counts_positions_as_the_table_does(self):
        """RoBERTa's first position is 2; Llama computes its positions."""
        assert [position_limit(TINY_MODELS[name]()[0]) for name in (CLASSIFIER, "llama", "t5")] == [40, None, None]
        model = TINY_MODELS["roberta"]()[0]
        limit = position_limit(model)
        assert limit == model.config.max_position_embeddings - 2
        assert model(torch.full((1, limit), 5)).logits.shape == (1, model.num_labels)
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, limit + 1), 5))

    def test_of_longer_texts_where_the_model_takes_them(self):
        sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
        tables = TapasForSequenceClassification(TapasConfig(**sizes, intermediate_size=48, max_position_embeddings=16))
        sizes = {"src_vocab_size": 60, "tgt_vocab_size": 60, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 16}
        translator = FSMTForConditionalGeneration(FSMTConfig(langs=["de", "en"], **sizes, **heads))
        ids = torch.randint(3, 60, (2, 40))
        for model, batch in ((tables, {"labels": torch.tensor([0, 1])}), (translator, {"labels": ids})):
            assert position_limit(model) is None
            assert torch.isfinite(model(input_ids=ids, **batch).loss)


class TestDrawing:
    @pytest.mark.parametrize("name", [CLASSIFIER, CAUSAL])
    @pytest.mark.parametrize("seed", range(4))
    def test_takes_labelled_items_to_select_and_to_judge(self, name, seed):
        model, batch = TINY_MODELS[name](40)
        examples = as_examples(batch)
        for index, example in enumerate(examples):
            if index % 5:
                example["labels"] = IGNORED if name == CLASSIFIER else [IGNORED] * 9
        parts = split_data(model, examples, None, batch_size=4, seed=seed, selection_fraction=0.05)
        for loader in (parts.held_out, parts.selection, parts.calibration):
            assert any(bool((batch["labels"] != IGNORED).any()) for batch in loader)

    def test_is_as_before_where_all_are_labelled(self):
        model, examples = examples_of(CLASSIFIER)
        assert examine(make_dataloader(examples, model, batch_size=4), model, "x")[1] == [True] * COUNT


class Endless(torch.utils.data.IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return itertools.cycle(self.items)


ENDLESS = {
    "IterableDataset": Endless,
    "generator": itertools.cycle,
    "DataLoader": lambda items: torch.utils.data.DataLoader(Endless(items), batch_size=4),
}


class TestStreams:
    @pytest.mark.parametrize("kind", ENDLESS)
    def test_without_an_end_are_refused_after_a_stated_number(self, kind):
        model, batch = TINY_MODELS[CLASSIFIER](COUNT)
        items = [{name: value[index] for name, value in batch.items()} for index in range(COUNT)]
        with pytest.raises(DataError, match=f"gives more than {STREAM_LIMIT:,} examples.*Set max_examples"):
            make_dataloader(ENDLESS[kind](items), model, batch_size=4)

    @pytest.mark.parametrize("kind", ENDLESS)
    def test_are_read_as_far_as_asked_for(self, kind):
        model, batch = TINY_MODELS[CLASSIFIER](COUNT)
        items = [{name: value[index] for name, value in batch.items()} for index in range(COUNT)]
        loader = make_dataloader(ENDLESS[kind](items), model, batch_size=4, max_examples=COUNT)
        assert torch.equal(torch.cat([b["input_ids"] for b in loader]), batch["input_ids"])

    def test_are_compressed_with_the_option(self):
        model, examples = examples_of(CLASSIFIER)
        others = as_examples(other_inputs(TINY_MODELS[CLASSIFIER](COUNT)[1]))
        compressor = LowRankCompressor(LosslessLowRankConfig(refit=False, max_examples=12))
        compressor.compress(model, Endless(examples), eval_dataset=StreamDataset(others))
        assert (compressor.report.calibration["examples"], compressor.report.held_out["examples"]) == (12, 12)

    def test_are_judged_on_as_far_as_asked_for_without_labels(self):
        model, examples = examples_of(CLASSIFIER)
        others = as_examples(other_inputs(TINY_MODELS[CLASSIFIER](COUNT)[1]))
        bare = [[{k: v for k, v in each.items() if k != "labels"} for each in part] for part in (examples, others)]
        compressor = LowRankCompressor(LosslessLowRankConfig(refit=False, max_examples=12, labels="model"))
        compressor.compress(model, Endless(bare[0]), eval_dataset=Endless(bare[1]))
        assert (compressor.report.calibration["examples"], compressor.report.held_out["examples"]) == (12, 12)

    def test_cut_too_short_are_refused(self):
        model, examples = examples_of(CLASSIFIER)
        compressor = LowRankCompressor(LosslessLowRankConfig(refit=False, max_examples=3))
        with pytest.raises(DataError, match="with max_examples: has 3 examples; at least 8 are needed"):
            compressor.compress(model, examples)

    @pytest.mark.parametrize("batches", [False, True])
    def test_need_not_be_streams_to_be_cut(self, batches):
        model, batch = TINY_MODELS[CLASSIFIER](COUNT)
        data = as_examples(batch)
        if batches:
            data = [{name: value[start : start + 4] for name, value in batch.items()} for start in range(0, COUNT, 4)]
        others = as_examples(other_inputs(batch))
        config = LosslessLowRankConfig(refit=False, max_examples=11)
        compressor = LowRankCompressor(config)
        compressor.compress(model, data, eval_dataset=others)
        assert compressor.report.calibration["examples"] == (8 if batches else 11)
        assert compressor.report.held_out["examples"] == COUNT


class TestPadding:
    def ragged(self, name):
        model, examples = examples_of(name)
        return model, [
            {"input_ids": e["input_ids"][: 4 + n % 5], "labels": e["labels"][: 4 + n % (5 if name != "t5" else 3)]}
            for n, e in enumerate(examples)
        ]

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("name", [CAUSAL, TAGGER, "t5"])
    def test_of_labels_is_the_default(self, name, side):
        model, examples = self.ragged(name)
        tokenizer = word_tokenizer()
        tokenizer.padding_side = side
        loader = make_dataloader(examples, model, batch_size=5, processing_class=tokenizer)
        side = "right" if name == "t5" else side
        for start, batch in zip(range(0, COUNT, 5), loader, strict=True):
            for example, row in zip(examples[start : start + 5], batch["labels"].tolist(), strict=True):
                size = len(example["labels"])
                own, rest = (row[:size], row[size:]) if side == "right" else (row[-size:], row[: len(row) - size])
                assert own == example["labels"]
                assert rest == [IGNORED] * len(rest)
            if name != "t5":
                assert batch["labels"].shape == batch["input_ids"].shape
            assert torch.isfinite(model(**batch).loss)

    def test_without_a_tokenizer_says_what_to_pass(self):
        model, examples = self.ragged(CAUSAL)
        with pytest.raises(DataError, match=r"cannot be joined into a batch: .*processing_class=tokenizer"):
            make_dataloader(examples, model, batch_size=5)

    def test_is_as_of_transformers_for_one_label_each(self):
        model, examples = examples_of(CLASSIFIER)
        tokenizer = word_tokenizer()
        mine = next(iter(make_dataloader(examples, model, batch_size=5, processing_class=tokenizer)))
        theirs = DataCollatorWithPadding(tokenizer)(examples[:5])
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_an_example_without_labels_that_others_have_is_named():
    model, examples = examples_of(CLASSIFIER)
    del examples[12]["labels"]
    assert "example 12 has no label (labels), and others have" in refused(model, examples)
