"""Mixed-rank fine-tuning: which layer answers, and how far two answers are apart."""

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import QuestionAnsweringModelOutput, SequenceClassifierOutput

from hf_lossless_lr.baselines.mixed_rank import BEGIN, END, MixedRank, disagreement, probability


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value
        self.register_buffer("weight", torch.zeros(1))

    def forward(self, x):
        return torch.full_like(x, self.value)


def test_the_probability_of_the_factors_rises_to_one():
    assert [probability(progress) for progress in (0.0, END / 2, END, 1.0)] == [BEGIN, (1 + BEGIN) / 2, 1.0, 1.0]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_layer_answers_by_its_factors_as_often_as_asked(share):
    layer = MixedRank(Constant(0.0), Constant(1.0)).train()
    layer.probability = share
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        answers = sum(layer(torch.zeros(())).item() for _ in range(1000))
        assert abs(answers - 1000 * share) <= 5 * (1000 * share * (1 - share)) ** 0.5
    assert layer.weight is layer.factors.weight
    assert layer.eval()(torch.zeros(())) == 1.0


def test_two_answers_are_apart_by_both_divergences():
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(5, 3, generator=generator) for _ in range(2))
    p, q = (torch.distributions.Categorical(logits=logits) for logits in (one, other))
    both = torch.distributions.kl_divergence(p, q) + torch.distributions.kl_divergence(q, p)
    found = disagreement(*(SequenceClassifierOutput(logits=logits) for logits in (one, other)))
    torch.testing.assert_close(found, both.mean() / 2)
    twice = disagreement(
        *(QuestionAnsweringModelOutput(start_logits=logits, end_logits=logits) for logits in (one, other))
    )
    torch.testing.assert_close(twice, both.mean())
    assert disagreement(SequenceClassifierOutput(), SequenceClassifierOutput()) == 0.0
