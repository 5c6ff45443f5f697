"""Matrix products of 16-bit numbers on processors that have none: in float32, rounded once at the end.

Without such instructions (AVX2 alone, for one) PyTorch computes them number by number: the backward pass of a layer
takes some 30 times as long as in float32. Where the processor has them, they add up in float32 and round once, too.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

PRODUCTS = {
    F.linear,
    F.conv1d,
    F.conv2d,
    F.scaled_dot_product_attention,
    torch.addmm,
    torch.baddbmm,
    torch.bmm,
    torch.matmul,
    torch.Tensor.__matmul__,
    torch.Tensor.matmul,
}
SUPPORT = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def quick_products(model: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which the products of a model on a CPU are quick ones, whatever its dtype.

    Args:
        model: the model.
    """
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.device.type == "cpu"}
    slow = {dtype for dtype in dtypes if not _is_quick(dtype)}
    return _InFloat32(slow) if slow else nullcontext()


def _is_quick(dtype: torch.dtype) -> bool:
    if dtype not in SUPPORT:
        return True
    supported = getattr(torch.ops.mkldnn, SUPPORT[dtype], None)
    return supported is not None and bool(supported())


class _InFloat32(TorchFunctionMode):
    """Computes products of some dtypes in float32.

    Args:
        slow: the dtypes.
    """

    def __init__(self, slow: set[torch.dtype]) -> None:
        super().__init__()
        self.slow = slow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in PRODUCTS:
            leaves, structure = tree_flatten((args, kwargs))
            dtypes = {leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()}
            on_cpu = all(leaf.device.type == "cpu" for leaf in leaves if isinstance(leaf, torch.Tensor))
            if len(dtypes) == 1 and dtypes <= self.slow and on_cpu:
                return _Product.apply(func, structure, *leaves)
        return func(*args, **kwargs)


class _Product(torch.autograd.Function):
    """An operation in float32, which runs again in the backward pass: what it keeps is as narrow as its inputs."""

    @staticmethod
    def forward(ctx: Any, func: Any, structure: Any, *leaves: Any) -> torch.Tensor:
        ctx.func, ctx.structure = func, structure
        ctx.save_for_backward(*(leaf for leaf in leaves if isinstance(leaf, torch.Tensor)))
        ctx.others = [None if isinstance(leaf, torch.Tensor) else (leaf,) for leaf in leaves]
        dtype = next(leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point())
        args, kwargs = tree_unflatten([_wide(leaf) for leaf in leaves], structure)
        return func(*args, **kwargs).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        saved, needed = iter(ctx.saved_tensors), ctx.needs_input_grad[2:]
        leaves = [next(saved) if other is None else other[0] for other in ctx.others]
        wide = [
            _wide(leaf).detach().requires_grad_() if needs else _wide(leaf)
            for leaf, needs in zip(leaves, needed, strict=True)
        ]
        with torch.enable_grad():
            args, kwargs = tree_unflatten(wide, ctx.structure)
            result = ctx.func(*args, **kwargs)
        inputs = [leaf for leaf, needs in zip(wide, needed, strict=True) if needs]
        found = iter(torch.autograd.grad(result, inputs, grad.float()))
        return None, None, *(next(found).to(grad.dtype) if needs else None for needs in needed)


def _wide(leaf: Any) -> Any:
    return leaf.float() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf
