r"""Fewer dimensions between the values and the output of attention, in each head as many as it needs.

Attention takes a mean of values, so a head's contexts follow any linear map of its values. With the weight `W_h` of
the output projection for head `h`, `S = Σ_h W_hᵀ B W_h` over the query heads that share values, and the mean
`A = L Lᵀ` of the second moments of their contexts, let `V` be the first eigenvectors of `LᵀSL`. Then

$$P = V^\top L^{-1}, \qquad Q = L V, \qquad P Q = I,$$

are the dimensions that are kept: values become `P W_V`, and the output projection what fits best behind them,
`W_O A_o P^\top (P A_o P^\top)^{-1}`, with the moments `A_o` of all contexts. A change `D` of the new values is heard
as the change `Q D` of the old ones, so their `B` is `Q^\top B Q`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..statistics import LayerStatistics
from .linalg import damped

SHARES = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25)  # of the dimensions, that are tried
MULTIPLE = 8  # of the dimensions that are kept, where there are many
MANY = 128


class DenseLayer(NamedTuple):
    """A linear layer with its statistics; `weight` is of shape (1, out, in)."""

    weight: torch.Tensor
    statistics: LayerStatistics


@dataclass(frozen=True)
class NarrowLayer:
    """One of the two layers, with fewer dimensions.

    Attributes:
        weight: the new weight, in float64.  # shape: (1, dimensions, in) or (1, out, dimensions)
        statistics: of the new layer.
        places: where its outputs, or its inputs, are among those of the dense layer.  # shape: (dimensions,)
        rows: `P`, for values; None for the output projection.  # shape: (dimensions, out)
    """

    weight: torch.Tensor
    statistics: LayerStatistics
    places: torch.Tensor
    rows: torch.Tensor | None

    def seen(self, output_cross: torch.Tensor, input_gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the products that a refit of the new layer takes, from those of the dense one.

        Args:
            output_cross: `W X X'ᵀ`.  # shape: (1, out, in)
            input_gram: `X' X'ᵀ`.  # shape: (1, in, in)
        """
        if self.rows is not None:
            return self.rows.to(output_cross) @ output_cross, input_gram
        return output_cross[..., self.places], input_gram[..., self.places, :][..., self.places]


class FewerDimensions(NamedTuple):
    """Both layers, and what it is predicted to cost that there are fewer dimensions, in nats."""

    values: NarrowLayer
    output: NarrowLayer
    cost: float


def dimension_counts(features: int, heads: int) -> list[int]:
    """Return how many dimensions may be kept of those of all heads; each head keeps one at least.

    Args:
        features: dimensions of the values of all heads.
        heads: how many heads have values.
    """
    multiple = MULTIPLE if features >= MANY else 1
    counts = {max(round(share * features / multiple) * multiple, heads) for share in SHARES}
    return sorted((count for count in counts if count < features), reverse=True)


@torch.no_grad()
def fewer_dimensions(
    values: DenseLayer, output: DenseLayer, heads: tuple[int, int], count: int, damping: float
) -> FewerDimensions:
    """Return the two layers with so many dimensions between them, those that matter least left out.

    Args:
        values: the projection of the values.
        output: the output projection.
        heads: how many heads have queries, and how many have values, which as many heads of queries share.
        count: how many dimensions all heads with values keep.
        damping: relative damping of the second moments of the contexts.
    """
    queries, keys = heads
    sharing = queries // keys
    W_v, W_o = values.weight[0].double(), output.weight[0].double()
    seen, heard = values.statistics, output.statistics
    A_o, B_o = _definite(heard.input_covariance[0]), _definite(heard.grad_covariance[0])
    moments, size = damped(heard.input_covariance[0], damping).double(), len(W_v) // keys
    found = []
    for parts in torch.arange(len(A_o), device=A_o.device).view(keys, sharing, size):
        S = torch.stack([W_o[:, part].T @ B_o @ W_o[:, part] for part in parts]).sum(0)
        L = torch.linalg.cholesky(torch.stack([moments[part][:, part] for part in parts]).mean(0))
        weights, V = torch.linalg.eigh(L.T @ S @ L)
        P = torch.linalg.solve_triangular(L, V.flip(1).T, upper=False, left=False)
        found.append((weights.flip(0), P, L @ V.flip(1)))
    kept = _kept_of_heads(torch.stack([weights for weights, *_ in found]), count)
    rows = [P[:n] for n, (_, P, _) in zip(kept, found, strict=True)]
    P_v, P_o = torch.block_diag(*rows), torch.block_diag(*(P for P in rows for _ in range(sharing)))
    Q = torch.block_diag(*(Q[:, :n] for n, (*_, Q) in zip(kept, found, strict=True)))
    system = P_o @ moments @ P_o.T
    narrow = torch.linalg.solve(system, P_o @ (moments @ W_o.T)).T
    change = narrow @ P_o - W_o
    cost = 0.5 * float((B_o * (change @ A_o @ change.T)).sum())
    B_v = (Q.T @ seen.grad_covariance[0].double() @ Q).to(seen.grad_covariance)[None]
    A = (P_o @ A_o @ P_o.T).to(heard.input_covariance)[None]
    of_values = LayerStatistics(None, seen.input_covariance, B_v, seen.tokens, seen.units)
    of_output = LayerStatistics(None, A, heard.grad_covariance, heard.tokens, heard.units)
    return FewerDimensions(
        NarrowLayer((P_v @ W_v)[None], of_values, _places(kept, size, 1, A_o.device), P_v),
        NarrowLayer(narrow[None], of_output, _places(kept, size, sharing, A_o.device), None),
        cost,
    )


def _definite(moments: torch.Tensor) -> torch.Tensor:
    """Return second moments in float64, as much larger as rounding to float32 may have made them smaller.

    What it leaves may be less than nothing in some directions, so that it would be a gain to lose a large constant
    that nobody hears; and a narrow layer sees the moments of its inputs enlarged.
    """
    return damped(moments, len(moments) * torch.finfo(torch.float32).eps).double()


def _kept_of_heads(weights: torch.Tensor, count: int) -> list[int]:
    """Return how many dimensions each head keeps, of weights that fall.  # shape: (heads, dimensions of a head)."""
    first = torch.zeros_like(weights, dtype=torch.bool)
    first[:, 0] = True
    order = torch.where(first, torch.inf, weights).flatten().argsort(descending=True, stable=True)
    taken = torch.zeros_like(order, dtype=torch.bool).index_fill(0, order[:count], True)
    return [int(n) for n in taken.view_as(weights).sum(1)]


def _places(kept: list[int], size: int, sharing: int, device: torch.device) -> torch.Tensor:
    """Return the first dimensions of each head among all: of a head with values, or of those that share them."""
    counts = [n for n in kept for _ in range(sharing)]
    return torch.cat([head * size + torch.arange(n, device=device) for head, n in enumerate(counts)])
