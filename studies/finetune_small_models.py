"""Fine-tune a small encoder on local data, to have a model of each task to compress where no hub is at hand.

    python studies/finetune_small_models.py --model MODEL --data FOLDER --task conll2003 --output DIR

MODEL is any encoder checkpoint: its head is replaced. FOLDER holds `train.jsonl` in the schema of the task's data set.
For squad, `validation.jsonl` alone will do: every other article of it is trained on, and
`compress_small_models.py` evaluates on the others.
"""

import argparse
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from transformers import AutoTokenizer, Trainer, TrainingArguments

from hf_lossless_lr.evaluation import EVALUATION_TASKS

TAGS = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"]
HEADS = {  # options of the new head, epochs
    "squad": ({}, 3),
    "mnli": ({"id2label": {0: "entailment", 1: "not_entailment"}}, 4),
    "swag": ({}, 3),
    "conll2003": ({"id2label": dict(enumerate(TAGS))}, 3),
}


def load(folder: Path) -> Dataset:
    if (folder / "train.jsonl").is_file():
        return Dataset.from_json(str(folder / "train.jsonl"))
    data = Dataset.from_json(str(folder / "validation.jsonl"))
    articles = set(list(dict.fromkeys(data["title"]))[::2])
    return data.filter(lambda row: row["title"] in articles)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", required=True, choices=list(HEADS))
    parser.add_argument("--output", required=True)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--examples", type=int, help="examples to train on; default all")
    parser.add_argument("--epochs", type=int, help="default: 3 or 4, by task")
    arguments = parser.parse_args()
    transformers.set_seed(0)
    task, (head, epochs) = EVALUATION_TASKS[arguments.task], HEADS[arguments.task]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    auto_class = getattr(transformers, task.auto_model)
    labels = {"label2id": {label: index for index, label in head["id2label"].items()}} if head else {}
    options = {"dtype": torch.float32, "ignore_mismatched_sizes": True, **head, **labels}
    model = auto_class.from_pretrained(arguments.model, **options)
    data = load(arguments.data).shuffle(seed=0)
    data = task.prepare(data.take(arguments.examples or len(data)), tokenizer, arguments.max_length)
    training = TrainingArguments(
        output_dir=arguments.output,
        num_train_epochs=arguments.epochs or epochs,
        learning_rate=1e-4,
        per_device_train_batch_size=16,
        warmup_steps=50,
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        seed=0,
    )
    Trainer(model, training, train_dataset=data, data_collator=task.collator(tokenizer)).train()
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
