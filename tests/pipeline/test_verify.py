"""`verify` judges any pair of models on the same examples."""

from copy import deepcopy

import pytest
import torch
from support.compressions import certifiable
from support.tiny_models import split_batch

from hf_lossless_lr import (
    CertificateError,
    ConfigurationError,
    DataError,
    LosslessLowRankConfig,
    LowRankCompressor,
    TargetError,
    verify,
)
from hf_lossless_lr.data.digests import combined_digest, item_digests
from hf_lossless_lr.data.loaders import make_dataloader
from hf_lossless_lr.data.splits import split_data

EXAMPLES = 300  # with 200, even no change at all leaves an upper bound above one point


@pytest.fixture(scope="module")
def pair():
    """A model that is right as often as it says, and batches of examples."""
    model, batch, _ = certifiable(EXAMPLES)
    return model, split_batch(batch, 20)


def disturbed(model, amount):
    other, generator = deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
    return other


class TestVerify:
    def test_finds_a_model_lossless_against_itself(self, pair):
        model, batches = pair
        certificate = verify(model, deepcopy(model), batches)
        assert certificate.status == "lossless"
        assert certificate.loss_increase.mean == certificate.accuracy_drop.mean == certificate.divergence == 0
        assert certificate.examples == EXAMPLES

    def test_finds_another_model_lossy(self, pair):
        model, batches = pair
        other = disturbed(model, 0.5)
        certificate = verify(model, other, batches)
        assert certificate.status == "lossy"
        with torch.no_grad():
            losses = [sum(m.eval()(**b).loss.item() for b in batches) / len(batches) for m in (model, other)]
        assert certificate.loss == pytest.approx(losses, rel=1e-5)

    def test_depends_on_the_margins(self, pair):
        model, batches = pair
        other = disturbed(model, 0.5)
        assert verify(model, other, batches, loss_margin=100.0, accuracy_margin=1.0).status == "lossless"

    @pytest.mark.parametrize(
        ("option", "value"),
        [("loss_margin", -1), ("accuracy_margin", 5), ("confidence", 0.2), ("batch_size", 0), ("labels", "modell")],
    )
    def test_refuses_values_that_cannot_be_used(self, pair, option, value):
        model, batches = pair
        with pytest.raises(ConfigurationError, match=f"{option}: "):
            verify(model, deepcopy(model), batches, **{option: value})

    def test_leaves_both_models_in_their_modes(self, pair):
        model, batches = pair
        other = deepcopy(model).train()
        verify(model.eval(), other, batches)
        assert other.training
        assert not model.training

    def test_refuses_data_that_the_model_was_made_from(self, pair):
        model, batches = pair
        loader = make_dataloader(batches, model, batch_size=1)
        used = [combined_digest(item_digests(loader, model))]
        with pytest.raises(CertificateError, match="made from"):
            verify(model, deepcopy(model), batches, used=used)
        assert verify(model, deepcopy(model), batches[:-1], used=used).status == "lossless"

    def test_refuses_the_data_that_calibrated_the_model_whole_and_in_parts(self, pair):
        model, batches = pair
        made_from, others = batches[:10], batches[10:]
        data = split_data(model, made_from, None, batch_size=32, seed=0, selection_fraction=0.25)
        used = {digest for part, digest in data.fingerprints.items() if part != "held_out"}
        for part in (made_from, made_from[::-1], list(data.calibration), list(data.selection)):
            with pytest.raises(CertificateError, match="made from"):
                verify(model, deepcopy(model), part, used=used)
        assert verify(model, deepcopy(model), others, used=used).examples == sum(len(b["labels"]) for b in others)

    def test_refuses_few_examples(self, pair):
        model, batches = pair
        with pytest.raises(CertificateError, match="20 examples are too few"):
            verify(model, deepcopy(model), batches[:1])

    def test_refuses_one_model_twice_and_what_is_no_model(self, pair):
        model, batches = pair
        with pytest.raises(TargetError, match="one model twice"):
            verify(model, model, batches)
        with pytest.raises(TargetError, match="takes two models, got str"):
            verify("folder", model, batches)

    def test_says_so_where_the_first_one_is_compressed_too(self, pair, caplog):
        model, batches = pair
        smaller = deepcopy(model)
        LowRankCompressor(LosslessLowRankConfig(refit=False)).compress(smaller, split_batch(certifiable()[1], 4))
        verify(model, smaller, batches)
        assert "itself compressed" not in caplog.text
        verify(smaller, model, batches)
        assert "the first model is itself compressed" in caplog.text

    def test_refuses_models_of_different_tasks(self, pair):
        model, batches = pair
        config = deepcopy(model.config)
        config.num_labels = model.config.num_labels + 1
        with pytest.raises(DataError, match="same questions"):
            verify(model, type(model)(config), batches)


def test_leaves_the_configurations_of_both_models(pair):
    model, batches = pair
    dense, other = deepcopy(model), deepcopy(model)
    for each in (dense, other):
        each.config.problem_type = None
    verify(dense, other, batches)
    assert dense.config.problem_type is other.config.problem_type is None
