"""Are these batches or examples? And how many?"""

import pytest
import torch
from support.tiny_models import TINY_MODELS, build, split_batch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.data.forward import forward_loss
from hf_lossless_lr.data.labels import batch_examples, label_columns
from hf_lossless_lr.data.loaders import make_dataloader, ready_batches
from hf_lossless_lr.errors import DataError

COUNT = 12
NAMES = sorted(TINY_MODELS)


def as_tensors(batch):
    """A list of examples as a dataset in torch's format gives them."""
    return [{name: value[index] for name, value in batch.items()} for index in range(len(next(iter(batch.values()))))]


def numbers(loader):
    return [batch_examples(batch) for batch in loader]


@pytest.mark.parametrize("name", NAMES)
class TestEveryModel:
    def test_takes_a_list_of_batches_of_tensors_as_batches(self, name):
        model, batch = TINY_MODELS[name](COUNT)
        loader = make_dataloader(split_batch(batch, 4), model, batch_size=5)
        assert ready_batches(loader)
        assert numbers(loader) == [4, 4, 4]

    def test_takes_a_list_of_examples_of_tensors_as_examples(self, name):
        model, batch = TINY_MODELS[name](COUNT)
        loader = make_dataloader(as_tensors(batch), model, batch_size=5)
        assert not ready_batches(loader)
        assert numbers(loader) == [5, 5, 2]

    def test_takes_a_generator_of_examples_as_examples(self, name):
        model, batch = TINY_MODELS[name](COUNT)
        assert numbers(make_dataloader(iter(as_tensors(batch)), model, batch_size=5)) == [5, 5, 2]

    @pytest.mark.parametrize("as_examples", [False, True])
    def test_tells_them_apart_without_labels_too(self, name, as_examples):
        model, batch = TINY_MODELS[name](COUNT)
        batch = {n: value for n, value in batch.items() if n not in label_columns(model)}
        if model.config.is_encoder_decoder:  # does not run without its target
            batch["decoder_input_ids"] = batch["input_ids"]
        items = as_tensors(batch) if as_examples else split_batch(batch, 4)
        loader = make_dataloader(items, model, batch_size=5)
        assert ready_batches(loader) is not as_examples

    def test_is_left_as_it_was(self, name):
        model, batch = TINY_MODELS[name](COUNT)
        model.train()
        config = model.config.to_dict()
        make_dataloader(split_batch(batch, 4), model, batch_size=5)
        assert model.config.to_dict() == config
        assert all(module.training for module in model.modules())


class WithAttentionOfTorch(PreTrainedModel):
    """Its attention asserts that there are no more than three dimensions."""

    config_class = BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 3)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        x = self.words(input_ids)
        logits = self.last(self.attention(x, x, x)[0][:, 0])
        return SequenceClassifierOutput(nn.functional.cross_entropy(logits, labels), logits)


class TestBatches:
    def test_are_told_from_examples_by_an_assertion_too(self):
        _, batch = TINY_MODELS["bert-sequence-classification"](COUNT)
        loader = make_dataloader(split_batch(batch, 4), WithAttentionOfTorch(BertConfig()), batch_size=5)
        assert numbers(loader) == [4, 4, 4]

    def test_may_hold_scalars_and_strings(self):
        model, batch = TINY_MODELS["bert-sequence-classification"](COUNT)
        more = {"return_dict": True, "file": "part-1", "rows": ["a", "b", "c", "d"], "temperature": torch.tensor(2.0)}
        loader = make_dataloader([{**more, **part} for part in split_batch(batch, 4)], model, batch_size=5)
        assert numbers(loader) == [4, 4, 4]
        first = next(iter(loader))
        assert not {"file", "rows"} & set(first)
        assert torch.isfinite(model(**{name: first[name] for name in batch}).loss)

    def test_may_begin_with_what_has_another_number_of_rows(self):
        model, batch = TINY_MODELS["bert-sequence-classification"](20)
        positions = torch.arange(batch["input_ids"].shape[1])[None]
        parts = [{"position_ids": positions, **part} for part in split_batch(batch, 4)]
        assert numbers(make_dataloader(parts, model, batch_size=5)) == [4] * 5
        compressor = LowRankCompressor(LosslessLowRankConfig(refit=False))
        compressor.compress(model, parts[:3], eval_dataset=parts[3:])
        assert (compressor.report.calibration["examples"], compressor.report.held_out["examples"]) == (12, 8)

    @pytest.mark.parametrize(
        ("batch", "count"),
        [
            ({"pixel_values": torch.zeros(16, 3), "labels": torch.zeros(2, 5)}, 2),
            ({"position_ids": torch.zeros(1, 5), "input_ids": torch.zeros(3, 5)}, 3),
            ({"input_ids": torch.zeros(3, 5), "start_positions": torch.zeros(3)}, 3),
            ({"pixel_values": torch.zeros(9, 3), "labels": [{"boxes": torch.zeros(1, 4)}] * 2}, 2),
            ({"pixel_values": torch.zeros(2, 3), "mask_labels": [torch.zeros(1)] * 2}, 2),
            ({"return_dict": True, "input_ids": torch.zeros(3, 5)}, 3),
            ({"return_dict": True}, 0),
        ],
    )
    def test_have_as_many_examples_as_labels(self, batch, count):
        assert batch_examples(batch) == count

    def test_of_a_tensor_dataset_are_refused_with_what_to_do(self):
        model, batch = TINY_MODELS["bert-sequence-classification"](40)
        loader = DataLoader(TensorDataset(*batch.values()), batch_size=8)
        with pytest.raises(DataError, match="calib_dataset: its batches are lists without names, as of a TensorData"):
            LowRankCompressor().compress(model, loader)

    def test_of_tuples_are_refused_with_what_to_do(self):
        model, batch = TINY_MODELS["bert-sequence-classification"](40)
        with pytest.raises(DataError, match=r"its examples are tuples without names\. Pass a data_collator"):
            LowRankCompressor().compress(model, TensorDataset(*batch.values()))

    def test_may_have_a_dictionary_of_labels_for_each_picture(self):
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
        model = build("YolosForObjectDetection", "YolosConfig", image_size=[16, 16], patch_size=8, **sizes)
        generator = torch.Generator().manual_seed(0)
        parts = [
            {
                "pixel_values": torch.randn(2, 3, 16, 16, generator=generator),
                "labels": [
                    {"class_labels": torch.tensor([n]), "boxes": torch.rand(1, 4, generator=generator) / 2 + 0.2}
                    for n in range(2)
                ],
            }
            for _ in range(8)
        ]
        assert forward_loss(model, parts[0], 0).units == 2
        compressor = LowRankCompressor(LosslessLowRankConfig(refit=False))
        compressor.compress(model, parts[:4], eval_dataset=parts[4:])
        assert compressor.report.held_out["examples"] == 8


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("as_examples", [False, True])
def test_time_series_of_several_channels_are_no_batches(labelled, as_examples):
    options = {"num_input_channels": 3, "d_model": 8, "num_attention_heads": 1, "ffn_dim": 8, "prediction_length": 4}
    model = build("PatchTSTForPrediction", "PatchTSTConfig", num_hidden_layers=1, **options)
    batch = {"past_values": torch.randn(COUNT, 32, 3)}
    batch |= {"future_values": torch.randn(COUNT, 4, 3)} if labelled else {}
    items = as_tensors(batch) if as_examples else split_batch(batch, 4)
    assert ready_batches(make_dataloader(items, model, batch_size=4)) is not as_examples


class TestImageTextModels:
    """Their examples hold tensors of two dimensions and more."""

    def test_take_a_list_of_examples(self):
        text = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        text |= {"intermediate_size": 24, "max_position_embeddings": 40, "model_type": "llama"}
        vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
        vision |= {"image_size": 16, "patch_size": 8, "model_type": "clip_vision_model"}
        model = build(
            "LlavaForConditionalGeneration",
            "LlavaConfig",
            text_config=text,
            vision_config=vision,
            image_token_index=60,
            vision_feature_layer=-1,
        )
        generator = torch.Generator().manual_seed(0)
        words = torch.randint(5, 59, (COUNT, 4), generator=generator)
        ids = torch.cat([torch.full((COUNT, 4), 60), words], 1)
        pictures = torch.randn(COUNT, 3, 16, 16, generator=generator)
        batch = {"input_ids": ids, "pixel_values": pictures, "labels": torch.where(ids == 60, -100, ids)}
        loader = make_dataloader(as_tensors(batch), model, batch_size=5)
        assert not ready_batches(loader)
        assert numbers(loader) == [5, 5, 2]
        assert ready_batches(make_dataloader(split_batch(batch, 4), model, batch_size=5))
