"""MMLU in small: short questions of three subjects, a tokenizer of bytes, and a model of its vocabulary."""

import numpy as np
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from support.tiny_models import build

LETTERS = "ABCD"
SUBJECTS = ("abstract_algebra", "anatomy", "world_religions")


def byte_tokenizer(letters="whole", bos=True, eos=False, padding_side="right"):
    """Bytes are tokens. ` A` to ` D` are one each (`whole`), two each (`two`), or only ` A` is one (`mixed`)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    merges = []
    if letters == "whole":
        merges = [("Ġ", letter) for letter in LETTERS]
    elif letters == "mixed":
        merges = [("Ġ", "A")]
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = [("<s>", 0)] * bos + [("</s>", 1)] * eos
    if special:
        template = " ".join(["<s>"] * bos + ["$A"] + ["</s>"] * eos)
        inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        padding_side=padding_side,
        clean_up_tokenization_spaces=False,
    )


def llama(seed=0, **options):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return build(
        "LlamaForCausalLM",
        "LlamaConfig",
        seed,
        **{"vocab_size": 270, "max_position_embeddings": 1024, "initializer_range": 0.3, **sizes, **options},
    )


def rows_of(subject, count, seed):
    """Short questions, so that five of them fit into the models."""
    drawn = np.random.default_rng([seed, SUBJECTS.index(subject)])
    return [
        {
            "question": f"q{seed}{number}{subject[:2]}?",
            "subject": subject,
            "choices": [str(drawn.integers(100)) for _ in LETTERS],
            "answer": int(drawn.integers(4)),
        }
        for number in range(count)
    ]


def dev_rows(count=6):
    return [row for subject in SUBJECTS for row in rows_of(subject, count, 1)]


def questions(counts=(3, 5, 2)):
    rows = [row for subject, count in zip(SUBJECTS, counts, strict=True) for row in rows_of(subject, count, 2)]
    return [rows[index] for index in np.random.default_rng(0).permutation(len(rows))]


DEV = Dataset.from_list(dev_rows())
TEST = Dataset.from_list(questions())
