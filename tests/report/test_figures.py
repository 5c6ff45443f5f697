"""Figures of a report: the right bars, points and labels, and none that the report has no data for."""

import math
import sys
from dataclasses import replace

import matplotlib.image
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from support.reports import CERTIFICATE, REPORT, certified, layer, trial, uncertified

from hf_lossless_lr import ConfigurationError
from hf_lossless_lr.report.figures import DENSE, FULL, KEPT, figures, layers_by_type, write_figures
from hf_lossless_lr.report.records import Difference, TrialRecord

ALL = ("rank_per_layer", "kept_per_layer_type", "loss_and_size", "predicted_and_measured", "changed_answers")


def with_layers(*names, rank=2, **changes):
    return replace(REPORT, layers={name: layer(rank, **changes) for name in names}, trials=[])


def blocks(count, *names):
    return [f"model.layers.{block}.{name}" for block in range(count) for name in names]


def bars(axes, colour):
    """Place and height of the bars of a colour."""
    found = [
        patch for patch in axes.patches if isinstance(patch, Rectangle) and to_hex(patch.get_facecolor()) == colour
    ]
    return {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in found}


def tick_labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def points(axes):
    """Label to the means of its points and the ends of their error bars."""
    found = {}
    for container in axes.containers:
        line, _, (bar,) = container.lines
        ends = [(segment[0][1], segment[1][1]) for segment in bar.get_segments()]
        found[container.get_label()] = list(zip(*line.get_data(), ends, strict=True))
    return found


def legend(figure):
    return {text.get_text() for text in figure.legends[0].get_texts()}


class TestLayerTypes:
    @pytest.mark.parametrize(
        ("names", "types"),
        [
            (REPORT.layers, ["query", "key", "attention.output", "output"]),
            (blocks(2, "self_attn.q_proj", "mlp.up_proj"), ["q_proj", "up_proj"]),
            (["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_proj"], ["c_attn", "attn.c_proj", "mlp.c_proj"]),
            (["enc.0.SelfAttention.q", "dec.0.Cross.q", "dec.0.wi"], ["SelfAttention.q", "Cross.q", "wi"]),
            (["l.0.experts.0.w1", "l.0.experts.1.w1", "l.0.q"], ["w1", "q"]),
            (["a.0.x.dense", "a.0.x"], ["dense", "x"]),
            (["fc", "head.dense"], ["fc", "head"]),
            (["layers.0", "layers.1"], ["0", "1"]),
        ],
    )
    def test_are_named_by_what_tells_them_apart(self, names, types):
        assert list(layers_by_type(with_layers(*names))) == types

    def test_hold_every_layer_once_in_order(self):
        groups = layers_by_type(REPORT)
        assert [list(layers) for layers in groups.values()] == [
            [name for name in REPORT.layers if name.endswith(f"{block}")]
            for block in ("self.query", "self.key", "attention.output.dense")
        ] + [[f"bert.encoder.layer.{block}.output.dense" for block in range(3)]]
        assert all(REPORT.layers[name] is found for group in groups.values() for name, found in group.items())


class TestRanks:
    def test_have_a_panel_for_each_type_and_a_bar_for_each_layer(self):
        panels = [axes for axes in figures(REPORT)["rank_per_layer"].axes if axes.get_visible()]
        assert [axes.get_title(loc="left") for axes in panels] == list(layers_by_type(REPORT))
        for axes in panels:
            assert bars(axes, FULL) == {0: 8, 1: 8, 2: 8}
            assert tick_labels(axes.xaxis) == ["0", "1", "2"]
            assert axes.get_ylabel() == "rank"
            dense = axes.get_title(loc="left") == "key"
            assert bars(axes, KEPT) == ({0: 2, 1: 3} if dense else {0: 2, 1: 3, 2: 4})
            assert bars(axes, DENSE) == ({2: 8} if dense else {})
        assert legend(figures(REPORT)["rank_per_layer"]) == {"kept", "full rank", "left dense"}

    def test_are_compared_with_the_full_rank_of_each_layer(self):
        report = replace(REPORT, layers={"a.0.fc": layer(3, 8, 10), "a.1.fc": layer(4, 32, 16)})
        assert bars(figures(report)["rank_per_layer"].axes[0], FULL) == {0: 8, 1: 16}

    @pytest.mark.parametrize(
        ("names", "labels"),
        [
            (["s.0.b.0.fc", "s.0.b.1.fc", "s.1.b.0.fc"], ["0.0", "0.1", "1.0"]),
            (["x.2.b.0.fc", "x.2.b.1.fc"], ["0", "1"]),
            (["encoder.0.fc", "encoder.1.fc", "decoder.0.fc"], ["enc.0", "enc.1", "dec.0"]),
            (["m.vision.v.0.fc", "m.text.0.fc", "m.text.1.fc"], ["vis.0", "tex.0", "tex.1"]),
            (["fc"], [""]),
        ],
    )
    def test_are_labelled_by_what_tells_the_blocks_apart(self, names, labels):
        assert tick_labels(figures(with_layers(*names))["rank_per_layer"].axes[0].xaxis) == labels

    @pytest.mark.parametrize("count", [6, 36, 200])
    def test_have_labels_that_do_not_overlap(self, count):
        names = blocks(count, *(f"{kind}_proj" for kind in "qkvo"))
        towers = [f"{tower}.layers.{block}.fc" for tower in ("encoder", "decoder") for block in range(count)]
        figure = figures(with_layers(*names, *towers))["rank_per_layer"]
        figure.draw_without_rendering()
        for axes in [axes for axes in figure.axes if axes.get_visible()]:
            texts = [axes.title, axes._left_title, *axes.get_xticklabels(), *axes.get_yticklabels(), axes.yaxis.label]
            check_apart([text for text in texts if text.get_text()], 1)
            assert len(axes.get_xticklabels()) >= min(count, 5)


def check_apart(texts, least=0):
    """Assert that no two texts overlap."""
    boxes = [text.get_window_extent() for text in texts]
    assert len(boxes) >= least
    for index, box in enumerate(boxes):
        for other in boxes[:index]:
            assert not box.overlaps(other), (box, other)


class TestShares:
    def test_are_those_of_the_layers_of_a_type(self):
        axes = figures(REPORT)["kept_per_layer_type"].axes[0]
        assert tick_labels(axes.yaxis) == ["query", "key", "attention.output", "output"]
        kept = {rank: rank * (18 - rank) for rank in (2, 3, 4)}
        shares = [sum(kept.values()) / 240, (kept[2] + kept[3] + 80) / 240, *[sum(kept.values()) / 240] * 2]
        assert [bar.get_width() for bar in axes.containers[1]] == pytest.approx(shares)
        assert [text.get_text() for text in axes.texts][:2] == [
            f"{shares[0]:.2f} (3 layers)",
            f"{shares[1]:.2f} (3 layers, 1 dense)",
        ]
        assert axes.lines[0].get_xdata()[0] == REPORT.keep_ratio
        assert axes.get_xlabel() == "parameters kept / dense parameters"
        assert legend(axes.figure) == {f"all targeted layers: {REPORT.keep_ratio:.2f}"}

    def test_weigh_layers_by_their_parameters(self):
        report = replace(REPORT, layers={"a.0.fc": layer(None, 100, 100), "a.1.fc": layer(1, 10, 10)})
        (share,) = [bar.get_width() for bar in figures(report)["kept_per_layer_type"].axes[0].containers[1]]
        assert share == pytest.approx((10000 + 19) / 10100)


class TestTrials:
    def test_are_drawn_with_their_upper_bounds_in_nats_and_points(self):
        loss, accuracy = figures(REPORT)["loss_and_size"].axes
        found = points(loss)
        assert found["trial"] == [(0.5, 2e-3, (2e-3, 5e-3)), (0.9, -1e-4, (-1e-4, pytest.approx(2e-4)))]
        assert found["trial outside the margins"] == [(0.3, 3e-2, (3e-2, 5e-2))]
        ((x, y, (low, high)),) = found["certificate, on other examples"]
        assert (x, y) == (REPORT.keep_ratio, 0.0021)
        assert (low, high) == pytest.approx((-0.0002, 0.00421))
        found = points(accuracy)
        assert [(x, pytest.approx(y)) for x, y, _ in found["trial"]] == [(0.5, 0.1), (0.9, -0.1)]
        assert found["trial outside the margins"][0][2] == pytest.approx((2, 3))
        assert found["certificate, on other examples"][0][2] == pytest.approx((-0.22, 0.612))
        assert loss.get_ylabel() == "loss increase (nats)"
        assert accuracy.get_ylabel() == "accuracy drop (points)"
        assert accuracy.get_xlabel() == "parameters kept / dense parameters, in the targeted layers"

    def test_are_compared_with_the_dense_model_and_the_margins(self):
        report = replace(REPORT, config=REPORT.config | {"loss_margin": 0.02, "accuracy_margin": 0.005})
        loss, accuracy = figures(report)["loss_and_size"].axes
        for axes, margin in ((loss, 0.02), (accuracy, 0.5)):
            lines = {line.get_label(): line.get_ydata()[0] for line in axes.lines}
            assert lines["dense model"] == 0
            assert lines["margin"] == margin

    def test_without_accuracy_have_one_panel(self):
        report = replace(REPORT, trials=[trial(0.5, 1e-3, 2e-3, 5e-3)])
        assert len(figures(report)["loss_and_size"].axes) == 1

    def test_without_a_certificate_are_drawn_alone(self):
        (loss, _) = figures(replace(uncertified("none"), trials=REPORT.trials))["loss_and_size"].axes
        assert set(points(loss)) == {"trial", "trial outside the margins"}

    @pytest.mark.parametrize("upper", [None, math.inf])
    def test_without_a_bound_are_drawn_without_it(self, upper):
        report = replace(REPORT, trials=[trial(0.5, 1e-3, 2e-3, upper, passes=False)])
        drawn = figures(report)
        assert points(drawn["loss_and_size"].axes[0])["trial outside the margins"] == [(0.5, 2e-3, (2e-3, 2e-3))]
        (found,) = points(drawn["predicted_and_measured"].axes[0]).values()
        assert found == [(1e-3, 2e-3, (2e-3, 2e-3))]


class TestPrediction:
    def test_is_drawn_against_the_measurement_on_logarithmic_axes(self):
        axes = figures(REPORT)["predicted_and_measured"].axes[0]
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        (found,) = points(axes).values()
        assert found == [(2e-2, 3e-2, (3e-2, 5e-2)), (1e-3, 2e-3, (2e-3, 5e-3))]
        assert axes.get_xlabel() == "predicted loss increase (nats)"
        assert axes.get_ylabel() == "measured loss increase (nats)"

    def test_of_a_trial_without_an_increase_is_drawn_at_the_bound(self):
        axes = figures(REPORT)["predicted_and_measured"].axes[0]
        assert axes.collections[-1].get_label() == "upper bound of a trial without an increase"
        assert axes.collections[-1].get_offsets().tolist() == [[1e-5, 2e-4]]
        left, right = axes.get_xlim()
        assert left < 1e-5 < 2e-2 < right

    @pytest.mark.parametrize(
        "record",
        [
            trial(1.0, 0.0, 0.0, 0.0),
            trial(0.5, 1e-3, -2e-3, -1e-3),
            trial(0.5, 1e-3, -2e-3, None),
            trial(0.5, 1e-3, -2e-3, math.inf),
            TrialRecord(0.5, 1e-3, refitted=False),
        ],
    )
    def test_is_left_out_where_logarithms_are_none(self, record):
        assert "predicted_and_measured" not in figures(replace(REPORT, trials=[record]))


class TestAnswers:
    def test_without_bounds_are_drawn_without_them(self):
        report = certified(accuracy_drop=Difference(0.002, -math.inf, math.inf))
        (segment,) = figures(report)["changed_answers"].axes[1].containers[1].lines[2][0].get_segments()
        assert segment[:, 0] == pytest.approx([0.2, 0.2])

    def test_are_the_shares_of_the_certificate(self):
        left, right = figures(REPORT)["changed_answers"].axes
        assert bars(left, DENSE) == {0: pytest.approx(89.33)}
        assert bars(left, KEPT) == {1: pytest.approx(89.13)}
        assert left.lines[0].get_ydata()[0] == pytest.approx(55)
        assert tick_labels(left.xaxis) == ["dense", "compressed"]
        widths = [patch.get_width() for patch in right.patches]
        assert widths == pytest.approx([1.73, (1.73 + 0.2) / 2, (1.73 - 0.2) / 2])
        (segment,) = right.containers[1].lines[2][0].get_segments()
        assert segment[:, 0] == pytest.approx([-0.22, 0.612])
        assert right.containers[1].lines[0].get_xdata() == pytest.approx([0.2])
        assert tick_labels(right.yaxis)[-1] == "net loss"
        assert "95 % bounds" in right.get_xlabel()
        assert "3,100" in left.figure._suptitle.get_text()

    def test_have_no_line_of_chance_where_there_is_none(self):
        left, _ = figures(certified(chance=None))["changed_answers"].axes
        assert len(left.lines) == 0


class TestAll:
    def test_are_drawn_from_a_full_report(self):
        assert tuple(figures(REPORT)) == ALL

    @pytest.mark.parametrize(
        ("report", "left"),
        [
            (uncertified("none"), ALL[:4]),
            (certified(changed=None), ALL[:4]),
            (certified(accuracy=None, accuracy_drop=None), ALL[:4]),
            (replace(REPORT, trials=[]), (*ALL[:2], ALL[4])),
            (replace(uncertified("none"), trials=[TrialRecord(0.5, 0.1, refitted=False)]), ALL[:2]),
        ],
    )
    def test_are_left_out_where_the_report_has_no_data(self, report, left):
        assert tuple(figures(report)) == left

    def test_are_written_as_images_into_a_new_folder(self, tmp_path):
        paths = write_figures(REPORT, tmp_path / "deep" / "figures")
        assert paths == [tmp_path / "deep" / "figures" / f"{name}.png" for name in ALL]
        for path in paths:
            height, width, _ = matplotlib.image.imread(path).shape
            assert min(height, width) > 300

    def test_have_texts_that_lie_inside_and_apart(self):
        long = {f"model.layers.{n}.a_rather_long_name_of_a_layer_{n}.dense": layer(2) for n in range(12)}
        for report in (REPORT, replace(REPORT, layers=long)):
            for figure in figures(report).values():
                figure.draw_without_rendering()
                texts = [figure._suptitle, *(text for found in figure.legends for text in found.get_texts())]
                for axes in [axes for axes in figure.axes if axes.get_visible()]:
                    texts += [*axes.texts, axes._left_title, axes.xaxis.label, axes.yaxis.label]
                texts = [text for text in texts if text.get_text()]
                check_apart(texts, 3)
                for text in texts:
                    box = text.get_window_extent()
                    assert min(box.x0, box.y0) >= -1, text
                    assert box.x1 <= figure.bbox.x1 + 1, text
                    assert box.y1 <= figure.bbox.y1 + 1, text

    def test_do_not_touch_pyplot(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
        assert tuple(figures(REPORT)) == ALL

    def test_need_matplotlib(self, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ConfigurationError, match=r"figures need matplotlib: pip install hf-lossless-lr\[plots\]."):
            write_figures(REPORT, tmp_path / "figures")
        assert not (tmp_path / "figures").exists()


def test_the_report_of_these_tests_adds_up():
    assert CERTIFICATE.loss[1] - CERTIFICATE.loss[0] == pytest.approx(CERTIFICATE.loss_increase.mean)
    assert CERTIFICATE.accuracy[0] - CERTIFICATE.accuracy[1] == pytest.approx(CERTIFICATE.accuracy_drop.mean)
