"""The methods that can be compared: those that options make up, and those that have layers of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from ..checkpoint import PRESETS, LosslessLowRankConfig
from ..errors import ConfigurationError
from .clipping import clipped
from .fine_tuning import svd_fine_tuned
from .kernels import cp, decomposed, separable, tensor_train, tucker
from .lpaf import lpaf
from .rank_masks import masked_ranks
from .sharing import shared_bases


class Baseline(NamedTuple):
    """A method that is no configuration.

    Attributes:
        layers: from dense layers by name, and the share to keep, to what takes their places.
        source: where it was published.
        differs: in what it is not the published method.
        like: the preset that is calibrated as it is, with the same layers, data and margins.
        trains: whether `layers` takes the model and data, too, as `model` and `data`, and may give back other layers
            than the targets.
        labelled: whether that data needs labels.
        reads: whether `layers` takes the calibration's statistics, too, as `statistics`.
    """

    layers: Callable[..., Mapping[str, nn.Module]]
    source: str
    differs: str
    like: str = "svd"
    trains: bool = False
    labelled: bool = False
    reads: bool = False


ALL = "the same share of each layer; no fine-tuning"

BASELINES = {
    "separable": Baseline(partial(decomposed, kernels=separable), "Tai et al. 2016, arXiv 1511.06067", ALL),
    "tucker": Baseline(
        partial(decomposed, kernels=tucker),
        "Kim et al. 2016, arXiv 1511.06530",
        f"{ALL}; in it the ranks that discard the least, not those of variational Bayes",
    ),
    "cp": Baseline(
        partial(decomposed, kernels=cp),
        "Lebedev et al. 2015, arXiv 1412.6553",
        f"{ALL}; alternating least squares, not non-linear ones",
    ),
    "tensor-train": Baseline(
        partial(decomposed, kernels=tensor_train),
        "Oseledets 2011, SIAM J. Sci. Comput. 33",
        f"{ALL}; in it the ranks that discard the least",
    ),
    "aciq-int8": Baseline(
        clipped,
        "Banner et al. 2018, arXiv 1810.05723",
        "weights alone; the same number of bits in each channel, and no correction of its mean; its size is fixed",
        like="int8",
    ),
    "basis-sharing": Baseline(
        shared_bases,
        "Wang et al. 2024, arXiv 2410.03765",
        "two blocks share a basis; the same share of each group; without its update of later layers",
        reads=True,
    ),
    "rank-masks": Baseline(
        masked_ranks,
        "Sundrani et al. 2025, arXiv 2512.13733",
        "a budget that sinks in place of a penalty; no term for smooth masks; factors of SVD-LLM, not ASVD; trained "
        "on the calibration data alone",
        trains=True,
        reads=True,
    ),
    "svd-fine-tuned": Baseline(
        svd_fine_tuned,
        "the truncated SVD, and fine-tuning after it",
        "the same share of each layer; fine-tuned on the calibration data alone",
        trains=True,
        labelled=True,
    ),
    "lpaf": Baseline(
        lpaf,
        "Ren & Zhu 2023, arXiv 2306.14152",
        "trained on the calibration data alone; the same share of each matrix is pruned, its rows count by what is "
        "left of them, and pruned matrices stand still while factors are tuned",
        trains=True,
        labelled=True,
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
    if name in BASELINES and BASELINES[name].labelled and changes.get("labels") == "model":
        raise ConfigurationError(
            f"the method {name!r} fine-tunes on labelled data, and labels='model' has none of its own. Pass labelled "
            "data and labels='data', or leave the method out."
        )
    return LosslessLowRankConfig.from_preset(BASELINES[name].like if name in BASELINES else name, **changes)
