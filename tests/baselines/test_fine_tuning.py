"""Methods that fine-tune: as a loop of one's own would, with nothing left behind."""

import importlib
import random
import tempfile
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from support.tiny_models import TINY_MODELS, as_examples, split_batch
from transformers import Trainer

from hf_lossless_lr.baselines import Recipe, Recipes, compare, lpaf, svd_fine_tuned
from hf_lossless_lr.baselines.fine_tuning import equal_shares
from hf_lossless_lr.baselines.truncation import truncated
from hf_lossless_lr.data import make_dataloader
from hf_lossless_lr.errors import ConfigurationError, NumericalError, TargetError
from hf_lossless_lr.fingerprint import tensors_fingerprint
from hf_lossless_lr.layers import find_targets, in_place, is_factorized, replace_modules

BERT, KEEP = "bert-sequence-classification", 0.5
SHORT, LONG = Recipe(epochs=1.0), Recipe(learning_rate=1e-2, epochs=6.0, batch_size=8)
METHODS = {
    "svd-fine-tuned": partial(svd_fine_tuned, recipe=SHORT),
    "lpaf": partial(lpaf, recipes=Recipes(SHORT, SHORT)),
}
LONGER = {"svd-fine-tuned": {"recipe": LONG}, "lpaf": {"recipes": Recipes(SHORT, LONG)}}


@pytest.fixture
def place():
    """A model without dropout, its targets, and a loader of examples with the labels that it gives them."""
    model, batch = TINY_MODELS[BERT](32)
    with torch.no_grad():
        batch["labels"] = model(**batch).logits.argmax(-1)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model, find_targets(model).chosen, make_dataloader(as_examples(batch), model, batch_size=8)


def generators():
    return (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())


def loss_with(model, layers, data):
    with in_place(model, layers), torch.no_grad():
        return torch.stack([model(**batch).loss for batch in data]).mean().item()


def test_a_step_is_that_of_adamw_on_all_parameters(place):
    model, targets, data = place
    recipe = Recipe(learning_rate=1e-3, epochs=1.0, batch_size=32, warmup=0.0)
    layers = svd_fine_tuned(targets, KEEP, model=model, data=data, recipe=recipe)

    own = deepcopy(model).train()
    ranks = equal_shares(targets, KEEP)
    replace_modules(own, {name: truncated(layer, ranks[name]) for name, layer in targets.items()})
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-3, weight_decay=0.0)
    own(**data.collate_fn([data.dataset[n] for n in range(32)])).loss.backward()
    torch.nn.utils.clip_grad_norm_(own.parameters(), 1.0)
    optimizer.step()
    with in_place(model, layers):
        found = {name: parameter.clone() for name, parameter in model.named_parameters()}
    wanted = dict(own.named_parameters())
    assert found.keys() == wanted.keys()
    for name, parameter in wanted.items():
        if not name.endswith("key.bias"):  # its gradient is 0 but for rounding, which a step of Adam does not know
            torch.testing.assert_close(found[name], parameter, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss_and_leaves_nothing_behind(method, place, tmp_path, monkeypatch, capsys):
    model, targets, data = place
    ranks = equal_shares(targets, KEEP)
    before, modules = tensors_fingerprint(model.state_dict()), dict(model.named_modules())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    seeds = generators()
    layers = METHODS[method](targets, KEEP, model=model, data=data, **LONGER[method])
    assert generators() == seeds
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
    assert tensors_fingerprint(model.state_dict()) == before
    assert dict(model.named_modules()) == modules
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(is_factorized(layers[name]) and layers[name].rank == ranks[name] for name in targets)
    plain = {name: truncated(layer, ranks[name]) for name, layer in targets.items()}
    assert loss_with(model, layers, data) < 0.5 * loss_with(model, plain, data)


@pytest.mark.parametrize("method", METHODS)
def test_a_failure_half_way_leaves_the_model_and_the_generators(method, place, monkeypatch):
    model, targets, data = place
    before, modules, seeds = tensors_fingerprint(model.state_dict()), dict(model.named_modules()), generators()
    step, calls = Trainer.training_step, []

    def failing(self, *args, **options):
        calls.append(torch.rand(()))
        if len(calls) > 1:
            raise KeyboardInterrupt
        return step(self, *args, **options)

    monkeypatch.setattr(Trainer, "training_step", failing)
    with pytest.raises(KeyboardInterrupt):
        METHODS[method](targets, KEEP, model=model, data=data)
    assert tensors_fingerprint(model.state_dict()) == before
    assert dict(model.named_modules()) == modules
    assert generators() == seeds


def test_the_factors_begin_as_those_of_exactly_the_share_that_pruning_keeps(place, monkeypatch):
    model, targets, data = place
    stages = importlib.import_module("hf_lossless_lr.baselines.lpaf")
    train, seen = stages.train, []

    def watched(copy, *args):
        seen.append({name: copy.get_submodule(name) for name in targets})
        for name, layer in seen[-1].items() if len(seen) == 2 else ():
            weight = layer.full.weight.detach()
            assert (weight != 0).sum() == round(KEEP * weight.numel())
            shares = (weight != 0).double().mean(-1)[None]
            again = truncated(layer.full, layer.factors.rank, shares)
            torch.testing.assert_close(layer.factors.dense_weight(), again.dense_weight(), msg=name)
        train(copy, *args)

    monkeypatch.setattr(stages, "train", watched)
    METHODS["lpaf"](targets, KEEP, model=model, data=data)
    assert len(seen) == 2
    weights = [layer.full.weight for layer in seen[1].values()]
    assert [(weight != 0).sum().item() for weight in weights] == [round(KEEP * w.numel()) for w in weights]


@pytest.mark.parametrize("method", METHODS)
def test_a_model_in_bfloat16_stays_one(method, place):
    model, targets, data = place
    layers = METHODS[method](targets, KEEP, model=model.to(torch.bfloat16), data=data)
    assert {p.dtype for layer in layers.values() for p in layer.parameters()} == {torch.bfloat16}


def test_training_that_diverges_is_an_error(place):
    model, targets, data = place
    with pytest.raises(NumericalError, match=r"fine-tuning diverged: .* is not finite. Take a lower learning rate"):
        svd_fine_tuned(targets, KEEP, model=model, data=data, recipe=Recipe(learning_rate=1e38))


def on_two_devices(model):
    model.hf_device_map = {"bert": 0, "classifier": "cpu"}


@pytest.mark.parametrize("spread", [on_two_devices, partial(cpu_offload, execution_device=torch.device("cpu"))])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_on_several_devices_or_offloaded_is_refused(method, spread, place):
    model, targets, data = place
    spread(model)
    with pytest.raises(TargetError, match="lie on several devices, or are offloaded, and it cannot be fine-tuned"):
        METHODS[method](targets, KEEP, model=model, data=data)


@pytest.mark.parametrize("method", METHODS)
def test_labels_of_the_model_itself_are_refused_before_any_work(method):
    with pytest.raises(ConfigurationError, match=f"the method '{method}' fine-tunes on labelled data"):
        next(compare(None, None, methods=["svd", method], keep_ratios=[0.5], labels="model"))


def test_ready_made_batches_are_trained_on_in_the_table_of_all_methods(monkeypatch):
    monkeypatch.setattr("hf_lossless_lr.pipeline.speed.MAX_SECONDS", 0.0)
    model, batch = TINY_MODELS[BERT](120)
    data = split_batch(batch, 30)
    before = tensors_fingerprint(model.state_dict())
    methods, options = [*METHODS, "svd"], {"eval_dataset": data[2:], "rank_multiple": 1}
    found = {
        result.method: result for result in compare(model, data[:2], methods=methods, keep_ratios=[0.6], **options)
    }
    assert list(found) == methods
    for name in METHODS:
        assert found[name].parameters == found["svd"].parameters
        assert found[name].loss_increase != found["svd"].loss_increase
    assert tensors_fingerprint(model.state_dict()) == before
