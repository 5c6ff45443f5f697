"""A model class that is none of Transformers', as remote code has it; it needs no other package than Transformers."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class OwnArchitectureConfig(PreTrainedConfig):
    model_type = "own-architecture"

    def __init__(self, features: int = 24, hidden_size: int = 32, **kwargs):
        self.features, self.hidden_size = features, hidden_size
        super().__init__(**kwargs)


class OwnBlock(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(size), nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.outer(self.inner(self.norm(hidden)).relu())


class OwnArchitectureForClassification(PreTrainedModel):
    config_class = OwnArchitectureConfig
    main_input_name = "values"

    def __init__(self, config: OwnArchitectureConfig):
        super().__init__(config)
        self.stem = nn.Linear(config.features, config.hidden_size)
        self.blocks = nn.ModuleList(OwnBlock(config.hidden_size) for _ in range(2))
        self.head = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, values: torch.Tensor, labels: torch.Tensor | None = None) -> SequenceClassifierOutput:
        hidden = self.stem(values)
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(hidden)
        return SequenceClassifierOutput(F.cross_entropy(logits, labels) if labels is not None else None, logits)
