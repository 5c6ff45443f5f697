"""The calibration statistics the slow way: one example at a time, without padding, in double precision."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_lossless_lr.data.curvature import random_signs, sign_seeds
from hf_lossless_lr.layers.patches import sampled
from support.tiny_models import IGNORED, Batch, rows

ROUNDS_TO_FLOAT32 = ("llama", "mixtral", "t5", "t5-equal-lengths")  # in norms, positions or softmax, also in float64
SHIFTED = ("LlamaForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM", "JetMoeForCausalLM")


class Oracle(NamedTuple):
    """`G`, `A`, `B` and the number of input rows of each layer, and the mean loss."""

    weight_grad: dict[str, torch.Tensor]
    input_covariance: dict[str, torch.Tensor]
    grad_covariance: dict[str, torch.Tensor]
    tokens: dict[str, int]
    loss: float
    units: int


def unpadded_examples(model: PreTrainedModel, batch: Batch) -> list[Batch]:
    """Each example as a batch of its own, without a mask, cut to its length (and to the length of its targets)."""
    examples = []
    for index in range(len(batch["labels"])):
        example = rows(batch, slice(index, index + 1))
        mask = example.pop("attention_mask", None)
        if mask is not None:
            real = mask[0].bool()
            for name in {"input_ids", "input_values"} & set(example):
                example[name] = example[name][:, real]
            if model.config.is_encoder_decoder:
                real = example["labels"][0] != IGNORED
            if example["labels"].shape == real[None].shape:
                example["labels"] = example["labels"][:, real]
        examples.append(example)
    return examples


def count_units(model: PreTrainedModel, labels: torch.Tensor) -> int:
    if labels.ndim == 1 or labels.is_floating_point() or type(model).__name__.endswith("CTC"):
        return len(labels)
    if type(model).__name__ in SHIFTED:
        labels = labels[:, 1:]
    return sum(int(label) != IGNORED for label in labels.flatten())


def curvature(model: PreTrainedModel, example: Batch, outputs, summed_loss: torch.Tensor) -> torch.Tensor:
    """What has gradients of the second moment of the Gauss-Newton matrix: scores, by their likelihood and a sign."""
    labels, logits = example["labels"], outputs.logits
    if type(model).__name__.endswith("CTC") or model.config.model_type == "vilt":  # a sum of binary cross-entropies
        return summed_loss
    (seed,) = sign_seeds(example, model)
    if labels.is_floating_point():
        return (random_signs(logits[0].shape, seed) * (2 / logits[0].numel()) ** 0.5 * logits[0]).sum()
    shift = int(type(model).__name__ in SHIFTED)
    if labels.ndim > 1:
        logits, labels = logits[:, : logits.shape[1] - shift], labels[:, shift:]
    logs = logits[labels != IGNORED].log_softmax(-1)
    signs = random_signs(logs.shape, seed)
    if logs.shape[-1] == 2:
        return (signs[:, 0] * logs.detach().exp().prod(-1).sqrt() * (logs[:, 0] - logs[:, 1])).sum()
    return (signs * logs.detach().exp().sqrt() * logs).sum()


def matrix(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    return weight.T if isinstance(module, Conv1D) else weight.reshape(len(weight), -1)


def input_rows(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if isinstance(module, nn.Conv2d):  # windows cut out by hand: (n, channels, rows, columns, kh, kw)
        (top, left), (kh, kw), (dy, dx) = module.padding, module.kernel_size, module.stride
        windows = F.pad(x, (left, left, top, top)).unfold(2, kh, dy).unfold(3, kw, dx)
        x = windows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        positions = sampled(x.shape[1])  # any choice of them would do, but there is one
        x = x if positions is None else x[:, positions]
    if isinstance(module, nn.Conv1d):
        windows = F.pad(x, (module.padding[0],) * 2).unfold(2, module.kernel_size[0], module.stride[0])
        x = windows.transpose(1, 2).flatten(2)
        positions = sampled(x.shape[1])
        x = x if positions is None else x[:, positions]
    return x.reshape(-1, x.shape[-1])


def output_rows(module: nn.Module, y: torch.Tensor) -> torch.Tensor:
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        y = y.movedim(1, -1)
    return y.reshape(-1, y.shape[-1])


def double_rows(rows: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None = None) -> torch.Tensor:
    """What the package's `real_rows` returns, without its rounding to float32."""
    assert mask is None or positions is None  # no model of these tests has both
    rows = rows.flatten(0, -3)
    return (rows if mask is None else rows[mask]).double().movedim(-2, 0)


def slow_statistics(model: PreTrainedModel, names: list[str], examples: list[Batch]) -> Oracle:
    """Sum over examples, rows and labelled units, then divide; `model` is in double precision and evaluation mode."""
    modules = {name: model.get_submodule(name) for name in names}
    calls: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def watch(name):
        def hook(module, args, output):
            own = output * 1.0  # the model may go on to write into what it gets
            gradient = torch.zeros_like(own)  # stays so where nothing uses the output
            own.register_hook(gradient.copy_)
            calls.append((name, args[0].detach().clone(), gradient))
            return own

        return hook

    gradients = dict.fromkeys(names, 0.0)
    inputs = dict.fromkeys(names, 0.0)
    outputs = dict.fromkeys(names, 0.0)
    tokens = dict.fromkeys(names, 0)
    loss_sum, units = 0.0, 0
    handles = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    for example in examples:
        calls.clear()
        model.zero_grad()
        count = count_units(model, example["labels"])
        answers = model(**example)
        loss = answers.loss * count  # the sum over the example's labelled units
        loss.backward(retain_graph=True)
        loss_sum, units = loss_sum + loss.item(), units + count
        for name, module in modules.items():
            if module.weight.grad is not None:
                gradients[name] += matrix(module, module.weight.grad)
        curvature(model, example, answers, loss).backward()
        for name, x, gradient in calls:
            x, g = input_rows(modules[name], x), output_rows(modules[name], gradient)
            inputs[name] += torch.einsum("ti,tj->ij", x, x)
            outputs[name] += torch.einsum("ti,tj->ij", g, g)
            tokens[name] += len(x)
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return Oracle(
        {name: total / units for name, total in gradients.items()},
        {name: total / tokens[name] for name, total in inputs.items()},
        {name: total / units for name, total in outputs.items()},
        tokens,
        loss_sum / units,
        units,
    )
