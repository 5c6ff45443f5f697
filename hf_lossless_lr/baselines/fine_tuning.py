"""Fine-tuning of a compressed copy of a model on labelled data, and plain SVD with it: what the field does after all.

The copy is trained by Transformers' `Trainer`; the model that it is a copy of is not touched. What comes back are the
layers that were trained: those in the place of the targets, and all others without submodules (embeddings, norms,
heads). Parameters that hang on a module with submodules, such as the class token of a ViT, stay as they are.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..data import ready_batches
from ..errors import ConfigurationError, NumericalError, TargetError
from ..layers import random_state_kept, replace_modules, weight_matrices
from ..processes import joined_processes
from .truncation import rank_of_share, truncated


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune: AdamW without weight decay, a rate that rises and then falls linearly, gradients clipped at 1.

    Texts of about one length come together, as that is faster.

    Attributes:
        learning_rate: the highest rate.
        epochs: passes over the data.
        batch_size: examples a step, on each process; ready-made batches are taken as they are.
        warmup: share of the steps in which the rate rises.
        seed: seed of the order of the examples and of dropout.
    """

    learning_rate: float = 3e-5
    epochs: float = 2.0
    batch_size: int = 16
    warmup: float = 0.1
    seed: int = 0


def svd_fine_tuned(
    targets: Mapping[str, nn.Module],
    keep_ratio: float,
    *,
    model: PreTrainedModel,
    data: DataLoader,
    recipe: Recipe | None = None,
) -> dict[str, nn.Module]:
    """Truncate the SVD of each layer to the same share of its parameters, and fine-tune the model on labelled data.

    Args:
        targets: dense layers of the model by name; unchanged.
        keep_ratio: parameters kept divided by original ones, in (0, 1].
        model: the model, which is not changed.
        data: labelled examples, from `make_dataloader`.
        recipe: how to fine-tune; default: that of `Recipe`.

    Returns:
        What takes the place of the targets, and of other layers that were trained, by name.

    Raises:
        ConfigurationError: if a layer is larger than its share even at rank 1.
        NumericalError: if the fine-tuning diverges.
        TargetError: if the weights of the model lie on several devices.
    """
    ranks = equal_shares(targets, keep_ratio)
    copy = trainable_copy(model)
    replace_modules(copy, {name: truncated(copy.get_submodule(name), rank) for name, rank in ranks.items()})
    train(copy, data, recipe or Recipe())
    return trained_layers(model, copy, targets)


def equal_shares(targets: Mapping[str, nn.Module], keep_ratio: float) -> dict[str, int]:
    """Return the rank at which each layer has a share of its parameters.

    Args:
        targets: dense layers by name.
        keep_ratio: the share.

    Raises:
        ConfigurationError: if a layer is larger than its share even at rank 1.
    """
    ranks: dict[str, int] = {}
    for name, layer in targets.items():
        try:
            ranks[name] = rank_of_share(layer, int(keep_ratio * weight_matrices(layer).numel()))
        except ConfigurationError as error:
            raise ConfigurationError(f"keep_ratio={keep_ratio} cannot be reached in {name!r}: {error}") from error
    return ranks


def trainable_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy in float32 of which everything is trained that `trained_layers` gives back.

    Args:
        model: the model.

    Raises:
        TargetError: if its weights lie on several devices, or are offloaded.
    """
    devices = {*(getattr(model, "hf_device_map", None) or {}).values()}
    if len(devices) > 1 or any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise TargetError(
            f"the weights of this {type(model).__name__} lie on several devices, or are offloaded, and it cannot be "
            "fine-tuned there. Load it without a device_map, or leave out the methods that fine-tune."
        )
    copy: Any = deepcopy(model).float()
    for module in copy.modules():
        for parameter in module.parameters(recurse=False):
            parameter.grad = None
            parameter.requires_grad_(not any(module.children()))
    return copy


def trained_layers(
    model: PreTrainedModel, copy: PreTrainedModel, targets: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """Return the layers of a trained copy that take the places of those of the model, in the dtypes of these.

    Args:
        model: the model.
        copy: its trained copy.
        targets: the layers of the model that others are in the place of, by name.

    Returns:
        The layers by name, frozen.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        dtype = next((each.dtype for each in module.state_dict().values() if each.is_floating_point()), None)
        if name in targets or (dtype is not None and not any(module.children())):
            found[name] = copy.get_submodule(name).to(dtype).requires_grad_(False)
    return found


def train(
    copy: PreTrainedModel,
    data: DataLoader,
    recipe: Recipe,
    callbacks: Sequence[TrainerCallback] = (),
    trainer: Callable[..., Trainer] = Trainer,
) -> None:
    """Train a model in place, leaving nothing behind: no files, no output, and the random numbers as they were.

    Args:
        copy: the model.
        data: labelled examples, from `make_dataloader`.
        recipe: how to train.
        callbacks: what happens at each step.
        trainer: the trainer, which has the loss.

    Raises:
        NumericalError: if a parameter is not finite in the end.
    """
    device = joined_processes().device
    with generators_kept(device), torch.enable_grad(), tempfile.TemporaryDirectory(prefix="hf-lossless-lr-") as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            learning_rate=recipe.learning_rate,
            num_train_epochs=recipe.epochs,
            per_device_train_batch_size=1 if ready_batches(data) else recipe.batch_size,
            train_sampling_strategy="group_by_length" if _has_lengths(data) else "random",
            warmup_steps=recipe.warmup,
            seed=recipe.seed,
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=device.type == "cuda",
            accelerator_config={"use_configured_state": True},
            remove_unused_columns=False,
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
        )
        run = trainer(
            copy, arguments, data_collator=data.collate_fn, train_dataset=data.dataset, callbacks=[*callbacks]
        )
        run.remove_callback(PrinterCallback)
        run.train()
    diverged = next((name for name, parameter in copy.named_parameters() if not parameter.isfinite().all()), None)
    if diverged is not None:
        raise NumericalError(f"fine-tuning diverged: {diverged} is not finite. Take a lower learning rate.")


def _has_lengths(data: DataLoader) -> bool:
    """Whether the examples are texts, of which batches of one length are faster."""
    example: Any = data.dataset[0]
    return not ready_batches(data) and isinstance(example, Mapping) and "input_ids" in example


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Let the body seed the global generators of Python, NumPy and torch, which are afterwards as they were."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with random_state_kept(device):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
