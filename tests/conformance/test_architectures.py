"""Every architecture of the table goes the whole way: compressed, saved, loaded in every way, generated from, trained.

`make test` takes the few rows that are marked as quick, `make test-conformance` all of them.
"""

import copy
from contextlib import suppress

import pytest
import torch
from support.architecture_page import EXAMPLES, compress, entries_of_page, entry, entry_of_refused, halves
from support.architectures import ARCHITECTURES
from support.compressions import check_same_state, factorized_layers
from support.stock_process import stock_transformers, tensors_of
from support.tolerances import FLOAT32
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lossless_lr import LosslessLowRankConfig
from hf_lossless_lr.errors import LosslessLowRankError
from hf_lossless_lr.layers import stored_in

BLOCKS_OF_PRODUCTS = 10 * FLOAT32  # a dense weight in place of its factors, in all layers one after the other
ROOMS = (0.7, 0.6, 0.5)  # shares of a model that fit beside what goes to disk
LAYER_TYPES = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d)


def pytest_generate_tests(metafunc):
    if "architecture" in metafunc.fixturenames:
        every = metafunc.config.getoption("--every-architecture")
        rows = [row for row in ARCHITECTURES if every or row.quick]
        if metafunc.function is test_architecture_with_rounded_weights:
            rows = [row for row in rows if not row.refused]
        metafunc.parametrize("architecture", rows, ids=lambda row: row.name)


@pytest.fixture(scope="module")
def stock():
    with stock_transformers() as process:
        yield process


@torch.no_grad()
def answers(model, inputs):
    return tensors_of(model(**inputs))


def check_same(mine, others, tolerance=FLOAT32):
    """The same tensors, up to a share of their largest entry; what is infinite (a masked place) is so in both."""
    assert mine
    assert mine.keys() == others.keys()
    for name, value in mine.items():
        finite = torch.isfinite(value)
        assert torch.equal(finite, torch.isfinite(others[name])), name
        value, other = value[finite], others[name].to(value.dtype)[finite]
        error = (value - other).abs().max()
        assert error <= tolerance * value.abs().max(), (name, float(error))


class Saved:
    """A model, its checkpoint, what goes into it and what it answers."""

    def __init__(self, model, batch, folder):
        self.model, self.batch, self.folder = model, batch, folder
        self.inputs = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
        self.expected = answers(model, self.inputs)
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        rooms = ({"cpu": int(share * size), "disk": 10**9} for share in ROOMS)
        self.block, self.maps = None, [{"device_map": "auto", "max_memory": room} for room in rooms]
        model.save_pretrained(folder / "whole")

    def again(self, **options):
        """The model as its checkpoint has it."""
        model, info = type(self.model).from_pretrained(self.folder / "whole", output_loading_info=True, **options)
        assert not any(info.values()), info
        return model.eval()


def check_every_layer_is_smaller_or_has_a_reason(report, layers):
    assert report.keep_ratio <= 0.6
    assert any(layer.rank for layer in report.layers.values())
    assert all(weight.reason for weight in report.skipped.values())
    for name in layers:  # a weight that is computed has the names of what it is computed from
        assert name in report.layers or any(f"{skipped}.".startswith(f"{name}.") for skipped in report.skipped), name


def check_loading(case):
    again = case.again()
    check_same_state(case.model.state_dict(), again.state_dict())
    check_same(case.expected, answers(again, case.inputs))


def check_loading_without_the_head(case):
    body = case.model.base_model
    if body is not case.model:
        again, info = type(body).from_pretrained(case.folder / "whole", output_loading_info=True)
        mine, others = body.state_dict(), again.state_dict()
        assert not info["mismatched_keys"]
        assert set(others) - set(mine) <= set(info["missing_keys"])  # a pooler that this class has and the other not
        assert all(torch.equal(mine[name], others[name]) for name in mine.keys() & others.keys())
        assert factorized_layers(again).keys() == factorized_layers(body).keys()


def check_bfloat16_from_shards(case):
    shards = case.folder / "shards"
    case.model.save_pretrained(shards, max_shard_size="8KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    again = type(case.model).from_pretrained(shards, dtype=torch.bfloat16)
    mine, others = case.model.state_dict(), again.state_dict()
    assert torch.bfloat16 in {value.dtype for value in others.values()}
    assert mine.keys() == others.keys()
    assert all(torch.equal(value.to(others[name].dtype), others[name]) for name, value in mine.items())


def places(model, block, path=""):
    """A device map with one block on disk, and in memory what lies beside the way to it."""
    found, here = {}, model.get_submodule(path)
    for name, _ in [*here.named_parameters(recurse=False), *here.named_buffers(recurse=False), *here.named_children()]:
        name = f"{path}.{name}".strip(".")
        found |= places(model, block, name) if block.startswith(f"{name}.") else {name: "cpu"}
    return found | ({block: "disk"} if block in found else {})


def check_a_block_on_disk(case):
    lists = ((name, module) for name, module in case.model.named_modules() if isinstance(module, nn.ModuleList))
    blocks = (f"{name}.{child}" for name, module in lists for child, _ in module.named_children())
    factorized = (name for name in blocks if factorized_layers(case.model.get_submodule(name)))
    case.block = case.block or next(factorized)
    again = case.again(device_map=places(case.model, case.block), offload_folder=case.folder / "disk")
    assert any(parameter.is_meta for parameter in again.get_submodule(case.block).parameters())
    check_same(case.expected, answers(again, case.inputs))


def check_what_has_room(case):
    """It may split a block, and never a factorized layer."""
    for options in case.maps:
        with suppress(IndexError):  # of Accelerate, where the room ends at a tied head
            again = case.again(**options, offload_folder=case.folder / "disk")
            break
    case.maps = [{"device_map": again.hf_device_map}]
    assert "disk" in again.hf_device_map.values()
    inside = tuple(f"{name}." for name in factorized_layers(again))
    assert not [place for place in again.hf_device_map if place.startswith(inside)]
    check_same(case.expected, answers(again, case.inputs))


def check_generating(case):
    if case.model.can_generate():
        prompt = {name: value[:2].clone() for name, value in case.inputs.items() if "label" not in name}
        options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        mine, others = (model.generate(**prompt, **options) for model in (case.model, case.again()))
        assert mine.shape[1] >= 3
        assert torch.equal(mine, others)


def check_copying(case):
    check_same(case.expected, answers(copy.deepcopy(case.model), case.inputs))


def check_training(case):
    again = case.again().train()
    factors = {name: (m.down.weight, m.up.weight) for name, m in factorized_layers(again).items()}
    before = {name: [factor.detach().clone() for factor in both] for name, both in factors.items()}
    optimizer = torch.optim.Adam(again.parameters(), eps=1e-30)  # each gradient, however small, is a step
    outputs = again(**halves(case.batch)[0])
    (outputs[0].pow(3).sum() if getattr(outputs, "loss", None) is None else outputs.loss.mean()).backward()
    optimizer.step()
    same = [name for name in factors if any(map(torch.equal, factors[name], before[name]))]
    experts = [name for name in same if ".experts." in name]
    idle = [
        name for name in experts if not any(factor.grad.any() for factor in factors[name])
    ]  # they were sent no row
    assert same == idle
    assert len(idle) < len(factors)


CHECKS = {
    "loading": check_loading,
    "loading without the head": check_loading_without_the_head,
    "bfloat16 from shards": check_bfloat16_from_shards,
    "a block on disk": check_a_block_on_disk,
    "what has room": check_what_has_room,
    "generating": check_generating,
    "copying": check_copying,
    "training": check_training,
}


def check_dequantizing(case, stock):
    model = copy.deepcopy(case.model).dequantize()
    assert not factorized_layers(model)
    model.save_pretrained(case.folder / "dense")
    found = stock.answers(case.folder / "dense", type(model).__name__, case.inputs)
    check_same(case.expected, found, BLOCKS_OF_PRODUCTS)


def check_fails(check, case, text):
    with pytest.raises(Exception, match=text):
        check(case)


@pytest.mark.filterwarnings(
    "ignore:Current model requires .* bytes of buffer:UserWarning",
    "ignore:Support for mismatched key_padding_mask:UserWarning",
    "ignore:The following device_map keys do not match any submodules:UserWarning",  # but they do match parameters
)
def test_architecture(architecture, tmp_path, stock):
    model, batch = architecture.build(EXAMPLES)
    layers = [name for name, module in model.named_modules() if isinstance(module, LAYER_TYPES)]
    dense, row = copy.deepcopy(model), next(row for row in entries_of_page() if row.name == architecture.name)
    if architecture.refused:
        with pytest.raises(LosslessLowRankError, match=architecture.refused) as refusal:
            compress(architecture, model, batch)
        assert entry_of_refused(architecture, refusal.value) == row
        check_same_state(model.state_dict(), dense.state_dict())
        return
    report = compress(architecture, model, batch)
    assert entry(architecture, report) == row
    check_every_layer_is_smaller_or_has_a_reason(report, layers)
    case = Saved(model, batch, tmp_path)
    for name, check in CHECKS.items():
        if name in architecture.cannot:  # nor can the dense model, with the same modules on disk
            check_fails(check, case, architecture.cannot[name])
            as_it_was = Saved(dense, batch, tmp_path / "as it was")
            as_it_was.block, as_it_was.maps = case.block, case.maps
            check_fails(check, as_it_was, architecture.cannot[name])
        else:
            check(case)
    check_dequantizing(case, stock)


@pytest.mark.filterwarnings(
    "ignore:You passed `quantization_config` or equivalent:UserWarning",
    "ignore:Support for mismatched key_padding_mask:UserWarning",
)
def test_architecture_with_rounded_weights(architecture, tmp_path):
    """Factors, layers that stay dense, and embeddings are stored as codes."""
    model, batch = architecture.build(EXAMPLES)
    compress(architecture, model, batch, keep_ratio=0.2, size="bytes", formats=["int8"], embeddings="int8")
    inputs = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    expected = answers(model, inputs)
    model.save_pretrained(tmp_path / "whole")
    for options in ({}, {"quantization_config": LosslessLowRankConfig(compute="stored")}):
        again, info = type(model).from_pretrained(tmp_path / "whole", output_loading_info=True, **options)
        assert not any(info.values()), info
        assert bool(stored_in(again)) == bool(options)
        check_same(expected, answers(again.eval(), inputs))
        again.save_pretrained(tmp_path / "again")
        for file in (tmp_path / "whole").glob("*.safetensors"):
            assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_the_page_has_the_rows_of_the_suite():
    assert [(row.name, row.family) for row in entries_of_page()] == [(row.name, row.family) for row in ARCHITECTURES]
    assert len(ARCHITECTURES) >= 70
    assert {row.family for row in ARCHITECTURES if row.quick} == {row.family for row in ARCHITECTURES}
