"""What a model is measured on: from what the user passes to disjoint loaders that repeat.

Also what a batch's labels and loss mean, and which rows are padding.
"""

from .curvature import gauss_newton_directions
from .cutting import comes_apart, part_of, unpadded
from .digests import combined_digest, examine, item_digests
from .drawn_labels import draw_labels
from .forward import forward_loss, mean_loss, run_batch, run_watching
from .heads import answering_layers
from .label_checks import position_limit
from .labels import IGNORE_INDEX, Question, Reading, batch_examples, correct_predictions
from .loaders import dataset_size, first_batch, make_dataloader, ready_batches, subset
from .padding import PaddingMasks, watching_masks
from .products import quick_products
from .representations import Representation, model_inputs
from .splits import DataSplits, split_data
from .steady_rows import learn_steady_rows

__all__ = [
    "IGNORE_INDEX",
    "DataSplits",
    "PaddingMasks",
    "Question",
    "Reading",
    "Representation",
    "answering_layers",
    "batch_examples",
    "combined_digest",
    "comes_apart",
    "correct_predictions",
    "dataset_size",
    "draw_labels",
    "examine",
    "first_batch",
    "forward_loss",
    "gauss_newton_directions",
    "item_digests",
    "learn_steady_rows",
    "make_dataloader",
    "mean_loss",
    "model_inputs",
    "part_of",
    "position_limit",
    "quick_products",
    "ready_batches",
    "run_batch",
    "run_watching",
    "split_data",
    "subset",
    "unpadded",
    "watching_masks",
]
