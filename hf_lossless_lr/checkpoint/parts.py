"""Models within a model that a class of Transformers loads on their own: the picture encoder of a CLIP, for one.

Such a class reads its part of the configuration, and only that: each part says what of it is compressed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from transformers import PreTrainedConfig, PreTrainedModel

from .config import LosslessLowRankConfig


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
    """Return what a configuration says of a part: its experts and the records of its modules, by their names in it.

    Args:
        config: the configuration of a compressed model.
        path: name of the part.
    """
    prefix = f"{path}."
    modules = {n.removeprefix(prefix): record for n, record in config.modules.items() if n.startswith(prefix)}
    unfused = [name.removeprefix(prefix) for name in config.unfused if name.startswith(prefix)]
    return replace(config, modules=modules, unfused=unfused, part=path)
