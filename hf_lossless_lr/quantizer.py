"""The Transformers plugin: builds factorized layers from the manifest, so that `from_pretrained` loads them.

Importing this file registers the method `lossless_lr`. The factors are ordinary floating-point parameters, so
after loading the model is not flagged as quantized: only `config.quantization_config` remains, which
`save_pretrained` writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers import auto as quantizer_registry

from .config import METHOD, LosslessLowRankConfig
from .errors import CheckpointError, ConfigurationError, TargetError
from .layouts import layout_of, to_dense
from .modules import FactorizedLinear, is_factorized
from .replacement import replace_modules


class LosslessLowRankQuantizer(HfQuantizer):
    """Loader of checkpoints made by `LowRankCompressor`."""

    requires_calibration = True

    def __init__(self, quantization_config: LosslessLowRankConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise ConfigurationError(
                "LosslessLowRankConfig cannot compress while loading: it needs calibration data. Load the dense "
                "model, then call LowRankCompressor(config).compress(model, calib_dataset) and save_pretrained()."
            )
        super().__init__(quantization_config, **kwargs)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = cast(LosslessLowRankConfig, self.quantization_config)
        path_of = _paths_in(model, config.modules)
        built: dict[str, nn.Module] = {}
        for name, path in path_of.items():
            record, module = config.record(name), model.get_submodule(path)
            try:
                built[name] = layout_of(module).factorized(module, record.rank, record.storage)
            except (ConfigurationError, TargetError) as error:
                raise CheckpointError(f"the manifest's record of {name!r} does not fit the model: {error}") from error
        _check_files(built, kwargs.get("checkpoint_files"), unused=len(config.modules) - len(built))
        replace_modules(model, {path_of[name]: module for name, module in built.items()})
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name in ("is_quantized", "hf_quantizer", "quantization_method"):
            model.__dict__.pop(name, None)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config.__dict__.pop("_is_quantized", None)
        mark_compressed(model, cast(LosslessLowRankConfig, self.quantization_config))
        return model

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Move tensor-parallel rules from a dense layer to the factor that they apply to."""
        for name, module in model.named_modules():
            if isinstance(module, FactorizedLinear):
                for key in {name, re.sub(r"\.\d+(?=\.|$)", ".*", name)} & set(plan):
                    style = plan.pop(key)
                    plan[key + (".up" if style.startswith("colwise") else ".down")] = style

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        return dequantize(model, dtype)

    def get_weight_conversions(self) -> list[Any]:
        """Return no conversions: tensors are stored as they are used."""
        return []

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """Return True: `save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: the factors train like any parameter."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True: full fine-tuning works, too."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: `torch.compile` works."""
        return True


def _paths_in(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Map the manifest's names to modules of this class, which may have a head more or less than the saved one."""
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    paths: dict[str, str] = {}
    for name in names:
        candidates = (name, name.removeprefix(prefix), prefix + name)
        path = next((c for c in candidates if c in modules), None)
        if path is not None:
            paths[name] = path
        elif not prefix or name.startswith(prefix):
            raise CheckpointError(
                f"the manifest lists {name!r}, which {type(model).__name__} does not have. The config.json was "
                "edited, or the checkpoint was written with another version of Transformers."
            )
    if not paths:
        raise CheckpointError(
            f"none of the factorized modules of this checkpoint exists in {type(model).__name__}: "
            f"{', '.join(list(names)[:3]) or 'the manifest is empty'}."
        )
    return paths


def _check_files(modules: Mapping[str, nn.Module], files: list[str] | None, unused: int) -> None:
    """Refuse files whose tensors are not those of the factorized modules; stock loading would fill gaps at random.

    Transformers renames modules of some architectures when it saves them, so a module without a namesake in the files
    is matched by the shapes of its tensors.

    Args:
        modules: manifest name to the empty factorized module.
        files: the checkpoint's files.
        unused: number of records whose module this class does not have (a head).

    Raises:
        CheckpointError: if a tensor is missing, extra or of another shape.
    """
    if not files or any(not str(file).endswith(".safetensors") for file in files):
        return
    stored = _stored_modules(files)
    expected = {
        name: {key: tuple(t.shape) for key, t in module.state_dict().items()} for name, module in modules.items()
    }
    strangers = {name: shapes for name, shapes in stored.items() if name not in expected}
    for name, shapes in expected.items():
        if name in stored:
            _compare(name, shapes, stored[name])
            continue
        namesake = next((stranger for stranger, found in strangers.items() if found == shapes), None)
        if namesake is None:
            raise CheckpointError(
                f"the checkpoint has no tensors for {name!r} as its manifest describes it ({shapes}); it is "
                "incomplete, or one of the two was edited."
            )
        del strangers[namesake]
    unlisted = [name for name, shapes in strangers.items() if shapes.get("weight") == (1,) and "up.weight" in shapes]
    if len(unlisted) > unused:
        raise CheckpointError(f"the checkpoint has factors of {unlisted[0]!r}, which its manifest does not list.")


def _stored_modules(files: list[str]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the factorized modules in safetensors files: name to the shapes of the tensors below it."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            shapes.update({key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()})  # noqa: SIM118
    endings = (".down.weight", ".up.weight", ".permutation")
    names = {key.removesuffix(ending) for key in shapes for ending in endings if key.endswith(ending)}
    names |= {
        key.removesuffix(".weight") for key, shape in shapes.items() if key.endswith(".weight") and shape == (1,)
    }
    modules: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in names}
    for key, shape in shapes.items():
        parts = key.split(".")
        for length in range(1, len(parts)):
            name = ".".join(parts[:length])
            if name in modules:
                modules[name][".".join(parts[length:])] = shape
    return modules


def _compare(name: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    for key in sorted(expected.keys() | found.keys()):
        tensor = f"{name}.{key}"
        if key not in found:
            raise CheckpointError(f"the checkpoint lacks the tensor {tensor!r}; it is incomplete or was edited.")
        if key not in expected:
            raise CheckpointError(f"the checkpoint has an extra tensor {tensor!r}, unknown to the manifest.")
        if expected[key] != found[key]:
            raise CheckpointError(
                f"the tensor {tensor!r} has the shape {found[key]}, but the manifest asks for {expected[key]}."
            )


ATTACHED = ("dequantize", "save_pretrained", "_upload_modified_files")
"""Attributes of a model for as long as it is compressed; all but the first come from `model_card`."""


def mark_compressed(model: PreTrainedModel, config: LosslessLowRankConfig) -> None:
    """Record a compression in a model, so that it saves as a compressed checkpoint and `model.dequantize()` works.

    Args:
        model: a model with factorized layers.
        config: the configuration with their manifest.
    """
    model.config.quantization_config = config
    model.__dict__["dequantize"] = partial(dequantize, model)  # a bound method would not survive pickling


def unmark_compressed(model: PreTrainedModel) -> None:
    """Undo `mark_compressed`, and let the model save as any other."""
    for name in ATTACHED:
        model.__dict__.pop(name, None)
    model.config.__dict__.pop("quantization_config", None)


def dequantize(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Turn a compressed model back into a plain dense one, with the approximated weights.

    Args:
        model: a compressed model, changed in place.
        dtype: dtype of the result; default the model's own.

    Returns:
        The same model, without factorized layers and without our configuration.

    Raises:
        TargetError: if the model is not compressed.
    """
    factorized = {name: module for name, module in model.named_modules() if is_factorized(module)}
    if not factorized:
        raise TargetError(f"this {type(model).__name__} has no factorized layers; there is nothing to dequantize.")
    replace_modules(model, {name: to_dense(module) for name, module in factorized.items()})
    unmark_compressed(model)
    if dtype is not None:
        nn.Module.to(model, dtype)
    return model


# Set directly, not with the decorators: those refuse a second import (a reload, a notebook).
quantizer_registry.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = LosslessLowRankConfig
quantizer_registry.AUTO_QUANTIZER_MAPPING[METHOD] = LosslessLowRankQuantizer
