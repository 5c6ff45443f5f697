"""SWAG: which of four endings continues a description.

Source: R. Zellers et al., SWAG: A Large-Scale Adversarial Dataset for Grounded Commonsense Inference, EMNLP 2018.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import DataCollatorForMultipleChoice, PreTrainedModel

from ..errors import DataError
from .classification import accuracy_scores, answer_examples, check_labels
from .scores import Scores
from .sources import check_texts
from .task import EvaluationTask, ScoringOptions

_ENDINGS = ("ending0", "ending1", "ending2", "ending3")
_LABEL = "label"


def _prepare(dataset: Dataset, tokenizer: Any, max_length: int) -> Dataset:
    """Pair the first sentence with each "second sentence, ending"; an example has a list of four inputs."""
    missing = [name for name in ("sent1", "sent2", *_ENDINGS, _LABEL) if name not in dataset.column_names]
    if missing:
        raise DataError(f"the data set has no column {missing[0]!r}; it has {', '.join(dataset.column_names)}.")
    check_texts(dataset, "sent1", "sent2", *_ENDINGS)
    labels = check_labels(dataset, _LABEL)
    if labels.max() >= len(_ENDINGS):
        raise DataError(f"the data set has the label {labels.max()}, but the endings are 0 to {len(_ENDINGS) - 1}.")

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, Any]:
        count = len(_ENDINGS)
        first = [sentence for sentence in batch["sent1"] for _ in _ENDINGS]
        second = [f"{start} {batch[name][i]}" for i, start in enumerate(batch["sent2"]) for name in _ENDINGS]
        encoded = tokenizer(first, second, truncation=True, max_length=max_length)
        nested = {name: [rows[i : i + count] for i in range(0, len(rows), count)] for name, rows in encoded.items()}
        return {**nested, "labels": batch[_LABEL]}

    return dataset.map(tokenize, batched=True, remove_columns=dataset.column_names)


def _score(model: PreTrainedModel, dataset: Dataset, tokenizer: Any, options: ScoringOptions) -> Scores:
    examples = _prepare(dataset, tokenizer, options.max_length)
    collator = DataCollatorForMultipleChoice(tokenizer)
    return accuracy_scores(*answer_examples(model, examples, collator, options))


SWAG = EvaluationTask(
    auto_model="AutoModelForMultipleChoice",
    processor="AutoTokenizer",
    dataset=("allenai/swag", "regular", "train", "validation"),
    max_length=128,
    prepare=_prepare,
    collator=DataCollatorForMultipleChoice,
    score=_score,
)
"""SWAG with the endings 0 to 3 as choices, by accuracy."""
