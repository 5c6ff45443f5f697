"""Compress a model that Transformers does not know: your own head, loss, data set and collator.

    python examples/your_own_task.py --model ENCODER --data FOLDER --epochs 3 --keep-ratio 0.7 --output DIR
    python examples/your_own_task.py --model DIR/dense --data FOLDER --epochs 0 --keep-ratio 0.5 --output OTHER

The task is to rate a text with a number. FOLDER holds `train.jsonl` and `validation.jsonl`, one
`{"text": ..., "score": 3.5}` a line. ENCODER is any BERT; its head is new, so it is trained first, and the model kept
in `DIR/dense`. What a model must have: a `forward` that takes `labels` and returns a `loss`, the mean over the batch.
Nothing else here is special.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor

MAX_LENGTH = 128


class BertForRating(BertPreTrainedModel):
    """A number for each text: the mean of all tokens' states, two layers, and Huber's loss."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.head = nn.Sequential(nn.Linear(config.hidden_size, 64), nn.GELU(), nn.Linear(64, 1))
        self.post_init()

    def forward(self, input_ids, attention_mask, labels=None):
        states = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[..., None].to(states.dtype)
        ratings = self.head((states * weights).sum(1) / weights.sum(1)).squeeze(-1)
        loss = None if labels is None else nn.functional.huber_loss(ratings, labels)
        return SequenceClassifierOutput(loss=loss, logits=ratings)


class Ratings(Dataset):
    """Texts with their scores, tokenized when they are asked for."""

    def __init__(self, path, tokenizer):
        self.rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        self.tokenizer = tokenizer

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        ids = self.tokenizer(row["text"], truncation=True, max_length=MAX_LENGTH)["input_ids"]
        return {"input_ids": ids, "labels": float(row["score"])}


def collate(examples, pad=0):
    """Pad the texts of a batch on the right. The mask is needed: it tells the compressor which tokens are real."""
    longest = max(len(example["input_ids"]) for example in examples)
    rows = [example["input_ids"] for example in examples]
    return {
        "input_ids": torch.tensor([row + [pad] * (longest - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }


def train(model, data, epochs):
    loader = DataLoader(data, batch_size=16, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.train()
    for _ in range(epochs):
        for batch in loader:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def mean_error(model, data):
    """What you would publish: the mean absolute error. The compressor need not know it."""
    loader = DataLoader(data, batch_size=32, collate_fn=collate)
    errors = [(model(**batch).logits - batch["labels"]).abs() for batch in loader]
    return float(torch.cat(errors).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a BERT encoder, or a dense model that this script has trained")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl and validation.jsonl")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of training before the compression; default 3")
    parser.add_argument("--keep-ratio", type=float, default=0.7)
    parser.add_argument("--output", required=True, help="folder for the compressed checkpoint")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = BertForRating.from_pretrained(arguments.model, dtype=torch.float32)
    training, held_out = (Ratings(arguments.data / f"{name}.jsonl", tokenizer) for name in ("train", "validation"))
    train(model, training, arguments.epochs)
    before = mean_error(model, held_out)
    for part in (model, tokenizer):
        part.save_pretrained(Path(arguments.output) / "dense")

    # The head stays dense: only attention and MLP projections are targets, unless `target_modules` names others.
    # Only batches have a loss here, so a batch is what the verdict takes as independent. It wants at least 30 of them.
    config = LosslessLowRankConfig(keep_ratio=arguments.keep_ratio, batch_size=4)
    compressor = LowRankCompressor(config)
    model = compressor.compress(model, training, eval_dataset=held_out, data_collator=collate)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)

    reloaded = BertForRating.from_pretrained(arguments.output)
    report = compressor.report
    print(f"kept {report.keep_ratio:.1%} of the targeted parameters")
    print(f"Huber loss {report.dense.loss:.4f} -> {report.compressed.loss:.4f}; verdict: {report.verdict}")
    print(
        f"mean absolute error {before:.4f} -> {mean_error(reloaded, held_out):.4f}, reloaded from {arguments.output}"
    )


if __name__ == "__main__":
    main()
