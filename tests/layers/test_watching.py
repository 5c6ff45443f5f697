"""Weights that are read while a model runs, by whatever name."""

import pytest
import torch
from support.compressions import build, compress
from torch import nn

from hf_lossless_lr.errors import TargetError
from hf_lossless_lr.layers import weights_read

READS = {
    "shape": lambda w: w.shape[0],
    "size": lambda w: w.size(-1),
    "numel": lambda w: w.numel(),
    "norm": lambda w: w.norm(),
    "product": lambda w: nn.functional.linear(torch.ones(2, 4), w),
    "a list": lambda w: torch.cat([w, w]),
    "by name": lambda w: nn.functional.linear(input=torch.ones(2, 4), weight=w),
    "a view": lambda w: w[0],
    "data": lambda w: w.data,
}
ANSWERED = {
    "dtype": lambda w: w.dtype,
    "device": lambda w: w.device,
    "requires_grad": lambda w: w.requires_grad,
    "kind": lambda w: w.is_floating_point(),
    "type": lambda w: isinstance(w, nn.Parameter),
    "none": lambda w: w is None,
}


@pytest.mark.parametrize("read", READS)
def test_are_noted_outside_of_a_call(read):
    layers = {"read": nn.Linear(4, 3), "called": nn.Linear(4, 3)}
    expected = [layer(torch.ones(2, 4)) for layer in layers.values()]
    with weights_read(layers) as found:
        answers = [layer(torch.ones(2, 4)) for layer in layers.values()]
        assert not found
        READS[read](layers["read"].weight)
        assert found == {"read"}
    assert all(map(torch.equal, answers, expected))


@pytest.mark.parametrize("question", ANSWERED)
def test_are_not_noted_where_a_guard_answers_the_same(question):
    layer = nn.Linear(4, 3)
    expected = ANSWERED[question](layer.weight)
    with weights_read({"a": layer}) as found:
        assert ANSWERED[question](layer.weight) == expected
    assert not found


def test_leave_the_layers_as_they_were_whatever_happens():
    class Failing(nn.Linear):
        def forward(self, input):
            raise RuntimeError("no")

    layer = Failing(4, 3)
    weight, attributes = layer.weight, set(vars(layer))
    with weights_read({"a": layer}) as found:
        with pytest.raises(RuntimeError):
            layer(torch.ones(2, 4))
        assert layer.weight is not weight
    assert layer.weight is weight
    assert set(vars(layer)) == attributes
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    assert not found


@pytest.mark.parametrize("how", ["getattr", "index", "loop"])
def test_of_a_model_stay_dense(how):
    """What takes the place of such a layer would be asked for the shape of its guard, and answer silently."""
    model, batch = build("bert-sequence-classification")
    part = model.bert.encoder.layer[0].intermediate
    dense = model.bert.encoder.layer[0].intermediate.dense
    ways = {
        "getattr": lambda: getattr(part, "den" + "se").weight.shape[0],
        "index": lambda: part._modules["dense"].weight.shape[0],
        "loop": lambda: sum(child.weight.shape[0] for child in part.children() if isinstance(child, nn.Linear)),
    }

    def forward(hidden_states):
        return part.intermediate_act_fn(part.dense(hidden_states)) * ways[how]() ** -0.5

    part.forward = forward
    _, report = compress(model, batch, keep_ratio=0.5)
    name = "bert.encoder.layer.0.intermediate.dense"
    assert report.skipped[name].reason == "the model reads its weight instead of calling it"
    assert model.get_submodule(name) is dense
    assert sum(layer.rank is not None for layer in report.layers.values()) > 3


def test_are_an_error_where_no_other_layer_is_left():
    model, batch = build("bert-sequence-classification")
    part = model.bert.encoder.layer[0].intermediate
    part.forward = lambda x: part.intermediate_act_fn(part.dense(x)) * len(part._modules["dense"].weight) ** -0.5
    with pytest.raises(TargetError, match=r"left to factorize; skipped: .*reads its weight"):
        compress(model, batch, target_modules=["re:.*layer.0.intermediate.dense"], keep_ratio=0.5)
