"""Models of an unusual make: each is compressed as it should be, or refused by name before the work."""

import pytest
import torch
from support.compressions import check_same_answers, factorized_layers
from support.tiny_models import as_examples, bert_sequence_classification, other_inputs, split_batch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, PreTrainedConfig
from transformers import PreTrainedModel as Base
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.pytorch_utils import Conv1D

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.errors import ConfigurationError, DataError, TargetError

COUNT = 20


def bert():
    return bert_sequence_classification(COUNT)


def compress(model, batch, **options):
    compressor = LowRankCompressor(LosslessLowRankConfig(**options))
    compressor.compress(model, split_batch(batch, 2), eval_dataset=[other_inputs(batch)])
    return compressor.report


class OwnConfig(PreTrainedConfig):
    model_type = "own-of-these-tests"


class OwnModel(Base):
    """Calls its layers by keyword, and returns what it is told to."""

    config_class = OwnConfig
    base_model_prefix = "body"
    main_input_name = "values"

    def __init__(self, config, returns, by_name=True):
        super().__init__(config)
        self.returns, self.by_name = returns, by_name
        self.body = nn.Module()
        self.body.first, self.body.second = nn.Linear(24, 24), Conv1D(24, 24)
        self.head = nn.Linear(24, 3)
        self.post_init()

    def forward(self, values, labels=None):
        if self.by_name:
            hidden = self.body.second(x=self.body.first(input=values).relu()).relu()
            logits = self.head(input=hidden)
        else:
            logits = self.head(self.body.second(self.body.first(values).relu()).relu())
        loss = F.cross_entropy(logits, labels)
        return self.returns(loss=loss, logits=logits)


def own(returns=SequenceClassifierOutput, by_name=True):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = OwnModel(OwnConfig(num_labels=3), returns, by_name).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) / 4)
        values = torch.randn(80, 24)
        labels = model(values, torch.zeros(80, dtype=torch.long))
        labels = (labels["logits"] if isinstance(labels, dict) else labels[1]).argmax(-1)
    batch = {"values": values, "labels": labels}
    parts = [{name: value[start : start + 4] for name, value in batch.items()} for start in range(0, 80, 4)]
    return model, parts[:12], parts[12:]


def run(model, calibration, held_out, **options):
    compressor = LowRankCompressor(LosslessLowRankConfig(target_modules=["Linear", "Conv1D"], **options))
    compressor.compress(model, calibration, eval_dataset=held_out)
    return compressor.report


class TestCalls:
    @pytest.mark.parametrize("storage", ["pivoted", "two-factor"])
    def test_by_keyword_give_what_calls_by_position_give(self, storage):
        reports = [run(*own(by_name=by_name), storage=storage) for by_name in (True, False)]
        assert reports[0].layers == reports[1].layers
        assert any(layer.rank for layer in reports[0].layers.values())
        assert reports[0].compressed.loss == pytest.approx(reports[1].compressed.loss, rel=1e-6)
        assert reports[0].refitted == reports[1].refitted


class TestOutputs:
    def test_may_be_a_dictionary(self):
        mine, usual = run(*own(returns=dict)), run(*own())
        assert mine.layers == usual.layers
        assert (mine.compressed, mine.dense) == (usual.compressed, usual.dense)
        assert mine.dense.accuracy == 1.0

    def test_as_a_tuple_are_refused_before_the_work(self, monkeypatch):
        monkeypatch.setattr(
            "hf_lossless_lr.pipeline.calibration.collect_statistics", lambda *_: pytest.fail("work was done")
        )
        with pytest.raises(DataError, match=r"batch 0: OwnModel returns a tuple, whose parts have no names\. Let its"):
            run(*own(returns=lambda loss, logits: (loss, logits)))


class TestSharedConfigurations:
    def test_make_no_other_model_unloadable(self, tmp_path):
        model, batch = bert()
        other = BertForSequenceClassification(model.config).eval()
        compress(model, batch, refit=False)
        assert not hasattr(other.config, "quantization_config")
        assert other.config.problem_type is None
        model.save_pretrained(tmp_path / "compressed")
        other.save_pretrained(tmp_path / "other")
        del batch["labels"]
        for mine, folder in ((model, "compressed"), (other, "other")):
            again = AutoModelForSequenceClassification.from_pretrained(tmp_path / folder).eval()
            assert bool(factorized_layers(again)) is (mine is model)
            check_same_answers(mine, again, batch)

    def test_are_one_object_in_all_parts_of_the_compressed_model(self):
        model, batch = bert()
        compress(model, batch, refit=False)
        configs = {id(module.config) for module in model.modules() if hasattr(module, "config")}
        assert configs == {id(model.config)}

    def test_are_given_back_on_failure_and_where_nothing_is_compressed(self, monkeypatch):
        model, batch = bert()
        config, before = model.config, model.config.to_dict()
        report = compress(model, batch, objective="compact", loss_margin=0, accuracy_margin=0)
        assert not any(layer.rank for layer in report.layers.values())
        assert model.config is config
        monkeypatch.setattr("hf_lossless_lr.pipeline.compressor.make_report", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compress(model, batch, refit=False)
        assert all(module.config is config for module in model.modules() if hasattr(module, "config"))
        assert config.to_dict() == before


def with_adapter():
    peft = pytest.importorskip("peft")
    model, batch = bert()
    model.add_adapter(peft.LoraConfig(target_modules=["query"], r=2))
    return model, batch


def compiled():
    model, batch = bert()
    model.compile()
    return model, batch


def returning_tuples():
    model, batch = bert()
    model.config.return_dict = False
    return model, batch


def partly_compiled():
    model, batch = bert()
    model.bert = torch.compile(model.bert)
    return model, batch


def wholly_compiled():
    model, batch = bert()
    return torch.compile(model), batch


def in_data_parallel():
    model, batch = bert()
    return torch.nn.DataParallel(model), batch


def under_inference_mode():
    with torch.inference_mode():
        return bert()


REFUSED = {
    with_adapter: "this BertForSequenceClassification has an adapter, .* Merge it first",
    compiled: "this BertForSequenceClassification is compiled. Compress the model as it was loaded, then",
    partly_compiled: "this BertForSequenceClassification is compiled",
    wholly_compiled: "got OptimizedModule. Unwrap it first .*_orig_mod",
    in_data_parallel: "this BertForSequenceClassification is wrapped in DataParallel, .* Pass `model.module`",
    returning_tuples: r"this BertForSequenceClassification returns tuples, .* Set model.config.return_dict = True",
    under_inference_mode: r"this BertForSequenceClassification was built under torch.inference_mode\(\)",
}


class TestRefusal:
    @pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
    def test_comes_before_the_work_and_says_why(self, make, monkeypatch):
        monkeypatch.setattr("hf_lossless_lr.pipeline.compressor.split", lambda *_, **__: pytest.fail("data read"))
        model, batch = make()
        with pytest.raises(TargetError, match=REFUSED[make]):
            LowRankCompressor().compress(model, as_examples(batch))

    def test_is_not_of_calls_without_gradients(self):
        model, batch = bert_sequence_classification(24)
        with torch.no_grad():
            LowRankCompressor().compress(model, as_examples(batch), eval_dataset=as_examples(other_inputs(batch)))
        assert any(type(module).__name__ == "FactorizedLinear" for module in model.modules())

    def test_is_of_a_configuration_that_is_none(self):
        with pytest.raises(ConfigurationError, match="must be a LosslessLowRankConfig, got dict"):
            LowRankCompressor({"keep_ratio": 0.5})

    def test_is_of_calls_under_inference_mode(self):
        model, batch = bert()
        with torch.inference_mode(), pytest.raises(TargetError, match="Compress outside of it"):
            LowRankCompressor().compress(model, as_examples(batch))

    def test_does_not_meet_data_that_were_made_under_inference_mode(self):
        model, batch = bert()
        usual = compress(model, batch, refit=False)
        with torch.inference_mode():
            model_data = {name: value.clone() for name, value in batch.items()}
        model, _ = bert()
        assert compress(model, model_data, refit=False).compressed == usual.compressed
