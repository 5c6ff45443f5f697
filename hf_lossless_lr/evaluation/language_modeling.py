"""Perplexity of text, as the papers on compressing language models report it; and how likely tokens are to a model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, default_data_collator
from transformers.utils import logging

from ..errors import DataError, NumericalError
from ..layers import evaluating
from .positions import most_tokens
from .scores import Score, Scores
from .task import EvaluationTask, ScoringOptions

C4_DOCUMENTS, C4_BLOCKS = 1100, 256


class Passage(NamedTuple):
    """What a left-to-right model reads, and what may follow.

    Attributes:
        inputs: the tokens that it reads: a context, and the continuations without their last tokens.
        continuations: tokens to predict at the last positions of the inputs; all of one length.
    """

    inputs: list[int]
    continuations: list[list[int]]


def log_likelihoods(model: PreTrainedModel, passages: Sequence[Passage], batch_size: int) -> list[np.ndarray]:
    """Return the logarithm of the probability of each continuation, `Σ_j log p(token_j | tokens before it)`.

    Inputs are padded on the right, where no earlier position sees it, so a batch gives what its passages give alone.

    Args:
        model: a left-to-right language model; its training mode is restored.
        passages: what to read and to predict.
        batch_size: passages per forward pass.

    Returns:
        For each passage, a value for each of its continuations, in nats.

    Raises:
        DataError: if a passage is longer than the model's inputs.
        NumericalError: if a probability is 0 or not finite.
    """
    longest, limit = max(len(p.inputs) for p in passages), most_tokens(model)
    if limit is not None and longest > limit:
        raise DataError(f"an input has {longest} tokens, {type(model).__name__} takes {limit}; pass a max_length.")
    result = [np.empty(0)] * len(passages)
    order = sorted(range(len(passages)), key=lambda index: -len(passages[index].inputs))  # less padding
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    with evaluating(model), torch.no_grad():
        for batch in logging.tqdm(batches, desc="Scoring"):
            for index, values in zip(batch, _batch_likelihoods(model, [passages[i] for i in batch]), strict=True):
                result[index] = values
    if not all(np.isfinite(values).all() for values in result):
        raise NumericalError(f"{type(model).__name__} gives a token a probability that is 0 or not finite.")
    return result


def _batch_likelihoods(model: PreTrainedModel, passages: Sequence[Passage]) -> list[np.ndarray]:
    longest = max(len(passage.inputs) for passage in passages)
    input_ids = torch.tensor([p.inputs + [0] * (longest - len(p.inputs)) for p in passages])
    attention_mask = torch.tensor([[1] * len(p.inputs) + [0] * (longest - len(p.inputs)) for p in passages])
    first = min(len(p.inputs) - len(p.continuations[0]) for p in passages)
    options = {"use_cache": False, "logits_to_keep": longest - first}  # the logits of all positions take much memory
    taken = inspect.signature(model.forward).parameters
    logits = model(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        **{name: value for name, value in options.items() if name in taken},
    ).logits
    result, skipped = [], longest - logits.shape[1]
    for row, passage in zip(logits, passages, strict=True):
        targets = torch.tensor(passage.continuations, device=row.device).T  # shape: (tokens, continuations)
        end = len(passage.inputs) - skipped
        log = row[end - len(targets) : end]
        log = log.to(torch.promote_types(log.dtype, torch.float32)).log_softmax(-1)
        result.append(log.gather(1, targets).cpu().double().sum(0).numpy())
    return result


def _blocks(
    dataset: Dataset, tokenizer: Any, max_length: int, separator: str, documents: int | None, most: int | None
) -> list[list[int]]:
    """Join the texts, tokenize the whole as one, and cut it; the incomplete last block is dropped."""
    if "text" not in dataset.column_names:
        raise DataError(f"the data set has no column 'text'; it has {', '.join(dataset.column_names)}.")
    if max_length < 2:
        raise DataError(
            f"max_length is {max_length}; a block takes at least 2 tokens, one to read and one to predict."
        )
    texts = list(dataset["text"][:documents])
    wrong = next((index for index, text in enumerate(texts) if not isinstance(text, str)), None)
    if wrong is not None:
        raise DataError(f"row {wrong} of the data set has the text {texts[wrong]!r}, which is no string.")
    tokens = tokenizer(separator.join(texts), verbose=False)["input_ids"]
    blocks = [tokens[start : start + max_length] for start in range(0, len(tokens) - max_length + 1, max_length)]
    if not blocks:
        raise DataError(f"the text has {len(tokens)} tokens, too few for a block of {max_length}.")
    return blocks[:most]


def _mean_loss(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # no tokens: not a number
        return sums[..., 0] / sums[..., 1]


METRICS = (
    Score("perplexity", lambda sums: np.exp(_mean_loss(sums)), higher_is_better=False),
    Score("loss", _mean_loss, higher_is_better=False),
)


def language_modeling(
    dataset: tuple[str, str | None, str, str],
    separator: str = "\n\n",
    documents: int | None = None,
    blocks: int | None = None,
) -> EvaluationTask:
    """Make the task of predicting text, in blocks of `max_length` tokens that do not overlap.

    Within a block each token but the first is predicted from those before it: `perplexity = exp(Σ loss / Σ tokens)`,
    and `loss` its logarithm. Each block has a row of counts, its summed loss and the tokens predicted, so standard
    errors and bounds are over blocks. Any data set with a column `text` will do, such as
    `load_dataset("text", data_files=...)`, whose rows are lines. A figure can be compared only with figures of the
    same tokenizer, the same rows and the same `max_length`.

    Args:
        dataset: as in `EvaluationTask`.
        separator: what to put between the texts.
        documents: texts to take, from the start; None for all.
        blocks: most blocks to take, from the start; None for all.

    Returns:
        The task.
    """

    def prepare(data: Dataset, tokenizer: Any, max_length: int) -> Dataset:
        rows = _blocks(data, tokenizer, max_length, separator, documents, blocks)
        return Dataset.from_dict({"input_ids": rows, "labels": rows})

    def score(model: PreTrainedModel, data: Dataset, tokenizer: Any, options: ScoringOptions) -> Scores:
        rows = _blocks(data, tokenizer, options.max_length, separator, documents, blocks)[: options.blocks]
        passages = [Passage(row[:-1], [row[1:]]) for row in rows]
        losses = [-value[0] for value in log_likelihoods(model, passages, options.batch_size)]
        return Scores(np.array([[loss, len(row) - 1] for loss, row in zip(losses, rows, strict=True)]), METRICS)

    return EvaluationTask(
        auto_model="AutoModelForCausalLM",
        processor="AutoTokenizer",
        dataset=dataset,
        max_length=2048,
        prepare=prepare,
        collator=lambda tokenizer: default_data_collator,
        score=score,
        cuts_text=True,
    )


WIKITEXT2 = language_modeling(("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "test"))
"""WikiText-2 as GPTQ, SparseGPT, Wanda and SVD-LLM measure it: all rows, empty ones too, joined by blank lines."""

C4 = language_modeling(("allenai/c4", "en", "train", "validation"), " ", C4_DOCUMENTS, C4_BLOCKS)
"""C4 as the same papers measure it: the first 1,100 documents of validation, joined by a space; the first 256 blocks.

All of C4's validation split is not needed, nor its 300 GB of training text: load one file, as in
`load_dataset("allenai/c4", data_files={"validation": "en/c4-validation.00000-of-00008.json.gz"})`.
"""
