"""The methods that can be compared: those that options make up, and those that have layers of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from ..checkpoint import PRESETS, LosslessLowRankConfig
from .clipping import clipped
from .kernels import cp, decomposed, separable, tensor_train, tucker


class Baseline(NamedTuple):
    """A method that is no configuration.

    Attributes:
        layers: from dense layers by name, and the share to keep, to what takes their places.
        source: where it was published.
        differs: in what it is not the published method.
        like: the preset that is calibrated as it is, with the same layers, data and margins.
    """

    layers: Callable[[Mapping[str, nn.Module], float], Mapping[str, nn.Module]]
    source: str
    differs: str
    like: str = "svd"


ALL = "the same share of each layer; no fine-tuning"

BASELINES = {
    "separable": Baseline(partial(decomposed, kernels=separable), "Tai et al. 2016, arXiv 1511.06067", ALL),
    "tucker": Baseline(
        partial(decomposed, kernels=tucker),
        "Kim et al. 2016, arXiv 1511.06530",
        f"{ALL}; both ranks the same share of their channels, not those of variational Bayes",
    ),
    "cp": Baseline(
        partial(decomposed, kernels=cp),
        "Lebedev et al. 2015, arXiv 1412.6553",
        f"{ALL}; alternating least squares, not non-linear ones",
    ),
    "tensor-train": Baseline(
        partial(decomposed, kernels=tensor_train),
        "Oseledets 2011, SIAM J. Sci. Comput. 33",
        f"{ALL}; the ranks the same share of their largest",
    ),
    "aciq-int8": Baseline(
        clipped,
        "Banner et al. 2018, arXiv 1810.05723",
        "weights alone; the same number of bits in each channel, and no correction of its mean; its size is fixed",
        like="int8",
    ),
}
"""Name of a method to how it makes layers."""

METHODS = {name: method.source for name, method in PRESETS.items()} | {
    name: method.source for name, method in BASELINES.items()
}
"""Name of each method that can be compared to where it was published."""


def method_config(name: str, **changes: Any) -> LosslessLowRankConfig:
    """Return the configuration that a method is compared with.

    A method that is none is calibrated like one that is, so that it gets the same layers, data and margins.

    Args:
        name: a key of `METHODS`.
        changes: options besides.

    Returns:
        The configuration.

    Raises:
        ConfigurationError: if there is no such method, or a value contradicts it.
    """
    return LosslessLowRankConfig.from_preset(BASELINES[name].like if name in BASELINES else name, **changes)
