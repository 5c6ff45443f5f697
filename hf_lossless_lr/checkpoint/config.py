"""`LosslessLowRankConfig`: what the user chooses, and the manifest of what was factorized.

It is a Transformers quantization config, so it travels in `config.json` and selects our loader in `from_pretrained`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import CheckpointError, ConfigurationError
from ..formats import FLOAT, FORMATS
from ..layers import CHANNEL, FORMS, METHOD, SIDES, STORAGES, format_of, grid_of, is_factorized, storage_in
from ..renamed import with_present_names
from .options import CompressionOptions
from .presets import preset

FORMAT_VERSION = 6  # 1: other names of options; later ones: number formats, forms, unfused experts, narrow layers
COMPUTES = ("dequantized", "stored")
WRITTEN_METHOD = f"{METHOD}: pip install hf-lossless-lr, then import hf_lossless_lr"
"""What a `config.json` calls the method. Where it is unknown, Transformers prints it, which says what is missing."""


UNWRITTEN = (("format", FLOAT), ("form", CHANNEL))


@dataclass
class ModuleRecord:
    """How one module is stored: its rank and the storage of its factors, both None where it is dense, and the format.

    Attributes:
        rank: rank of the factors.
        storage: `pivoted` or `two-factor`.
        format: number format of the weight or of the factors; `float` is not written.
        form: which matrix of a kernel the factors are of; `channel` is not written.
    """

    rank: int | None
    storage: str | None
    format: str = FLOAT
    form: str = CHANNEL

    def to_dict(self) -> dict[str, Any]:
        """Return what the manifest has of the module."""
        return {name: value for name, value in vars(self).items() if (name, value) not in UNWRITTEN}


@dataclass(repr=False)
class LosslessLowRankConfig(CompressionOptions, QuantizationConfigMixin):
    """Configuration of a low-rank compression, saved in the model's `config.json`.

    See `CompressionOptions` for the choices. More fields are filled in by the compressor:

    Attributes:
        modules: the manifest, module name to `{"rank": int, "storage": str}`, with `"format": str` where numbers are
            rounded and `"form": str` where factors are those of a spatial form; rank and storage are None where the
            module is dense. Empty until a model is compressed.
        unfused: names of the modules whose fused weights are a layer each; see `Unfused`.
        narrowed: names of the layers with fewer outputs or inputs inside, to `{"side": str, "features": int}`; see
            `NarrowLinear`. The layer inside is `NAME.inner`.
        compute: what the weights in memory are: `dequantized` when the model is loaded to the floating-point numbers
            that they stand for, or, for `int8`, as they are `stored`.
        format_version: version of the checkpoint format.
        part: for the configuration of a part of a model, the name of that part in the files; else None, and not
            written.

    Raises:
        ConfigurationError: at construction, if a value is unknown, out of range or contradicts another one.
        CheckpointError: if the manifest is malformed or written by a newer version.
    """

    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    unfused: list[str] = field(default_factory=list)
    narrowed: dict[str, dict[str, Any]] = field(default_factory=dict)
    compute: str = COMPUTES[0]
    format_version: int = FORMAT_VERSION
    part: str | None = None
    __repr__ = QuantizationConfigMixin.__repr__
    quant_method: str = METHOD  # type: ignore[assignment]  # Transformers types it as its own closed enum

    def __post_init__(self) -> None:
        """Validate the choices and the manifest."""
        super().__post_init__()
        if self.quant_method == WRITTEN_METHOD:
            self.quant_method = METHOD
        if self.quant_method != METHOD:
            raise ConfigurationError(f"quant_method: must be {METHOD!r}, got {self.quant_method!r}.")
        if not isinstance(self.format_version, int) or not 1 <= self.format_version <= FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint has format version {self.format_version!r}; this package reads versions up to "
                f"{FORMAT_VERSION}. Upgrade with `pip install -U hf-lossless-lr`."
            )
        if self.compute not in COMPUTES:
            raise ConfigurationError(f"compute: must be one of {', '.join(COMPUTES)}, got {self.compute!r}.")
        if not isinstance(self.modules, Mapping):
            raise CheckpointError(f"modules: the manifest must map names to records, got {self.modules!r}.")
        if not isinstance(self.unfused, list) or not all(isinstance(name, str) for name in self.unfused):
            raise CheckpointError(f"unfused: must be a list of names of modules, got {self.unfused!r}.")
        if not isinstance(self.narrowed, Mapping):
            raise CheckpointError(f"narrowed: must map names of modules to records, got {self.narrowed!r}.")
        for name, record in self.narrowed.items():
            _check_narrow(name, record)
        self.modules = {name: _checked_record(name, record) for name, record in self.modules.items()}

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field as a dictionary would: Transformers asks so of a configuration that a caller hands on."""
        return vars(self).get(name, default)

    @property
    def is_of_compressed(self) -> bool:
        """Whether it is that of a compressed model."""
        return bool(self.modules or self.narrowed)

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
        known = {f.name for f in fields(cls)}
        used = {name: value for name, value in kwargs.items() if name in known}
        config = cls(**{**config_dict, **used})
        unused = {name: value for name, value in kwargs.items() if name not in known}
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> LosslessLowRankConfig:
        """Build the config of a method of the field, such as `svd-llm`.

        Args:
            name: a name in `PRESETS`.
            changes: options besides, or in place of those of the method.

        Returns:
            The config.

        Raises:
            ConfigurationError: if there is no such method, or a value contradicts it.
        """
        return cls(**{**preset(name).options, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return what `config.json` has of the configuration."""
        written = super().to_dict() | {"quant_method": WRITTEN_METHOD}
        return {name: value for name, value in written.items() if (name, value) != ("part", None)}

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return what the configuration given to `from_pretrained` says of a checkpoint that has its own."""
        return {"compute": self.compute}

    def record(self, name: str) -> ModuleRecord:
        """Return the manifest's record of a module."""
        return ModuleRecord(**self.modules[name])


def record_of(layer: Any) -> ModuleRecord | None:
    """Return the manifest's record of a layer; None where it is neither factorized nor rounded."""
    if is_factorized(layer):
        return ModuleRecord(layer.rank, layer.storage, format_of(layer.down), layer.form)
    return None if grid_of(layer) is None else ModuleRecord(None, None, format_of(layer))


def _check_narrow(name: str, record: Any) -> None:
    if not isinstance(record, Mapping) or record.keys() != {"side", "features"} or record["side"] not in SIDES:
        raise CheckpointError(
            f"narrowed[{name!r}]: expected a side ({' or '.join(SIDES)}) and a number of features, got {record!r}."
        )
    features = record["features"]
    if isinstance(features, bool) or not isinstance(features, int) or features < 1:
        raise CheckpointError(f"narrowed[{name!r}]: features must be a positive integer, got {features!r}.")


def _checked_record(name: str, record: Any) -> dict[str, Any]:
    expected = {f.name for f in fields(ModuleRecord)}
    if not isinstance(record, Mapping) or {"format", "form", *record} != expected:
        raise CheckpointError(
            f"modules[{name!r}]: expected the keys ['rank', 'storage'], and perhaps 'format' and 'form', got "
            f"{record!r}."
        )
    rank, storage, number_format = record["rank"], record["storage"], record.get("format", FLOAT)
    form = record.get("form", CHANNEL)
    if form not in FORMS or (form != CHANNEL and storage != "two-factor"):
        raise CheckpointError(
            f"modules[{name!r}]: form must be one of {', '.join(FORMS)}, other forms than {CHANNEL} go with "
            f"two-factor storage; got {form!r} and {storage!r}."
        )
    if number_format not in (FLOAT, *FORMATS):
        known = ", ".join((FLOAT, *FORMATS))
        raise CheckpointError(f"modules[{name!r}]: format must be one of {known}, got {number_format!r}.")
    if rank is None and storage is None and number_format != FLOAT:
        return ModuleRecord(None, None, number_format).to_dict()
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise CheckpointError(f"modules[{name!r}]: rank must be a positive integer, got {rank!r}.")
    if storage not in STORAGES:
        raise CheckpointError(f"modules[{name!r}]: storage must be one of {', '.join(STORAGES)}, got {storage!r}.")
    if storage_in(number_format, storage) != storage:
        raise CheckpointError(f"modules[{name!r}]: {storage} storage does not go with the format {number_format!r}.")
    return ModuleRecord(rank, storage, number_format, form).to_dict()
