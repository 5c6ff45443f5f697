"""Statistics of experts with few rows, filled up from those beside them."""

import pytest
import torch

from hf_lossless_lr.statistics import CalibrationStatistics, LayerStatistics, with_pooled

IN, OUT, UNITS = 5, 3, 7
GROUP = ("a", "b", "c")


def seen(rows, seed):
    """Statistics of a layer with so many rows, and the sums behind them."""
    generator = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(rows, size, generator=generator, dtype=torch.float64) for size in (IN, OUT))
    return LayerStatistics(None, (x.T @ x / rows)[None], (g.T @ g / UNITS)[None], rows, UNITS)


def statistics(layers, uncalled=()):
    return CalibrationStatistics(layers, 1.0, 2, UNITS, "data", uncalled=uncalled)


def test_a_layer_with_as_many_rows_as_features_keeps_its_own():
    layers = {"a": seen(IN, 0), "b": seen(2, 1), "other": seen(1, 2)}
    found = with_pooled(statistics(layers), [GROUP]).layers
    assert found["a"] is layers["a"]
    assert found["other"] is layers["other"]


def test_missing_rows_are_those_of_all_experts_in_the_mean():
    layers = {"a": seen(20, 0), "b": seen(2, 1)}
    found = with_pooled(statistics(layers), [GROUP]).layers["b"]
    a, b = layers["a"], layers["b"]
    inputs = (20 * a.input_covariance + 2 * b.input_covariance) / 22
    grads = (a.grad_covariance + b.grad_covariance) / 22
    torch.testing.assert_close(found.input_covariance, (2 * b.input_covariance + (IN - 2) * inputs) / IN)
    torch.testing.assert_close(found.grad_covariance, 2 * (b.grad_covariance + (OUT - 2) * grads) / OUT)
    assert (found.tokens, found.units) == (2, UNITS)


def test_an_expert_without_rows_counts_as_if_it_got_one_of_the_others():
    layers = {"a": seen(20, 0), "b": seen(10, 1)}
    pooled = with_pooled(statistics(layers, uncalled=("c", "d")), [GROUP])
    assert pooled.uncalled == ("d",)
    assert set(pooled.layers) == {"a", "b", "c"}
    assert len(pooled.layers) == 3
    found, a, b = pooled.layers["c"], layers["a"], layers["b"]
    torch.testing.assert_close(found.input_covariance, (20 * a.input_covariance + 10 * b.input_covariance) / 30)
    torch.testing.assert_close(found.grad_covariance, (a.grad_covariance + b.grad_covariance) / 30)


def test_nothing_is_known_of_experts_none_of_which_was_called():
    pooled = with_pooled(statistics({"other": seen(4, 0)}, uncalled=GROUP), [GROUP])
    assert pooled.uncalled == GROUP
    assert "a" not in pooled.layers
    with pytest.raises(KeyError):
        pooled.layers["a"]


def test_experts_whose_layers_are_asked_for_in_turns_are_pooled_once(monkeypatch):
    """As they come in the model: the sum over all experts is not made for each of them."""
    groups = [tuple(f"{module}.{number}.{layer}" for number in range(9)) for module in "ab" for layer in ("in", "out")]
    layers = {name: seen(2, place) for place, name in enumerate(name for group in groups for name in group)}
    found, made = with_pooled(statistics(layers), groups).layers, []
    pooled = type(found)._pooled
    monkeypatch.setattr(type(found), "_pooled", lambda self, group: made.append(group) or pooled(self, group))
    for module in "ab":
        for number in range(9):
            for layer in ("in", "out"):
                found[f"{module}.{number}.{layer}"]
    assert made == groups
