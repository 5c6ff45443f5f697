r"""Labels that are drawn from the dense model's own predictions, for data that have none.

With labels `y ~ p` of the dense model, the second moments of the gradients are the Fisher information, its
Gauss–Newton matrix `E_y[g g^⊤] = Σ_c p_c g_c g_c^⊤`, and the expected loss increase of another model with predictions
`q` is the divergence `KL(p ‖ q)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import DataError, LosslessLowRankError
from ..layers import evaluating, on_device
from .alignment import measured_shift
from .forward import run_batch
from .labels import IGNORE_INDEX, label_columns, label_names, takes_labels
from .loaders import first_examples, make_dataloader, ready_batches
from .representations import NOISE, representations

Labels = dict[str, torch.Tensor]  # of one example, by name

CHANGED = 1e-2  # of the largest score: what logits differ by if the model made inputs of its labels


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
    """Give each example labels that are drawn from the model's prediction; labels it has do not count.

    Classes are drawn for an example (or each of its real tokens, or both ends of a span), floats from normal
    distributions around what a regression predicts. A model without a head gets the seeds of noise in its
    representations; see `representations.py`.

    Args:
        data: as for `make_dataloader`; may be used up.
        model: the dense model; it is where it was afterwards.
        device: the device of the work.
        seed: seed of the draws, which do not depend on the batches.
        max_examples: examples to take from the start; None for all.
        keep: whether labels that are there stay, as of data to judge on, of which a stream alone has a limit.
        options: of `make_dataloader`.

    Returns:
        Data as for `make_dataloader`.

    Raises:
        DataError: if it is not known how the head's labels are drawn, as of a left-to-right language model.
    """
    loader = make_dataloader(data, model, max_examples=max_examples, **options)
    loader = loader if max_examples is None or keep else first_examples(loader, max_examples)
    names = label_names(model) if keep and takes_labels(model) else ()
    if any(next(iter(loader)).get(each) is not None for each in names):
        return list(loader) if ready_batches(loader) else loader
    generator, drawn = torch.Generator().manual_seed(seed), list[Labels]()
    with on_device(model, device), evaluating(model):
        for index, batch in enumerate(logging.tqdm(loader, desc="Drawing labels")):
            moved = send_to_device(_without_labels(batch, model), device)
            outputs = _first_run(model, moved) if index == 0 else run_batch(model, moved, index)
            found = _checked(outputs, model, moved, generator, index == 0)
            drawn += found
    if not ready_batches(loader):
        labelled = _Labelled(loader.dataset, drawn, set(label_columns(model)))
        return DataLoader(labelled, batch_size=loader.batch_size, collate_fn=_joined(loader.collate_fn, drawn[0]))
    batches, place = list[dict[str, Any]](), 0
    for batch in loader:
        rest = _without_labels(batch, model)
        own = drawn[place : place + len(_examples(rest))]
        batches.append({**rest, **_stacked(own, rest)})
        place += len(own)
    return batches


def _first_run(model: PreTrainedModel, batch: Mapping[str, Any]) -> Any:
    """Run a batch without labels; refuse a model that does not run without them, as those that make inputs of them."""
    try:
        return run_batch(model, batch)
    except LosslessLowRankError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(_unknown(model, f"does not run without labels ({reason})")) from error


def _checked(
    outputs: Any, model: PreTrainedModel, batch: Mapping[str, Any], generator: torch.Generator, first: bool
) -> list[Labels]:
    """Return labels of each example of a batch; of the first one, they are tried on the model."""
    try:
        found = _draw(outputs, model, batch, generator)
        if first:
            _check(model, batch, found, outputs)
        return found
    except LosslessLowRankError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(_unknown(model, f"takes other labels than those ({reason})")) from error


def _draw(outputs: Any, model: PreTrainedModel, batch: Mapping[str, Any], generator: torch.Generator) -> list[Labels]:
    """Return labels of each example of a batch, drawn one example after the other."""
    spans = [getattr(outputs, name, None) for name in ("start_logits", "end_logits")]
    if all(isinstance(scores, torch.Tensor) and scores.ndim == 2 for scores in spans):
        names = ("start_positions", "end_positions")
        rows = zip(*(scores.double().cpu() for scores in spans), strict=True)  # type: ignore[union-attr]
        return [{n: _class(s, generator) for n, s in zip(names, row, strict=True)} for row in rows]
    name, logits = label_names(model)[0], getattr(outputs, "logits", None)
    headless = logits is None or not takes_labels(model)
    if headless and representations(outputs, {**batch, NOISE: _examples(batch)}):
        seeds = torch.randint(2**40, (len(_examples(batch)),), generator=generator)
        return [{NOISE: number} for number in seeds]
    draw = _way(logits, model)
    if draw is None or not isinstance(logits, torch.Tensor):
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else "none"
        raise DataError(_unknown(model, f"gives logits of the shape {shape}"))
    if logits.ndim < 3:
        return [{name: draw(scores, generator)} for scores in logits.double().cpu()]
    mask = batch.get("attention_mask")
    real = [slice(None)] * len(logits) if mask is None or mask.shape != logits.shape[:2] else list(mask.bool())
    return [{name: draw(s[kept].float().cpu(), generator)} for s, kept in zip(logits, real, strict=True)]


def _way(logits: Any, model: PreTrainedModel) -> Callable[[torch.Tensor, torch.Generator], torch.Tensor] | None:
    """Return what draws from the scores of an example; None where it is not known."""
    problem = getattr(model.config, "problem_type", None)
    if not isinstance(logits, torch.Tensor) or not logits.shape[-1]:
        return None
    if logits.ndim == 3 and logits.shape[-1] >= 2:
        return _class
    if logits.ndim != 2 and not (logits.ndim == 1 and problem == "regression"):
        return None
    if problem == "multi_label_classification":
        return lambda scores, generator: torch.bernoulli(scores.sigmoid(), generator=generator).float()
    return _number if logits.shape[-1] == 1 or problem == "regression" else _class


def _class(scores: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)[..., 0]


def _number(predicted: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return normal numbers, so scattered that the gradients' second moment is the Hessian of the mean square."""
    noise = torch.randn(predicted.shape, generator=generator, dtype=predicted.dtype)
    return (predicted + noise * (predicted.numel() / 2) ** 0.5).float().squeeze()


def _check(model: PreTrainedModel, batch: Mapping[str, Any], drawn: list[Labels], before: Any) -> None:
    """Refuse a model that answers otherwise once it has labels, and whose tokens answer to those of the next ones."""
    labels = {name: value.to(model.device) for name, value in _stacked(drawn, batch).items()}
    tokens = next(iter(labels.values()))
    if NOISE in labels:
        return
    outputs = run_batch(model, {**batch, **labels})
    if tokens.ndim < 2 or tokens.is_floating_point():
        return
    largest = float(before.logits.abs().max())
    if not torch.allclose(outputs.logits, before.logits, rtol=CHANGED, atol=CHANGED * largest):
        raise DataError(_unknown(model, "makes inputs of its labels"))
    if measured_shift(outputs.logits, tokens, outputs.loss, IGNORE_INDEX) != 0:
        raise DataError(_unknown(model, "does not answer to the label of a token at its own position"))


def _unknown(model: PreTrainedModel, what: str) -> str:
    remedy = "Give labels; the text of a language model is its own: labels=input_ids."
    if not takes_labels(model):
        remedy = "Take the model without its head, whose representations are compared, or a head that takes labels."
    return (
        f"labels='model' draws classes, positions or numbers that a model predicts, and {type(model).__name__} {what}"
        f". {remedy}"
    )


def _examples(batch: Mapping[str, Any]) -> torch.Tensor:
    """Return a tensor with a row for each example: the first that the model takes."""
    return next(value for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim)


def _without_labels(example: Any, model: PreTrainedModel) -> dict[str, Any]:
    labels = label_columns(model)
    return {key: value for key, value in example.items() if key not in labels}


def _stacked(drawn: list[Labels], batch: Mapping[str, Any]) -> Labels:
    """Return the labels of a batch; those of its real tokens where its mask has them."""
    mask, stacked = batch.get("attention_mask"), {}
    for name in drawn[0]:
        values = [labels[name] for labels in drawn]
        if mask is not None and _of_tokens(values[0]):
            values = [_at(real, value) for real, value in zip(mask, values, strict=True)]
        stacked[name] = torch.stack(values)
    return stacked


def _of_tokens(labels: torch.Tensor) -> bool:
    return labels.ndim == 1 and not labels.is_floating_point()


def _at(mask: Any, labels: torch.Tensor) -> torch.Tensor:
    """Return labels of real tokens where a mask has them, and -100 elsewhere."""
    real = torch.as_tensor(mask).bool().cpu()
    placed = torch.full(real.shape, IGNORE_INDEX)
    placed[real] = labels[labels != IGNORE_INDEX]
    return placed


def _joined(collate: Any, names: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Return a collator that joins examples as another does, and their drawn labels."""

    def joined(items: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate([{key: value for key, value in item.items() if key not in names} for item in items])
        drawn = [{name: item[name] for name in names} for item in items]
        return {**batch, **_stacked(drawn, batch)}

    joined.plain = getattr(collate, "plain", False)  # type: ignore[attr-defined]
    return joined


class _Labelled(Dataset):
    """Examples with labels of their own."""

    def __init__(self, examples: Any, drawn: list[Labels], dropped: set[str]) -> None:
        self.examples, self.drawn, self.dropped = examples, drawn, dropped

    def __len__(self) -> int:
        return len(self.drawn)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = cast(Mapping[str, Any], self.examples[index])
        kept = {key: value for key, value in example.items() if key not in self.dropped}
        mask, drawn = kept.get("attention_mask"), self.drawn[index]
        if mask is not None:
            drawn = {name: _at(mask, value) if _of_tokens(value) else value for name, value in drawn.items()}
        return {**kept, **drawn}
