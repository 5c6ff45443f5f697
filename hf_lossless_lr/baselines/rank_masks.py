r"""Ranks by masks that are learned: gradients say which singular values the model can do without.

Each layer is factorized at full rank, `W = Σ_i u_i v_i`, and component `i` is kept with the probability
`p_i = σ(ℓ_i − b)`. Only the logits `ℓ` are trained, so that activations of the masked model stay near those of the
dense one. A mask is drawn in each call, by the Gumbel-sigmoid relaxation with noise `g` of the logistic distribution,

$$m_i = σ((ℓ_i − b + g) / τ).$$

Source: Sundrani, Tudisco & Minervini 2025, "Low-rank compression of language models via differentiable rank
selection", arXiv 2512.13733, without its text at hand. Its penalty on the size, whose weight rises and falls, is a
budget here: `b` is solved for, so that what is expected to be kept sinks from everything to the wanted share. There is
no term for smooth masks, and the factors are those of SVD-LLM rather than ASVD: minilm-sst2 loses less with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback

from ..checkpoint import LosslessLowRankConfig
from ..errors import ConfigurationError
from ..factors import Factorization, MetricFactors, factorize
from ..layers import replace_modules, weight_matrices
from ..statistics import CalibrationStatistics
from .fine_tuning import Recipe, train, trainable_copy
from .truncation import two_factors

LOGITS = (6.0, 3.0)  # of the first component of a layer, and of its last, before the training
TEMPERATURE = 1.0
SINKING = 0.75  # share of the steps in which what is kept sinks
BISECTIONS, FAR = 60, 50.0  # of the offset, which is at most so far from all logits
METRIC = "activation"


class RankMask(nn.Module):
    """A layer in full-rank factors of which a mask takes components away.

    Args:
        factors: the factorized layer, of two factors, which is not trained.
        dense: parameters of the weight that it stands for.

    Attributes:
        logits: of the components.  # shape: (rank,)
        offset: `b`.
    """

    def __init__(self, factors: Any, dense: int) -> None:
        super().__init__()
        self.factors, self.dense = factors.requires_grad_(False), dense
        rank = len(factors.down.weight) // factors.groups
        self.each = (factors.down.weight.numel() + factors.up.weight.numel()) // rank  # parameters of a component
        self.logits = nn.Parameter(torch.linspace(*LOGITS, rank, device=factors.down.weight.device))
        self.offset = torch.tensor(0.0)

    @property
    def weight(self) -> torch.Tensor:
        """The weight of the factorized layer, for model code that asks for its dtype."""
        return self.factors.weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the factors with a mask that is drawn."""
        noise = torch.logit(torch.rand_like(self.logits), eps=1e-6)
        mask = torch.sigmoid((self.logits - self.offset.to(self.logits) + noise) / TEMPERATURE)
        down: torch.Tensor = self.factors.down.weight
        masked = down * mask.repeat(len(down) // len(mask)).reshape(-1, *[1] * (down.ndim - 1))
        return functional_call(self.factors, {"down.weight": masked}, args, kwargs)


def masked_ranks(
    targets: Mapping[str, nn.Module],
    keep_ratio: float,
    *,
    model: PreTrainedModel,
    data: DataLoader,
    statistics: CalibrationStatistics,
    recipe: Recipe | None = None,
) -> dict[str, nn.Module]:
    """Choose the components of all layers together, by masks that are trained on the data; weights are not.

    Args:
        targets: dense layers of the model by name; unchanged.
        keep_ratio: parameters kept divided by original ones, in (0, 1].
        model: the model, which is not changed.
        data: examples, from `make_dataloader`.
        statistics: second moments of the inputs of the layers.
        recipe: how to train the logits; default: a rate of 0.1, six epochs.

    Returns:
        What takes the place of the layers that become smaller, by name.

    Raises:
        ConfigurationError: if the layers are larger than the share even at rank 1.
        TargetError: if the weights of the model lie on several devices.
    """
    copy, dense = (trainable_copy(model).requires_grad_(False) for _ in range(2))
    factors = {
        name: factorize(weight_matrices(layer), statistics.layers[name], METRIC, LosslessLowRankConfig.damping).factors
        for name, layer in targets.items()
    }
    masks = {
        name: RankMask(_layer(copy.get_submodule(name), found), weight_matrices(targets[name]).numel())
        for name, found in factors.items()
    }
    budget = Budget(masks, keep_ratio)
    budget.kept()  # raises an error where nothing is small enough
    replace_modules(copy, masks)
    train(copy, data, recipe or Recipe(learning_rate=0.1, epochs=6.0), [budget], partial(Distilling, dense))
    return {
        name: _layer(targets[name], _chosen(factors[name], kept))
        for (name, mask), kept in zip(masks.items(), budget.kept(), strict=True)
        if kept.sum() * mask.each < mask.dense
    }


def _chosen(factors: MetricFactors, kept: torch.Tensor) -> MetricFactors:
    left, right, values = factors
    return MetricFactors(left[..., kept], right[..., kept, :], values[..., kept])


def _layer(dense: nn.Module, factors: MetricFactors) -> Any:
    balanced = Factorization(factors).truncate(factors.left.shape[-1], "two-factor")
    return two_factors(dense, balanced.down, balanced.up)


class Budget(TrainerCallback):
    """Let what is expected to be kept sink, step by step, by the offset that all logits have in common.

    Args:
        masks: the layers by name.
        keep_ratio: what is kept in the end.
    """

    def __init__(self, masks: Mapping[str, RankMask], keep_ratio: float) -> None:
        self.masks, self.keep_ratio = [*masks.values()], keep_ratio
        self.total = sum(mask.dense for mask in self.masks)
        self.full = sum(mask.each * len(mask.logits) for mask in self.masks) / self.total

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the offset of this step."""
        progress = min(state.global_step / (SINKING * state.max_steps), 1.0)
        self.set_offset(self.full - (self.full - self.keep_ratio) * progress)

    def set_offset(self, share: float) -> None:
        """Set the offset at which the factors are expected to have a share of the dense parameters.

        Its gradient is that of the solution: where one logit rises, the others count as if they sank.

        Args:
            share: of the parameters; above 1 before the factors are smaller than the weights.
        """
        offset = self._least_offset(self._expected, share * self.total).requires_grad_()
        size = self._expected(offset)
        (slope,) = torch.autograd.grad(size, offset, retain_graph=True)
        moved = offset.detach()
        if slope < 0:
            moved = moved - (size - size.detach()) / slope
        for mask in self.masks:
            mask.offset = moved

    def kept(self) -> list[torch.Tensor]:
        """Return which components of each layer are kept: those of the highest logits that the budget pays for.

        Each layer keeps one at least.

        Raises:
            ConfigurationError: if that is more than the budget.
        """
        offset = self._least_offset(self._counted, self.keep_ratio * self.total)
        if self._counted(offset) > self.keep_ratio * self.total:
            raise ConfigurationError(
                f"keep_ratio={self.keep_ratio} cannot be reached: the lowest ranks have more parameters. Keep more, "
                "or add layers to `ignore`."
            )
        return [_above(mask.logits.detach(), offset) for mask in self.masks]

    def _least_offset(self, size: Callable[[torch.Tensor], torch.Tensor], most: float) -> torch.Tensor:
        """Return the smallest offset with at most such a size."""
        logits = torch.cat([mask.logits.detach() for mask in self.masks])
        low, high = logits.amin() - FAR, logits.amax() + FAR
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if size(middle).detach() > most else (low, middle)
        return high

    def _expected(self, offset: torch.Tensor) -> torch.Tensor:
        return torch.stack([mask.each * torch.sigmoid(mask.logits - offset).sum() for mask in self.masks]).sum()

    def _counted(self, offset: torch.Tensor) -> torch.Tensor:
        kept = [mask.each * _above(mask.logits.detach(), offset).sum() for mask in self.masks]
        sizes = [
            size.clamp_max(mask.dense) for size, mask in zip(kept, self.masks, strict=True)
        ]  # else it stays dense
        return torch.stack(sizes).sum()


def _above(logits: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    return (logits > offset) | (torch.arange(len(logits), device=logits.device) == logits.argmax())


class Distilling(Trainer):
    """A trainer whose loss is how far the activations of a model are from those of another one.

    It is the mean of `‖H' − H‖² / ‖H‖²` over the hidden states in the middle and at the end; over the outputs where
    the model has no hidden states.

    Args:
        teacher: the other model.
        arguments: those of `Trainer`.
        options: more of them.
    """

    def __init__(self, teacher: PreTrainedModel, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        nn.Module.to(teacher, self.args.device)  # whose own signature type checkers do not see through
        self.teacher = teacher.eval()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch."""
        model.eval()  # the masks are all that is drawn
        with torch.no_grad():
            wanted = _activations(self.teacher(**inputs, output_hidden_states=True))
        outputs = model(**inputs, output_hidden_states=True)
        distances = [
            (found - state).square().sum() / state.square().sum().clamp_min(torch.finfo(state.dtype).tiny)
            for found, state in zip(_activations(outputs), wanted, strict=True)
        ]
        loss = torch.stack(distances).mean()
        return (loss, outputs) if return_outputs else loss


def _activations(outputs: Mapping[str, Any]) -> list[torch.Tensor]:
    streams = [states for name, states in outputs.items() if name.endswith("hidden_states") and states]
    if streams:
        return [states[place] for states in streams for place in (len(states) // 2, -1)]
    floating = (torch.is_tensor(value) and value.is_floating_point() for value in outputs.values())
    return [value for (name, value), found in zip(outputs.items(), floating, strict=True) if found and name != "loss"]
