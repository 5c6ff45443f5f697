r"""Models without a head, whose answers are representations: embeddings, or the last hidden states.

Nothing says which representation is right, but the dense model's own are. With representations `e`, normalized, and
those of another model, `e'`, the loss is

$$\tfrac12\,\|e' - e\|^2 = 1 - \cos(e', e),$$

in the mean over embeddings, or over tokens whatever the pooling behind them. It is the divergence between two normal
distributions of unit variance around them, so it is in nats. Its Hessian at the dense model is the second moment of
the gradients of `⟨z, e⟩` for noise `z ~ N(0, I)`, which takes the place of labels that are drawn: the label of an
example is the seed of its noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.nn.functional import normalize

from ..errors import DataError

NOISE = "label_noise"
"""Name of the column of seeds."""


class Representation(NamedTuple):
    """What a model without a head says.

    Attributes:
        rows: of unit length, in float32.  # shape: (units, features)
        examples: index of each row's example in the batch.  # shape: (units,)
    """

    rows: torch.Tensor
    examples: torch.Tensor


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a batch the model's forward takes: all but the seeds."""
    return {name: value for name, value in batch.items() if name != NOISE}


def representations(outputs: Any, batch: Mapping[str, Any]) -> list[Representation]:
    """Return a model's representations of a batch: its embeddings, or else the last hidden state of each real token.

    Args:
        outputs: what its forward returned.
        batch: its arguments.

    Returns:
        The embeddings by kind (of a text, of a picture), or one of tokens; nothing if there are neither.
    """
    fields = outputs if isinstance(outputs, Mapping) else vars(outputs)
    named = {name: value for name, value in fields.items() if isinstance(value, torch.Tensor)}
    embeddings = [value for name, value in named.items() if name.endswith("_embeds") and value.ndim == 2]
    if not embeddings:
        embeddings = [named[name] for name in ("last_hidden_state", "pooler_output") if name in named][:1]
    return [_of(value, batch) for value in embeddings]


def noisy_loss(found: list[Representation], seeds: torch.Tensor) -> torch.Tensor:
    """Return 0, with the gradient of `⟨z, e⟩` in the mean over units.

    Args:
        found: the dense model's representations.
        seeds: of the noise of each example.  # shape: (examples,)

    Returns:
        A scalar.
    """
    total = torch.zeros((), device=seeds.device)
    for place, (rows, examples) in enumerate(found):
        noise = torch.empty_like(rows)
        for example, seed in enumerate(seeds.tolist()):
            own = examples == example
            generator = torch.Generator().manual_seed(seed + place)
            noise[own] = torch.randn(int(own.sum()), rows.shape[-1], generator=generator).to(noise)
        total = total + (noise * rows).sum() / max(len(rows), 1) / len(found) ** 0.5  # squared, it is the mean
    return total - total.detach()


def _of(value: torch.Tensor, batch: Mapping[str, Any]) -> Representation:
    """Return the rows of embeddings (examples, features), states (…, tokens, features), or maps (…, height, width)."""
    seeds = batch[NOISE]
    if len(value) != len(seeds):
        raise DataError(
            f"labels='model': the model gives {len(value)} representations for {len(seeds)} examples, so it is not "
            "known whose they are. Give as many texts as pictures, or labels."
        )
    if value.ndim == 4:
        value = value.flatten(2).mT
    real = torch.ones(value.shape[:-1], dtype=torch.bool, device=value.device)
    masks = [batch.get(name) for name in ("decoder_attention_mask", "attention_mask")]
    fitting = [mask for mask in masks if isinstance(mask, torch.Tensor) and mask.shape == real.shape]
    real = fitting[0].bool() if fitting else real
    return Representation(normalize(value.float()[real], dim=-1), real.nonzero()[:, 0])
