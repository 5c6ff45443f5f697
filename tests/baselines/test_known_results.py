"""Results of an earlier run of a comparison: whose they are, and what they mean for the sizes that are missing."""

from itertools import cycle

import pytest
from support.tiny_models import as_examples, bert_sequence_classification, other_inputs, split_batch
from torch.utils.data import IterableDataset

from hf_lossless_lr.baselines import compare
from hf_lossless_lr.errors import ConfigurationError


@pytest.fixture(scope="module")
def run():
    model, batch = bert_sequence_classification(40)
    others = other_inputs(batch)

    def results(keep_ratios, known=(), labels=None):
        calibration = as_examples(batch if labels is None else {**batch, "labels": labels})
        options = {"methods": ["svd"], "keep_ratios": keep_ratios, "known": known, "rank_multiple": 1}
        return list(compare(model, calibration, eval_dataset=as_examples(others), **options))

    return results, batch["labels"]


def test_of_other_labels_are_refused(run):
    results, labels = run
    known = results([0.7])
    assert results([0.7], known) == []
    with pytest.raises(ConfigurationError, match="the known results are of another model, other data"):
        results([0.7], known, (labels + 1) % 3)


def test_of_a_smaller_size_leave_none_for_a_larger_one(run):
    """As in one run: the held-out data were used."""
    results, _ = run
    known = results([0.5])
    assert known[0].status != "none"
    assert [each.status for each in results([0.7, 0.5], known)] == ["none"]


def test_of_a_baseline_keep_what_they_kept_and_not_what_was_asked_for():
    """One that keeps more of the bytes than was asked for was judged before one that keeps less."""
    model, batch = bert_sequence_classification(40)
    options = {"methods": ["basis-sharing"], "size": "bytes", "eval_dataset": as_examples(other_inputs(batch))}
    data = as_examples(batch)
    whole = list(compare(model, data, keep_ratios=[0.6, 0.5], **options))
    resumed = list(compare(model, data, keep_ratios=[0.6, 0.5], known=whole[:1], **options))
    assert whole[0].bytes > 0.6
    assert resumed[0].status == whole[1].status


@pytest.mark.parametrize("stream", [lambda data: iter(split_batch(data, 4)), lambda data: Endless(as_examples(data))])
def test_data_that_are_read_once_serve_all_methods(stream):
    model, batch = bert_sequence_classification(40)
    options = {"methods": ["svd", "fwsvd"], "keep_ratios": [0.6], "max_examples": 24}
    found = compare(model, stream(batch), eval_dataset=as_examples(other_inputs(batch)), **options)
    assert [each.method for each in found] == ["svd", "fwsvd"]


class Endless(IterableDataset):
    def __init__(self, examples):
        self.examples = examples

    def __iter__(self):
        return cycle(self.examples)


def test_a_comparison_leaves_the_configuration(run):
    model, batch = bert_sequence_classification(40)
    before = dict(vars(model.config))
    data = as_examples(batch)
    list(compare(model, data, methods=["aciq-int8"], keep_ratios=[0.5], eval_dataset=as_examples(other_inputs(batch))))
    assert vars(model.config) == before
