"""That a perturbed run is perturbed, and as good as a plain one; else it would prove nothing."""

import pytest
import torch
from support.perturbation import SEEDS, WAYS, perturbed
from support.tolerances import ROUNDING
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

# `make test-portable` runs its perturbed tests inside another perturbation
pytestmark = pytest.mark.skipif("config.getoption('--perturb') is not None", reason="compares with a plain run")


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


A, B, X, KERNEL = random(20, 30), random(30, 9), random(3, 4, 6, 6), random(5, 4, 3, 3)
SQUARE = A @ A.T + torch.eye(20).double()


def eigh():
    values, vectors = torch.linalg.eigh(SQUARE)
    return (vectors * values) @ vectors.T


def svd():
    left, values, right = torch.linalg.svd(A, full_matrices=False)
    return (left * values) @ right


def qr():
    basis, coefficients = torch.linalg.qr(B)
    return basis @ coefficients


def convolution_gradients():
    tensors = [tensor.clone().requires_grad_() for tensor in (X, KERNEL, random(5))]
    gradients = torch.autograd.grad(F.conv2d(*tensors, padding=1).sin().sum(), tensors)
    return torch.cat([gradient.flatten() for gradient in gradients])


OPERATIONS = {
    "matrix product": lambda: A @ B,
    "batched product": lambda: torch.stack([A, A]) @ torch.stack([B, -B]),
    "linear layer": lambda: F.linear(A, B.T, B[0]),
    "batched sum and product": lambda: torch.baddbmm(random(1, 20, 9), A[None], B[None], beta=0.5, alpha=2.0),
    "vector product": lambda: A @ B[:, 0],
    "scalar product": lambda: B[:, 0] @ B[:, 1],
    "convolution": lambda: F.conv2d(X, KERNEL, random(5), padding=1),
    "gradients of a convolution": convolution_gradients,
    "attention": lambda: F.scaled_dot_product_attention(*[random(2, 3, 7, 8)] * 3, is_causal=True),
    "sum": lambda: A.sum(),
    "sums": lambda: A.sum(1),
    "mean": lambda: A.exp().mean(),
    "means": lambda: A.exp().mean(0),
    "variances": lambda: A.var(1),
    "norms": lambda: A.norm(dim=0),
    "softmax": lambda: A.softmax(1),
    "logarithm of softmax": lambda: A.log_softmax(0),
    "layer norm": lambda: F.layer_norm(A, (30,), B[:, 0].contiguous(), B[:, 1].contiguous()),
    "eigenvectors": eigh,
    "singular vectors": svd,
    "orthonormal basis": qr,
    "solution": lambda: torch.linalg.solve(SQUARE, A),
    "solution from the right": lambda: torch.linalg.solve(SQUARE, A.T, left=False),
    "inverse": lambda: torch.linalg.inv(SQUARE),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_has_other_bits_and_is_as_good(name):
    compute = OPERATIONS[name]
    plain, found = compute(), []
    for seed in SEEDS:
        with perturbed(seed):
            found.append(compute())
            assert torch.equal(compute(), found[-1])  # the same operation on the same operands
        assert found[-1].stride() == plain.stride()
        torch.testing.assert_close(found[-1], plain, rtol=ROUNDING, atol=ROUNDING)
    assert any(not torch.equal(other, plain) for other in found)


def test_every_way_is_taken():
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func)
            return func(*args, **kwargs or {})

    seen = set()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), Recorder():
        for compute in OPERATIONS.values():
            compute()
    assert WAYS.keys() <= seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_products_are_rounded_once(dtype):
    a, b = A.to(dtype), B.to(dtype)
    with perturbed(0):
        found = a @ b
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), a.double() @ b.double(), rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_whole_numbers_are_left_alone():
    numbers = torch.arange(12).view(3, 4)
    with perturbed(0):
        assert torch.equal(numbers @ numbers.T, torch.einsum("ij,kj->ik", numbers, numbers))
        assert numbers.sum() == 66
