"""Content fingerprints of models, batches and examples."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .errors import DataError

ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # in the text of an object that has none of its own


def tensors_fingerprint(tensors: Mapping[str, Any]) -> str:
    """Return the SHA-256 of all tensors in a mapping: names, shapes, dtypes and bytes; other values are passed over.

    Args:
        tensors: names to tensors, such as a state dict or a batch.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def batch_fingerprint(batch: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a batch: its tensors, and what else is in it, such as the boxes of a detection model.

    Args:
        batch: the arguments of a forward pass by name.

    Returns:
        64 hexadecimal digits.
    """
    others = {name: value for name, value in batch.items() if not isinstance(value, torch.Tensor)}
    tensors = tensors_fingerprint(batch)
    return content_digest([tensors, others]) if others else tensors


NOT_COMPUTED = {
    *("architectures", "transformers_version", "quantization_config", "dtype", "torch_dtype", "id2label", "label2id"),
    *("problem_type", "use_cache", "return_dict", "output_attentions", "output_hidden_states"),
}
"""Entries of a configuration, besides private ones, of which the answers of a model do not depend.

The problem type, which decides its loss, is filled in by that; see `_other_loss`.
"""


def architecture_fingerprint(model: Any) -> str:
    """Return the SHA-256 of what a model's answers, and its loss, depend on besides weights: class and configuration.

    Args:
        model: a model of Transformers.

    Returns:
        64 hexadecimal digits.
    """
    config = model.config
    other = _other_loss(getattr(config, "problem_type", None), getattr(config, "num_labels", None))
    return content_digest([type(model).__name__, _computed(config.to_dict()), *([other] if other else ())])


def _other_loss(problem_type: str | None, labels: int | None) -> str | None:
    """Return the problem type where the loss is another one than without any: that of one label is a regression's.

    Whether one of several classes is right, or any of them may be, the labels themselves say.
    """
    if labels == 1:
        return None if problem_type == "regression" else problem_type
    return problem_type if problem_type == "regression" else None


def _computed(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _computed(value) if isinstance(value, Mapping) else value
        for name, value in ((str(name), value) for name, value in settings.items())
        if name not in NOT_COMPUTED and not name.startswith("_")
    }


def as_array(value: Any) -> np.ndarray | None:
    """Return numbers as an array in float32 or int64, whatever holds them.

    Args:
        value: a tensor, an array, an image, a number, or a sequence of such.

    Returns:
        The array; None where rows differ in length or entries are no numbers.
    """
    if isinstance(value, torch.Tensor):
        value = value.detach().float() if value.is_floating_point() else value
        value = value.cpu().numpy()
    elif isinstance(value, Sequence) and any(isinstance(item, torch.Tensor) for item in value):
        value = [as_array(item) for item in value]
    try:
        array = np.asarray(value)
    except ValueError:  # rows of several lengths
        return None
    if array.dtype.kind not in "fiub":
        return None
    return array.astype(np.float32 if array.dtype.kind == "f" else np.int64)


def content_digest(value: Any) -> str:
    """Return the SHA-256 of an example: numbers by value whatever container they are in, texts, images.

    Args:
        value: a tensor, an array, a number, a text, an image, or a mapping or sequence of such.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    _add(digest, value)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        for name in sorted(value):
            _add(digest, name)
            _add(digest, value[name])
        return
    if isinstance(value, (str, bytes)):
        value = value.encode() if isinstance(value, str) else value
        digest.update(f"{len(value)}:".encode() + value)
        return
    array = as_array(value)
    if array is not None:
        digest.update(f"{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    elif isinstance(value, (Sequence, np.ndarray)) and len(value):
        digest.update(f"[{len(value)}]".encode())
        for item in value:
            _add(digest, item)
    else:
        text = repr(value)
        if ADDRESS.search(text):
            raise DataError(
                f"an example holds a {type(value).__name__}, of which only the place in memory is known, so that it "
                "cannot be told from others. Decode it before (dataset.map), or pass ready-made batches."
            )
        digest.update(text.encode())
