"""What one process sees of its batches: the only hooks and the only backward of the package."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data import (
    PaddingMasks,
    batch_examples,
    comes_apart,
    forward_loss,
    gauss_newton_directions,
    learn_steady_rows,
)
from ..errors import NumericalError
from ..layers import Layout, called_with, layout_of
from .records import Key
from .rows import gram, real_rows
from .shared_rows import layers_with_shared_rows, one_by_one
from .sums import Sums

logger = logging.get_logger(__name__)


RowMask = Callable[[], torch.Tensor | None]  # known once the batch went through the whole model


@dataclass
class _Input:
    """One input tensor of the current forward pass and the layers that received it.

    It is kept where a target received it; of what only layers beside them got, nothing is summed.
    """

    reference: weakref.ref[torch.Tensor]
    shape: torch.Size
    module: nn.Module
    layout: Layout
    mask: RowMask
    names: list[str]
    version: int  # that PyTorch counts up with each change in place
    tensor: torch.Tensor | None = None


class Collector:
    """Hooks and passes of one process, which fill its sums.

    Args:
        model: the model.
        targets: layers whose statistics are summed.
        weight_grads: whether gradients of their weights are.
        beside: other layers, of which only the order and shared inputs are noted.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        targets: Mapping[str, nn.Module],
        weight_grads: bool,
        beside: Mapping[str, nn.Module],
    ) -> None:
        self.model = model
        self.targets = targets
        self.known = {**beside, **targets}
        self.layouts = {name: layout_of(module) for name, module in self.known.items()}
        self.masks = PaddingMasks(model)
        self.inputs: list[_Input] = []
        self.received: dict[Hashable, _Input] = {}  # the last one of each key: a tensor may be gone, and its id used
        self.recording = False
        self.of_curvature = True  # whether gradients of outputs that come now belong to B
        self.index = 0  # of the batch
        self.one_by_one = False  # whether examples go through the model alone
        self.sharing_known = False  # whether it was asked which layers work once for a whole batch
        self.copies = False  # whether inputs are copied, for the model changes some of them in place
        self.order: list[Key] = []  # of the inputs in a forward pass, also of those that only some batches have
        self.repeated: set[str] = set()  # targets called more than once in a forward pass
        self.sums = Sums(targets, weight_grads)

    def hook(self, name: str) -> Any:
        """Return a forward hook that notes the layer's input and waits for the gradient of its output."""

        def forward_hook(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: torch.Tensor) -> Any:
            x = called_with(args, kwargs)
            mask = self.masks.of(module, x)
            if self.recording:  # false while gradient checkpointing repeats the forward pass
                self._receive(name, module, x, mask)
            if name not in self.targets:
                return None
            # The gradient of an output needs none of a weight: it begins here, unless a layer before it has one.
            source = output if output.requires_grad else output.detach().requires_grad_()
            own = source.clone()  # a model that writes into a view of a result would take the hook off
            if not own.requires_grad:  # a part that runs without gradients
                return None
            own.register_hook(lambda grad: self._add_output_grad(name, grad, mask))
            return own

        return forward_hook

    def _receive(self, name: str, module: nn.Module, x: torch.Tensor, mask: RowMask) -> None:
        layout = self.layouts[name]
        key = layout.input_key(module, x), x._version
        entry = self.received.get(key)
        if entry is None or entry.reference() is None:
            entry = self.received[key] = _Input(weakref.ref(x), x.shape, module, layout, mask, [], x._version)
            self.inputs.append(entry)
        entry.names.append(name)
        if name in self.targets and entry.tensor is None:
            entry.tensor = x.detach().clone() if self.copies else x

    def _forget_inputs(self) -> None:
        self.inputs.clear()
        self.received.clear()

    @torch.no_grad()
    def _add_output_grad(self, name: str, grad: torch.Tensor, mask: RowMask) -> None:
        if not self.of_curvature:
            return
        rows = real_rows(self.layouts[name].output_rows(self.targets[name], grad), mask())
        self._check_gradient(name, rows)
        self.sums.output_grads[name] += gram(rows)

    def _check_gradient(self, name: str, gradient: torch.Tensor) -> None:
        if not torch.isfinite(gradient.sum()):
            raise NumericalError(f"batch {self.index}: the gradient of {name!r} is not finite (NaN or infinity).")

    @torch.no_grad()
    def add_inputs(self) -> None:
        """Add the inputs of a finished forward pass, each once for all the layers that share it."""
        calls = Counter(name for entry in self.inputs for name in entry.names)
        self.repeated |= {name for name, count in calls.items() if count > 1}
        keys: list[Key] = []
        for entry in self.inputs:
            key = tuple(dict.fromkeys(entry.names))
            layout, module, x = entry.layout, entry.module, entry.tensor
            if x is None:
                keys.append(key)
                continue
            rows = real_rows(layout.input_rows(module, x), entry.mask(), layout.positions(module, x))
            if not rows.shape[-2]:  # of an expert that got padding alone
                continue
            keys.append(key)
            self.sums.add_inputs(key, rows)
        _insert(self.order, keys)
        self._forget_inputs()

    def add_batch(self, batch: Mapping[str, Any], index: int) -> torch.Tensor:
        """Run a batch forward and backward and add what the layers saw.

        Returns:
            Units times loss, units, and examples, in float64.
        """
        if self.one_by_one and comes_apart(batch):
            return torch.stack([self._added(example, index) for example in one_by_one(self.model, batch)]).sum(0)
        totals = self._add(batch, index)
        return totals if totals is not None else self.add_batch(batch, index)

    def _added(self, batch: Mapping[str, Any], index: int) -> torch.Tensor:
        totals = self._add(batch, index)
        return totals if totals is not None else self._added(batch, index)

    def _add(self, batch: Mapping[str, Any], index: int) -> Any:
        """Do so for a batch as it is; None, and nothing is added, where it has to go in another way from now on."""
        self.masks.start(batch)
        self.index = index
        self.recording = True
        forward = forward_loss(self.model, batch, index)
        self.recording = False
        if not self.one_by_one and (self._hides_padding(batch) or self._shares_rows(batch)):
            self.one_by_one = True
            self._forget_inputs()
            return None
        if not self.copies and any(e.tensor is not None and e.tensor._version != e.version for e in self.inputs):
            self.copies = True
            self._forget_inputs()
            return None
        self.add_inputs()
        units, loss, device = forward.units, forward.loss.item(), forward.loss.device
        if units and forward.loss.requires_grad:  # false where the batch reaches no target
            directions = gauss_newton_directions(self.model, batch, forward)
            total = forward.loss * units if self.sums.weight_grads or not directions else None
            del forward  # what only it needs is freed on the way
            self._go_backward(total, directions)
        totals = [loss * units if units else 0.0, units, batch_examples(batch)]
        return torch.tensor(totals, dtype=torch.float64).to(device)

    def _go_backward(
        self, total: torch.Tensor | None, directions: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        """Add gradients: those of the summed loss to G, and to B where there are no directions of the curvature."""
        if total is not None:
            self.of_curvature = not directions
            total.backward(retain_graph=bool(directions))
            self.of_curvature = True
            self._add_weight_grads()
        if directions:
            outputs, vectors = zip(*directions, strict=True)
            torch.autograd.backward(outputs, vectors)
            for name in self.sums.weight_grads:
                self.targets[name].weight.grad = None

    def _hides_padding(self, batch: Mapping[str, Any]) -> bool:
        """Return whether rows that belong to no mask may be padding, and examples may go without."""
        names = self._unmatched()
        if names or self.masks.mixed:
            with self._aside(batch):
                steady = learn_steady_rows(self.masks, self.model, self.known.values(), batch)
            self.masks.take(steady)
            names = self._unmatched()
        if names and self.masks.separable:
            logger.info("examples go one by one, for the rows of %s belong to no attention mask", names[0])
        return bool(names) and self.masks.separable

    def _unmatched(self) -> list[str]:
        """Return the layers of the finished forward pass whose rows belong to no mask."""
        before, self.masks.unmatched = self.masks.unmatched, set()
        for entry in self.inputs:
            entry.mask()
        found, self.masks.unmatched = self.masks.unmatched, before
        return [name for name, module in self.known.items() if id(module) in found]

    def _shares_rows(self, batch: Mapping[str, Any]) -> bool:
        """Return whether a layer works once for the whole batch; inputs that begin with its sequences are its own.

        That is asked once, of the first batch that shows it: one of several examples.
        """
        if self.sharing_known or batch_examples(batch) < 2:
            return False
        self.sharing_known = True
        doubtful = (entry for entry in self.inputs if entry.shape[:1] != (self.masks.sequences,))
        names = {name for entry in doubtful for name in entry.names}
        with self._aside(batch):
            shared = layers_with_shared_rows(self.model, {name: self.known[name] for name in names}, batch)
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

    def _add_weight_grads(self) -> None:
        for name in self.sums.weight_grads:
            weight: Any = self.targets[name].weight
            if weight.grad is None:
                continue
            self._check_gradient(name, weight.grad)
            self.sums.weight_grads[name] += self.layouts[name].matrices(self.targets[name], weight.grad)
            weight.grad = None

    def warn_of_padding(self) -> None:
        """Name the layers whose statistics may count padding."""
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
        """Return the groups of layers with the same input, in forward order, without those called repeatedly."""
        seen: list[Key] = []
        for order in gather_object([self.order]):  # an expert may have been called in one process alone
            _insert(seen, order)
        uses = Counter(name for key in seen for name in key)
        repeated = set(gather_object(sorted(self.repeated)))  # an idle process has seen none
        single = [tuple(name for name in key if name not in repeated and uses[name] == 1) for key in seen]
        return tuple(key for key in single if key)


def _insert(order: list[Key], keys: Sequence[Key]) -> None:
    """Take keys that come one after the other into an order, each right behind the one before."""
    place = 0
    for key in keys:
        if key not in order:
            order.insert(place, key)
        place = order.index(key) + 1
