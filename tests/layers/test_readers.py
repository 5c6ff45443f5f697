"""Layers whose weight other code reads are found in its source, on ways that this machine never takes, too."""

import pytest
import torch
from support.architectures import ARCHITECTURES
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from hf_lossless_lr.layers import find_targets
from hf_lossless_lr.layers.readers import read_by_others


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.deep = nn.Linear(4, 4)


class Reader(nn.Module):
    """Each of its layers is used in another way."""

    slices, use_slices = 1, False

    def __init__(self):
        super().__init__()
        self.called, self.asked, self.read, self.shape, self.fused = (nn.Linear(4, 4) for _ in range(5))
        self.sliced, self.other, self.by_argument = (nn.Linear(4, 4) for _ in range(3))
        self.inner = Inner()
        self.of_init, self.replaced = nn.Linear(4, 4), nn.Linear(4, 4)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.zeros_(self.of_init.weight)

    def set_input_size(self, size):  # as networks of timm have it, which no pass calls
        self.replaced = nn.Linear(size, 4).to(self.replaced.weight[0, 0])

    def forward(self, x, given=None):
        x = self.replaced(x)
        x = self.called(x).to(self.asked.weight.dtype)
        if isinstance(self.asked.weight, torch.Tensor) and self.asked.weight is not None:
            x = self.asked(x).to(self.asked.weight.device)
        if self.training:
            x = self._fused(x)
        if self.slices > 1 and self.use_slices:
            x = F.linear(x, self.sliced.weight)
        else:
            x = F.linear(self.sliced(x), self.other.weight)
        x = self.by_argument(x) if given is None else x @ self.by_argument.weight
        rows, _ = self.shape.weight.shape
        return self.shape(x).view(-1, rows) @ self.read.weight.T @ self.inner.deep.weight

    def _fused(self, x):
        return F.linear(x, self.fused.weight)


def names_of(module):
    found = read_by_others(module)
    return {name for name, layer in module.named_modules() if id(layer) in found}


def test_what_is_read_is_found_and_what_is_called_is_not():
    assert names_of(Reader()) == {"read", "shape", "fused", "other", "inner.deep"}


def test_a_setting_of_one_module_counts_for_that_module():
    module = Reader()
    module.slices, module.use_slices = 2, True
    assert names_of(module) == {"read", "shape", "fused", "sliced", "inner.deep"}


def test_a_function_without_source_is_passed_over():
    namespace = {"Reader": Reader}
    exec("class Other(Reader):\n    def forward(self, x):\n        return x @ self.read.weight", namespace)
    assert names_of(namespace["Other"]()) == {"fused"}


def test_such_layers_stay_dense_and_the_reader_is_named():
    class Whole(PreTrainedModel):
        config_class = PreTrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.part = Reader()
            self.post_init()

    targets = find_targets(Whole(PreTrainedConfig()))
    chosen = {name.removeprefix("part.") for name in targets.chosen}
    assert chosen == {"called", "asked", "sliced", "by_argument", "of_init", "replaced"}
    assert set(targets.skipped.values()) == {"Reader reads its weight instead of calling it"}


@pytest.mark.parametrize(
    ("model", "read"),
    [
        ("MambaForCausalLM", {"conv1d", "x_proj", "dt_proj", "out_proj"}),  # the fused kernels of a GPU
        ("ViltForQuestionAnswering", {"projection"}),  # unpacks the shape of a kernel
        ("BloomForCausalLM", set()),  # slices of products, if a configuration asks for them
        ("T5ForConditionalGeneration", set()),  # asks for the type
    ],
)
def test_models_of_transformers(model, read):
    (row,) = (row for row in ARCHITECTURES if row.name == model)
    built, _ = row.build(1)
    layers = {
        n.rpartition(".")[2]
        for n in names_of(built)
        if isinstance(built.get_submodule(n), (nn.Linear, nn.Conv1d, nn.Conv2d))
    }
    assert layers == read
