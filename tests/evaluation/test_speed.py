"""Speed: models measured in turns. The tests are about what is measured, not about times."""

import time

import pytest
import torch
from support.architectures import ARCHITECTURES, small
from support.tiny_models import TINY_MODELS, llama, t5, vit
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel, RobertaConfig, RobertaModel

from hf_lossless_lr import ConfigurationError, DataError
from hf_lossless_lr.evaluation import measure_speed, random_batch
from hf_lossless_lr.layers.factorized import is_factorized
from hf_lossless_lr.layers.layout import layout_of
from hf_lossless_lr.layers.replacement import replace_modules


class Slow(torch.nn.Linear):
    """A layer that takes its time."""

    def forward(self, x):
        time.sleep(0.02)
        return super().forward(x)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_random_batches_are_what_the_model_takes(name):
    model, _ = TINY_MODELS[name]()
    size = 12 if model.main_input_name == "input_ids" else None
    batch = random_batch(model, 3, size)
    assert all(len(value) == 3 for value in batch.values())
    with torch.no_grad():
        assert len(model(**batch)[0]) == 3
    again = random_batch(model, 3, size)
    assert all(torch.equal(batch[key], again[key]) for key in batch)


def test_a_text_that_is_too_long_is_refused():
    with pytest.raises(DataError, match="takes at most 40 tokens, not 41"):
        random_batch(llama()[0], 1, 41)
    roberta = RobertaModel(small(RobertaConfig))  # positions begin behind that of the padding
    with pytest.raises(DataError, match="takes at most 39 tokens, not 40"):
        random_batch(roberta, 1, 40)


def test_a_text_is_as_long_as_the_model_takes_where_that_is_less_than_the_default():
    for model, longest in ((llama()[0], 40), (RobertaModel(small(RobertaConfig)), 39)):
        batch = random_batch(model, 2)
        assert batch["input_ids"].shape == (2, longest)
        model(**batch)


def test_models_of_text_and_pictures_get_both():
    parts = {"text_config": {}, "vision_config": {}}
    model = CLIPModel(small(CLIPConfig, **parts))
    assert model(**random_batch(model, 3)).logits_per_image.shape == (3, 3)


@pytest.mark.parametrize(
    "name",
    [
        "BartForSequenceClassification",  # reads at the last token, which must be that of the end
        "BlipForConditionalGeneration",
        "ViltForQuestionAnswering",
        "VideoMAEForVideoClassification",
        "ASTForAudioClassification",
        "WhisperForConditionalGeneration",
        "Speech2TextForConditionalGeneration",
    ],
)
def test_models_of_texts_with_ends_of_films_and_of_spectrograms_get_them(name):
    model, _ = next(row for row in ARCHITECTURES if row.name == name).build(1)
    batch = random_batch(model, 3)
    assert all(len(value) == 3 for value in batch.values())
    with torch.no_grad():
        model(**batch)


def test_a_model_that_takes_something_else_is_an_error_that_says_so():
    row = next(row for row in ARCHITECTURES if row.name == "ViTForImageClassification")
    model, _ = row.build(1)
    with pytest.raises(DataError, match=r"does not take random inputs, pixel_values \(2, 3, 7, 7\); give a batch"):
        random_batch(model, 2, 7)
    row = next(row for row in ARCHITECTURES if row.name == "PatchTSTForPrediction")
    with pytest.raises(DataError, match="takes 'past_values', for which there is no random input"):
        random_batch(row.build(1)[0], 2)


def test_the_second_model_is_compared_to_the_first():
    fast, slow = (vit()[0] for _ in range(2))
    layer = Slow(32, 4)
    replace_modules(slow, {"classifier": layer})
    speed = measure_speed([fast, slow], random_batch(fast, 2), turns=5)
    assert speed.ratio > 1
    assert speed.is_slower
    assert speed.seconds[1] >= 0.02
    assert speed.quartiles[1][0] <= speed.seconds[1] <= speed.quartiles[1][1]
    assert not measure_speed([slow, fast], random_batch(fast, 2), turns=5).is_slower


def test_one_model_has_no_ratio():
    model, _ = llama()
    speed = measure_speed([model], random_batch(model, 2, 7), turns=3)
    assert (speed.ratio, speed.ratio_quartiles, speed.is_slower) == (None, None, False)
    assert (speed.shape, speed.device, speed.turns) == ((2, 7), "cpu", 3)


def test_operations_of_attention_are_counted_too():
    model, _ = TINY_MODELS["bert-sequence-classification"]()
    batch = random_batch(model, 2, 8)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(**batch)
    assert measure_speed([model], batch, turns=3).flops == (counter.get_total_flops(),)


def test_operations_are_counted():
    model, _ = vit()
    one, two = (measure_speed([model], random_batch(model, n), turns=3).flops[0] for n in (1, 2))
    assert two == 2 * one > 0


def test_memory_is_measured_where_it_is_asked_for():
    model, _ = llama()
    small, large = (measure_speed([model], random_batch(model, n, 16), 3, memory=True).peak_bytes[0] for n in (2, 8))
    assert 2 * small < large
    assert measure_speed([model], random_batch(model, 2, 16), 3).peak_bytes is None


def test_threads_are_set_and_put_back():
    model, _ = llama()
    before = torch.get_num_threads()
    assert measure_speed([model], random_batch(model, 1, 4), 3, threads=before + 1).threads == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("threads", [0, -1, 2_000_000])
def test_numbers_of_threads_that_would_end_the_process_are_refused(threads):
    model, batch = TINY_MODELS["llama"](2)
    with pytest.raises(ConfigurationError, match="threads: must be from 1 to 1,024, got"):
        measure_speed([model], batch, 3, threads=threads)


def test_layers_are_measured_one_by_one_and_a_factorized_one_as_a_whole():
    dense, other = (t5()[0] for _ in range(2))
    name = "encoder.block.0.layer.0.SelfAttention.q"
    module = other.get_submodule(name)
    replace_modules(other, {name: layout_of(module).factorized(module, 3, "two-factor")})
    found = measure_speed([dense, other], random_batch(dense, 2, 5), 3, layers=True).layers
    assert found[0].keys() == found[1].keys()
    assert name in found[1]
    assert all(seconds > 0 for layers in found for seconds in layers.values())


def test_models_are_left_as_they_were():
    model, _ = llama()
    model.train()
    measure_speed([model], random_batch(model, 1, 4), 3, layers=True, memory=True)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(is_factorized(module) for module in model.modules())


def test_an_empty_batch_is_refused():
    model, _ = llama()
    with pytest.raises(DataError, match="empty"):
        measure_speed([model], {})
