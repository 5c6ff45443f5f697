"""The noise bound of eq. 8 of arXiv 2412.06867: where the first-order prediction of the loss stops to hold."""

import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from support.compressions import build, default_options
from support.tiny_models import TINY_MODELS, rows, split_batch
from support.tolerances import FLOAT32
from torch.utils.data import DataLoader

from hf_lossless_lr.factors.factorize import factorize
from hf_lossless_lr.layers.layout import layout_of, weight_matrices
from hf_lossless_lr.layers.targets import find_targets
from hf_lossless_lr.ranks.paper import EXAMPLES, find_epsilon
from hf_lossless_lr.statistics.collect import collect_statistics

pytestmark = pytest.mark.numerical

NAMES = ["bert-sequence-classification", "llama", "gpt2", "vit", "resnet"]  # Linear, Conv1D and Conv2d
TOLERANCES = [0.03, 3e-3, 3e-4]


def first(items):
    return items[0]


def loader_of(batch, size=4):
    return DataLoader(split_batch(batch, size), batch_size=1, collate_fn=first)


def accelerator():
    return Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=False))


@torch.no_grad()
def mean_loss(model, batch):
    """Loss over all labelled units at once."""
    return model(**batch).loss.item()


class Case:
    """A tiny model with its statistics and plain SVDs, and eq. 8 written out."""

    def __init__(self, name):
        self.model, self.batch = build(name)
        self.targets = find_targets(self.model, **default_options(self.model)).chosen
        self.statistics = collect_statistics(
            self.model, self.targets, loader_of(self.batch), accelerator(), weight_grads=True
        )
        self.factorizations = {
            layer: {"channel": factorize(weight_matrices(module), self.statistics.layers[layer], "identity", 0.0)}
            for layer, module in self.targets.items()
        }
        self.weights = {layer: weight_matrices(module).double().clone() for layer, module in self.targets.items()}
        self.loss = mean_loss(self.model, self.batch)
        self.model(**self.batch).loss.backward()
        self.gradients = {
            layer: layout_of(module).matrices(module, module.weight.grad).double()
            for layer, module in self.targets.items()
        }
        self.model.zero_grad()

    def epsilon(self, tolerance, layer=None):
        targets = self.targets if layer is None else {layer: self.targets[layer]}
        arguments = (self.model, targets, self.factorizations, loader_of(self.batch), accelerator())
        return find_epsilon(*arguments, tolerance)

    def noise(self, layer, rank):
        return float((self.factorizations[layer]["channel"].weight(rank) - self.weights[layer]).abs().max())

    def gap(self, layer, rank):
        """`|L(Ŵ_k) − L(W) − ⟨G, Ŵ_k − W⟩|`, with the gradient of one backward pass."""
        module, difference = (
            self.targets[layer],
            self.factorizations[layer]["channel"].weight(rank) - self.weights[layer],
        )
        original = module.weight.detach().clone()
        with torch.no_grad():
            matrix = self.factorizations[layer]["channel"].weight(rank)
            layout_of(module).matrices(module, module.weight).copy_(matrix.reshape(weight_matrices(module).shape))
            loss = mean_loss(self.model, self.batch)
            module.weight.copy_(original)
        return abs(loss - self.loss - float((self.gradients[layer] * difference).sum()))

    def rank_of(self, layer, epsilon):
        """The rank whose noise `epsilon` is."""
        ranks = range(1, min(self.weights[layer].shape[-2:]) + 1)
        return min(ranks, key=lambda rank: abs(self.noise(layer, rank) - epsilon))


@pytest.fixture(scope="module")
def cases():
    return {name: Case(name) for name in NAMES}


class TestEpsilon:
    @pytest.mark.parametrize("tolerance", TOLERANCES)
    @pytest.mark.parametrize("name", NAMES)
    def test_is_the_noise_of_a_rank_at_which_the_first_order_prediction_holds(self, cases, name, tolerance):
        case = cases[name]
        epsilon = case.epsilon(tolerance)
        assert epsilon.keys() == case.targets.keys()
        slack = FLOAT32 * case.loss  # the loss is a float32 number
        for layer, value in epsilon.items():
            rank = case.rank_of(layer, value)
            assert value == pytest.approx(case.noise(layer, rank), rel=1e-9, abs=1e-12)
            assert case.gap(layer, rank) < tolerance + slack, layer
            if rank > 1:
                assert case.gap(layer, rank - 1) >= tolerance - slack, layer

    @pytest.mark.parametrize("name", NAMES)
    def test_is_that_of_the_smallest_such_rank_where_the_gap_crosses_the_tolerance_once(self, cases, name):
        case, compared = cases[name], 0
        slack = FLOAT32 * case.loss
        for layer in list(case.targets)[:3]:
            gaps = [case.gap(layer, rank) for rank in range(1, min(case.weights[layer].shape[-2:]) + 1)]
            crossings = [
                rank for rank in range(2, len(gaps)) if min(gaps[: rank - 1]) > max(gaps[rank - 1 :]) + 4 * slack
            ]
            for rank in crossings[:: max(1, len(crossings) // 2)]:
                tolerance = (min(gaps[: rank - 1]) + max(gaps[rank - 1 :])) / 2
                epsilon = case.epsilon(tolerance, layer)
                assert epsilon == {layer: pytest.approx(case.noise(layer, rank), rel=1e-9)}
                compared += 1
        assert compared

    def test_falls_with_the_tolerance(self, cases):
        wide, narrow = (cases["bert-sequence-classification"].epsilon(tolerance) for tolerance in (0.1, 1e-4))
        assert all(narrow[layer] < wide[layer] for layer in wide)

    def test_is_the_noise_of_rank_1_where_every_rank_is_close_enough(self, cases):
        case = cases["vit"]
        for layer, value in case.epsilon(1e6).items():
            assert value == pytest.approx(case.noise(layer, 1), rel=1e-9)

    @pytest.mark.parametrize("name", NAMES)
    def test_leaves_the_weights_as_they_were(self, name):
        case = Case(name)
        case.model.train()
        before = {key: value.clone() for key, value in case.model.state_dict().items()}
        pointers = {key: value.data_ptr() for key, value in case.model.state_dict().items()}
        case.epsilon(1e-3)
        after = case.model.state_dict()
        assert all(torch.equal(after[key], value) for key, value in before.items())
        assert {key: value.data_ptr() for key, value in after.items()} == pointers
        assert all(module.training for module in case.model.modules())
        assert all(parameter.grad is None for parameter in case.model.parameters())

    def test_restores_the_weights_of_a_narrow_dtype_to_the_last_bit(self):
        model, batch = build("bert-sequence-classification")
        model.to(torch.bfloat16)
        targets = find_targets(model).chosen
        statistics = collect_statistics(model, targets, loader_of(batch), accelerator(), weight_grads=True)
        factorizations = {
            layer: {"channel": factorize(weight_matrices(module), statistics.layers[layer], "identity", 0.0)}
            for layer, module in targets.items()
        }
        before = {key: value.clone() for key, value in model.state_dict().items()}
        find_epsilon(model, targets, factorizations, loader_of(batch), accelerator(), 0.05)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())

    def test_uses_the_first_examples_alone(self, monkeypatch):
        monkeypatch.setattr("hf_lossless_lr.ranks.paper.EXAMPLES", 5)
        model, batch = TINY_MODELS["bert-sequence-classification"](12)
        targets = find_targets(model, ["query"]).chosen
        results = []
        for part in (batch, rows(batch, slice(5))):
            examples = [rows(part, index) for index in range(len(part["labels"]))]
            loader = DataLoader(examples, batch_size=4)
            statistics = collect_statistics(model, targets, loader, accelerator(), weight_grads=True)
            factorizations = {
                layer: {"channel": factorize(weight_matrices(module), statistics.layers[layer], "identity", 0.0)}
                for layer, module in targets.items()
            }
            results.append(find_epsilon(model, targets, factorizations, loader, accelerator(), 1e-3))
        assert results[0] == results[1]
        assert EXAMPLES == 64
