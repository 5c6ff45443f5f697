"""Which rows of a layer's input are real tokens rather than padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..layers import Routed, find_layout, layout_of, routed_rows
from .architectures import TOKENS_FIRST
from .cutting import sequence_masks
from .labels import batch_examples

FROM_ENCODER = ("encoder_hidden_states", "key_value_states")  # by these names decoders get what an encoder returns

OF_SEQUENCES = ("attention_mask", "decoder_attention_mask")

Current = Callable[[], "PaddingMasks | None"]


class PaddingMasks:
    """The masks of the current batch.

    The attention mask applies to all layers of a single-stack model. In an encoder-decoder it applies to the encoder,
    and to what the decoder reads from the encoder's output; the decoder's own mask (by default, where labels are not
    -100) applies elsewhere. To the rows of an expert it applies by the tokens that these are. Where a layer's rows are
    not the tokens of these masks (frames of speech, words and then patches, windows that are filled up), the attention
    mask counts that the model itself hands to the modules around the layer. No mask applies to layers of which is
    known that their rows are no tokens.

    Args:
        model: the model whose batches these are.

    Attributes:
        unmatched: ids of the layers whose rows belong to no known mask, though there is padding.
        steady: ids of the layers whose rows are no tokens, as far as that was learned for padded `inputs` and padded
            `targets`; None where the model takes no examples without their padding.
        mixed: whether there is something beside the tokens whose rows may be as many: pictures in the batch, or
            learned vectors that the model has as many of as there are tokens.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.encoder = model.get_encoder() if model.config.is_encoder_decoder else None
        self.in_encoder = set(map(id, self.encoder.modules())) if self.encoder is not None else set()
        tokens_first = (module for module in model.modules() if _takes_tokens_first(module))
        self.in_tokens_first = {id(inner) for module in tokens_first for inner in module.modules()}
        self.around = _around(model)
        self.learned_rows = _learned_rows(model)
        self.unmatched: set[int] = set()
        self.steady: dict[str, set[int] | None] = {}
        self.start({})

    def start(self, batch: Mapping[str, Any]) -> None:
        """Take the masks of a batch, before its forward pass."""
        given = [value for name, value in batch.items() if _is_mask(name) or name == "pixel_mask"]
        self.padded = any(map(leaves_out, given))
        self.handed: dict[int, list[torch.Tensor]] = {}  # masks that modules were called with, at their last call
        self.noted: dict[int, torch.Tensor] = {}  # all of them, by their ids
        self.encoded: dict[int, torch.Tensor] = {}  # what the encoder returns, and what decoders are called with
        attention_mask, sides = batch.get("attention_mask"), sequence_masks(batch, self.encoder is not None)
        self.main, self.decoder = _boolean_mask(attention_mask), None
        self.sequences = batch_examples(batch) if self.main is None else len(self.main)
        if self.encoder is not None:
            targets = sides.get("targets", batch.get("decoder_attention_mask", attention_mask))
            self.decoder = _boolean_mask(targets)
            self.padded |= leaves_out(self.decoder)
        others = {k: v for k, v in batch.items() if k.endswith("mask") and k not in OF_SEQUENCES}
        self.padded_sides = {side for side, mask in (sides | others).items() if leaves_out(mask)}
        self.take({})
        tensors = [v for v in batch.values() if isinstance(v, torch.Tensor) and v.is_floating_point() and v.ndim > 2]
        sequences = attention_mask.shape[:2] if isinstance(attention_mask, torch.Tensor) else None
        self.mixed = sequences is not None and any(value.shape[:2] != sequences for value in tensors)
        self.mixed |= self.main is not None and self.main.shape[1] in self.learned_rows

    def take(self, steady: Mapping[str, set[int] | None]) -> None:
        """Take what was learned of layers whose rows are no tokens."""
        self.steady |= steady
        known = [layers for side in self.padded_sides if (layers := self.steady.get(side)) is not None]
        self.separable = bool(known) and len(known) == len(self.padded_sides)
        self.whole: set[int] = set.intersection(*known) if self.separable else set()

    def note(self, module: nn.Module, called: Mapping[str, Any]) -> None:
        """Take the masks that a module is called with, and note whether they leave out what the batch does not."""
        tensors = {name: value for name, value in called.items() if isinstance(value, torch.Tensor)}
        self.handed[id(module)] = [mask for name, mask in tensors.items() if _is_mask(name)]
        for mask in self.handed[id(module)]:
            if id(mask) not in self.noted:
                self.noted[id(mask)] = mask
                self.padded = self.padded or _fills_up(mask, self.sequences)
        self.encoded |= {id(value): value for name, value in tensors.items() if name.endswith(FROM_ENCODER)}

    def of(self, module: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor | None]:
        """Return what gives the mask of the flattened rows of a module's input, or None where all rows count.

        Asked once the batch went through the whole model, it knows all masks; before, some may not be made yet.
        """
        own, shape = self.main, layout_of(module).row_shape(module, x)
        if self.encoder is not None and id(module) not in self.in_encoder and id(x) not in self.encoded:
            own = self.decoder
        nearest = [mask for place in self.around.get(id(module), ()) for mask in self.handed.get(place, ())]
        return partial(self._mask_of, id(module), shape, own, nearest, routed_rows())

    def _mask_of(
        self,
        module: int,
        shape: torch.Size,
        own: torch.Tensor | None,
        nearest: list[torch.Tensor],
        routed: Routed | None,
    ) -> torch.Tensor | None:
        if not self.padded or module in self.whole:
            return None
        turned = module in self.in_tokens_first
        if routed is not None and own is not None and own.numel() == routed.total:
            return (own.T if turned else own).flatten()[routed.rows]
        own = None if own is None else _spread(own, shape, turned)
        if own is not None:
            return own
        handed = self._handed_around(nearest, shape, turned)
        if handed is None and shape.numel() != self.sequences:  # else one row an example
            self.unmatched.add(module)
        return handed

    def _handed_around(self, nearest: list[torch.Tensor], shape: torch.Size, turned: bool) -> torch.Tensor | None:
        """Return the mask of these rows that the nearest module around got, or else that all others agree on."""
        zero_is_seen = next((kind for kind in map(_zero_is_seen, nearest) if kind is not None), True)
        for mask in nearest:
            rows = _spread(_keys_seen(mask, self.sequences, zero_is_seen), shape, turned)
            if rows is not None:
                return rows
        others = [_spread(_keys_seen(mask, self.sequences, True), shape, turned) for mask in self.noted.values()]
        found = [rows for rows in others if rows is not None]
        return found[0] if found and all(torch.equal(rows, found[0]) for rows in found) else None


@contextmanager
def watching_masks(model: PreTrainedModel, encoder: nn.Module | None, current: Current) -> Iterator[None]:
    """Note in the current masks what the modules of a model hand to one another; undone afterwards.

    Args:
        model: the model.
        encoder: the encoder of its masks.
        current: the masks of the batch that is on its way, or None.
    """

    def note_masks(names: list[str]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            masks = current()
            if masks is not None:
                masks.note(module, dict(zip(names, args, strict=False)) | dict(kwargs))

        return hook

    def note_output(module: nn.Module, args: Any, output: Any) -> None:
        masks = current()
        if masks is not None:
            masks.encoded[id(output[0])] = output[0]

    handles = []
    for module in model.modules():
        names = list(inspect.signature(module.forward).parameters)
        if any(map(_is_mask, names)):
            handles.append(module.register_forward_pre_hook(note_masks(names), with_kwargs=True))
    if encoder is not None:
        handles.append(encoder.register_forward_hook(note_output))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def leaves_out(mask: Any) -> bool:
    """Return whether a value is a mask that is not true everywhere."""
    return isinstance(mask, torch.Tensor) and not bool(mask.all())


def _takes_tokens_first(module: nn.Module) -> bool:
    return type(module).__name__ in TOKENS_FIRST or getattr(module, "batch_first", True) is False


def _is_mask(name: str) -> bool:
    return name.endswith("attention_mask")


def _learned_rows(model: nn.Module) -> set[int]:
    """Return how many rows each parameter has that may be vectors in place of tokens, such as Perceiver's latents."""
    others = (m for m in model.modules() if not isinstance(m, nn.Embedding) and find_layout(m) is None)
    own = (parameter for module in others for parameter in module.parameters(recurse=False))
    return {parameter.shape[-2] for parameter in own if parameter.ndim > 1}


def _around(model: nn.Module) -> dict[int, list[int]]:
    """Return the ids of the modules that a module lies in, from itself outwards."""
    by_name = dict(model.named_modules(remove_duplicate=False))
    around: dict[int, list[int]] = {}
    for name, module in by_name.items():
        parts = name.split(".") if name else []
        places = [id(by_name[".".join(parts[:count])]) for count in range(len(parts), -1, -1)]
        around.setdefault(id(module), []).extend(places)
    return around


def _boolean_mask(mask: Any) -> torch.Tensor | None:
    """Return a mask of shape (sequences, tokens), or None where there is none, or a 4-d one."""
    if not isinstance(mask, torch.Tensor) or mask.ndim not in (2, 3):
        return None
    return mask.bool().flatten(0, -2)  # the choices of an example are sequences


def _spread(mask: torch.Tensor | None, shape: torch.Size, tokens_first: bool) -> torch.Tensor | None:
    """Return a mask of (sequences, tokens) for each row of a shape, flattened; None where it is about other rows.

    Rows may be flat, tokens may come first, and each token may have several rows (those of attention heads).
    """
    if mask is None:
        return None
    sequences, tokens = mask.shape
    turned = mask.T if tokens_first else mask
    if shape in (turned.shape, (sequences * tokens,)):
        return turned.flatten()
    if shape == turned.T.shape:
        return turned.T.flatten()
    if len(shape) == 3 and shape[0] == sequences and (shape[1] == tokens) != (shape[2] == tokens):
        mask = mask[:, :, None] if shape[1] == tokens else mask[:, None, :]
        return mask.expand(shape).flatten()
    return None


def _keys_seen(mask: torch.Tensor, sequences: int, zero_is_seen: bool) -> torch.Tensor | None:
    """Return which keys anything attends to; None if that cannot be.  # shape: (sequences, keys).

    In a mask that hides all keys of all sequences, true stands for padding (Mask2Former), or for something else.

    Args:
        mask: true, 1 or, where it is added to scores, 0 for what is seen.  # shape: (sequences or 1, …, keys)
        sequences: number of sequences.
        zero_is_seen: what a mask of zeros alone means.
    """
    if not 2 <= mask.ndim <= 4 or mask.shape[0] not in (1, sequences):
        return None
    own = _zero_is_seen(mask)
    seen = mask > -1 if (zero_is_seen if own is None else own) else mask > 0
    if mask.ndim > 2:
        seen = seen.flatten(1, -2).any(1)
    return seen.expand(sequences, -1) if bool(seen.any()) else None


def _fills_up(mask: torch.Tensor, sequences: int) -> bool:
    """Return whether a mask leaves keys out; one of booleans for pairs of tokens may mean the opposite."""
    seen = _keys_seen(mask, sequences, True) if mask.ndim == 2 or mask.is_floating_point() else None
    return seen is not None and not bool(seen.all())


def _zero_is_seen(mask: torch.Tensor) -> bool | None:
    """Return whether a mask is added to scores rather than multiplied; None if it is all zeros and tells nothing."""
    if not mask.is_floating_point():
        return False
    return bool((mask < 0).any() or (mask > 1).any()) if bool(mask.any()) else None
