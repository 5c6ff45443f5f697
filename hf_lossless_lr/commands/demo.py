"""The demonstration: train a small ViT on handwritten digits, shrink it to a seventh, check it, reload it elsewhere.

Everything happens on the spot: the digits come with scikit-learn, the model is trained for under a minute, no network
and no other file is needed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification
from transformers.utils import logging

from ..checkpoint import LosslessLowRankConfig
from ..errors import DataError
from ..pipeline import LowRankCompressor
from ..report import comparison_table, report_rows, verdict_sentence

TRAIN, HELD_OUT = 1297, 500  # of the 1,797 digits
EPOCHS = 12
LEARNING_RATE = 5e-4
MAX_TRAINING_SECONDS = 45  # on a slow machine the last epochs are left out
BATCH = 64
SEED = 0
KEEP_RATIO = 1 / 7  # some half of the parameters, in int8
ROUNDING = 1e-5  # of the largest logit, in float32

Batch = dict[str, torch.Tensor]


def load_digits() -> tuple[list[Batch], list[Batch]]:
    """Return training and held-out batches of the UCI handwritten digits, 8 x 8 pixels each.

    Returns:
        Training batches and held-out batches.

    Raises:
        DataError: if scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DataError("the demo takes its digits from scikit-learn: pip install 'hf-lossless-lr[demo]'") from error
    images, labels = datasets.load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(SEED))
    pixels, targets = pixels[order], torch.tensor(labels)[order]
    train = _batches(pixels[:TRAIN], targets[:TRAIN])
    return train, _batches(pixels[TRAIN : TRAIN + HELD_OUT], targets[TRAIN : TRAIN + HELD_OUT])


def _batches(pixels: torch.Tensor, labels: torch.Tensor) -> list[Batch]:
    parts = zip(pixels.split(BATCH), labels.split(BATCH), strict=True)
    return [{"pixel_values": x, "labels": y} for x, y in parts]


def train_vit(batches: list[Batch]) -> ViTForImageClassification:
    """Train a small ViT from scratch, with AdamW and a one-cycle schedule.

    It is 384 wide: much narrower, and what a factorized layer saves is less than what its second product costs.

    Args:
        batches: training batches.

    Returns:
        The trained model in evaluation mode.
    """
    torch.manual_seed(SEED)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=384,
        num_hidden_layers=2,
        num_attention_heads=6,
        intermediate_size=1536,
        hidden_dropout_prob=0.1,
    )
    config.num_labels = 10
    model = ViTForImageClassification(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    steps = EPOCHS * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=steps)
    pixels = torch.cat([batch["pixel_values"] for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    started = time.perf_counter()
    with logging.tqdm(total=steps, desc="Training a small ViT") as progress:
        for _ in range(EPOCHS):
            if time.perf_counter() - started > MAX_TRAINING_SECONDS:
                break
            for part in torch.randperm(len(pixels)).split(BATCH):
                model(pixel_values=pixels[part], labels=labels[part]).loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                progress.update()
    return model.eval()


@torch.no_grad()
def logits_of(model: PreTrainedModel, batches: list[Batch]) -> torch.Tensor:
    """Return the logits of all examples.  # shape: (examples, classes)."""
    return torch.cat([model(pixel_values=batch["pixel_values"]).logits for batch in batches])


def reload_in_new_process(directory: Path, batches: list[Batch], expected: torch.Tensor) -> bool:
    """Load a checkpoint with `AutoModelForImageClassification` in a new process and compare its logits.

    Args:
        directory: the checkpoint.
        batches: held-out batches.
        expected: logits of the model in memory.

    Returns:
        Whether the reloaded model's logits are the same to rounding: a kernel may sum in another order where its
        operands lie elsewhere in memory.
    """
    file = directory.parent / "held_out.safetensors"
    save_file({f"pixels.{i:03d}": batch["pixel_values"] for i, batch in enumerate(batches)}, file)
    answer = directory.parent / "reloaded_logits.safetensors"
    command = [sys.executable, "-c", _RELOAD, str(directory), str(file), str(answer), str(torch.get_num_threads())]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    deviation = (load_file(answer)["logits"] - expected).abs().max()
    return bool(deviation <= ROUNDING * expected.abs().max())


_RELOAD = """
import sys
import torch, hf_lossless_lr
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
torch.set_num_threads(int(sys.argv[4]))  # another number may sum in another order
model = AutoModelForImageClassification.from_pretrained(sys.argv[1]).eval()
batches = load_file(sys.argv[2])
with torch.no_grad():
    logits = torch.cat([model(pixel_values=batches[name]).logits for name in sorted(batches)])
save_file({"logits": logits}, sys.argv[3])
"""


def run_demo(output: Path, keep_ratio: float = KEEP_RATIO) -> dict[str, Any]:
    """Run the demonstration and print its table.

    Args:
        output: an existing directory for the two checkpoints and `demo.json`.
        keep_ratio: share of the bytes of the targeted weights to keep.

    Returns:
        What the table shows, with the times of the stages.

    Raises:
        DataError: if the reloaded model does not answer as the model in memory did.
    """
    started = time.perf_counter()
    train, held_out = load_digits()
    dense = train_vit(train)
    trained = time.perf_counter()
    dense.save_pretrained(output / "dense")
    compressor = LowRankCompressor(
        LosslessLowRankConfig(formats=["int8"], storage="two-factor", keep_ratio=keep_ratio, seed=SEED)
    )
    compressed = compressor.compress(deepcopy(dense), train, eval_dataset=held_out)
    compressed.save_pretrained(output / "compressed")
    done = time.perf_counter()
    if not reload_in_new_process(output / "compressed", held_out, logits_of(compressed, held_out)):
        raise DataError("the reloaded model does not answer as the model in memory did")
    report = compressor.report
    if report is None:
        raise DataError("the compressor left no report")
    rows = report_rows(report)
    seconds = {"train": trained - started, "compress": done - trained, "total": time.perf_counter() - started}
    print(comparison_table(rows))
    print(f"\n{verdict_sentence(report)}")
    print(f"{HELD_OUT} held-out digits; reloaded in a new process: the same logits, to rounding")
    print(f"trained in {seconds['train']:.0f} s, compressed in {seconds['compress']:.0f} s; files in {output}")
    result = {"rows": rows, "seconds": seconds, "bytes_ratio": report.bytes_ratio}
    (output / "demo.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def add_parser(commands: Any) -> None:
    """Add the parser of this command."""
    parser = commands.add_parser(
        "demo",
        help="train, compress and reload a small model in a minute or two",
        description="Train a small ViT on handwritten digits, compress it, reload it in a new process.",
        dataclass_types=[],
    )
    parser.add_argument("--output", help="folder to keep the two checkpoints in; default: a temporary one, removed")
    parser.add_argument(
        "--keep_ratio", "--keep-ratio", type=float, default=KEEP_RATIO, help="share of the bytes to keep"
    )


def demo(arguments: Any) -> int:
    """Run `hf-lossless-lr demo`.

    Args:
        arguments: the parsed arguments.

    Returns:
        Exit code.

    Raises:
        DataError: if the output is no folder.
    """
    if arguments.output is None:
        with tempfile.TemporaryDirectory() as folder:
            run_demo(Path(folder), arguments.keep_ratio)
        return 0
    output = Path(arguments.output)
    if output.exists() and not output.is_dir():
        raise DataError(f"--output: {output} is not a folder.")
    output.mkdir(parents=True, exist_ok=True)
    run_demo(output, arguments.keep_ratio)
    return 0
