"""Content fingerprints of models and batches."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch


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
