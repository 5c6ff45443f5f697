"""Parts of the data that share no example, told by content."""

import numpy as np
import pytest
import torch
from support.example_data import BATCH_SIZE, EXAMPLE_KINDS, KINDS, ListDataset, cut
from support.tiny_models import (
    TINY_MODELS,
    as_examples,
    bert_multiple_choice,
    bert_question_answering,
    bert_sequence_classification,
    split_batch,
    swin,
    t5,
    text_inputs,
)
from torch.utils.data import DataLoader, TensorDataset

from hf_lossless_lr.data.digests import combined_digest, item_digests
from hf_lossless_lr.data.loaders import dataset_size, make_dataloader, subset
from hf_lossless_lr.data.splits import HOLDOUT_FRACTION, split_holdout, without
from hf_lossless_lr.errors import DataError


@pytest.fixture(scope="module")
def model():
    return bert_sequence_classification()[0]


def loader_of(model, data, **options):
    return make_dataloader(data, model, **{"batch_size": 3} | options)


def digests_of(model, data, **options):
    """The digest of each example; a ready-made batch has to be one example, as its digests have no order."""
    loader = loader_of(model, data, **{"data_collator": list} | options)  # no need to pad them
    return [digest for item in item_digests(loader, model) for digest in item]


# --- digests --------------------------------------------------------------------------------------------------------

WORDS = {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": 1}

# other forms of that example, for a model of text
SAME = {
    "another label": WORDS | {"labels": 2},
    "no label": {name: WORDS[name] for name in ("input_ids", "attention_mask")},
    "a label under another name": {"label": 2, "input_ids": WORDS["input_ids"], "attention_mask": [1, 1, 1]},
    "labels of tokens": WORDS | {"label_ids": [1, 2, 3]},
    "padding": {"input_ids": [5, 6, 7, 0, 0], "attention_mask": [1, 1, 1, 0, 0]},
    "padding on the left": {"input_ids": [0, 0, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1]},
    "words in the padding": {"input_ids": [5, 6, 7, 33], "attention_mask": [1, 1, 1, 0]},
    "no mask": {"input_ids": [5, 6, 7]},
    "tensors": {name: torch.tensor(value) for name, value in WORDS.items()},
    "arrays": {name: np.array(value) for name, value in WORDS.items()},
    "narrow integers": {"input_ids": torch.tensor([5, 6, 7], dtype=torch.int32), "attention_mask": [1, 1, 1]},
    "bytes": {"input_ids": np.array([5, 6, 7, 0], dtype=np.uint8), "attention_mask": [True, True, True, False]},
    "a mask of truth values": WORDS | {"attention_mask": torch.tensor([True, True, True])},
    "a mask of fractions": {"input_ids": [5, 6, 7, 9], "attention_mask": [1.0, 1.0, 1.0, 0.0]},
    "a column that the model does not take": WORDS | {"idx": 3, "sentence": "some words"},
    "another order of the columns": dict(reversed(WORDS.items())),
}
OTHER = {
    "another word": WORDS | {"input_ids": [5, 6, 8]},
    "another order of the words": WORDS | {"input_ids": [6, 5, 7]},
    "a word more": {"input_ids": [5, 6, 7, 7]},
    "a word less": {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 0]},
    "another first word": WORDS | {"input_ids": [0, 6, 7]},
    "another part": WORDS | {"token_type_ids": [0, 1, 1]},
    "the parts in another place": WORDS | {"token_type_ids": [0, 0, 1]},
}


def digest_of(model, example):
    """The digest of an example, among others that a loader wants to see besides."""
    return digests_of(model, [example, *({"input_ids": [index]} for index in range(10, 20))])[0]


class TestDigests:
    @pytest.mark.parametrize("case", SAME)
    def test_are_the_same_for(self, case, model):
        assert digest_of(model, SAME[case]) == digest_of(model, WORDS)

    def test_are_others_for_other_content(self, model):
        digests = {case: digest_of(model, example) for case, example in {"": WORDS, **OTHER}.items()}
        assert len(set(digests.values())) == len(digests)

    def test_of_parts_do_not_depend_on_padding(self, model):
        padded = {"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0], "token_type_ids": [0, 1, 0]}
        plain = {"input_ids": [5, 6], "token_type_ids": torch.tensor([0, 1])}
        assert digest_of(model, padded) == digest_of(model, plain)

    @pytest.mark.parametrize("name", TINY_MODELS)
    def test_of_batches_are_those_of_their_examples(self, name):
        model, batch = TINY_MODELS[name](11)
        digests = digests_of(model, as_examples(batch), data_collator=len)
        assert len(set(digests)) == 11
        for size in (1, 4, 11):
            loader = loader_of(model, split_batch(batch, size))
            items = item_digests(loader, model)
            assert items == [frozenset(digests[i : i + size]) for i in range(0, 11, size)]

    @pytest.mark.parametrize("kind", KINDS)
    def test_do_not_depend_on_the_kind_of_data(self, kind, model):
        examples = as_examples(bert_sequence_classification(11)[1])
        loader = make_dataloader(KINDS[kind](examples), model, batch_size=BATCH_SIZE)
        items = item_digests(loader, model)
        assert len(items) == dataset_size(loader)
        assert sorted(d for item in items for d in item) == sorted(digests_of(model, examples))

    @pytest.mark.parametrize("name", TINY_MODELS)
    def test_do_not_depend_on_labels(self, name):
        model, batch = TINY_MODELS[name](9)
        unlabelled = {k: v for k, v in batch.items() if "label" not in k and "position" not in k}
        assert digests_of(model, split_batch(batch, 1)) == digests_of(model, split_batch(unlabelled, 1))

    def test_of_spans_do_not_depend_on_the_answers(self):
        model, batch = bert_question_answering(9)
        other = batch | {"start_positions": batch["start_positions"] + 1, "end_positions": batch["end_positions"] * 0}
        assert digests_of(model, split_batch(batch, 1)) == digests_of(model, split_batch(other, 1))

    def test_do_not_depend_on_the_inputs_of_a_decoder_that_are_its_labels(self):
        model, batch = t5(9)
        shifted = batch | {"decoder_input_ids": model._shift_right(batch["labels"])}
        assert digests_of(model, split_batch(batch, 1)) == digests_of(model, split_batch(shifted, 1))

    def test_of_choices_do_not_depend_on_their_padding(self):
        model, batch = bert_multiple_choice(9)
        ragged = [
            {
                "input_ids": [words[:length] for words, length in zip(example["input_ids"], lengths, strict=True)],
                "attention_mask": [[1] * length for length in lengths],
            }
            for example in as_examples(batch)
            for lengths in [[sum(mask) for mask in example["attention_mask"]]]
        ]
        plain = [{"input_ids": example["input_ids"]} for example in ragged]
        tensors = [{name: [torch.tensor(row) for row in rows] for name, rows in example.items()} for example in ragged]
        digests = digests_of(model, split_batch(batch, 1))
        for data in (ragged, plain, tensors):
            assert digests_of(model, data, data_collator=len) == digests

    def test_of_choices_may_be_padded_to_several_lengths(self):
        model = bert_multiple_choice()[0]
        plain = {"input_ids": [[5, 6], [7]], "attention_mask": [[1, 1], [1]]}
        padded = {"input_ids": [[5, 6, 0, 0], [7, 0]], "attention_mask": [[1, 1, 0, 0], [1, 0]]}
        assert digest_of(model, padded) == digest_of(model, plain)

    def test_of_choices_tell_which_words_are_in_which(self):
        model = bert_multiple_choice()[0]
        one, other = ({"input_ids": ids, "attention_mask": ids} for ids in ([[1, 2], [3]], [[1], [2, 3]]))
        assert digest_of(model, one) != digest_of(model, other)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_of_pictures_see_each_pixel(self, dtype):
        model, batch = swin(9)
        pixels = batch["pixel_values"].to(dtype)
        changed = pixels.clone()
        changed[4, 0, 3, 3] += 1
        digests, others = (digests_of(model, split_batch({"pixel_values": p}, 1)) for p in (pixels, changed))
        assert [a == b for a, b in zip(digests, others, strict=True)] == [True] * 4 + [False] + [True] * 4
        examples = [{"pixel_values": p.float().tolist()} for p in pixels]
        assert digests_of(model, examples) == digests

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("mask", [[1, 1, 0], [[1, 1, 0]]])
    def test_see_what_has_another_shape_than_the_mask(self, mask, dtype):
        """As the pictures and the numbers beside a text."""
        base = {"input_ids": torch.tensor(mask), "attention_mask": torch.tensor(mask)}
        values = [torch.zeros(shape, dtype=dtype) for shape in ((2, 3), (3, 2), (4,), (4, 2), (1, 3, 2), ())]
        for value in list(values):
            changed = value.clone()
            changed.view(-1)[-1] = 1
            values.append(changed)
        examples = [base | {"pixel_values": value} for value in (*values, "abc", "abd")]
        assert len(set(digests_of(TextAndPicture(), ListDataset(examples)))) == len(examples)

    def test_of_batches_leave_out_what_belongs_to_no_example(self, model):
        batch = bert_sequence_classification(9)[1]
        loaders = [
            loader_of(model, iter([batch | more]))
            for more in ({}, {"return_dict": True, "position_ids": torch.tensor(2), "inputs_embeds": torch.zeros(2)})
        ]
        assert item_digests(loaders[0], model) == item_digests(loaders[1], model)

    def test_of_a_loader_leave_out_the_columns_that_the_model_does_not_take(self, model):
        examples = as_examples(bert_sequence_classification(9)[1])
        numbered = [example | {"idx": index, "sentence": f"text {index}"} for index, example in enumerate(examples)]
        loader = DataLoader(numbered, batch_size=4, collate_fn=lambda items: items)
        assert digests_of(model, loader) == digests_of(model, examples)

    def test_of_examples_that_only_a_collator_understands_see_everything_but_the_label(self, model):
        def digests(texts, labels):
            examples = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
            loader = DataLoader(examples, batch_size=4, collate_fn=lambda items: text_inputs(len(items)))
            return digests_of(model, loader)

        texts = [f"text {index}" for index in range(9)]
        assert digests(texts, range(9)) == digests(texts, [0] * 9)
        assert not set(digests(texts, range(9))) & set(digests(list(map(str.upper, texts)), range(9)))
        labels = DataLoader([{"label": index} for index in range(9)], batch_size=4)
        assert len(set(digests_of(model, labels))) == 9
        pairs = TensorDataset(torch.arange(9), torch.arange(9) % 3)
        assert len(set(digests_of(model, DataLoader(pairs, batch_size=4)))) == 9


class TextAndPicture:
    """A model as far as the digests know it."""

    def forward(self, input_ids, attention_mask, pixel_values): ...


class TestCombinedDigest:
    def test_depends_on_the_examples_and_not_on_their_order_or_batches(self, model):
        examples = as_examples(bert_sequence_classification(11)[1])

        def combined(data):
            return combined_digest(item_digests(loader_of(model, data), model))

        digest = combined(examples)
        assert len(digest) == 64
        assert combined(examples[::-1]) == combined(cut(examples)) == combined(cut(examples[::-1])) == digest
        others = [examples[1:], [*examples, examples[0]], [*examples[:-1], examples[0]]]
        assert len({digest, *map(combined, others)}) == 4

    def test_of_nothing_is_a_digest(self):
        assert len(combined_digest([])) == 64


# --- parts ----------------------------------------------------------------------------------------------------------


def numbered(model, numbers=range(20)):
    """A loader of examples whose only word is a number."""
    return loader_of(model, [{"input_ids": [number], "labels": index % 3} for index, number in enumerate(numbers)])


def split(loader, model, *arguments, **options):
    return split_holdout(loader, item_digests(loader, model), *arguments, **options)


def words(loader):
    return [word for batch in loader for word in batch["input_ids"].flatten().tolist()]


class TestSplitHoldout:
    @pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 0.9])
    def test_is_disjoint_and_exhaustive(self, fraction, model):
        for seed in range(5):
            rest, held_out = split(numbered(model), model, seed, fraction)
            assert sorted(rest + held_out) == list(range(20))
            assert (rest, held_out) == (sorted(rest), sorted(held_out))

    @pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
    def test_takes_what_is_held_out_out_of_the_rest_however_often_it_is_there(self, fraction, model):
        removed = 0
        numbers = [index % 13 + 5 for index in range(30)]
        for seed in range(10):
            rest, held_out = split(numbered(model, numbers), model, seed, fraction)
            assert len(held_out) == max(1, int(30 * fraction))
            contents = {numbers[index] for index in held_out}
            assert rest == [i for i in range(30) if i not in held_out and numbers[i] not in contents]
            removed += 30 - len(rest) - len(held_out)
        assert removed > 0

    def test_takes_a_batch_out_if_any_of_its_examples_is_held_out(self, model):
        batches = [
            {"input_ids": torch.tensor([[i + 10], [(i + 1) % 8 + 10]]), "labels": torch.tensor([0, 1])}
            for i in range(8)
        ]  # each shares an example with the next one, in a ring
        loader = loader_of(model, batches)
        for seed in range(5):
            rest, (held_out,) = split(loader, model, seed, 0.125)
            assert rest == [i for i in range(8) if (i - held_out) % 8 not in (0, 1, 7)]

    @pytest.mark.parametrize(("count", "held_out"), [(8, 1), (10, 2), (20, 4), (23, 4)])
    def test_holds_out_a_fifth_rounded_down(self, count, held_out, model):
        assert held_out == int(count * HOLDOUT_FRACTION)
        rest, chosen = split(numbered(model, range(count)), model, 0)
        assert (len(rest), len(chosen)) == (count - held_out, held_out)

    def test_is_the_same_for_the_same_seed_whatever_came_before(self, model):
        first = split(numbered(model), model, 3)
        torch.manual_seed(99)
        assert split(numbered(model), model, 3) == first

    def test_differs_between_seeds(self, model):
        assert len({tuple(split(numbered(model), model, seed)[1]) for seed in range(5)}) > 1

    def test_is_a_random_choice_rather_than_one_end(self, model):
        held_out = [split(numbered(model), model, seed)[1] for seed in range(5)]
        assert any(part not in ([0, 1, 2, 3], [16, 17, 18, 19]) for part in held_out)

    def test_leaves_the_random_state_alone(self, model):
        loader = numbered(model)
        before = torch.get_rng_state()
        split(loader, model, 0)
        assert torch.equal(torch.get_rng_state(), before)

    def test_gives_parts_that_keep_batch_size_and_collator(self, model):
        loader = numbered(model)
        rest, held_out = (subset(loader, part) for part in split(loader, model, 0))
        assert [len(b["labels"]) for b in rest] == [3, 3, 3, 3, 3, 1]
        assert [len(b["labels"]) for b in held_out] == [3, 1]

    @pytest.mark.parametrize("kind", KINDS)
    def test_splits_every_kind_of_data(self, kind, model):
        examples = as_examples(bert_sequence_classification(22)[1])
        loader = make_dataloader(KINDS[kind](examples), model, batch_size=BATCH_SIZE)
        parts = [subset(loader, part) for part in split(loader, model, 0)]
        found = [example for part in parts for batch in part for example in as_examples(batch)]
        assert all(len(list(part)) for part in parts)
        assert sorted(map(str, found)) == sorted(map(str, examples))

    @pytest.mark.parametrize("kind", EXAMPLE_KINDS)
    def test_finds_the_same_parts_in_every_kind_of_examples(self, kind, model):
        examples = as_examples(bert_sequence_classification(22)[1])
        loaders = [make_dataloader(k(examples), model, batch_size=4) for k in (EXAMPLE_KINDS[kind], list)]
        assert split(loaders[0], model, 5) == split(loaders[1], model, 5)

    def test_splits_whole_batches(self, model):
        batches = split_batch(bert_sequence_classification(11)[1], 2)
        loader = loader_of(model, batches)
        rest, held_out = split(loader, model, 0)
        assert (len(rest), len(held_out)) == (5, 1)
        (chosen,) = subset(loader, held_out)
        assert chosen is batches[held_out[0]]

    def test_of_a_torch_tensor_dataset_in_a_loader_works(self, model):
        data = TensorDataset(torch.arange(10)[:, None])
        loader = DataLoader(
            data, batch_size=4, collate_fn=lambda items: {"input_ids": torch.stack([i[0] for i in items])}
        )
        loader = loader_of(model, loader)
        parts = [subset(loader, part) for part in split(loader, model, 0)]
        assert sorted(word for part in parts for word in words(part)) == list(range(10))

    def test_that_leaves_nothing_says_what_it_was_for(self, model):
        loader = numbered(model, [7] * 9)
        text = r"calib_dataset: 9 items \(examples, or ready-made batches\) are too few to hold some out for "
        with pytest.raises(DataError, match=text + r"verification; pass eval_dataset, or more data\.$"):
            split(loader, model, 0)
        with pytest.raises(DataError, match=text + r"a test\.$"):
            split(loader, model, 0, shortage="a test")

    def test_of_two_batches_leaves_one(self, model):
        loader = loader_of(model, split_batch(bert_sequence_classification(8)[1], 4))
        assert split(loader, model, 0) in (([0], [1]), ([1], [0]))

    def test_of_one_batch_leaves_nothing(self, model):
        batch = bert_sequence_classification(11)[1]
        with pytest.raises(DataError, match=r"1 items .* are too few to hold some out"):
            split(loader_of(model, [batch]), model, 0)


class TestWithout:
    @pytest.fixture
    def warnings(self, monkeypatch):
        said = []
        monkeypatch.setattr(
            "hf_lossless_lr.data.splits.logger.warning", lambda text, *values: said.append(text % values)
        )
        return said

    @staticmethod
    def cleaned(model, calibration, evaluation):
        """The words that are left of the calibration data, after a check that the digests are theirs."""
        loader, other = numbered(model, calibration), numbered(model, evaluation)
        left, digests = without(loader, item_digests(loader, model), item_digests(other, model))
        assert digests == item_digests(left, model)
        return words(left)

    def test_leaves_disjoint_data_alone(self, model, warnings):
        loader, other = numbered(model), numbered(model, range(20, 29))
        digests = item_digests(loader, model)
        left, left_digests = without(loader, digests, item_digests(other, model))
        assert left is loader
        assert left_digests is digests
        assert warnings == []

    @pytest.mark.parametrize("common", [(7,), (0, 9), (1, 3, 5, 8)])
    def test_takes_out_what_is_in_both_with_a_warning(self, common, model, warnings):
        assert self.cleaned(model, range(10), [*range(50, 60), *common]) == [i for i in range(10) if i not in common]
        assert warnings == [
            f"{len(common)} calibration items are in eval_dataset, too; they are left out of the calibration."
        ]

    def test_takes_out_each_copy(self, model, warnings):
        assert self.cleaned(model, [1, 2, 3, 1, 4, 5, 1, 6], [1, *range(50, 60)]) == [2, 3, 4, 5, 6]
        assert warnings[0].startswith("3 calibration items")

    def test_keeps_what_is_twice_in_the_calibration_alone(self, model, warnings):
        assert self.cleaned(model, [1, 2, 1, 2, 3, 4, 5, 6], range(50, 60)) == [1, 2, 1, 2, 3, 4, 5, 6]
        assert warnings == []

    @pytest.mark.parametrize(("common", "count"), [(5, 10), (6, 11), (9, 10), (8, 8)])
    def test_of_half_or_more_in_both_is_an_error_with_the_counts(self, common, count, model, warnings):
        text = f"calib_dataset and eval_dataset overlap: {common} of {count} calibration items are in both. A model "
        with pytest.raises(DataError, match=text + "must be judged on examples that had no part in making it; pass"):
            self.cleaned(model, range(count), [*range(common), *range(50, 60)])
        assert warnings == []

    def test_takes_out_a_batch_if_any_of_its_examples_is_in_both(self, model, warnings):
        batch = bert_sequence_classification(12)[1]
        examples = as_examples(batch)
        loader = loader_of(model, split_batch(batch, 4))
        others = as_examples(bert_sequence_classification(9, seed=1)[1])
        evaluation = loader_of(model, [*others, examples[6]])
        left, digests = without(loader, item_digests(loader, model), item_digests(evaluation, model))
        assert [part["input_ids"].tolist() for part in left] == [
            part["input_ids"].tolist() for part in (split_batch(batch, 4)[index] for index in (0, 2))
        ]
        assert [len(item) for item in digests] == [4, 4]
        assert warnings[0].startswith("1 calibration items")
