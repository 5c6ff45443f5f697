"""Products, sums and decompositions computed in another way, as the kernels of another processor would.

No environment variable reproduces every processor, so `pytest --perturb SEED` runs the tests under `perturbed(SEED)`:
the terms of each product and sum are reordered, products are split into parts and taken transposed, matrices are
decomposed with their rows and columns permuted, and singular or eigenvectors get other signs. The results are as good
as the plain ones; a test that fails rests on luck, or on a tolerance without reserve.

The way is drawn from the seed, the operation and the shapes, strides and types of its operands, as a library chooses
its kernel. So the same operation on the same operands has the same bits, and a test may ask for that; it may not ask
for the same bits from operands of other shapes. What a kernel may take from the place of its operands in memory is
not imitated.
"""

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

SEEDS = (0, 1, 2)  # what `make test-portable` runs; any other must pass as well
PARTS = 4  # the most parts that a product is split into

aten = torch.ops.aten


class Draw:
    """The way of one operation."""

    def __init__(self, seed: int, operation: Any, arguments: Any) -> None:
        operands = [(*x.shape, *x.stride(), x.dtype) for x in arguments if isinstance(x, torch.Tensor)]
        code = f"{seed} {operation} {operands}".encode()
        self.generator = torch.Generator().manual_seed(zlib.crc32(code))

    def order(self, size: int) -> torch.Tensor:
        return torch.randperm(size, generator=self.generator)

    def below(self, limit: int, *shape: int) -> torch.Tensor:
        return torch.randint(limit, shape, generator=self.generator)

    def parts(self, size: int) -> tuple[torch.Tensor, ...]:
        """All indices in another order, in one part or several."""
        return self.order(size).chunk(1 + int(self.below(PARTS)))

    def coin(self) -> bool:
        return bool(self.below(2))

    def signs(self, size: int) -> torch.Tensor:
        return 2 * self.below(2, size) - 1


Way = Callable[..., Any]  # takes the draw and the operation, then the operation's own arguments
WAYS: dict[Any, Way] = {}


def way_of(*operations: Any) -> Callable[[Way], Way]:
    def register(way: Way) -> Way:
        WAYS.update(dict.fromkeys(operations, way))
        return way

    return register


class _Perturbed(TorchDispatchMode):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        way = WAYS.get(func)
        if way is None or not args[0].is_floating_point() or args[0].device.type != "cpu":
            return func(*args, **kwargs or {})
        return way(Draw(self.seed, func, args), func, *args, **kwargs or {})


@contextmanager
def perturbed(seed: int) -> Iterator[None]:
    """Perturb everything that torch computes; attention as the products and sums it stands for."""
    with sdpa_kernel(SDPBackend.MATH), _Perturbed(seed):
        yield


# --- products -------------------------------------------------------------------------------------------------------


def product(draw: Draw, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Matrix product, in float32 for narrower factors."""
    wide = torch.promote_types(a.dtype, torch.float32)
    total = 0
    for part in draw.parts(a.shape[-1]):
        x, y = a[..., part].to(wide), b[..., part, :].to(wide)
        total = total + ((y.mT @ x.mT).mT if draw.coin() else x @ y)
    return total


@way_of(aten.mm.default, aten.bmm.default)
def _product(draw, func, a, b):
    return product(draw, a, b).to(a.dtype).contiguous()


@way_of(aten.addmm.default, aten.baddbmm.default)
def _sum_and_product(draw, func, c, a, b, *, beta=1, alpha=1):
    total = alpha * product(draw, a, b)
    return (total if beta == 0 else beta * c + total).to(a.dtype).contiguous()


@way_of(aten.mv.default)
def _vector_product(draw, func, a, b):
    return product(draw, a, b[:, None]).to(a.dtype)[:, 0].contiguous()


@way_of(aten.dot.default)
def _scalar_product(draw, func, a, b):
    return product(draw, a[None], b[:, None]).to(a.dtype)[0, 0].clone()


@way_of(aten.convolution.default)
def _convolution(draw, func, x, weight, bias, *geometry):
    *_, transposed, _, groups = geometry
    if transposed or groups != 1:
        return func(x, weight, bias, *geometry)
    total = 0
    for part in draw.parts(x.shape[1]):
        total = total + func(x[:, part], weight[:, part], None, *geometry)
    return total if bias is None else total + bias.view(-1, *[1] * (x.ndim - 2))


@way_of(aten.convolution_backward.default)
def _convolution_backward(draw, func, grad, x, weight, bias_sizes, *options):
    *_, groups, _ = options
    if groups != 1:
        return func(grad, x, weight, bias_sizes, *options)
    examples, channels = draw.order(len(grad)), draw.order(grad.shape[1])
    results = func(grad[examples][:, channels], x[examples], weight[channels], bias_sizes, *options)
    orders = examples, channels, channels
    return tuple(
        None if result is None else result[order.argsort()] for result, order in zip(results, orders, strict=True)
    )


# --- sums -----------------------------------------------------------------------------------------------------------


@way_of(aten.sum.default, aten.mean.default)
def _total(draw, func, x, **options):
    return func(x.flatten()[draw.order(x.numel())], **options)


@way_of(aten.sum.dim_IntList, aten.mean.dim, aten.var.correction)
def _sums(draw, func, x, dim=None, *rest, **options):
    for axis in range(x.ndim) if dim is None or len(dim) == 0 else dim:
        x = x.index_select(axis, draw.order(x.shape[axis])) if x.ndim else x
    return func(x, dim, *rest, **options)


@way_of(aten.linalg_vector_norm.default)
def _norms(draw, func, x, order=2, dim=None, *rest, **options):
    for axis in range(x.ndim) if dim is None else dim:
        x = x.index_select(axis, draw.order(x.shape[axis])) if x.ndim else x
    return func(x, order, dim, *rest, **options)


@way_of(aten._softmax.default, aten._log_softmax.default)
def _softmax(draw, func, x, dim, *rest):
    if x.ndim == 0:
        return func(x, dim, *rest)
    order = draw.order(x.shape[dim])
    return func(x.index_select(dim, order), dim, *rest).index_select(dim, order.argsort())


@way_of(aten.native_layer_norm.default)
def _layer_norm(draw, func, x, shape, weight, bias, eps):
    if len(shape) != 1 or weight is None or bias is None:
        return func(x, shape, weight, bias, eps)
    order = draw.order(*shape)
    y, mean, deviation = func(x[..., order], shape, weight[order], bias[order], eps)
    return y[..., order.argsort()], mean, deviation


# --- decompositions -------------------------------------------------------------------------------------------------


@way_of(aten._linalg_eigh.default)
def _eigh(draw, func, a, uplo="L", compute_v=True):
    half = a.tril() if uplo == "L" else a.triu().mT
    order = draw.order(a.shape[-1])
    values, vectors = func((half + half.tril(-1).mT)[..., order, :][..., order], "L", compute_v)
    if compute_v:
        vectors = vectors[..., order.argsort(), :] * draw.signs(len(order)).to(a)
    return values, vectors


@way_of(aten._linalg_svd.default)
def _svd(draw, func, a, full_matrices=False, compute_uv=True, **options):
    rows, columns = draw.order(a.shape[-2]), draw.order(a.shape[-1])
    u, s, vh = func(a[..., rows, :][..., columns], full_matrices, compute_uv, **options)
    return (u[..., rows.argsort(), :], s, vh[..., columns.argsort()]) if compute_uv else (u, s, vh)


@way_of(aten.linalg_qr.default)
def _qr(draw, func, a, mode="reduced"):
    if mode != "reduced":
        return func(a, mode)
    order = draw.order(a.shape[-2])
    q, r = func(a[..., order, :], mode)
    signs = draw.signs(q.shape[-1]).to(a)
    return q[..., order.argsort(), :] * signs, signs[:, None] * r


@way_of(aten._linalg_solve_ex.default)
def _solve(draw, func, a, b, *, left=True, check_errors=False):
    plain = func(a, b, left=left, check_errors=check_errors)
    if b.ndim != a.ndim:
        return plain
    rows, columns = draw.order(a.shape[-1]), draw.order(a.shape[-1])
    permuted = a[..., rows, :][..., columns]
    if left:
        found = func(permuted, b[..., rows, :], left=True)[0][..., columns.argsort(), :]
    else:
        found = func(permuted, b[..., columns], left=False)[0][..., rows.argsort()]
    return torch.empty_like(plain[0]).copy_(found), *plain[1:]


@way_of(aten.linalg_inv_ex.default)
def _inverse(draw, func, a, check_errors=False):
    rows, columns = draw.order(a.shape[-1]), draw.order(a.shape[-1])
    inverse, info = func(a[..., rows, :][..., columns], check_errors=check_errors)
    inverse.copy_(inverse[..., columns.argsort(), :][..., rows.argsort()])
    return inverse, info
