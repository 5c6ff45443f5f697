"""Methods of the field as options, by the names that they were published under.

Each is a row of one factorization: a metric, how ranks are chosen, whether factors are refitted, how they are stored.
So methods differ here in what they are about, and in nothing else: the same damping, the same ranks to choose from.
What a method does besides (fine-tuning, above all) is in `differs`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..errors import ConfigurationError
from .values import suggestion


class Preset(NamedTuple):
    """A method.

    Attributes:
        options: the options that make it up.
        source: where it was published.
        differs: in what the row is not the published method.
    """

    options: dict[str, Any]
    source: str
    differs: str = ""


def _published(metric: str, **options: Any) -> dict[str, Any]:
    return {"metric": metric, "objective": "uniform", "refit": False, "storage": "two-factor", **options}


def _rounded(number_format: str) -> dict[str, Any]:
    return {"ranks": [], "formats": [number_format]}


CHOOSES, FIXED = "it chooses the size by itself", "its size is fixed"

PRESETS: dict[str, Preset] = {
    "default": Preset({}, "this package"),
    "no-refit": Preset({"refit": False}, "this package, without the refit"),
    "svd": Preset(_published("identity"), "Eckart & Young 1936; Denton et al. 2014, arXiv 1404.0736"),
    "fwsvd": Preset(
        _published("fisher"),
        "Hsu et al. 2022, arXiv 2207.00112",
        "the Fisher information of a row is that of its output under the model's own predictions, without the size of "
        "the inputs; no fine-tuning",
    ),
    "asvd": Preset(
        _published("activation-diagonal"),
        "Yuan et al. 2023, arXiv 2312.05821",
        "second moments of the channels instead of powers of their means; the same share of each layer",
    ),
    "drone": Preset(
        _published("activation"), "Chen et al. 2021, NeurIPS 34", "the same share of each layer; no fine-tuning"
    ),
    "afm": Preset(
        _published("activation"),
        "Yu & Wu 2023, AAAI 37 (atomic feature mimicking)",
        "features are not centred, so that no bias changes; the same share of each layer",
    ),
    "svd-llm": Preset(_published("activation"), "Wang et al. 2024, arXiv 2403.07378 (whitening alone)"),
    "aa-svd": Preset(
        _published("activation", refit=True),
        "SVD-LLM with its update; Dobi-SVD, AA-SVD: layers fitted to shifted inputs",
        "a ridge; errors of the residual stream made up for where the default does; heads fitted, too; no refinement "
        "of blocks",
    ),
    "pifa": Preset(
        _published("activation", storage="pivoted"),
        "Zhao et al. 2025, arXiv 2501.19090",
        "without its update",
    ),
    "mpifa": Preset(
        _published("activation", storage="pivoted", refit=True),
        "Zhao et al. 2025, arXiv 2501.19090",
        "as `aa-svd`",
    ),
    "kfac-svd": Preset(
        _published("kronecker"),
        "Kronecker-factored Fisher information on both sides, as in K-FAC: Martens & Grosse 2015, arXiv 1503.05671",
    ),
    "paper-lossless": Preset(
        {"objective": "paper-lossless"},
        "Zhang et al. 2024, arXiv 2412.06867, Algorithm 1",
        CHOOSES,
    ),
    "paper-compact": Preset(
        {"objective": "paper-compact"},
        "Zhang et al. 2024, arXiv 2412.06867, Algorithm 2",
        CHOOSES,
    ),
    "int8": Preset(_rounded("int8"), "dense weights in int8, one scale for each row", FIXED),
    "gptq-int4": Preset(_rounded("int4"), "Frantar et al. 2022, arXiv 2210.17323, in groups of 64", FIXED),
    "gptq-int3": Preset(_rounded("int3"), "Frantar et al. 2022, arXiv 2210.17323, in groups of 64", FIXED),
    "mixed": Preset({"formats": ["auto"]}, "this package: ranks and number formats on one path"),
}
"""Name of a method to the options that make it up."""

COMPARED_ONLY = (
    "separable",
    "tucker",
    "cp",
    "tensor-train",
    "aciq-int8",
    "basis-sharing",
    "rank-masks",
    "svd-fine-tuned",
    "lpaf",
)
"""Methods that no options make up; `hf_lossless_lr.baselines` has them."""


def preset(name: str) -> Preset:
    """Return a method by its name.

    Args:
        name: a key of `PRESETS`.

    Returns:
        The method.

    Raises:
        ConfigurationError: if there is none of that name.
    """
    known = (*PRESETS, *COMPARED_ONLY)
    if name not in known:  # it may be no string
        listed = ", ".join(known)
        raise ConfigurationError(f"there is no method {name!r}; choose one of {listed}.{suggestion(name, known)}")
    if name in COMPARED_ONLY:
        raise ConfigurationError(
            f"no options make up the method {name!r}, so it is no configuration. It can be compared with others: by "
            "`hf-lossless-lr compare`, or hf_lossless_lr.baselines.compare."
        )
    return PRESETS[name]
