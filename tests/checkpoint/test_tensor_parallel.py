"""Compressed checkpoints, split over two processes while they are loaded, answer and learn as in one."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.compressions import compress
from support.mixtures import mixture
from support.processes import in_two_processes, needs_processes
from support.tiny_models import VOCABULARY, build, llama, text_inputs
from transformers import AutoModelForCausalLM

from hf_lossless_lr.checkpoint.parallel import LOADED_IN_ONE, RULE, adapt_plan, logger
from hf_lossless_lr.errors import CheckpointError, TargetError
from hf_lossless_lr.layers import is_factorized

pytest.importorskip("transformers.distributed.tensor_parallel")
distributed = pytest.importorskip("transformers.distributed")

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
EXPECTED = "expected.safetensors"
FEWER = ["channel", "dimensions"]
CASES = {  # model to options
    "two-factor": ("llama", {"storage": "two-factor"}),
    "pivoted": ("llama", {"storage": "pivoted"}),
    "beside dense layers of the same names": ("llama", {"storage": "two-factor", "ignore": ["re:.*layers.1.*"]}),
    "rounded": ("llama", {"formats": ["int8"], "keep_ratio": 0.2, "embeddings": "int8"}),
    "rounded or not": ("llama", {"formats": "auto", "keep_ratio": 0.3}),
    "with biases": ("qwen2", {"storage": "two-factor"}),
    "pivoted with biases": ("qwen2", {"storage": "pivoted"}),
    "experts": ("mixtral", {"storage": "two-factor"}),
    "packed": ("phi3", {"storage": "two-factor"}),
    "packed and pivoted": ("phi3", {"storage": "pivoted"}),
    "fewer dimensions": ("llama", {"storage": "two-factor", "forms": FEWER, "keep_ratio": 0.4}),
    "fewer dimensions with biases": ("qwen2", {"forms": FEWER, "keep_ratio": 0.4}),
}


def model_of(name):
    if name == "llama":
        return llama(12)
    if name == "mixtral":
        return mixture("Mixtral"), llama(12)[1]
    kind = {"qwen2": "Qwen2", "phi3": "Phi3"}[name]
    return build(f"{kind}ForCausalLM", f"{kind}Config", **SIZES, pad_token_id=0), llama(12)[1]


def outcomes(model):
    """The logits, and the gradient of each parameter."""
    batch = text_inputs() | {"labels": text_inputs()["input_ids"]}
    with torch.no_grad():
        tensors = {"logits": model(**batch).logits}
    model.train()
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            tensors[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def answer_in_two_processes(folder: Path, process: int) -> None:
    for case in sorted(path for path in folder.iterdir() if path.is_dir()):
        config = distributed.DistributedConfig(tp_size=2)
        model = AutoModelForCausalLM.from_pretrained(case, distributed_config=config).eval()
        assert not [name for name, module in model.named_modules() if RULE in vars(module)]
        assert not [style for style in model.tp_plan.values() if "lossless" in style]
        found, expected = outcomes(model), load_file(case / EXPECTED)
        torch.testing.assert_close(found, {name: expected[name] for name in found}, rtol=1e-3, atol=1e-4)
        with pytest.raises(TargetError, match="are spread over processes, by FSDP or by tensor parallelism"):
            model.dequantize()
        for name, module in model.named_modules():
            split = [part for part, parameter in module.named_parameters() if hasattr(parameter, "full_tensor")]
            if is_factorized(module) and ".experts." not in name and not name.endswith(".inner"):
                factors = [part for part in split if part != "bias"]
                assert len(factors) == (1 if module.storage == "two-factor" else 0), (case, name, split)


@needs_processes
def test_a_model_split_over_two_processes_answers_and_learns_as_in_one(tmp_path):
    for case, (name, options) in CASES.items():
        model, batch = model_of(name)
        model, _ = compress(model, batch, **{"keep_ratio": 0.5} | options)
        model.save_pretrained(tmp_path / case)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / case).eval()
        save_file(outcomes(model), tmp_path / case / EXPECTED)
    in_two_processes(answer_in_two_processes, tmp_path)


def test_factorized_experts_are_not_spread_over_devices(tmp_path):
    model, _ = compress(*model_of("mixtral"), keep_ratio=0.5)
    model.config.distributed_config = SimpleNamespace(ep_size=2)
    with pytest.raises(CheckpointError, match=r"not spread over devices \(ep_size\)"):
        adapt_plan(model, model.ep_plan)


@pytest.mark.parametrize("in_one", ["true", "false"])
def test_who_launches_for_fsdp_hears_what_accelerate_cannot_load(in_one, monkeypatch, caplog):
    for name, value in (LOADED_IN_ONE | {"FSDP_CPU_RAM_EFFICIENT_LOADING": in_one}).items():
        monkeypatch.setenv(name, value)
    logger.warning_once.cache_clear()
    compress(*llama(12))
    assert ("Launch with `--fsdp_cpu_ram_efficient_loading false`" in caplog.text) == (in_one == "true")
