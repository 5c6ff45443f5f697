"""The Transformers plugin: builds factorized layers from the manifest, so that `from_pretrained` loads them.

Importing this file registers the method `lossless_lr`. The factors are ordinary floating-point parameters, so
after loading the model is not flagged as quantized: only `config.quantization_config` remains, which
`save_pretrained` writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers import auto as quantizer_registry

from ..errors import CheckpointError, ConfigurationError, TargetError
from ..formats import FLOAT
from ..layers import (
    METHOD,
    Factorized,
    NarrowLinear,
    Stored,
    Unfused,
    layout_of,
    replace_modules,
    unfused,
)
from .attached import dequantize, mark_compressed, mark_loaded
from .attached_card import attach_saved_card
from .config import WRITTEN_METHOD, LosslessLowRankConfig, ModuleRecord
from .contents import LOAD_THE_WHOLE, check_files, check_loaded, check_read, layer_of
from .conversions import apart_from_layers, renaming_of
from .encoding import dequantize_stored
from .loading import initialize_templates, mark_loading, unmark_loading
from .manifest import narrow_records
from .parallel import adapt_plan, split_layers, waiting_layers
from .parts import records_beside, take_from_parts

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
        self._model: PreTrainedModel | None = None
        self._kept_whole: Any = None

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = cast(LosslessLowRankConfig, self.quantization_config)
        self._files, self._model = kwargs.get("checkpoint_files"), model
        self._kept_whole = model._no_split_modules
        if not hasattr(HfQuantizer, "get_new_dtype"):
            self.pre_quantized = False  # else older versions leave tensors that they rename in the dtype of the file
        put_layers(model, config, self._files)
        mark_loading(model)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        check_read(model, self._files)
        model._no_split_modules = self._kept_whole  # the map is made; FSDP would look for each class that is named
        config = cast(LosslessLowRankConfig, self.quantization_config)
        waiting = waiting_layers(model)
        initialize_templates(model)
        dequantize_stored(model, keep=KEPT if config.compute == "stored" and not waiting else ())
        unmark_loading(model)
        split_layers(model, waiting)
        check_loaded(model, self._files)
        mark_loaded(model, config)
        if self._files:
            attach_saved_card(model, Path(self._files[0]).parent)
        return model

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Let tensor-parallel rules for dense layers be right for those in their place, too."""
        adapt_plan(model, plan)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        return dequantize(model, dtype)

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel | None = None
    ) -> list[Any]:
        """Leave out what would cut or join tensors of compressed layers."""
        model = self._model if model is None else model  # older versions of Transformers do not pass it
        return weight_conversions if model is None else apart_from_layers(weight_conversions, model)

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


def put_layers(model: PreTrainedModel, config: LosslessLowRankConfig, files: list[str] | None = None) -> None:
    """Put the layers that a manifest describes in the place of dense ones, without their numbers.

    Args:
        model: a dense model, changed in place.
        config: the configuration with the manifest, which then has the names of this model.
        files: the checkpoint's files, which must have their tensors.

    Raises:
        CheckpointError: if the manifest does not fit the model or the files.
    """
    if take_from_parts(model, config, files) and not config.is_of_compressed:  # it has plain numbers throughout
        return
    listed = [*config.modules, *config.narrowed, *config.unfused]
    config.unfused = _unfuse(model, config.unfused, config.part)
    narrow = _narrow(model, config)
    path_of = paths_in(model, config.modules, config.part)
    if not (path_of or narrow or config.unfused):
        raise CheckpointError(
            f"none of the compressed modules of this checkpoint exists in {type(model).__name__}: "
            f"{', '.join(listed[:3])}. {LOAD_THE_WHOLE}"
            if listed
            else "the manifest of this checkpoint lists no module; its config.json was edited."
        )
    names = {name for name, _ in model.named_modules()} - set(path_of.values())
    for name, written in records_beside(config, files).items():
        if name in names:  # as the projection beside a tower
            config.modules[name], path_of[name] = written, name
    built: dict[str, Factorized | Stored] = {}
    for name, path in path_of.items():
        record, module = config.record(name), model.get_submodule(path)
        try:
            built[name] = _empty(module, record)
        except (ConfigurationError, TargetError) as error:
            raise CheckpointError(f"the manifest's record of {name!r} does not fit the model: {error}") from error
    replace_modules(model, {path_of[name]: module for name, module in built.items()})
    unused = len(config.modules) + len(config.narrowed) - len(built) - len(narrow)
    check_files({**narrow, **built}, files, unused, config.part, _other_tensors(model))
    config.modules = {path: config.modules[name] for name, path in path_of.items()}  # as this class has them
    config.narrowed = narrow_records(model)
    kinds = (Factorized, Stored, Unfused, NarrowLinear)  # a device map must not split them
    whole = {type(module).__name__ for module in model.modules() if isinstance(module, kinds)}
    model._no_split_modules = whole.union(model._no_split_modules or ())


def _other_tensors(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a model that are of no compressed module, by name."""
    kinds = (Factorized, Stored, NarrowLinear)
    compressed = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    tensors = model.state_dict().items()
    return {key: tuple(tensor.shape) for key, tensor in tensors if layer_of(key, compressed) is None}


def compressed_architecture(model: PreTrainedModel) -> PreTrainedModel:
    """Give a model that `from_config` built the layers that its configuration lists as compressed, without numbers.

    Transformers asks no plugin there, and builds the dense architecture whatever the configuration says. With this,
    `accelerate.load_checkpoint_and_dispatch` loads a compressed checkpoint (with `offload_buffers=True` where some of
    it goes to disk: the order of pivots is a buffer), and a compressed architecture can be trained from new numbers.

    Args:
        model: a dense model, which may be on the meta device (`accelerate.init_empty_weights`); changed in place.

    Returns:
        The same model.

    Raises:
        TargetError: if its configuration is not that of a compressed checkpoint.
        CheckpointError: if the checkpoint has rounded weights, which only `from_pretrained` reads, or its manifest
            does not fit the model.
    """
    found: Any = getattr(model.config, "quantization_config", None)
    found = found if found is None or isinstance(found, dict) else found.to_dict()
    if found is None or found.get("quant_method") not in (METHOD, WRITTEN_METHOD):
        raise TargetError(
            f"the configuration of this {type(model).__name__} is not that of a compressed checkpoint: it has no "
            f"quantization_config of the method {METHOD!r}. Read it from the checkpoint: AutoConfig.from_pretrained."
        )
    config: Any = LosslessLowRankConfig.from_dict(found)
    rounded = [name for name in config.modules if config.record(name).format != FLOAT]
    if rounded:
        raise CheckpointError(
            f"{rounded[0]!r} is stored in the format {config.record(rounded[0]).format!r}, which only from_pretrained "
            "reads. Load the checkpoint with that; it takes a device_map, too."
        )
    put_layers(model, config)
    mark_compressed(model, config)
    return model


def _empty(module: Any, record: ModuleRecord) -> Factorized | Stored:
    """Return what takes the place of a module, without its numbers."""
    if record.rank is None or record.storage is None:
        if not isinstance(module, nn.Embedding):
            layout_of(module)  # refuses what is no layer of a known type
        return Stored(module, record.format)
    layer = layout_of(module).factorized(module, record.rank, record.storage, record.form)
    if record.format != FLOAT:
        layer.down = Stored(layer.down, record.format, guarded=False)
        layer.up = Stored(layer.up, record.format, guarded=False)
    return layer


def _unfuse(model: PreTrainedModel, names: list[str], part: str | None) -> list[str]:
    paths = list(paths_in(model, names, part).values())
    try:
        replace_modules(model, {path: unfused(model.get_submodule(path)) for path in paths})
    except TargetError as error:
        raise CheckpointError(f"the manifest does not fit the model: {error}.") from error
    return paths


def _narrow(model: PreTrainedModel, config: LosslessLowRankConfig) -> dict[str, NarrowLinear]:
    """Put narrow layers in their places, and return them by their names in the manifest."""
    paths, narrow = paths_in(model, config.narrowed, config.part), dict[str, NarrowLinear]()
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for name, path in paths.items():
        dense: Any = model.get_submodule(path)
        side, features = config.narrowed[name]["side"], config.narrowed[name]["features"]
        is_tied = f"{path}.weight" in {*tied, *tied.values()}
        if is_tied or not NarrowLinear.takes(dense, features, side):
            raise CheckpointError(
                f"the manifest's record of {name!r} does not fit the model: it has {features} {side}, of "
                f"{type(dense).__name__ if list(dense.children()) else dense}{' whose weight is tied' * is_tied}."
            )
        narrow[name] = NarrowLinear(dense, features, side)
    replace_modules(model, {paths[name]: layer for name, layer in narrow.items()})
    return narrow


def paths_in(model: PreTrainedModel, names: Iterable[str], part: str | None = None) -> dict[str, str]:
    """Map the manifest's names to modules of this class, which may have more or fewer parts than the saved one.

    Args:
        model: the model.
        names: names of modules, as the saved model has them, or the part of it.
        part: name of that part, if the manifest is that of a part.

    Returns:
        Those that this class has, by name, with their names in it.

    Raises:
        CheckpointError: if a module is missing where its parent is not.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    rename = renaming_of(model)
    paths: dict[str, str] = {}
    for name in names:
        candidates = [name, name.removeprefix(prefix), prefix + name, rename(name)]
        if part is not None:
            candidates += [f"{part}.{name}", f"{part}.{name}".removeprefix(prefix)]
        path = next((c for c in candidates if c in modules), None)
        if path is not None:
            paths[name] = path
        elif (not prefix or name.startswith(prefix)) and not _lies_beside(candidates, modules):
            raise CheckpointError(
                f"the manifest lists {name!r}, which {type(model).__name__} does not have. The config.json was "
                "edited, or the checkpoint was written with another version of Transformers."
            )
    return paths


def _lies_beside(names: Iterable[str], modules: Mapping[str, nn.Module]) -> bool:
    """Return whether a module's names lead to a part that a class lacks as a whole: a decoder, a tower, a pooler."""
    parts = (name.split(".") for name in names)
    above = (".".join(path[:length]) for path in parts for length in range(len(path)))
    return isinstance(modules[max((name for name in above if name in modules), key=len)], PreTrainedModel)


# Set directly, not with the decorators: those refuse a second import (a reload, a notebook).
quantizer_registry.AUTO_QUANTIZATION_CONFIG_MAPPING[WRITTEN_METHOD] = LosslessLowRankConfig
quantizer_registry.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = LosslessLowRankConfig  # as older versions wrote it
quantizer_registry.AUTO_QUANTIZER_MAPPING[METHOD] = LosslessLowRankQuantizer
_registry: Any = quantizer_registry
if LosslessLowRankConfig not in _registry.LOADING_ATTRIBUTES_CONFIG_TYPES:  # those whose loading attributes are heeded
    _registry.LOADING_ATTRIBUTES_CONFIG_TYPES += (LosslessLowRankConfig,)
