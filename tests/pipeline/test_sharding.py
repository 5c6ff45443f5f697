"""FSDP in two processes: compression under its launcher, what is refused, and how compressed models train under it."""

import json
import os
import re
import warnings
from copy import deepcopy
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from support.compressions import build, check_same_model, compress, factorized_layers
from support.processes import in_two_processes, needs_processes
from support.tiny_models import rows
from support.tolerances import BFLOAT16, FLOAT32
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_lossless_lr import ConfigurationError, TargetError, change_storage, verify
from hf_lossless_lr.report import REPORT_NAME

try:
    from transformers import distributed

    DISTRIBUTED_OPTIONS = {field.name for field in fields(distributed.DistributedConfig)}
except ImportError:
    DISTRIBUTED_OPTIONS = set()

fsdp = pytest.importorskip("torch.distributed.fsdp")

BERT = "bert-sequence-classification"
TRAINED = {  # name of the case: model, options
    "two-factor": ("llama", {"storage": "two-factor"}),
    "pivoted": ("gpt2", {"storage": "pivoted"}),
    "rounded, with a rounded table": ("llama", {"formats": ["int8"], "keep_ratio": 0.2, "embeddings": "int8"}),
}
BLOCKS = ("LlamaDecoderLayer", "GPT2Block", "T5Block")
STEP = 0.1


def as_under_fsdp():
    """What `accelerate launch --use_fsdp --fsdp_version 2` makes of processes on GPUs; on CPUs it does not."""
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP")
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True)
    assert accelerator.is_fsdp2
    return accelerator


def share_out(model, only=BLOCKS, **options):
    for module in model.modules():
        if type(module).__name__ in only:
            fsdp.fully_shard(module, **options)
    return fsdp.fully_shard(model, **options)


def whole_batches(name):
    """Eight examples without padding, so that the mean of two means is the mean of all."""
    model, batch = build(name)
    batch = rows(batch, range(8))
    batch |= {"attention_mask": torch.ones_like(batch["input_ids"]), "labels": batch["input_ids"]}
    return model, batch


def trained(model, batch, accelerator=None):
    """One step on the batch, or on the share of it that this process has; the loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=STEP)
    if accelerator is not None:
        model, optimizer = accelerator.prepare(model, optimizer)
        batch = rows(batch, range(accelerator.process_index, 8, 2))
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    return loss.item() if accelerator is None else accelerator.reduce(loss.detach(), "mean").item()


def spread(model):
    return share_out(model)


def in_ddp(model):
    return DistributedDataParallel(model)


def other_weights(model):
    with torch.no_grad():
        next(model.parameters()).add_(torch.distributed.get_rank())
    return model


def without_weights(model):
    if torch.distributed.get_rank():
        model.classifier.weight = nn.Parameter(model.classifier.weight.to("meta"))
    return model


REFUSED = {
    spread: "weights of this .*BertForSequenceClassification are spread over processes, .* before `fully_shard`",
    in_ddp: "this BertForSequenceClassification is wrapped in DistributedDataParallel, .* Pass `model.module`",
    other_weights: "1 of 2 processes have other weights of this BertForSequenceClassification .* same seed",
    without_weights: "1 of 2 processes have other weights .* `--fsdp_cpu_ram_efficient_loading false`",
}


def message(call, *arguments, **options):
    with pytest.raises((TargetError, ConfigurationError)) as caught:
        call(*arguments, **options)
    return str(caught.value)


def check_refusals():
    """Refused in both processes, by all that works on whole models, which are left as they were."""
    for make, words in REFUSED.items():
        model, batch = build(BERT)
        dense, model = deepcopy(model), make(model)
        before = [(p, p.is_meta or p.detach().clone()) for p in model.parameters()]
        for refusal in (message(compress, model, batch), message(verify, model, dense, batch)):
            assert re.search(words, refusal), refusal
        now = list(model.parameters())
        assert all(parameter is other for parameter, (other, _) in zip(now, before, strict=True))
        assert all(parameter.is_meta or torch.equal(parameter, values) for parameter, values in before)
    model, batch = build(BERT)
    rank = torch.distributed.get_rank()
    others = rows(batch, range(len(batch["labels"]) - rank))
    assert "data: not the same in each of the 2 processes" in message(compress, model, others)
    refusal = message(compress, model, batch, keep_ratio=0.5 + 0.1 * rank)
    assert "configuration: not the same in each of the 2 processes" in refusal
    model = share_out(compress(*build(BERT))[0])
    for refusal in (message(change_storage, model, "two-factor"), message(model.dequantize)):
        assert "are spread over processes" in refusal


def train_them(folder):
    for name in TRAINED:
        model, batch = whole_batches(TRAINED[name][0])
        accelerator = as_under_fsdp()  # its plugin knows the blocks of one model
        model = type(model).from_pretrained(folder / name)
        loss = trained(model, batch, accelerator)
        assert [module for module in model.modules() if type(module).__name__.endswith(BLOCKS)]
        assert all(isinstance(m, fsdp.FSDPModule) for m in model.modules() if type(m).__name__.endswith(BLOCKS))
        assert not any(isinstance(layer, fsdp.FSDPModule) for layer in factorized_layers(model).values())
        options = {"is_main_process": accelerator.is_main_process, "save_function": accelerator.save}
        state = accelerator.get_state_dict(model)
        model.save_pretrained(folder / f"{name}, trained", state_dict=state, **options)
        if accelerator.is_main_process:
            (folder / f"{name}.json").write_text(json.dumps(loss))


def check_loss_is_kept(model, batch, only, tolerance, **options):
    """In a copy whose modules of the given kinds are groups of their own; all of it learns."""
    with torch.no_grad():
        expected = model(**batch).loss.item()
    model = share_out(deepcopy(model), only, **options)
    with warnings.catch_warnings():  # of a dense layer that is a group of its own, too
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
        loss = model(**batch).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert loss.item() == pytest.approx(expected, rel=tolerance), only


def check_sharded_while_it_is_loaded(folder, distributed_config):
    for name in ("two-factor", "pivoted"):
        model, batch = build(TRAINED[name][0])
        with torch.no_grad():
            expected = type(model).from_pretrained(folder / name)(**batch).loss.item()
        model = type(model).from_pretrained(folder / name, distributed_config=distributed_config)
        loss = model(**batch).loss
        loss.backward()
        assert loss.item() == pytest.approx(expected, rel=FLOAT32)
        assert all(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def work_in_two_processes(folder: Path, process: int) -> None:
    check_refusals()
    plain, batch = build("llama")
    usual = compress(plain, batch)[1]
    accelerator = as_under_fsdp()
    model, report = compress(build("llama")[0], batch)
    assert report.compressed_fingerprint == usual.compressed_fingerprint
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    assert not any(isinstance(module, fsdp.FSDPModule) for module in model.modules())

    if "fsdp_size" in DISTRIBUTED_OPTIONS:  # newer versions of Transformers
        check_sharded_while_it_is_loaded(folder, distributed.DistributedConfig(fsdp_size=2))
    bert, bert_batch = build(BERT)
    compress(bert, bert_batch)
    for only in (("FactorizedLinear",), ("Linear", "Embedding")):
        check_loss_is_kept(bert, bert_batch, only, FLOAT32)
    t5, t5_batch = build("t5")
    compress(t5, t5_batch, target_modules=["wo"])  # whose guard is asked for the dtype of the weight
    policy = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    check_loss_is_kept(t5, t5_batch, BLOCKS, BFLOAT16, mp_policy=policy)

    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    state = accelerator.get_state_dict(model)
    model.save_pretrained(folder / "untrained", state_dict=state, is_main_process=accelerator.is_main_process)
    train_them(folder)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder in which two processes trained what one process had compressed; all else they check themselves."""
    folder = tmp_path_factory.mktemp("sharded")
    for name, (model_name, options) in TRAINED.items():
        compress(*build(model_name), **options)[0].save_pretrained(folder / name)
    in_two_processes(work_in_two_processes, folder)
    return folder


@needs_processes
class TestFsdp:
    @pytest.mark.parametrize("name", TRAINED)
    def test_a_compressed_model_takes_the_step_of_one_process(self, name, launched):
        model, batch = whole_batches(TRAINED[name][0])
        model = type(model).from_pretrained(launched / name)
        before = deepcopy(model.state_dict())
        loss = trained(model, batch)
        assert json.loads((launched / f"{name}.json").read_text()) == pytest.approx(loss, rel=1e-5)
        model.save_pretrained(launched / f"{name}, in one process")
        folders = (launched / f"{name}, trained", launched / f"{name}, in one process")
        found, expected = (load_file(folder / "model.safetensors") for folder in folders)
        assert found.keys() == expected.keys()
        if "rounded" not in name:  # there, a number between two codes may go to either
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
            assert any(not torch.equal(found[key], before[key]) for key in found)
        loaded = [type(model).from_pretrained(folder).eval() for folder in folders]
        for key, value in loaded[0].state_dict().items():
            torch.testing.assert_close(value, loaded[1].state_dict()[key], rtol=0.05, atol=0.02)

    def test_a_model_that_was_not_trained_keeps_its_report_and_its_weights(self, launched):
        report = json.loads((launched / "untrained" / REPORT_NAME).read_text())
        assert report["compressed_fingerprint"] is not None
        model, batch = build("llama")
        compress(model, batch)
        check_same_model(model, type(model).from_pretrained(launched / "untrained").eval(), batch)
