"""The trained models of the testbed, with the data that they are calibrated and judged on."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)


@dataclass
class Task:
    """A model with its calibration and evaluation data, as `compress` takes them."""

    model: PreTrainedModel
    calibration: Any
    evaluation: Any
    processing_class: Any = None


def sentiment(testbed: Path, examples: int = 1024) -> Task:
    folder = testbed / "minilm-sst2"
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def load(name: str) -> Dataset:
        data = Dataset.from_json(str(testbed / "data" / "sst2" / f"{name}.jsonl"))
        return data.map(lambda x: tokenizer(x["sentence"], truncation=True, max_length=128), batched=True)

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    return Task(model, load("calibration").select(range(examples)), load("validation"), tokenizer)


def language(testbed: Path, examples: int = 256) -> Task:
    folder = testbed / "llama-small"
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def blocks(name: str, count: int) -> list[dict[str, torch.Tensor]]:
        text = (testbed / "data" / f"wikitext2_{name}.txt").read_text(encoding="utf-8")
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][: count * 128]).view(count, 128)
        return [{"input_ids": part, "labels": part} for part in ids.split(8)]

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Task(model, blocks("valid", examples), blocks("test", 600))


def digits(testbed: Path) -> Task:
    folder = testbed / "data" / "mnist"
    pixels = np.frombuffer(gzip.decompress((folder / "images.idx.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((folder / "labels.idx.gz").read_bytes()), np.uint8, offset=8)
    order = json.loads((folder / "permutation.json").read_text())
    images = (torch.tensor(pixels.reshape(-1, 1, 28, 28) / 255).float() - 0.13) / 0.31
    images = torch.nn.functional.pad(images, (2, 2, 2, 2), value=-0.42)
    targets = torch.tensor(labels.astype(np.int64))

    def batches(indices: list[int]) -> list[dict[str, torch.Tensor]]:
        return [{"pixel_values": images[part], "labels": targets[part]} for part in torch.tensor(indices).split(32)]

    model = AutoModelForImageClassification.from_pretrained(testbed / "swin-mnist", dtype=torch.float32)
    return Task(model, batches(order[:1024]), batches(order[-3000:]))
