"""The names of before the first release: refused with the present ones, in Python and on the command line."""

from copy import deepcopy

import pytest
from support.reports import CERTIFICATE, REPORT

from hf_lossless_lr import ConfigurationError, LosslessLowRankConfig, certify, verify
from hf_lossless_lr.checkpoint.options import CompressionOptions
from hf_lossless_lr.commands.cli import build_parser
from hf_lossless_lr.renamed import RENAMED

OPTIONS = {"budget": "flops", "metric_margin": 0.02}


@pytest.mark.parametrize("name", OPTIONS)
class TestAnOption:
    @pytest.mark.parametrize("cls", [CompressionOptions, LosslessLowRankConfig])
    def test_is_refused_with_its_present_name(self, cls, name):
        with pytest.raises(ConfigurationError, match=rf"'{name}' is called '{RENAMED[name]}' now\."):
            cls(**{name: OPTIONS[name]})
        assert getattr(cls(**{RENAMED[name]: OPTIONS[name]}), RENAMED[name]) == OPTIONS[name]

    def test_is_refused_in_a_present_file_and_read_from_an_old_one(self, name):
        with pytest.raises(ConfigurationError, match=f"'{RENAMED[name]}' now"):
            LosslessLowRankConfig.from_dict({name: OPTIONS[name]})
        config = LosslessLowRankConfig.from_dict({name: OPTIONS[name], "format_version": 1})
        assert config == LosslessLowRankConfig(**{RENAMED[name]: OPTIONS[name]})

    def test_is_no_attribute_but_tells_which_one_is(self, name):
        config = LosslessLowRankConfig()
        with pytest.raises(AttributeError, match=f"{name!r}; it is called {RENAMED[name]!r} now"):
            getattr(config, name)
        assert not hasattr(config, name)
        assert deepcopy(config) == config


@pytest.mark.parametrize("function", [verify, certify])
def test_an_argument_is_refused_before_any_work(function):
    with pytest.raises(ConfigurationError, match="'metric_margin' is called 'accuracy_margin' now"):
        function(None, None, None, metric_margin=0.01)


@pytest.mark.parametrize(("record", "name"), [(REPORT, "evaluation"), (CERTIFICATE, "metric_margin")])
def test_an_attribute_of_a_record_says_what_it_is_called(record, name):
    with pytest.raises(AttributeError, match=f"it is called {RENAMED[name]!r} now"):
        getattr(record, name)
    with pytest.raises(AttributeError, match=r"has no attribute 'colour'$"):
        _ = record.colour


@pytest.mark.parametrize(
    ("command", "option", "present"),
    [
        (["compress", "model", "--output", "x", "--task", "sst2"], "--budget", "--size"),
        (["compress", "model", "--output", "x", "--task", "sst2"], "--metric-margin", "--accuracy_margin"),
        (["verify", "dense", "other", "--task", "sst2"], "--metric_margin", "--accuracy_margin"),
    ],
)
def test_an_option_of_a_command_is_refused_with_its_present_name(command, option, present, capsys):
    with pytest.raises(SystemExit) as exit_code:
        build_parser().parse_args([*command, option, "1"])
    assert exit_code.value.code == 2
    assert f"is called {present} now" in capsys.readouterr().err
