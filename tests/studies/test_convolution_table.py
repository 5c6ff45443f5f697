"""The study of convolutional networks: what is kept of it is what the document shows and the project promises."""

import pytest
from support.studies import RESULTS, ROOT

# Network: loss increases at most, at 0.5 and 0.35 of the parameters.
LARGEST = {
    "cnn-resnet": (0.004, 0.012),
    "cnn-vgg_bn": (0.007, 0.014),
    "cnn-regnet": (0.009, 0.024),
    "cnn-inception": (0.018, 0.050),
    "cnn-densenet": (0.016, 0.038),
}


@pytest.fixture
def records(study):
    return study("records").read_records(RESULTS / "convolutional_networks.jsonl")


def test_the_tables_of_the_document_are_those_of_the_records(study, records):
    documented = (ROOT / "docs" / "convolutions.md").read_text(encoding="utf-8").splitlines()
    assert [row for record in records if (row := study("convolutional_networks").row(record)) not in documented] == []


@pytest.mark.parametrize("network", LARGEST)
def test_sizes_cost_as_little_as_promised(records, network):
    found = {record["method"]: record for record in records if record["network"] == network}
    dense = found["original"]["loss"]
    for method, largest in zip(("ours, keep 0.5", "ours, keep 0.35"), LARGEST[network], strict=True):
        share, (lower, upper) = float(method.rpartition(" ")[2]), found[method]["loss_bounds"]
        assert found[method]["keep_ratio"] <= share
        assert lower < found[method]["loss"] - dense < upper
        assert lower <= largest, method  # with 95 % confidence, it is not more than that


@pytest.mark.parametrize("network", LARGEST)
def test_the_published_method_is_far_behind_at_the_same_size(records, network):
    found = {record["method"]: record for record in records if record["network"] == network}
    dense = found["original"]["loss"]
    ours, svd = (found[f"{name}, the paper's drop"]["loss"] - dense for name in ("ours", "SVD"))
    assert ours < max(0.5 * svd, 0.001)


@pytest.mark.parametrize("network", LARGEST)
def test_a_budget_of_time_is_never_exceeded(records, network):
    found = next(r for r in records if (r["network"], r["method"]) == (network, "ours, 0.9 of the time"))
    assert "impossible" in found or found["time_ratio"] < 1.05  # the rest is the noise of another measurement
