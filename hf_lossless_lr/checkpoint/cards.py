"""Model cards: what they say of a compressed model, and in a folder, which one may be replaced, and with what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import transformers
import yaml
from huggingface_hub import CardData, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from transformers import PreTrainedModel

from ..files import write_atomically
from ..report import CompressionReport, is_unedited, model_card
from .config import LosslessLowRankConfig
from .options import DEFAULT_OBJECTIVE, CompressionOptions

TEMPLATE_DESCRIPTION = (  # what Transformers puts into the template of a new repository's card
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated."
)


def card_of(report: CompressionReport, base_model: str | None = None) -> str:
    """Return the card of a compressed model, with the options that its objective alone would not set."""
    package = "transformers" if hasattr(transformers, report.model) else "your_code"
    return model_card(report, base_model, _chosen(report.config), package)


def _chosen(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that differ from what the objective alone would set."""
    ranks = config.get("ranks")  # that are given make the objective
    objective = config.get("objective", DEFAULT_OBJECTIVE) if ranks is None else DEFAULT_OBJECTIVE
    default = LosslessLowRankConfig(objective=objective, ranks=ranks)
    chosen = {f.name: config[f.name] for f in fields(CompressionOptions) if f.name in config}
    chosen = {name: value for name, value in chosen.items() if value != getattr(default, name)}
    given = {} if ranks is None else {"ranks": ranks}
    return ({} if objective == DEFAULT_OBJECTIVE else {"objective": objective}) | given | chosen


def hub_name(model: PreTrainedModel) -> str | None:
    """Return the name under which a model was loaded from the Hub: one that is in the cache, and no folder."""
    name = str(model.name_or_path or "")
    if not name or Path(name).exists():
        return None
    try:
        return name if isinstance(try_to_load_from_cache(name, "config.json"), str) else None
    except ValueError:  # no name, but a path
        return None


def base_model_in(card: Path) -> str | None:
    """Return the base model that a card names, if it is there and names one."""
    try:
        found = ModelCard.load(card, ignore_metadata_errors=True).data.base_model if card.is_file() else None
    except (OSError, ValueError, TypeError, yaml.YAMLError):  # a card that cannot be read names none
        return None
    found = found[0] if isinstance(found, list) and len(found) == 1 else found
    return found if isinstance(found, str) else None


def place_card(card: str, path: Path) -> None:
    """Write a card, unless a user's is there.

    Args:
        card: its text.
        path: where it belongs.
    """
    if not path.exists():
        write_atomically(path, card)
    elif is_replaceable(path):
        write_atomically(path, _with_metadata(card, ModelCard.load(path, ignore_metadata_errors=True).data))


def _with_metadata(card: str, others: CardData) -> str:
    """Add what another card's metadata say besides, and its tags."""
    try:
        result = ModelCard(card, ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError):  # a user's
        return card
    mine, theirs = result.data.to_dict(), others.to_dict()
    mine["tags"] = list(dict.fromkeys([*mine.get("tags", []), *theirs.get("tags", [])]))
    result.data = ModelCardData(**{**theirs, **mine}, ignore_metadata_errors=True)
    return str(result)


def is_replaceable(path: Path) -> bool:
    """Return whether a card is the template of Transformers, or ours and not edited."""
    try:
        text = path.read_text(encoding="utf-8")
        block = REGEX_YAML_BLOCK.match(text)
        metadata = None if block is None else yaml.safe_load(block[2])
    except (UnicodeDecodeError, yaml.YAMLError):
        return False
    if block is None or not isinstance(metadata, dict) or not all(isinstance(key, str) for key in metadata):
        return False
    body = text[block.end() :]
    unedited = is_unedited(body)
    if unedited is not None:
        return unedited
    try:
        template = ModelCard.from_template(ModelCardData(), model_description=TEMPLATE_DESCRIPTION)
    except ImportError:  # without Jinja2, Transformers has no template either
        return False
    return body.split() == template.text.split()
