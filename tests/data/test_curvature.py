"""Directions whose second moment is the Hessian of a loss by its logits, against that Hessian."""

from itertools import product

import pytest
import torch
from support.mixtures import mixture, words
from support.processes import accelerator, loader_of
from support.tiny_models import TINY_MODELS
from support.tolerances import ROUNDING
from torch.nn import functional as F

from hf_lossless_lr.data import curvature
from hf_lossless_lr.data.curvature import gauss_newton_directions
from hf_lossless_lr.data.forward import forward_loss
from hf_lossless_lr.layers.targets import find_targets
from hf_lossless_lr.statistics.collect import collect_statistics

pytestmark = pytest.mark.numerical

COUNT = 5


def random(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def second_moment(direction, logits):
    """The mean over all patterns of signs, which is what random ones have in expectation."""
    patterns = [torch.tensor(signs, dtype=logits.dtype) for signs in product((-1, 1), repeat=logits.shape[-1])]
    rows = torch.stack([direction(logits[None], signs[None])[0] for signs in patterns])
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("classes", [2, 3, 6])
@pytest.mark.parametrize("seed", range(3))
def test_of_classes_have_the_hessian_of_the_cross_entropy(classes, seed):
    logits = 3 * random(seed, classes)
    label = torch.tensor(seed % classes)
    hessian = torch.autograd.functional.hessian(lambda z: F.cross_entropy(z[None], label[None]), logits)
    torch.testing.assert_close(second_moment(curvature._of_classes, logits), hessian, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("loss", [F.mse_loss, F.binary_cross_entropy_with_logits])
@pytest.mark.parametrize("count", [1, 4])
def test_of_numbers_have_the_hessian_of_their_loss(loss, count):
    logits, labels = random(0, COUNT, count), random(1, COUNT, count).sigmoid()
    direction = curvature._of_numbers(loss(logits, labels), logits, labels)
    hessian = torch.autograd.functional.hessian(lambda z: loss(z, labels[0]), logits[0])
    torch.testing.assert_close(second_moment(direction, logits[0]), hessian, rtol=ROUNDING, atol=ROUNDING)


def test_of_numbers_are_unknown_where_the_loss_is_another_one():
    logits, labels = random(0, COUNT, 3), random(1, COUNT, 3)
    assert curvature._of_numbers(F.l1_loss(logits, labels), logits, labels) is None
    assert curvature._of_numbers(F.mse_loss(logits, labels), logits[:, :2], labels) is None


def moments(model, batch):
    targets = find_targets(model).chosen
    return collect_statistics(model, targets, loader_of([batch]), accelerator()).layers


def test_what_the_labels_are_makes_no_difference():
    model, batch = TINY_MODELS["bert-sequence-classification"](COUNT)
    others = {**batch, "labels": (batch["labels"] + 1) % model.config.num_labels}
    one, other = (moments(model, each) for each in (batch, others))
    for name, layer in one.items():
        torch.testing.assert_close(layer.grad_covariance, other[name].grad_covariance, rtol=0, atol=0)


def test_their_gradients_have_the_gauss_newton_matrix_on_average(monkeypatch):
    model, batch = TINY_MODELS["bert-sequence-classification"](COUNT)
    name = "bert.encoder.layer.1.output.dense"
    layer, kept = model.get_submodule(name), {}

    def logits_of(output):
        hook = layer.register_forward_hook(lambda *_: output)
        try:
            return model(**batch).logits
        finally:
            hook.remove()

    hook = layer.register_forward_hook(lambda module, args, output: kept.update(output=output.detach()))
    p = model(**batch).logits.detach().softmax(-1)
    hook.remove()
    # shape: (examples, classes, examples, tokens, out)
    jacobian = torch.autograd.functional.jacobian(logits_of, kept["output"])
    own = torch.stack([jacobian[n, :, n] for n in range(COUNT)])
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    real = batch["attention_mask"].float()
    expected = torch.einsum("ncto,ncd,ndtp,nt->op", own, hessian, own, real) / COUNT
    draws, seeds = [], iter(range(1, 10**6))
    monkeypatch.setattr(curvature, "sign_seeds", lambda batch, model: [next(seeds) for _ in range(COUNT)])
    for _ in range(300):
        draws.append(moments(model, batch)[name].grad_covariance[0].float())
    found, spread = torch.stack(draws).mean(0), torch.stack(draws).std(0) / 300**0.5
    assert ((found - expected).abs() <= 5 * spread + 1e-6 * expected.abs().max()).all()
    assert (draws[0] - expected).norm() > 3 * (found - expected).norm()


class TestWhichLosses:
    def directions(self, model, batch):
        with torch.enable_grad():
            return gauss_newton_directions(model, batch, forward_loss(model, batch, 0))

    def test_those_of_both_ends_of_a_span_are_halved(self, monkeypatch):
        model, batch = TINY_MODELS["bert-question-answering"](COUNT)
        start, end = self.directions(model, batch)
        assert start[0].shape == start[1].shape == end[1].shape
        p = start[0].detach().softmax(-1)
        expected = 0.5 * (p * (1 - p)).sum()  # half of the trace of the Hessian, in the mean over signs
        seeds = iter(range(1, 10**6))
        monkeypatch.setattr(curvature, "sign_seeds", lambda batch, model: [next(seeds) for _ in range(COUNT)])
        squares = [self.directions(model, batch)[0][1].square().sum() for _ in range(100)]
        torch.testing.assert_close(torch.stack(squares).mean(), expected, rtol=0.1, atol=0)

    def test_a_span_beyond_the_tokens_is_left_to_the_loss_which_passes_over_it(self):
        model, batch = TINY_MODELS["bert-question-answering"](COUNT)
        batch["start_positions"][1] = batch["end_positions"][1] = batch["input_ids"].shape[1]
        assert not self.directions(model, batch)
        assert moments(model, batch)

    def test_weighted_classes_are_left_to_the_gradients_of_labels(self):
        model, batch = TINY_MODELS["bert-sequence-classification"](COUNT)
        plain = model.forward

        def weighted(**inputs):
            outputs = plain(**inputs)
            weight = torch.tensor([1.0, 5.0, 0.2])
            return {"logits": outputs.logits, "loss": F.cross_entropy(outputs.logits, inputs["labels"], weight)}

        assert self.directions(model, batch)
        model.forward = weighted
        assert not self.directions(model, batch)

    def test_outputs_that_a_model_cuts_off_from_its_loss_are_left_to_it(self):
        model, batch = TINY_MODELS["bert-sequence-classification"](COUNT)
        plain = model.forward

        def cut_off(**inputs):
            outputs = plain(**inputs)
            return {"logits": outputs.logits.detach(), "loss": outputs.loss}

        model.forward = cut_off
        assert not self.directions(model, batch)
        assert moments(model, batch)

    def test_what_is_added_for_a_router_makes_no_difference(self):
        model = mixture("Mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
        assert self.directions(model, words(COUNT))

    def test_the_same_signs_whatever_the_batch_and_its_padding(self):
        model, batch = TINY_MODELS["bert-token-classification"](COUNT)
        alone = {name: value[2:3] for name, value in batch.items()}
        length = int(alone["attention_mask"].sum())
        alone = {name: value[:, :length] for name, value in alone.items()}
        assert curvature.sign_seeds(alone, model)[0] == curvature.sign_seeds(batch, model)[2]
        assert len(set(curvature.sign_seeds(batch, model))) == COUNT


def test_of_whole_numbers_for_a_regression_are_those_of_the_same_floats():
    model, batch = TINY_MODELS["bert-sequence-classification"](12)
    model.config.num_labels, model.num_labels, model.classifier = 1, 1, torch.nn.Linear(32, 1)
    found = []
    for labels in (batch["labels"], batch["labels"].float()):
        data = {**batch, "labels": labels}
        with torch.enable_grad():
            ((_, vectors),) = gauss_newton_directions(model, data, forward_loss(model, data, 0))
        found.append(vectors)
    torch.testing.assert_close(*found)
