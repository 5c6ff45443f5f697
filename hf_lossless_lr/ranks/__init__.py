"""From loss curves and sizes to a rank and a number format for each layer, deterministically.

`flops`, `latency` and the paper's epsilon measure; everything else is arithmetic.
"""

from .flops import flop_sizes, forward_flops, unreached_size
from .latency import FEWEST_TURNS, TURNS, LatencyTable, Run, forward_seconds, latency_sizes, speed_in_turns
from .objectives import OBJECTIVES, Limits, Search
from .paper import find_epsilon, select_paper
from .path import compression_path, second_order_cost
from .search import lowest_loss, most_compressed
from .select import kept_share, select_budget, select_uniform, share_of_budget
from .sizes import Budget, Choice, Choices, LayerSize, byte_size, default_multiple, parameter_size, parameter_sizes

__all__ = [
    "FEWEST_TURNS",
    "OBJECTIVES",
    "TURNS",
    "Budget",
    "Choice",
    "Choices",
    "LatencyTable",
    "LayerSize",
    "Limits",
    "Run",
    "Search",
    "byte_size",
    "compression_path",
    "default_multiple",
    "find_epsilon",
    "flop_sizes",
    "forward_flops",
    "forward_seconds",
    "kept_share",
    "latency_sizes",
    "lowest_loss",
    "most_compressed",
    "parameter_size",
    "parameter_sizes",
    "second_order_cost",
    "select_budget",
    "select_paper",
    "select_uniform",
    "share_of_budget",
    "speed_in_turns",
    "unreached_size",
]
