"""From every accepted kind of data to the same deterministic batches."""

import random

import datasets
import numpy as np
import pytest
import torch
from support.example_data import BATCH_SIZE, EXAMPLE_KINDS, KINDS, ListDataset, StreamDataset, as_loader, collate, cut
from support.processes import accelerator, in_two_processes, needs_processes
from support.tiny_models import IGNORED, as_examples, bert_masked_lm, bert_sequence_classification, split_batch
from support.word_tokenizer import word_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler
from transformers import (
    BatchEncoding,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerFast,
)

from hf_lossless_lr.data.loaders import MIN_EXAMPLES, make_dataloader
from hf_lossless_lr.errors import DataError

COUNT = 11
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

    @pytest.mark.parametrize(
        "sampler",
        [
            [1, 2, 5, 7, 8, 9, 10, 3],
            SubsetRandomSampler([10, 9, 8, 7, 5, 3, 2, 1]),
            WeightedRandomSampler([0, 1, 1, 1, 0, 1, 0, 1, 1, 1, 1], 8, replacement=False),
        ],
        ids=["list", "subset", "weighted"],
    )
    def test_takes_only_what_the_sampler_of_a_loader_draws(self, sampler, model, examples):
        """Two samplers of one dataset are its usual split; the examples of the other part stay out."""
        loader = as_loader(examples, batch_size=BATCH_SIZE, sampler=sampler)
        part = [examples[index] for index in (1, 2, 3, 5, 7, 8, 9, 10)]
        check_same(make_dataloader(loader, model, batch_size=1), cut(part))

    def test_takes_what_a_sampler_draws_repeatedly_once(self, model, examples):
        loader = as_loader(examples, batch_size=BATCH_SIZE, sampler=[*range(8), *range(8), 0])
        check_same(make_dataloader(loader, model, batch_size=1), cut(examples[:8]))

    def test_takes_the_shares_of_all_processes(self, model, batch, examples):
        sampler = DistributedSampler(examples, num_replicas=2, rank=1)
        loader = as_loader(examples, batch_size=BATCH_SIZE, sampler=sampler)
        check_same(make_dataloader(loader, model, batch_size=1), split_batch(batch, BATCH_SIZE))

    def test_keeps_the_batch_size_and_the_collator_of_a_loader(self, model, examples):
        calls = []

        def own(items):
            calls.append(len(items))
            return collate(items)

        loader = DataLoader(ListDataset(examples), batch_size=5, collate_fn=own, drop_last=True)
        made = make_dataloader(loader, model, batch_size=2)
        calls.clear()
        assert len(list(made)) == 3
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


def unmasked(count=COUNT):
    model, batch = bert_masked_lm(count)
    return model, [{k: v for k, v in example.items() if k != "labels"} for example in as_examples(batch)]


def masking(**options):
    return DataCollatorForLanguageModeling(word_tokenizer(), mlm_probability=0.4, **options)


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


DRAWS = {"torch": lambda: torch.rand(()), "numpy": np.random.random, "python": random.random}
RANDOM_LOADERS = {
    "subset": {"sampler": SubsetRandomSampler(range(9))},
    "replacement": {"sampler": WeightedRandomSampler([1.0] * 40, 30)},
    "batches": {"batch_sampler": torch.utils.data.BatchSampler(RandomSampler(range(40)), BATCH_SIZE, drop_last=True)},
}


def made_in_one_process():
    model, examples = unmasked(40)
    made = {"masks": make_dataloader(examples, model, batch_size=BATCH_SIZE, data_collator=masking())}
    for name, options in RANDOM_LOADERS.items():
        kinds = {"batch_size": BATCH_SIZE, **options} if "sampler" in options else options
        made[name] = make_dataloader(DataLoader(examples, collate_fn=masking(), **kinds), model, batch_size=1)
    return made


def save_own_share(folder, rank):
    torch.manual_seed(rank)
    process = accelerator()
    shares = {name: [dict(b) for b in process.prepare(loader)] for name, loader in made_in_one_process().items()}
    torch.save(shares, folder / f"{rank}.pt")


class TestRandomNumbers:
    def test_of_a_collator_are_the_same_each_time(self):
        model, examples = unmasked()
        loader = make_dataloader(examples, model, batch_size=BATCH_SIZE, data_collator=masking())
        batches = list(loader)
        assert all((b["labels"] != IGNORED).any() for b in batches)
        assert not torch.equal(batches[0]["labels"] == IGNORED, batches[1]["labels"] == IGNORED)
        torch.manual_seed(1)
        check_same(loader, batches)
        check_same(make_dataloader(examples, model, batch_size=BATCH_SIZE, data_collator=masking()), batches)

    @pytest.mark.parametrize("generator", DRAWS)
    def test_may_come_from_any_global_generator(self, generator, model, examples):
        def noisy(items):
            return {**collate(items), "labels": torch.tensor([float(DRAWS[generator]()) for _ in items])}

        loader = as_loader(examples, batch_size=BATCH_SIZE)
        for made in (
            make_dataloader(examples, model, batch_size=BATCH_SIZE, data_collator=noisy),
            make_dataloader(DataLoader(loader.dataset, BATCH_SIZE, collate_fn=noisy), model, batch_size=1),
        ):
            labels = torch.cat([b["labels"] for b in made])
            assert torch.equal(torch.cat([b["labels"] for b in made]), labels)
            assert len(labels.unique()) == COUNT

    def test_of_the_user_stay_as_they_were(self):
        before = states()
        for loader in made_in_one_process().values():
            list(loader)
        assert states() == before

    @needs_processes
    def test_are_the_same_in_each_process(self, tmp_path):
        in_two_processes(save_own_share, tmp_path)
        shares = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
        for name, loader in made_in_one_process().items():
            expected = list(loader)
            assert len(expected) > 2
            for rank in (0, 1):
                check_same(shares[rank][name], expected[rank::2])

    def test_of_a_generator_of_its_own_are_refused(self):
        model, examples = unmasked()
        with pytest.raises(
            DataError, match=r"eval_dataset: its first batch is another one each time.*leave out its seed"
        ):
            make_dataloader(examples, model, batch_size=BATCH_SIZE, data_collator=masking(seed=0), name="eval_dataset")

    def test_of_a_dataset_are_refused(self, model, examples):
        def change(batch):
            return {**batch, "input_ids": [random.sample(row, len(row)) for row in batch["input_ids"]]}

        data = datasets.Dataset.from_list(examples).with_transform(change)
        with pytest.raises(DataError, match=r"another one each time.*use the one for evaluation"):
            make_dataloader(data, model, batch_size=BATCH_SIZE)


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

    def test_of_text_beside_labels(self, model):
        data = [{"sentence": "some words", "label": i % 2} for i in range(COUNT)]
        with pytest.raises(DataError, match="has the columns sentence, label, none of which BertForSequenceClassific"):
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


def test_examples_that_later_cannot_be_joined_are_an_error_of_ours(model):
    """The first batch happens to be of one length."""
    examples = [{"input_ids": [5] * length, "labels": 0} for length in (6, 6, 6, 6, 6, 6, 6, 5)]
    loader = make_dataloader(examples, model, batch_size=4)
    assert len(next(iter(loader))["input_ids"]) == 4
    with pytest.raises(DataError, match=r"cannot be joined into a batch: ValueError.*pass processing_class"):
        list(loader)
