"""How many numbers a factorized layer stores."""

from __future__ import annotations

from ..formats import FLOAT, FORMATS

CHANNEL, SPATIAL = FORMS = ("channel", "spatial")
"""Which matrix of a kernel is factorized: `(out, in * kh * kw)`, or `(out * kw, in * kh)`; a plain weight has one."""

DIMENSIONS = "dimensions"
"""A form that the two layers around the contexts of attention take together: fewer dimensions between them."""

PERMUTATION_BYTES = 4  # for each output, or input
STORAGES = ("pivoted", "two-factor")
STORAGE_CHOICES = ("auto", "fastest", *STORAGES)
NEGLIGIBLE_SAVING = 0.05  # `auto` drops the pivots where they save less than this share of two factors
MOVED_NUMBER = 64  # multiply-adds that take as long as moving a number to its place: studies/storage_time.py


def storage_in(number_format: str, storage: str) -> str:
    """Return a storage, or how it is chosen, as it is possible in a number format: some do not go with pivots."""
    return storage if number_format == FLOAT or FORMATS[number_format].pivots else "two-factor"


def choose_storage(out_features: int, in_features: int, rank: int, storage: str) -> str:
    """Resolve `auto` and `fastest` for one layer: pivoted, unless that does not pay and two factors compress as well.

    For each row of the input, pivots save `k²` multiply-adds of two factors, and move the numbers of the narrower
    side to their places. `auto` takes them where they save parameters, `fastest` where they save time.

    Args:
        out_features: rows of the weight.
        in_features: columns of the weight.
        rank: `k`.
        storage: `auto`, `fastest`, or a storage that is returned as it is.

    Returns:
        `pivoted` or `two-factor`.
    """
    if storage in STORAGES:
        return storage
    two_factor = rank * (out_features + in_features)
    if storage == "fastest":
        pays = rank**2 >= MOVED_NUMBER * min(out_features, in_features)
    else:
        pays = rank**2 >= NEGLIGIBLE_SAVING * two_factor
    return "pivoted" if pays or two_factor >= out_features * in_features else "two-factor"


def factorized_parameters(out_features: int, in_features: int, rank: int, storage: str) -> int:
    """Return the numbers stored for a weight of the given rank, without its bias.

    `k (out + in)` for `two-factor` and `k (out + in − k)` for `pivoted` storage; others choose one of the two.

    Args:
        out_features: rows of the weight.
        in_features: columns of the weight.
        rank: `k`.
        storage: one of `STORAGE_CHOICES`.

    Returns:
        The number of parameters.
    """
    saved = rank if choose_storage(out_features, in_features, rank, storage) == "pivoted" else 0
    return rank * (out_features + in_features - saved)


def break_even_rank(out_features: int, in_features: int, storage: str) -> int:
    """Return the largest rank that stores fewer numbers than the dense weight; 0 if there is none.

    The paper's compression condition `k < NM / (N + M)` for `two-factor`, and `k < min(N, M)` for the
    others.

    Args:
        out_features: rows of the weight, `N`.
        in_features: columns of the weight, `M`.
        storage: one of `STORAGE_CHOICES`.

    Returns:
        The largest compressing rank.
    """
    if storage != "two-factor":
        return min(out_features, in_features) - 1
    return (out_features * in_features - 1) // (out_features + in_features)


def matrix_bytes(rows: int, columns: int, number_format: str, itemsize: int) -> int:
    """Return the bytes of a matrix in a number format; `itemsize` is that of a number in `float`."""
    if number_format == FLOAT:
        return rows * columns * itemsize
    return FORMATS[number_format].stored_bytes(rows, columns)


def weight_bytes(
    out_features: int,
    in_features: int,
    rank: int | None,
    storage: str,
    number_format: str,
    itemsize: int,
    pivots_inputs: bool,
    width: int = 1,
) -> int:
    """Return the bytes that a checkpoint holds of a weight: factors, scales, permutation; no bias and no guard.

    Args:
        out_features: rows of the weight.
        in_features: columns of the weight.
        rank: its rank, or None where it is dense.
        storage: one of `STORAGE_CHOICES`.
        number_format: `float` or a key of `FORMATS`.
        itemsize: bytes of a number in `float`.
        pivots_inputs: whether pivots, where there are any, are inputs rather than outputs.
        width: rows of the weight that are one row of `up`: the width of a kernel in its spatial form.

    Returns:
        The bytes.
    """
    if rank is None:
        return matrix_bytes(out_features, in_features, number_format, itemsize)
    stored = choose_storage(out_features, in_features, rank, storage_in(number_format, storage))
    pivots = rank if stored == "pivoted" else 0
    down = matrix_bytes(rank, in_features - pivots * pivots_inputs, number_format, itemsize)
    up = matrix_bytes(out_features // width - pivots * (not pivots_inputs), rank * width, number_format, itemsize)
    return down + up + (PERMUTATION_BYTES * (in_features if pivots_inputs else out_features) if pivots else 0)
