"""What all tasks have in common: nothing that they do shows in the tokenizer of their caller."""

import pytest
from datasets import Dataset
from support.tiny_models import TINY_MODELS
from support.word_tokenizer import word_tokenizer

from hf_lossless_lr.evaluation.pipelines import TASKS
from hf_lossless_lr.evaluation.registry import EVALUATION_TASKS
from hf_lossless_lr.evaluation.task import ScoringOptions

ENDINGS = {f"ending{number}": "w9" for number in range(4)}
ROWS = {  # columns of a data set for each task that reads text
    "text-classification": {"text": "w5 w6 w7 w8", "label": 0},
    "token-classification": {"tokens": ["w5", "w6", "w7"], "tags": [0, 1, 2]},
    "text-generation": {"text": "w5 w6 w7 w8 w9 w10"},
    "feature-extraction": {"text": "w5 w6 w7"},
    "sst2": {"sentence": "w5 w6 w7", "label": 0},
    "swag": {"sent1": "w5 w6", "sent2": "w7", **ENDINGS, "label": 0},
    "squad": {"question": "w5", "context": "w6 w7 w8", "answers": {"text": ["w7"], "answer_start": [3]}},
    "wikitext2": {"text": "w5 w6 w7 w8 w9 w10"},
}


@pytest.fixture(params=[False, True], ids=["as loaded", "that truncates"])
def tokenizer(request):
    made = word_tokenizer()
    if request.param:
        made.backend_tokenizer.enable_truncation(5)
        made.backend_tokenizer.enable_padding(length=5)
    return made


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_preparing_leaves_the_tokenizer_as_it_was(name, named, tokenizer):
    before = tokenizer.backend_tokenizer.to_str()
    data = Dataset.from_list([ROWS[name]] * 3)
    task = {**TASKS, **EVALUATION_TASKS}[name]
    if named and name not in EVALUATION_TASKS:
        examples = task.prepare(dataset=data, tokenizer=tokenizer, max_length=16)
    else:
        examples = task.prepare(data, tokenizer, 16)
    assert len(examples)
    assert tokenizer.backend_tokenizer.to_str() == before


def test_scoring_leaves_the_tokenizer_as_it_was(tokenizer):
    before = tokenizer.backend_tokenizer.to_str()
    model = TINY_MODELS["bert-sequence-classification"]()[0]
    data = Dataset.from_list([{"premise": f"w{n}", "hypothesis": "w5 w6 w7", "label": n % 3} for n in range(9, 18)])
    EVALUATION_TASKS["mnli"].score(model, data, tokenizer, ScoringOptions(4, 6))
    assert tokenizer.backend_tokenizer.to_str() == before
