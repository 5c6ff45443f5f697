"""Convolutional networks in the form of the paper's Table 1: top-1, top-5, loss, share dropped, and our verdict.

    python studies/convolutional_networks.py --testbed FOLDER --records FILE
    python studies/convolutional_networks.py --testbed FOLDER --trained DIR --networks vit swin --records FILE
    python studies/convolutional_networks.py --model timm/vgg19_bn.tv_in1k --images IMAGENET_FOLDER

The first command takes the small networks of the testbed, trained on CIFAR-10 (`cnn-densenet` needs timm), the second
one transformers that `train_picture_models.py` trained on the same pictures; the records of both are
`results/convolutional_networks.jsonl`. Those that the file has are not measured again, and without --testbed the
tables are printed from it. The third one takes any image classifier, from the hub or a folder, and folders `train`
and `val` of one folder for each class.

All methods of a network share the data: 1,024 pictures to calibrate on (`compact`, which chooses by measurement, has
3,072 more to choose by), and the held-out ones. Shares are those of the weights that are factorized: convolutions and
linear layers but the head; `--target_modules` names others.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from records import Record, append_records, known_records
from torch.nn import functional as F
from torch.utils.data import Subset
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.errors import ConfigurationError

CALIBRATION = 1024
NETWORKS = {"cnn-resnet": 64, "cnn-regnet": 32, "cnn-vgg_bn": 32, "cnn-inception": 32, "cnn-densenet": 64}  # pixels
TRAINED = {"vit": 32, "swin": 32}
PAPER = {
    "paper, lossless": {"objective": "paper-lossless"},
    "paper, compact": {"objective": "paper-compact"},
}
OURS = {
    "ours, compact": {"objective": "compact", "selection_fraction": 0.75},
    "ours, keep 0.7": {"keep_ratio": 0.7},
    "ours, keep 0.5": {"keep_ratio": 0.5},
    "ours, keep 0.35": {"keep_ratio": 0.35},
    "ours, half of the FLOPs": {"keep_ratio": 0.5, "size": "flops"},
    "ours, 0.9 of the time": {"keep_ratio": 0.9, "size": "latency"},
}
OLD_HEAD = {"ours, keep 0.35, classifier as it was": {"keep_ratio": 0.35, "ignore": ["re:.*classifier.*"]}}
SVD = {"metric": "identity", "objective": "uniform", "storage": "two-factor"}
COLUMNS = ("method", "dropped", "top-1", "top-5", "loss", "tempered", "KL", "FLOPs", "time", "verdict")
SAME_DROP = "the paper's drop"  # in the names of methods that are asked for it

Row = dict[str, Any]  # a picture, as a model takes it


@dataclass
class Pictures:
    """A network, and the data of all of its methods."""

    load: Callable[[], PreTrainedModel]
    train: Any
    held_out: Any


def testbed_pictures(testbed: Path, folder: Path) -> Pictures:
    def load() -> PreTrainedModel:
        if (folder / "modeling_small_cnn.py").is_file():
            sys.path.insert(0, str(folder))
            from modeling_small_cnn import SmallCnnForImageClassification as Model
        else:
            Model = AutoModelForImageClassification
        return Model.from_pretrained(folder, dtype=torch.float32).eval()

    size = {**NETWORKS, **TRAINED}[folder.name]
    train = pixels_and_labels(testbed, "train.parquet", 4 * CALIBRATION, size)
    return Pictures(load, train, pixels_and_labels(testbed, "heldout.parquet", None, size))


def pixels_and_labels(testbed: Path, file: str, count: int | None, size: int) -> list[Row]:
    """Return the first pictures of a file, of so many pixels on a side, from -1 to 1, with their classes."""
    rows = load_dataset("parquet", data_files=str(testbed / "cifar" / file), split="train")
    rows = rows if count is None else rows.select(range(count))
    pixels = torch.stack([torch.from_numpy(np.array(p.convert("RGB"))).movedim(-1, 0) for p in rows["image"]])
    pixels = pixels / 127.5 - 1
    if size != pixels.shape[-1]:
        pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
    return [{"pixel_values": x, "labels": y} for x, y in zip(pixels, rows["label"], strict=True)]


def folder_pictures(model: str, images: str) -> Pictures:
    processor = AutoImageProcessor.from_pretrained(model)

    def part(split: str, count: int | None) -> Dataset:
        rows = load_dataset(images, split=split)
        rows = rows if count is None else rows.shuffle(seed=0).select(range(min(count, len(rows))))

        def process(batch: dict[str, list[Any]]) -> dict[str, Any]:
            pixels = processor([picture.convert("RGB") for picture in batch["image"]], return_tensors="pt")
            return {"pixel_values": list(pixels["pixel_values"]), "labels": batch["label"]}

        return rows.with_transform(process)

    load = lambda: AutoModelForImageClassification.from_pretrained(model, dtype=torch.float32).eval()  # noqa: E731
    return Pictures(load, part("train", 4 * CALIBRATION), part("validation", None))


@torch.no_grad()
def measure(model: PreTrainedModel, data: Any) -> Record:
    """Return the loss, and the shares of pictures whose class is the first answer, and among the first five."""
    loss, first, five, count = 0.0, 0, 0, 0
    for start in range(0, len(data), 100):
        rows = [data[i] for i in range(start, min(start + 100, len(data)))]
        labels = torch.tensor([row["labels"] for row in rows])
        logits = model(pixel_values=torch.stack([row["pixel_values"] for row in rows])).logits
        best = logits.topk(5).indices == labels[:, None]
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        first, five, count = first + int(best[:, 0].sum()), five + int(best.any(1).sum()), count + len(rows)
    return {"top1": first / count, "top5": five / count, "loss": loss / count}


@torch.no_grad()
def flops(model: PreTrainedModel, pictures: Pictures) -> int:
    with FlopCounterMode(display=False) as counter:
        model(pixel_values=pictures.held_out[0]["pixel_values"][None])
    return counter.get_total_flops()


def compressed(network: str, pictures: Pictures, method: str, options: dict[str, Any]) -> Record:
    model = pictures.load()
    compressor = LowRankCompressor(LosslessLowRankConfig(**options))
    count = 4 * CALIBRATION if "selection_fraction" in options else CALIBRATION
    train = Subset(pictures.train, range(min(count, len(pictures.train))))
    compressor.compress(model, train, eval_dataset=pictures.held_out)
    report: Any = compressor.report
    found = report.certificate
    record = {
        "network": network,
        "method": method,
        "keep_ratio": report.keep_ratio,
        **measure(model, pictures.held_out),
    }
    return record | {
        "loss_bounds": None if found is None else [found.loss_increase.lower, found.loss_increase.upper],
        "tempered": None if found is None else found.tempered_loss_increase.mean,
        "divergence": None if found is None else found.divergence,
        "verdict": report.verdict,
        "flops": flops(model, pictures) / flops(pictures.load(), pictures),
        "time_ratio": None if report.speed is None else report.speed.ratio,
        "forms": {
            form: sum(x.form == form for x in report.layers.values() if x.rank) for form in ("channel", "spatial")
        },
        "seconds": {stage: round(seconds, 2) for stage, seconds in report.seconds.items()},
    }


def run(network: str, pictures: Pictures, done: list[Record], targets: list[str] | None) -> Iterator[Record]:
    """Yield a record for each method that was not measured yet."""
    known = {record["method"]: record for record in done if record["network"] == network}
    if "original" not in known:
        yield {
            "network": network,
            "method": "original",
            "keep_ratio": 1.0,
            **measure(pictures.load(), pictures.held_out),
        }
    more = {} if targets is None else {"target_modules": targets}
    old_head = OLD_HEAD if network in {**NETWORKS, **TRAINED} else {}
    for method, options in {**PAPER, **OURS, **old_head}.items():
        if method not in known:
            try:
                known[method] = compressed(network, pictures, method, {**options, **more})
            except ConfigurationError as error:  # a network of which no layer gains time
                known[method] = {"network": network, "method": method, "impossible": str(error)}
            yield known[method]
    share = min(0.95, known["paper, compact"]["keep_ratio"])
    for method, options in ((f"SVD, {SAME_DROP}", SVD), (f"ours, {SAME_DROP}", {})):
        if method not in known:
            yield compressed(network, pictures, method, {**options, **more, "keep_ratio": share})


def print_tables(records: list[Record]) -> None:
    for network in dict.fromkeys(record["network"] for record in records):
        print(f"\n{network}\n\n| {' | '.join(COLUMNS)} |\n|---|{'---:|' * (len(COLUMNS) - 2)}---|")
        for record in records:
            if record["network"] == network:
                print(row(record))


def row(record: Record) -> str:
    """Return a line of a table."""
    if "impossible" in record:
        return f"| {record['method']} | cannot be reached | | | | | | | | |"
    formats = {"tempered": "+.4f", "divergence": ".4f", "flops": ".2f", "time_ratio": ".2f"}
    values = ("–" if record.get(name) is None else f"{record[name]:{each}}" for name, each in formats.items())
    return (
        f"| {record['method']} | {100 * (1 - record['keep_ratio']):.0f} % | {100 * record['top1']:.2f} | "
        f"{100 * record['top5']:.2f} | {record['loss']:.4f} | {' | '.join(values)} | {record.get('verdict') or '–'} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--testbed", type=Path, help="folder of the testbed")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=[*NETWORKS, *TRAINED])
    parser.add_argument("--trained", type=Path, help="folder that train_picture_models.py wrote")
    parser.add_argument("--records", type=Path, help="file of results, read and extended")
    parser.add_argument("--model", help="hub id or folder of an image classifier")
    parser.add_argument(
        "--images", help="folder with `train` and `val`, each with a folder for each class; or a hub id"
    )
    parser.add_argument(
        "--target_modules", nargs="+", help="layers to factorize, such as Linear; default all but heads"
    )
    options = parser.parse_args()
    done = known_records(options.records) if options.records else []
    sources: dict[str, Callable[[], Pictures]] = {}
    if options.testbed:
        if options.trained is None and not NETWORKS.keys() >= set(options.networks):
            parser.error("vit and swin need --trained")
        folders = {name: options.testbed if name in NETWORKS else options.trained for name in options.networks}
        sources = {name: partial(testbed_pictures, options.testbed, folders[name] / name) for name in folders}
    if options.model:
        if not options.images:
            parser.error("--model needs --images")
        sources[options.model] = lambda: folder_pictures(options.model, options.images)
    for name, pictures in sources.items():
        for record in run(name, pictures(), done, options.target_modules):
            done.append(record)
            print(row(record), flush=True)
            if options.records:
                append_records(options.records, [record])
    print_tables(done)


if __name__ == "__main__":
    main()
