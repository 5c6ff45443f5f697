"""Perplexity: the blocks of the text, the loss of each token against a slow oracle, and what is refused."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from support.tiny_models import build, gpt2, llama
from support.tolerances import FLOAT32, ROUNDING
from support.word_tokenizer import CLS, SEP, WORDS, word_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lossless_lr import DataError, NumericalError, verify
from hf_lossless_lr.evaluation.language_modeling import C4, WIKITEXT2, Passage, language_modeling, log_likelihoods
from hf_lossless_lr.evaluation.scores import compare
from hf_lossless_lr.evaluation.task import ScoringOptions

LENGTH = 7
MODELS = {"llama": llama, "gpt2": gpt2}


def texts(rows=12, seed=0):
    """Rows of a few words each, some of them empty, as WikiText has them."""
    drawn = np.random.default_rng(seed)
    lines = [" ".join(drawn.choice(WORDS, drawn.integers(0, 9))) for _ in range(rows)]
    return Dataset.from_dict({"text": ["", *lines]})


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()[0].double()


def token_loss(model, before, token):
    """Loss of one token after some, in float64 and alone."""
    with torch.no_grad():
        logits = model(torch.tensor([before])).logits[0, -1].double()
    return float(logits.logsumexp(0) - logits[token])


def slow_perplexity(model, dataset, tokenizer, length):
    """`exp(mean loss)` by an explicit loop over blocks, and over tokens in each."""
    tokens = tokenizer("\n\n".join(dataset["text"]))["input_ids"]
    total, count = 0.0, 0
    for start in range(0, len(tokens), length):
        block = tokens[start : start + length]
        if len(block) == length:
            for place in range(1, length):
                total += token_loss(model, block[:place], block[place])
                count += 1
    return math.exp(total / count)


class TestPerplexity:
    def test_is_that_of_a_loop_over_blocks_and_tokens(self, model):
        scores = WIKITEXT2.score(model, texts(), word_tokenizer(), ScoringOptions(3, LENGTH))
        expected = slow_perplexity(model, texts(), word_tokenizer(), LENGTH)
        values = scores.values()
        assert values["perplexity"][0] == pytest.approx(expected, rel=1e-6)
        assert values["loss"][0] == pytest.approx(math.log(expected), rel=1e-6)
        assert list(values) == ["perplexity", "loss"]
        assert not any(metric.higher_is_better for metric in scores.metrics)

    def test_is_that_of_the_loss_of_the_model_itself(self, model):
        scores = WIKITEXT2.score(model, texts(), word_tokenizer(), ScoringOptions(2, LENGTH))
        examples = WIKITEXT2.prepare(texts(), word_tokenizer(), LENGTH)
        batch = WIKITEXT2.collator(word_tokenizer())(list(examples))
        with torch.no_grad():
            loss = float(model(**batch).loss)
        assert scores.values()["loss"][0] == pytest.approx(loss, rel=FLOAT32)

    def test_does_not_depend_on_the_batch_size(self, model):
        one, *others = (
            WIKITEXT2.score(model, texts(), word_tokenizer(), ScoringOptions(size, LENGTH)).counts
            for size in (1, 2, 50)
        )
        assert len(one) > 4
        for other in others:
            np.testing.assert_allclose(other, one, rtol=ROUNDING)

    def test_has_a_row_for_each_block(self, model):
        scores = WIKITEXT2.score(model, texts(), word_tokenizer(), ScoringOptions(2, LENGTH))
        tokens = word_tokenizer()("\n\n".join(texts()["text"]))["input_ids"]
        assert scores.counts.shape == (len(tokens) // LENGTH, 2)
        assert (scores.counts[:, 1] == LENGTH - 1).all()
        first = sum(token_loss(model, tokens[:place], tokens[place]) for place in range(1, LENGTH))
        assert scores.counts[0, 0] == pytest.approx(first, rel=1e-9)

    def test_is_exactly_the_number_of_words_where_all_are_as_likely(self):
        model = llama(tied=False)[0]
        with torch.no_grad():
            model.lm_head.weight.zero_()
        scores = WIKITEXT2.score(model, texts(), word_tokenizer(), ScoringOptions(2, LENGTH))
        assert scores.values()["perplexity"] == pytest.approx((model.config.vocab_size, 0.0), rel=FLOAT32, abs=1e-9)

    def test_of_one_block_has_no_standard_error(self):
        scores = WIKITEXT2.score(llama()[0], texts(1), word_tokenizer(), ScoringOptions(2, LENGTH))
        assert len(scores.counts) == 1
        assert math.isnan(scores.values()["perplexity"][1])

    def test_leaves_the_mode_of_the_model_and_is_that_of_evaluation(self):
        model = gpt2()[0].train()
        before = WIKITEXT2.score(model, texts(), word_tokenizer(), ScoringOptions(2, LENGTH)).counts
        assert model.training
        assert np.array_equal(
            WIKITEXT2.score(model.eval(), texts(), word_tokenizer(), ScoringOptions(2, LENGTH)).counts, before
        )


class TestBlocks:
    def test_are_cut_from_all_texts_joined_by_blank_lines(self):
        heard = []

        def tokenizer(text, verbose):
            heard.append(text)
            return {"input_ids": list(range(len(text)))}

        data = Dataset.from_dict({"text": [" = A = \n", "", "b"]})
        examples = WIKITEXT2.prepare(data, tokenizer, 5)
        assert heard == [" = A = \n\n\n\n\nb"]
        assert examples["input_ids"] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
        assert examples["labels"] == examples["input_ids"]

    def test_begin_with_the_special_token_once_and_keep_a_complete_last_block(self):
        data = Dataset.from_dict({"text": ["w5 w6", "w7 w8"]})
        assert WIKITEXT2.prepare(data, word_tokenizer(), 3)["input_ids"] == [[CLS, 5, 6], [7, 8, SEP]]
        assert WIKITEXT2.prepare(data, word_tokenizer(), 4)["input_ids"] == [[CLS, 5, 6, 7]]

    def test_of_c4_are_the_first_256_of_the_first_1100_documents_joined_by_a_space(self):
        heard = []

        def tokenizer(text, verbose):
            heard.append(text)
            return {"input_ids": [0] * 600}

        data = Dataset.from_dict({"text": [f"d{number}" for number in range(1102)]})
        assert len(C4.prepare(data, tokenizer, 2)) == 256
        assert heard == [" ".join(f"d{number}" for number in range(1100))]

    def test_are_scored_as_they_are_prepared(self):
        task = language_modeling(("x", None, "train", "test"), " ", documents=6, blocks=2)
        model = llama()[0].double()
        scores = task.score(model, texts(), word_tokenizer(), ScoringOptions(2, 5))
        blocks = task.prepare(texts(), word_tokenizer(), 5)["input_ids"]
        assert len(scores.counts) == len(blocks) == 2
        losses = [sum(token_loss(model, block[:place], block[place]) for place in range(1, 5)) for block in blocks]
        np.testing.assert_allclose(scores.counts[:, 0], losses, rtol=1e-9)

    def test_of_local_text_files_are_those_of_their_lines(self, tmp_path):
        (tmp_path / "a.txt").write_text("w5 w6 w7\n\nw8 w9\n")
        data = load_dataset("text", data_files={"test": str(tmp_path / "a.txt")}, split="test")
        assert WIKITEXT2.prepare(data, word_tokenizer(), 3)["input_ids"] == [[CLS, 5, 6], [7, 8, 9]]


class TestLogLikelihoods:
    def test_are_those_of_each_continuation_alone(self, model):
        passages = [
            Passage([5, 6, 7], [[8], [9], [10]]),
            Passage([11, 12, 13, 14, 15, 16], [[15, 16, 17], [15, 16, 18]]),
            Passage([20], [[21]]),
            Passage([5, 9, 7], [[9, 7, 6]]),
        ]
        alone = [
            [
                -sum(token_loss(model, [*context, *tokens[:place]], tokens[place]) for place in range(len(tokens)))
                for tokens in passage.continuations
            ]
            for passage in passages
            for context in [passage.inputs[: len(passage.inputs) - len(passage.continuations[0]) + 1]]
        ]
        for size in (1, 2, 3, 4):
            for got, expected in zip(log_likelihoods(model, passages, size), alone, strict=True):
                np.testing.assert_allclose(got, expected, rtol=1e-9)

    def test_are_taken_in_float32_of_a_model_in_bfloat16(self):
        model = llama()[0]
        passages = [Passage([5, 6, 7], [[6, 7, 8]])]
        (exact,) = log_likelihoods(model, passages, 1)
        (rounded,) = log_likelihoods(model.bfloat16(), passages, 1)
        assert rounded == pytest.approx(exact, rel=0.05)
        with torch.no_grad():
            logs = model(torch.tensor([[5, 6, 7]])).logits[0].float().log_softmax(-1)
        assert rounded[0] == pytest.approx(float(logs[range(3), [6, 7, 8]].double().sum()), rel=1e-6)

    def test_need_logits_at_the_last_positions_alone(self):
        model, seen = llama()[0], []
        model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[:2])))
        log_likelihoods(model, [Passage([5] * 9, [[6]]), Passage([5] * 7, [[6]])], 2)
        assert seen == [(2, 3)]


def test_a_certificate_is_of_the_loss_that_is_scored():
    dense, other = (build_llama(seed) for seed in (0, 1))
    examples = WIKITEXT2.prepare(texts(80), word_tokenizer(), LENGTH)
    certificate = verify(dense, other, examples, batch_size=8, data_collator=WIKITEXT2.collator(word_tokenizer()))
    scores = [
        WIKITEXT2.score(model, texts(80), word_tokenizer(), ScoringOptions(8, LENGTH)) for model in (dense, other)
    ]
    expected = [score.values()["loss"][0] for score in scores]
    assert certificate.loss == pytest.approx(expected, rel=FLOAT32)
    difference = compare(*scores, 0.95)
    assert difference["loss"].mean == pytest.approx(certificate.loss_increase.mean, rel=1e-3)
    assert (difference["perplexity"].mean > 0) == (certificate.loss_increase.mean > 0)


def build_llama(seed):
    return build(
        "LlamaForCausalLM",
        "LlamaConfig",
        seed,
        vocab_size=61,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.2,
    )


class TestRefusal:
    def test_of_data_without_text(self):
        with pytest.raises(DataError, match="no column 'text'; it has content, id"):
            WIKITEXT2.prepare(Dataset.from_dict({"content": ["a"], "id": [1]}), word_tokenizer(), 4)
        for rows, found in ((["w5", None], "row 1 of the data set has the text None"), ([1, 2], "row 0 .* text 1,")):
            with pytest.raises(DataError, match=found):
                WIKITEXT2.prepare(Dataset.from_dict({"text": rows}), word_tokenizer(), 4)

    def test_of_too_little_text(self):
        for run in (
            lambda: WIKITEXT2.prepare(texts(2), word_tokenizer(), 500),
            lambda: WIKITEXT2.score(llama()[0], texts(2), word_tokenizer(), ScoringOptions(2, 500)),
        ):
            with pytest.raises(DataError, match=r"the text has \d+ tokens, too few for a block of 500"):
                run()

    def test_of_blocks_without_a_token_to_predict(self):
        with pytest.raises(DataError, match="max_length is 1; a block takes at least 2 tokens"):
            WIKITEXT2.prepare(texts(), word_tokenizer(), 1)

    def test_of_blocks_longer_than_the_model_takes(self):
        with pytest.raises(DataError, match="an input has 41 tokens, LlamaForCausalLM takes 40; pass a max_length"):
            WIKITEXT2.score(llama()[0], texts(40), word_tokenizer(), ScoringOptions(2, 42))
        assert len(WIKITEXT2.score(llama()[0], texts(40), word_tokenizer(), ScoringOptions(2, 41)).counts)

    def test_of_a_model_whose_predictions_are_not_finite(self):
        model = llama(tied=False)[0]
        with torch.no_grad():
            model.lm_head.weight[8] = math.nan
        with pytest.raises(NumericalError, match="LlamaForCausalLM gives a token a probability that is 0 or not fin"):
            WIKITEXT2.score(model, texts(), word_tokenizer(), ScoringOptions(2, LENGTH))


@pytest.mark.testbed
def test_the_testbed_has_the_loss_that_its_description_says(testbed):
    model = AutoModelForCausalLM.from_pretrained(testbed / "llama-small", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(testbed / "llama-small")
    lines = (testbed / "data" / "wikitext2_test.txt").read_text()[:120_000].splitlines()
    task = language_modeling(WIKITEXT2.dataset, "\n", blocks=40)
    loss, error = task.score(model, Dataset.from_dict({"text": lines}), tokenizer, ScoringOptions(8, 128)).values()[
        "loss"
    ]
    assert error < 0.2
    assert abs(loss - 4.38) < 3 * error
