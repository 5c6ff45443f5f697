"""Train a compressed model: how far does a step move it in each storage, and which factor should an adapter be put on?

    python studies/train_compressed.py --testbed ../shared/testbed --records studies/results/train_compressed.jsonl

The model of SST-2 is compressed to half of its targeted weights, once. Steps: one step of AdamW on one batch, from the
same map in two storages. Training: some hundred steps on SST-2. Adapters: LoRA with about as many parameters on one
factor or on both, for tags of names, which the compression has not seen. Records that the file has are not measured
again; without --testbed, the tables are printed from the file as it is.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from finetune_small_models import HEADS, load
from peft import LoraConfig, get_peft_model
from records import Record, append_records, known_records
from testbed_tasks import Task, sentiment
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor, change_storage, lora_targets
from hf_lossless_lr.evaluation import EVALUATION_TASKS
from hf_lossless_lr.layers import is_factorized, weight_matrices

DENSE, STORAGES = "dense", ("pivoted", "two-factor")
RATES = (1e-5, 5e-5)
ADAPTERS = {"up": (("up",), 12), "down": (("down",), 12), "both": (("down", "up"), 6)}  # factors and rank
ADAPTER_RATE, DENSE_RANK = 2e-3, 8
ADAPTER_STEPS, ADAPTER_HELD_OUT = 64, 300
BATCH_SIZE = 8

Key = tuple[Any, ...]


def load_form(folder: Path, form: str, auto_class: Any = AutoModelForSequenceClassification, **options: Any) -> Any:
    """Return the dense model, or the compressed one in a storage."""
    name = folder / (DENSE if form == DENSE else "compressed")
    model = auto_class.from_pretrained(name, dtype=torch.float32, **options)
    return model if form == DENSE else change_storage(model, form)


def save_forms(task: Task, folder: Path) -> None:
    task.model.save_pretrained(folder / DENSE)
    compressor = LowRankCompressor(LosslessLowRankConfig(keep_ratio=0.5))
    compressor.compress(task.model, task.calibration, processing_class=task.processing_class)
    task.model.save_pretrained(folder / "compressed")


def trainer(model: nn.Module, train: Any, held_out: Any, collator: Any, rate: float, steps: int) -> Trainer:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=max(steps, 1),
            learning_rate=rate,
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=64,
            dataloader_pin_memory=torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
            seed=0,
        )
        data = {"train_dataset": train, "eval_dataset": held_out, "data_collator": collator}
        return Trainer(model, arguments, compute_metrics=accuracy, **data)


def accuracy(answers: Any) -> dict[str, float]:
    labelled = answers.label_ids != -100
    return {"accuracy": float((answers.predictions.argmax(-1) == answers.label_ids)[labelled].mean())}


def measured(run: Trainer) -> Record:
    found = run.evaluate()
    return {"loss": found["eval_loss"], "accuracy": found["eval_accuracy"]}


def matrices(model: PreTrainedModel, names: list[str]) -> list[torch.Tensor]:
    layers = [model.get_submodule(name) for name in names]
    return [layer.dense_weight() if is_factorized(layer) else weight_matrices(layer).clone() for layer in layers]


def step(folder: Path, form: str, rate: float, task: Task, held_out: Any) -> Record:
    """Return how far one step moves the matrices and the answers: `‖ΔW‖ / ‖W‖`, on the mean, and the divergence."""
    model = load_form(folder, form).eval()
    names = list(load_form(folder, STORAGES[0]).config.quantization_config.modules)
    collate = DataCollatorWithPadding(task.processing_class)
    run = trainer(model, task.calibration, held_out, collate, rate, 1)
    batch, others = next(iter(run.get_train_dataloader())), next(iter(run.get_eval_dataloader()))
    with torch.no_grad():
        before, answers = matrices(model, names), model(**others).logits.log_softmax(-1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0)
    model(**batch).loss.backward()
    optimizer.step()
    with torch.no_grad():
        pairs = zip(matrices(model, names), before, strict=True)
        moved = torch.stack([(new - old).norm() / old.norm() for new, old in pairs]).mean()
        divergence = (answers.exp() * (answers - model(**others).logits.log_softmax(-1))).sum(-1).mean()
    return {"moved": float(moved), "divergence": float(divergence)}


def train(folder: Path, form: str, rate: float, steps: int, task: Task, held_out: Any) -> Record:
    set_seed(0)
    collate = DataCollatorWithPadding(task.processing_class)
    run = trainer(load_form(folder, form), task.calibration, held_out, collate, rate, steps)
    before = measured(run)
    run.train()
    return {"steps": steps, **{f"{name}_before": value for name, value in before.items()}, **measured(run)}


def adapt(folder: Path, form: str, place: str, steps: int, data: tuple[Any, Any], collator: Any) -> Record:
    set_seed(0)
    head: Any = HEADS["conll2003"][0]
    labels = {"label2id": {name: number for number, name in head["id2label"].items()}}
    options = {"ignore_mismatched_sizes": True, **head, **labels}
    model = load_form(folder, form, AutoModelForTokenClassification, **options)
    factors, rank = ((), DENSE_RANK) if form == DENSE else ADAPTERS[place]
    layers = dict.fromkeys(
        name.removesuffix(".up").removesuffix(".down") for name in lora_targets(model, "all-linear")
    )
    targets = [
        target
        for layer in layers
        for target in ([f"{layer}.{f}" for f in factors] if is_factorized(model.get_submodule(layer)) else [layer])
    ]
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=["classifier"])
    adapted = get_peft_model(model, lora)
    run = trainer(adapted, *data, collator, ADAPTER_RATE, steps)
    run.train()
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    return {"steps": steps, "parameters": trained, **measured(run)}


def runs(
    folder: Path, task: Task, tags: tuple[Any, Any], collator: Any, arguments: argparse.Namespace
) -> Iterator[tuple[Key, Callable[[], Record]]]:
    """Yield what tells a record from the others, and what measures it."""
    held_out = task.evaluation.select(range(min(arguments.held_out, len(task.evaluation))))
    forms = [(form, rate) for rate in RATES for form in (DENSE, *STORAGES)]
    for key in forms:
        yield ("step", *key), partial(step, folder, *key, task, held_out)
    for key in forms:
        yield ("training", *key), partial(train, folder, *key, arguments.steps, task, held_out)
    for place in [(DENSE, ""), *((form, place) for form in STORAGES for place in ADAPTERS)]:
        yield ("adapter", *place), partial(adapt, folder, *place, min(arguments.steps, ADAPTER_STEPS), tags, collator)


NAMES = {"step": ("part", "form", "rate"), "training": ("part", "form", "rate"), "adapter": ("part", "form", "place")}


def tables(records: list[Record]) -> str:
    lines = ["| learning rate | form | a step moves the weights by | and the answers by (KL) |", "|---" * 4 + "|"]
    for each in (record for record in records if record["part"] == "step"):
        lines.append(f"| {each['rate']:g} | {each['form']} | {each['moved']:.3%} | {each['divergence']:.4f} |")
    lines += ["", "| learning rate | form | loss, before → after | accuracy |", "|---" * 4 + "|"]
    for each in (record for record in records if record["part"] == "training"):
        loss = f"{each['loss_before']:.4f} → {each['loss']:.4f}"
        points = f"{each['accuracy_before']:.4f} → {each['accuracy']:.4f}"
        lines.append(f"| {each['rate']:g} | {each['form']} | {loss} | {points} |")
    lines += ["", "| form | adapter on | trained parameters | loss | accuracy |", "|---" * 5 + "|"]
    for each in (record for record in records if record["part"] == "adapter"):
        place = f"`{each['place']}`" if each["place"] in ("up", "down") else each["place"] or "the layer"
        figures = f"{each['parameters']:,} | {each['loss']:.4f} | {each['accuracy']:.4f}"
        lines.append(f"| {each['form']} | {place} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--testbed", type=Path, help="folder of the trained models and their data")
    parser.add_argument("--records", type=Path, required=True, help="file of the figures, read and continued")
    parser.add_argument("--folder", type=Path, help="folder for both models; what it has is taken")
    parser.add_argument("--examples", type=int, default=4096, help="examples of SST-2 to train on")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=1000, help="number of held-out examples")
    arguments = parser.parse_args()
    records = known_records(arguments.records)
    done = {tuple(record[name] for name in NAMES[record["part"]]) for record in records}
    if arguments.testbed is not None:
        with tempfile.TemporaryDirectory() as temporary:
            folder = arguments.folder or Path(temporary)
            task = sentiment(arguments.testbed, arguments.examples)
            if not (folder / "compressed").exists():
                save_forms(sentiment(arguments.testbed, min(arguments.examples, 1024)), folder)
            tagging = EVALUATION_TASKS["conll2003"]
            wikiann = arguments.testbed / "data" / "wikiann"
            names = Dataset.from_json(str(wikiann / "validation.jsonl"))
            parts = load(wikiann), names.take(min(ADAPTER_HELD_OUT, len(names)))
            tags = tuple(tagging.prepare(part, task.processing_class, 128) for part in parts)
            for key, measure in runs(folder, task, tags, tagging.collator(task.processing_class), arguments):
                if key not in done:
                    record = dict(zip(NAMES[key[0]], key, strict=True)) | measure()
                    append_records(arguments.records, [record])
                    records.append(record)
    print(tables(records))


if __name__ == "__main__":
    main()
