"""How long a text a model takes."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..data import position_limit


def most_tokens(model: PreTrainedModel) -> int | None:
    """Return how many tokens a text may have: what the configuration says, or fewer if there are positions for fewer.

    Args:
        model: the model.

    Returns:
        The number; None where there is no limit.
    """
    said = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [said if isinstance(said, int) and said > 0 else None, position_limit(model)]
    return min((limit for limit in limits if limit is not None), default=None)
