r"""Calibration statistics from one pass over the data, forward and backward (with G, backward twice).

For each target layer `y = W x + b` and a loss `L` in nats per labelled unit:

* `weight_grad` `G = E[∂L/∂W]`, over labelled units, where it is asked for,
* `input_covariance` `A = E[x xᵀ]`, uncentred, over real tokens (rows that the attention mask keeps),
* `grad_covariance` `B = (1/units) Σ_t g_t g_tᵀ` with `g_t = J_tᵀ v` by the layer's output, and `v` by the logits so
  that `E[v vᵀ]` is the Hessian of the *summed* loss of a batch (`data/curvature.py`; for losses that are not known
  there, `g_t` is the gradient of the loss). So `½ tr(B D A Dᵀ)` predicts nats per labelled unit for a change `D` of
  the weight.

Sums and counts are accumulated (float32 within a batch; across batches float64, from `LARGE` features on float32)
and reduced once over processes, so the result does not depend on how the data is split into batches or over processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import MappingProxyType

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data import watching_masks
from ..errors import DataError, TargetError
from ..fingerprint import batch_fingerprint
from ..layers import differentiating_only
from .collector import Collector
from .recomputing import recomputing
from .records import CalibrationStatistics


def data_fingerprint(loader: DataLoader, accelerator: Accelerator) -> str:
    """Return the fingerprint that `collect_statistics` gives to the same data, without running the model."""
    return _combined([batch_fingerprint(batch) for batch in accelerator.prepare(loader)])


def _combined(digests: list[str]) -> str:
    """Return one digest of all processes' batches, whatever their order."""
    return hashlib.sha256("".join(sorted(gather_object(digests))).encode()).hexdigest()


def collect_statistics(
    model: PreTrainedModel,
    targets: Mapping[str, nn.Module],
    loader: DataLoader,
    accelerator: Accelerator,
    weight_grads: bool = False,
    any_called: bool = True,
    recompute: bool = False,
    beside: Mapping[str, nn.Module] = MappingProxyType({}),
) -> CalibrationStatistics:
    """Collect `A` and `B` of every target, and `G` if asked for, in one forward and backward pass over the data.

    The model is left as it was: modes, `requires_grad`, gradients and hooks. Dropout is off.

    Args:
        model: the dense model, on `accelerator.device`.
        targets: layers to observe, by name.
        loader: batches with labels; prepared here, so that each process sees its own share.
        accelerator: made with `even_batches=False`, so that no example is seen twice.
        weight_grads: whether to collect `G`.
        any_called: whether a pass that calls no target is an error.
        recompute: whether blocks run again in the backward pass, rather than keep what they computed.
        beside: other layers, which only take part in the groups: of their order and their inputs.

    Returns:
        The statistics, the same on each process.

    Raises:
        DataError: if a batch has no labels, the model no loss, or no batch a labelled unit.
        NumericalError: if a loss or a gradient is not finite.
        TargetError: if no target takes part in the forward pass.
    """
    collector = Collector(model, targets, weight_grads, beside)
    totals = torch.zeros(3, dtype=torch.float64, device=accelerator.device)  # units * loss, units, examples
    digests: list[str] = []
    watched = collector.known.items()
    hooks = [module.register_forward_hook(collector.hook(name), with_kwargs=True) for name, module in watched]
    try:
        prepared = accelerator.prepare(loader)
        progress = logging.tqdm(prepared, desc="Calibrating", disable=not accelerator.is_local_main_process)
        watching = watching_masks(model, collector.masks.encoder, lambda: collector.masks)
        differentiating = differentiating_only(model, targets if weight_grads else {})
        with watching, differentiating, recomputing(model, recompute), torch.enable_grad():
            for index, batch in enumerate(progress):
                totals += collector.add_batch(batch, index)
                digests.append(batch_fingerprint(batch))
    finally:
        for hook in hooks:
            hook.remove()
    collector.warn_of_padding()
    collector.sums.reduce(accelerator, collector.known)
    totals = accelerator.reduce(totals, "sum")
    total_units = int(totals[1])
    if total_units == 0:
        raise DataError("no batch has a labelled unit: every label is -100.")
    digest = _combined(digests)
    layers = collector.sums.layer_statistics(total_units)
    uncalled = tuple(name for name in targets if name not in layers)
    groups = collector.groups()
    mean_loss, examples = float(totals[0]) / total_units, int(totals[2])
    statistics = CalibrationStatistics(layers, mean_loss, examples, total_units, digest, groups, uncalled)
    if any_called:
        check_called(statistics)
    return statistics


def check_called(statistics: CalibrationStatistics) -> None:
    """Refuse statistics of no layer.

    Args:
        statistics: the statistics.

    Raises:
        TargetError: if no target took part in the forward pass.
    """
    if not statistics.layers:
        raise TargetError(
            f"none of the chosen layers was called in the forward pass ({', '.join(statistics.uncalled)}); choose "
            "others with `target_modules`."
        )
