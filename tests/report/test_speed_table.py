"""Times as a table, a list of layers and a figure."""

from dataclasses import replace

import pytest

from hf_lossless_lr import ConfigurationError
from hf_lossless_lr.report.speed import Speed, layer_table, speed_table, write_speed_figure

PAIR = Speed(
    shape=(8, 128),
    device="cpu",
    threads=2,
    turns=15,
    seconds=(0.2, 0.1),
    quartiles=((0.19, 0.22), (0.09, 0.12)),
    ratio=0.5,
    ratio_quartiles=(0.45, 0.6),
    flops=(3_000_000_000, 1_500_000_000),
    layers=({"a": 0.01, "b\x1b": 0.03}, {"a": 0.002}),
)
ALONE = Speed((1, 16), "cuda", 1, 5, (0.004,), ((0.003, 0.005),))


def test_a_table_has_a_line_for_each_setting():
    header, line = speed_table([PAIR]).splitlines()
    assert header.split() == ["dense", "(ms)", "compressed", "(ms)", "ratio", "GFLOPs"]
    assert line.startswith("8 × 128, cpu, 2 threads")
    for text in ("200.00 (190.00 to 220.00)", "100.00 (90.00 to 120.00)", "0.50 (0.45 to 0.60)", "3.00 → 1.50"):
        assert text in line
    assert "0.003 → 0.0015" in speed_table([replace(PAIR, flops=(3_000_000, 1_500_000))])
    header, line = speed_table([ALONE]).splitlines()
    assert (header.split(), line.split()[:4]) == (["time", "(ms)"], ["1", "×", "16,", "cuda"])
    assert "4.00 (3.00 to 5.00)" in line


def test_layers_are_listed_slowest_first():
    lines = layer_table(PAIR).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["b\\x1b", "a"]
    assert lines[1].split()[1:] == ["30.000", "-"]
    assert lines[2].split()[1:] == ["10.000", "2.000"]
    assert len(layer_table(PAIR, most=1).splitlines()) == 2


@pytest.mark.parametrize(("quartiles", "slower"), [((1.01, 1.3), True), ((0.99, 1.3), False), (None, False)], ids=str)
def test_slower_is_what_is_so_in_most_turns(quartiles, slower):
    assert Speed((1,), "cpu", 1, 5, (1.0, 1.0), ((1.0, 1.0),) * 2, 1.0, quartiles).is_slower is slower


def test_a_figure_is_written_but_not_through_a_link(tmp_path):
    pytest.importorskip("matplotlib")
    write_speed_figure([PAIR, PAIR], tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "link.png").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError, match="is a link"):
        write_speed_figure([PAIR], tmp_path / "link.png")
    assert not (tmp_path / "elsewhere").exists()
