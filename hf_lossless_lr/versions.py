"""The version of this package, and those of the packages that it computes with."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"

_PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy", "scipy")


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of those behind its numbers, installed or not."""
    return {
        "python": platform.python_version(),
        "hf-lossless-lr": __version__,
        **{package: _version(package) for package in _PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # from a source tree, which has no metadata
        return str(getattr(sys.modules.get(package), "__version__", "unknown"))
