"""Models of which a process has but a part of each weight, or which stand in a wrapper."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..errors import TargetError

WRAPPED = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod")
"""What a module is called within one that PyTorch wraps around it: checkpoints of activations, FSDP, compilation."""


def without_wrappers(name: str) -> str:
    """Return the name that a module or a tensor has where nothing is wrapped around the modules above it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def check_whole(model: Any) -> None:
    """Refuse a model whose weights are spread over processes, or that is wrapped for several devices.

    Args:
        model: what the user passed; anything else passes.

    Raises:
        TargetError: if FSDP or tensor parallelism shares its weights out, or if it is wrapped in
            `DistributedDataParallel` or `DataParallel`.
    """
    if isinstance(model, nn.Module) and _is_spread(model):
        raise TargetError(
            f"the weights of this {type(model).__name__} are spread over processes, by FSDP or by tensor parallelism. "
            "Call this before `fully_shard` or `accelerator.prepare`, with a model that was loaded without "
            "`distributed_config`. Or save it, with `state_dict=accelerator.get_state_dict(model)`, and load it again "
            "as a whole."
        )
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        raise TargetError(
            f"this {type(model.module).__name__} is wrapped in {type(model).__name__}, which knows no weights that "
            "come later. Pass `model.module`, and wrap the result."
        )


def _is_spread(model: nn.Module) -> bool:
    """Return whether a module has FSDP on it, or a weight is a part of one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    parts: tuple[Any, ...] = (*model.modules(), *model.parameters(), *model.buffers())
    return any(isinstance(part, (FSDPModule, FullyShardedDataParallel, DTensor)) for part in parts)
