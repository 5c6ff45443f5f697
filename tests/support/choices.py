"""Choices of a rank for each layer, all in floating point, as plain ranks."""

from collections.abc import Mapping

from hf_lossless_lr.ranks import select
from hf_lossless_lr.ranks.path import CompressionPath
from hf_lossless_lr.ranks.sizes import Choice, Choices

Ranks = dict[str, int | None]


def ranks_of(choices: Mapping[str, Choice]) -> Ranks:
    assert all(choice.format == "float" for choice in choices.values())
    return {name: choice.rank for name, choice in choices.items()}


def choices_of(ranks: Mapping[str, int | None]) -> Choices:
    return {name: Choice(rank) for name, rank in ranks.items()}


def ranks_after(path: CompressionPath, count: int) -> Ranks:
    return ranks_of(path.choices_after(count))


def select_budget(*args, **options) -> Ranks:
    return ranks_of(select.select_budget(*args, **options))


def select_uniform(*args, **options) -> Ranks:
    return ranks_of(select.select_uniform(*args, **options))


def kept_parameters(curves, ranks: Ranks) -> int:
    return select.kept_parameters(curves, choices_of(ranks))
