"""Which layers are chosen, and what is said when the choice cannot be made."""

import pytest
import torch
import transformers
from support.tiny_models import TINY_MODELS, bert_sequence_classification, build, llama
from torch import nn
from transformers import BertConfig, PreTrainedModel

from hf_lossless_lr.errors import TargetError
from hf_lossless_lr.layers.factorized import is_factorized
from hf_lossless_lr.layers.linear import FactorizedLinear
from hf_lossless_lr.layers.patterns import EXACT, GLOB, NO_MATCH, REGEX, SUFFIX, TYPE, match_specificity
from hf_lossless_lr.layers.targets import find_targets

ATTENTION = [f"{p}_proj" for p in "qkvo"]
BERT_LAYER = [
    *(f"attention.self.{p}" for p in ("query", "key", "value")),
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
]
DISTILBERT_LAYER = [*(f"attention.{p}_lin" for p in ("q", "k", "v", "out")), "ffn.lin1", "ffn.lin2"]
ALBERT_LAYER = [*(f"attention.{p}" for p in ("query", "key", "value", "dense")), "ffn", "ffn_output"]
LLAMA_LAYER = [*(f"self_attn.{p}" for p in ATTENTION), *(f"mlp.{p}_proj" for p in ("gate", "up", "down"))]
GPT2_LAYER = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
T5_ENCODER = [*(f"layer.0.SelfAttention.{p}" for p in "qkvo"), *(f"layer.1.DenseReluDense.{p}" for p in ("wi", "wo"))]
T5_DECODER = [
    *(f"layer.0.SelfAttention.{p}" for p in "qkvo"),
    *(f"layer.1.EncDecAttention.{p}" for p in "qkvo"),
    *(f"layer.2.DenseReluDense.{p}" for p in ("wi", "wo")),
]
VISION_LAYER = [*(f"attention.{p}" for p in ATTENTION), "mlp.fc1", "mlp.fc2"]


def names(prefix, parts, layers=2):
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in parts]


BERT_TARGETS = names("bert.encoder.layer", BERT_LAYER)
POOLED_HEAD = {"bert.pooler.dense": "pooler", "classifier": "task head"}
TIED_HEAD = {"lm_head": "tied"}
PATCHES = "embeddings.patch_embeddings.projection"

# name of the tiny model: the targets in order, and the reason for every other layer
DEFAULTS = {
    "bert-sequence-classification": (BERT_TARGETS, POOLED_HEAD),
    "bert-token-classification": (BERT_TARGETS, {"classifier": "task head"}),
    "bert-question-answering": (BERT_TARGETS, {"qa_outputs": "task head"}),
    "bert-multiple-choice": (BERT_TARGETS, POOLED_HEAD),
    "bert-masked-lm": (
        BERT_TARGETS,
        {"cls.predictions.transform.dense": "task head", "cls.predictions.decoder": "tied"},
    ),
    "roberta": (
        names("roberta.encoder.layer", BERT_LAYER),
        {"classifier.dense": "task head", "classifier.out_proj": "task head"},
    ),
    "distilbert": (
        names("distilbert.transformer.layer", DISTILBERT_LAYER),
        {"pre_classifier": "task head", "classifier": "task head"},
    ),
    "albert": (
        [
            "albert.encoder.embedding_hidden_mapping_in",
            *names("albert.encoder.albert_layer_groups.0.albert_layers", ALBERT_LAYER, layers=1),
        ],
        {"albert.pooler": "pooler", "classifier": "task head"},
    ),
    "llama": (names("model.layers", LLAMA_LAYER), TIED_HEAD),
    "gpt2": (names("transformer.h", GPT2_LAYER), TIED_HEAD),
    "t5": ([*names("encoder.block", T5_ENCODER), *names("decoder.block", T5_DECODER)], TIED_HEAD),
    "swin": (
        [
            f"swin.{PATCHES}",
            *names("swin.encoder.layers.0.blocks", VISION_LAYER),
            "swin.encoder.layers.0.downsample.reduction",
            *names("swin.encoder.layers.1.blocks", VISION_LAYER),
        ],
        {"classifier": "task head"},
    ),
    "vit": ([f"vit.{PATCHES}", *names("vit.layers", VISION_LAYER)], {"classifier": "task head"}),
}


def test_every_tiny_model_has_an_expected_choice():
    assert set(DEFAULTS) | {"resnet"} == set(TINY_MODELS)


@pytest.mark.parametrize("name", DEFAULTS)
class TestTheDefault:
    def test_is_every_layer_of_the_base_model_and_no_other(self, name):
        selection = find_targets(TINY_MODELS[name]()[0])
        assert (list(selection.chosen), selection.skipped) == DEFAULTS[name]

    def test_maps_each_name_to_the_module_of_that_name(self, name):
        model, _ = TINY_MODELS[name]()
        assert all(model.get_submodule(path) is module for path, module in find_targets(model).chosen.items())

    def test_holds_no_weight_that_another_module_uses(self, name):
        model, _ = TINY_MODELS[name]()
        chosen = find_targets(model).chosen
        others = {id(p) for other, m in model.named_modules() if other not in chosen for p in m.parameters(False)}
        assert not any(id(module.weight) in others for module in chosen.values())


def test_linear_layers_of_a_type_of_their_own_that_are_plain_maps_are_chosen():
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    chosen = find_targets(build("FalconForCausalLM", "FalconConfig", **sizes)).chosen
    assert {type(module).__name__ for module in chosen.values()} == {"FalconLinear"}
    assert len(chosen) == 4


def test_untied_output_embeddings_stay_dense():
    model = llama(tied=False)[0]
    selection = find_targets(model)
    assert selection.skipped == {"lm_head": "output embeddings"}
    assert list(selection.chosen) == names("model.layers", LLAMA_LAYER)


def test_a_model_without_a_head_gets_the_same_targets():
    model = bert_sequence_classification()[0].bert
    selection = find_targets(model)
    assert list(selection.chosen) == [name.removeprefix("bert.") for name in BERT_TARGETS]
    assert selection.skipped == {"pooler.dense": "pooler"}


@pytest.mark.skipif(not hasattr(transformers, "DINOv3ViTModel"), reason="this version of Transformers has no DINOv3")
def test_what_lies_before_the_encoder_of_a_model_without_a_head_is_no_head():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**sizes, image_size=32))
    assert "embeddings.patch_embeddings" in find_targets(model).chosen


class TestSpecificity:
    QUERY = "bert.encoder.layer.0.attention.self.query"

    @pytest.mark.parametrize(
        ("pattern", "expected"),
        [
            (QUERY, EXACT),
            ("query", SUFFIX),
            ("self.query", SUFFIX + 1 / 6),
            ("uery", NO_MATCH),  # the end of a name, but not of whole components
            ("bert.encoder", NO_MATCH),  # the beginning of a name
            (r"re:.*\.query", REGEX),
            ("re:query", NO_MATCH),  # regular expressions match in full
            ("*query", GLOB),
            ("bert.encoder.layer.[0-3].*", GLOB),
            ("bert.encoder.layer.?.attention.self.query", GLOB),
            ("*key", NO_MATCH),
            ("Linear", TYPE),
            ("linear", NO_MATCH),
            ("Conv2d", NO_MATCH),
        ],
    )
    def test_of_a_pattern(self, pattern, expected):
        assert match_specificity(pattern, self.QUERY, nn.Linear(2, 2)) == expected

    def test_decreases_from_exact_to_type(self):
        assert EXACT > SUFFIX > REGEX > GLOB > TYPE > NO_MATCH

    PATTERNS = (QUERY, "query", r"re:.*self\.query", "*.query", "Linear")

    @pytest.mark.parametrize("stronger", range(len(PATTERNS)))
    def test_decides_between_target_and_ignore(self, stronger):
        """The more specific side wins; at equal specificity the layer is ignored."""
        model, _ = bert_sequence_classification()
        wanted = [self.PATTERNS[stronger], "key"]  # `key` keeps the choice from being empty
        for other, unwanted in enumerate(self.PATTERNS):
            assert (self.QUERY in find_targets(model, wanted, [unwanted]).chosen) == (stronger < other)

    def test_of_a_longer_end_of_a_name_is_higher(self):
        model, _ = bert_sequence_classification()
        wanted, unwanted = ["layer.0.attention.self.query", "key"], ["query"]
        assert self.QUERY in find_targets(model, wanted, unwanted).chosen
        assert self.QUERY not in find_targets(model, ["query", "key"], ["self.query"]).chosen

    def test_of_the_best_pattern_counts_whatever_the_order(self):
        model, _ = bert_sequence_classification()
        for patterns in (["Linear", self.QUERY], [self.QUERY, "Linear"]):
            assert self.QUERY in find_targets(model, patterns, ["*.query"]).chosen


class TestPatterns:
    def test_ignore_takes_layers_from_the_default(self):
        selection = find_targets(bert_sequence_classification()[0], ignore=["query", "*.layer.1.*"])
        assert list(selection.chosen) == [n for n in BERT_TARGETS if ".0." in n and not n.endswith("query")]
        assert [n for n, reason in selection.skipped.items() if reason == "in `ignore`"] == [
            n for n in BERT_TARGETS if n not in selection.chosen
        ]

    def test_layers_outside_target_modules_say_so(self):
        selection = find_targets(bert_sequence_classification()[0], ["query"])
        assert list(selection.chosen) == [n for n in BERT_TARGETS if n.endswith("query")]
        assert set(selection.skipped.values()) == {"not in `target_modules`"}
        assert len(selection.chosen) + len(selection.skipped) == len(BERT_TARGETS) + len(POOLED_HEAD)

    @pytest.mark.parametrize("pattern", ["classifier", "re:classif.*", "class*"])
    def test_a_head_asked_for_by_name_is_included(self, pattern):
        model, _ = bert_sequence_classification()
        assert find_targets(model, [pattern]).chosen == {"classifier": model.classifier}

    def test_a_pooler_asked_for_by_name_is_included(self):
        assert list(find_targets(bert_sequence_classification()[0], ["pooler.dense"]).chosen) == ["bert.pooler.dense"]

    def test_untied_output_embeddings_asked_for_by_name_are_included(self):
        model = llama(tied=False)[0]
        assert list(find_targets(model, ["lm_head"]).chosen) == ["lm_head"]

    def test_a_head_asked_for_by_type_alone_stays_dense(self):
        selection = find_targets(bert_sequence_classification()[0], ["Linear"])
        assert (list(selection.chosen), selection.skipped) == DEFAULTS["bert-sequence-classification"]

    def test_conv1d_is_chosen_by_its_type(self):
        assert list(find_targets(TINY_MODELS["gpt2"]()[0], ["Conv1D"]).chosen) == DEFAULTS["gpt2"][0]

    def test_the_type_conv2d_chooses_every_convolution(self):
        model, _ = TINY_MODELS["resnet"]()
        selection = find_targets(model, ["Conv2d"])
        assert selection.chosen == find_targets(model).chosen  # there is nothing else
        assert list(selection.chosen) == [n for n, m in model.named_modules() if type(m) is nn.Conv2d]
        assert len(selection.chosen) == 12
        assert selection.skipped == {"classifier.1": "not in `target_modules`"}


class TestRefusal:
    @pytest.mark.parametrize("pattern", ["lm_head", "re:lm.*", "lm_*", "*"])
    @pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
    def test_of_a_tied_weight(self, name, pattern):
        with pytest.raises(TargetError, match="'lm_head' shares its weight with another module"):
            find_targets(TINY_MODELS[name]()[0], [pattern])

    def test_of_a_weight_declared_as_tied_and_held_apart(self):
        """As while a model is being loaded or is offloaded; saving it would still keep only one of the two."""
        model, _ = llama()
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        assert find_targets(model).skipped == {"lm_head": "tied"}
        with pytest.raises(TargetError, match="'lm_head' shares its weight"):
            find_targets(model, ["lm_head"])

    def test_of_a_weight_that_is_another_modules_parameter_under_another_name(self):
        """The model goes on to use it there."""
        model, _ = bert_sequence_classification()
        model.register_parameter("prototypes", model.bert.encoder.layer[0].output.dense.weight)
        assert find_targets(model).skipped["bert.encoder.layer.0.output.dense"] == "tied"
        with pytest.raises(TargetError, match="shares its weight"):
            find_targets(model, ["bert.encoder.layer.0.output.dense"])

    @pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
    def test_of_a_weight_that_is_computed_from_others(self):
        model, _ = bert_sequence_classification()
        name = "bert.encoder.layer.0.output.dense"
        nn.utils.weight_norm(model.get_submodule(name))
        assert name not in find_targets(model).chosen
        with pytest.raises(TargetError, match="matches no layer"):
            find_targets(model, [name])

    def test_of_layers_whose_weights_are_read_instead_of_calling_them(self):
        """An encoder layer of torch does so without gradients, and would read a guard."""
        model, _ = bert_sequence_classification()
        model.bert.more = nn.TransformerEncoderLayer(32, 4, 48)
        chosen = find_targets(model).chosen
        assert "bert.encoder.layer.0.output.dense" in chosen
        assert not any(name.startswith("bert.more") for name in chosen)

    def test_of_a_weight_shared_without_a_declaration(self):
        model, _ = bert_sequence_classification()
        model.bert.encoder.layer[1].output.dense.weight = model.bert.encoder.layer[0].output.dense.weight
        shared = [f"bert.encoder.layer.{i}.output.dense" for i in (0, 1)]
        selection = find_targets(model)
        assert {n for n, reason in selection.skipped.items() if reason == "tied"} == set(shared)
        with pytest.raises(TargetError, match="shares its weight"):
            find_targets(model, [shared[0]])

    @pytest.mark.parametrize("option", ["target_modules", "ignore"])
    def test_of_a_pattern_without_match_names_near_ones(self, option):
        with pytest.raises(TargetError, match=f"{option}: 'querry' matches no layer; nearest: 'query'"):
            find_targets(bert_sequence_classification()[0], **{option: ["querry"]})

    def test_of_a_pattern_like_nothing_lists_the_layers(self):
        with pytest.raises(TargetError, match=r"'zzz' matches no layer; layers here: .*down_proj.*q_proj"):
            find_targets(llama()[0], ["q_proj", "zzz"])

    def test_of_a_pattern_that_matches_only_layers_of_other_kinds(self):
        with pytest.raises(TargetError, match="'LayerNorm' matches no layer"):
            find_targets(bert_sequence_classification()[0], ignore=["LayerNorm"])

    @pytest.mark.parametrize("option", ["target_modules", "ignore"])
    def test_of_an_invalid_regular_expression(self, option):
        with pytest.raises(TargetError, match=r"'re:\(query' is no valid regular expression: missing \)"):
            find_targets(bert_sequence_classification()[0], **{option: ["re:(query"]})

    def test_of_a_frozen_layer(self):
        model, _ = bert_sequence_classification()
        model.bert.encoder.layer[1].requires_grad_(False)
        with pytest.raises(TargetError, match=r"'bert.encoder.layer.1.attention.self.query' is frozen .*ignore"):
            find_targets(model)
        assert list(find_targets(model, ignore=["*.layer.1.*"]).chosen) == BERT_TARGETS[:6]

    def test_of_a_model_on_the_meta_device(self):
        model = bert_sequence_classification()[0].to("meta")
        with pytest.raises(TargetError, match=r"query' is on the meta device .*load the weights"):
            find_targets(model)

    def test_of_a_quantized_layer(self):
        model, _ = bert_sequence_classification()
        model.bert.encoder.layer[0].intermediate.dense = Linear4bit(32, 48)
        with pytest.raises(TargetError, match=r"intermediate.dense' is quantized \(Linear4bit, torch.uint8\)"):
            find_targets(model)
        remaining = find_targets(model, ignore=["Linear4bit"]).chosen
        assert list(remaining) == [n for n in BERT_TARGETS if n != "bert.encoder.layer.0.intermediate.dense"]

    def test_of_a_compressed_model(self):
        model, _ = bert_sequence_classification()
        model.bert.encoder.layer[0].output.dense = FactorizedLinear(48, 32, 4)
        with pytest.raises(TargetError, match=r"already compressed; call `dequantize\(\)`"):
            find_targets(model)

    def test_of_a_compressed_model_does_not_end_with_its_undoing(self):
        model, _ = bert_sequence_classification()
        model.bert.encoder.layer[0].output.dense = nn.Linear(48, 32)
        assert not any(is_factorized(module) for module in model.modules())
        assert list(find_targets(model).chosen) == BERT_TARGETS

    def test_of_ignoring_everything(self):
        with pytest.raises(TargetError, match=r"is left to factorize; skipped: .*\(in `ignore`\).* …"):
            find_targets(bert_sequence_classification()[0], ignore=["*"])

    def test_of_an_empty_list_of_targets_says_so(self):
        with pytest.raises(TargetError, match=r"query \(not in `target_modules`\)"):
            find_targets(bert_sequence_classification()[0], [])

    def test_of_a_model_without_any_layer(self):
        with pytest.raises(
            TargetError, match=r"Lookup has no layer that can be factorized \(Conv1d, Conv2d, Linear, Conv1D"
        ):
            find_targets(Lookup(BertConfig()))


class Linear4bit(nn.Linear):
    """Holds its weight as bitsandbytes does: packed bytes in a parameter of its own shape."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        packed = torch.zeros(in_features * out_features // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


class Lookup(PreTrainedModel):
    """A model that only looks words up."""

    config_class = BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(3, 2)


class TestMultiheadAttention:
    """`nn.MultiheadAttention` reads the weight of its `out_proj` as a tensor, so that layer must stay as it is."""

    @pytest.fixture
    def model(self):
        model, _ = bert_sequence_classification()
        model.bert.encoder.layer[0].extra = nn.MultiheadAttention(32, 4)
        return model

    def test_is_left_alone(self, model):
        assert find_targets(model).chosen.keys() == dict.fromkeys(BERT_TARGETS).keys()

    def test_cannot_be_asked_for(self, model):
        with pytest.raises(TargetError, match=r"skipped: .*out_proj \(MultiheadAttention reads its weight instead of"):
            find_targets(model, ["out_proj"])


def test_a_layer_under_two_names_appears_once():
    model, _ = bert_sequence_classification()
    model.bert.encoder.layer[1] = model.bert.encoder.layer[0]
    selection = find_targets(model)
    assert list(selection.chosen) == BERT_TARGETS[:6]
    assert "tied" not in selection.skipped.values()


HOOKS = {
    "a forward hook": lambda layer: layer.register_forward_hook(lambda module, args, output: 2 * output),
    "a hook before it": lambda layer: layer.register_forward_pre_hook(lambda module, args: None),
    "a backward hook": lambda layer: layer.register_full_backward_hook(lambda module, *gradients: None),
    "a forward of its own": lambda layer: setattr(layer, "forward", lambda x: x),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_a_layer_that_something_hangs_on_stays_as_it_is(hook):
    """What takes its place would be called without it."""
    model, _ = bert_sequence_classification()
    HOOKS[hook](model.get_submodule(BERT_TARGETS[3]))
    found = find_targets(model)
    assert list(found.chosen) == [name for name in BERT_TARGETS if name != BERT_TARGETS[3]]
    assert found.skipped[BERT_TARGETS[3]].startswith("something hangs on it")
