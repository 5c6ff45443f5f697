"""Names and other texts that come from elsewhere, made harmless for where they are shown.

A layer can have any name, and a report can be anyone's: escapes would drive a terminal, and marks become a card's own.
"""

from __future__ import annotations

import re
import unicodedata

LONGEST_LABEL = 60


def plain(text: str, lines: bool = False) -> str:
    r"""Return text without what drives a terminal or turns the direction of writing; it is written out, as in `\x1b`.

    Args:
        text: any text.
        lines: whether to keep ends of lines and tabs.

    Returns:
        Text that can be printed.
    """
    kept = "\n\t" if lines else ""
    return "".join(
        c if c.isprintable() or c in kept or unicodedata.category(c) == "Zs" else c.encode("unicode_escape").decode()
        for c in text
    )


def markdown(text: str, begins: bool = False) -> str:
    """Return text that Markdown shows as it is, on one line.

    Args:
        text: any text.
        begins: whether it begins a line or an item of a list.

    Returns:
        Markdown.
    """
    text = re.sub(r"([\\`*\[\]<>|~])|(?<![^\W_])(_)|(_)(?![^\W_])", r"\\\1\2\3", plain(text)).replace("&", "&amp;")
    return re.sub(r"^(\s*\d*)([#+=.)-])", r"\1\\\2", text) if begins else text


def code(text: str) -> str:
    """Return text as inline code, which may hold backticks, also in a table.

    Args:
        text: any text.

    Returns:
        Markdown.
    """
    text = plain(text).replace("|", "\\|")
    marks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if "`" in text or not text.strip() else ""
    return f"{marks}{pad}{text}{pad}{marks}"


def label(text: str) -> str:
    """Return text for a figure: no formula between dollars, and not too long.

    Args:
        text: any text.

    Returns:
        The text.
    """
    text = plain(text)
    text = text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 1]}…"
    return text.replace("$", r"\$")
