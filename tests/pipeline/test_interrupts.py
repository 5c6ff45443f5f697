"""An interrupt at any moment leaves the model as it was: the same modules, and every bit of them."""

import random
import time

import pytest
import torch
from support.interrupts import Interrupt, Parts, interrupted_after, interrupted_at
from support.tiny_models import bert_sequence_classification, other_inputs, split_batch
from torch import nn

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.layers import ModelState
from hf_lossless_lr.layers.replacement import in_place, replace_modules

LAYERS = [
    f"bert.encoder.layer.{block}.{name}"
    for block in (0, 1)
    for name in ("attention.self.query", "attention.self.key", "attention.output.dense")
]
# An exception in a callback of the interpreter (of a weak reference, a finalizer) is reported, and goes no further.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def others():
    return {name: nn.Linear(32, 32) for name in LAYERS}


def undone(model):
    """What a restored model took, with everything put in place before the tracing begins."""
    return twice(replace_modules(model, others()).undo)


def twice(restore):
    """As callers do: an interrupt before the first step is one before the call."""

    def work():
        try:
            restore()
        except BaseException:
            restore()
            raise

    return work


def put_in_place(model):
    layers = others()

    def work():
        with in_place(model, layers):
            assert model.get_submodule(LAYERS[0]) is layers[LAYERS[0]]

    return work


def reset(model):
    before = ModelState(model)
    replace_modules(model, others())
    model.train()
    model.classifier.register_forward_hook(print)
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    model.classifier.bias.requires_grad_(False)
    model.config.problem_type = "mine"
    model.config.mine = "mine"
    model.extra = 3
    torch.set_grad_enabled(False)
    return twice(before.restore)


WORK = {"undo": undone, "in place": put_in_place, "state": reset}


class TestEveryStep:
    @pytest.mark.parametrize("kind", WORK)
    def test_of_a_swap_can_be_interrupted(self, kind):
        model = bert_sequence_classification()[0]
        before, step, raised = Parts(model), 3, 0  # the first two come before `work`
        while True:
            work = WORK[kind](model)
            try:
                taken = interrupted_at(step, work)
            except Interrupt:
                raised += 1
            else:
                break
            finally:
                before.check(model)
                assert torch.is_grad_enabled()
            step += 1
        assert taken <= step
        assert raised > 50

    def test_of_a_swap_that_fails_is_followed_by_the_others(self, monkeypatch):
        model = bert_sequence_classification()[0]
        before, record = Parts(model), replace_modules(model, others())
        put, failed = model.set_submodule, []

        def fail_once(path, module):
            put(path, module)
            if path == LAYERS[1]:
                failed.append(path)
                raise MemoryError("broken on purpose")

        with monkeypatch.context() as patch:
            patch.setattr(model, "set_submodule", fail_once)
            with pytest.raises(MemoryError, match="broken on purpose"):
                record.undo()
        before.check(model)
        assert failed == [LAYERS[1]]


def compress(model, batch, options, done):
    compressor = LowRankCompressor(LosslessLowRankConfig(**options))
    compressor.compress(model, split_batch(batch, 3), eval_dataset=[other_inputs(batch)])
    done.append(True)  # at once: from here on, an interrupt is none of the compression's


OPTIONS = {
    "refit": ({}, 16),
    "search": ({"objective": "compact", "refit": False, "loss_margin": 10.0, "accuracy_margin": 1.0}, 10),
    "noise": ({"objective": "paper-compact"}, 8),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", OPTIONS)
def test_a_compression_can_be_interrupted_at_any_moment(case):
    options, tries = OPTIONS[case]
    model, batch = bert_sequence_classification(12)
    before, drawn = Parts(model), random.Random(0)
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        compress(bert_sequence_classification(12)[0], batch, options, [])
        longest = time.perf_counter() - start
    hit = 0
    for _ in range(20 * tries):
        done, start = [], time.perf_counter()
        try:
            with interrupted_after(drawn.uniform(0, longest)):
                compress(model, batch, options, done)
        except Interrupt:
            pass
        if not done:
            hit += 1
            before.check(model)
            assert torch.is_grad_enabled()
            if hit == tries:
                break
        else:  # it was done before; other work on this machine may have made the one before slow
            longest = time.perf_counter() - start
            model = bert_sequence_classification(12)[0]
            before = Parts(model)
    assert hit == tries
