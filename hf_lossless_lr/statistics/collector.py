r"""Calibration statistics from one forward and backward pass: the only hooks and the only backward of the package.

For each target layer `y = W x + b` and a loss `L` in nats per labelled unit:

* `weight_grad` `G = E[∂L/∂W]`, over labelled units,
* `input_covariance` `A = E[x xᵀ]`, uncentred, over real tokens (rows that the attention mask keeps),
* `grad_covariance` `B = (1/units) Σ_t g_t g_tᵀ` with `g_t` the gradient of the *summed* loss of a batch by the layer's
  output, so that `½ tr(B D A Dᵀ)` predicts nats per labelled unit for a change `D` of the weight.

Sums and counts are accumulated (float32 within a batch, float64 across batches) and reduced once over processes, so
the result does not depend on how the data is split into batches or over processes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data import PaddingMasks, batch_examples, comes_apart, forward_loss, learn_steady_rows, watching_masks
from ..errors import DataError, NumericalError, TargetError
from ..fingerprint import tensors_fingerprint
from ..layers import Layout, called_with, differentiating_only, layout_of, weight_matrices
from .records import CalibrationStatistics, Key, LayerStatistics
from .rows import gram, real_rows
from .shared_rows import layers_with_shared_rows, one_by_one

logger = logging.get_logger(__name__)


RowMask = Callable[[], torch.Tensor | None]  # known once the batch went through the whole model


class _Input(NamedTuple):
    """One input tensor of the current forward pass and the layers that received it."""

    tensor: torch.Tensor
    module: nn.Module
    layout: Layout
    mask: RowMask
    names: list[str]


class _Collector:
    """Sums of one process over its batches."""

    def __init__(self, model: PreTrainedModel, targets: Mapping[str, nn.Module]) -> None:
        self.model = model
        self.targets = targets
        self.layouts = {name: layout_of(module) for name, module in targets.items()}
        self.masks = PaddingMasks(model)
        self.inputs: dict[Hashable, _Input] = {}
        self.recording = False
        self.one_by_one = False  # whether examples go through the model alone
        self.order: list[Key] = []  # of the inputs in a forward pass, also of those that only some batches have
        self.input_sums: dict[Key, torch.Tensor] = {}
        self.input_counts: dict[Key, int] = {}
        self.repeated: set[str] = set()  # targets called more than once in a forward pass
        self.grad_sums: dict[str, torch.Tensor] = {}
        self.weight_grads: dict[str, torch.Tensor] = {}
        for name, module in targets.items():
            matrices = weight_matrices(module)
            groups, out, _ = matrices.shape
            self.grad_sums[name] = matrices.new_zeros((groups, out, out), dtype=torch.float64)
            self.weight_grads[name] = torch.zeros_like(matrices, dtype=torch.float64)

    def hook(self, name: str) -> Any:
        """Return a forward hook that notes the layer's input and waits for the gradient of its output."""
        layout = self.layouts[name]

        def forward_hook(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: torch.Tensor) -> Any:
            x = called_with(args, kwargs)
            mask = self.masks.of(module, x)
            if self.recording:  # false while gradient checkpointing repeats the forward pass
                key = layout.input_key(module, x)
                self.inputs.setdefault(key, _Input(x, module, layout, mask, [])).names.append(name)
            if not output.requires_grad:
                return None
            own = output.clone()  # a model that writes into a view of a result would take the hook off
            own.register_hook(lambda grad: self.add_output_grad(name, grad, mask))
            return own

        return forward_hook

    @torch.no_grad()
    def add_output_grad(self, name: str, grad: torch.Tensor, mask: RowMask) -> None:
        rows = real_rows(self.layouts[name].output_rows(grad), mask())
        self.grad_sums[name] += gram(rows)

    @torch.no_grad()
    def add_inputs(self) -> None:
        """Add the inputs of a finished forward pass, each once for all the layers that share it."""
        calls = Counter(name for entry in self.inputs.values() for name in entry.names)
        self.repeated |= {name for name, count in calls.items() if count > 1}
        place = 0
        for entry in self.inputs.values():
            rows = real_rows(entry.layout.input_rows(entry.module, entry.tensor), entry.mask())
            key = tuple(dict.fromkeys(entry.names))
            if key not in self.order:
                self.order.insert(place, key)  # right behind the one before
            place = self.order.index(key) + 1
            product = gram(rows)
            if key in self.input_sums:
                self.input_sums[key] += product
            else:
                self.input_sums[key] = product.double()
            self.input_counts[key] = self.input_counts.get(key, 0) + rows.shape[-2]
        self.inputs.clear()

    def add_batch(self, batch: Mapping[str, Any], index: int) -> torch.Tensor:
        """Run a batch forward and backward and add what the layers saw.

        Returns:
            Units times loss, units, and examples, in float64.
        """
        if self.one_by_one and comes_apart(batch):
            return torch.stack([self._add(example, index) for example in one_by_one(self.model, batch)]).sum(0)
        totals = self._add(batch, index)
        return totals if totals is not None else self.add_batch(batch, index)

    def _add(self, batch: Mapping[str, Any], index: int) -> Any:
        """Do so for a batch as it is; None, and nothing is added, where its examples have to go one by one."""
        self.masks.start(batch)
        self.recording = True
        loss, outputs, units, asked, _ = forward_loss(self.model, batch, index)
        self.recording = False
        if not self.one_by_one and (self._hides_padding(batch) or (index == 0 and self._shares_rows(batch))):
            self.one_by_one = True
            self.inputs.clear()
            return None
        self.add_inputs()
        if units:
            del outputs, asked
            if loss.requires_grad:  # false where the batch reaches no target
                (loss * units).backward()
                self.add_weight_grads(index)
        examples = batch_examples(batch)
        return torch.tensor([loss.item() * units if units else 0.0, units, examples], dtype=torch.float64).to(
            loss.device
        )

    def _hides_padding(self, batch: Mapping[str, Any]) -> bool:
        """Return whether rows that belong to no mask may be padding, and examples may go without."""
        names = self._unmatched()
        if names or self.masks.mixed:
            with self._aside(batch):
                steady = learn_steady_rows(self.masks, self.model, self.targets.values(), batch)
            self.masks.take(steady)
            names = self._unmatched()
        if names and self.masks.separable:
            logger.info("examples go one by one, for the rows of %s belong to no attention mask", names[0])
        return bool(names) and self.masks.separable

    def _unmatched(self) -> list[str]:
        """Return the layers of the finished forward pass whose rows belong to no mask."""
        before, self.masks.unmatched = self.masks.unmatched, set()
        for entry in self.inputs.values():
            entry.mask()
        found, self.masks.unmatched = self.masks.unmatched, before
        return [name for name, module in self.targets.items() if id(module) in found]

    def _shares_rows(self, batch: Mapping[str, Any]) -> bool:
        """Return whether a layer works once for the whole batch; inputs that begin with its sequences are its own."""
        doubtful = (e for e in self.inputs.values() if e.tensor.shape[:1] != (self.masks.sequences,))
        names = {name for entry in doubtful for name in entry.names}
        with self._aside(batch):
            shared = layers_with_shared_rows(self.model, {name: self.targets[name] for name in names}, batch)
        if shared:
            logger.info("examples go one by one, for %s works once for a whole batch", shared[0])
        return bool(shared)

    @contextmanager
    def _aside(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """Keep what other forward passes hand around apart from the masks of the batch."""
        masks, self.masks = self.masks, copy(self.masks)
        self.masks.start(batch)
        try:
            yield
        finally:
            self.masks = masks

    def add_weight_grads(self, index: int) -> None:
        for name, module in self.targets.items():
            weight: Any = module.weight
            if weight.grad is None:
                continue
            if not torch.isfinite(weight.grad.sum()):
                raise NumericalError(f"batch {index}: the gradient of {name!r} is not finite (NaN or infinity).")
            self.weight_grads[name] += self.layouts[name].matrices(weight.grad)
            weight.grad = None

    def warn_of_padding(self) -> None:
        names = [name for name, module in self.targets.items() if id(module) in self.masks.unmatched]
        if names:
            logger.warning(
                "the rows of %d layers belong to no attention mask, so that padding among them counts in their "
                "statistics: %s%s. Batches without padding (batch_size=1) avoid that.",
                len(names),
                ", ".join(names[:5]),
                ", …" * (len(names) > 5),
            )

    def groups(self) -> tuple[Key, ...]:
        """Return the groups of targets with the same input, in forward order, without targets called repeatedly."""
        seen: list[Key] = next((keys for keys in gather_object([self.order]) if keys), [])
        uses = Counter(name for key in seen for name in key)
        repeated = set(gather_object(sorted(self.repeated)))  # an idle process has seen none
        single = [tuple(name for name in key if name not in repeated and uses[name] == 1) for key in seen]
        return tuple(key for key in single if key)

    def reduce(self, accelerator: Accelerator) -> None:
        """Sum over processes; a process that never saw some grouping of inputs contributes zeros."""
        if accelerator.num_processes == 1:
            return
        for key in sorted(set(gather_object(list(self.input_sums)))):
            if key not in self.input_sums:
                groups, _, size = weight_matrices(self.targets[key[0]]).shape
                self.input_sums[key] = self.grad_sums[key[0]].new_zeros((groups, size, size))
            count = torch.tensor(self.input_counts.get(key, 0), device=accelerator.device)
            self.input_sums[key] = accelerator.reduce(self.input_sums[key], "sum")
            self.input_counts[key] = int(accelerator.reduce(count, "sum"))
        for sums in (self.grad_sums, self.weight_grads):
            for name in sums:
                sums[name] = accelerator.reduce(sums[name], "sum")

    def layer_statistics(self, units: int) -> dict[str, LayerStatistics]:
        means = {key: total / self.input_counts[key] for key, total in self.input_sums.items()}
        result = {}
        for name in self.targets:
            keys = [key for key in means if name in key]
            if not keys:  # a branch that the data do not take
                continue
            tokens = sum(self.input_counts[key] for key in keys)
            covariance = means[keys[0]]
            if len(keys) > 1:
                covariance = torch.stack([self.input_sums[key] for key in keys]).sum(0) / tokens
            result[name] = LayerStatistics(
                self.weight_grads[name] / units, covariance, self.grad_sums[name] / units, tokens, units
            )
        return result


def data_fingerprint(loader: DataLoader, accelerator: Accelerator) -> str:
    """Return the fingerprint that `collect_statistics` gives to the same data, without running the model."""
    return _combined([tensors_fingerprint(batch) for batch in accelerator.prepare(loader)])


def _combined(digests: list[str]) -> str:
    """Return one digest of all processes' batches, whatever their order."""
    return hashlib.sha256("".join(sorted(gather_object(digests))).encode()).hexdigest()


def collect_statistics(
    model: PreTrainedModel, targets: Mapping[str, nn.Module], loader: DataLoader, accelerator: Accelerator
) -> CalibrationStatistics:
    """Collect `G`, `A` and `B` of every target in one forward and backward pass over the data.

    The model is left as it was: modes, `requires_grad`, gradients and hooks. Dropout is off.

    Args:
        model: the dense model, on `accelerator.device`.
        targets: layers to observe, by name.
        loader: batches with labels; prepared here, so that each process sees its own share.
        accelerator: made with `even_batches=False`, so that no example is seen twice.

    Returns:
        The statistics, the same on each process.

    Raises:
        DataError: if a batch has no labels, the model no loss, or no batch a labelled unit.
        NumericalError: if a loss or a gradient is not finite.
        TargetError: if no target takes part in the forward pass.
    """
    collector = _Collector(model, targets)
    totals = torch.zeros(3, dtype=torch.float64, device=accelerator.device)  # units * loss, units, examples
    digests: list[str] = []
    hooks = [module.register_forward_hook(collector.hook(name), with_kwargs=True) for name, module in targets.items()]
    try:
        prepared = accelerator.prepare(loader)
        progress = logging.tqdm(prepared, desc="Calibrating", disable=not accelerator.is_local_main_process)
        watching = watching_masks(model, collector.masks.encoder, lambda: collector.masks)
        with watching, differentiating_only(model, targets), torch.enable_grad():
            for index, batch in enumerate(progress):
                totals += collector.add_batch(batch, index)
                digests.append(tensors_fingerprint(batch))
    finally:
        for hook in hooks:
            hook.remove()
    collector.warn_of_padding()
    collector.reduce(accelerator)
    totals = accelerator.reduce(totals, "sum")
    total_units = int(totals[1])
    if total_units == 0:
        raise DataError("no batch has a labelled unit: every label is -100.")
    digest = _combined(digests)
    layers = collector.layer_statistics(total_units)
    uncalled = tuple(name for name in targets if name not in layers)
    if not layers:
        raise TargetError(
            f"none of the chosen layers was called in the forward pass ({', '.join(uncalled)}); choose others with "
            "`target_modules`."
        )
    groups = collector.groups()
    mean_loss, examples = float(totals[0]) / total_units, int(totals[2])
    return CalibrationStatistics(layers, mean_loss, examples, total_units, digest, groups, uncalled)
