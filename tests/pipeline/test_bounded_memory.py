"""Statistics in windows and on disk, and runs that go on after an interruption: the same model, to the last bit."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from support.mixtures import mixture, words
from support.processes import accelerator, loader_of
from support.tiny_models import TINY_MODELS, as_examples, llama, split_batch

import hf_lossless_lr.pipeline.memory as memory
import hf_lossless_lr.pipeline.trial as trial
import hf_lossless_lr.statistics.windows as windows_module
from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.data import dataset_size, split_data
from hf_lossless_lr.errors import CheckpointError, ConfigurationError
from hf_lossless_lr.layers import find_targets, replace_modules, unfuse
from hf_lossless_lr.pipeline.activations import Results, bytes_waiting, refit_memory
from hf_lossless_lr.pipeline.memory import memory_limit, needs_of, windows_of
from hf_lossless_lr.report import CompressionReport, MemoryPlan, readable_size
from hf_lossless_lr.statistics import collect_in_windows, collect_statistics
from hf_lossless_lr.statistics.shelf import SLABS, Shelf, ShelvedStatistics, pack, unpack

GIBIBYTE = 2**30
EXAMPLES = 32
TESTS = Path(__file__).resolve().parent.parent


def options(**changes):
    return LosslessLowRankConfig(**{"keep_ratio": 0.5, "selection_fraction": 0.25, "batch_size": 2, **changes})


def compressed(make=llama, *, config=None, examples=EXAMPLES, **settings):
    model, batch = make(examples)
    compressor = LowRankCompressor(config or options(), **settings)
    data = split_batch(batch, 1)
    compressor.compress(model, data[: len(data) * 3 // 4], eval_dataset=data[len(data) * 3 // 4 :])
    return model, compressor.report


def with_setting(made, name, value):
    model, batch = made
    setattr(model.config, name, value)
    return model, batch


def small(monkeypatch, model, share=0.4):
    """Let the memory hold the model and a share of the statistics, whatever this process has."""
    monkeypatch.setattr(memory, "resident", lambda device: 0)
    monkeypatch.setattr(memory, "_first_batch", lambda *_, **options: (0, 0.5))
    monkeypatch.setattr(memory, "refit_memory", lambda *_: (0, 1))
    needs = [needs_of(m).statistics for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D")]
    return int(share * sum(needs)) + max(needs)


def same(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 40])
@pytest.mark.parametrize("groups", [1, 3])
def test_a_symmetric_matrix_is_stored_once_and_comes_back_bit_for_bit(size, groups):
    rows = torch.randn(groups, size + 3, size, generator=torch.Generator().manual_seed(size))
    matrix = rows.mT @ rows
    matrix = matrix + matrix.mT
    slabs = pack(matrix)
    assert torch.equal(unpack(slabs), matrix)
    if size >= 5 * SLABS:
        assert sum(slab.numel() for slab in slabs.values()) < 0.6 * matrix.numel()


class TestShelf:
    def test_gives_back_what_was_put(self, tmp_path):
        shelf = Shelf(tmp_path / "deep" / "shelf")
        shelf.put("a/b", {"x": torch.arange(3.0)}, {"z": 1, "a": [2, None]})
        tensors, about = Shelf(tmp_path / "deep" / "shelf").get("a/b")
        assert torch.equal(tensors["x"], torch.arange(3.0))
        assert list(about.items()) == [("z", 1), ("a", [2, None])]
        assert "a/b" in shelf
        assert "other" not in shelf

    def test_is_not_read_to_know_what_is_there(self, tmp_path, monkeypatch):
        statistics = ShelvedStatistics(Shelf(tmp_path), torch.device("cpu"))
        statistics.add(["a"])
        monkeypatch.setattr(Shelf, "get", None)
        assert "a" in statistics
        assert "b" not in statistics

    def test_refuses_a_file_that_was_changed(self, tmp_path):
        Shelf(tmp_path).put("a", {"x": torch.arange(3.0)}, {"n": 1})
        file = Shelf(tmp_path).path("a")
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"damaged.*checksum"):
            Shelf(tmp_path).get("a")

    def test_refuses_what_is_no_file_of_its_kind(self, tmp_path):
        save_file({"x": torch.zeros(1)}, Shelf(tmp_path).path("a"))
        Shelf(tmp_path).path("b").write_bytes(b"nothing")
        for key in "ab":
            with pytest.raises(CheckpointError, match="damaged"):
                Shelf(tmp_path).get(key)


class TestWindows:
    STATISTICS = {f"model.layers.{n}.{name}": 10 for n in range(3) for name in ("q", "k", "mlp.up")} | {"head": 5}

    def test_hold_whole_blocks_where_these_fit(self):
        found = windows_of(self.STATISTICS, 65)
        assert [len(window) for window in found] == [6, 4]
        assert [name for window in found for name in window] == list(self.STATISTICS)

    def test_hold_single_layers_where_no_block_fits(self):
        assert [len(window) for window in windows_of(self.STATISTICS, 20)] == [2, 2, 2, 2, 2]

    def test_refuse_a_layer_that_does_not_fit(self):
        with pytest.raises(ConfigurationError, match=r"statistics of 'model.layers.0.q' take .* smaller batch_size"):
            windows_of(self.STATISTICS, 9)


class TestLimit:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [("10GiB", 10 * GIBIBYTE), ("1MB", 10**6), (12345, 12345), (1e9, 10**9), ("20000", 20000)],
    )
    def test_is_bytes_or_a_text(self, text, expected):
        assert memory_limit(text, torch.device("cpu")) == expected

    @pytest.mark.parametrize("wrong", ["ten", "", 0, -1, True, "10 elephants", math.nan, math.inf, [1]])
    def test_of_another_kind_is_refused(self, wrong):
        with pytest.raises(ConfigurationError, match="max_memory"):
            memory_limit(wrong, torch.device("cpu"))
        with pytest.raises(ConfigurationError, match="max_memory"):
            LowRankCompressor(max_memory=wrong)

    def test_that_is_broken_is_said(self):
        plan = MemoryPlan(limit=2**20, expected=2**21, passes=1, disk=0)
        assert "2.00 MiB of memory expected, 1.00 MiB allowed (which is less" in plan.sentence
        assert "which is less" not in MemoryPlan(limit=2**21, expected=2**20, passes=1, disk=0).sentence

    @pytest.mark.parametrize(
        ("size", "text"), [(3 * 2**30, "3.00 GiB"), (2**26, "0.06 GiB"), (2**20, "1.00 MiB"), (100, "0.10 KiB")]
    )
    def test_is_told_in_a_unit_that_shows_it(self, size, text):
        assert readable_size(size) == text

    def test_is_what_is_free_by_default(self):
        assert memory_limit(None, torch.device("cpu")) > 0


@pytest.mark.parametrize("name", ["bert-sequence-classification", "albert", "gpt2", "llama", "t5", "vit"])
def test_in_windows_and_on_disk_the_result_is_the_same(name, monkeypatch):
    make, config = TINY_MODELS[name], options(batch_size=6)
    expected, plain = compressed(make, config=config)
    found, report = compressed(make, config=config, max_memory=small(monkeypatch, make()[0]))
    assert plain.memory.passes == 1
    assert plain.memory.disk == 0
    assert report.memory.passes > 1
    assert report.memory.disk > 0
    assert report.memory.seconds > 0
    same(expected, found)
    assert report.layers == plain.layers
    assert report.calibration == plain.calibration


@pytest.mark.parametrize("name", ["bert-sequence-classification", "gpt2", "t5", "swin", "resnet", "mixture"])
def test_each_window_knows_the_order_and_the_shared_inputs_of_the_whole_model(name, tmp_path):
    """A window for each layer, the last one first, as where modules are in another order than they are called."""
    if name == "mixture":
        model, batch = mixture("Qwen2Moe"), words()
        replace_modules(model, unfuse(model))
    else:
        model, batch = TINY_MODELS[name](8)
    targets, loader = find_targets(model).chosen, loader_of(split_batch(batch, 2))
    whole = collect_statistics(model, targets, loader, accelerator())
    windows = [(layer,) for layer in reversed(targets)]
    found = collect_in_windows(model, targets, loader, accelerator(), windows, Shelf(tmp_path))
    assert found.groups == whole.groups
    assert any(len(group) > 1 for group in found.groups) == (name != "gpt2")
    assert set(found.layers) == set(whole.layers)
    for layer, statistics in whole.layers.items():
        assert torch.equal(found.layers[layer].input_covariance, statistics.input_covariance)
        assert torch.equal(found.layers[layer].grad_covariance, statistics.grad_covariance)


def steps(factorization):
    """How the numbers of factors lie in memory."""
    tensors = [*factorization.factors, *(each for each in vars(factorization).values() if torch.is_tensor(each))]
    return [[(n, step) for n, step in zip(t.shape, t.stride(), strict=True) if n > 1] for t in tensors]


@pytest.mark.parametrize("options", [{}, {"target_modules": ["Conv2d", "Linear"]}], ids=["llama", "resnet"])
def test_factors_lie_in_memory_as_they_come_back_from_a_file(options, tmp_path):
    """Or the last bits of what is made of large ones would be others."""
    model, batch = TINY_MODELS["resnet" if options else "llama"](EXAMPLES)
    data = split_batch(batch, 1)
    forms = []
    for settings in ({}, {"work_dir": tmp_path}):
        compressor = LowRankCompressor(LosslessLowRankConfig(keep_ratio=0.5, batch_size=2, **options), **settings)
        compressor.calibrate(model, data[:24], eval_dataset=data[24:])
        found = compressor._calibration.factors.factorizations
        forms.append({(name, form): steps(each) for name in found for form, each in found[name].items()})
        compressor.release()
    assert forms[0] == forms[1]
    assert ({form for _, form in forms[0]} == {"channel", "spatial"}) == bool(options)


class TestARefit:
    """The last 8 examples are held out, and 6 of the others judge: 18, in batches of 2, are fitted to."""

    def test_takes_as_many_batches_as_fit(self, monkeypatch):
        limit = small(monkeypatch, llama()[0], share=2)
        monkeypatch.setattr(memory, "refit_memory", lambda *_: (limit // 3, 9))
        given = []
        monkeypatch.setattr(trial, "refit", lambda *_, most, **__: given.append(most) or [])
        _, report = compressed(max_memory=limit)
        kept, of = report.memory.refit_batches
        assert of == 9
        assert 1 <= kept <= 2
        assert set(given) == {kept}
        assert report.memory.sentence.endswith(f"; the refit takes the first {kept} of 9 batches")
        assert CompressionReport.from_json(report.to_json()).memory == report.memory

    def test_takes_again_what_an_earlier_run_in_the_folder_took(self, monkeypatch, tmp_path):
        taken = []
        for held in (limit := small(monkeypatch, llama()[0], share=2)) // 3, 0:
            monkeypatch.setattr(memory, "refit_memory", lambda *_, held=held: (held, 9))
            taken.append(compressed(max_memory=limit, work_dir=tmp_path / "work")[1].memory.refit_batches)
        assert taken[0] is not None
        assert taken[1] == taken[0]

    def test_that_does_not_fit_leaves_the_statistics_in_memory_that_do(self, monkeypatch, tmp_path, caplog):
        monkeypatch.setattr(memory, "refit_memory", lambda *_: (2**50, 9))
        model, batch = llama(EXAMPLES)
        compressor, data = LowRankCompressor(options()), split_batch(batch, 1)
        path = tmp_path / "statistics.safetensors"
        with caplog.at_level("WARNING"):
            compressor.calibrate(model, data[:24], eval_dataset=data[24:], statistics_path=path)
        assert "the refit takes the first 1 of 9 batches" in caplog.text
        compressor.compress_to(0.5)
        assert path.exists()
        assert (compressor.report.memory.disk, compressor.report.memory.refit_batches) == (0, (1, 9))

    def test_takes_more_batches_the_more_memory_there_is(self, monkeypatch):
        """Whether statistics are in memory or on disk; and no more memory than there is."""
        monkeypatch.setattr(memory, "resident", lambda device: 0)
        model, batch = llama(40)
        parts = split_data(model, split_batch(batch, 2), None, batch_size=2, seed=0, selection_fraction=0.0)
        targets, taken = find_targets(model).chosen, []
        needs = [memory.needs_of(module) for module in targets.values()]
        whole = sum(each.statistics + each.factors for each in needs)
        for share in (0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 2.0, 4.0):
            try:
                plan, _ = memory.plan_memory(model, targets, parts, accelerator(), int(share * whole), refits=True)
            except ConfigurationError:
                continue
            taken.append(16 if plan.refit_batches is None else plan.refit_batches[0])
            assert plan.expected <= plan.limit or taken[-1] == 1
        assert taken == sorted(taken)
        assert taken[-1] > taken[0] or len(taken) < 3

    def test_takes_all_of_them_where_these_fit(self):
        _, report = compressed()
        assert report.memory.refit_batches is None
        assert "refit" not in report.memory.sentence

    def test_is_counted_with_all_its_batches(self):
        model, batch = llama(18)
        parts = split_data(model, split_batch(batch, 2), None, batch_size=1, seed=0, selection_fraction=0.0)
        targets = find_targets(model).chosen
        held, batches = refit_memory(model, targets, parts, accelerator())
        assert batches == dataset_size(parts.calibration)
        assert held > 0

    def test_holds_at_a_layer_what_the_forward_pass_still_needs(self):
        """At `down_proj`: its input, and the residual stream in float32, for each of 12 tokens of an example."""
        sizes = []
        for count in (4, 8):
            model, batch = llama(count)
            sizes.append(bytes_waiting(model, {"down": model.model.layers[1].mlp.down_proj}, batch))
        config, tokens = model.config, batch["input_ids"].numel() - batch["input_ids"].numel() // 2
        activations = 4 * tokens * (config.hidden_size + config.intermediate_size)
        assert activations <= sizes[1] - sizes[0] <= 3 * activations

    def test_does_not_count_weights(self):
        linear = torch.nn.Linear(64, 64)
        with torch.no_grad(), Results(linear) as results:
            view = linear.weight.T  # noqa: F841
            assert results.held() == 0
            kept = torch.ones(1000)
            also = kept[:10]  # noqa: F841
            kept + 1
            assert results.held() == kept.nbytes


def first_batch_that_holds(activations):
    return lambda *_, recompute=False: (0, 0.7) if recompute else (activations, 0.5)


class TestBlocksThatRunAgain:
    """Without them, the activations of a batch leave room for one layer at a time, or for none."""

    def test_save_passes_and_change_nothing(self, monkeypatch):
        expected, before = compressed()
        size = max(needs_of(m).statistics for m in llama()[0].modules() if type(m).__name__ == "Linear")
        for activations in (5 * size, 9 * size):
            with monkeypatch.context() as patch:
                limit = small(patch, llama()[0])
                patch.setattr(memory, "_first_batch", first_batch_that_holds(activations))
                found, report = compressed(max_memory=limit)
            assert report.memory.recomputes
            assert "with gradient checkpointing" in report.memory.sentence
            passed = report.memory.passes * report.calibration["examples"]  # one in a batch
            assert report.memory.seconds == pytest.approx(0.7 * passed)
            assert not before.memory.recomputes
            same(expected, found)

    @pytest.mark.parametrize(("room", "more", "saves"), [(40, 50, False), (30, 60, True), (5, 20, True)])
    def test_are_worth_it_where_passes_become_fewer_by_a_third(self, room, more, saves):
        statistics = {f"layers.{n}.q": 10 for n in range(12)}
        assert memory._saves_time(statistics, room, more) is saves


def test_number_formats_and_measured_objectives_work_from_disk(tmp_path):
    config = options(keep_ratio=0.15, formats=["int8", "int4"])
    expected, found = compressed(config=config)[0], compressed(config=config, work_dir=tmp_path)[0]
    same(expected, found)


def test_what_was_on_disk_is_removed_without_a_folder_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen = []
    put = Shelf.put
    monkeypatch.setattr(Shelf, "put", lambda self, *rest: (seen.append(self.folder), put(self, *rest)))
    compressed(max_memory=small(monkeypatch, llama()[0]))
    assert {folder.parent for folder in seen} == {tmp_path}
    assert list(tmp_path.iterdir()) == []


class TestAWorkFolder:
    def test_is_used_again(self, tmp_path, monkeypatch):
        first, before = compressed(work_dir=tmp_path / "work")
        assert before.memory.fits
        assert before.memory.disk > 0
        files = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*.safetensors")}
        monkeypatch.setattr(windows_module, "collect_statistics", None)
        second, report = compressed(work_dir=tmp_path / "work")
        same(first, second)
        assert {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*.safetensors")} == files
        assert report.calibration["examples"] > 0

    @pytest.mark.parametrize(
        ("changed", "named"),
        [
            ({"config": options(damping=0.1)}, "damping"),
            ({"config": options(formats=["int8"], keep_ratio=0.2)}, "size, formats"),
            ({"make": lambda count: llama(count, seed=1)}, "data"),
            ({"make": lambda count: with_setting(llama(count), "rms_norm_eps", 0.1)}, "configuration of the model"),
        ],
        ids=["option", "formats", "data", "setting"],
    )
    def test_of_other_inputs_is_refused_with_what_changed(self, tmp_path, changed, named):
        compressed(work_dir=tmp_path / "work")
        with pytest.raises(ConfigurationError, match=f"what changed: {named}"):
            compressed(work_dir=tmp_path / "work", **changed)

    @pytest.mark.parametrize("kind", ["inputs of", "model.layers", "channel factors of", "curve of", "pass for"])
    def test_of_which_a_file_was_removed_is_completed(self, tmp_path, kind):
        """As a damaged one is, for it says so."""
        first, _ = compressed(work_dir=tmp_path / "work")
        for file in (tmp_path / "work").rglob("*.safetensors"):
            with safe_open(file, framework="pt") as opened:
                if json.loads(opened.metadata()["about"])["key"].startswith(kind):
                    break
        content = file.read_bytes()
        file.write_bytes(content[:-1])
        with pytest.raises(CheckpointError, match=f"{file}.*damaged.*Remove it"):
            compressed(work_dir=tmp_path / "work")
        file.unlink()
        same(first, compressed(work_dir=tmp_path / "work")[0])
        assert file.exists()

    def test_on_a_full_disk_is_an_error_with_its_name(self, tmp_path, monkeypatch):
        def full(*_, **__):
            raise SafetensorError("File too large")

        monkeypatch.setattr("hf_lossless_lr.statistics.shelf.save_file", full)
        with pytest.raises(OSError, match=r"work.* cannot be written: File too large"):
            compressed(work_dir=tmp_path / "work")

    def test_belongs_to_one_run_at_a_time(self, tmp_path):
        model, batch = llama(EXAMPLES)
        compressor = LowRankCompressor(options(), work_dir=tmp_path / "work")
        data = split_batch(batch, 1)
        compressor.calibrate(model, data[:24], eval_dataset=data[24:])
        with pytest.raises(ConfigurationError, match="in use by another run: process"):
            compressed(work_dir=tmp_path / "work")
        compressor.release()
        compressed(work_dir=tmp_path / "work")

    def test_with_other_files_is_refused(self, tmp_path):
        (tmp_path / "mine.txt").write_text("x")
        with pytest.raises(ConfigurationError, match="has other files"):
            compressed(work_dir=tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]

    def test_with_a_damaged_journal_is_refused(self, tmp_path):
        (tmp_path / "journal.json").write_text("{")
        with pytest.raises(ConfigurationError, match="is damaged"):
            compressed(work_dir=tmp_path)

    def test_is_refused_for_what_needs_everything_in_memory(self, tmp_path):
        with pytest.raises(ConfigurationError, match=r"paper-lossless.*needs all statistics"):
            compressed(config=LosslessLowRankConfig(objective="paper-lossless", epsilon=1.0), work_dir=tmp_path / "w")
        model, batch = llama(EXAMPLES)
        with pytest.raises(ConfigurationError, match="statistics_path"):
            LowRankCompressor(options(), work_dir=tmp_path / "v").calibrate(
                model, split_batch(batch, 1), statistics_path=tmp_path / "statistics"
            )

    def test_that_cannot_be_written_is_an_error_of_its_name(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigurationError, match=r"work_dir: .* cannot be written"):
            compressed(work_dir=tmp_path / "file" / "work")


KILLED_AFTER = """
import os, signal, sys
from hf_lossless_lr.statistics import collect_in_windows
from hf_lossless_lr.statistics.shelf import Shelf
from pipeline.test_bounded_memory import compressed

put, left, kind = Shelf.put, [int(sys.argv[1])], sys.argv[4]

def put_or_die(self, key, *rest):
    left[0] -= key.startswith(kind)
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, key, *rest)
    print(key, flush=True)

Shelf.put = put_or_die
compressed(examples=96, work_dir=sys.argv[2])[0].save_pretrained(sys.argv[3])
"""


def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_bytes(tmp_path):
    """Killed in the statistics, whose pass begins again, and in factors and refit, of which no layer is repeated."""
    work, output = tmp_path / "work", tmp_path / "output"
    expected = tmp_path / "expected"
    model, report = compressed(examples=96)
    model.save_pretrained(expected)
    assert report.refitted
    written = []
    for puts, kind in ((5, ""), (40, ""), (6, "refit"), (10_000, "")):
        arguments = [sys.executable, "-c", KILLED_AFTER, str(puts), str(work), str(output), kind]
        run = subprocess.run(arguments, cwd=TESTS, capture_output=True, text=True, check=False)
        assert run.returncode == (0 if puts == 10_000 else -signal.SIGKILL), run.stderr
        written.append(run.stdout.splitlines())
    assert len(written[0]) == 5
    later = written[1] + written[2] + written[3]
    factors, refitted = ([key for key in later if key.startswith(kind)] for kind in ("curve of", "refit"))
    assert len(factors) == len(set(factors)) == 14
    assert any(key.startswith("curve of") for key in written[1])
    assert not any(key.startswith("pass for") for key in written[2])
    assert sum(key.startswith("refit") for key in written[2]) == 6
    fitted = sum(layer.rank is not None for layer in report.layers.values())
    assert len(set(refitted)) == fitted
    assert len(refitted) <= fitted + 2  # but for those of a group that was half finished
    assert (output / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


@pytest.mark.parametrize("recompute", [False, True])
def test_what_a_batch_holds_at_most_has_its_logits_and_their_gradient(recompute):
    """They are there behind the last block, where nothing of the blocks themselves has to be."""
    model, batch = llama(8)
    model.config.vocab_size = 5000
    model = type(model)(model.config)
    parts = split_data(model, as_examples(batch) * 4, None, batch_size=8, seed=0, selection_fraction=0.0)
    found, _ = memory._first_batch(model, find_targets(model).chosen, parts, accelerator(), recompute=recompute)
    logits = 4 * batch["input_ids"].numel() * 5000
    assert 2 * logits <= found <= 6 * logits


def test_the_activations_of_a_batch_are_those_that_its_passes_hold():
    """More examples hold more, each as much, beside what is there for one at a time; and weights do not count."""
    model, batch = llama(EXAMPLES)
    targets = find_targets(model).chosen
    found = []
    for size in (4, 8, 16, 100):
        parts = split_data(model, as_examples(batch), None, batch_size=size, seed=0, selection_fraction=0.0)
        found.append(memory._first_batch(model, targets, parts, accelerator())[0])
    assert found[0] > 0
    assert found[1] == pytest.approx(2 * found[0], rel=0.1)
    assert found[2] - found[1] == pytest.approx(2 * (found[1] - found[0]), rel=0.1)
    assert found[3] > found[2]


def test_windows_of_another_limit_take_nothing_for_finished_that_is_not(tmp_path, monkeypatch):
    """As many windows, cut elsewhere, after a run that finished the first one."""
    model, batch = llama(EXAMPLES)
    targets, loader, shelf = find_targets(model).chosen, loader_of(split_batch(batch, 4)), Shelf(tmp_path)
    names = tuple(targets)
    with monkeypatch.context() as patch:
        passes = iter([windows_module.collect_statistics])  # one, then no more
        patch.setattr(windows_module, "collect_statistics", lambda *a, **k: next(passes)(*a, **k))
        with pytest.raises(StopIteration):
            collect_in_windows(model, targets, loader, accelerator(), [names[:5], names[5:]], shelf)
    found = collect_in_windows(model, targets, loader, accelerator(), [names[:7], names[7:]], shelf)
    assert tuple(found.layers) == names
    assert found.uncalled == ()
