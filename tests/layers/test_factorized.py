"""Factorized layers against the dense layers they stand for, and the registry of layer types."""

import copy
import itertools
import re

import pytest
import torch
from support.tolerances import EXACT, FACTOR_CAST, FLOAT32, ROUNDING
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hf_lossless_lr.errors import ConfigurationError, TargetError
from hf_lossless_lr.factors.linalg import pivoted_form
from hf_lossless_lr.layers.convolution import FactorizedConv2d
from hf_lossless_lr.layers.factorized import is_factorized, layers_in
from hf_lossless_lr.layers.layout import LAYOUTS, layout_of, to_dense, weight_matrices
from hf_lossless_lr.layers.linear import FactorizedLinear
from hf_lossless_lr.layers.storage import STORAGES, factorized_parameters

pytestmark = pytest.mark.numerical

SHAPES = [(5, 9), (7, 7), (9, 5), (2, 3)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
GEOMETRIES = [
    {"kernel_size": 3},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (2, 3), "stride": (1, 2), "padding": (1, 0), "dilation": (2, 1)},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
]

on_storages = pytest.mark.parametrize("storage", STORAGES)
on_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
on_biases = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
on_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
on_geometries = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)


def random(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def low_rank(seed, shape, rank, storage, linear=True):
    """A random matrix of that rank, and its factors as `load_factors` takes them."""
    left, right = random(seed, shape[0], rank), random(seed + 1, rank, shape[1])
    if storage == "two-factor":
        return left @ right, (right, left, None)
    if linear and shape[1] < shape[0]:  # linear layers pivot the narrower side
        form = pivoted_form(right.T, left.T)
        return left @ right, (form.coefficients.T, form.skeleton.T, torch.argsort(form.permutation))
    form = pivoted_form(left, right)
    return left @ right, tuple(form)


def ranks(shape, storage):
    """The lowest, a middle and the highest rank."""
    highest = min(shape) - (storage == "pivoted")
    return sorted({1, (1 + highest) // 2, highest})


def make_dense(kind, bias=True, dtype=torch.float64):
    """A dense layer of each type; Conv1D has a bias always."""
    layer = {
        "Linear": lambda: nn.Linear(6, 9, bias=bias),
        "Conv1D": lambda: Conv1D(9, 6),
        "Conv2d": lambda: nn.Conv2d(3, 9, **GEOMETRIES[2], bias=bias),
    }[kind]()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(random(11, *parameter.shape))
    return layer.to(dtype)


def make_factorized(kind, rank=2, storage="pivoted", bias=True, dtype=torch.float64):
    """A filled factorized layer, its dense original, and the matrix."""
    dense = make_dense(kind, bias, dtype)
    layer = layout_of(dense).factorized(dense, rank, storage)
    matrix, factors = low_rank(5, weight_matrices(dense)[0].shape, rank, storage, kind != "Conv2d")
    layer.load_factors(*factors, bias=dense.bias)
    return layer, dense, matrix


KINDS = ["Linear", "Conv1D", "Conv2d"]
on_kinds = pytest.mark.parametrize("kind", KINDS)


def an_input(kind, dtype=torch.float64):
    return random(21, *{"Conv2d": (2, 3, 8, 7)}.get(kind, (2, 4, 6))).to(dtype)


# --- forward --------------------------------------------------------------------------------------------------------


@on_storages
@on_shapes
@on_biases
@on_dtypes
def test_forward_is_the_dense_map_of_the_low_rank_weight(storage, shape, bias, dtype):
    out, in_ = shape
    for rank in ranks(shape, storage):
        matrix, factors = low_rank(rank, shape, rank, storage)
        b = random(30, out) if bias else None
        layer = FactorizedLinear(in_, out, rank, bias=bias, storage=storage, dtype=dtype)
        layer.load_factors(*factors, bias=b)
        for x in (random(31, in_), random(32, 3, in_), random(33, 2, 3, in_)):
            found, expected = layer(x.to(dtype)), F.linear(x, matrix, b)
            assert (found.dtype, found.shape) == (dtype, expected.shape)
            atol = FACTOR_CAST[str(dtype).removeprefix("torch.")] * matrix.norm().item() * x.norm().item()
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=atol)


@on_storages
@on_geometries
@on_biases
@on_dtypes
def test_a_factorized_convolution_is_the_dense_one_of_the_low_rank_kernel(storage, geometry, bias, dtype):
    dense = nn.Conv2d(3, 5, **geometry, bias=bias, dtype=dtype)
    shape = weight_matrices(dense)[0].shape
    for rank in ranks(shape, storage):
        matrix, factors = low_rank(rank, shape, rank, storage, linear=False)
        b = random(30, 5) if bias else None
        layer = FactorizedConv2d(dense, rank, storage)
        layer.load_factors(*factors, bias=b)
        options = {name: value for name, value in geometry.items() if name != "kernel_size"}
        for x in (random(31, 2, 3, 9, 8), random(32, 3, 9, 8)):  # the second one without a batch dimension
            expected = F.conv2d(x, matrix.reshape(dense.weight.shape), b, **options)
            found = layer(x.to(dtype))
            assert (found.dtype, found.shape) == (dtype, expected.shape)
            atol = FACTOR_CAST[str(dtype).removeprefix("torch.")] * matrix.norm().item() * x.norm().item()
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=atol)


@on_storages
@on_shapes
def test_dense_weight_is_the_matrix(storage, shape):
    for rank in ranks(shape, storage):
        matrix, factors = low_rank(rank, shape, rank, storage)
        layer = FactorizedLinear(shape[1], shape[0], rank, storage=storage, dtype=torch.float64)
        layer.load_factors(*factors)
        torch.testing.assert_close(layer.dense_weight(), matrix, rtol=ROUNDING, atol=10 * ROUNDING)


@on_shapes
def test_a_pivoted_linear_layer_permutes_its_narrower_side(shape):
    layer = FactorizedLinear(shape[1], shape[0], 1, storage="pivoted")
    assert layer.permutation.shape == (min(shape),)
    assert FactorizedLinear(shape[1], shape[0], 1, storage="two-factor").permutation is None


@on_kinds
@on_storages
def test_forward_agrees_with_dense_weight(kind, storage):
    """In the package's own words: the layer is its dense counterpart."""
    layer, *_ = make_factorized(kind, 3, storage)
    x = an_input(kind)
    torch.testing.assert_close(layer(x), to_dense(layer)(x), rtol=ROUNDING, atol=100 * ROUNDING)


@pytest.mark.parametrize(
    ("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2]
)
def test_dense_weight_is_in_float32_or_wider(dtype, wide):
    assert FactorizedLinear(4, 5, 2, dtype=dtype).dense_weight().dtype == wide


# --- what is stored -------------------------------------------------------------------------------------------------


@on_kinds
@on_storages
@on_biases
def test_parameters_are_those_the_curve_counts_and_the_bias(kind, storage, bias):
    layer, dense, matrix = make_factorized(kind, 3, storage, bias)
    counted = factorized_parameters(*matrix.shape, 3, storage) + (9 if dense.bias is not None else 0)
    assert sum(parameter.numel() for parameter in layer.parameters()) == counted


@on_kinds
@on_storages
@on_biases
def test_state_dict_has_the_documented_names(kind, storage, bias):
    layer, dense, _ = make_factorized(kind, 3, storage, bias)
    expected = {"down.weight", "up.weight", "weight"}
    expected |= {"bias"} if dense.bias is not None else set()
    expected |= {"permutation"} if storage == "pivoted" else set()
    assert set(layer.state_dict()) == expected


@on_kinds
@on_storages
def test_a_state_dict_fills_a_fresh_layer(kind, storage):
    layer, dense, _ = make_factorized(kind, 3, storage)
    fresh = layout_of(dense).factorized(dense, 3, storage)
    fresh.load_state_dict(layer.state_dict())
    x = an_input(kind)
    torch.testing.assert_close(fresh(x), layer(x), rtol=EXACT, atol=EXACT)


@on_kinds
@on_storages
@on_dtypes
def test_the_guard_is_one_number_in_the_dtype_of_the_layer(kind, storage, dtype):
    layer, *_ = make_factorized(kind, 3, storage, dtype=dtype)
    assert layer.weight.shape == (1,)
    assert layer.weight.dtype == dtype
    assert "weight" not in dict(layer.named_parameters())
    assert layer.to(torch.float16).weight.dtype == torch.float16


@on_kinds
def test_the_guard_has_the_dtype_that_the_factors_are_computed_in(kind):
    """FSDP puts parameters of another dtype in for a forward pass, and leaves buffers as they are."""
    layer, *_ = make_factorized(kind, 3, "two-factor")
    dtype = layer.weight.dtype
    layer.down.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.state_dict()["weight"].dtype == dtype


@on_kinds
@on_storages
@on_biases
def test_parameters_may_be_plain_tensors(kind, storage, bias):
    """So they are in the copies of DataParallel, and under FSDP with `use_orig_params=False`."""
    layer, *_ = make_factorized(kind, 3, storage, bias)
    x = an_input(kind)
    expected = layer(x)
    for module in list(layer.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            setattr(module, name, parameter.detach())
    assert not list(layer.parameters())
    assert torch.equal(layer(x), expected)


@on_kinds
@on_storages
def test_autocast_gives_the_dtype_of_the_dense_layer(kind, storage):
    layer, dense, _ = make_factorized(kind, 3, storage, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(an_input(kind, torch.float32)).dtype == dense(an_input(kind, torch.float32)).dtype


@on_kinds
@on_storages
@pytest.mark.parametrize("strict", [True, False])
def test_a_dense_layer_refuses_a_factorized_state_dict(kind, storage, strict):
    """Also when not strict, where missing names alone would leave it with random numbers."""
    layer, dense, _ = make_factorized(kind, 3, storage)
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: copying a param with shape .*\[1\]"):
        dense.load_state_dict(layer.state_dict(), strict=strict)


@on_kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_leaves_the_permutation_whole(kind, dtype):
    layer, *_ = make_factorized(kind, 3, "pivoted")
    order = layer.permutation.clone()
    layer.to(dtype)
    assert not layer.permutation.dtype.is_floating_point
    assert torch.equal(layer.permutation, order)
    assert not torch.equal(order, torch.arange(len(order)))  # else the tests of this file would not see it


@on_storages
def test_a_layer_on_the_meta_device_holds_nothing(storage):
    layer = FactorizedLinear(6, 9, 3, storage=storage, device="meta")
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}


def test_load_factors_refuses_other_shapes():
    layer = FactorizedLinear(6, 9, 3)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        layer.load_factors(torch.ones(2, 6), torch.ones(6, 3), torch.arange(6))


@pytest.mark.parametrize(("storage", "given", "text"), [("pivoted", None, "a"), ("two-factor", torch.arange(6), "no")])
def test_load_factors_wants_a_permutation_for_pivots_alone(storage, given, text):
    layer = FactorizedLinear(6, 9, 3, storage=storage)
    with pytest.raises(ConfigurationError, match=f"a {storage} layer takes {text} permutation"):
        layer.load_factors(layer.down.weight, layer.up.weight, given)


@on_storages
def test_a_layer_describes_itself(storage):
    layer = FactorizedLinear(6, 9, 3, bias=False, storage=storage)
    text = f"in_features=6, out_features=9, rank=3, bias=False, storage={storage}"
    assert repr(layer).startswith(f"FactorizedLinear(\n  {text}\n")


# --- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("storage", "highest"), [("pivoted", 5), ("two-factor", 6)])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)], ids=str)
def test_a_rank_out_of_range_is_an_error_that_gives_the_range(storage, highest, shape):
    out, in_ = shape
    FactorizedLinear(in_, out, highest, storage=storage)
    for rank in (-1, 0, highest + 1):
        text = (
            f"rank: a {storage} layer with {in_} inputs and {out} outputs takes ranks from 1 to {highest}, got {rank}."
        )
        with pytest.raises(ConfigurationError, match=re.escape(text)):
            FactorizedLinear(in_, out, rank, storage=storage)


def test_the_rank_of_a_convolution_is_limited_by_its_kernel_matrix():
    convolution = nn.Conv2d(2, 30, 3)  # a 30 x 18 matrix
    FactorizedConv2d(convolution, 17)
    FactorizedConv2d(convolution, 18, "two-factor")
    with pytest.raises(ConfigurationError, match="with 18 inputs and 30 outputs takes ranks from 1 to 17, got 18"):
        FactorizedConv2d(convolution, 18)


def test_an_unknown_storage_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ConfigurationError, match="storage: 'auto' is unknown; choose one of pivoted, two-factor"):
        FactorizedLinear(6, 9, 3, storage="auto")


# --- as part of a model ---------------------------------------------------------------------------------------------


@on_kinds
@on_storages
def test_gradients_are_those_of_the_dense_map(kind, storage):
    """By the chain rule through `dense_weight`, for the factors, the bias and the input."""
    layer, dense, _ = make_factorized(kind, 3, storage)
    x = an_input(kind).requires_grad_()
    inputs = [x, layer.down.weight, layer.up.weight, layer.bias]
    found = torch.autograd.grad(layer(x).sin().sum(), inputs)
    if kind == "Conv2d":
        options = {name: value for name, value in GEOMETRIES[2].items() if name != "kernel_size"}
        y = F.conv2d(x, layer.dense_weight().reshape(dense.weight.shape), layer.bias, **options)
    else:
        y = F.linear(x, layer.dense_weight(), layer.bias)
    for one, other in zip(found, torch.autograd.grad(y.sin().sum(), inputs), strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=ROUNDING, atol=100 * ROUNDING)


@on_kinds
@on_storages
def test_a_deep_copy_is_equal_and_independent(kind, storage):
    layer, *_ = make_factorized(kind, 3, storage)
    x = an_input(kind)
    twin, before = copy.deepcopy(layer), layer(x)
    torch.testing.assert_close(twin(x), before, rtol=EXACT, atol=EXACT)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    torch.testing.assert_close(layer(x), before, rtol=EXACT, atol=EXACT)
    assert (twin.storage, twin.rank, twin.layer_type) == (layer.storage, layer.rank, kind)


@on_kinds
@on_storages
def test_factors_that_are_loaded_are_copied(kind, storage):
    dense = make_dense(kind)
    layer = layout_of(dense).factorized(dense, 2, storage)
    _, factors = low_rank(5, weight_matrices(dense)[0].shape, 2, storage)
    layer.load_factors(*factors, bias=dense.bias)
    before = layer(an_input(kind))
    for tensor in (*factors, dense.bias.detach()):
        if tensor is not None:
            tensor.zero_()
    torch.testing.assert_close(layer(an_input(kind)), before, rtol=EXACT, atol=EXACT)


# --- layouts --------------------------------------------------------------------------------------------------------


@on_kinds
@on_storages
@on_biases
@on_dtypes
def test_to_dense_gives_the_original_type_and_the_low_rank_weight(kind, storage, bias, dtype):
    layer, original, matrix = make_factorized(kind, 3, storage, bias, dtype)
    dense = to_dense(layer)
    assert type(dense) is type(original)
    assert repr(dense) == repr(original)  # sizes and geometry
    assert dense.weight.shape == original.weight.shape
    assert dense.weight.dtype == dtype
    assert dense.weight.requires_grad
    atol = FACTOR_CAST[str(dtype).removeprefix("torch.")] * matrix.norm().item()
    torch.testing.assert_close(weight_matrices(dense)[0].double(), matrix, rtol=0, atol=atol)
    assert (dense.bias is None) == (original.bias is None)
    if original.bias is not None:
        assert torch.equal(dense.bias, original.bias)


def test_a_conv1d_without_a_stored_bias_gets_one_of_zero():
    layer = FactorizedLinear(6, 9, 2, bias=False, layer_type="Conv1D")
    dense = to_dense(layer)
    assert type(dense) is Conv1D
    assert torch.equal(dense.bias, torch.zeros(9))


@on_kinds
@on_biases
@on_dtypes
def test_a_layout_builds_a_layer_like_the_original(kind, bias, dtype):
    dense = make_dense(kind, bias, dtype)
    layer = layout_of(dense).factorized(dense, 2, "pivoted")
    assert is_factorized(layer)
    assert not is_factorized(dense)
    assert layer.layer_type == kind
    assert (layer.out_features, layer.in_features) == weight_matrices(dense)[0].shape
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    assert (layer.bias is None) == (dense.bias is None)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 9),
        Conv1D(9, 6),
        *(nn.Conv2d(3, 5, **geometry) for geometry in GEOMETRIES),
    ],
    ids=str,
)
def test_a_layer_is_its_matrix_on_the_rows_of_its_input(layer):
    """What the statistics rely on: input rows, matrix and output rows belong together."""
    layer = layer.double()
    x = an_input(type(layer).__name__)
    layout = layout_of(layer)
    y = layout.output_rows(layer, layer(x))
    rows, (matrix,) = layout.input_rows(layer, x), layout.matrices(layer, layer.weight)
    torch.testing.assert_close(y, rows @ matrix.T + layer.bias, rtol=ROUNDING, atol=10 * ROUNDING)


@on_kinds
def test_weight_matrix_shares_memory_with_the_layer(kind):
    dense = make_dense(kind)
    weight_matrices(dense)[0][0, 0] = 7.0
    assert layout_of(dense).matrices(dense, dense.weight)[0][0, 0] == 7.0
    assert not weight_matrices(dense)[0].requires_grad


@pytest.mark.parametrize("module", [nn.Embedding(4, 3), nn.LayerNorm(3), nn.Conv3d(2, 3, 1)], ids=str)
def test_an_unsupported_type_is_an_error_that_lists_the_supported_ones(module):
    text = (
        f"layers of type {type(module).__name__} cannot be factorized; supported are Conv1D, Conv1d, Conv2d, Linear."
    )
    with pytest.raises(TargetError, match=re.escape(text)):
        layout_of(module)


def test_a_subclass_has_the_layout_of_its_base():
    class OwnLinear(nn.Linear):
        pass

    layer = layout_of(OwnLinear(3, 4)).factorized(OwnLinear(3, 4), 2, "pivoted")
    assert type(to_dense(layer)) is nn.Linear


def test_layouts_cover_the_types_of_these_tests():
    assert {layer_type.__name__ for layer_type in LAYOUTS} == {*KINDS, "Conv1d"}  # Conv1d: test_convolutions.py


@on_storages
def test_a_factorized_model_computes_what_its_dense_counterpart_does(storage):
    """Layers in sequence, in float32, as a model would hold them."""
    layers = [FactorizedLinear(i, o, 3, storage=storage) for i, o in itertools.pairwise([6, 9, 8, 5])]
    for n, layer in enumerate(layers):
        matrix_shape = (layer.out_features, layer.in_features)
        layer.load_factors(*low_rank(n, matrix_shape, 3, storage)[1], bias=random(n, layer.out_features))
    x = an_input("Linear", torch.float32)
    found = nn.Sequential(*layers)(x)
    expected = nn.Sequential(*(to_dense(layer) for layer in layers))(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT32 * expected.abs().max().item())


class Scaled(FactorizedLinear):
    """A layer type that stores a tensor more, as a number format does."""

    own_tensors = (*FactorizedLinear.own_tensors, "scale")

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("scale", torch.ones(3))


class TestTheTensorsOfALayer:
    def test_are_those_that_a_checkpoint_holds(self):
        layer = FactorizedLinear(6, 4, 2, storage="pivoted")
        assert layer.tensor_shapes() == {
            "down.weight": (2, 6),
            "up.weight": (2, 2),
            "permutation": (4,),
            "bias": (4,),
            "weight": (1,),
        }

    def test_are_found_among_others_by_what_a_class_names(self):
        shapes = {"a.b.weight": (4, 6), "a.b.bias": (4,), "a.c.scale": (3,), "norm.weight": (7,)}
        assert layers_in(shapes) == {"a.c": {"scale": (3,)}}
        whole = {f"a.d.{name}": shape for name, shape in Scaled(6, 4, 2).tensor_shapes().items()}
        assert layers_in(shapes | whole)["a.d"] == Scaled(6, 4, 2).tensor_shapes()

    def test_are_complete_with_the_guard_and_one_that_only_such_layers_have(self):
        shapes = Scaled(6, 4, 2).tensor_shapes()
        assert Scaled.is_complete(shapes)
        assert not Scaled.is_complete({name: shape for name, shape in shapes.items() if name != "weight"})
        assert not Scaled.is_complete({"weight": (1,), "bias": (4,)})
