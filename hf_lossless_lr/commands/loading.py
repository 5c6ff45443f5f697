"""Loading checkpoints: a model whose weights are not exactly those of its files is refused."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigurationError, LosslessLowRankError

_MISFITS = (ValueError, RuntimeError, TypeError, LookupError, AttributeError)  # what Transformers raises on odd files
_SHOWN = 5  # names of tensors in a message
_HEADS = (  # heads that may have tensors of the same names, and answer other questions with them
    *("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice", "ImageClassification"),
    *("NextSentencePrediction", "MaskedLM", "PreTraining"),
)


@dataclass(kw_only=True)
class PrecisionArguments:
    """The precision of what is loaded."""

    dtype: str = field(
        default="float32", metadata={"help": "dtype to work in", "choices": ["float32", "bfloat16", "float16"]}
    )


def load_auto(auto_class: str, name: str, **options: Any) -> Any:
    """Load a tokenizer or processor.

    Args:
        auto_class: name of its Auto class.
        name: hub id or folder.
        options: arguments of `from_pretrained`.

    Returns:
        What was loaded.

    Raises:
        ConfigurationError: if it cannot be loaded, or is a tokenizer without any words.
        LosslessLowRankError: if it is a compressed checkpoint with a mistake in it.
    """
    if name.startswith((".", "~", os.sep)) and not Path(name).exists():
        raise ConfigurationError(f"cannot load {name!r}: there is no such folder.")
    try:
        loaded = getattr(transformers, auto_class).from_pretrained(name, **options)
    except LosslessLowRankError:
        raise
    except (OSError, ImportError, SafetensorError) as error:
        raise ConfigurationError(f"cannot load {name!r} with {auto_class}: {error}") from error
    except _MISFITS as error:  # whose other lines list all that would have been right
        reason, asked = str(error).partition("\n")[0], "" if auto_class == "AutoConfig" else "; does it fit --task?"
        raise ConfigurationError(f"cannot load {name!r} with {auto_class}{asked or ':'} {reason}") from error
    if isinstance(loaded, PreTrainedTokenizerBase) and len(loaded) <= len(loaded.all_special_tokens):
        raise ConfigurationError(  # Transformers makes one of special tokens alone where the files are missing
            f"{name!r} has no tokenizer in it: what was loaded knows {len(loaded)} tokens, and no words. Save the "
            "model's tokenizer beside it."
        )
    return loaded


def load_model(auto_class: str, name: str, dtype: str) -> Any:
    """Load a model, all of whose weights come from its checkpoint, and which is what the checkpoint was trained as.

    Args:
        auto_class: name of its Auto class.
        name: hub id or folder.
        dtype: dtype to load it in.

    Returns:
        The model.

    Raises:
        ConfigurationError: if it cannot be loaded, if Transformers would fill a part of it with random numbers or
            leave a part of the files out, or if the checkpoint is that of another head.
    """
    # Mismatches are let through here, for otherwise Transformers' error does not name them.
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, found = load_auto(auto_class, name, **options)
    lead, kind = f"cannot load {name!r} with {auto_class}", type(model).__name__
    trained = (model.config.architectures or [kind])[0]
    if found["missing_keys"]:
        raise ConfigurationError(
            f"{lead}: the checkpoint, of a {trained}, lacks {_listed(found['missing_keys'])}, which {kind} would fill "
            "with random numbers. Give a model that was trained for this task, or another --task."
        )
    whole = _head(kind) is not None or _head(trained) is None  # else the head is to be left out
    if whole and _head(trained) != _head(kind) and {_head(trained), _head(kind)} & set(_HEADS):
        raise ConfigurationError(
            f"{lead}: it was trained as {trained}, and {kind} would use its head for another question. Choose the "
            "--task of the checkpoint; if its config.json names the wrong class, correct `architectures` there."
        )
    if found["mismatched_keys"]:
        shapes = [f"{key} ({tuple(stored)}, not {tuple(own)})" for key, stored, own in found["mismatched_keys"]]
        raise ConfigurationError(
            f"{lead}: tensors of other shapes than the config.json asks for would be replaced by random numbers: "
            f"{_listed(shapes)}. Is its config.json that of these weights (num_labels, vocab_size)?"
        )
    unused = [key for key in found["unexpected_keys"] if trained != kind or not _is_pooler(key, model)]
    if unused and whole:
        raise ConfigurationError(
            f"{lead}: {kind} has no place for {_listed(unused)}, so the loaded model is another one than the "
            f"checkpoint. If these are not needed, write a checkpoint without them: load this one with {kind} of "
            "Transformers, and call save_pretrained."
        )
    return model


def _head(architecture: str) -> str | None:
    """Return the kind of head in the name of a class, such as `TokenClassification`."""
    found = re.search(r"For([A-Z]\w*)$", architecture)
    return None if found is None else found[1]


def _is_pooler(key: str, model: Any) -> bool:
    """Return whether a tensor is of a pooler that the model does without.

    Checkpoints trained by heads that do not look at the pooled state often keep that of the pretrained model.
    """
    return "pooler" in key.split(".") and not any("pooler" in name.split(".") for name, _ in model.named_modules())


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more
