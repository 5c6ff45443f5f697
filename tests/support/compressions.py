"""Tiny models, compressed to about half, and what two models or folders must have in common."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from hf_lossless_lr import CompressionReport, LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.checkpoint.options import MEASURED_OBJECTIVES
from hf_lossless_lr.layers.factorized import is_factorized
from support.tiny_models import TINY_MODELS, generator, other_inputs, split_batch
from support.tolerances import BFLOAT16, FLOAT32, ROUNDING

COUNT = 12  # examples of each tiny model
ROUNDING_OF = {torch.float64: ROUNDING, torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
SHARPNESS = 8.0  # so that a random model is not undecided
BATCH_SIZE = 4

AUTO_CLASSES = {
    name: f"AutoModelFor{head}"
    for name, head in {
        "bert-sequence-classification": "SequenceClassification",
        "bert-token-classification": "TokenClassification",
        "bert-question-answering": "QuestionAnswering",
        "bert-multiple-choice": "MultipleChoice",
        "bert-masked-lm": "MaskedLM",
        "roberta": "SequenceClassification",
        "distilbert": "SequenceClassification",
        "albert": "SequenceClassification",
        "llama": "CausalLM",
        "gpt2": "CausalLM",
        "t5": "Seq2SeqLM",
        "swin": "ImageClassification",
        "vit": "ImageClassification",
        "resnet": "ImageClassification",
    }.items()
}
"""Name of a tiny model to the Auto class that loads it."""


def auto_class(name: str) -> Any:
    return getattr(transformers, AUTO_CLASSES[name])


def build(name: str) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    return TINY_MODELS[name](COUNT)


@torch.no_grad()
def certifiable(count: int = 40) -> tuple[PreTrainedModel, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A classifier that is right as often as it says, with calibration data and enough others for a certificate."""
    model, batch = TINY_MODELS["bert-sequence-classification"](count)
    parts = batch, other_inputs(batch)
    model.classifier.weight.mul_(SHARPNESS)
    model.classifier.bias.sub_(answers(model, batch)["logits"].mean(0))  # all classes are about as frequent
    for seed, part in enumerate(parts):
        chances = answers(model, part)["logits"].softmax(-1)
        part["labels"] = chances.multinomial(1, generator=generator(seed)).squeeze(1)
    return model, *parts


def default_options(model: PreTrainedModel) -> dict[str, Any]:
    return {"target_modules": ["Conv2d"]} if "ResNet" in type(model).__name__ else {}


def compress(
    model: PreTrainedModel, batch: Mapping[str, torch.Tensor], **options: Any
) -> tuple[PreTrainedModel, CompressionReport]:
    """Compress a model in place on batches of four; evaluate on as many other examples.

    No refit, so that all batches take part, unless the options ask for it. An objective that chooses by measurement
    gets batches of one, as half of them are its selection split.
    """
    config = LosslessLowRankConfig(**default_options(model) | {"refit": False} | options)
    size = 1 if config.objective in MEASURED_OBJECTIVES else BATCH_SIZE
    compressor = LowRankCompressor(config)
    model = compressor.compress(model, split_batch(dict(batch), size), eval_dataset=[other_inputs(batch)])
    return model, compressor.report


def compressed(name: str, **options: Any) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    model, batch = build(name)
    return compress(model, batch, **options)[0], batch


@torch.no_grad()
def answers(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All tensors that a model returns: the loss, the logits, the states of an encoder."""
    outputs = model(**batch)
    return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def check_same_answers(
    model: PreTrainedModel, other: PreTrainedModel, batch: Mapping[str, torch.Tensor], tolerance: float | None = None
) -> None:
    """Assert that two models return the same tensors, up to a share of the largest entry: by default, to rounding.

    Not bit for bit: a kernel may sum in another order where its operands lie elsewhere in memory.
    """
    mine, others = answers(model, batch), answers(other, batch)
    assert mine.keys() == others.keys()
    assert any("logits" in name for name in mine)
    for name, tensor in mine.items():
        assert tensor.dtype == others[name].dtype
        assert torch.isfinite(tensor).all(), name
        allowed = ROUNDING_OF[tensor.dtype] if tolerance is None else tolerance
        error = (tensor.double() - others[name].double()).abs().max() / tensor.double().abs().max()
        assert error <= allowed, (name, float(error))


def check_same_model(model: PreTrainedModel, other: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> None:
    """Assert that two models have the same state bit for bit, and answer the same to rounding."""
    check_same_state(model.state_dict(), other.state_dict())
    check_same_answers(model, other, batch)


def factorized_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if is_factorized(module)}


def folder_content(folder: Path) -> dict[str, str]:
    """Name of each file below a folder to the hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def check_same_state(state: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    """Assert that two state dicts are equal bit for bit."""
    assert list(state) == list(other)
    for name, tensor in state.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def count_parameters(model: nn.Module) -> int:
    """The numbers that a model stores as parameters, shared ones once."""
    return sum(parameter.numel() for parameter in set(model.parameters()))
