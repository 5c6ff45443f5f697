"""Low-rank prune-and-factorize: prune while training, factorize what is left, and fine-tune the factors.

Source: Ren & Zhu 2023, "Low-rank prune-and-factorize for language model compression", arXiv 2306.14152. The stages are
the published ones: first-order pruning, sparsity-aware SVD and mixed-rank fine-tuning. Their details are ours. Each
matrix is pruned to the share that its factors are to have, the error of a row counts the share of its weights that is
left, and the pruned matrices stand still while the factors are fine-tuned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..layers import replace_modules, weight_matrices
from .fine_tuning import Recipe, equal_shares, train, trainable_copy, trained_layers
from .mixed_rank import ConsistentTrainer, MixedRank, RisingProbability
from .pruning import FirstOrderPruning
from .truncation import truncated


@dataclass(frozen=True)
class Recipes:
    """How to train in both stages that do.

    Attributes:
        pruning: while weights are pruned.
        tuning: of the factors; each step is two passes.
    """

    pruning: Recipe = field(default_factory=Recipe)
    tuning: Recipe = field(default_factory=Recipe)


def lpaf(
    targets: Mapping[str, nn.Module],
    keep_ratio: float,
    *,
    model: PreTrainedModel,
    data: DataLoader,
    recipes: Recipes | None = None,
) -> dict[str, nn.Module]:
    """Prune, factorize and fine-tune a copy of a model, each layer to the same share of its parameters.

    Args:
        targets: dense layers of the model by name; unchanged.
        keep_ratio: parameters kept divided by original ones, in (0, 1].
        model: the model, which is not changed.
        data: labelled examples, from `make_dataloader`.
        recipes: how to train; default: those of `Recipes`.

    Returns:
        What takes the place of the targets, and of other layers that were trained, by name.

    Raises:
        ConfigurationError: if a layer is larger than its share even at rank 1.
        NumericalError: if the training diverges.
        TargetError: if the weights of the model lie on several devices.
    """
    recipes, ranks = recipes or Recipes(), equal_shares(targets, keep_ratio)
    copy = trainable_copy(model)
    layers: dict[str, Any] = {name: copy.get_submodule(name) for name in targets}
    pruning = FirstOrderPruning(layers, keep_ratio)
    train(copy, data, recipes.pruning, [pruning])
    pruning.finish()
    mixed = {
        name: MixedRank(layer, truncated(layer, ranks[name], share_left(layer))) for name, layer in layers.items()
    }
    replace_modules(copy, mixed)
    train(copy, data, recipes.tuning, [RisingProbability(mixed)], ConsistentTrainer)
    replace_modules(copy, {name: layer.factors for name, layer in mixed.items()})
    return trained_layers(model, copy, targets)


def share_left(layer: nn.Module) -> torch.Tensor:
    """Return the share of each row of the weight that is not zero.  # shape: (groups, out)."""
    return (weight_matrices(layer) != 0).double().mean(-1)
