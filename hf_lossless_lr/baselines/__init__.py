"""Other people's methods by name, compared on the same statistics, the same splits and the same held-out data."""

from .compare import compare
from .methods import METHODS, method_config

__all__ = ["METHODS", "compare", "method_config"]
