"""An adapter that was trained on the dense model, merged into the compressed one: factors grow by its rank."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from ..errors import TargetError
from ..factors import Factorization, MetricFactors
from ..layers import (
    CHANNEL,
    NarrowLinear,
    Stored,
    break_even_rank,
    check_whole,
    copied,
    from_matrix,
    grids_in,
    is_factorized,
    layout_of,
    replace_modules,
    to_dense,
)
from .attached import refresh_manifest
from .storing import check_plain

WEIGHTS = "adapter_model.safetensors"
MERGE_FIRST = "Merge the adapter into the dense model, with `merge_and_unload()`, and compress the result."


@torch.no_grad()
def merge_dense_adapter(model: PreTrainedModel, adapter: str | os.PathLike[str]) -> PreTrainedModel:
    r"""Merge a LoRA adapter of the dense model into the compressed one, which saves as a compressed checkpoint.

    A layer's matrix `W'`, in place of the dense `W`, becomes `W' + s B A`, with the scale `s` of the adapter:

    * of factors `U V` of rank `k`, with an adapter of rank `r`: `[U, sB] [V; A]`, of rank `k + r` in the same storage.
      The layer becomes dense where these would be no fewer numbers than `W` has, or where it has a spatial form;
    * of a dense layer or an embedding: the sum.

    Modules that the adapter has as a whole (`modules_to_save`, such as a new head) take the place of the model's. The
    adapter was not trained on `W'`, and the error of the compression was not measured on its task: judge the result.

    Args:
        model: a compressed model, changed in place; unchanged after an error.
        adapter: folder or name on the Hub of a LoRA adapter of the same architecture, in safetensors.

    Returns:
        The same model.

    Raises:
        TargetError: if the model is not compressed, the adapter is of another kind or does not fit the model, or it
            changes weights that cannot be changed: rounded, tied, offloaded or spread over processes, or of a
            convolution in groups, which PEFT's adapters mix.
        ImportError: if PEFT is not installed.
    """
    check_whole(model)
    if not any(is_factorized(module) for module in model.modules()) and not grids_in(model):
        raise TargetError(f"this {type(model).__name__} is not compressed; merge the adapter with PEFT itself.")
    twin = _dense_twin(model, adapter)
    new: dict[str, nn.Module] = {}
    for name, found in _found_in(twin):
        _check(model, name)
        old = model.get_submodule(name)
        new[name] = _merged(old, found) if hasattr(found, "get_delta_weight") else _like(old, found)
    replace_modules(model, new)
    refresh_manifest(model)
    return model


def _dense_twin(model: PreTrainedModel, adapter: str | os.PathLike[str]) -> nn.Module:
    """Return the dense architecture, without numbers, with the adapter on it, as PEFT reads and places it."""
    from peft import PeftConfig, inject_adapter_in_model
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    name = os.fspath(adapter)
    config = PeftConfig.from_pretrained(name)
    _check_config(name, config)
    file = cached_file(name, WEIGHTS, _raise_exceptions_for_missing_entries=False)
    if file is None:
        raise TargetError(f"{name} has no {WEIGHTS}; adapters are read from safetensors only. Save it as that.")
    weights = load_peft_weights(str(Path(file).parent), device="cpu")
    weights = {key.removeprefix("base_model.model."): tensor for key, tensor in weights.items()}
    with torch.device("meta"):
        twin: Any = type(model)(deepcopy(model.config))
    try:
        twin = inject_adapter_in_model(config, twin, low_cpu_mem_usage=True)
        own = _own_parameters(twin)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "for .*num_batches_tracked: copying", UserWarning)  # counts of the twin
            result: Any = set_peft_model_state_dict(twin, weights)
    except (KeyError, RuntimeError, ValueError) as error:
        raise TargetError(f"{name} does not fit {type(model).__name__}: {error}") from error
    missing = sorted(own.intersection(result.missing_keys))
    if missing or result.unexpected_keys:
        raise TargetError(
            f"{name} does not fit {type(model).__name__}: it has no numbers for {missing[:3]}, and there is no place "
            f"for {result.unexpected_keys[:3]}."
        )
    return twin


def _own_parameters(twin: nn.Module) -> set[str]:
    """Give the parameters of an adapter memory, in float64, and return their names."""
    for module in twin.modules():
        for kind in getattr(module, "adapter_layer_names", ()):
            getattr(module, kind).double().to_empty(device="cpu")
    return {name for name, parameter in twin.named_parameters() if not parameter.is_meta}


def _check_config(name: str, config: Any) -> None:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    init = getattr(config, "init_lora_weights", True)
    reasons = {
        f"is of the type {kind}, not LORA": kind != "LORA",
        "is DoRA, which scales the very rows it was trained on": getattr(config, "use_dora", False),
        f"was trained on weights that its initialization changed ({init})": init
        not in (True, False, "gaussian", "eva", "orthogonal"),
        "changes biases, too": getattr(config, "bias", "none") != "none" or getattr(config, "lora_bias", False),
        "changes single tokens": bool(getattr(config, "trainable_token_indices", None)),
        "changes parameters that are no layers": bool(getattr(config, "target_parameters", None)),
        "replicates layers": bool(getattr(config, "layer_replication", None)),
    }
    for reason, holds in reasons.items():
        if holds:
            raise TargetError(f"{name} {reason}; that cannot be merged into factors. {MERGE_FIRST}")


def _found_in(twin: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield what the adapter has, by the name of the layer or module that it changes."""
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    for name, module in twin.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            found: Any = module.modules_to_save["default"]
        elif isinstance(module, LoraLayer):
            found = module
            if module.lora_variant or not hasattr(module.get_base_layer(), "weight"):
                kind = type(next(iter(module.lora_variant.values()), module)).__name__
                raise TargetError(f"the adapter of {name!r} ({kind}) cannot be merged into factors. {MERGE_FIRST}")
            if getattr(module.get_base_layer(), "groups", 1) > 1:
                raise TargetError(f"the adapter of {name!r} mixes groups of channels, so no weight there can hold it.")
        else:
            continue
        yield name, found


def _check(model: PreTrainedModel, name: str) -> None:
    """Refuse a module whose weights cannot be changed."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    if any(f"{key}.".startswith(f"{name}.") for key in {*tied, *tied.values()}):
        raise TargetError(f"{name!r} has weights that are tied to others. {MERGE_FIRST}")
    module = model.get_submodule(name)
    check_plain(name, module)
    if isinstance(module, NarrowLinear):
        raise TargetError(
            f"{name!r} has fewer {module.side} than the adapter was trained on, and they are others. {MERGE_FIRST}"
        )
    if grids_in(module) or any(isinstance(part, Stored) for part in module.modules()):
        raise TargetError(f"{name!r} has numbers of 8 bits or fewer, which merging would move. {MERGE_FIRST}")


def _like(old: nn.Module, new: nn.Module) -> nn.Module:
    """Return a module of the adapter on the device and in the dtype of the one that it takes the place of."""
    for path, buffer in old.named_buffers():  # the file of an adapter has none of those that are not saved
        if path not in new.state_dict():
            new.get_submodule(path.rpartition(".")[0])._buffers[path.rpartition(".")[2]] = buffer.clone()
    parameter = next(old.parameters(), None)
    return new if parameter is None else new.to(parameter.device, parameter.dtype)


def _merged(old: Any, lora: Any) -> nn.Module:
    """Return a layer with what an adapter adds to it."""
    if not is_factorized(old):
        new = copied(old)
        wide = torch.promote_types(new.weight.dtype, torch.float32)
        new.weight.copy_(new.weight.to(wide) + lora.get_delta_weight("default").to(new.weight.device, wide))
        return new
    dense: Any = to_dense(old)
    layout, rank = layout_of(dense), old.rank + lora.r["default"]
    fewer = rank <= break_even_rank(old.out_features, old.in_features, old.storage)
    if fewer and old.form == CHANNEL:
        new = layout.factorized(dense, rank, old.storage)
        left, right = _joined(old, lora)
        down, up, order = right, left, None
        if old.storage == "pivoted":
            pivots = Factorization(MetricFactors(left, right, left.norm(dim=0)))
            down, up, order = pivots.truncate(rank, old.storage, new.pivots_inputs)
        new.load_factors(down, up, order, old.bias)
        return new.requires_grad_(old.up.weight.requires_grad)
    weight = old.dense_weight().unflatten(0, (old.groups, -1))
    delta = layout.matrices(dense, lora.get_delta_weight("default")).to(weight)
    dense.weight.copy_(from_matrix(dense, (weight + delta).flatten(0, 1), dense.weight.shape))
    return dense.requires_grad_(old.up.weight.requires_grad)


def _joined(layer: Any, lora: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `[U, sB]` and `[V; A]`, in float64.  # shapes: (out, rank), (rank, in)."""
    up, down, B, A = (
        factor.weight.flatten(1).to(layer.up.weight.device, torch.float64)
        for factor in (layer.up, layer.down, lora.lora_B["default"], lora.lora_A["default"])
    )
    if layer.permutation is not None:  # pivots stand for themselves
        one = torch.eye(layer.rank, dtype=up.dtype, device=up.device)
        if layer.pivots_inputs:
            down = torch.cat([one, down], dim=1).index_select(1, torch.argsort(layer.permutation))
        else:
            up = torch.cat([one, up]).index_select(0, layer.permutation)
    return torch.cat([up, lora.scaling["default"] * B], dim=1), torch.cat([down, A])
