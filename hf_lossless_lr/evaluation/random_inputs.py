"""Random inputs, for measurements that need no data."""

from __future__ import annotations

import inspect
import sys

import torch
from transformers import PreTrainedModel

from ..errors import DataError
from ..layers import evaluating
from .positions import most_tokens

TEXT_LENGTH, PICTURE_SIDE, SOUND_LENGTH = 128, 224, 16000  # tokens, pixels, samples
FIRST_TOKEN = 5  # lower ids are often special ones
CHOICES = 2  # of each example of a multiple-choice model


def random_batch(model: PreTrainedModel, examples: int, size: int | None = None) -> dict[str, torch.Tensor]:
    """Return a batch of random words, pictures, films or sounds that a model takes, on its device and in its dtype.

    Args:
        model: the model. It is called once, to see that it takes them.
        examples: number of examples.
        size: tokens of a text, pixels of a side of a picture, samples of a sound; default 128 or what the model
            takes, what it was made for (224 where its configuration does not say), or 16,000. Spectrograms are of the
            size that the model was made for.

    Returns:
        Keyword arguments of its forward, without labels.

    Raises:
        DataError: if the model takes something else, or the size is longer than it can take.
    """
    config, name = model.config, model.main_input_name
    taken = inspect.signature(model.forward).parameters
    pairs = hasattr(model, "get_text_features") and hasattr(model, "get_image_features")  # as CLIP
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # not those of other devices, which are not put back
        if name == "input_ids" and getattr(config.get_text_config(), "vocab_size", None) is not None:
            batch = _text(model, examples, size)
            if pairs or ("pixel_values" in taken and hasattr(config, "image_size")):  # the latter as ViLT
                batch["pixel_values"] = _pictures(model, examples)
        elif name == "pixel_values":
            batch = {name: _pictures(model, examples, size)}
            if "input_ids" in taken:  # as BLIP
                batch |= _text(model, examples)
        elif name in ("input_values", "input_features"):
            batch = {name: _sound(model, examples, size)}
        else:
            raise DataError(
                f"{type(model).__name__} takes {name!r}, for which there is no random input; give a batch of yours."
            )
    if config.is_encoder_decoder and "decoder_input_ids" in taken:
        start = torch.full((examples, 1), getattr(config, "decoder_start_token_id", None) or 0, device=model.device)
        batch["decoder_input_ids"] = batch.get("input_ids", start)
    _check_taken(model, batch)
    return batch


def _text(model: PreTrainedModel, examples: int, size: int | None = None) -> dict[str, torch.Tensor]:
    config = model.config.get_text_config()
    most = most_tokens(model) or sys.maxsize
    length = size or min(TEXT_LENGTH, most)
    if most < length:
        raise DataError(f"{type(model).__name__} takes at most {most} tokens, not {length}.")
    words = torch.randint(min(FIRST_TOKEN, config.vocab_size - 1), config.vocab_size, (examples, length))
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < config.vocab_size:
        words = words.where(words != end, max(end - 1, 0))
        words[:, -1] = end  # where classifiers of BART and T5 read
    if type(model).__name__.endswith("ForMultipleChoice"):
        words = words[:, None].repeat(1, CHOICES, 1)
    words = words.to(model.device)
    return {"input_ids": words, "attention_mask": torch.ones_like(words)}


def _pictures(model: PreTrainedModel, examples: int, size: int | None = None) -> torch.Tensor:
    vision = getattr(model.config, "vision_config", model.config)
    side = size or getattr(vision, "image_size", None) or PICTURE_SIDE
    height, width = (side, side) if isinstance(side, int) else side
    frames = getattr(vision, "num_frames", None)  # of a film
    shape = examples, *([frames] if frames else []), getattr(vision, "num_channels", 3), height, width
    return torch.randn(shape).to(model.device, model.dtype)


def _sound(model: PreTrainedModel, examples: int, size: int | None = None) -> torch.Tensor:
    """Return samples, or a spectrogram: of frames × bands, as the audio spectrogram transformer's, or the reverse."""
    config = model.config
    bands = getattr(config, "num_mel_bins", None)
    if model.main_input_name == "input_values":
        frames = getattr(config, "max_length", None)
        shape = (frames, bands) if bands and frames else (size or SOUND_LENGTH,)
    else:
        frames = getattr(config, "max_source_positions", None) or TEXT_LENGTH
        shape = (bands, 2 * frames) if bands else (frames, getattr(config, "input_feat_per_channel", 80))
    return torch.randn(examples, *shape).to(model.device, model.dtype)


def _check_taken(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> None:
    try:
        with evaluating(model), torch.no_grad():
            model(**batch)
    except Exception as error:  # whatever a model raises
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in batch.items())
        raise DataError(
            f"{type(model).__name__} does not take random inputs, {shapes}; give a batch of yours. It raises "
            f"{type(error).__name__}: {error}"
        ) from error
