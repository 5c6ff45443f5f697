"""`LosslessLowRankConfig`: what the user chooses, and the manifest of what was factorized.

It is a Transformers quantization config, so it travels in `config.json` and selects our loader in `from_pretrained`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import CheckpointError, ConfigurationError
from ..layers import METHOD, STORAGES
from ..renamed import refuse_old_names, with_present_names
from .options import CompressionOptions

FORMAT_VERSION = 2  # 1 had other names of some options


@dataclass
class ModuleRecord:
    """How one module is stored: its rank and the storage of its factors."""

    rank: int
    storage: str


@dataclass(repr=False)
class LosslessLowRankConfig(CompressionOptions, QuantizationConfigMixin):
    """Configuration of a low-rank compression, saved in the model's `config.json`.

    See `CompressionOptions` for the choices. Two more fields are filled in by the compressor:

    Attributes:
        modules: the manifest, module name to `{"rank": int, "storage": str}`. Empty until a model is compressed.
        format_version: version of the checkpoint format.

    Raises:
        ConfigurationError: at construction, if a value is unknown, out of range or contradicts another one.
        CheckpointError: if the manifest is malformed or written by a newer version.
    """

    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    __repr__ = QuantizationConfigMixin.__repr__
    quant_method: str = METHOD  # type: ignore[assignment]  # Transformers types it as its own closed enum

    def __post_init__(self) -> None:
        """Validate the choices and the manifest."""
        super().__post_init__()
        if self.quant_method != METHOD:
            raise ConfigurationError(f"quant_method: must be {METHOD!r}, got {self.quant_method!r}.")
        if not isinstance(self.format_version, int) or not 1 <= self.format_version <= FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint has format version {self.format_version!r}; this package reads versions up to "
                f"{FORMAT_VERSION}. Upgrade with `pip install -U hf-lossless-lr`."
            )
        if not isinstance(self.modules, Mapping):
            raise CheckpointError(f"modules: the manifest must map names to records, got {self.modules!r}.")
        self.modules = {name: _checked_record(name, record) for name, record in self.modules.items()}

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> LosslessLowRankConfig | tuple[LosslessLowRankConfig, dict[str, Any]]:
        """Build a config from the dictionary in a `config.json`.

        Args:
            config_dict: the dictionary.
            return_unused_kwargs: whether to return the keyword arguments that are no fields as well.
            kwargs: values that override the dictionary's.

        Returns:
            The config, with the unused keyword arguments if asked.

        Raises:
            ConfigurationError: if the dictionary has an unknown field.
        """
        if config_dict.get("format_version") == 1:
            config_dict = {**with_present_names(config_dict), "format_version": FORMAT_VERSION}
        refuse_old_names(config_dict)
        known = {f.name for f in fields(cls)}
        for name in config_dict:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else f" Known are: {', '.join(sorted(known))}."
                raise ConfigurationError(f"LosslessLowRankConfig has no field {name!r}.{hint}")
        used = {name: value for name, value in kwargs.items() if name in known}
        config = cls(**{**config_dict, **used})
        unused = {name: value for name, value in kwargs.items() if name not in known}
        return (config, unused) if return_unused_kwargs else config

    def record(self, name: str) -> ModuleRecord:
        """Return the manifest's record of a module."""
        return ModuleRecord(**self.modules[name])


def _checked_record(name: str, record: Any) -> dict[str, Any]:
    expected = {f.name for f in fields(ModuleRecord)}
    if not isinstance(record, Mapping) or set(record) != expected:
        raise CheckpointError(f"modules[{name!r}]: expected the keys {sorted(expected)}, got {record!r}.")
    rank, storage = record["rank"], record["storage"]
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise CheckpointError(f"modules[{name!r}]: rank must be a positive integer, got {rank!r}.")
    if storage not in STORAGES:
        raise CheckpointError(f"modules[{name!r}]: storage must be one of {', '.join(STORAGES)}, got {storage!r}.")
    return {"rank": rank, "storage": storage}
