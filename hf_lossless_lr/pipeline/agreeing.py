"""Processes that are to end with the same model begin with the same one, the same data and the same choices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate.utils import gather_object

from ..errors import ConfigurationError, TargetError
from ..fingerprint import content_digest, tensors_fingerprint
from ..processes import joined_processes


def check_same(model: Any) -> None:
    """Refuse a model that has other weights in another process; all of them raise.

    Args:
        model: the model, as each process has it.

    Raises:
        TargetError: if one has another number, or none where another one has it.
    """
    if joined_processes().num_processes == 1:
        return
    here = {name: tensor for name, tensor in model.state_dict().items() if not getattr(tensor, "is_meta", False)}
    found = gather_object([tensors_fingerprint(here)])
    others = [process for process, fingerprint in enumerate(found) if fingerprint != found[0]]
    if others:
        raise TargetError(
            f"{len(others)} of {len(found)} processes have other weights of this {type(model).__name__} than the "
            f"first one (process {others[0]}, for one). Load the same in all of them; new weights take the same seed. "
            "For FSDP, Transformers loads some in the first process alone: launch with "
            "`--fsdp_cpu_ram_efficient_loading false`, or set FSDP_CPU_RAM_EFFICIENT_LOADING=false before loading."
        )


def check_same_inputs(inputs: Mapping[str, Any]) -> None:
    """Refuse data or choices that are others in another process; all of them raise.

    Args:
        inputs: what to call each, and its content.

    Raises:
        ConfigurationError: if one of them differs.
    """
    if joined_processes().num_processes == 1:
        return
    found = gather_object([[content_digest(value) for value in inputs.values()]])
    for name, digests in zip(inputs, zip(*found, strict=True), strict=True):
        if len(set(digests)) > 1:
            raise ConfigurationError(
                f"{name}: not the same in each of the {len(found)} processes. Give all of them the same; each takes "
                "its own share of the data."
            )
