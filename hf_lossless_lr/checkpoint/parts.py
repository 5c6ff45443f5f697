"""Models within a model that a class of Transformers loads on their own: the picture encoder of a CLIP, for one.

Such a class reads its part of the configuration, and only that: each part says what of it is compressed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..layers import METHOD
from .config import WRITTEN_METHOD, LosslessLowRankConfig
from .contents import with_formats_of


def parts_of(model: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """Return the models within a model that have a part of its configuration as theirs, by name.

    Args:
        model: the model.
    """
    configs = set(map(id, _configs_in(model.config)))
    parts: dict[str, PreTrainedModel] = {}
    for path, module in model.named_modules():
        if path and isinstance(module, PreTrainedModel) and id(module.config) in configs:
            configs.discard(id(module.config))  # of two with the same, the outer one
            parts[path] = module
    return parts


def _configs_in(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield value
            yield from _configs_in(value)


def config_of_part(config: LosslessLowRankConfig, path: str) -> LosslessLowRankConfig:
    """Return what a configuration says of a part: what is unfused, and the records of modules, by their names in it.

    Args:
        config: the configuration of a compressed model.
        path: name of the part.
    """
    prefix = f"{path}."
    modules = {n.removeprefix(prefix): record for n, record in config.modules.items() if n.startswith(prefix)}
    unfused = [name.removeprefix(prefix) for name in config.unfused if name.startswith(prefix)]
    narrowed = {n.removeprefix(prefix): record for n, record in config.narrowed.items() if n.startswith(prefix)}
    return replace(config, modules=modules, unfused=unfused, narrowed=narrowed, part=path)


def take_from_parts(model: PreTrainedModel, config: LosslessLowRankConfig, files: Sequence[str] | None = None) -> bool:
    """Put what the parts of a model say into one configuration, where each was compressed as a model of its own.

    So it is in a checkpoint of a model that was made of such, as `EncoderDecoderModel.from_encoder_decoder_pretrained`
    makes one: the configuration of the whole says nothing, and Transformers takes that of one part. Rounded weights
    of such a model are saved as plain numbers, whatever its parts say.

    Args:
        model: the model.
        config: the configuration as it was read; changed in place.
        files: the checkpoint's files.

    Returns:
        Whether it is such a model.
    """
    found: dict[str, LosslessLowRankConfig] = {}
    for path, part in parts_of(model).items():
        own: Any = getattr(part.config, "quantization_config", None)
        own = own.to_dict() if isinstance(own, LosslessLowRankConfig) else own
        if own is not None and own.get("part") is None and own.get("quant_method") in (METHOD, WRITTEN_METHOD):
            found[path] = cast(LosslessLowRankConfig, LosslessLowRankConfig.from_dict(own))
    if found:
        records = {f"{path}.{name}": r for path, own in found.items() for name, r in own.modules.items()}
        config.modules = records if files is None else with_formats_of(files, records)
        config.unfused = [f"{path}.{name}" for path, own in found.items() for name in own.unfused]
        config.narrowed = {f"{path}.{name}": r for path, own in found.items() for name, r in own.narrowed.items()}
        config.part = None
    return bool(found)


def records_beside(config: LosslessLowRankConfig, files: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """Return what the manifest of a whole model has beside a part of it, by name in the whole model.

    A class may have more than the part whose configuration it reads: `CLIPVisionModelWithProjection` is the picture
    encoder of a `CLIPModel`, and the projection beside it.

    Args:
        config: a configuration as it was read: of a part, or of a whole model, which has nothing beside it.
        files: the checkpoint's files, beside which the configuration of the whole model lies.
    """
    path = Path(files[0]).parent / CONFIG_NAME if files else None
    if config.part is None or path is None or not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8")).get("quantization_config") or {}
    if found.get("part") is not None:  # it was saved on its own
        return {}
    whole: Any = LosslessLowRankConfig.from_dict(found)
    return {name: record for name, record in whole.modules.items() if not name.startswith(f"{config.part}.")}
