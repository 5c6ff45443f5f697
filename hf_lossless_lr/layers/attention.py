"""Attention whose projections are no layers: 3-D weights with an axis of heads, and `nn.MultiheadAttention`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .unfused import Unfused, linear

HEADS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
"""Weights of XLNet's attention, each of shape (features, heads, features of a head), to the layers in their place."""


class UnfusedHeads(Unfused):
    """Attention with relative positions as XLNet has it, with layers `q_proj`, `k_proj`, `v_proj` and `o_proj`.

    The weights `q`, `k`, `v`, `o` of shape (features, heads, features of a head) become matrices. The weight of the
    positions stays as it is: its rows are no tokens, and there are as many as padding makes. The fused class
    computes the scores.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    layer_norm: nn.Module
    dropout: nn.Module
    r: nn.Parameter

    def unfuse(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Make a layer of each projection; the other parameters stay what they are."""
        self.heads, self.scale = tuple(parameters["q"].shape[1:]), self.template.scale
        for name, parameter in parameters.items():
            if name in HEADS:
                matrix = parameter.flatten(1)  # shape: (features, heads · features of a head)
                self.add_module(HEADS[name], linear(matrix if name == "o" else matrix.mT, None, parameter))
                self.guard(name, parameter)
            else:
                self.register_parameter(name, parameter)

    @classmethod
    def is_kind(cls, module: nn.Module) -> bool:
        """Return whether a module has the four projections, and computes scores of relative positions."""
        return set(HEADS) <= module._parameters.keys() and hasattr(module, "rel_attn_core")

    @classmethod
    def unlike(cls, fused: Any) -> str | None:
        """Return what is unlike XLNet's attention."""
        shapes = {fused._parameters[name].shape for name in HEADS}
        if len(shapes) != 1 or len(next(iter(shapes))) != 3:
            return "has parameters of other shapes than (features, heads, features of a head)"
        return None

    def layers(self) -> Iterator[tuple[str, Any]]:
        """Yield the four projections."""
        for name in HEADS.values():
            yield name, self.get_submodule(name)

    def fused_parameters(self) -> dict[str, torch.Tensor]:
        """Return the parameters of the fused module, the projections with their heads."""
        values = {name: parameter.detach() for name, parameter in self.named_parameters(recurse=False)}
        for name, layer in HEADS.items():
            weight = self.get_parameter(f"{layer}.weight")
            matrix = weight if name == "o" else weight.mT
            values[name] = matrix.unflatten(1, self.heads).contiguous()
        return values

    def trials(self, like: torch.Tensor) -> Iterator[tuple[Any, ...]]:
        """Yield tokens of two sequences, with one stream and with two."""
        h, g = (like.new_empty(5, 2, len(like)).normal_() for _ in range(2))
        positions = like.new_empty(10, 2, len(like)).normal_()
        yield h, None, None, None, positions, None
        yield h, g, None, None, positions, None

    def forward(
        self,
        h: torch.Tensor,
        g: torch.Tensor | None,
        attn_mask_h: torch.Tensor | None,
        attn_mask_g: torch.Tensor | None,
        r: torch.Tensor,
        seg_mat: torch.Tensor | None,
        mems: torch.Tensor | None = None,
        target_mapping: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Any, ...]:
        """Attend from the content stream, and from the query stream if there is one, to the content.

        Args:
            h: the content stream.  # shape: (tokens, sequences, features)
            g: the query stream.  # shape: (targets, sequences, features)
            attn_mask_h: 1 for what the content stream does not see.  # shape: (tokens, keys, sequences, 1)
            attn_mask_g: the same for the query stream.
            r: encodings of the relative positions.  # shape: (positions, sequences, features)
            seg_mat: segments of pairs, one-hot.  # shape: (tokens, keys, sequences, 2)
            mems: content of earlier tokens.  # shape: (earlier, sequences, features)
            target_mapping: which tokens the query stream predicts.  # shape: (targets, tokens, sequences)
            output_attentions: whether to return the attention probabilities as well.

        Returns:
            Both streams, the second None if there is none, and the probabilities if asked for.
        """
        content = h if mems is None or mems.dim() <= 1 else torch.cat([mems, h], dim=0)
        keys, values = (layer(content).unflatten(-1, self.heads) for layer in (self.k_proj, self.v_proj))
        encoded = torch.einsum("ibh,hnd->ibnd", r.type(self.r.dtype), self.r)
        streams: list[torch.Tensor | None] = []
        probabilities = []
        for stream, mask in ((h, attn_mask_h), (g, attn_mask_g)):
            if stream is None:
                streams.append(None)
                continue
            mapping = target_mapping if stream is g else None
            queries = self.q_proj(stream).unflatten(-1, self.heads)
            if mapping is not None:
                queries = torch.einsum("mbnd,mlb->lbnd", queries, mapping)
            found = self.rel_attn_core(
                queries, keys, values, encoded, seg_mat=seg_mat, attn_mask=mask, output_attentions=output_attentions
            )
            if output_attentions:
                found, probability = found
                probabilities.append(probability)
            if mapping is not None:
                found = torch.einsum("lbnd,mlb->mbnd", found, mapping)
            streams.append(self.layer_norm(self.dropout(self.o_proj(found.flatten(-2))) + stream))
        if not output_attentions:
            return tuple(streams)
        return *streams, probabilities[0] if g is None else tuple(probabilities)

    def rel_attn_core(self, *args: Any, **kwargs: Any) -> Any:
        """Return what queries find, as the fused class has it, which calls nothing else of its own than the next."""
        return type(self.template).rel_attn_core(self, *args, **kwargs)

    def rel_shift_bnij(self, scores: torch.Tensor, klen: int = -1) -> torch.Tensor:
        """Return scores by relative position as scores by key."""
        return type(self.template).rel_shift_bnij(scores, klen)


class UnfusedMultiheadAttention(Unfused):
    """`nn.MultiheadAttention` with layers `q_proj`, `k_proj`, `v_proj` and `out_proj`, and called in the same way."""

    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    out_proj: nn.Module
    _qkv_same_embed_dim = False  # so that `nn.TransformerEncoderLayer` calls it, instead of reading its weights

    def unfuse(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Make three layers of the fused weight; the last one is there."""
        weight, bias = parameters["in_proj_weight"], parameters.get("in_proj_bias")
        for name in ("embed_dim", "num_heads", "head_dim", "dropout", "batch_first"):
            setattr(self, name, getattr(self.template, name))
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        for name, part, own in zip(("q_proj", "k_proj", "v_proj"), weight.chunk(3), biases, strict=True):
            self.add_module(name, linear(part, own, weight))
        for name, parameter in parameters.items():
            self.guard(name, parameter)

    @classmethod
    def is_kind(cls, module: nn.Module) -> bool:
        """Return whether a module is one of PyTorch's."""
        return isinstance(module, nn.MultiheadAttention)

    @classmethod
    def unlike(cls, fused: Any) -> str | None:
        """Return what of the class is not covered: other widths of keys and values, keys that are no inputs."""
        parameters = {name for name, _ in fused.named_parameters(recurse=False)}
        if "in_proj_weight" not in parameters or parameters - {"in_proj_weight", "in_proj_bias"}:
            return "has other parameters than one for queries, keys and values"
        if fused.add_zero_attn:
            return "attends to a key that is no input"
        return None

    def layers(self) -> Iterator[tuple[str, Any]]:
        """Yield the three projections that were one."""
        for name in ("q_proj", "k_proj", "v_proj"):
            yield name, self.get_submodule(name)

    def fused_parameters(self) -> dict[str, torch.Tensor]:
        """Return the weight, and the bias, of queries, keys and values."""
        layers: list[Any] = [layer for _, layer in self.layers()]
        values = {"in_proj_weight": torch.cat([layer.weight for layer in layers])}
        if layers[0].bias is not None:
            values["in_proj_bias"] = torch.cat([layer.bias for layer in layers])
        return values

    def trials(self, like: torch.Tensor) -> Iterator[tuple[Any, ...]]:
        """Yield queries and keys of three sequences, the keys with and without a mask."""
        width = like.shape[-1]
        queries, keys = (like.new_empty(3, 3, width).normal_() for _ in range(2))
        hidden = torch.ones(3, 3, device=like.device).triu(1).bool()
        yield queries, keys, keys
        yield queries, keys, keys, hidden, False, hidden

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from queries to keys, as `nn.MultiheadAttention` does.

        Args:
            query: queries, sequences first or second as `batch_first` says, or those of one sequence.
                # shape: (sequences, queries, features)
            key: keys.  # shape: (sequences, keys, features)
            value: values.  # shape: (sequences, keys, features)
            key_padding_mask: true, or what is added, for keys not to see.  # shape: (sequences, keys)
            need_weights: whether to return the attention weights.
            attn_mask: true, or what is added, for pairs not to see.  # shape: (queries, keys) or one for each head
            average_attn_weights: whether the weights are averaged over heads.
            is_causal: a hint about `attn_mask`, which has to be given, and counts.

        Returns:
            The outputs, and the weights if asked for.  # shape: (sequences, queries, features)

        Raises:
            RuntimeError: if the hint comes without a mask.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask, which has to be given.")
        alone = query.ndim == 2
        turn = not alone and not self.batch_first
        mask = self._added(attn_mask, key_padding_mask, query)
        q, k, v = (
            self._heads(layer(x), turn, alone)
            for (_, layer), x in zip(self.layers(), (query, key, value), strict=True)
        )
        share = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.mT * self.head_dim**-0.5
            weights = functional.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = functional.dropout(weights, share)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights[0] if alone else weights
        else:
            y = functional.scaled_dot_product_attention(q, k, v, mask, share)
        y = y.transpose(1, 2).flatten(-2)
        y = y[0] if alone else y.transpose(0, 1) if turn else y
        return self.out_proj(y), weights

    def _heads(self, x: torch.Tensor, turn: bool, alone: bool) -> torch.Tensor:
        """Return rows with heads.  # shape: (sequences, heads, tokens, features of a head)."""
        x = x[None] if alone else x.transpose(0, 1) if turn else x
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _added(self, pairs: torch.Tensor | None, keys: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
        """Return what is added to the scores.  # shape: (sequences or 1, heads or 1, queries, keys)."""
        if keys is not None:
            keys = _as_added(keys, like).reshape(-1, 1, 1, keys.shape[-1])
        if pairs is not None:
            pairs = _as_added(pairs, like)
            pairs = pairs.unflatten(0, (-1, self.num_heads)) if pairs.ndim == 3 else pairs[None, None]
        return keys if pairs is None else pairs if keys is None else pairs + keys


def _as_added(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a mask as what is added to scores: minus infinity where one of booleans is true."""
    if mask.dtype is not torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
