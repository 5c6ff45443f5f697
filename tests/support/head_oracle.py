"""What each head answers, in double precision, one example at a time."""

from copy import deepcopy

import numpy as np
import torch
from transformers import PreTrainedModel

from support.tiny_models import IGNORED, Batch, split_batch

Unit = list[tuple[np.ndarray, int]]  # logits and label of each question that the head answers for a labelled unit


@torch.no_grad()
def answered(model: PreTrainedModel, batch: Batch) -> list[list[Unit]]:
    """Return the labelled units of each example."""
    model = deepcopy(model).double().eval()
    return [_units(model, example) for example in split_batch(batch, 1)]


def _units(model: PreTrainedModel, example: Batch) -> list[Unit]:
    kind = type(model).__name__
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in example.items() if k not in _LABELS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = model._shift_right(example["labels"])
    outputs = model(**inputs)
    if "QuestionAnswering" in kind:
        logits = (outputs.start_logits[0].numpy(), outputs.end_logits[0].numpy())
        return [list(zip(logits, (int(example["start_positions"]), int(example["end_positions"])), strict=True))]
    logits, labels = outputs.logits[0], example["labels"][0]
    if "CausalLM" in kind or "LMHead" in kind:
        logits, labels = logits[:-1], labels[1:]
    rows = zip(logits.view(-1, logits.shape[-1]).numpy(), labels.view(-1).tolist(), strict=True)
    return [[(row, label)] for row, label in rows if label != IGNORED]


_LABELS = ("labels", "start_positions", "end_positions")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def loss_of(unit: Unit, temperature: float = 1.0) -> float:
    """Mean cross-entropy over the questions, in nats."""
    return float(np.mean([-log_softmax(logits / temperature)[label] for logits, label in unit]))


def is_right(unit: Unit) -> bool:
    return all(int(logits.argmax()) == label for logits, label in unit)
