"""The refit the slow way: whole forward passes for each group, one unpadded example at a time, in double precision."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from types import MappingProxyType

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_lossless_lr.factors.linalg import FAINT
from hf_lossless_lr.factors.refit import LARGEST_RIDGE, RIDGE
from hf_lossless_lr.statistics.residuals import Residual
from support.statistics_oracle import input_rows, unpadded_examples
from support.tiny_models import Batch
from support.tolerances import AMPLIFICATION


def plain_examples(model: PreTrainedModel, batch: Batch) -> list[Batch]:
    """Each example, or each choice of one, without padding and without a mask."""
    if "start_positions" in batch:
        examples = unpadded_examples(model, batch | {"labels": batch["start_positions"]})
        return [{name: value for name, value in example.items() if name != "labels"} for example in examples]
    if "input_ids" in batch and batch["input_ids"].ndim == 3:
        flat = {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask")}
        flat["labels"] = torch.zeros(len(flat["input_ids"]), dtype=torch.int64)
        return [e | {"input_ids": e["input_ids"][:, None]} for e in unpadded_examples(model, flat)]
    return unpadded_examples(model, batch)


@torch.no_grad()
def layer_inputs(
    model: nn.Module, names: Sequence[str], examples: Sequence[Batch]
) -> dict[str, dict[int, np.ndarray]]:
    """Input rows of each layer, by the number of the example; a layer is called at most once in each."""
    seen: dict[str, dict[int, np.ndarray]] = {name: {} for name in names}
    current = 0

    def watch(name):
        def hook(module, args):
            assert current not in seen[name]
            seen[name][current] = input_rows(module, args[0]).double().numpy().copy()

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    for current, example in enumerate(examples):  # noqa: B007 (the hooks read it)
        model(**example)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def summands(model: nn.Module, residual: Residual, examples: Sequence[Batch]) -> np.ndarray:
    """What is added to the output of a layer: rows of all examples."""
    seen = []

    def note(module, args, kwargs, *output):
        value = output[0] if output else (args[0] if args else next(iter(kwargs.values())))
        seen.append((value[0] if isinstance(value, tuple) else value).flatten(0, -2).double().numpy().copy())

    module = model.get_submodule(residual.module)
    register = module.register_forward_hook if residual.output else module.register_forward_pre_hook
    handle = register(note, with_kwargs=True)
    for example in examples:
        model(**example)
    handle.remove()
    return np.concatenate(seen)


def get_matrix(module: nn.Module) -> np.ndarray:
    weight = module.weight.detach()
    return (weight.T if isinstance(module, Conv1D) else weight.flatten(1)).double().numpy()


@torch.no_grad()
def set_matrix(module: nn.Module, matrix: np.ndarray) -> None:
    value = torch.from_numpy(np.ascontiguousarray(matrix.T if isinstance(module, Conv1D) else matrix))
    module.weight.copy_(value.reshape(module.weight.shape))


def with_ridge(matrix: np.ndarray, share: float) -> np.ndarray:
    channels = np.diag(matrix)
    return matrix + np.diag(np.where(channels > 0, share * channels, share * channels[channels > 0].min()))


def roots(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`R` with `R Rᵀ` the matrix, and its inverse; by way of the matrix with unit diagonal."""
    scale = np.sqrt(np.diag(matrix))
    values, vectors = np.linalg.eigh(matrix / np.outer(scale, scale))
    return scale[:, None] * (vectors * np.sqrt(values)) @ vectors.T, (vectors / np.sqrt(values)) @ vectors.T / scale


def condition(matrix: np.ndarray) -> float:
    """Of the matrix with unit diagonal: channels in other units do not make a problem harder."""
    scale = np.sqrt(np.diag(matrix))
    return float(np.linalg.cond(matrix / np.outer(scale, scale)))


def fitted(
    weight: np.ndarray, dense: np.ndarray, shifted: np.ndarray, ridge: float, errors: np.ndarray | float = 0.0
) -> np.ndarray:
    """The weight that turns the shifted rows into the dense outputs, by least squares on the rows themselves.

    Errors of what is added to the outputs are made up for.
    """
    sizes, squares = (shifted**2).sum(0), (weight**2).sum(0)
    levels = np.sqrt(ridge * (sizes + FAINT * (sizes * squares).mean() / squares))  # root of: number of rows * Λ
    design = np.concatenate([shifted, np.diag(levels)])
    outputs = np.concatenate([dense @ weight.T + errors, levels[:, None] * weight.T])
    return np.linalg.lstsq(design, outputs, rcond=None)[0].T


def truncated(weight: np.ndarray, A: np.ndarray, B: np.ndarray, rank: int) -> np.ndarray:
    """The best approximation of a rank in the metric `(A, B)`."""
    (Q, Q_inverse), (P, P_inverse) = roots(A), roots(B)
    U, S, Vt = np.linalg.svd(P.T @ weight @ Q, full_matrices=False)
    if rank < len(S):  # a smaller gap would say nothing about the code: any rounding turns the subspace
        gap = (S[rank - 1] ** 2 - S[rank] ** 2) / S[0] ** 2
        assert np.sqrt(condition(A) * condition(B)) / gap < AMPLIFICATION
    return P_inverse.T @ (U[:, :rank] * S[:rank]) @ Vt[:rank] @ Q_inverse


def slow_refit(
    model: PreTrainedModel,
    products: Mapping[str, np.ndarray],
    ranks: Mapping[str, int],
    grad_covariances: Mapping[str, np.ndarray],
    groups: Sequence[Sequence[str]],
    examples: Sequence[Batch],
    damping: float,
    contributes: Callable[[str, int], bool] = lambda name, index: True,
    residuals: Mapping[str, Residual] = MappingProxyType({}),
) -> dict[str, np.ndarray]:
    """Return the low-rank weight of each layer after the refit.

    Args:
        model: the dense model, in double precision.
        products: the low-rank weights before.
        ranks: rank of each layer.
        grad_covariances: B of each layer.
        groups: layers in the order in which they are fitted.
        examples: without padding.
        damping: of the metric.
        contributes: whether a layer is fitted to an example, by its number.
        residuals: what the outputs of layers are added to, where they make up for its error.
    """
    compressed = deepcopy(model)  # a plain dense model with other numbers in it
    for name, product in products.items():
        set_matrix(compressed.get_submodule(name), product)
    result = dict(products)
    inputs = layer_inputs(model, [name for group in groups for name in group], examples)
    for group in groups:
        shifted = layer_inputs(compressed, group, examples)
        for name in group:
            chosen = [index for index in shifted[name] if contributes(name, index)]
            X, Y = (np.concatenate([rows[name][index] for index in chosen]) for rows in (inputs, shifted))
            ridge, errors = min(RIDGE * Y.shape[1] / len(Y), LARGEST_RIDGE), 0.0
            if name in residuals:
                dense, now = (summands(each, residuals[name], examples) for each in (model, compressed))
                errors = dense - now
            weight = fitted(get_matrix(model.get_submodule(name)), X, Y, ridge, errors)
            A, B = with_ridge(Y.T @ Y / len(Y), damping), with_ridge(grad_covariances[name], damping)
            result[name] = truncated(weight, A, B, ranks[name])
        for name in group:
            set_matrix(compressed.get_submodule(name), result[name])
    return result
