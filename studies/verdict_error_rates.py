"""Count how often a certificate is wrong, and how often it succeeds, where the true difference is known.

    python studies/verdict_error_rates.py --testbed FOLDER --outcomes FILE.npz --plot FILE.png \
        --records studies/results/verdict_error_rates.jsonl
    python studies/verdict_error_rates.py --records studies/results/verdict_error_rates.jsonl

The answers of real pairs of a dense and a compressed model are taken as a population. Data sets are drawn from it with
replacement, after a shift that puts the true difference at a chosen multiple of the margin: a constant added to the
loss of each example, or other probabilities for examples whose answer was lost or gained. `lossless` is wrong where
the true difference is the margin or more. The answers are kept in the file of `--outcomes`; with it, later runs need
no models. Without both, the tables and the plot are those of the records as they are.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from accelerate import Accelerator
from compare_methods import TASKS
from records import Record, read_records, write_records
from scipy.special import ndtr, ndtri
from scipy.stats import t as student
from transformers.utils import logging

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor, PairedOutcomes, certify, paired_outcomes
from hf_lossless_lr.data import make_dataloader
from hf_lossless_lr.verdict import CERTIFIED, MIN_EXAMPLES, at_fitted_temperatures, examples_needed, proportion_p_value

CASES = {"minilm-sst2": (0.5, 0.35), "swin-mnist": (0.2, 0.1), "llama-small": (0.5,)}
CONFIDENCE = 0.95
MARGIN = 0.01  # nats per unit, and as a fraction of the answers
SHARES = (0.0, 0.5, 1.0, 1.5)  # true differences, as multiples of the margin
SIZES = (30, 100, 300, 1000, 3000)  # examples
REPLICATIONS = 10_000  # of the bounds that are formulas, and of all at the margin but BCa alone; half of it at 3,000
BOOTSTRAPS = {30: 1000, 100: 1000, 300: 600, 1000: 300, 3000: 100}  # examples to replications of the BCa bootstrap
RESAMPLES = 999  # of each BCa bootstrap, in the whole verdict, too; the package takes 9,999
VERDICTS = {300: 300, 1000: 150}  # examples to replications of the whole verdict
CURVE = (50, 100, 200, 300, 500, 1000, 2000, 3000, 5000)  # examples of the power curves
CURVE_REPLICATIONS = 2000
DRAWN_VALUES = 4_000_000  # values held at a time

Bound = Callable[[np.ndarray, np.ndarray], np.ndarray]  # differences, units (replications, clusters) to upper bounds


def t_bound(differences: np.ndarray, units: np.ndarray) -> np.ndarray:
    """`bounds.mean_upper_bound` of each row."""
    count, total = differences.shape[-1], units.sum(-1)
    mean = differences.sum(-1) / total
    spread = ((differences - mean[..., None] * units) ** 2).sum(-1)
    return mean + student.ppf(CONFIDENCE, count - 1) * np.sqrt(count / (count - 1) * spread) / total


def bca_bound(
    differences: np.ndarray, units: np.ndarray, generator: np.random.Generator, resamples: int = RESAMPLES
) -> np.ndarray:
    """`bounds.bootstrap_upper_bound` of each row, with the leave-one-out values in closed form, which is faster."""
    return np.array([_bca(*row, generator, resamples) for row in zip(differences, units, strict=True)])


def _bca(differences: np.ndarray, units: np.ndarray, generator: np.random.Generator, resamples: int) -> float:
    count, total, sizes = len(units), differences.sum(), units.sum()
    drawn = generator.integers(0, count, (resamples, count))
    same = bool((units == units[0]).all())
    means = np.sort(differences[drawn].sum(1) / (sizes if same else units[drawn].sum(1)))
    observed = total / sizes
    below, upto = np.searchsorted(means, observed, "left"), np.searchsorted(means, observed, "right")
    bias = ndtri((below + upto) / (2 * resamples))
    left_out = (total - differences) / (sizes - units)
    influence = left_out.mean() - left_out
    with np.errstate(all="ignore"):
        acceleration = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
        shifted = bias + ndtri(CONFIDENCE)
        level = ndtr(bias + shifted / (1 - acceleration * shifted))
    return float(np.quantile(means, level)) if np.isfinite(level) and np.isfinite(bias) else max(observed, means[-1])


def worst_twice_bound(differences: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Student's t with the cluster of the largest increase counted twice: a stricter rule, for comparison."""
    mean = differences.sum(-1, keepdims=True) / units.sum(-1, keepdims=True)
    worst = (differences - mean * units).argmax(-1, keepdims=True)
    twice = [np.concatenate([x, np.take_along_axis(x, worst, -1)], -1) for x in (differences, units)]
    return t_bound(*twice)


def share_and_count(bounds: np.ndarray, share: float) -> tuple[float, int]:
    """Share of bounds inside the margin at a true difference, from bounds at a true difference of 0; and how many."""
    return float((bounds + share * MARGIN <= MARGIN).mean()), len(bounds)


def draw_bounds(
    differences: np.ndarray,
    units: np.ndarray,
    examples: int,
    replications: int,
    bounds: dict[str, Bound],
    generator: np.random.Generator,
) -> dict[str, np.ndarray]:
    """Draw data sets from a population whose true difference is 0, and return each bound of each of them."""
    centred = differences - differences.sum() / units.sum() * units
    found: dict[str, list[np.ndarray]] = {name: [] for name in bounds}
    for start in range(0, replications, chunk := max(DRAWN_VALUES // examples, 1)):
        drawn = generator.integers(0, len(units), (min(chunk, replications - start), examples))
        sample = centred[drawn], units[drawn]
        for name, bound in bounds.items():
            found[name].append(bound(*sample))
    return {name: np.concatenate(values) for name, values in found.items()}


def loss_rates(
    differences: np.ndarray, units: np.ndarray, sizes: Sequence[int], generator: np.random.Generator
) -> list[dict[str, Any]]:
    """Shares certified for differences of means, by rule and number of examples."""

    def wider_at_margin(differences: np.ndarray, units: np.ndarray) -> np.ndarray:
        # The wider bound is inside a margin only where t is: beyond the margin few bootstraps decide.
        bounds = t_bound(differences, units)
        inside = bounds <= 0
        if inside.any():
            bounds[inside] = np.maximum(bounds[inside], bca_bound(differences[inside], units[inside], generator))
        return bounds

    records = []
    formulas = {"t": t_bound, "t, worst twice": worst_twice_bound, "wider": wider_at_margin}
    both = {"t": t_bound, "BCa": partial(bca_bound, generator=generator)}
    deviation = float(np.std(differences - differences.sum() / units.sum() * units, ddof=1) / units.mean())
    for examples in sizes:
        replications = REPLICATIONS if examples < 3000 else REPLICATIONS // 2
        found = draw_bounds(differences, units, examples, replications, formulas, generator)
        pair = draw_bounds(differences, units, examples, BOOTSTRAPS[examples], both, generator)
        wider = np.maximum(pair["t"], pair["BCa"])
        predicted = power(examples, deviation, deviation)
        for rule, few, many in (
            ("t", found["t"], found["t"]),
            ("BCa", pair["BCa"], pair["BCa"]),
            ("wider of t and BCa", wider, found["wider"]),
            ("t, worst twice", found["t, worst twice"], found["t, worst twice"]),
        ):
            rates = {str(share): share_and_count(few if share < 1 else many, share) for share in SHARES}
            records.append(_record(examples, rule, rates, predicted))
    return records


def accuracy_rates(
    lost: float, gained: float, sizes: Sequence[int], generator: np.random.Generator, replications: int = REPLICATIONS
) -> list[dict[str, Any]]:
    """Shares certified for a drop of the accuracy, of one answer an example, given the shares of changed answers."""
    records, deviations = [], answer_deviations(lost + gained)
    for examples in sizes:
        shares: dict[str, dict[str, tuple[float, int]]] = {"Tango": {}, "t": {}}
        for share in SHARES:
            drop = share * MARGIN
            changed = max(lost + gained, drop)
            chances = ((changed + drop) / 2, (changed - drop) / 2, 1 - changed)
            tables, counts = np.unique(
                generator.multinomial(examples, chances, replications)[:, :2], axis=0, return_counts=True
            )
            p_values = [proportion_p_value(*map(int, table), examples, MARGIN) for table in tables]
            shown = np.array(p_values) <= 1 - CONFIDENCE
            shares["Tango"][str(share)] = float(counts[shown].sum() / replications), replications
            mean = (tables[:, 0] - tables[:, 1]) / examples
            error = np.sqrt((tables.sum(1) / examples - mean**2) / (examples - 1))
            inside = mean + student.ppf(CONFIDENCE, examples - 1) * error <= MARGIN
            shares["t"][str(share)] = float(counts[inside].sum() / replications), replications
        predicted = power(examples, *deviations)
        records += [_record(examples, rule, rates, predicted) for rule, rates in shares.items()]
    return records


def answer_deviations(changed: float) -> tuple[float, float]:
    """Deviation of the drop of one example if the accuracy does not drop: as it is, and as Tango's test takes it.

    The test takes the most likely share of gained answers at the margin, the larger root of a quadratic.
    """
    linear = 2 * MARGIN - changed
    gained = (np.sqrt(linear**2 + 4 * changed * MARGIN * (1 - MARGIN)) - linear) / 4
    return float(np.sqrt(changed)), float(np.sqrt(2 * gained + MARGIN * (1 - MARGIN)))


def power(examples: int | np.ndarray, deviation: float, assumed: float) -> Any:
    """Probability of a verdict at a true difference of 0, if the test assumes another deviation than the true one."""
    return ndtr((MARGIN * np.sqrt(examples) - ndtri(CONFIDENCE) * assumed) / deviation)


def _record(examples: int, rule: str, rates: dict[str, tuple[float, int]], predicted: float) -> dict[str, Any]:
    return {
        "examples": examples,
        "rule": rule,
        "certified": {share: rate for share, (rate, _) in rates.items()},
        "replications": {share: count for share, (_, count) in rates.items()},
        "predicted_power": float(predicted),
    }


def take(outcomes: PairedOutcomes, clusters: np.ndarray) -> PairedOutcomes:
    """Return the outcomes of some of the clusters, in that order; one that is drawn twice counts twice."""
    values: dict[str, Any] = {"loss": outcomes.loss[:, clusters], "units": outcomes.units[clusters]}
    if outcomes.tempered is not None:
        values["tempered"] = outcomes.tempered[:, :, clusters]
    if outcomes.cluster_of_unit is not None:
        order = np.argsort(outcomes.cluster_of_unit, kind="stable")
        ends = np.cumsum(outcomes.units)
        starts = (ends - outcomes.units)[clusters]
        owner = np.repeat(np.arange(len(clusters)), values["units"])
        first = np.cumsum(values["units"]) - values["units"]
        units = order[starts[owner] + np.arange(len(owner)) - first[owner]]
        for name in ("right", "confidence", "changed", "labels", "divergence"):
            array = getattr(outcomes, name)
            values[name] = None if array is None else array[..., units]
        values["cluster_of_unit"] = owner
    return replace(outcomes, examples=len(clusters), **values)


def at_difference(outcomes: PairedOutcomes, loss: float, drop: float | None) -> tuple[PairedOutcomes, np.ndarray]:
    """Return outcomes and the probabilities of their clusters at which the true differences are as wanted.

    Args:
        outcomes: the population.
        loss: wanted loss increase, also at fitted temperatures.
        drop: wanted drop of the accuracy, of one answer an example; None leaves it as it is.
    """
    chances = np.full(outcomes.clusters, 1 / outcomes.clusters)
    if drop is not None:
        change = outcomes.accuracy_drop
        changed = max(float(np.abs(change).mean()), drop)
        for sign, share in ((1, (changed + drop) / 2), (-1, (changed - drop) / 2), (0, 1 - changed)):
            chances[change == sign] = share / max((change == sign).sum(), 1)
    weight = (chances * outcomes.units).sum()
    after = outcomes.loss[1] + (loss - (chances * outcomes.loss_increase).sum() / weight) * outcomes.units
    shifted = replace(outcomes, loss=np.stack([outcomes.loss[0], after]))
    if outcomes.tempered is not None:
        _, increase = at_fitted_temperatures(replace(outcomes, tempered=outcomes.tempered * chances))
        dense, compressed = outcomes.tempered
        compressed = compressed + (loss - increase.sum() / weight) * outcomes.units
        shifted = replace(shifted, tempered=np.stack([dense, compressed]))
    return shifted, chances


def verdict_rates(
    outcomes: PairedOutcomes, loss: float, drop: float | None, examples: int, replications: int, seed: int
) -> dict[str, Any]:
    """Let `certify` judge data sets that are drawn at known true differences."""
    generator = np.random.default_rng(seed)
    population, chances = at_difference(outcomes, loss, drop)

    def fast(differences: np.ndarray, units: np.ndarray, confidence: float) -> float:
        return float(bca_bound(differences[None], units[None], generator)[0])

    statuses = []
    with patch("hf_lossless_lr.verdict.certificate.bootstrap_upper_bound", fast):
        for _ in range(replications):
            sample = take(population, generator.choice(len(chances), examples, p=chances))
            statuses.append(certify(sample, MARGIN, MARGIN, CONFIDENCE).status)
    shares = {status: statuses.count(status) / replications for status in sorted(set(statuses))}
    certified = sum(status in CERTIFIED for status in statuses) / replications
    return {"examples": examples, "replications": replications, "certified": certified, "statuses": shares}


def simulate_losses(differences: np.ndarray, units: np.ndarray, generator: np.random.Generator) -> dict[str, Any]:
    """Return all figures of a difference that is a mean over clusters."""
    mean = differences.sum() / units.sum()
    residuals = (differences - mean * units) / units.mean()
    deviation = float(residuals.std(ddof=1))
    needed = max(examples_needed(0.0, deviation, MARGIN, CONFIDENCE), MIN_EXAMPLES)
    found = {
        n: draw_bounds(differences, units, n, CURVE_REPLICATIONS, {"t": t_bound}, generator)["t"]
        for n in (*CURVE, needed)
    }
    powers = {n: float((bounds <= MARGIN).mean()) for n, bounds in found.items()}
    return {
        "kind": "mean",
        "mean": float(mean),
        "deviations": [deviation, deviation],
        "skewness": float((residuals**3).mean() / residuals.std() ** 3),
        "needed": needed,
        "power_at_needed": powers[needed],
        "power_curve": [[n, powers[n]] for n in CURVE],
        "rates": loss_rates(differences, units, SIZES, generator),
    }


def simulate_answers(drop: np.ndarray, generator: np.random.Generator) -> dict[str, Any]:
    """Return all figures of the drop of an accuracy with one answer an example."""
    lost, gained = float((drop > 0).mean()), float((drop < 0).mean())
    deviations = answer_deviations(lost + gained)
    needed = max(examples_needed(0.0, max(deviations), MARGIN, CONFIDENCE), MIN_EXAMPLES)
    records = accuracy_rates(lost, gained, [*CURVE, needed], generator, CURVE_REPLICATIONS)
    powers = {r["examples"]: r["certified"]["0.0"] for r in records if r["rule"] == "Tango"}
    return {
        "kind": "answers",
        "mean": lost - gained,
        "deviations": list(deviations),
        "lost": lost,
        "gained": gained,
        "needed": needed,
        "power_at_needed": powers[needed],
        "power_curve": [[n, powers[n]] for n in CURVE],
        "rates": accuracy_rates(lost, gained, SIZES, generator),
    }


def simulate(name: str, outcomes: PairedOutcomes, seed: int = 0) -> dict[str, Any]:
    """Return all figures of one pair of models."""
    start, generator = time.perf_counter(), np.random.default_rng(seed)
    _, tempered = at_fitted_temperatures(outcomes)
    endpoints = {
        "loss": simulate_losses(outcomes.loss_increase, outcomes.units, generator),
        "loss at fitted temperatures": simulate_losses(tempered, outcomes.units, generator),
    }
    single = outcomes.right is not None and bool((outcomes.units == 1).all())
    if single:
        endpoints["accuracy"] = simulate_answers(outcomes.accuracy_drop, generator)
    elif outcomes.right is not None:
        endpoints["accuracy"] = simulate_losses(outcomes.accuracy_drop, outcomes.units, generator)
    no_drop = 0.0 if single else None
    scenarios = {"nothing lost": (0.0, no_drop), "loss at the margin": (MARGIN, no_drop)}
    if single:
        scenarios["accuracy at the margin"] = (0.0, MARGIN)
    verdicts = [
        {"scenario": scenario, **verdict_rates(outcomes, loss, drop, examples, replications, seed)}
        for scenario, (loss, drop) in scenarios.items()
        for examples, replications in VERDICTS.items()
    ]
    print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return {"endpoints": endpoints, "verdicts": verdicts}


def collect(testbed: Path) -> dict[str, PairedOutcomes]:
    """Compress the testbed's models and let both models of each pair answer the held-out examples."""
    logging.disable_progress_bar()
    results = {}
    for name, keep_ratios in CASES.items():
        load = TASKS[name][0]
        task, dense = load(testbed), load(testbed).model
        options = {"processing_class": task.processing_class}
        compressor = LowRankCompressor(LosslessLowRankConfig(selection_fraction=0.125, rank_multiple=1))
        compressor.calibrate(task.model, task.calibration, eval_dataset=task.evaluation, **options)
        loader = make_dataloader(task.evaluation, dense, batch_size=32, **options)
        for keep_ratio in keep_ratios:
            model = compressor.compress_to(keep_ratio)
            results[f"{name}, keep {keep_ratio}"] = paired_outcomes(
                dense, model, loader, Accelerator(), temperatures=True
            )
            print(f"{name}, keep {keep_ratio}: {compressor.report.verdict}", flush=True)
    return results


def save_outcomes(path: Path, results: dict[str, PairedOutcomes]) -> None:
    arrays = {
        f"{name}/{field.name}": np.asarray(getattr(outcomes, field.name))
        for name, outcomes in results.items()
        for field in fields(outcomes)
        if getattr(outcomes, field.name) is not None
    }
    with path.open("wb") as file:  # savez would append .npz to a name without it
        np.savez_compressed(file, **arrays)


def load_outcomes(path: Path) -> dict[str, PairedOutcomes]:
    values: dict[str, dict[str, Any]] = {}
    with np.load(path, allow_pickle=False) as arrays:
        for key in arrays.files:
            name, _, field = key.rpartition("/")
            array = arrays[key]
            values.setdefault(name, {})[field] = array if array.ndim else array.item()
    return {name: PairedOutcomes(**columns) for name, columns in values.items()}


def to_records(results: dict[str, Any]) -> list[Record]:
    """Return the figures as flat records: each endpoint, point of a power curve, rate and verdict."""
    records: list[Record] = []
    for pair, result in results.items():
        for endpoint, figures in result["endpoints"].items():
            place = {"pair": pair, "endpoint": endpoint}
            single = {name: value for name, value in figures.items() if name not in ("power_curve", "rates")}
            records.append({"record": "endpoint", **place, **single})
            records += [{"record": "power", **place, "examples": n, "power": p} for n, p in figures["power_curve"]]
            records += [{"record": "rate", **place, **rate} for rate in figures["rates"]]
        records += [{"record": "verdict", "pair": pair, **verdict} for verdict in result["verdicts"]]
    return records


def from_records(records: Sequence[Record]) -> dict[str, Any]:
    """Return the figures that `to_records` made these of."""
    results: dict[str, Any] = {}
    for record in records:
        values = {name: value for name, value in record.items() if name not in ("record", "pair", "endpoint")}
        result = results.setdefault(record["pair"], {"endpoints": {}, "verdicts": []})
        if record["record"] == "endpoint":
            result["endpoints"][record["endpoint"]] = {**values, "power_curve": [], "rates": []}
        elif record["record"] == "power":
            result["endpoints"][record["endpoint"]]["power_curve"].append([values["examples"], values["power"]])
        elif record["record"] == "rate":
            result["endpoints"][record["endpoint"]]["rates"].append(values)
        else:
            result["verdicts"].append(values)
    return results


def with_error(rate: float, replications: int) -> str:
    return f"{100 * rate:.1f} ± {100 * np.sqrt(rate * (1 - rate) / replications):.1f}"


RULES = (
    ("mean", "t"),
    ("mean", "BCa"),
    ("mean", "wider of t and BCa"),
    ("mean", "t, worst twice"),
    ("answers", "t"),
    ("answers", "Tango"),
)
KINDS = {"mean": "loss", "answers": "accuracy"}  # the accuracy of the language model counts as a mean, like a loss
PACKAGE_RULES = {"mean": "wider of t and BCa", "answers": "Tango"}


def records_of(results: dict[str, Any], kind: str, rule: str, examples: int) -> list[dict[str, Any]]:
    """Records of one rule and number of examples, of all pairs of models and endpoints."""
    return [
        record
        for result in results.values()
        for figures in result["endpoints"].values()
        for record in figures["rates"]
        if (figures["kind"], record["rule"], record["examples"]) == (kind, rule, examples)
    ]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def false_rates(results: dict[str, Any]) -> list[str]:
    """One row a number of examples: the mean and the largest false rate at the margin over all pairs and endpoints."""
    rows = []
    for examples in SIZES:
        cells = [f"{examples:,}"]
        for kind, rule in RULES:
            records = records_of(results, kind, rule, examples)
            rates = [record["certified"]["1.0"] for record in records]
            largest = with_error(max(rates), records[0]["replications"]["1.0"])
            cells.append(f"{100 * np.mean(rates):.1f}; {largest}")
        rows.append(cells)
    return table(["examples", *(f"{KINDS[kind]}: {rule}" for kind, rule in RULES)], rows)


def markdown(results: dict[str, Any]) -> str:
    endpoints = [
        (name, endpoint, figures)
        for name, result in results.items()
        for endpoint, figures in result["endpoints"].items()
    ]
    shares, powers, verdicts = [], [], []
    for name, endpoint, figures in endpoints:
        for record in figures["rates"]:
            if record["rule"] == PACKAGE_RULES[figures["kind"]] and record["examples"] >= 300:
                counts = record["replications"]
                rates = [with_error(rate, counts[share]) for share, rate in record["certified"].items()]
                predicted = f"{100 * record['predicted_power']:.1f}"
                shares.append([name, endpoint, f"{record['examples']:,}", rates[0], predicted, *rates[1:]])
        deviations = [f"{value:.4f}" for value in figures["deviations"]]
        skewness = f"{figures['skewness']:.1f}" if "skewness" in figures else ""
        found = with_error(figures["power_at_needed"], CURVE_REPLICATIONS)
        powers.append([name, endpoint, *deviations, skewness, f"{figures['needed']:,}", found])
    for name, result in results.items():
        for record in result["verdicts"]:
            statuses = ", ".join(f"{status} {100 * share:.0f}" for status, share in record["statuses"].items())
            certified = with_error(record["certified"], record["replications"])
            verdicts.append([name, record["scenario"], f"{record['examples']:,}", certified, statuses])
    return "\n".join(
        [
            "Wrong `lossless` in %, where the true difference is the margin: mean; largest ± its Monte-Carlo error.",
            "",
            *false_rates(results),
            "",
            "Share `lossless` in % by the package's rule, at true differences of 0, ½, 1 and 1½ margins; and what the",
            "formula predicts at 0.",
            "",
            *table(["pair", "endpoint", "examples", "0", "formula", "½", "1", "1½"], shares),
            "",
            "Examples that the formula asks for at a true difference of 0, for 80 %; the share certified with them.",
            "",
            *table(["pair", "endpoint", "deviation", "as tested", "skewness", "examples", "power, %"], powers),
            "",
            "The whole verdict of `certify`: share certified, and its statuses, in %.",
            "",
            *table(["pair", "truth", "examples", "certified", "statuses"], verdicts),
        ]
    )


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (errors, losses, accuracies) = plt.subplots(1, 3, figsize=(15, 4.8), constrained_layout=True)
    for index, (kind, rule) in enumerate(rule for rule in RULES if rule != ("answers", "t")):
        for column, examples in enumerate(SIZES):
            rates = [100 * record["certified"]["1.0"] for record in records_of(results, kind, rule, examples)]
            x = column + (index - 2) * 0.17 + np.linspace(-0.06, 0.06, len(rates))
            label = f"{KINDS[kind]}: {rule}" if column == 0 else None
            errors.plot(x, rates, "o", ms=3.5, color=f"C{index}", alpha=0.8, label=label)
    errors.axhline(100 * (1 - CONFIDENCE), color="black", lw=1, ls="--", label="5 %")
    errors.set_xticks(range(len(SIZES)), [f"{n:,}" for n in SIZES])
    errors.set(xlabel="examples", ylabel="wrong “lossless” at the margin (%)", ylim=(0, None))
    errors.set_title("How often it is wrong\n(a dot: one pair of models, one endpoint)")
    errors.legend(fontsize=8)
    sizes = np.geomspace(CURVE[0], CURVE[-1], 200)
    for axis, endpoint, title in (
        (losses, "loss", f"Power for the loss, t\n(margin {MARGIN:g} nats)"),
        (accuracies, "accuracy", f"Power for the accuracy, Tango\n(margin {100 * MARGIN:g} point)"),
    ):
        for index, (name, result) in enumerate(results.items()):
            figures = result["endpoints"][endpoint]
            if endpoint == "accuracy" and figures["kind"] != "answers":
                continue
            n, found = np.array(figures["power_curve"]).T
            axis.plot(sizes, 100 * power(sizes, *figures["deviations"]), color=f"C{index}", lw=1, ls=":")
            axis.plot(n, 100 * found, "o-", color=f"C{index}", ms=4, lw=1.5, label=name)
        axis.plot([], [], color="black", lw=1, ls=":", label="formula")
        axis.axhline(80, color="black", lw=1, ls="--", label="80 %")
        axis.set(xscale="log", xlabel="examples", ylabel="certified at a true difference of 0 (%)", ylim=(-2, 103))
        axis.set_xticks([50, 100, 300, 1000, 3000], ["50", "100", "300", "1,000", "3,000"])
        axis.minorticks_off()
        axis.set_title(title)
        axis.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--testbed", type=Path, help="folder of the trained models and their data")
    parser.add_argument(
        "--outcomes", type=Path, help="npz file of the models' answers: read if it exists, else written"
    )
    parser.add_argument(
        "--records", type=Path, help="file of the figures: written, or read where there are no models and no answers"
    )
    parser.add_argument("--plot", type=Path, help="file for the plot; needs matplotlib")
    arguments = parser.parse_args()
    outcomes = {}
    if arguments.outcomes and arguments.outcomes.exists():
        outcomes = load_outcomes(arguments.outcomes)
    elif arguments.testbed:
        outcomes = collect(arguments.testbed)
        if arguments.outcomes:
            save_outcomes(arguments.outcomes, outcomes)
    elif not (arguments.records and arguments.records.exists()):
        parser.error("give --testbed, or --outcomes or --records with a file that exists")
    if outcomes:
        results = {name: simulate(name, values) for name, values in outcomes.items()}
        if arguments.records:
            write_records(arguments.records, to_records(results))
    else:
        results = from_records(read_records(arguments.records))
    if arguments.plot:
        plot(results, arguments.plot)
    print(markdown(results))


if __name__ == "__main__":
    main()
