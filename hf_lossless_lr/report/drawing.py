"""What all figures share: colours, the library that draws them, and how they are written."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigurationError
from ..files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEPT, DENSE, BAD, FULL = "#2a6f97", "#b0b0b0", "#c8553d", "#e4e9ed"  # colours
RESOLUTION = 150  # dots per inch


def check_figure(path: str | os.PathLike[str]) -> None:
    """Refuse a figure that cannot be written, which is best known before the work.

    Args:
        path: the PNG file.

    Raises:
        ConfigurationError: if matplotlib is not installed, or a link is in the place of the file.
    """
    require_matplotlib()
    refuse_links([path])


def require_matplotlib() -> None:
    """Refuse to draw without the library.

    Raises:
        ConfigurationError: if matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigurationError("figures need matplotlib: pip install hf-lossless-lr[plots].") from error


def refuse_links(paths: Iterable[str | os.PathLike[str]]) -> None:
    """Refuse to write where links are: what they lead to may be anything.

    Args:
        paths: the files to write.

    Raises:
        ConfigurationError: if one of them is a link.
    """
    for path in paths:
        if Path(path).is_symlink():
            raise ConfigurationError(f"{path} is a link, which figures are not written through; remove it.")


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as a PNG file, as a whole or not at all."""
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)  # names may be in any script
        figure.savefig(temporary, dpi=RESOLUTION, format="png")
