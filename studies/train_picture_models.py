"""Train a small ViT and a small Swin on the CIFAR-10 pictures of the testbed, to have transformers of photographs.

    python studies/train_picture_models.py --testbed FOLDER --output DIR
    python studies/convolutional_networks.py --testbed FOLDER --trained DIR --networks vit swin

Some ten minutes for each on one core; the accuracy is that of a small transformer without pretraining.
"""

import argparse
from pathlib import Path

import torch
from convolutional_networks import Row, pixels_and_labels
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

SIZE, CLASSES, SHIFT = 32, 10, 4
RATE, BATCH = 1.5e-3, 128


def vit() -> PreTrainedModel:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=512,
            image_size=SIZE,
            patch_size=4,
            num_labels=CLASSES,
        )
    )


def swin() -> PreTrainedModel:
    return SwinForImageClassification(
        SwinConfig(
            embed_dim=48,
            depths=[2, 2, 2],
            num_heads=[2, 4, 8],
            window_size=4,
            image_size=SIZE,
            patch_size=2,
            num_labels=CLASSES,
        )
    )


MODELS = {"vit": vit, "swin": swin}


def augmented(pixels: torch.Tensor) -> torch.Tensor:
    """Return a batch, each picture mirrored with probability 1/2, and all of them moved by a few pixels."""
    mirrored = torch.where(torch.rand(len(pixels), 1, 1, 1) < 0.5, pixels.flip(-1), pixels)
    padded = torch.nn.functional.pad(mirrored, (SHIFT,) * 4, mode="reflect")
    left, top = torch.randint(2 * SHIFT + 1, (2,)).tolist()
    return padded[..., top : top + SIZE, left : left + SIZE]


def train(model: PreTrainedModel, rows: list[Row], epochs: int) -> None:
    loader = DataLoader(rows, BATCH, shuffle=True, drop_last=len(rows) >= BATCH)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.05)
    schedule = OneCycleLR(optimizer, RATE, total_steps=epochs * len(loader))
    model.train()
    for epoch in range(epochs):
        for batch in loader:
            loss = model(pixel_values=augmented(batch["pixel_values"]), labels=batch["labels"]).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {epochs}: loss {loss.item():.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--testbed", type=Path, required=True, help="folder of the testbed")
    parser.add_argument("--output", type=Path, required=True, help="folder for the two checkpoints")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--pictures", type=int, help="default: all 10,000 for training")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    for name in options.models:
        torch.manual_seed(0)
        model = MODELS[name]()
        train(model, pixels_and_labels(options.testbed, "train.parquet", options.pictures, SIZE), options.epochs)
        model.eval().save_pretrained(options.output / name)


if __name__ == "__main__":
    main()
