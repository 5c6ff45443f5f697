"""Methods of the field on the testbed's models: the same statistics, splits and held-out data for all of a model.

    python studies/compare_methods.py --testbed ../shared/testbed --records studies/results/compare_methods.jsonl
    python studies/compare_methods.py

Results that the file has are not found again; without --testbed, the tables are printed from the file as it is.
`hf-lossless-lr compare` does the same for any model.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from convolutional_networks import CALIBRATION, testbed_pictures
from records import RESULTS, append_records, known_records
from testbed_tasks import Task, digits, language, sentiment

from hf_lossless_lr.baselines import compare
from hf_lossless_lr.report import MethodResult, methods_table


def pictures(testbed: Path) -> Task:
    found = testbed_pictures(testbed, testbed / "cnn-resnet")
    return Task(found.load(), found.train[:CALIBRATION], found.held_out)


METHODS = ("default", "no-refit", "kfac-svd", "svd-llm", "svd", "fwsvd", "aa-svd")
OWN_LAYERS = ("basis-sharing", "rank-masks")
OTHERS = ("separable", "tucker", "cp", "tensor-train", "int8", "aciq-int8")
# Half of the 4 inputs of a patch embedding would ruin every method with the same share for each layer.
OPTIONS = {"swin-mnist": {"ignore": ["re:.*patch_embeddings.*"]}}
# Model: loader, sizes, methods.
TASKS: dict[str, tuple[Callable[[Path], Task], tuple[float, ...], tuple[str, ...]]] = {
    "minilm-sst2": (sentiment, (0.7, 0.5, 0.35), (*METHODS, *OWN_LAYERS)),
    "llama-small": (language, (0.7, 0.5), (*METHODS, "mpifa", "asvd", *OWN_LAYERS)),
    "swin-mnist": (digits, (0.5, 0.35), METHODS[:-1]),
    "cnn-resnet": (pictures, (0.5, 0.35), (*METHODS[:5], *OTHERS)),
}


def tables(records: list[dict]) -> str:
    """Return a table for each model, the best of each size first."""
    parts = []
    for name in dict.fromkeys(record["model"] for record in records):
        found = [{key: value for key, value in r.items() if key != "model"} for r in records if r["model"] == name]
        results = [MethodResult.from_dict(values) for values in found]
        results.sort(key=lambda result: (-(result.keep_ratio or 0), result.loss_increase))
        parts.append(f"### {name}\n\n{methods_table(results)}")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--testbed", type=Path, help="folder of the trained models and their data")
    parser.add_argument("--records", type=Path, default=RESULTS / "compare_methods.jsonl")
    parser.add_argument("--models", nargs="+", choices=list(TASKS), default=list(TASKS))
    arguments = parser.parse_args()
    records = known_records(arguments.records)
    for name in arguments.models if arguments.testbed else ():
        load, keep_ratios, methods = TASKS[name]
        task = load(arguments.testbed)
        known = [{key: value for key, value in r.items() if key != "model"} for r in records if r["model"] == name]
        for result in compare(
            task.model,
            task.calibration,
            methods=methods,
            keep_ratios=keep_ratios,
            eval_dataset=task.evaluation,
            processing_class=task.processing_class,
            known=[MethodResult.from_dict(values) for values in known],
            rank_multiple=1,
            **OPTIONS.get(name, {}),
        ):
            records.append({"model": name, **asdict(result)})
            append_records(arguments.records, records[-1:])
    print(tables(records))


if __name__ == "__main__":
    main()
