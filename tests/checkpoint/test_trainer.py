"""Compressed models in `Trainer`: trained whole or by an adapter, interrupted or not, in bfloat16, and to the best."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.compressions import answers, auto_class, check_same_model, compressed, factorized_layers
from support.tiny_models import as_examples
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lossless_lr import lora_targets
from hf_lossless_lr.layers.rounded import grids_in

BERT = "bert-sequence-classification"
CASES = {
    "pivoted": {"storage": "pivoted"},
    "int8": {"formats": ["int8"], "keep_ratio": 0.15},
}


@pytest.fixture(scope="module", params=CASES)
def saved(request, tmp_path_factory):
    """A compressed checkpoint and its examples."""
    model, batch = compressed(BERT, **CASES[request.param])
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder, batch


def load(folder):
    return auto_class(BERT).from_pretrained(folder)


def with_adapter(folder):
    torch.manual_seed(0)
    model = load(folder)
    return get_peft_model(model, LoraConfig(r=2, target_modules=lora_targets(model), modules_to_save=["classifier"]))


WAYS = {"whole": load, "by an adapter": with_adapter}


CHECKPOINTING = next(  # its name changed
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)


def trainer(model, batch, folder, callbacks=(), **options):
    """Six steps of two examples, with a checkpoint and an evaluation after every other one."""
    settings = {"max_steps": 6, "per_device_train_batch_size": 2, "save_steps": 2, "learning_rate": 1e-3}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    arguments = TrainingArguments(output_dir=folder, **settings | quiet | options)
    data = as_examples(batch)
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=list(callbacks))


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 4
        return control


@pytest.mark.parametrize(
    ("saved", "way"),
    [(case, way) for case in CASES for way in WAYS if (case, way) != ("int8", "whole")],  # what is saved is rounded
    indirect=["saved"],
)
def test_a_training_that_goes_on_ends_as_one_that_was_not_interrupted(saved, way, tmp_path):
    folder, batch = saved
    whole = trainer(WAYS[way](folder), batch, tmp_path / "whole")
    whole.train()
    trainer(WAYS[way](folder), batch, tmp_path / "parts", [Stop()]).train()
    resumed = trainer(WAYS[way](folder), batch, tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    check_same_state(resumed.model, whole.model)


def check_same_state(model, other):
    mine, others = model.state_dict(), other.state_dict()
    assert mine.keys() == others.keys()
    assert [name for name in mine if not torch.equal(mine[name], others[name])] == []


def test_the_best_model_is_loaded_at_the_end(saved, tmp_path):
    """Best by a measure that falls with the loss, so that it is the first checkpoint and not the last."""
    folder, batch = saved
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}
    run = trainer(load(folder), batch, tmp_path, **options)
    run.train()
    losses = {f"checkpoint-{e['step']}": e["eval_loss"] for e in run.state.log_history if "eval_loss" in e}
    best = max(losses, key=losses.get)
    assert best != "checkpoint-6"
    assert run.state.best_model_checkpoint.endswith(best)
    check_same_state(run.model, load(tmp_path / best))


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_and_gradient_checkpoints_reach_every_factor(way, saved, tmp_path):
    folder, batch = saved
    model = WAYS[way](folder)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    options = {"bf16": True, CHECKPOINTING: True, "max_steps": 2, "learning_rate": 1e-2}
    run = trainer(model, batch, tmp_path, **options)
    run.train()
    assert [name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])] == []
    assert all(torch.tensor(losses(run)).isfinite())


def test_a_checkpoint_of_training_is_a_compressed_one(saved, tmp_path):
    folder, batch = saved
    model = load(folder)
    trainer(model, batch, tmp_path).train()
    again = load(tmp_path / "checkpoint-6").eval()
    assert factorized_layers(again).keys() == factorized_layers(model).keys()
    if not grids_in(model):  # else its numbers are rounded anew
        check_same_model(model.eval(), again, batch)
    assert not torch.equal(answers(again, batch)["logits"], answers(load(folder).eval(), batch)["logits"])
