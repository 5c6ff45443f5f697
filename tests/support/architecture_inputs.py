"""Labelled batches for tiny models of any architecture, one function for each kind of input.

Each takes the model, a number of examples and a seed, and reads sizes from the model's configuration.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from support.tiny_models import IGNORED, Batch, class_labels, generator, pixels, text_inputs

LENGTH = 8
TARGET_LENGTH = 6
CHOICES = 2
SAMPLES = 80  # of a sound
FRAMES = 16  # of a spectrogram
IMAGE_WORD = 60  # stands for one patch of a picture

Inputs = Callable[[PreTrainedModel, int, int], Batch]


def _text(model: PreTrainedModel, count: int, seed: int, longest: int = LENGTH) -> Batch:
    pad = model.config.get_text_config().pad_token_id
    return text_inputs(count, longest, seed, 0 if pad is None else pad)


def text(model: PreTrainedModel, count: int, seed: int) -> Batch:
    return _text(model, count, seed)


def _drawn(high: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=generator(seed + 2000))


def _on_words(batch: Batch, labels: torch.Tensor) -> torch.Tensor:
    return torch.where(batch["attention_mask"].bool(), labels, IGNORED)


def text_and_class(model: PreTrainedModel, count: int, seed: int) -> Batch:
    return _text(model, count, seed) | class_labels(count, model.config.num_labels, seed)


def text_with_end_and_class(model: PreTrainedModel, count: int, seed: int) -> Batch:
    """A text as BART takes it: its last word is the one for the end."""
    batch = text_and_class(model, count, seed)
    batch["input_ids"][torch.arange(count), batch["attention_mask"].sum(1) - 1] = model.config.eos_token_id
    return batch


def text_and_tags(model: PreTrainedModel, count: int, seed: int) -> Batch:
    batch = _text(model, count, seed)
    return batch | {"labels": _on_words(batch, _drawn(model.config.num_labels, (count, LENGTH), seed))}


def text_and_span(model: PreTrainedModel, count: int, seed: int) -> Batch:
    places = _drawn(3, (count,), seed)
    return _text(model, count, seed) | {"start_positions": places, "end_positions": places.clamp_min(1)}


def text_and_choice(model: PreTrainedModel, count: int, seed: int) -> Batch:
    batch = {name: value.view(count, CHOICES, LENGTH) for name, value in _text(model, count * CHOICES, seed).items()}
    return batch | class_labels(count, CHOICES, seed)


def text_and_itself(model: PreTrainedModel, count: int, seed: int) -> Batch:
    batch = _text(model, count, seed)
    return batch | {"labels": _on_words(batch, batch["input_ids"])}


def text_and_replaced(model: PreTrainedModel, count: int, seed: int) -> Batch:
    """Of each word, whether it was replaced."""
    batch = _text(model, count, seed)
    return batch | {"labels": _on_words(batch, _drawn(2, (count, LENGTH), seed))}


def text_and_following(model: PreTrainedModel, count: int, seed: int) -> Batch:
    """Two sentences: does the second follow the first?"""
    return _text(model, count, seed) | class_labels(count, 2, seed)


def text_and_pretraining(model: PreTrainedModel, count: int, seed: int) -> Batch:
    batch = text_and_itself(model, count, seed)
    other = "sentence_order_label" if "Albert" in type(model).__name__ else "next_sentence_label"
    return batch | {other: _drawn(2, (count,), seed)}


def text_and_text(model: PreTrainedModel, count: int, seed: int) -> Batch:
    target = _text(model, count, seed + 500, TARGET_LENGTH)
    return _text(model, count, seed) | {"labels": _on_words(target, target["input_ids"])}


def picture(model: PreTrainedModel, count: int, seed: int) -> Batch:
    config = model.config
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or 32
    return pixels(count, getattr(vision, "num_channels", 3), size if isinstance(size, int) else size[0], seed)


def picture_and_class(model: PreTrainedModel, count: int, seed: int) -> Batch:
    return picture(model, count, seed) | class_labels(count, model.config.num_labels, seed)


def video_and_class(model: PreTrainedModel, count: int, seed: int) -> Batch:
    config = model.config
    shape = (count, config.num_frames, config.num_channels, config.image_size, config.image_size)
    return {"pixel_values": torch.randn(shape, generator=generator(seed))} | class_labels(
        count, config.num_labels, seed
    )


def picture_and_masks(model: PreTrainedModel, count: int, seed: int) -> Batch:
    """Two masks for each picture."""
    pictures = pixels(count, 3, 32, seed)
    masks = (torch.rand(count, 2, 32, 32, generator=generator(seed)) > 0.5).float()
    classes = [torch.tensor([0, 1]) for _ in range(count)]
    return pictures | {"mask_labels": list(masks), "class_labels": classes}


def picture_and_segments(model: PreTrainedModel, count: int, seed: int) -> Batch:
    batch = picture(model, count, seed)
    shape = (count, *batch["pixel_values"].shape[-2:])
    return batch | {"labels": _drawn(model.config.num_labels, shape, seed)}


def picture_and_depth(model: PreTrainedModel, count: int, seed: int) -> Batch:
    batch = picture(model, count, seed)
    shape = (count, *batch["pixel_values"].shape[-2:])
    return batch | {"labels": 1 + torch.rand(shape, generator=generator(seed))}


def picture_and_boxes(model: PreTrainedModel, count: int, seed: int) -> Batch:
    """One thing in each picture: a class and a box."""
    boxes = 0.2 + 0.3 * torch.rand(count, 1, 4, generator=generator(seed))
    labels = [{"class_labels": torch.tensor([place % 2]), "boxes": box} for place, box in enumerate(boxes)]
    return picture(model, count, seed) | {"labels": labels}


def sound_and_class(model: PreTrainedModel, count: int, seed: int) -> Batch:
    return _sound(count, seed) | class_labels(count, model.config.num_labels, seed)


def sound_and_letters(model: PreTrainedModel, count: int, seed: int) -> Batch:
    return _sound(count, seed) | {"labels": torch.tensor([[5, 6]]).repeat(count, 1)}


def sound_and_frames(model: PreTrainedModel, count: int, seed: int) -> Batch:
    frames = int(model._get_feat_extract_output_lengths(torch.tensor(SAMPLES)))
    tags = _drawn(model.config.num_labels, (count, frames), seed)
    return _sound(count, seed) | {"labels": F.one_hot(tags, model.config.num_labels)}


def _sound(count: int, seed: int) -> Batch:
    values = torch.randn(count, SAMPLES, generator=generator(seed))
    return {"input_values": values, "attention_mask": torch.ones(count, SAMPLES, dtype=torch.long)}


def frames_and_text(model: PreTrainedModel, count: int, seed: int) -> Batch:
    """Time by frequency."""
    features = torch.randn(count, FRAMES, model.config.input_feat_per_channel, generator=generator(seed))
    target = _text(model, count, seed + 500, TARGET_LENGTH)
    return {"input_features": features, "labels": _on_words(target, target["input_ids"])}


def spectrogram(model: PreTrainedModel, count: int, seed: int) -> Batch:
    return {"input_features": torch.randn(count, model.config.num_mel_bins, FRAMES, generator=generator(seed))}


def spectrogram_and_text(model: PreTrainedModel, count: int, seed: int) -> Batch:
    target = _text(model, count, seed + 500, TARGET_LENGTH)
    return spectrogram(model, count, seed) | {"labels": _on_words(target, target["input_ids"])}


def spectrogram_and_class(model: PreTrainedModel, count: int, seed: int) -> Batch:
    return spectrogram(model, count, seed) | class_labels(count, model.config.num_labels, seed)


def frames_and_class(model: PreTrainedModel, count: int, seed: int) -> Batch:
    """A spectrogram as a picture: time by frequency."""
    shape = (count, model.config.max_length, model.config.num_mel_bins)
    values = torch.randn(shape, generator=generator(seed))
    return {"input_values": values} | class_labels(count, model.config.num_labels, seed)


def picture_and_its_text(model: PreTrainedModel, count: int, seed: int) -> Batch:
    """Pairs whose loss is that of finding each other."""
    return picture(model, count, seed) | _text(model, count, seed) | {"return_loss": True}


def picture_and_caption(model: PreTrainedModel, count: int, seed: int) -> Batch:
    return picture(model, count, seed) | text_and_itself(model, count, seed)


def picture_and_answer(model: PreTrainedModel, count: int, seed: int) -> Batch:
    """A question about a picture, with one of some answers."""
    classes = model.config.num_labels
    labels = F.one_hot(_drawn(classes, (count,), seed), classes).float()
    return picture(model, count, seed) | _text(model, count, seed) | {"labels": labels}


def patches_and_text(model: PreTrainedModel, count: int, seed: int) -> Batch:
    """A row of words that begins with one for each patch of the picture."""
    patches = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
    batch = picture(model, count, seed) | _text(model, count, seed)
    front = torch.full((count, patches), IMAGE_WORD)
    words = batch["input_ids"].clamp_max(IMAGE_WORD - 1)
    batch["input_ids"] = torch.cat([front, words], 1)
    batch["attention_mask"] = torch.cat([torch.ones_like(front), batch["attention_mask"]], 1)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    return batch | {"labels": labels.masked_fill(labels == IMAGE_WORD, IGNORED)}


def series(model: PreTrainedModel, count: int, seed: int) -> Batch:
    shape = (count, model.config.context_length, model.config.num_input_channels)
    return {"past_values": torch.randn(shape, generator=generator(seed))}


def series_and_future(model: PreTrainedModel, count: int, seed: int) -> Batch:
    shape = (count, model.config.prediction_length, model.config.num_input_channels)
    return series(model, count, seed) | {"future_values": torch.randn(shape, generator=generator(seed + 2000))}


def series_and_class(model: PreTrainedModel, count: int, seed: int) -> Batch:
    return series(model, count, seed) | {"target_values": _drawn(model.config.num_targets, (count,), seed)}


def dated_series_and_future(model: PreTrainedModel, count: int, seed: int) -> Batch:
    """Values of the past and of the future, each with the features of its time."""
    past = model.config.context_length + max(model.config.lags_sequence)
    batch = {"past_observed_mask": torch.ones(count, past)}
    for name, length, more in (("past", past, 0), ("future", model.config.prediction_length, 1000)):
        features = (count, length, model.config.num_time_features)
        batch[f"{name}_values"] = torch.randn(count, length, generator=generator(seed + more))
        batch[f"{name}_time_features"] = torch.randn(features, generator=generator(seed + more + 1))
    return batch


def values_and_class(model: PreTrainedModel, count: int, seed: int) -> Batch:
    values = torch.randn(count, model.config.features, generator=generator(seed))
    return {"values": values} | class_labels(count, model.config.num_labels, seed)
