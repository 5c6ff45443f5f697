"""From every accepted kind of data to the same deterministic batches."""

import datasets
import pytest
import torch
from example_data import ListDataset, StreamDataset, collate
from tiny_models import IGNORED, as_examples, bert_sequence_classification, split_batch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, TensorDataset
from transformers import BatchEncoding, DataCollatorForTokenClassification, PreTrainedTokenizerFast

from hf_lossless_lr.batches import HOLDOUT_FRACTION, MIN_EXAMPLES, make_dataloader, split_holdout
from hf_lossless_lr.errors import DataError

COUNT, BATCH_SIZE = 11, 4
SIZES = [4, 4, 3]


@pytest.fixture(scope="module")
def model():
    return bert_sequence_classification()[0]


@pytest.fixture(scope="module")
def batch():
    return bert_sequence_classification(COUNT)[1]


@pytest.fixture(scope="module")
def examples(batch):
    return as_examples(batch)


@pytest.fixture(scope="module")
def tokenizer():
    inner = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


def cut(examples):
    return [collate(examples[start : start + BATCH_SIZE]) for start in range(0, len(examples), BATCH_SIZE)]


def as_loader(examples, **options):
    return DataLoader(ListDataset(examples), collate_fn=collate, **options)


# each takes the list of examples and gives the same data in another form
EXAMPLE_KINDS = {
    "datasets.Dataset": datasets.Dataset.from_list,
    "datasets.Dataset of tensors": lambda examples: datasets.Dataset.from_list(examples).with_format("torch"),
    "datasets.IterableDataset": lambda examples: datasets.Dataset.from_list(examples).to_iterable_dataset(),
    "torch Dataset": ListDataset,
    "torch IterableDataset": StreamDataset,
    "list of examples": list,
    "tuple of examples": tuple,
    "list of examples of tensors": lambda examples: list(datasets.Dataset.from_list(examples).with_format("torch")),
}
BATCH_KINDS = {
    "DataLoader": lambda examples: as_loader(examples, batch_size=BATCH_SIZE),
    "DataLoader with a batch sampler": lambda examples: as_loader(
        examples,
        batch_sampler=torch.utils.data.BatchSampler(SequentialSampler(examples), BATCH_SIZE, drop_last=False),
    ),
    "DataLoader of an IterableDataset": lambda examples: DataLoader(
        StreamDataset(examples), batch_size=BATCH_SIZE, collate_fn=collate
    ),
    "DataLoader of ready batches": lambda examples: DataLoader(ListDataset(cut(examples)), batch_size=None),
    "list of batches": cut,
    "generator of batches": lambda examples: (batch for batch in cut(examples)),
    "list of BatchEncoding": lambda examples: [BatchEncoding(batch) for batch in cut(examples)],
}
KINDS = EXAMPLE_KINDS | BATCH_KINDS


def check_same(batches, expected):
    batches = list(batches)
    assert len(batches) == len(expected)
    for got, wanted in zip(batches, expected, strict=True):
        assert set(got) == set(wanted)
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)


class TestMakeDataloader:
    @pytest.mark.parametrize("kind", KINDS)
    def test_gives_the_same_batches_for_every_kind_of_data(self, kind, model, batch, examples):
        loader = make_dataloader(KINDS[kind](examples), model, batch_size=BATCH_SIZE)
        assert isinstance(loader, DataLoader)
        check_same(loader, split_batch(batch, BATCH_SIZE))

    @pytest.mark.parametrize("kind", KINDS)
    def test_gives_them_again_each_time(self, kind, model, batch, examples):
        loader = make_dataloader(KINDS[kind](examples), model, batch_size=BATCH_SIZE)
        assert len(list(loader)) == len(SIZES)
        check_same(loader, split_batch(batch, BATCH_SIZE))

    @pytest.mark.parametrize("options", [{"shuffle": True}, {"sampler": "random"}], ids=["shuffle", "sampler"])
    def test_takes_the_shuffling_out_of_a_loader(self, options, model, batch, examples):
        if "sampler" in options:
            options = {"sampler": RandomSampler(examples)}
        shuffling = as_loader(examples, batch_size=BATCH_SIZE, **options)
        check_same(make_dataloader(shuffling, model, batch_size=1), split_batch(batch, BATCH_SIZE))

    def test_keeps_the_batch_size_and_the_collator_of_a_loader(self, model, examples):
        calls = []

        def own(items):
            calls.append(len(items))
            return collate(items)

        loader = DataLoader(ListDataset(examples), batch_size=5, collate_fn=own, drop_last=True)
        assert len(list(make_dataloader(loader, model, batch_size=2))) == 3
        assert calls == [5, 5, 1]

    @pytest.mark.parametrize("kind", EXAMPLE_KINDS)
    def test_drops_the_columns_that_the_model_does_not_take(self, kind, model, batch, examples):
        wide = [{"text": "some words", "idx": i, **example} for i, example in enumerate(examples)]
        loader = make_dataloader(EXAMPLE_KINDS[kind](wide), model, batch_size=BATCH_SIZE)
        check_same(loader, split_batch(batch, BATCH_SIZE))

    def test_drops_a_column_of_nones(self, model, batch, examples, tokenizer):
        data = [{"token_type_ids": None, **example} for example in examples]
        for options in ({}, {"processing_class": tokenizer}):
            loader = make_dataloader(data, model, batch_size=COUNT, **options)
            check_same(loader, [batch])

    def test_takes_a_column_called_label(self, model, batch, examples):
        data = [{("label" if k == "labels" else k): v for k, v in example.items()} for example in examples]
        check_same(make_dataloader(data, model, batch_size=BATCH_SIZE), split_batch(batch, BATCH_SIZE))

    def test_pads_with_the_tokenizer(self, model, batch, examples, tokenizer):
        ragged = [
            {"input_ids": e["input_ids"][: sum(e["attention_mask"])], "labels": e["labels"]}
            for e in sorted(examples, key=lambda e: sum(e["attention_mask"]))
        ]
        for example in ragged:
            example["attention_mask"] = [1] * len(example["input_ids"])
        loader = make_dataloader(ragged, model, batch_size=BATCH_SIZE, processing_class=tokenizer)
        batches = list(loader)
        assert [len(b["labels"]) for b in batches] == SIZES
        for index, got in enumerate(batches):
            part = ragged[index * BATCH_SIZE : (index + 1) * BATCH_SIZE]
            assert got["input_ids"].shape[1] == max(len(e["input_ids"]) for e in part)
            assert [row[row != 0].tolist() for row in got["input_ids"]] == [e["input_ids"] for e in part]
            assert got["attention_mask"].sum(1).tolist() == [len(e["input_ids"]) for e in part]
        assert len({b["input_ids"].shape[1] for b in batches}) > 1

    def test_prefers_the_given_collator_to_the_tokenizer(self, model, examples, tokenizer):
        ragged = [{"input_ids": e["input_ids"][:n], "labels": e["input_ids"][:n]} for n, e in enumerate(examples, 2)]
        loader = make_dataloader(
            ragged,
            model,
            batch_size=BATCH_SIZE,
            data_collator=DataCollatorForTokenClassification(tokenizer),
            processing_class=tokenizer,
        )
        assert next(iter(loader))["labels"][0].tolist()[2:] == [IGNORED] * 3

    def test_runs_through_the_model(self, model, examples):
        data = datasets.Dataset.from_list([{"text": "words", **example} for example in examples])
        for got in make_dataloader(data, model, batch_size=BATCH_SIZE):
            assert torch.isfinite(model(**got).loss)


class TestRefusal:
    @pytest.mark.parametrize("kind", [k for k in EXAMPLE_KINDS if "tensors" not in k])
    def test_of_text_that_is_not_tokenized(self, kind, model):
        data = EXAMPLE_KINDS[kind]([{"sentence": "some words", "idx": i} for i in range(COUNT)])
        with pytest.raises(
            DataError,
            match="calib_dataset: has the columns sentence, idx, none of which BertForSequenceClassification takes.*"
            r"dataset\.map",
        ):
            make_dataloader(data, model, batch_size=BATCH_SIZE)

    @pytest.mark.parametrize("kind", KINDS)
    def test_of_too_few_examples(self, kind, model, examples):
        count = MIN_EXAMPLES - 1
        with pytest.raises(DataError, match=f"has {count} examples; at least {MIN_EXAMPLES} are needed"):
            make_dataloader(KINDS[kind](examples[:count]), model, batch_size=BATCH_SIZE)

    @pytest.mark.parametrize("kind", KINDS)
    def test_does_not_meet_the_smallest_set(self, kind, model, examples):
        loader = make_dataloader(KINDS[kind](examples[:MIN_EXAMPLES]), model, batch_size=BATCH_SIZE)
        assert sum(len(b["labels"]) for b in loader) == MIN_EXAMPLES

    @pytest.mark.parametrize(
        "empty",
        [[], (), iter([]), ListDataset([]), StreamDataset([]), datasets.Dataset.from_list([]), DataLoader([])],
        ids=["list", "tuple", "iterator", "Dataset", "IterableDataset", "datasets.Dataset", "DataLoader"],
    )
    def test_of_nothing(self, empty, model):
        with pytest.raises(DataError, match="eval_dataset: is empty"):
            make_dataloader(empty, model, batch_size=BATCH_SIZE, name="eval_dataset")

    @pytest.mark.parametrize(
        ("data", "kind"),
        [
            ("sst2", "str"),
            (7, "int"),
            (None, "NoneType"),
            ({"input_ids": torch.zeros(9, 3)}, "dict"),
            (BatchEncoding({"input_ids": torch.zeros(9, 3)}), "BatchEncoding"),
        ],
    )
    def test_of_another_type(self, data, kind, model):
        with pytest.raises(DataError, match=f"calib_dataset: expected a Dataset, .*, got {kind}"):
            make_dataloader(data, model, batch_size=BATCH_SIZE)

    def test_of_one_whole_datasetdict(self, model, examples):
        data = datasets.DatasetDict({"train": datasets.Dataset.from_list(examples)})
        with pytest.raises(DataError, match="got DatasetDict"):
            make_dataloader(data, model, batch_size=BATCH_SIZE)

    @pytest.mark.parametrize(
        ("bad", "kind"), [(torch.zeros(4, 9), "Tensor"), (["a"], "list"), ({"input_ids": [[1, 2]]}, "dict")]
    )
    def test_of_a_batch_that_maps_no_names_to_tensors(self, bad, kind, model, examples):
        with pytest.raises(DataError, match=f"batch 1 is a {kind}; each batch must map"):
            make_dataloader([collate(examples), bad], model, batch_size=BATCH_SIZE)

    def test_does_not_meet_batches_that_hold_more_than_tensors(self, model, examples):
        batches = iter([{"return_dict": True, **collate(examples)}])
        loader = make_dataloader(batches, model, batch_size=BATCH_SIZE)
        assert next(iter(loader))["return_dict"] is True


class TestSplitHoldout:
    def numbered(self, model, count=20):
        """A loader of examples whose only word is their number."""
        data = [{"input_ids": [index], "labels": 0} for index in range(count)]
        return make_dataloader(data, model, batch_size=3)

    def words(self, loader):
        return [word for batch in loader for word in batch["input_ids"].flatten().tolist()]

    def test_is_disjoint_and_exhaustive(self, model):
        for seed in range(5):
            calibration, evaluation = map(self.words, split_holdout(self.numbered(model), seed))
            assert sorted(calibration + evaluation) == list(range(20))

    @pytest.mark.parametrize(("count", "held_out"), [(8, 1), (10, 2), (20, 4), (23, 4)])
    def test_holds_out_a_fifth_rounded_down(self, count, held_out, model):
        assert held_out == int(count * HOLDOUT_FRACTION)
        calibration, evaluation = split_holdout(self.numbered(model, count), 0)
        assert (len(self.words(calibration)), len(self.words(evaluation))) == (count - held_out, held_out)

    def test_is_the_same_for_the_same_seed_whatever_came_before(self, model):
        first = list(map(self.words, split_holdout(self.numbered(model), 3)))
        torch.manual_seed(99)
        assert list(map(self.words, split_holdout(self.numbered(model), 3))) == first

    def test_differs_between_seeds(self, model):
        assert len({tuple(self.words(split_holdout(self.numbered(model), seed)[1])) for seed in range(5)}) > 1

    def test_is_a_random_choice_rather_than_one_end(self, model):
        held_out = [self.words(split_holdout(self.numbered(model), seed)[1]) for seed in range(5)]
        assert any(words not in ([0, 1, 2, 3], [16, 17, 18, 19]) for words in held_out)

    def test_leaves_the_random_state_alone(self, model):
        loader = self.numbered(model)
        before = torch.get_rng_state()
        split_holdout(loader, 0)
        assert torch.equal(torch.get_rng_state(), before)

    def test_keeps_batch_size_and_collator(self, model):
        calibration, evaluation = split_holdout(self.numbered(model), 0)
        assert [len(b["labels"]) for b in calibration] == [3, 3, 3, 3, 3, 1]
        assert [len(b["labels"]) for b in evaluation] == [3, 1]

    @pytest.mark.parametrize("kind", KINDS)
    def test_splits_every_kind_of_data(self, kind, model, examples):
        loader = make_dataloader(KINDS[kind](examples * 2), model, batch_size=BATCH_SIZE)
        parts = split_holdout(loader, 0)
        split = [example for part in parts for batch in part for example in as_examples(batch)]
        assert all(len(list(part)) for part in parts)
        assert sorted(map(str, split)) == sorted(map(str, examples * 2))

    def test_splits_whole_batches(self, model, batch):
        batches = split_batch(batch, 2)
        calibration, evaluation = split_holdout(make_dataloader(batches, model, batch_size=1), 0)
        assert (len(list(calibration)), len(list(evaluation))) == (5, 1)
        numbers = [
            next(i for i, b in enumerate(batches) if b is got) for part in (calibration, evaluation) for got in part
        ]
        assert sorted(numbers) == list(range(6))

    def test_of_a_torch_tensor_dataset_in_a_loader_works(self, model):
        data = TensorDataset(torch.arange(10)[:, None])
        loader = DataLoader(
            data, batch_size=4, collate_fn=lambda items: {"input_ids": torch.stack([i[0] for i in items])}
        )
        parts = split_holdout(make_dataloader(loader, model, batch_size=1), 0)
        assert sorted(word for part in parts for word in self.words(part)) == list(range(10))
