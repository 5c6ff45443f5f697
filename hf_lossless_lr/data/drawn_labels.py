"""Labels that are drawn from the dense model's own predictions, for data that have none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import DataError
from ..layers import evaluating
from .forward import run_batch
from .label_checks import ALIASES
from .labels import label_names
from .loaders import first_examples, make_dataloader, ready_batches


@torch.no_grad()
def draw_labels(
    data: Any,
    model: PreTrainedModel,
    device: torch.device,
    seed: int,
    max_examples: int | None = None,
    keep: bool = False,
    **options: Any,
) -> Any:
    r"""Give each example the label of a class that is drawn from the model's prediction; labels it has do not count.

    With labels `y ~ p` of the dense model, the second moments of the gradients are the Fisher information, its
    Gauss–Newton matrix `E_y[g g^⊤] = Σ_c p_c g_c g_c^⊤`, and the expected loss increase of another model with
    predictions `q` is the divergence `KL(p ‖ q)`.

    Args:
        data: as for `make_dataloader`; may be used up.
        model: the dense model, on `device`; it gives one row of logits for each example.
        device: its device.
        seed: seed of the draws, which do not depend on the batches.
        max_examples: examples to take from the start; None for all.
        keep: whether labels that are there stay.
        options: of `make_dataloader`.

    Returns:
        Data as for `make_dataloader`.

    Raises:
        DataError: if the model does not choose one class for each example.
    """
    loader = make_dataloader(data, model, max_examples=max_examples, **options)
    loader = loader if max_examples is None else first_examples(loader, max_examples)
    name, logits = label_names(model)[0], []
    if keep and any(next(iter(loader)).get(each) is not None for each in label_names(model)):
        return list(loader) if ready_batches(loader) else loader
    with evaluating(model):
        for index, batch in enumerate(logging.tqdm(loader, desc="Drawing labels")):
            moved = send_to_device(_without_labels(batch, model), device)
            logits.append(_class_scores(run_batch(model, moved, index), model))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(torch.cat(logits).softmax(-1), 1, generator=generator)[:, 0]
    if not ready_batches(loader):
        labelled = _Labelled(loader.dataset, drawn.tolist(), name)
        return DataLoader(labelled, batch_size=loader.batch_size, collate_fn=loader.collate_fn)
    parts = drawn.split([len(scores) for scores in logits])
    return [{**_without_labels(batch, model), name: part} for batch, part in zip(loader, parts, strict=True)]


def _class_scores(outputs: Any, model: PreTrainedModel) -> torch.Tensor:
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or logits.shape[-1] < 2:
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else "none"
        raise DataError(
            f"labels='model' draws one of several classes for each example, and {type(model).__name__} gives logits "
            f"of the shape {shape}. Give labels; the text of a language model is its own: labels=input_ids."
        )
    return logits.double().cpu()


def _without_labels(example: Any, model: PreTrainedModel) -> dict[str, Any]:
    return {key: value for key, value in example.items() if key not in (*label_names(model), *ALIASES)}


class _Labelled(Dataset):
    """Examples with labels of their own."""

    def __init__(self, examples: Any, labels: list[int], name: str) -> None:
        self.examples, self.labels, self.name = examples, labels, name

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = cast(Mapping[str, Any], self.examples[index])
        kept = {key: value for key, value in example.items() if key not in (self.name, *ALIASES)}
        return {**kept, self.name: self.labels[index]}
