"""Other people's methods by name, compared on the same statistics, the same splits and the same held-out data."""

from .compare import compare
from .fine_tuning import Recipe, svd_fine_tuned
from .lpaf import Recipes, lpaf
from .methods import METHODS, method_config
from .rank_masks import masked_ranks

__all__ = ["METHODS", "Recipe", "Recipes", "compare", "lpaf", "masked_ranks", "method_config", "svd_fine_tuned"]
