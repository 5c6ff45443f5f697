"""Forward passes that wait: a batch on its way through a model pauses at chosen layers until it may go on.

The pauses are greenlets: the model's own forward runs as it is, and nothing is re-implemented or run twice.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any, NamedTuple

import greenlet
import torch
from torch import nn
from transformers import PreTrainedModel

from ..data import PaddingMasks, quick_products, run_batch, watching_masks
from ..layers import called_with, layout_of, routed_rows
from .residuals import handed_over
from .rows import real_rows

Group = tuple[str, ...]


class Rows(NamedTuple):
    """What a layer got, made when it is asked for.

    Attributes:
        values: gives the rows.
        routed: gives which rows of the batch these are, where a router sent them.
        outputs: gives the same rows of another tensor of the shape of its output.
    """

    values: Callable[[], torch.Tensor]
    routed: Callable[[], torch.Tensor | None] = lambda: None
    outputs: Callable[[torch.Tensor], torch.Tensor] = lambda y: y


Seen = Callable[[PaddingMasks, torch.Tensor, torch.Tensor | None], Rows]


class Stream(greenlet.greenlet):
    """One batch on its way through the model."""

    def __init__(self, model: PreTrainedModel, batch: Mapping[str, Any], masks: PaddingMasks) -> None:
        super().__init__(lambda: run_batch(model, batch, quick=False))  # but see `paired_streams`
        self.gr_context = contextvars.copy_context()
        self.masks = masks
        masks.start(batch)
        self.group: Group | None = None
        self.passed: set[Group] = set()
        self.rows: Rows | None = None
        self.added: dict[Group, torch.Tensor] = {}

    def advance(self, group: Group, finished: set[Group]) -> bool:
        """Go on until the input of `group` is there; a group that is finished already is passed."""
        while not self.dead and (self.group is None or self.group in finished):
            self.switch()
        return not self.dead and self.group == group


@contextmanager
def paired_streams(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Any]], masks: PaddingMasks
) -> Iterator[tuple[list[Stream], list[Stream]]]:
    """Yield streams of each batch, for the dense and for the compressed model; at the end none of them waits."""
    dense, compressed = ([Stream(model, batch, copy(masks)) for batch in batches] for _ in range(2))
    try:
        with quick_products(model):  # of the thread, not of a stream
            yield dense, compressed
    finally:
        for stream in dense + compressed:
            stream.throw(greenlet.GreenletExit)


class Autocast(NamedTuple):
    """The state of autocast. It belongs to the thread, not to the greenlet: a stream that pauses takes its own along.

    Attributes:
        device: type of the device.
        enabled: whether it is on.
        dtype: what it computes in.
    """

    device: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, device: str) -> Autocast:
        """Return the state as it is now."""
        return cls(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))

    def set(self) -> None:
        """Make this the state of the thread."""
        torch.set_autocast_enabled(self.device, self.enabled)
        torch.set_autocast_dtype(self.device, self.dtype)


class Pause(NamedTuple):
    """A layer at which streams wait.

    Attributes:
        group: the group of layers that it belongs to; a stream waits once for each group.
        module: the module that is called.
        seen: from the masks of the batch, the input of the module and, behind it, its output, to what makes the rows.
        behind: whether streams wait behind the module rather than before it.
    """

    group: Group
    module: nn.Module
    seen: Seen
    behind: bool


class Watch(NamedTuple):
    """A module that receives or returns what will be added to the output of a layer: `Stream.added`.

    Attributes:
        group: the group of the layer.
        module: the module.
        output: whether it is the output of the module rather than its input.
    """

    group: Group
    module: nn.Module
    output: bool


def rows_of(dense: Any) -> Seen:
    """Return what sees the rows of a layer: of its inputs, or of its outputs less the bias.

    Args:
        dense: the dense layer, which says what the rows are and which of them are padding.

    Returns:
        The function that a `Pause` takes.
    """
    layout = layout_of(dense)

    def seen(masks: PaddingMasks, x: torch.Tensor, output: torch.Tensor | None) -> Rows:
        positions, mask, sent = layout.positions(dense, x), masks.of(dense, x), routed_rows()

        def routed() -> torch.Tensor | None:
            kept = mask()
            return None if sent is None else sent.rows if kept is None else sent.rows[kept]

        def rows() -> torch.Tensor:
            if output is None:
                return real_rows(layout.input_rows(dense, x), mask(), positions)
            kept = outputs(output)
            # Each matrix has its own outputs.
            return kept if dense.bias is None else kept - dense.bias.to(kept).reshape(len(kept), 1, -1)

        def outputs(y: torch.Tensor) -> torch.Tensor:
            found = layout.output_rows(dense, y)
            return real_rows(found if positions is None else found[:, positions], mask(), positions)

        return Rows(rows, routed, outputs)

    return seen


@contextmanager
def pausing(
    model: PreTrainedModel, encoder: nn.Module | None, pauses: Sequence[Pause], watches: Sequence[Watch] = ()
) -> Iterator[None]:
    """Hooks that pause a stream at the first layer of each group that it reaches, and watch; undone afterwards."""
    main = greenlet.getcurrent()
    caller = Autocast.of(model.device.type)

    def hook_of(pause: Pause) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor | None = None) -> None:
            stream = greenlet.getcurrent()
            if not isinstance(stream, Stream) or pause.group in stream.passed:
                return
            stream.rows = pause.seen(stream.masks, called_with(args, kwargs), output)
            stream.group = pause.group
            stream.passed.add(pause.group)
            own = Autocast.of(model.device.type)
            caller.set()
            try:
                main.switch()
            finally:
                own.set()
            stream.rows = None
            stream.added.pop(pause.group, None)

        return hook

    def watch_of(watch: Watch) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
            stream = greenlet.getcurrent()
            if isinstance(stream, Stream) and watch.group not in stream.passed:
                tensor = handed_over(args, kwargs, output)
                if tensor is not None:
                    stream.added[watch.group] = tensor

        return hook

    def current_masks() -> PaddingMasks | None:
        stream = greenlet.getcurrent()
        return stream.masks if isinstance(stream, Stream) else None

    wanted = [(watch.module, watch.output, watch_of(watch)) for watch in watches]
    wanted += [(pause.module, pause.behind, hook_of(pause)) for pause in pauses]
    handles = []
    for module, behind, hook in wanted:
        register: Any = module.register_forward_hook if behind else module.register_forward_pre_hook
        handles.append(register(hook, with_kwargs=True))
    try:
        with watching_masks(model, encoder, current_masks):
            yield
    finally:
        for handle in handles:
            handle.remove()
