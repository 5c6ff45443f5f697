"""Content digests: the same for the same content, whatever holds it, and else another."""

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_models import TINY_MODELS, llama
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel

from hf_lossless_lr.fingerprint import architecture_fingerprint, as_array, content_digest

NUMBERS = [[1, 2, 3], [4, 5, 6]]
FRACTIONS = [[0.5, -1.25], [3.0, 1e-3]]
PICTURE = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)

# the same integers, fractions, pixels, rows of several lengths, and examples
SAME = {
    "integers": [
        NUMBERS,
        tuple(map(tuple, NUMBERS)),
        [torch.tensor(row) for row in NUMBERS],
        [np.array(row) for row in NUMBERS],
        *(torch.tensor(NUMBERS, dtype=dtype) for dtype in (torch.int64, torch.int32, torch.uint8)),
        *(np.array(NUMBERS, dtype=dtype) for dtype in (np.int64, np.int16, np.uint8)),
        np.asfortranarray(NUMBERS),
        torch.tensor(NUMBERS).T.contiguous().T,
    ],
    "truth values": [[True, False], [1, 0], torch.tensor([True, False]), np.array([1, 0])],
    "fractions": [
        FRACTIONS,
        torch.tensor(FRACTIONS),
        torch.tensor(FRACTIONS, requires_grad=True),
        np.array(FRACTIONS),
        np.array(FRACTIONS, dtype=np.float32),
        [torch.tensor(row) for row in FRACTIONS],
    ],
    "fractions of few bits": [
        [0.5, 1.5],
        *(torch.tensor([0.5, 1.5], dtype=dtype) for dtype in (torch.half, torch.bfloat16)),
        [torch.tensor(number, dtype=torch.bfloat16) for number in (0.5, 1.5)],
    ],
    "a picture": [Image.fromarray(PICTURE), PICTURE, torch.from_numpy(PICTURE), PICTURE.tolist()],
    "rows of several lengths": [
        [[1, 2], [3]],
        ((1, 2), (3,)),
        [torch.tensor([1, 2]), torch.tensor([3])],
        [np.array([1, 2], dtype=np.int32), np.array([3])],
    ],
    "texts": [["a", "b"], ("a", "b"), np.array(["a", "b"]), np.array(["a", "b"], dtype=object)],
    "a number": [7, np.int64(7), torch.tensor(7), np.array(7)],
    "nothing": [[], (), np.array([]), torch.tensor([])],
    "an example": [{"a": [1, 2], "b": "x"}, {"b": "x", "a": torch.tensor([1, 2])}],
}

OTHER = [
    (NUMBERS, [[1, 2, 3], [4, 5, 7]]),
    (NUMBERS, [[4, 5, 6], [1, 2, 3]]),
    (NUMBERS, [[1, 2, 3, 4, 5, 6]]),
    (NUMBERS, [[1, 2], [3, 4], [5, 6]]),
    (NUMBERS, [*NUMBERS, []]),
    ([[1, 2], [3]], [[1], [2, 3]]),
    ([[1, 2], [3]], [1, 2, 3]),
    ([1, 2], [2, 1]),
    ([0.5, 0.25], [0.5, 0.251]),
    ([1], [-1]),
    (1, [1]),
    (10**30, 10**30 + 1),  # as large as no array can hold
    ({"a": 1, "b": 2}, {"a": 2, "b": 1}),
    ({"a": 1}, {"b": 1}),
    ({"a": "bc"}, {"ab": "c"}),
    ({"a": 1}, {"a": 1, "b": 1}),
    ("ab", "ba"),
    (["ab", "c"], ["a", "bc"]),
    (["a", "b"], ["ab"]),
    ([{"a": 1}, {"a": 2}], [{"a": 2}, {"a": 1}]),
    (["a", 1], ["a", 2]),
    (["a", None], ["a", "b"]),
    (Image.fromarray(PICTURE), Image.fromarray(PICTURE[::-1].copy())),
    (np.array(["a", "b"], dtype=object), np.array(["b", "a"], dtype=object)),
]


class TestContentDigest:
    @pytest.mark.parametrize("what", SAME)
    def test_is_the_same_whatever_holds_the_content(self, what):
        assert len({content_digest(value) for value in SAME[what]}) == 1

    def test_of_all_these_are_different(self):
        assert len({content_digest(values[0]) for values in SAME.values()}) == len(SAME)

    @pytest.mark.parametrize(("value", "other"), OTHER)
    def test_is_another_for_other_content(self, value, other):
        assert content_digest(value) != content_digest(other)

    def test_has_64_hexadecimal_digits(self):
        assert len(content_digest("a")) == 64
        assert int(content_digest("a"), 16) > 0

    def test_is_the_same_tomorrow(self):
        """It is stored in reports."""
        example = {"input_ids": [5, 6], "pixel_values": [[0.5, 1.0]], "words": ["a", "bc"]}
        assert content_digest(example) == "3c89cf1309ed6a8165dfdfd3bb7bd9b2704b6a28af39fb1e92c13af130eea737"


class TestAsArray:
    @pytest.mark.parametrize("value", SAME["integers"] + SAME["truth values"])
    def test_has_integers_in_64_bits(self, value):
        assert as_array(value).dtype == np.int64
        assert as_array(value).tolist() in (NUMBERS, [1, 0])

    @pytest.mark.parametrize("value", SAME["fractions"])
    def test_has_fractions_in_single_precision(self, value):
        assert as_array(value).dtype == np.float32
        assert as_array(value).tolist() == torch.tensor(FRACTIONS).tolist()

    @pytest.mark.parametrize("value", [*SAME["rows of several lengths"], "text", ["text"], None, [1, None], {"a": 1}])
    def test_is_none_of_what_is_no_regular_array_of_numbers(self, value):
        assert as_array(value) is None


class TestAnArchitecture:
    def test_is_what_answers_depend_on_besides_weights(self):
        first, second = (architecture_fingerprint(llama(seed=seed)[0]) for seed in range(2))
        assert first == second
        for name, value in (("hidden_act", "gelu"), ("rms_norm_eps", 0.1), ("num_attention_heads", 2)):
            model = llama()[0]
            setattr(model.config, name, value)
            assert architecture_fingerprint(model) != first, name

    def test_is_not_what_only_names_or_remembers(self):
        model = llama()[0]
        before = architecture_fingerprint(model)
        model.config.id2label = {0: "no", 1: "yes"}
        model.config.problem_type, model.config.use_cache = "multi_label_classification", False
        model.config._name_or_path = "elsewhere"
        assert architecture_fingerprint(model) == before

    @pytest.mark.parametrize(("labels", "fills_in"), [(1, {"regression"}), (3, {"single_label", "multi_label"})])
    def test_is_another_where_the_loss_is_another(self, labels, fills_in):
        """The loss itself fills in what it is, by the labels."""
        model = TINY_MODELS["bert-sequence-classification"]()[0]
        model.config.num_labels = labels
        plain = architecture_fingerprint(model)
        for kind in ("regression", "single_label", "multi_label"):
            model.config.problem_type = kind if kind == "regression" else f"{kind}_classification"
            assert (architecture_fingerprint(model) == plain) == (kind in fills_in), kind

    def test_has_the_parts_of_a_configuration(self):
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        acts = [sizes | {"hidden_act": act} for act in ("gelu", "relu")]
        configs = [CLIPConfig(text_config=sizes, vision_config=vision) for vision in acts]
        one, other = (architecture_fingerprint(CLIPModel(config)) for config in configs)
        assert one != other
        assert architecture_fingerprint(CLIPVisionModel(configs[0].vision_config)) != one
