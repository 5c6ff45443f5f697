"""The Transformers plugin: builds factorized layers from the manifest, so that `from_pretrained` loads them.

Importing this file registers the method `lossless_lr`. The factors are ordinary floating-point parameters, so
after loading the model is not flagged as quantized: only `config.quantization_config` remains, which
`save_pretrained` writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers import auto as quantizer_registry

from ..errors import CheckpointError, ConfigurationError, TargetError
from ..formats import FLOAT
from ..layers import METHOD, Factorized, FactorizedLinear, Stored, layout_of, replace_modules, stored_in
from .attached import attach_saved_card, dequantize, mark_loaded, mark_loading, unmark_loading
from .config import WRITTEN_METHOD, LosslessLowRankConfig, ModuleRecord
from .contents import check_files, check_loaded
from .encoding import dequantize_stored

KEPT = ("int8",)  # stay as they are stored with `compute="stored"`; unpacking fewer bits in every call does not pay


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
        self._files: list[str] | None = None

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = cast(LosslessLowRankConfig, self.quantization_config)
        path_of = _paths_in(model, config.modules)
        built: dict[str, Factorized | Stored] = {}
        for name, path in path_of.items():
            record, module = config.record(name), model.get_submodule(path)
            try:
                built[name] = _empty(module, record)
            except (ConfigurationError, TargetError) as error:
                raise CheckpointError(f"the manifest's record of {name!r} does not fit the model: {error}") from error
        self._files = kwargs.get("checkpoint_files")
        check_files(built, self._files, unused=len(config.modules) - len(built))
        replace_modules(model, {path_of[name]: module for name, module in built.items()})
        whole = {type(module).__name__ for module in built.values()}  # a device map must not split them
        model._no_split_modules = whole.union(model._no_split_modules or ())
        mark_loading(model)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        unmark_loading(model)
        if stored_in(model) and getattr(model, "_is_distributed_loading_by_transformers", False):
            raise CheckpointError(
                "a checkpoint with rounded weights cannot be split over devices while it is loaded. Load it in one "
                "process, call `model.dequantize()`, save the result and load that."
            )
        config = cast(LosslessLowRankConfig, self.quantization_config)
        dequantize_stored(model, keep=KEPT if config.compute == "stored" else ())
        check_loaded(model, self._files)
        mark_loaded(model, config)
        if self._files:
            attach_saved_card(model, Path(self._files[0]).parent)
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


def _empty(module: Any, record: ModuleRecord) -> Factorized | Stored:
    """Return what takes the place of a module, without its numbers."""
    if record.rank is None or record.storage is None:
        if type(module) is not nn.Embedding:
            layout_of(module)  # refuses what is no layer of a known type
        return Stored(module, record.format)
    layer = layout_of(module).factorized(module, record.rank, record.storage, record.form)
    if record.format != FLOAT:
        layer.down = Stored(layer.down, record.format, guarded=False)
        layer.up = Stored(layer.up, record.format, guarded=False)
    return layer


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
            f"none of the compressed modules of this checkpoint exists in {type(model).__name__}: "
            f"{', '.join(list(names)[:3]) or 'the manifest is empty'}."
        )
    return paths


# Set directly, not with the decorators: those refuse a second import (a reload, a notebook).
quantizer_registry.AUTO_QUANTIZATION_CONFIG_MAPPING[WRITTEN_METHOD] = LosslessLowRankConfig
quantizer_registry.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = LosslessLowRankConfig  # as older versions wrote it
quantizer_registry.AUTO_QUANTIZER_MAPPING[METHOD] = LosslessLowRankQuantizer
_registry: Any = quantizer_registry
if LosslessLowRankConfig not in _registry.LOADING_ATTRIBUTES_CONFIG_TYPES:  # those whose loading attributes are heeded
    _registry.LOADING_ATTRIBUTES_CONFIG_TYPES += (LosslessLowRankConfig,)
