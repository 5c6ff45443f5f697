"""Results of an earlier run of a comparison: whose they are, and what they mean for the sizes that are missing."""

import pytest
from support.tiny_models import as_examples, bert_sequence_classification, other_inputs

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
