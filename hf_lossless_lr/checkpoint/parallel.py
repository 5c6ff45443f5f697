"""Tensor parallelism: what a rule that Transformers has for a dense layer means for the one that took its place.

A rule is for all layers of a name (`layers.*.mlp.up_proj`), of which some may be dense, some factorized in either
storage, and some rounded. So a style stands for Transformers' own one: dense layers it passes on, for others it waits
until their numbers are loaded and decoded.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import CheckpointError
from ..layers import METHOD, Factorized, NarrowLinear, Stored, Unfused, called_with, is_factorized, stored_in
from .encoding import tie_as_before

try:
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from transformers.distributed import parallel_utils, tensor_parallel
except ImportError:  # a torch without processes, or a Transformers whose rules cannot be given another meaning
    tensor_parallel: Any = None  # type: ignore[no-redef]

logger = logging.get_logger(__name__)

COMPRESSED = (Factorized, NarrowLinear, Stored, Unfused)
RULE = "_lossless_lr_rule"
"""Attribute of a module whose rule waits for its numbers."""

LOADED_IN_ONE = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
"""What is in the environment where Accelerate is to send the weights of one process to the others."""


def warn_before_sharding() -> None:
    """Say how to launch, where Accelerate cannot shard a compressed model: it takes its buffers for parameters."""
    if all(os.environ.get(name, "").lower() == value for name, value in LOADED_IN_ONE.items()):
        logger.warning_once(
            "a compressed model has buffers, and Accelerate cannot prepare such models for FSDP version 2 while it "
            "sends weights from one process to the others (as of 1.15: 'Tensor' object has no attribute "
            "'device_mesh'). Launch with `--fsdp_cpu_ram_efficient_loading false`."
        )


def adapt_plan(model: PreTrainedModel, plan: dict[str, str]) -> None:
    """Let the rules of a plan that are about compressed layers, among others, tell the kinds of layers apart.

    Args:
        model: the model with its compressed layers, before its weights are loaded.
        plan: name with wildcards to style; changed in place.

    Raises:
        CheckpointError: if fused modules are to be spread that are several layers here.
    """
    if tensor_parallel is None:
        return
    styles: Any = parallel_utils.ALL_PARALLEL_STYLES
    known = (
        tensor_parallel.ColwiseParallel,
        tensor_parallel.RowwiseParallel,
        tensor_parallel.PackedColwiseParallel,
        tensor_parallel.EmbeddingParallel,
        tensor_parallel.MoeExpertsParallel,
    )
    for name, module in model.named_modules():
        key = parallel_utils.replace_layer_number_by_wildcard(name)
        if isinstance(module, COMPRESSED) and key in plan and not plan[key].startswith(METHOD):
            style, config = styles[plan[key]], getattr(model.config, "distributed_config", None)
            if plan is model.ep_plan and getattr(config, "ep_size", 1) not in (None, 1):
                raise CheckpointError(
                    f"{name!r} has factorized experts, which are not spread over devices (ep_size). Load it "
                    "with `tp_size`, or dequantize it first."
                )
            if isinstance(style, known):
                plan[key] = f"{METHOD} {plan[key]}"
                styles.register(plan[key], _Style(style))


def split_layers(model: PreTrainedModel, waiting: dict[str, nn.Module]) -> None:
    """Split what `waiting_layers` found, now that the numbers are there; the plan is that of Transformers again.

    Args:
        model: the loaded model, with decoded weights.
        waiting: the modules that were in these places while it was loaded.
    """
    plans: tuple[Any, ...] = (model._tp_plan, model._ep_plan) if tensor_parallel is not None else ()
    for plan in plans:
        for key, style in (plan or {}).items():
            plan[key] = style.removeprefix(f"{METHOD} ")
    whole = []
    for name, was in waiting.items():
        style, mesh = vars(was).pop(RULE)
        module: Any = model.get_submodule(name)
        if isinstance(module, NarrowLinear):
            _keep_whole(module, style, mesh)
            whole.append(name)
        elif not is_factorized(module):
            for parameter in dict(module.named_parameters(recurse=False)):
                style.shard_param(module, parameter, mesh)
            style.install_forward(module, mesh)
        elif module.storage == "two-factor":
            _split_factors(module, style, mesh)
        else:
            _keep_whole(module, style, mesh)
            whole.append(name)
    if waiting:
        tie_as_before(model)
    if whole:
        logger.warning_once(
            f"{len(whole)} layers with pivots are whole in each process ({whole[0]}, for one): only factors in "
            "two-factor storage are split."
        )


def waiting_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the modules whose rules wait for their numbers, by name.

    Args:
        model: the model, with its weights loaded and not yet decoded.

    Raises:
        CheckpointError: if it has rounded weights and is spread in another way than by tensors.
    """
    if stored_in(model) and getattr(model, "_is_distributed_loading_by_transformers", False):
        config: Any = getattr(model.config, "distributed_config", None)
        others = [getattr(config, name, 1) not in (None, 1) for name in ("dp_size", "pp_size", "ep_size")]
        if tensor_parallel is None or config is None or any(others):
            raise CheckpointError(
                "a checkpoint with rounded weights cannot be split over devices while it is loaded, other than by "
                "tensor parallelism. Load it in one process, call `model.dequantize()`, save the result and load that."
            )
    return {name: module for name, module in model.named_modules() if RULE in vars(module)}


def _split_factors(layer: Any, style: Any, mesh: Any) -> None:
    """Split the factor that meets the split side of a layer; the other one is small, and whole in each process."""
    if isinstance(style, tensor_parallel.RowwiseParallel):
        style.shard_param(layer.down, "weight", mesh)
        style.install_forward(layer.down, mesh)  # so what is summed over processes is as wide as the rank
        return
    style.shard_param(layer.up, "weight", mesh)
    style.install_forward(layer.up, mesh)
    if layer.bias is not None and _splits_output(style):
        style.shard_param(layer, "bias", mesh)
        tensor_parallel.LocalParamsParallel().install_forward(layer, mesh)


def _splits_output(style: Any) -> bool:
    if isinstance(style, tensor_parallel.ColwiseParallel):
        return isinstance(style.output_layouts, Shard)
    return isinstance(style, tensor_parallel.PackedColwiseParallel)


class _Style:
    """A style of Transformers that waits at compressed layers."""

    def __init__(self, style: Any) -> None:
        self.style = style

    def validate_param(self, module: Any, param: str, mesh: Any, parameter_name: str | None = None) -> None:
        if not isinstance(module, COMPRESSED):
            self.style.validate_param(module, param, mesh, parameter_name)

    def shard_param(self, module: Any, param: str, mesh: Any) -> None:
        if not isinstance(module, COMPRESSED):
            self.style.shard_param(module, param, mesh)

    def install_forward(self, module: Any, mesh: Any) -> Any:
        if not isinstance(module, COMPRESSED):
            return self.style.install_forward(module, mesh)
        if not isinstance(module, Unfused):  # these are whole in each process
            vars(module)[RULE] = self.style, mesh
        return module


def _keep_whole(layer: Any, style: Any, mesh: Any) -> None:
    """Let a layer that is whole in each process take and give a part of the features, as the style's layer does."""
    forward = layer.forward

    def whole_forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        x = called_with(args, kwargs)
        if isinstance(style, tensor_parallel.RowwiseParallel) and isinstance(style.input_layouts, Shard):
            part = x if isinstance(x, DTensor) else style._from_local_last_dim_shard(x, mesh, layer.in_features)
            x = part.redistribute(placements=[Replicate()]).to_local()
        y = forward(x)
        if not _splits_output(style):
            return y
        halves = style.split_factor if isinstance(style, tensor_parallel.PackedColwiseParallel) else 1
        whole = DTensor.from_local(y.unflatten(-1, (halves, -1)), mesh, [Replicate()], run_check=False)
        return whole.redistribute(placements=[Shard(y.ndim)]).to_local().flatten(-2)

    layer.forward = whole_forward
