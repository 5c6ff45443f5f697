"""Tiny random models, built from configs, each with a labelled batch as a user would have it. Nothing is downloaded.

`TINY_MODELS[name]()` gives a fresh model and a batch; the same call gives the same numbers each time. Batches have
padding of several lengths wherever the model takes an attention mask.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

EXAMPLES = 6
LENGTH = 9
VOCABULARY = 61
FIRST_WORD = 5  # smaller ids are special tokens
IGNORED = -100

Batch = dict[str, torch.Tensor]

_INIT = {"initializer_range": 0.2}  # the usual 0.02 gives logits and gradients near zero in a model this small
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    **_INIT,
}


def build(model_class: str, config_class: str, seed: int = 0, **options: Any) -> PreTrainedModel:
    config = getattr(transformers, config_class)(**options)
    return initialized(lambda: getattr(transformers, model_class)(config), seed)


def initialized(make: Callable[[], PreTrainedModel], seed: int = 0) -> PreTrainedModel:
    """Build a model in evaluation mode; biases, norms and what is 0 get noise, so that losing it shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1 or not parameter.any():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lengths(count: int, longest: int, seed: int) -> torch.Tensor:
    """Lengths from 3 to `longest`; the first example has the longest, the second the shortest."""
    drawn = torch.randint(3, longest + 1, (count,), generator=generator(seed + 1000))
    drawn[0] = longest
    if count > 1:
        drawn[1] = 3
    return drawn


def text_inputs(count: int = EXAMPLES, longest: int = LENGTH, seed: int = 0, pad: int = 0) -> Batch:
    """Random words, padded on the right."""
    words = torch.randint(FIRST_WORD, VOCABULARY, (count, longest), generator=generator(seed))
    mask = (torch.arange(longest) < lengths(count, longest, seed)[:, None]).long()
    return {"input_ids": torch.where(mask.bool(), words, pad), "attention_mask": mask}


def pixels(count: int, channels: int, size: int, seed: int = 0) -> Batch:
    return {"pixel_values": torch.randn(count, channels, size, size, generator=generator(seed))}


def class_labels(count: int, classes: int, seed: int = 0) -> Batch:
    return {"labels": torch.randint(0, classes, (count,), generator=generator(seed + 2000))}


def bert_sequence_classification(count: int = EXAMPLES, seed: int = 0) -> tuple[PreTrainedModel, Batch]:
    model = build("BertForSequenceClassification", "BertConfig", num_labels=3, **_BERT)
    return model, text_inputs(count, seed=seed) | class_labels(count, 3, seed)


def bert_token_classification(count: int = EXAMPLES, seed: int = 0) -> tuple[PreTrainedModel, Batch]:
    """Tags, with -100 on padding and on each first token, as for `[CLS]`."""
    model = build("BertForTokenClassification", "BertConfig", num_labels=5, **_BERT)
    batch = text_inputs(count, seed=seed)
    tags = torch.randint(0, 5, (count, LENGTH), generator=generator(seed + 2000))
    batch["labels"] = torch.where(batch["attention_mask"].bool(), tags, IGNORED)
    batch["labels"][:, 0] = IGNORED
    return model, batch


def bert_question_answering(count: int = EXAMPLES, seed: int = 0) -> tuple[PreTrainedModel, Batch]:
    model = build("BertForQuestionAnswering", "BertConfig", **_BERT)
    batch = text_inputs(count, seed=seed)
    last = batch["attention_mask"].sum(1) - 1
    start = (torch.rand(count, generator=generator(seed + 2000)) * (last + 1)).long()
    return model, batch | {"start_positions": start, "end_positions": torch.minimum(start + 1, last)}


def bert_multiple_choice(count: int = EXAMPLES, seed: int = 0) -> tuple[PreTrainedModel, Batch]:
    choices = 3
    model = build("BertForMultipleChoice", "BertConfig", **_BERT)
    flat = text_inputs(count * choices, seed=seed)
    batch = {name: value.view(count, choices, LENGTH) for name, value in flat.items()}
    return model, batch | class_labels(count, choices, seed)


def bert_masked_lm(count: int = EXAMPLES, seed: int = 0) -> tuple[PreTrainedModel, Batch]:
    model = build("BertForMaskedLM", "BertConfig", tie_word_embeddings=True, **_BERT)
    batch = text_inputs(count, seed=seed)
    chosen = torch.rand(count, LENGTH, generator=generator(seed + 2000)) < 0.3
    chosen[:, 1] = True
    batch["labels"] = torch.where(chosen & batch["attention_mask"].bool(), batch["input_ids"], IGNORED)
    batch["input_ids"] = torch.where(batch["labels"] != IGNORED, 4, batch["input_ids"])
    return model, batch


def roberta(count: int = EXAMPLES, seed: int = 0) -> tuple[PreTrainedModel, Batch]:
    model = build("RobertaForSequenceClassification", "RobertaConfig", num_labels=3, pad_token_id=1, **_BERT)
    return model, text_inputs(count, seed=seed, pad=1) | class_labels(count, 3, seed)


def distilbert(count: int = EXAMPLES, seed: int = 0) -> tuple[PreTrainedModel, Batch]:
    options = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 40}
    model = build(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        vocab_size=VOCABULARY,
        num_labels=3,
        **options,
        **_INIT,
    )
    return model, text_inputs(count, seed=seed) | class_labels(count, 3, seed)


def albert(count: int = EXAMPLES, seed: int = 0) -> tuple[PreTrainedModel, Batch]:
    """Three passes through one and the same layer."""
    options = _BERT | {"num_hidden_layers": 3, "embedding_size": 16, "num_hidden_groups": 1}
    model = build("AlbertForSequenceClassification", "AlbertConfig", num_labels=3, **options)
    return model, text_inputs(count, seed=seed) | class_labels(count, 3, seed)


def llama(count: int = EXAMPLES, seed: int = 0, tied: bool = True) -> tuple[PreTrainedModel, Batch]:
    """Grouped-query attention (four query heads on two key heads), output embeddings tied to the input's or not."""
    model = build(
        "LlamaForCausalLM",
        "LlamaConfig",
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=40,
        tie_word_embeddings=tied,
        **_INIT,
    )
    return model, _causal(text_inputs(count, seed=seed))


def gpt2(count: int = EXAMPLES, seed: int = 0) -> tuple[PreTrainedModel, Batch]:
    """Layers of the type `Conv1D`, which stores its weight transposed."""
    options = {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 40}
    model = build(
        "GPT2LMHeadModel", "GPT2Config", vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **options, **_INIT
    )
    return model, _causal(text_inputs(count, seed=seed))


def _causal(batch: Batch) -> Batch:
    labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], IGNORED)
    return batch | {"labels": labels}


def t5(count: int = EXAMPLES, seed: int = 0, target_length: int = 7) -> tuple[PreTrainedModel, Batch]:
    """Encoder and decoder with cross attention; the targets have padding of their own."""
    model = build(
        "T5ForConditionalGeneration",
        "T5Config",
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    batch = text_inputs(count, seed=seed)
    target = text_inputs(count, target_length, seed=seed + 500)
    batch["labels"] = torch.where(target["attention_mask"].bool(), target["input_ids"], IGNORED)
    return model, batch


def swin(count: int = EXAMPLES, seed: int = 0) -> tuple[PreTrainedModel, Batch]:
    """Two stages with plain and shifted windows, and the patch merging between them."""
    model = build(
        "SwinForImageClassification",
        "SwinConfig",
        image_size=16,
        patch_size=2,
        num_channels=1,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        mlp_ratio=2.0,
        num_labels=4,
        **_INIT,
    )
    return model, pixels(count, 1, 16, seed) | class_labels(count, 4, seed)


def vit(count: int = EXAMPLES, seed: int = 0) -> tuple[PreTrainedModel, Batch]:
    model = build(
        "ViTForImageClassification",
        "ViTConfig",
        image_size=12,
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        num_labels=4,
        **_INIT,
    )
    return model, pixels(count, 3, 12, seed) | class_labels(count, 4, seed)


def resnet(count: int = EXAMPLES, seed: int = 0) -> tuple[PreTrainedModel, Batch]:
    """Convolutions of several kernel sizes and strides."""
    model = build(
        "ResNetForImageClassification",
        "ResNetConfig",
        num_channels=3,
        embedding_size=8,
        hidden_sizes=[16, 24],
        depths=[1, 2],
        layer_type="bottleneck",
        num_labels=4,
    )
    return model, pixels(count, 3, 20, seed) | class_labels(count, 4, seed)


TINY_MODELS: dict[str, Callable[..., tuple[PreTrainedModel, Batch]]] = {
    "bert-sequence-classification": bert_sequence_classification,
    "bert-token-classification": bert_token_classification,
    "bert-question-answering": bert_question_answering,
    "bert-multiple-choice": bert_multiple_choice,
    "bert-masked-lm": bert_masked_lm,
    "roberta": roberta,
    "distilbert": distilbert,
    "albert": albert,
    "llama": llama,
    "gpt2": gpt2,
    "t5": t5,
    "swin": swin,
    "vit": vit,
    "resnet": resnet,
}

t5_equal_lengths = partial(t5, target_length=LENGTH)
"""T5 whose encoder and decoder inputs have the same shape, so that a mask cannot be told by its size."""


def rows(batch: Batch, indices: Any) -> Batch:
    """Some examples of a batch."""
    return {name: value[indices] for name, value in batch.items()}


def other_inputs(batch: Batch) -> Batch:
    """Examples of the same kind that are none of these: each word is the next one, each picture its negative."""
    words, pictures = batch.get("input_ids"), batch.get("pixel_values")
    if words is not None:
        following = FIRST_WORD + (words - FIRST_WORD + 1) % (VOCABULARY - FIRST_WORD)
        return batch | {"input_ids": torch.where(words < FIRST_WORD, words, following)}
    return batch | {"pixel_values": -pictures}


def split_batch(batch: Batch, size: int) -> list[Batch]:
    """The batch cut into batches of `size`; the last one may be smaller."""
    count = len(next(iter(batch.values())))
    return [rows(batch, slice(start, start + size)) for start in range(0, count, size)]


def as_examples(batch: Batch) -> list[dict[str, Any]]:
    """One dictionary of plain Python values for each example, as `datasets.Dataset.from_list` takes them."""
    count = len(next(iter(batch.values())))
    return [{name: value[index].tolist() for name, value in batch.items()} for index in range(count)]
