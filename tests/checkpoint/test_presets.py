"""Methods of the field by name."""

import re
from pathlib import Path

import pytest

from hf_lossless_lr import LosslessLowRankConfig
from hf_lossless_lr.checkpoint.presets import COMPARED_ONLY, PRESETS
from hf_lossless_lr.errors import ConfigurationError

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize("name", PRESETS)
def test_every_method_is_a_config_and_says_where_it_is_from(name):
    config = LosslessLowRankConfig.from_preset(name, batch_size=7)
    assert config.batch_size == 7
    for option, value in PRESETS[name].options.items():
        assert getattr(config, option) == value or value == ["auto"]
    assert PRESETS[name].source


def test_an_option_takes_the_place_of_the_methods_own():
    assert LosslessLowRankConfig.from_preset("svd", storage="pivoted", keep_ratio=0.3).storage == "pivoted"


def test_a_method_that_there_is_not_is_an_error_that_names_what_comes_near():
    with pytest.raises(ConfigurationError, match=r"no method 'svd-lm'; choose one of .* Did you mean 'svd-llm'\?"):
        LosslessLowRankConfig.from_preset("svd-lm")


def test_the_documents_list_every_method_with_its_source_and_difference():
    text = (DOCS / "comparing.md").read_text(encoding="utf-8")
    rows = {cells[1].strip(" `"): cells[2:] for line in text.splitlines() if len(cells := line.split("|")) == 6}
    assert [name for name in rows if name in PRESETS] == list(PRESETS)
    for name, preset in PRESETS.items():
        assert preset.source in rows[name][1]
        assert preset.differs == rows[name][2].strip()
        shown = dict(re.findall(r"`(\w+)=([^`]*)`", rows[name][0]))
        assert shown == {option: str(value) for option, value in preset.options.items()}


@pytest.mark.parametrize("name", COMPARED_ONLY)
def test_a_method_that_no_options_make_up_is_an_error_that_says_where_it_is(name):
    with pytest.raises(ConfigurationError, match=rf"no options make up the method '{name}', .*baselines\.compare"):
        LosslessLowRankConfig.from_preset(name)
