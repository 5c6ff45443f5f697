"""The measured loss: each labelled unit once, whatever the batches."""

import math

import numpy as np
import pytest
import torch
from support.head_oracle import answered, loss_of
from support.processes import accelerator, loader_of
from support.tiny_models import IGNORED, TINY_MODELS, rows, split_batch
from support.tolerances import FLOAT32

from hf_lossless_lr.data.forward import mean_loss
from hf_lossless_lr.errors import DataError, NumericalError

COUNT = 11


def measure(model, batches):
    return mean_loss(model, loader_of(batches), accelerator())


def expected(model, batch):
    """Mean cross entropy over units, written out."""
    return np.mean([loss_of(unit) for example in answered(model, batch) for unit in example])


class TestMeanLoss:
    @pytest.mark.parametrize("size", [1, 4, COUNT])
    @pytest.mark.parametrize("name", TINY_MODELS)
    def test_is_the_mean_over_labelled_units_whatever_the_batches(self, name, size):
        model, batch = TINY_MODELS[name](COUNT)
        assert measure(model, split_batch(batch, size)) == pytest.approx(expected(model, batch), rel=FLOAT32)

    def test_weighs_ragged_batches_by_their_units(self):
        """The mean of the batches' losses would be another number."""
        model, batch = TINY_MODELS["bert-token-classification"](COUNT)
        parts = [rows(batch, slice(0, 1)), rows(batch, slice(1, 8)), rows(batch, slice(8, COUNT))]
        for part in parts:  # cut each to its own longest text
            longest = int(part["attention_mask"].sum(1).max())
            part.update({name: value[:, :longest].contiguous() for name, value in part.items()})
        with torch.no_grad():
            naive = sum(model(**part).loss.item() for part in parts) / 3
        loss = expected(model, batch)
        assert measure(model, parts) == pytest.approx(loss, rel=FLOAT32)
        assert abs(naive - loss) > 100 * FLOAT32 * loss

    def test_passes_over_a_batch_without_a_label(self):
        model, batch = TINY_MODELS["bert-token-classification"](COUNT)
        parts = split_batch(batch, 4)
        whole = measure(model, parts[:1] + parts[2:])
        parts[1]["labels"] = torch.full_like(parts[1]["labels"], IGNORED)
        assert measure(model, parts) == whole

    def test_is_that_of_a_head_that_does_not_classify(self):
        model, batch = TINY_MODELS["bert-sequence-classification"](COUNT)
        model.config.problem_type, model.config.num_labels, model.num_labels = "regression", 1, 1
        model.classifier = torch.nn.Linear(32, 1)
        batch["labels"] = batch["labels"].float()
        with torch.no_grad():
            loss = torch.nn.functional.mse_loss(model(**batch).logits[:, 0].double(), batch["labels"].double())
        assert measure(model, split_batch(batch, 4)) == pytest.approx(float(loss), rel=FLOAT32)

    def test_turns_dropout_off_and_leaves_the_modes(self):
        model, batch = TINY_MODELS["bert-sequence-classification"](COUNT)
        quiet = measure(model, [batch])
        model.train()
        model.classifier.eval()
        assert measure(model, [batch]) == quiet
        modes = {name: module.training for name, module in model.named_modules()}
        assert not modes.pop("classifier")
        assert all(modes.values())

    def test_leaves_the_modes_after_an_error(self):
        model, batch = TINY_MODELS["bert-sequence-classification"](COUNT)
        del batch["labels"]
        with pytest.raises(DataError, match="has no labels"):
            measure(model.train(), [batch])
        assert all(module.training for module in model.modules())

    def test_builds_no_graph(self):
        model, batch = TINY_MODELS["bert-sequence-classification"](COUNT)
        seen = []
        model.classifier.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
        measure(model, [batch])
        assert seen == [False]


class TestRefusal:
    def test_of_data_in_which_every_label_is_ignored(self):
        model, batch = TINY_MODELS["llama"](COUNT)
        batch["labels"][:] = IGNORED
        with pytest.raises(DataError, match="no example of the data has a label: every label is -100"):
            measure(model, split_batch(batch, 4))

    def test_of_a_loss_that_is_not_finite_names_the_batch(self):
        model, batch = TINY_MODELS["vit"](COUNT)
        batch["pixel_values"][5] = math.nan
        with pytest.raises(NumericalError, match="batch 1: the loss is nan"):
            measure(model, split_batch(batch, 4))
