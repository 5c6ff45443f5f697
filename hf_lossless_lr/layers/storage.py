"""How many numbers a factorized layer stores."""

from __future__ import annotations

STORAGES = ("pivoted", "two-factor")
NEGLIGIBLE_SAVING = 0.05  # `auto` drops the pivots where they save less than this share of two factors


def choose_storage(out_features: int, in_features: int, rank: int, storage: str) -> str:
    """Resolve `auto` for one layer: pivoted, unless its saving is negligible and two factors compress as well.

    Args:
        out_features: rows of the weight.
        in_features: columns of the weight.
        rank: `k`.
        storage: `auto`, or a storage that is returned as it is.

    Returns:
        `pivoted` or `two-factor`.
    """
    if storage != "auto":
        return storage
    pivoted = rank * (out_features + in_features - rank)
    two_factor = rank * (out_features + in_features)
    negligible = two_factor - pivoted < NEGLIGIBLE_SAVING * two_factor
    return "two-factor" if negligible and two_factor < out_features * in_features else "pivoted"


def factorized_parameters(out_features: int, in_features: int, rank: int, storage: str) -> int:
    """Return the numbers stored for a weight of the given rank, without its bias.

    `k (out + in)` for `two-factor` and `k (out + in − k)` for `pivoted` storage; `auto` is one of the two.

    Args:
        out_features: rows of the weight.
        in_features: columns of the weight.
        rank: `k`.
        storage: `pivoted`, `two-factor` or `auto`.

    Returns:
        The number of parameters.
    """
    saved = rank if choose_storage(out_features, in_features, rank, storage) == "pivoted" else 0
    return rank * (out_features + in_features - saved)


def break_even_rank(out_features: int, in_features: int, storage: str) -> int:
    """Return the largest rank that stores fewer numbers than the dense weight; 0 if there is none.

    The paper's compression condition `k < NM / (N + M)` for `two-factor`, and `k < min(N, M)` for `pivoted` and
    `auto` storage.

    Args:
        out_features: rows of the weight, `N`.
        in_features: columns of the weight, `M`.
        storage: `pivoted`, `two-factor` or `auto`.

    Returns:
        The largest compressing rank.
    """
    if storage != "two-factor":
        return min(out_features, in_features) - 1
    return (out_features * in_features - 1) // (out_features + in_features)
