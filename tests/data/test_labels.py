"""What labels mean: their names, the labelled units behind a loss, and the correct answers, for each kind of head."""

from types import SimpleNamespace

import pytest
import torch
from support.tiny_models import IGNORED, TINY_MODELS, build, generator, rows, split_batch
from torch import tensor

from hf_lossless_lr.data.labels import (
    batch_examples,
    check_labels,
    correct_predictions,
    label_names,
    read_labels,
    takes_labels,
)
from hf_lossless_lr.errors import ConfigurationError, DataError

LOSS_RTOL = 1e-5  # float32 forward passes of one example against those of the whole batch
N = IGNORED

WORDS = torch.zeros(2, 4, dtype=torch.long)


def one_hot(answers, classes=3):
    """Logits whose arg max is `answers`."""
    return torch.nn.functional.one_hot(tensor(answers), classes).float()


def head(name):
    return TINY_MODELS[name]()[0]


class TestLabelNames:
    @pytest.mark.parametrize("name", [n for n in TINY_MODELS if n != "bert-question-answering"])
    def test_are_labels_for_most_heads(self, name):
        assert label_names(head(name)) == ["labels"]

    def test_are_two_positions_for_question_answering(self):
        assert label_names(head("bert-question-answering")) == ["start_positions", "end_positions"]

    def test_leave_out_the_next_sentence_of_pretraining(self):
        options = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        assert label_names(build("BertForPreTraining", "BertConfig", **options)) == ["labels"]

    def test_default_to_labels_for_a_model_without_any(self):
        model = head("bert-sequence-classification").bert
        assert label_names(model) == ["labels"]
        assert not takes_labels(model)

    @pytest.mark.parametrize(("task", "name"), [("Prediction", "future_values"), ("Classification", "target_values")])
    def test_are_the_targets_of_time_series(self, task, name):
        options = {"d_model": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "ffn_dim": 8}
        model = build(f"PatchTSTFor{task}", "PatchTSTConfig", **options)
        assert label_names(model) == [name]
        assert takes_labels(model)
        assert not takes_labels(model.model)  # where they are inputs, if anything


# tiny model, its labels, the units in them counted by hand
UNITS = [
    ("bert-sequence-classification", {"labels": tensor([2, 0])}, 2),
    ("bert-sequence-classification", {"labels": tensor([0.5, 1.5])}, 2),  # regression
    ("bert-sequence-classification", {"labels": tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])}, 2),  # multi-label
    ("bert-sequence-classification", {"labels": tensor([2, N, 1])}, 2),  # the loss leaves that example out
    ("bert-multiple-choice", {"labels": tensor([2, 0])}, 2),
    ("bert-question-answering", {"start_positions": tensor([0, 1]), "end_positions": tensor([1, 1])}, 2),
    ("bert-token-classification", {"labels": tensor([[N, 1, 2, N], [N, 0, N, N]])}, 3),
    ("bert-token-classification", {"labels": tensor([[0, 1, 2, 1], [0, 0, 2, 2]])}, 8),
    ("bert-masked-lm", {"labels": tensor([[N, N, 5, N], [7, N, N, N]])}, 2),
    ("llama", {"labels": tensor([[5, 6, 7, 8], [5, 6, N, N]])}, 4),  # the first token is never predicted
    ("llama", {"labels": tensor([[N, N, 7, 8], [5, N, N, N]])}, 2),
    ("gpt2", {"labels": tensor([[5, 6, 7, 8], [5, 6, N, N]])}, 4),
    ("t5", {"labels": tensor([[5, 6, 7, 8], [5, 6, N, N]])}, 6),  # a decoder sees its targets shifted already
    ("vit", {"labels": tensor([2, 0])}, 2),
    ("llama", {"labels": tensor([[5, N, N, N], [N, N, N, N]])}, 0),
]


# decoders of encoder-decoders, as language models of their own
DECODERS = [
    *("Bart", "BigBirdPegasus", "Blenderbot", "BlenderbotSmall", "MBart", "Marian", "Mvp", "PLBart", "Pegasus"),
    *("ProphetNet", "TrOCR", "Whisper"),
]


def decoder(name):
    sizes = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    prophet = {"hidden_size": 32, "num_decoder_layers": 1, "num_decoder_attention_heads": 4, "ngram": 1}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    options = {"vocab_size": 61, "init_std": 0.2, **special, **(prophet if name == "ProphetNet" else sizes)}
    return build(f"{name}ForCausalLM", f"{name}Config", **options)


def speech(reduction):
    """A CTC head, six recordings and their transcripts, one as long as the frames that the head sees."""
    model = build(
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        vocab_size=12,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=(16, 16),
        conv_stride=(4, 2),
        conv_kernel=(8, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        ctc_loss_reduction=reduction,
    )
    labels = (torch.arange(6 * 39).view(6, 39) % 11 + 1).where(torch.arange(39) < 3 + torch.arange(6)[:, None] ** 2, N)
    return model, {"input_values": torch.randn(6, 320, generator=generator(0)), "labels": labels}


def reading(model, batch):
    """What the labels of a batch ask, by the model's own answer."""
    with torch.no_grad():
        outputs = model(**batch)
    return read_labels(model, batch, outputs, outputs.loss)


def cross_entropy(name, labels, logits):
    """The loss of a head, written out."""
    if name in ("llama", "gpt2"):
        labels, logits = labels[..., 1:], logits[..., :-1, :]
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


def read(name, labels, logits=None, **more):
    """The reading of labels by themselves, with a loss that is the cross-entropy of the logits where it can be."""
    logits = torch.rand(*labels.shape, 11, generator=generator(0)) if logits is None else logits
    whole = not labels.is_floating_point() and logits.shape[:-1] == labels.shape and logits.shape[-1] > 1
    loss = cross_entropy(name, labels, logits) if whole else tensor(1.0)
    return read_labels(head(name), {"labels": labels, **more}, SimpleNamespace(logits=logits), loss)


class TestUnits:
    @pytest.mark.parametrize(("name", "labels", "units"), [case for case in UNITS if "labels" in case[1]])
    def test_are_counted(self, name, labels, units):
        assert read(name, **labels).units == units

    def test_of_a_span_are_its_examples(self):
        model, batch = TINY_MODELS["bert-question-answering"]()
        assert reading(model, batch).units == 6

    @pytest.mark.parametrize("name", DECODERS)
    def test_of_a_decoder_alone_are_not_shifted(self, name):
        """Transformers lists these with the causal models; their loss compares each position with its own label."""
        model, batch = decoder(name), TINY_MODELS["llama"]()[1]
        found = reading(model, batch)
        (question,) = found.questions
        expected = torch.nn.functional.cross_entropy(question.logits, question.labels)
        torch.testing.assert_close(model(**batch).loss, expected, rtol=LOSS_RTOL, atol=0.0)
        assert found.units == int((batch["labels"] != N).sum())

    @pytest.mark.parametrize("name", TINY_MODELS)
    def test_are_what_the_loss_averages_over(self, name):
        """Loss times units is a sum: the batch's is the sum of its examples'."""
        model, batch = TINY_MODELS[name]()
        with torch.no_grad():
            whole = model(**batch).loss * reading(model, batch).units
            parts = sum(model(**one).loss * reading(model, one).units for one in split_batch(batch, 1))
        torch.testing.assert_close(whole, parts, rtol=LOSS_RTOL, atol=0.0)

    def test_of_transcripts_are_what_the_loss_averages_over(self):
        """The loss of each example is divided by the length of its transcript; the batch's is their mean."""
        model, batch = speech("mean")
        assert (reading(model, batch).units, reading(model, batch).questions) == (6, [])
        with torch.no_grad():
            outputs = model(**batch)
            parts = sum(model(**one).loss * reading(model, one).units for one in split_batch(batch, 1))
        torch.testing.assert_close(6 * outputs.loss, parts, rtol=LOSS_RTOL, atol=0.0)
        assert outputs.logits.shape[:2] == batch["labels"].shape

    def test_of_a_summed_loss_are_an_error(self):
        model, batch = speech("sum")
        with pytest.raises(ConfigurationError, match=r'Wav2Vec2ForCTC sums .* Set model.config.ctc_loss.* = "mean"'):
            check_labels(model, batch)

    def test_are_what_the_loss_of_partly_labelled_examples_averages_over(self):
        model, batch = TINY_MODELS["bert-sequence-classification"]()
        batch["labels"][1::2] = N
        with torch.no_grad():
            loss = model(**batch).loss
            each = torch.nn.functional.cross_entropy(model(**batch).logits, batch["labels"], reduction="sum")
        assert reading(model, batch).units == 3
        torch.testing.assert_close(3 * loss, each, rtol=LOSS_RTOL, atol=0.0)

    @pytest.mark.parametrize("name", TINY_MODELS)
    def test_of_data_without_labels_is_an_error(self, name):
        model, batch = TINY_MODELS[name]()
        unlabelled = {k: v for k, v in batch.items() if k not in label_names(model)}
        expected = " or ".join(label_names(model))
        columns = ", ".join(unlabelled)
        with pytest.raises(
            DataError, match=f"no labels: {type(model).__name__} takes {expected}, the batch has {columns}"
        ):
            check_labels(model, unlabelled)

    def test_of_a_model_that_takes_none_says_what_it_takes(self):
        body = head("bert-sequence-classification").bert
        with pytest.raises(
            DataError, match=r"^BertModel takes no labels, and a model is judged by its loss on labelled"
        ):
            check_labels(body, {"input_ids": WORDS})

    def test_of_labels_that_are_none_is_an_error(self):
        with pytest.raises(DataError, match="labels=input_ids"):
            check_labels(head("llama"), {"input_ids": WORDS, "labels": None})


class Shifting(torch.nn.Module):
    """A head's loss in place of the model's own: of its logits and labels, as `loss` takes them."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss, self.config = model, loss, model.config

    def forward(self, labels, **inputs):
        logits = self.model(**inputs).logits
        return SimpleNamespace(logits=logits, loss=self.loss(logits, labels))


def weighted(logits, labels):
    weight = torch.logspace(-2, 1, logits.shape[-1])
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), weight)


def smoothed_and_shifted(logits, labels):
    target = labels[..., 1:].flatten()
    return torch.nn.functional.cross_entropy(logits[..., :-1, :].flatten(0, -2), target, label_smoothing=0.4)


def of_states(logits, labels):
    """No loss of classes at all."""
    return (logits - logits.mean()).square().mean()


class TestAlignment:
    """Which logits answer to which labels is measured: the name of a class says nothing."""

    def test_of_a_users_own_causal_model_is_that_of_its_loss(self):
        model, batch = TINY_MODELS["llama"]()
        own = type("MyLM", (type(model),), {})(model.config)
        own.load_state_dict(model.state_dict())
        stranger = Shifting(model, lambda logits, labels: cross_entropy("llama", labels, logits))
        for other in (own, stranger):
            found, expected = reading(other, batch), reading(model, batch)
            assert found.units == expected.units == int((batch["labels"][:, 1:] != N).sum())
            assert torch.equal(found.questions[0].labels, expected.questions[0].labels)
            assert torch.equal(found.questions[0].logits, expected.questions[0].logits)

    def test_of_a_causal_model_that_does_not_shift_is_its_own_position(self):
        model, batch = TINY_MODELS["llama"]()
        tagger = Shifting(model, lambda logits, labels: cross_entropy("bert-token-classification", labels, logits))
        found = reading(tagger, batch)
        assert found.units == int((batch["labels"] != N).sum())
        assert torch.equal(found.questions[0].labels, batch["labels"][batch["labels"] != N])

    def test_is_found_beside_what_balances_a_router(self):
        options = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
        sizes = {"num_hidden_layers": 2, "num_local_experts": 4, "vocab_size": 61, "initializer_range": 0.2}
        router = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
        model, batch = build("MixtralForCausalLM", "MixtralConfig", **options, **sizes, **router), text_batch()
        with torch.no_grad():
            outputs = model(**batch)
        assert outputs.aux_loss * 0.5 > 0.1 * outputs.loss
        found = read_labels(model, batch, outputs, outputs.loss)
        assert (found.units, found.explained) == (int((batch["labels"][:, 1:] != N).sum()), True)

    @pytest.mark.parametrize("graph", [False, True])
    @pytest.mark.parametrize(("loss", "shift"), [(weighted, 0), (smoothed_and_shifted, 1)])
    def test_of_a_loss_that_is_no_plain_cross_entropy_is_that_of_its_gradient(self, loss, shift, graph):
        model, batch = TINY_MODELS["bert-token-classification"]()
        odd = Shifting(model, loss)
        with torch.set_grad_enabled(graph):
            outputs = odd(**batch)
            found = read_labels(odd, batch, outputs, outputs.loss)
        assert found.explained
        assert found.units == int((batch["labels"][:, shift:] != N).sum())
        assert torch.equal(found.questions[0].labels, batch["labels"][:, shift:][batch["labels"][:, shift:] != N])
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())

    def test_is_not_asked_for_where_it_is_known(self):
        """From a model of the same class: a loss of several tokens may show another one for another model."""
        model, batch = TINY_MODELS["llama"]()
        with torch.no_grad():
            outputs = model(**batch)
        for shift in (0, 1):
            found = read_labels(model, batch, outputs, outputs.loss, known=shift)
            assert found.shift == shift
            assert found.units == int((batch["labels"][:, shift:] != N).sum())
        assert read_labels(model, batch, outputs, outputs.loss).shift == 1

    def test_that_is_none_leaves_no_accuracy_and_says_so(self):
        model, batch = TINY_MODELS["bert-token-classification"]()
        found = reading(Shifting(model, of_states), batch)
        assert (found.questions, found.explained) == ([], False)
        assert found.units == int((batch["labels"] != N).sum())

    @pytest.mark.parametrize("graph", [False, True])
    def test_is_none_where_the_loss_is_of_other_logits_than_the_model_returns(self, graph):
        model, batch = TINY_MODELS["bert-token-classification"]()
        odd = Shifting(model, lambda logits, labels: model.classifier.bias.square().sum())
        with torch.set_grad_enabled(graph):
            outputs = odd(**batch)
            found = read_labels(odd, batch, outputs, outputs.loss)
        assert (found.questions, found.explained) == ([], False)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert-masked-lm", "bert-token-classification"])
    def test_is_that_of_every_batch(self, name, dtype):
        model, batch = TINY_MODELS[name](12)
        model.to(dtype)
        shift = name in ("llama", "gpt2")
        for part in split_batch(batch, 1):
            assert reading(model, part).units == int((part["labels"][:, shift:] != N).sum())


def text_batch():
    batch = TINY_MODELS["llama"]()[1]
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}


class TestBatchExamples:
    @pytest.mark.parametrize("name", TINY_MODELS)
    def test_is_the_length_of_the_batch(self, name):
        _, batch = TINY_MODELS[name]()
        assert batch_examples(batch) == 6
        assert batch_examples(rows(batch, slice(0, 1))) == 1

    def test_looks_past_values_that_are_no_tensors(self):
        assert batch_examples({"return_dict": True, "input_ids": WORDS}) == 2


# tiny model, labels, the answers in the logits, which of the labelled units are right, and in which example they are
CORRECT = [
    ("bert-sequence-classification", [2, 0, 1], [2, 1, 1], [1, 0, 1], [0, 1, 2]),
    ("bert-sequence-classification", [2, N, 1], [2, 1, 0], [1, 0], [0, 2]),
    ("bert-multiple-choice", [2, 0, 1], [2, 0, 1], [1, 1, 1], [0, 1, 2]),
    ("bert-token-classification", [[N, 1, 2, N], [N, 0, N, N]], [[0, 1, 0, 0], [0, 0, 0, 0]], [1, 0, 1], [0, 0, 1]),
    ("bert-masked-lm", [[N, N, 1, N], [2, N, N, N]], [[0, 0, 1, 0], [1, 0, 0, 0]], [1, 0], [0, 1]),
    ("bert-masked-lm", [[N, N, N, N], [2, N, N, 0]], [[0, 0, 1, 0], [1, 0, 0, 0]], [0, 1], [1, 1]),
    # token t is answered at position t - 1; the last position answers nothing
    ("llama", [[0, 1, 2, 0], [0, 2, N, N]], [[1, 2, 0, 0], [2, 0, 0, 0]], [1, 1, 1, 1], [0, 0, 0, 1]),
    ("llama", [[0, 1, 2, 0], [0, 2, N, N]], [[0, 1, 2, 0], [0, 2, 0, 0]], [0, 0, 0, 0], [0, 0, 0, 1]),
    ("gpt2", [[0, 1, 2, 0], [0, 2, N, N]], [[1, 2, 1, 1], [2, 0, 0, 0]], [1, 1, 0, 1], [0, 0, 0, 1]),
    ("t5", [[0, 1, 2, 0], [0, 2, N, N]], [[0, 1, 2, 0], [1, 2, 0, 0]], [1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 1, 1]),
    ("resnet", [2, 0, 1], [0, 0, 1], [0, 1, 1], [0, 1, 2]),
]


def asked_of(name, batch, **outputs):
    if "labels" in batch and outputs.get("logits") is not None:
        return read(name, batch["labels"], outputs["logits"]).questions
    return read_labels(head(name), batch, SimpleNamespace(**outputs), tensor(1.0)).questions


class TestQuestions:
    @pytest.mark.parametrize(("name", "labels", "answers", "right", "examples"), CORRECT)
    def test_of_a_head_are_one_with_the_logits_and_labels_of_its_labelled_units(
        self, name, labels, answers, right, examples
    ):
        (question,) = asked_of(name, {"labels": tensor(labels)}, logits=one_hot(answers))
        assert question.examples.tolist() == examples
        shifted = name in ("llama", "gpt2")
        pairs = [
            (answer, label)
            for row_answers, row_labels in zip(*(torch.atleast_2d(tensor(x)) for x in (answers, labels)), strict=True)
            for answer, label in zip(row_answers[: -1 if shifted else None], row_labels[shifted:], strict=True)
            if label != N
        ]
        assert question.logits.tolist() == one_hot([int(answer) for answer, _ in pairs]).tolist()
        assert question.labels.tolist() == [int(label) for _, label in pairs]

    def test_of_a_span_are_its_start_and_its_end(self):
        batch = {"start_positions": tensor([0, 1, 2]), "end_positions": tensor([1, 2, 2])}
        outputs = {"start_logits": torch.rand(3, 5), "end_logits": torch.rand(3, 5)}
        asked = asked_of("bert-question-answering", batch, **outputs)
        for question, end in zip(asked, ("start", "end"), strict=True):
            assert torch.equal(question.logits, outputs[f"{end}_logits"])
            assert torch.equal(question.labels, batch[f"{end}_positions"])
            assert question.examples.tolist() == [0, 1, 2]

    @pytest.mark.parametrize("name", TINY_MODELS)
    def test_have_as_many_units_as_the_loss(self, name):
        model, batch = TINY_MODELS[name]()
        asked = reading(model, batch).questions
        assert len(asked) == (2 if name == "bert-question-answering" else 1)
        for question in asked:
            units = reading(model, batch).units
            assert len(question.logits) == len(question.labels) == len(question.examples) == units
            assert question.examples.tolist() == sorted(question.examples.tolist())
            assert set(question.examples.tolist()) <= set(range(batch_examples(batch)))

    @pytest.mark.parametrize(
        ("labels", "logits"),
        [
            (tensor([0.5, 1.5]), torch.zeros(2, 1)),  # regression
            (tensor([1, 0]), torch.zeros(2, 1)),  # a single output has no arg max to speak of
            (tensor([[1.0, 0.0, 1.0]]), torch.zeros(1, 3)),  # multi-label
            (tensor([1, 0]), None),
            (tensor([1, 0]), torch.zeros(2, 4, 3)),  # token logits, example labels
            (tensor([[1, 0]]), torch.zeros(1, 5, 3)),  # logits for other tokens than the labels
        ],
    )
    def test_are_none_where_accuracy_means_nothing(self, labels, logits):
        assert asked_of("bert-sequence-classification", {"labels": labels}, logits=logits) == []

    def test_are_none_without_logits(self):
        assert asked_of("bert-sequence-classification", {"labels": tensor([1, 0])}) == []


class TestCorrectPredictions:
    @pytest.mark.parametrize(("name", "labels", "answers", "right", "examples"), CORRECT)
    def test_are_told_for_each_labelled_unit(self, name, labels, answers, right, examples):
        found = correct_predictions(asked_of(name, {"labels": tensor(labels)}, logits=one_hot(answers)))
        assert found.dtype == torch.bool
        assert found.tolist() == [bool(answer) for answer in right]

    def test_of_a_span_need_both_ends_right(self):
        batch = {"start_positions": tensor([0, 1, 2, 1]), "end_positions": tensor([1, 2, 2, 1])}
        outputs = {"start_logits": one_hot([0, 1, 2, 0]), "end_logits": one_hot([1, 0, 2, 0])}
        asked = asked_of("bert-question-answering", batch, **outputs)
        assert correct_predictions(asked).tolist() == [True, False, True, False]

    @pytest.mark.parametrize("name", ["llama", "bert-masked-lm", "t5", "vit"])
    def test_add_up_over_batches(self, name):
        model, batch = TINY_MODELS[name](24)
        whole = correct_predictions(reading(model, batch).questions)
        parts = [correct_predictions(reading(model, part).questions) for part in split_batch(batch, 5)]
        assert whole.tolist() == torch.cat(parts).tolist()
