"""Which layers of a model are factorized, what takes their place, and what that stores.

A layer type is one file: its layout (how its weight is one or several matrices) and its factorized form. No other
room tests for a layer type.
"""

from .adapters import lora_targets
from .chain import ConvolutionChain, Step
from .convolution import FactorizedConv1d, FactorizedConv2d
from .coverage import other_weights
from .experts import Routed, UnfusedExperts, routed_rows
from .factorized import METHOD, Factorized, called_with, is_factorized, layers_in
from .layout import Layout, find_layout, layout_of, to_dense, weight_matrices
from .linear import FactorizedLinear
from .model_state import (
    ModelState,
    differentiating_only,
    evaluating,
    on_device,
    own_config,
    own_forward,
    random_state_kept,
)
from .narrow import INPUTS, OUTPUTS, PLACE_BYTES, SIDES, NarrowLinear
from .offloaded import at_hand, check_offloaded, copied, files_of_offloaded
from .patterns import matching, values_of
from .readers import read_by_others
from .replacement import Replacement, finish, in_place, replace_modules, taking_turns
from .rounded import (
    as_matrix,
    checkpoint_bytes,
    format_of,
    from_matrix,
    grid_of,
    grids_in,
    restore_grids,
    rounded_modules,
    set_grid,
    stored_bytes,
)
from .storage import (
    CHANNEL,
    DIMENSIONS,
    FORMS,
    SPATIAL,
    STORAGE_CHOICES,
    STORAGES,
    break_even_rank,
    choose_storage,
    factorized_parameters,
    storage_in,
    weight_bytes,
)
from .stored import Stored, is_complete, stored_in
from .targets import HEADS, Targets, check_gradients, check_model, find_targets
from .unfused import Unfused
from .unfusing import projections, unfuse, unfused
from .watching import weights_read
from .whole import check_whole, without_wrappers

__all__ = [
    "CHANNEL",
    "DIMENSIONS",
    "FORMS",
    "HEADS",
    "INPUTS",
    "METHOD",
    "OUTPUTS",
    "PLACE_BYTES",
    "SIDES",
    "SPATIAL",
    "STORAGES",
    "STORAGE_CHOICES",
    "ConvolutionChain",
    "Factorized",
    "FactorizedConv1d",
    "FactorizedConv2d",
    "FactorizedLinear",
    "Layout",
    "ModelState",
    "NarrowLinear",
    "Replacement",
    "Routed",
    "Step",
    "Stored",
    "Targets",
    "Unfused",
    "UnfusedExperts",
    "as_matrix",
    "at_hand",
    "break_even_rank",
    "called_with",
    "check_gradients",
    "check_model",
    "check_offloaded",
    "check_whole",
    "checkpoint_bytes",
    "choose_storage",
    "copied",
    "differentiating_only",
    "evaluating",
    "factorized_parameters",
    "files_of_offloaded",
    "find_layout",
    "find_targets",
    "finish",
    "format_of",
    "from_matrix",
    "grid_of",
    "grids_in",
    "in_place",
    "is_complete",
    "is_factorized",
    "layers_in",
    "layout_of",
    "lora_targets",
    "matching",
    "on_device",
    "other_weights",
    "own_config",
    "own_forward",
    "projections",
    "random_state_kept",
    "read_by_others",
    "replace_modules",
    "restore_grids",
    "rounded_modules",
    "routed_rows",
    "set_grid",
    "storage_in",
    "stored_bytes",
    "stored_in",
    "taking_turns",
    "to_dense",
    "unfuse",
    "unfused",
    "values_of",
    "weight_bytes",
    "weight_matrices",
    "weights_read",
    "without_wrappers",
]
