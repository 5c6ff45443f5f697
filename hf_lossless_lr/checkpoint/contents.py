"""Do the files of a checkpoint hold what its manifest says?"""

from __future__ import annotations

from collections.abc import Mapping

from safetensors import safe_open

from ..errors import CheckpointError
from ..layers import Factorized, layers_in


def check_files(modules: Mapping[str, Factorized], files: list[str] | None, unused: int) -> None:
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
    stored = _stored_layers(files)
    expected = {name: module.tensor_shapes() for name, module in modules.items()}
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
    unlisted = [name for name, shapes in strangers.items() if Factorized.is_complete(shapes)]
    if len(unlisted) > unused:
        raise CheckpointError(f"the checkpoint has factors of {unlisted[0]!r}, which its manifest does not list.")


def _stored_layers(files: list[str]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the factorized layers in safetensors files: name to the shapes of the tensors below it."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            shapes.update({key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()})  # noqa: SIM118
    return layers_in(shapes)


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
