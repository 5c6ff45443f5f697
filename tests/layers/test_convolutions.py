"""Factorized convolutions: every geometry, in every form, against the dense one of their kernel."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from hf_lossless_lr.errors import ConfigurationError, TargetError
from hf_lossless_lr.layers import find_targets
from hf_lossless_lr.layers.convolution import FactorizedConv1d, FactorizedConv2d
from hf_lossless_lr.layers.layout import layout_of, to_dense, weight_matrices
from hf_lossless_lr.layers.patches import POSITIONS, sampled
from hf_lossless_lr.layers.subclasses import answers_as_its_base, has_more_than_its_base

pytestmark = pytest.mark.numerical


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


STORED = [("channel", "two-factor"), ("channel", "pivoted"), ("spatial", "two-factor")]
GROUPS = [1, 2]
STRIDES = [1, 2, (2, 1)]
DILATIONS = [1, (1, 2)]
PADDINGS = [0, 1, (2, 0), "same", "valid"]
MODES = ["zeros", "reflect", "circular", "replicate"]

on_stored = pytest.mark.parametrize(("form", "storage"), STORED, ids=map("-".join, STORED))
on_groups = pytest.mark.parametrize("groups", GROUPS)


def geometries():
    for stride, dilation, padding, mode in itertools.product(STRIDES, DILATIONS, PADDINGS, MODES):
        if padding != "same" or stride == 1:  # torch has no other
            yield {"stride": stride, "dilation": dilation, "padding": padding, "padding_mode": mode}


class Conv2dSame(nn.Conv2d):
    """As timm's: it pads by itself, for `ceil(input / stride)` outputs, more behind than before."""

    def forward(self, x):
        pads = []
        for axis in (1, 0):
            size, step, reach = (
                x.shape[2 + axis],
                self.stride[axis],
                self.dilation[axis] * (self.kernel_size[axis] - 1),
            )
            total = max((-(-size // step) - 1) * step + reach + 1 - size, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardized(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Spelled(nn.Linear):
    """As Falcon's: the same map, written by hand."""

    def forward(self, input):
        return input @ self.weight.T + self.bias


class Rounding(nn.Linear):
    def forward(self, input):
        return super().forward(input.round())


def filled(dense, form, storage, seed=0):
    """A factorized layer with random factors, and the kernel that they stand for, put together by hand."""
    generator = torch.Generator().manual_seed(seed)
    layer = layout_of(dense).factorized(dense, 2, storage, form)
    g, out, inputs = dense.groups, dense.out_channels // dense.groups, dense.in_channels // dense.groups
    kernel = dense.kernel_size
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    if form == "spatial":
        down, up = draw(g, 2, inputs, kernel[0]), draw(g, out, 2, kernel[1])
        layer.load_factors(down.flatten(2), up.flatten(2), None, dense.bias)
        matrices = torch.einsum("gokw,gkih->goihw", up, down)
        return layer, matrices.reshape(dense.weight.shape)
    down, up = (
        draw(g, 2, inputs * kernel.numel() if hasattr(kernel, "numel") else inputs * torch.Size(kernel).numel()),
        None,
    )
    if storage == "two-factor":
        up = draw(g, out, 2)
        layer.load_factors(down, up, None, dense.bias)
        return layer, (up @ down).reshape(dense.weight.shape)
    up = draw(g, out - 2, 2)
    orders = torch.stack([torch.randperm(out, generator=generator) for _ in range(g)])
    layer.load_factors(down, up, orders, dense.bias)
    rows = torch.cat([down, up @ down], dim=1)
    matrices = torch.stack([rows[n][orders[n]] for n in range(g)])
    return layer, matrices.reshape(dense.weight.shape)


def with_kernel(dense, kernel):
    other = copy.deepcopy(dense)
    with torch.no_grad():
        other.weight.copy_(kernel)
    return other


@on_stored
@on_groups
def test_a_layer_of_any_geometry_is_the_dense_convolution_of_its_kernel(form, storage, groups):
    torch.manual_seed(groups)
    x = torch.randn(2, 4, 9, 13)
    for geometry in geometries():
        dense = nn.Conv2d(4, 6, (3, 5), groups=groups, **geometry)
        layer, kernel = filled(dense, form, storage)
        expected = with_kernel(dense, kernel)(x)
        torch.testing.assert_close(
            layer(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()), msg=str(geometry)
        )
        torch.testing.assert_close(layer(x[0]), expected[0], rtol=0, atol=1e-5 * float(expected.abs().max()))
        back = to_dense(layer)
        assert repr(back) == repr(dense)
        torch.testing.assert_close(back.weight, kernel, rtol=0, atol=1e-5)
        torch.testing.assert_close(back.bias, dense.bias, rtol=0, atol=0)


@pytest.mark.parametrize("storage", ["two-factor", "pivoted"])
@on_groups
@pytest.mark.parametrize("padding", [0, 2, "same"])
def test_a_one_dimensional_layer_is_the_dense_convolution_of_its_kernel(storage, groups, padding):
    dense = nn.Conv1d(4, 6, 3, padding=padding, groups=groups, bias=groups == 1)
    layer, kernel = filled(dense, "channel", storage)
    assert isinstance(layer, FactorizedConv1d)
    x = torch.randn(2, 4, 11, generator=torch.Generator().manual_seed(1))
    expected = with_kernel(dense, kernel)(x)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert repr(to_dense(layer)) == repr(dense)


@on_stored
@pytest.mark.parametrize("size", [7, 8])
def test_a_layer_that_pads_by_itself_goes_on_to(form, storage, size):
    dense = Conv2dSame(4, 6, 3, stride=2)
    layer, kernel = filled(dense, form, storage)
    x = torch.randn(2, 4, size, size + 1, generator=torch.Generator().manual_seed(2))
    expected = with_kernel(dense, kernel)(x)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert type(to_dense(layer)) is Conv2dSame


@on_groups
def test_rows_are_what_the_kernel_lies_over(groups):
    """The matrices map the rows of the input to those of the output, at the positions that stand for all."""
    for geometry in geometries():
        for dense, x in (
            (nn.Conv2d(4, 6, (3, 5), groups=groups, **geometry), torch.randn(2, 4, 19, 18)),
            (Conv2dSame(4, 6, 3, stride=2, groups=groups), torch.randn(2, 4, 7, 8)),
        ):
            layout = layout_of(dense)
            rows, positions = layout.input_rows(dense, x), layout.positions(dense, x)
            found = torch.einsum("npgi,goi->npgo", rows, weight_matrices(dense)) + dense.bias.view(groups, -1)
            outputs = layout.output_rows(dense, dense(x))
            assert layout.row_shape(dense, x).numel() == outputs.shape[:2].numel()
            expected = outputs if positions is None else outputs[:, positions]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, msg=str(geometry))


def test_positions_are_few_and_the_same_for_every_picture_of_a_size():
    assert sampled(POSITIONS) is None
    for outputs in (POSITIONS + 1, 1000, 50176):
        positions = sampled(outputs)
        assert len(positions) == POSITIONS == len(set(positions.tolist()))
        assert 0 <= int(positions.min()) <= int(positions.max()) < outputs
        sampled.cache_clear()
        assert torch.equal(positions, sampled(outputs))
        halves = int((positions < outputs / 2).sum())
        assert POSITIONS / 4 < halves < 3 * POSITIONS / 4


def test_layers_have_the_attributes_that_model_code_reads():
    dense = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2)
    layer = FactorizedConv2d(dense, 2)
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    assert {name: getattr(layer, name) for name in names} == {name: getattr(dense, name) for name in names}
    assert layer.weight.dtype == dense.weight.dtype


@pytest.mark.parametrize("kernel", [1, (1, 3), (3, 1)])
def test_a_kernel_of_width_or_height_1_has_no_spatial_form(kernel):
    dense = nn.Conv2d(4, 6, kernel)
    assert layout_of(dense).forms(dense) == ("channel",)
    with pytest.raises(ConfigurationError, match="has no spatial form"):
        layout_of(dense).factorized(dense, 1, "two-factor", "spatial")


def test_a_spatial_form_has_no_pivots():
    with pytest.raises(ConfigurationError, match="in pivoted storage has no spatial form"):
        FactorizedConv2d(nn.Conv2d(4, 6, 3), 1, "pivoted", "spatial")


@on_stored
def test_a_layer_goes_through_the_exporter(form, storage):
    dense = nn.Conv2d(4, 6, 3, padding=1, groups=2)
    layer, _ = filled(dense, form, storage)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))


class TestSubclasses:
    @pytest.mark.parametrize(
        ("layer", "same"),
        [
            (Spelled(5, 7), True),
            (Rounding(5, 7), False),
            (Conv2dSame(3, 4, 3, stride=2), True),
            (Standardized(3, 4, 3), False),
            (nn.Linear(5, 7), True),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_count_as_their_base_where_they_answer_as_it_does(self, layer, same):
        before = torch.get_rng_state()
        assert answers_as_its_base(layer) is same
        assert torch.equal(before, torch.get_rng_state())

    @pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
    def test_that_saturate_or_pad_otherwise_do_not(self, scale):
        class Clamped(nn.Linear):
            def forward(self, input):
                return super().forward(input.clamp(-3 * scale, 3 * scale))

        class Conv2dSame(nn.Conv2d):  # as timm's is called; right for sizes that the stride divides
            def forward(self, x):
                total = self.kernel_size[0] - self.stride[0]
                before, behind = total // 2, total - total // 2
                return super().forward(nn.functional.pad(x, (before, behind, before, behind)))

        assert not answers_as_its_base(Clamped(5, 7))
        assert not answers_as_its_base(Conv2dSame(3, 4, 3, stride=2))

    def test_in_float16_are_no_others_where_it_overflows(self):
        layer = Spelled(5, 7).half()
        with torch.no_grad():
            layer.weight.fill_(1e3)
        assert answers_as_its_base(layer)

    def test_with_arguments_or_methods_of_their_own_have_more_than_their_base(self):
        class Scaled(nn.Linear):
            def forward(self, input, scale=1.0):
                return super().forward(input) * scale

        class Measured(nn.Linear):
            def penalty(self):
                return self.weight.square().sum()

        assert [has_more_than_its_base(kind(5, 7)) for kind in (Scaled, Measured)] == [True, True]
        assert not any(map(has_more_than_its_base, (Spelled(5, 7), Conv2dSame(3, 4, 3), nn.Linear(5, 7))))

    def test_that_cannot_take_a_plain_input_do_not(self):
        class Strange(nn.Linear):
            def forward(self, input, mask):
                return super().forward(input) * mask

        assert not answers_as_its_base(Strange(5, 7))

    def test_are_chosen_or_left_with_a_reason(self):
        class Net(PreTrainedModel):
            config_class = PreTrainedConfig

            def __init__(self):
                super().__init__(PreTrainedConfig())
                self.spelled, self.same = Spelled(5, 7), Conv2dSame(3, 4, 3)
                self.standardized, self.depthwise = Standardized(4, 4, 3), nn.Conv2d(4, 4, 3, groups=4)
                self.weight_normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
                self.attention = nn.MultiheadAttention(8, 2)

        found = find_targets(Net())
        assert list(found.chosen) == ["spelled", "same"]
        assert found.skipped["standardized"] == "Standardized computes something else than its base type"
        assert found.skipped["depthwise"].startswith("depthwise")
        assert "attention.out_proj" not in found.chosen  # its weight is read by the module around it
        assert list(find_targets(Net(), ["Conv2d"]).chosen) == ["same"]
        assert list(find_targets(Net(), ["Conv2dSame"]).chosen) == ["same"]
        assert list(find_targets(Net(), ignore=["Conv2dSame"]).chosen) == ["spelled"]
        with pytest.raises(TargetError, match="depthwise"):
            find_targets(Net(), ["depthwise"])


def test_the_classifier_that_a_network_names_itself_is_a_head():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def get_classifier(self):
            return self.fc

    class Wrapper(PreTrainedModel):
        config_class, base_model_prefix = PreTrainedConfig, "timm_model"

        def __init__(self):
            super().__init__(PreTrainedConfig())
            self.timm_model = Inner()

    found = find_targets(Wrapper())
    assert (list(found.chosen), found.skipped) == (["timm_model.conv"], {"timm_model.fc": "task head"})


def test_a_factor_with_something_on_it_is_called():
    """A hook, or an adapter in its place: then nothing is computed past it."""
    layer, _ = filled(nn.Conv2d(4, 6, 3), "channel", "pivoted")
    calls = []
    layer.up.register_forward_hook(lambda *_: calls.append(1))
    layer(torch.ones(1, 4, 5, 5))
    assert calls == [1]
