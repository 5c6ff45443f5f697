"""`CompressionOptions`: what the user chooses."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigurationError
from ..factors import METRICS
from ..formats import FLOAT, FORMATS
from ..layers import CHANNEL, DIMENSIONS, FORMS, STORAGE_CHOICES
from ..ranks import OBJECTIVES
from ..renamed import Renamed
from .values import check_choice, check_number, checked_patterns, refuse_unknown_names

SIZES = ("parameters", "bytes", "flops", "latency")
AUTO = "auto"
LABELS = ("data", "model")
SCOPES = ("targeted", "model")
DEFAULT_KEEP_RATIO = 0.5
FORM_CHOICES = (*FORMS, DIMENSIONS)
DEFAULT_OBJECTIVE, GIVEN = "budget", "ranks"
DEFAULT_SELECTION = 1 / 16  # for judging a refit, where that is enough examples to judge it
FEWEST_JUDGES = 16  # examples of a selection split that may judge a refit; below, one outlier decides
NUMBER_FORMATS = (FLOAT, *FORMATS)
MEASURED_OBJECTIVES = tuple(name for name, objective in OBJECTIVES.items() if objective.search is not None)


def _option(default: Any, text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class CompressionOptions(Renamed):
    """The choices of a compression run; `LosslessLowRankConfig` adds the record of what was done.

    Attributes:
        objective: what to aim for. `budget`: lowest predicted loss at `keep_ratio`. `uniform`: `keep_ratio` in each
            layer. `lossless`: lowest measured loss among models that compress. `compact`: the smallest model whose
            measured loss and accuracy are not inferior, by upper confidence bounds within `loss_margin` and
            `accuracy_margin`. `paper-lossless`, `paper-compact`: Algorithms 1 and 2 of arXiv 2412.06867. `ranks`:
            those that `ranks` gives.
        keep_ratio: size kept divided by original size, in (0, 1]; for `budget` and `uniform` only (default 0.5 there).
        ranks: ranks that are given, as `{"query": 64}` or `["query=64"]`: a pattern of layers, as in `target_modules`
            (of several the most specific counts), and their rank. Other layers stay dense. They are kept in the
            second way, and make the objective `ranks`.
        size: what `keep_ratio` counts: `parameters`, `bytes` in a checkpoint relative to those of the model as it was
            given, `flops` of a calibration batch, or its `latency`, measured on the model's device. Default: `bytes`
            with number formats other than `float`, else `parameters`.
        scope: whether the size is that of the `targeted` weights or of the whole `model`.
        metric: metric of the factorization (default `kronecker`, and `identity` for the paper's objectives).
        target_modules: patterns of layers to factorize; None means every projection and convolution of the base model.
            A pattern is an exact name (or the end of one), `re:` and a regular expression, a glob, or a layer type
            such as `Linear`.
        ignore: patterns of layers to leave dense.
        damping: relative damping of the second moments, at least 0.
        storage: `pivoted`, `two-factor`, `fastest` (pivoted only where that saves more time than it costs), or `auto`
            (the smaller, unless what it saves is negligible; with `size="latency"` the fastest). Factors of fewer
            than 8 bits are always two.
        formats: number formats that a layer, dense or factorized, may be stored in: `float` (as it was given), `int8`
            (one scale for each row), `int6` to `int3` (a scale and a zero for each group of 64 in a row), or `auto`
            for all of them. The weights in memory are what the stored numbers stand for.
        forms: which matrices of a convolution's kernel may be factorized: `channel`, a convolution to fewer channels
            and then a pointwise one, or `spatial`, `kh × 1` and then `1 × kw`. Default: both with the metric
            `kronecker`, and `channel` for other metrics, which have no spatial form, and for the paper's objectives.
            `dimensions` besides: fewer of them between the values and the output of attention.
        embeddings: number format of the embeddings, and of what shares their weights.
        rank_multiple: ranks that are chosen are multiples of this; given ones are what they are. Default: what the
            device multiplies well, 8 on a CPU and 64 on others, or the largest power of two that leaves 32 ranks to
            choose from.
        refit: whether to fit each layer's factors to the inputs that it gets in the compressed model. Default: with
            the metric `kronecker`, except for the paper's objectives; `activation` has it, too.
        selection_fraction: share of the calibration examples kept apart, to measure whether the refit helps and which
            model to choose. Default: 1/2 for `lossless` and `compact`, which choose by measurement, 1/16 for other
            objectives with a refit where that is 16 examples or more, else none.
        max_examples: examples to take from `calib_dataset`, from the start, and from other data that are a
            stream; None for all. A stream without an end needs it.
        labels: `data`, or `model` for labels that are drawn from the dense model's predictions, for data without any:
            the loss increase is then an estimate of the divergence from them. An `eval_dataset` that has labels
            keeps them. A model without a head is compared by its representations.
        seed: seed of the splits, and of those labels.
        batch_size: examples per forward pass.
        loss_margin: largest acceptable loss increase, in nats per labelled unit.
        accuracy_margin: largest acceptable drop of the accuracy, as a fraction (0.01 is one point).
        confidence: confidence level of one-sided bounds, in (0.5, 1).
        epsilon: elementwise noise bound of the paper's objectives; None calibrates it by eq. 8 of the paper.
        epsilon_tolerance: gap between measured and first-order loss change that eq. 8 accepts, in nats.
    """

    objective: str = _option(DEFAULT_OBJECTIVE, "what to aim for", choices=tuple(OBJECTIVES))
    keep_ratio: float | None = _option(
        None,
        f"share of the size to keep, in (0, 1]; default {DEFAULT_KEEP_RATIO} for budget and uniform",
    )
    ranks: list[str] | None = _option(None, "ranks that are given, as PATTERN=RANK; other layers stay dense")
    size: str | None = _option(
        None, "what keep_ratio counts; default bytes with --formats, else parameters", choices=SIZES
    )
    scope: str = _option("targeted", "what keep_ratio is a share of: targeted weights or whole model", choices=SCOPES)
    metric: str | None = _option(None, "metric of the factorization; default kronecker", choices=tuple(METRICS))
    target_modules: list[str] | None = _option(
        None, "layers to factorize: names, re:regex, globs or types; default all projections and convolutions"
    )
    ignore: list[str] | None = _option(None, "layers to leave dense, same patterns")
    damping: float = _option(0.03, "relative damping of the second moments")
    storage: str = _option("auto", "how factors are stored", choices=STORAGE_CHOICES)
    formats: list[str] | None = _option(
        None, "number formats that layers may be stored in; default float", choices=(*NUMBER_FORMATS, AUTO)
    )
    forms: list[str] | None = _option(
        None,
        "forms of a convolution's kernel: channel, spatial; both by default; dimensions: fewer in attention",
        choices=FORM_CHOICES,
    )
    embeddings: str = _option(FLOAT, "number format of the embeddings", choices=NUMBER_FORMATS)
    rank_multiple: int | None = _option(
        None, "multiple that ranks are taken from; default 8 on a CPU and 64 on others, less for narrow layers"
    )
    refit: bool | None = _option(
        None, "true or false: fit factors to the inputs they get in the end; default with kronecker"
    )
    selection_fraction: float | None = _option(
        None,
        "share of the calibration data kept apart to choose by measurement; default 1/16, or 1/2 for the "
        "objectives lossless and compact",
    )
    max_examples: int | None = _option(
        None, "examples to take from the calibration data, and from streams; default all"
    )
    labels: str = _option("data", "where labels come from; model: drawn from the dense model", choices=LABELS)
    seed: int = _option(0, "seed of the held-out split, and of drawn labels")
    batch_size: int = _option(32, "examples per forward pass")
    loss_margin: float = _option(0.01, "largest acceptable loss increase in nats")
    accuracy_margin: float = _option(0.01, "largest acceptable drop of the accuracy, as a fraction")
    confidence: float = _option(0.95, "confidence level of one-sided bounds")
    epsilon: float | None = _option(None, "elementwise noise bound of the paper's objectives; default: eq. 8")
    epsilon_tolerance: float = _option(1e-4, "gap in nats that eq. 8 of the paper accepts")

    def __new__(cls, *values: Any, **options: Any) -> CompressionOptions:
        """Refuse old and unknown names of options before the constructor sees them."""
        refuse_unknown_names(cls, options)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Validate every value and resolve the defaults that depend on the objective."""
        check_choice("objective", self.objective, OBJECTIVES)
        self._resolve_ranks()
        objective = OBJECTIVES[self.objective]
        paper = objective.needs_noise
        if self.metric is None:
            self.metric = objective.default_metric
        check_choice("metric", self.metric, METRICS)
        self._resolve_formats(paper)
        self._resolve_forms(paper)
        check_choice("size", self.size, SIZES)
        check_choice("scope", self.scope, SCOPES)
        check_choice("labels", self.labels, LABELS)
        check_choice("storage", self.storage, STORAGE_CHOICES)
        if objective.sized:
            self.keep_ratio = DEFAULT_KEEP_RATIO if self.keep_ratio is None else self.keep_ratio
            check_number("keep_ratio", self.keep_ratio, 0, 1, "(0, 1]", exclude_low=True)
        elif self.keep_ratio is not None:
            raise ConfigurationError(
                f"keep_ratio={self.keep_ratio!r} contradicts objective={self.objective!r}, which chooses the size by "
                "itself; leave keep_ratio out, or use objective='budget' or 'uniform'."
            )
        if paper and self.metric != "identity":
            raise ConfigurationError(
                f"metric={self.metric!r} contradicts objective={self.objective!r}: the paper's algorithms use "
                "metric='identity'."
            )
        if self.epsilon is not None:
            check_number("epsilon", self.epsilon, 0, math.inf, "(0, inf)", exclude_low=True)
            if not paper:
                raise ConfigurationError(
                    f"epsilon={self.epsilon!r} contradicts objective={self.objective!r}: it is used by "
                    "'paper-lossless' and 'paper-compact' only."
                )
        self._resolve_refit(paper)
        self._check_numbers()
        self.target_modules = checked_patterns("target_modules", self.target_modules)
        self.ignore = checked_patterns("ignore", self.ignore)

    @property
    def fewest_selected(self) -> int:
        """Examples that a selection split is made for at least: where it is there by default, to judge a refit."""
        return FEWEST_JUDGES if self.selection_fraction == DEFAULT_SELECTION else 1

    @property
    def given_ranks(self) -> dict[str, int]:
        """The ranks that are given, by pattern."""
        pairs = (entry.rpartition("=") for entry in self.ranks or ())
        return {pattern: int(rank) for pattern, _, rank in pairs}

    def _resolve_ranks(self) -> None:
        given: Any = self.ranks
        if given is None:
            if self.objective == GIVEN:
                raise ConfigurationError("objective='ranks' takes the ranks of layers: ranks={'query': 64}.")
            return
        given = [f"{pattern}={rank}" for pattern, rank in given.items()] if isinstance(given, Mapping) else given
        entries = [given] if isinstance(given, str) else given
        if not isinstance(entries, (list, tuple)) or not all(re.fullmatch(r".+=[1-9]\d*", str(e)) for e in entries):
            raise ConfigurationError(
                f"ranks: must map patterns of layers to whole numbers above 0, as {{'query': 64}}, got {self.ranks!r}."
            )
        twice = [p for p, n in Counter(str(entry).rpartition("=")[0] for entry in entries).items() if n > 1]
        if twice:
            raise ConfigurationError(f"ranks: {twice[0]!r} is given twice, got {self.ranks!r}.")
        if self.objective not in (DEFAULT_OBJECTIVE, GIVEN):
            raise ConfigurationError(
                f"ranks contradicts objective={self.objective!r}, which chooses them; leave one of them out."
            )
        self.ranks, self.objective = list(map(str, entries)), GIVEN

    def _resolve_formats(self, paper: bool) -> None:
        names = [FLOAT] if self.formats is None else checked_patterns("formats", self.formats, "format") or []
        names = list(NUMBER_FORMATS) if names == [AUTO] else names
        if AUTO in names:
            raise ConfigurationError(f"formats: {AUTO!r} means all of them, and stands alone; got {names!r}.")
        for name in names:
            check_choice("formats", name, NUMBER_FORMATS)
        self.formats = [name for name in NUMBER_FORMATS if name in names]  # finest first
        check_choice("embeddings", self.embeddings, NUMBER_FORMATS)
        if paper and self.embeddings != FLOAT:
            raise ConfigurationError(
                f"embeddings={self.embeddings!r} contradicts objective={self.objective!r}: the paper's algorithms "
                "choose ranks alone."
            )
        rounds = self.formats != [FLOAT]
        self.size = ("bytes" if rounds else "parameters") if self.size is None else self.size
        if not rounds:
            return
        if paper:
            raise ConfigurationError(
                f"formats={self.formats!r} contradicts objective={self.objective!r}: the paper's algorithms choose "
                "ranks alone."
            )
        if self.size != "bytes":
            raise ConfigurationError(
                f"size={self.size!r} contradicts formats={self.formats!r}: number formats make a difference in bytes "
                "only; use size='bytes'."
            )
        without_pivots = [name for name in self.formats if name != FLOAT and not FORMATS[name].pivots]
        if self.storage == "pivoted" and without_pivots:
            raise ConfigurationError(
                f"storage='pivoted' contradicts the format {without_pivots[0]!r}: with so few bits, the errors of "
                "pivots pass into all other outputs. Use storage='auto' or 'two-factor'."
            )

    def _resolve_forms(self, paper: bool) -> None:
        possible = self.metric == "kronecker" and not paper
        names = checked_patterns("forms", self.forms, "form") or (list(FORMS) if possible else [CHANNEL])
        for name in names:
            check_choice("forms", name, FORM_CHOICES)
        self.forms = [name for name in FORM_CHOICES if name in names]
        if DIMENSIONS in self.forms and (self.objective != DEFAULT_OBJECTIVE or self.size == "latency"):
            raise ConfigurationError(
                f"forms={self.forms!r} contradicts objective={self.objective!r}, size={self.size!r}: fewer dimensions "
                "of attention are chosen by objective='budget', in other sizes than latency."
            )
        if CHANNEL not in self.forms:
            raise ConfigurationError("forms: 'channel' must be among them; it is the only form of a pointwise kernel.")
        if len(self.forms) > 1 and not possible:
            raise ConfigurationError(
                f"forms={self.forms!r} contradicts metric={self.metric!r}, objective={self.objective!r}: the spatial "
                "form needs metric='kronecker' and none of the paper's objectives."
            )

    def _resolve_refit(self, paper: bool) -> None:
        if self.refit is not None and not isinstance(self.refit, bool):
            raise ConfigurationError(f"refit: must be True, False or None, got {self.refit!r}.")
        if self.refit is None:
            self.refit = self.metric == "kronecker" and not paper
        if self.refit and (self.metric not in ("kronecker", "activation") or paper):
            raise ConfigurationError(
                f"refit=True contradicts metric={self.metric!r}, objective={self.objective!r}: it needs "
                "metric='kronecker' or 'activation', and none of the paper's objectives."
            )
        measured = self.objective in MEASURED_OBJECTIVES
        if self.selection_fraction is None:
            self.selection_fraction = 0.5 if measured else DEFAULT_SELECTION if self.refit else 0.0
        check_number("selection_fraction", self.selection_fraction, 0, 1, "[0, 1)", exclude_high=True)
        if measured and not self.selection_fraction:
            raise ConfigurationError(
                f"selection_fraction=0 contradicts objective={self.objective!r}, which chooses by measurement."
            )

    def _check_numbers(self) -> None:
        check_number("damping", self.damping, 0, math.inf, "[0, inf)")
        check_number("loss_margin", self.loss_margin, 0, math.inf, "[0, inf)")
        check_number("accuracy_margin", self.accuracy_margin, 0, 1, "[0, 1]")
        check_number("confidence", self.confidence, 0.5, 1, "(0.5, 1)", exclude_low=True, exclude_high=True)
        check_number("epsilon_tolerance", self.epsilon_tolerance, 0, math.inf, "(0, inf)", exclude_low=True)
        for name in ("rank_multiple", "batch_size", "seed", "max_examples"):
            value, low = getattr(self, name), 0 if name == "seed" else 1
            if name in ("rank_multiple", "max_examples") and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigurationError(f"{name}: must be an integer of at least {low}, got {value!r}.")
