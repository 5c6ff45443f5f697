"""Calibration statistics on disk: the same bits again, or an error that says which file and why."""

import json
import math
import os
import struct
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.tiny_models import TINY_MODELS, gpt2, llama, split_batch
from torch.utils.data import DataLoader

from hf_lossless_lr.errors import CheckpointError
from hf_lossless_lr.layers.targets import find_targets
from hf_lossless_lr.statistics import store as statistics_io
from hf_lossless_lr.statistics.collect import collect_statistics
from hf_lossless_lr.statistics.records import CalibrationStatistics, LayerStatistics
from hf_lossless_lr.statistics.store import load_statistics, save_statistics

pytestmark = pytest.mark.numerical

MODEL = "a" * 64
CPU = torch.device("cpu")
FIELDS = ("weight_grad", "input_covariance", "grad_covariance")


def first(items):
    return items[0]


def collect(build):
    model, batch = build()
    targets = find_targets(model, ["Conv2d"] if "ResNet" in type(model).__name__ else None).chosen
    loader = DataLoader(split_batch(batch, 2), batch_size=1, collate_fn=first)
    return collect_statistics(model, targets, loader, Accelerator(cpu=True), weight_grads=True)


def same_bits(mine, other):
    return mine.dtype == other.dtype == torch.float64 and torch.equal(mine.view(torch.int64), other.view(torch.int64))


def check_same(got: CalibrationStatistics, expected: CalibrationStatistics) -> None:
    assert list(got.layers) == list(expected.layers)
    for name, layer in expected.layers.items():
        mine = got.layers[name]
        assert (mine.tokens, mine.units) == (layer.tokens, layer.units)
        for field in FIELDS:
            assert same_bits(getattr(mine, field).contiguous(), getattr(layer, field).contiguous()), (name, field)
    for field in ("loss", "examples", "units", "data_fingerprint", "groups"):
        assert getattr(got, field) == getattr(expected, field), field
        assert type(getattr(got, field)) is type(getattr(expected, field)), field


@pytest.fixture(scope="module")
def statistics():
    return collect(llama)


@pytest.fixture
def path(statistics, tmp_path):
    """A saved file."""
    return save_statistics(statistics, tmp_path / "statistics.safetensors", MODEL)


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def rewrite(path, **changes):
    """Change entries of the description in a file; None removes one."""
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["statistics"])
    description = {k: v for k, v in (description | changes).items() if v is not None}
    save_file(load_file(path), path, metadata={"statistics": json.dumps(description)})


class TestTheRoundTrip:
    @pytest.mark.parametrize("name", ["bert-token-classification", "albert", "gpt2", "t5", "resnet"])
    def test_keeps_every_bit(self, name, tmp_path):
        expected = collect(TINY_MODELS[name])
        saved = save_statistics(expected, tmp_path / "statistics.safetensors", MODEL)
        check_same(load_statistics(saved, MODEL, CPU), expected)

    def test_keeps_groups_in_their_order(self, statistics, path):
        got = load_statistics(path, MODEL, CPU).groups
        assert got == statistics.groups
        assert len(got) == 8
        assert all(type(group) is tuple for group in got)

    def test_keeps_numbers_that_are_hard_to_write(self, tmp_path):
        hard = torch.tensor([[[5e-324, -0.0], [-0.0, math.pi]]], dtype=torch.float64)
        layer = LayerStatistics(hard, hard.clone() * 3, hard.clone() * 7, tokens=2**60 + 1, units=2**53 + 1)
        expected = CalibrationStatistics({"größe.0": layer}, 0.1 + 0.2, 2**62 + 1, 1, "f" * 64)
        saved = save_statistics(expected, tmp_path / "x", MODEL)
        check_same(load_statistics(saved, MODEL, CPU), expected)

    def test_keeps_matrices_that_lie_transposed_in_memory(self, tmp_path):
        expected = collect(gpt2)
        name = "transformer.h.0.mlp.c_fc"
        assert not expected.layers[name].weight_grad.is_contiguous()
        got = load_statistics(save_statistics(expected, tmp_path / "x", MODEL), MODEL, CPU)
        assert torch.equal(got.layers[name].weight_grad, expected.layers[name].weight_grad)

    def test_does_not_change_the_statistics(self, statistics, tmp_path):
        before = {name: [getattr(layer, f).clone() for f in FIELDS] for name, layer in statistics.layers.items()}
        save_statistics(statistics, tmp_path / "x", MODEL)
        for name, layer in statistics.layers.items():
            assert all(map(torch.equal, before[name], [getattr(layer, f) for f in FIELDS]))

    def test_outlives_the_file(self, statistics, path):
        got = load_statistics(path, MODEL, CPU)
        save_statistics(collect(gpt2), path, MODEL)
        path.unlink()
        check_same(got, statistics)

    def test_takes_and_returns_paths_of_both_kinds(self, statistics, tmp_path):
        file = tmp_path / "x.safetensors"
        assert save_statistics(statistics, str(file), MODEL) == file
        check_same(load_statistics(str(file), MODEL, CPU), statistics)


class TestSharedCovariances:
    def test_are_stored_once(self, statistics, path):
        shared = {id(layer.input_covariance): layer.input_covariance for layer in statistics.layers.values()}
        assert len(shared) == 8 < len(statistics.layers) == 14
        numbers = sum(matrix.numel() for matrix in shared.values()) + sum(
            layer.weight_grad.numel() + layer.grad_covariance.numel() for layer in statistics.layers.values()
        )
        header = struct.unpack("<Q", path.read_bytes()[:8])[0]
        assert path.stat().st_size == 8 + header + 8 * numbers
        assert header < 10_000

    def test_are_one_tensor_again(self, statistics, path):
        got = load_statistics(path, MODEL, CPU)
        names = list(statistics.layers)
        for one in names:
            for other in names:
                expected = statistics.layers[one].input_covariance is statistics.layers[other].input_covariance
                assert (got.layers[one].input_covariance is got.layers[other].input_covariance) == expected

    def test_of_equal_numbers_but_different_inputs_stay_two(self, statistics, tmp_path):
        layers = dict(statistics.layers)
        one, other = list(layers)[:2]
        layers[other] = replace(layers[other], input_covariance=layers[one].input_covariance.clone())
        saved = save_statistics(replace(statistics, layers=layers), tmp_path / "x", MODEL)
        got = load_statistics(saved, MODEL, CPU).layers
        assert got[one].input_covariance is not got[other].input_covariance
        assert torch.equal(got[one].input_covariance, got[other].input_covariance)


class TestRefusal:
    def test_of_statistics_of_another_model(self, path):
        with pytest.raises(CheckpointError, match=r"statistics.safetensors: these statistics belong to another model"):
            load_statistics(path, "b" * 64, CPU)

    @pytest.mark.parametrize("version", [0, 1, 2, 4, "3"])
    def test_of_another_format_version(self, path, version):
        rewrite(path, format_version=version)
        with pytest.raises(CheckpointError, match=f"statistics.safetensors: format version {version} is unknown"):
            load_statistics(path, MODEL, CPU)

    def test_of_another_format_version_comes_before_all_else(self, path):
        rewrite(path, format_version=1, model_fingerprint=None, layers=None)
        with pytest.raises(CheckpointError, match="format version 1 is unknown"):
            load_statistics(path, MODEL, CPU)

    def test_of_a_file_that_is_not_there(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"missing\.safetensors is no file of calibration statistics"):
            load_statistics(tmp_path / "missing.safetensors", MODEL, CPU)

    def test_of_a_folder(self, tmp_path):
        with pytest.raises(CheckpointError, match="is no file of calibration statistics"):
            load_statistics(tmp_path, MODEL, CPU)

    @pytest.mark.parametrize("data", [b"", b"not a safetensors file at all", b"\xff" * 100, b"\x00" * 100])
    def test_of_a_file_of_another_kind(self, tmp_path, data):
        (tmp_path / "x").write_bytes(data)
        with pytest.raises(CheckpointError, match="x is no file of calibration statistics"):
            load_statistics(tmp_path / "x", MODEL, CPU)

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
    def test_of_a_file_that_was_cut_off(self, path, share):
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(CheckpointError, match="is no file of calibration statistics"):
            load_statistics(path, MODEL, CPU)

    @pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
    def test_of_a_checkpoint_of_a_model(self, tmp_path, metadata):
        save_file({"weight": torch.ones(3)}, tmp_path / "model.safetensors", metadata=metadata)
        with pytest.raises(CheckpointError, match="is no file of calibration statistics"):
            load_statistics(tmp_path / "model.safetensors", MODEL, CPU)

    @pytest.mark.parametrize("description", ["", "{", "[]", "3", "null", '"text"', "{}"])
    def test_of_a_description_of_another_kind(self, tmp_path, description):
        save_file({"weight": torch.ones(3)}, tmp_path / "x", metadata={"statistics": description})
        with pytest.raises(CheckpointError, match="x is no file of calibration statistics"):
            load_statistics(tmp_path / "x", MODEL, CPU)

    @pytest.mark.parametrize(
        "entry",
        [
            "format_version",
            "model_fingerprint",
            "data_fingerprint",
            "loss",
            "examples",
            "units",
            "groups",
            "layers",
            "checksum",
        ],
    )
    def test_of_a_description_that_lacks_an_entry(self, path, entry):
        rewrite(path, **{entry: None})
        with pytest.raises(CheckpointError, match=f"is no file of calibration statistics: '{entry}'"):
            load_statistics(path, MODEL, CPU)

    @pytest.mark.parametrize(
        "change", [{"layers": ["a"]}, {"layers": {"a": 3}}, {"layers": {"a": {}}}, {"groups": 3}, {"groups": [1]}]
    )
    def test_of_entries_of_another_kind(self, path, change):
        rewrite(path, **change)
        with pytest.raises(CheckpointError, match="is no file of calibration statistics"):
            load_statistics(path, MODEL, CPU)

    @pytest.mark.parametrize("field", FIELDS)
    def test_of_a_file_that_lacks_a_matrix(self, path, field):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        del tensors[f"model.layers.0.self_attn.q_proj.{field}"]
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(
            CheckpointError, match=f"is no file of calibration statistics.*q_proj.{field}|does not fit its checksum"
        ):
            load_statistics(path, MODEL, CPU)


FIRST = "model.layers.0.self_attn.q_proj"


def entry(name, **changes):
    return lambda description, _: description["layers"][name].update(changes)


def described(**changes):
    return lambda description, _: description.update(changes)


def matrix(name, change):
    """Change a tensor: in place, or into what the change returns."""

    def apply(_, tensors):
        changed = change(tensors[name])
        tensors[name] = tensors[name] if changed is None else changed.contiguous()

    return apply


def set_at(*place, value):
    def change(tensor):
        tensor[place] = value

    return change


WRONG = {  # a change of the description and the tensors, and what is said about it
    "no tokens": (entry(FIRST, tokens=0), rf"'{FIRST}.tokens' is 0; it must be a whole number of at least 1"),
    "a share of a token": (entry(FIRST, tokens=1.5), rf"'{FIRST}.tokens' is 1.5"),
    "negative units": (entry(FIRST, units=-3), rf"'{FIRST}.units' is -3"),
    "examples that are true": (described(examples=True), "'examples' is True"),
    "an infinite loss": (described(loss=math.inf), "'loss' is inf; it must be a finite number"),
    "a loss of no number": (described(loss="0"), "'loss' is '0'"),
    "a fingerprint of no text": (described(data_fingerprint=3), "'data_fingerprint' is 3"),
    "a group of strangers": (described(groups=[["nowhere"]]), "'groups' has 'nowhere', which is no layer of the file"),
    "a layer in two groups": (described(groups=[[FIRST], [FIRST]]), rf"'groups' has '{FIRST}', .* in it twice"),
    "NaN": (
        matrix(f"{FIRST}.weight_grad", set_at(0, 1, 2, value=math.nan)),
        rf"'{FIRST}.weight_grad' has values that",
    ),
    "infinity": (
        matrix(f"{FIRST}.input_covariance", set_at(0, 1, 1, value=math.inf)),
        rf"'{FIRST}.input_covariance' has values that are NaN or infinite",
    ),
    "a negative variance": (
        matrix(f"{FIRST}.grad_covariance", set_at(0, 3, 3, value=-1e-9)),
        rf"'{FIRST}.grad_covariance' has negative values on its diagonal",
    ),
    "an entry without its mirror": (
        matrix(f"{FIRST}.input_covariance", set_at(0, 1, 2, value=7.0)),
        rf"'{FIRST}.input_covariance' is not symmetric",
    ),
    "another dtype": (
        matrix(f"{FIRST}.weight_grad", torch.Tensor.float),
        "has the dtype torch.float32, not torch.flo",
    ),
    "two axes": (matrix(f"{FIRST}.weight_grad", lambda x: x[0]), r"has the shape \(32, 32\); it must have three axes"),
    "a smaller matrix": (
        matrix(f"{FIRST}.grad_covariance", lambda x: x[:, :5, :5]),
        rf"'{FIRST}.grad_covariance' has the shape \(1, 5, 5\), not \(1, 32, 32\)",
    ),
    "another number": (
        matrix(f"{FIRST}.weight_grad", set_at(0, 0, 0, value=0.5)),
        "the content does not fit its check",
    ),
    "another count": (described(examples=7), "the content does not fit its checksum"),
    "another tensor": (lambda _, tensors: tensors.update(more=torch.ones(2)), "the content does not fit its checksum"),
    "another checksum": (described(checksum="0" * 64), "the content does not fit its checksum"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_no_calibration_gives_is_refused_by_its_name(path, case):
    change, message = WRONG[case]
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["statistics"])
    tensors = load_file(path)
    change(description, tensors)
    save_file(tensors, path, metadata={"statistics": json.dumps(description)})
    with pytest.raises(CheckpointError, match=rf"statistics.safetensors: .*{message}"):
        load_statistics(path, MODEL, CPU)


class TestWriting:
    def test_leaves_one_file(self, statistics, path):
        assert list(content(path.parent)) == [path.name]

    def test_replaces_an_older_file(self, statistics, path):
        newer = replace(statistics, examples=99)
        save_statistics(newer, path, MODEL)
        check_same(load_statistics(path, MODEL, CPU), newer)
        assert list(content(path.parent)) == [path.name]

    @pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
    @pytest.mark.parametrize("stage", ["before", "midway", "rename"])
    @pytest.mark.parametrize("existing", [True, False])
    def test_that_fails_keeps_the_old_file_and_leaves_nothing_else(
        self, statistics, tmp_path, monkeypatch, existing, stage, error
    ):
        target = tmp_path / "statistics.safetensors"
        if existing:
            save_statistics(statistics, target, MODEL)
        before = content(tmp_path)
        plain = statistics_io.save_file

        def fail(*_, **__):
            raise error("broken on purpose")

        def write_half(tensors, filename, metadata=None):
            plain(dict(list(tensors.items())[:3]), filename, metadata=metadata)
            assert os.path.dirname(filename) == str(tmp_path)  # a rename from elsewhere would not be atomic
            fail()

        if stage == "rename":
            monkeypatch.setattr(os, "replace", fail)
        else:
            monkeypatch.setattr(statistics_io, "save_file", fail if stage == "before" else write_half)
        with pytest.raises(error, match="broken on purpose"):
            save_statistics(replace(statistics, examples=99), target, MODEL)
        assert content(tmp_path) == before

    def test_never_shows_an_unfinished_file(self, statistics, path, monkeypatch):
        old, plain = path.read_bytes(), statistics_io.save_file

        def watch(*args, **kwargs):
            assert path.read_bytes() == old
            plain(*args, **kwargs)
            assert path.read_bytes() == old

        monkeypatch.setattr(statistics_io, "save_file", watch)
        save_statistics(replace(statistics, examples=99), path, MODEL)
        assert path.read_bytes() != old
