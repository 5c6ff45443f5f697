"""Names from elsewhere: what drives a terminal, a Markdown reader, YAML or a figure does nothing where they stand."""

import random
import warnings
from dataclasses import replace

import pytest
import yaml
from matplotlib.text import Text
from support.reports import REPORT, certified, layer, uncertified

from hf_lossless_lr import ConfigurationError
from hf_lossless_lr.checkpoint.cards import card_of
from hf_lossless_lr.report.figures import figures, write_figures
from hf_lossless_lr.report.sentence import verdict_sentence
from hf_lossless_lr.report.text import code, label, markdown, plain
from hf_lossless_lr.report.weights import SkippedWeight

HOSTILE = {
    "colours": "\x1b[31mred\x1b[0m",
    "a title of the terminal": "\x1b]0;mine\x07",
    "one byte that begins an escape": "\x9b2J",
    "lines": "a\nb\r\nc\u2028d\x85e",
    "backwards": "a\u202eb\u2066c",
    "nothing to see": "a\u200bb\ufeffc",
    "half a character": "a\ud800b",
    "a heading": "# mine",
    "emphasis": "**mine** _yours_ ~~gone~~",
    "a link": "[click](javascript:alert(1)) <script>alert(1)</script> ![x](y)",
    "code": "`a``b`",
    "a fence": "```\n# mine\n```",
    "cells": "a | b |",
    "a comment": "<!-- Written by hf-lossless-lr -->",
    "an entity": "&lt;b&gt;",
    "metadata": "---\nlicense: mit\n---",
    "yaml": "x: [1, 2]\n- {a: !!python/object:os.system b}",
    "a formula": r"$\frac{1}{$ a $b$",
    "half a formula": "a$b",
    "another script": "层\U0001f600",
    "much": "long_name" * 50,
}


def drives(text):
    """Whether something in a text is more than a character to be shown."""
    return any(not (c.isprintable() or c == "\n" or c.isspace()) for c in text)


def named(name):
    """The report with a name in every place that takes one."""
    report = certified(status="inconclusive", reasons=(name,), loss_margin=0.001)
    return replace(
        report,
        model=name,
        layers={f"layers.{block}.{name}": layer(3) for block in range(3)} | {"layers.0.plain": layer(2)},
        skipped={name: SkippedWeight(name, 8, 0.1), f"x.{name}": SkippedWeight("small")},
        fingerprints={name: name, "calibration": name},
        versions={name: name},
        model_fingerprint=name,
        compressed_fingerprint=name,
    )


@pytest.mark.parametrize("case", HOSTILE)
class TestAName:
    def test_is_printed_harmlessly(self, case):
        name = HOSTILE[case]
        for text in (verdict_sentence(named(name)), verdict_sentence(uncertified(name)), plain(name)):
            assert not drives(text)
            assert "\n" not in text
            text.encode()

    def test_leaves_a_card_its_own_lines(self, case):
        card, usual = card_of(named(HOSTILE[case])), card_of(named("name"))
        assert not drives(card)
        card.encode()
        assert card.count("\n") == usual.count("\n")
        for mine, other in zip(card.splitlines(), usual.splitlines(), strict=True):
            assert mine.split(" ")[0] == other.split(" ")[0] or mine.startswith(("from ", "model = "))
            if other.startswith("|"):
                assert mine.replace("\\|", "").count("|") == other.count("|")
        data = yaml.safe_load(card.split("---\n")[1])
        assert data == {"library_name": "transformers", "tags": ["hf-lossless-lr", "low-rank", "compressed"]}
        compile(card.split("```python\n")[1].split("```")[0], "card", "exec")

    def test_is_drawn_as_it_is(self, case, tmp_path):
        report = named(HOSTILE[case])
        drawn = figures(report)
        texts = [text for figure in drawn.values() for text in figure.findobj(Text)]
        shown = [text.get_text() for text in texts]
        assert not any(map(drives, shown))
        assert not any(text._preprocess_math(text.get_text())[1] for text in texts)
        assert any(plain(HOSTILE[case].split(".")[-1])[:5] in text.replace(r"\$", "$") for text in shown)
        if case in ("colours", "a formula", "another script"):  # the others are drawn alike
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                paths = write_figures(report, tmp_path / "figures")
            assert all(path.stat().st_size > 5_000 for path in paths)


class TestMarks:
    @pytest.mark.parametrize(
        ("text", "written"),
        [
            ("eval_dataset of 3 < 4", r"eval_dataset of 3 \< 4"),
            ("_a_ * b", r"\_a\_ \* b"),
            ("a & b", "a &amp; b"),
            ("1. a", "1. a"),
        ],
    )
    def test_are_escaped_where_they_would_count(self, text, written):
        assert markdown(text) == written

    def test_that_begin_a_line_are_escaped_there(self):
        assert [markdown(text, begins=True) for text in ("1. a", "# a", "- a", "a - b")] == [
            r"1\. a",
            r"\# a",
            r"\- a",
            "a - b",
        ]

    @pytest.mark.parametrize(("text", "written"), [("a.b", "`a.b`"), ("a`b", "`` a`b ``"), ("a|b", r"`a\|b`")])
    def test_of_code_hold_what_is_in_it(self, text, written):
        assert code(text) == written

    def test_of_a_figure_are_shortened(self):
        assert label("x" * 100) == "x" * 59 + "…"

    def test_of_ends_of_lines_are_kept_if_asked(self):
        assert plain("a\n\tb\x1b", lines=True) == "a\n\tb\\x1b"


class TestLinks:
    def test_are_not_written_through(self, tmp_path):
        victim = tmp_path / "victim"
        victim.write_text("mine")
        (tmp_path / "figures").mkdir()
        (tmp_path / "figures" / "changed_answers.png").symlink_to(victim)
        with pytest.raises(
            ConfigurationError, match=r"changed_answers.png is a link, which figures are not written thr"
        ):
            write_figures(REPORT, tmp_path / "figures")
        assert victim.read_text() == "mine"
        assert len(list((tmp_path / "figures").iterdir())) == 1


def test_any_text_can_be_shown():
    drawn = random.Random(0)
    for _ in range(300):
        text = "".join(chr(drawn.choice((drawn.randrange(128), drawn.randrange(0x110000)))) for _ in range(20))
        for shown in (plain(text), markdown(text), code(text), label(text)):
            assert not drives(shown)
            assert "\n" not in shown
            shown.encode()


@pytest.mark.parametrize("case", [case for case in HOSTILE if case != "half a character"])  # no folder can have that
def test_the_name_of_a_base_model_is_one_value_of_the_metadata(case):
    card = card_of(REPORT, HOSTILE[case])
    assert yaml.safe_load(card.split("\n---\n\n")[0].removeprefix("---\n"))["base_model"] == HOSTILE[case]
