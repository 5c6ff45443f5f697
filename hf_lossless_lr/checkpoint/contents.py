"""Do the files of a checkpoint hold what its manifest says, and can their numbers be used?"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import CheckpointError
from ..layers import Factorized, NarrowLinear, Stored, is_complete, is_factorized, layers_in

LOAD_THE_WHOLE = "Load the class that was saved, which the config.json names, and take this model from it."
DENSE = (
    "it has the weight of a dense layer, as if a model that from_config built had been saved. Take "
    "quantization_config out of its config.json; compressed_architecture(model) gives such a model its "
    "compressed layers."
)
INTEGERS = {torch.int8: "I8", torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32"}  # as safetensors call them


def check_files(
    modules: Mapping[str, Factorized | Stored | NarrowLinear],
    files: list[str] | None,
    unused: int,
    part: str | None = None,
    others: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> None:
    """Refuse files whose tensors are not those of the compressed modules; stock loading would fill gaps at random.

    Transformers renames modules of some architectures when it saves them, so a module without a namesake in the files
    is matched by the shapes of its tensors.

    Args:
        modules: manifest name to the empty module: factorized, with a rounded weight, or a narrow layer with what is
            inside.
        files: the checkpoint's files.
        unused: number of records whose module this class does not have (a head, a decoder).
        part: name of the model in the files, where it is a part of the one that they are of.
        others: shapes of the tensors of the model that are of no compressed module, by name, whatever they look like.

    Raises:
        CheckpointError: if a file cannot be read, a tensor is missing, extra, of another shape or kind of number, or a
            permutation is none.
    """
    if not files or not _readable(files):
        return
    stored = {
        n: shapes for n, shapes in _stored_layers(files).items() if n in modules or not _is_in(others, n, shapes)
    }
    if part is not None and not modules.keys() <= stored.keys():  # else it was saved as a model of its own
        beside = modules.keys() & stored.keys()  # of the whole model, by their names in it
        stored = {n: shapes for n, shapes in stored.items() if n in beside or n.startswith(f"{part}.")}
        modules = {name if name in beside else f"{part}.{name}": module for name, module in modules.items()}
        if stored.keys() <= beside:
            raise CheckpointError(
                f"{Path(files[0]).parent} has the model {part!r} under other names, so that nothing would be found "
                f"for it. {LOAD_THE_WHOLE}"
            )
    _check_kinds(modules, {n for n, shapes in stored.items() if is_complete(shapes)}, files)
    expected = {name: module.tensor_shapes() for name, module in modules.items()}
    strangers = {name: shapes for name, shapes in stored.items() if name not in expected}
    namesakes: dict[Any, list[str]] = {}
    for name, shapes in strangers.items():
        namesakes.setdefault(frozenset(shapes.items()), []).append(name)
    for name, shapes in expected.items():
        if name in stored:
            _compare(name, shapes, stored[name])
            continue
        found = namesakes.get(frozenset(shapes.items()))
        if not found:
            raise CheckpointError(
                f"the checkpoint has no tensors for {name!r} as its manifest describes it ({shapes}); "
                + (DENSE if f"{name}.weight" in _names(files) else "it is incomplete, or one of the two was edited.")
            )
        del strangers[found.pop()]
    unlisted = [name for name, shapes in strangers.items() if is_complete(shapes)]
    if len(unlisted) > unused:
        raise CheckpointError(f"the checkpoint has factors of {unlisted[0]!r}, which its manifest does not list.")


def _is_in(tensors: Mapping[str, tuple[int, ...]], name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether tensors below a name are among others, which then have their shapes."""
    same = [tensors[f"{name}.{key}"] == shape for key, shape in shapes.items() if f"{name}.{key}" in tensors]
    return bool(same) and all(same)


def _names(files: Sequence[str]) -> set[str]:
    return {key for _, _, key in _stored(files)}


def _readable(files: Sequence[str]) -> bool:
    """Return whether all files are of the one format that is read."""
    return all(str(file).endswith(".safetensors") for file in files)


def with_formats_of(files: Sequence[str], records: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the records of a manifest without the number formats, and the layers, that files have as plain numbers.

    Args:
        files: the checkpoint's files.
        records: of its modules, by name.
    """
    if not _readable(files):
        return dict(records)
    names = _names(files)
    result = {}
    for name, record in records.items():
        if "format" not in record or not names.isdisjoint({f"{name}.codes", f"{name}.down.codes"}):
            result[name] = record
        elif record["rank"] is not None:
            result[name] = {key: value for key, value in record.items() if key != "format"}
    return result


def _stored_layers(files: Sequence[str]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the compressed layers in safetensors files: name to the shapes of the tensors below it."""
    return layers_in({key: tuple(tensors.get_slice(key).get_shape()) for _, tensors, key in _stored(files)})


def _stored(files: Sequence[str]) -> Iterator[tuple[str, Any, str]]:
    """Yield each file, what reads it, and the name of each of its tensors."""
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    yield file, tensors, key
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is cut off, damaged or no safetensors file: {error}") from error


def _check_kinds(modules: Mapping[str, nn.Module], names: Collection[str], files: Sequence[str]) -> None:
    """Refuse numbers of other kinds than they must be, and orders that are none; these are small enough to read."""
    kinds: dict[str, set[torch.dtype]] = {}
    for module in modules.values():
        for key, tensor in module.state_dict().items():
            kinds.setdefault(key, set()).add(tensor.dtype)
    for file, tensors, key in _stored(files):
        layer = layer_of(key, names)
        below = None if layer is None else key[len(layer) + 1 :]
        if below is not None and below.rpartition(".")[2] == "permutation":
            with torch.device("cpu"):  # Transformers may be building a model on the meta device
                order = tensors.get_tensor(key)
            _check_permutation(order, key, [file])
        elif below in kinds:
            dtype = tensors.get_slice(key).get_dtype()
            integers = [INTEGERS[kind] for kind in kinds[below] if not kind.is_floating_point]
            if dtype not in integers if integers else not dtype.startswith(("F", "BF")):
                raise CheckpointError(
                    f"the tensor {key!r} in {file} has the dtype {dtype}; it must be in "
                    f"{' or '.join(integers) or 'floating point'}. The file was edited or damaged."
                )


def _check_permutation(order: torch.Tensor, name: str, files: Sequence[str] | None) -> None:
    """Refuse an order in which a place is missing, doubled or out of range: it would move outputs silently."""
    if order.dtype != torch.int32 or order.ndim != 1:
        raise CheckpointError(
            f"the tensor {name!r} in {_file_of(name, files)} has the dtype {order.dtype} and the shape "
            f"{tuple(order.shape)}; it must be a row of int32. The file was edited or damaged."
        )
    if not torch.equal(order.sort().values, torch.arange(len(order), dtype=order.dtype, device=order.device)):
        raise CheckpointError(
            f"the tensor {name!r} in {_file_of(name, files)} is no permutation of 0 to {len(order) - 1}: a place is "
            "missing, doubled or out of range. The file was edited or damaged."
        )


def layer_of(key: str, names: Collection[str]) -> str | None:
    """Return the outermost of some modules that a tensor lies below, by its name; None if it lies below none."""
    above = (key[:place] for place, sign in enumerate(key) if sign == ".")
    return next((name for name in above if name in names), None)


def check_read(model: nn.Module, files: Sequence[str] | None) -> None:
    """Refuse a loaded model if Transformers looked for numbers under other names than they have in the files.

    Those of such layers would be random. It is asked before rounded weights are decoded.

    Args:
        model: the model, as it was loaded; what is not in memory (offloaded) is passed over.
        files: the checkpoint's files; without any, a state dict was given, and nothing is asked.

    Raises:
        CheckpointError: if a tensor of a compressed layer was not loaded.
    """
    for name, module in model.named_modules() if files else ():
        if is_factorized(module) or isinstance(module, (Stored, NarrowLinear)):
            for tensor in (*module.parameters(), *module.buffers()):
                if not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False):
                    raise CheckpointError(
                        f"{type(model).__name__} found no numbers for {name!r} in {_file_of(name, files)}, which has "
                        f"them under other names. {LOAD_THE_WHOLE}"
                    )


def check_loaded(model: nn.Module, files: Sequence[str] | None) -> None:
    """Refuse a loaded model whose factors cannot be used; what is not in memory (offloaded) is passed over.

    Args:
        model: the model, as it was loaded.
        files: the checkpoint's files, for the message.

    Raises:
        CheckpointError: if a parameter or a scale is not finite, or a permutation is none.
    """
    numbers: dict[str, torch.Tensor] = dict(model.named_parameters())
    for name, module in model.named_modules():
        if is_factorized(module):
            for key, buffer in module.named_buffers(recurse=False):
                if key == "permutation" and not buffer.is_meta:
                    _check_permutation(buffer, f"{name}.{key}", files)
        if isinstance(module, NarrowLinear) and not module.places.is_meta:
            refusal = module.refusal()
            if refusal is not None:
                raise CheckpointError(
                    f"the tensor {name + '.places'!r} in {_file_of(f'{name}.places', files)} {refusal}. The file was "
                    "edited or damaged."
                )
        if isinstance(module, Stored):
            numbers[f"{name}.scale"] = module.scale.view(torch.bfloat16)
    for name, parameter in numbers.items():
        values: Any = parameter.detach()
        values = values.to_local() if hasattr(values, "to_local") else values
        if not values.is_meta and values.dtype.itemsize > 1 and not _is_finite(values):
            raise CheckpointError(
                f"the tensor {name!r} in {_file_of(name, files)} has values that are NaN or infinite in "
                f"{values.dtype}. The file was edited or damaged, or its numbers are too large for that dtype."
            )


def _is_finite(values: torch.Tensor) -> bool:
    """Return whether all values are finite: what is not makes their sum so, which takes less time to see."""
    total = values.sum(dtype=torch.promote_types(values.dtype, torch.float32))
    return bool(torch.isfinite(total)) or bool(torch.isfinite(values).all())


def _file_of(name: str, files: Sequence[str] | None) -> str:
    """Return the file that has a tensor, or else their folder."""
    found = [str(file) for file in files or ()]
    if _readable(found):
        for file, _, key in _stored(found):
            if key == name or key.endswith(f".{name}") or name.endswith(f".{key}"):
                return file
    return str(Path(found[0]).parent) if found else "the state dict"


def _compare(name: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    for key in sorted(expected.keys() | found.keys()):
        tensor = f"{name}.{key}"
        if key not in found:
            raise CheckpointError(f"the checkpoint lacks the tensor {tensor!r}; it is incomplete or was edited.")
        if key not in expected:
            raise CheckpointError(f"the checkpoint has an extra tensor {tensor!r}, unknown to the manifest.")
        if expected[key] != found[key]:
            raise CheckpointError(
                f"the tensor {tensor!r} has the shape {found[key]}, but the manifest asks for {expected[key]}: "
                "the file was edited, another class was saved, or the configuration is for another size (num_labels, "
                f"vocab_size). {LOAD_THE_WHOLE}"
            )
