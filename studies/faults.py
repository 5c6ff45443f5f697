"""Break things at random and see what comes of it: interrupts, kills, damaged files, full disks.

    python studies/faults.py --records studies/results/faults.jsonl

Everything is made here: a tiny model, its data, its checkpoint. Each fault is drawn from a seed, so that a run can be
repeated; where a signal finds a process depends on the machine. An outcome is one of

* `as before`: what was there is there still, bit for bit, and nothing else;
* `whole`: the work was done already, or the damage changes nothing, and the result is right to the last bit;
* `refused`: one sentence and exit code 1, and nothing is left behind;
* `removed later`: what a killed process left is removed by the next run into the same output;
* `shown`: a report that was changed within what its own numbers allow;
* `lost`, `accepted`, `traceback`: a model or file is damaged; a wrong result is taken for right; an error unexplained.

The last three are what must not be.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from records import Record, known_records, write_records
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification
from transformers import PreTrainedTokenizerFast as FastTokenizer
from transformers.utils import logging

from hf_lossless_lr import LosslessLowRankConfig, LosslessLowRankError, LowRankCompressor
from hf_lossless_lr.commands.cli import main as command_line
from hf_lossless_lr.commands.loading import load_auto
from hf_lossless_lr.fingerprint import tensors_fingerprint
from hf_lossless_lr.layers import find_targets
from hf_lossless_lr.report import CARD_NAME, REPORT_NAME
from hf_lossless_lr.statistics import collect_statistics, load_statistics, save_statistics

WRONG = ("lost", "accepted", "traceback")
WORDS = [f"w{number}" for number in range(50)]
BETTER = ("improved", "lossless")
JUNK = (
    *BETTER,
    None,
    True,
    -1,
    0,
    3,
    10**40,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "\x1b[2J",
    "$\\frac{$",
    [],
    {},
    "x" * 999,
)
CPU = torch.device("cpu")


class Interrupt(KeyboardInterrupt):
    """One of ours."""


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    made = torch.Generator().manual_seed(count)
    ids = torch.randint(5, 50, (count, 4, 6), generator=made)
    labels = torch.randint(0, 3, (count, 4), generator=made)
    return [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": n} for i, n in zip(ids, labels, strict=True)
    ]


def tiny_model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = BertConfig(vocab_size=61, max_position_embeddings=40, num_labels=3, initializer_range=0.2, **sizes)
    return BertForSequenceClassification(config).eval()


def prepare(folder: Path) -> SimpleNamespace:
    """Make a model, data, and what an undisturbed run makes of them."""
    tiny_model().save_pretrained(folder / "model")
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    FastTokenizer(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder / "model")
    drawn = random.Random(0)
    rows = [{"sentence": " ".join(drawn.choices(WORDS, k=6)), "label": n % 3} for n in range(200)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--dataset", "json", "--data_files", str(folder / "data.jsonl")]
    arguments = ["compress", str(folder / "model"), "--task", "text-classification", *data, "--output"]
    place = SimpleNamespace(folder=folder, arguments=arguments, reference=folder / "reference")
    for _ in range(2):  # the first run warms up
        shutil.rmtree(place.reference, ignore_errors=True)
        start = time.perf_counter()
        if quietly(lambda: command_line([*arguments, str(place.reference)]))[0] != 0:
            raise SystemExit("the undisturbed run failed")
        place.seconds = time.perf_counter() - start
    return place


def quietly(work: Callable[[], Any]) -> tuple[Any, str, str]:
    """Return what work returns, and what it printed on both streams."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        return work(), out.getvalue(), err.getvalue()


def bits(folder: Path) -> dict[str, str]:
    """Name of each file to the hash of its bytes; of a report, which has times in it, to nothing."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    hashes = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {
        str(p.relative_to(folder)): "" if p.name in (REPORT_NAME, CARD_NAME) else digest
        for p, digest in hashes.items()
    }


# --- a compression that is stopped ----------------------------------------------------------------------------------


def interrupts(place: SimpleNamespace, drawn: random.Random) -> Iterator[str]:
    """Ctrl-C in the middle of `compress`, at any moment."""

    def compress(model: Any) -> None:
        LowRankCompressor(LosslessLowRankConfig()).compress(model, batches(6), eval_dataset=batches(2))

    def interrupt(*_: Any) -> None:
        raise Interrupt

    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        compress(tiny_model())
    longest, before = time.perf_counter() - start, signal.signal(signal.SIGALRM, interrupt)
    model = tiny_model()
    parts, state = dict(model.named_modules()), tensors_fingerprint(model.state_dict())
    try:
        while True:
            done = False
            try:
                signal.setitimer(signal.ITIMER_REAL, drawn.uniform(1e-4, longest))
                compress(model)
                done = True
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupt:
                pass
            if done:
                model = tiny_model()
                parts = dict(model.named_modules())
                yield "whole"
                continue
            now = dict(model.named_modules())
            same = now.keys() == parts.keys() and all(now[path] is module for path, module in parts.items())
            same = same and tensors_fingerprint(model.state_dict()) == state
            yield "as before" if same and not hasattr(model.config, "quantization_config") else "lost"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_in_a_child(place: SimpleNamespace, output: Path, prepared: Callable[[], Any] = lambda: None) -> int:
    """Start the command in a process of its own, and return the number of that."""
    child = os.fork()
    if child == 0:
        with (place.folder / "printed").open("w") as printed:
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
            code = 99
            try:
                prepared()
                code = command_line([*place.arguments, str(output)])
            except SystemExit as stop:
                code = stop.code
            except BaseException:  # noqa: BLE001 # a child must not go on as its parent
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
    return child


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def outcome_of(place: SimpleNamespace, output: Path, status: int, codes: tuple[int, ...]) -> str:
    """Judge what a run left: all of it or nothing."""
    text = (place.folder / "printed").read_text()
    if "Traceback" in text:
        return "traceback"
    names = {path.name for path in output.parent.iterdir()}
    if names == {output.name}:
        return "whole" if bits(output) == bits(place.reference) else "lost"
    code = os.waitstatus_to_exitcode(status)
    if names or code not in codes:
        return "lost"
    return "refused" if code == 1 else "as before"


def stopped_by(number: int) -> Callable[[SimpleNamespace, random.Random], Iterator[str]]:

    def stops(place: SimpleNamespace, drawn: random.Random) -> Iterator[str]:
        while True:
            output = fresh(place.folder / "stopped") / "out"
            child = run_in_a_child(place, output)
            time.sleep(drawn.uniform(0.05, 1.2 * place.seconds))
            os.kill(child, number)
            status = os.waitpid(child, 0)[1]
            if number != signal.SIGKILL:
                # before the command has begun, the signal does what it does to any program
                yield outcome_of(place, output, status, (128 + number, -number))
            elif output.exists():
                yield "whole" if bits(output) == bits(place.reference) else "lost"
            else:
                left = any(output.parent.iterdir())
                status = os.waitpid(run_in_a_child(place, output), 0)[1]
                again = outcome_of(place, output, status, (0,))
                yield again if again != "whole" else "removed later" if left else "as before"

    return stops


def full_disk(place: SimpleNamespace, drawn: random.Random) -> Iterator[str]:
    """No file can grow beyond a limit, which is drawn from nothing to more than the model."""
    largest = (place.reference / "model.safetensors").stat().st_size
    while True:
        output, limit = fresh(place.folder / "full") / "out", int(drawn.uniform(0, 1.2 * largest))

        def fill(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        status = os.waitpid(run_in_a_child(place, output, fill), 0)[1]
        yield outcome_of(place, output, status, (1,))


# --- damaged files --------------------------------------------------------------------------------------------------


def damaged(data: bytes, drawn: random.Random) -> bytes:
    """Cut bytes off, change some, or put some in."""
    kind, place = drawn.randrange(4), drawn.randrange(len(data))
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + drawn.randbytes(drawn.randint(1, 64)) + data[place:]
    changed = bytearray(data)
    for _ in range(1 if kind == 2 else 50):
        changed[drawn.randrange(len(data))] ^= 1 << drawn.randrange(8)
    return bytes(changed)


def junk_in(data: Any, drawn: random.Random) -> None:
    """Replace, drop or rename a random entry of JSON."""
    while True:
        places = list(data) if isinstance(data, dict) else list(range(len(data)))
        place = drawn.choice(places)
        if isinstance(data[place], (dict, list)) and data[place] and drawn.random() < 0.7:
            data = data[place]
            continue
        if drawn.random() < 0.2:
            del data[place]
        elif isinstance(data, dict) and drawn.random() < 0.2:
            data[drawn.choice(("", "\x1b[2J", "x"))] = data.pop(place)
        else:
            data[place] = drawn.choice(JUNK)
        return


def of_the_report(folder: Path) -> str:
    """Ask `hf-lossless-lr report` about a checkpoint, whose own verdict is none of the better ones."""
    try:
        code, out, printed = quietly(lambda: command_line(["report", str(folder)]))
    except Exception:  # noqa: BLE001 # whatever comes is what is looked for
        traceback.print_exc()
        return "traceback"
    if code == 0:
        return "accepted" if out.splitlines()[-1].startswith(BETTER) else "shown"
    lines = [line for line in printed.splitlines() if line.startswith("hf-lossless-lr: error: ")]
    return "refused" if code == 1 and len(lines) == 1 else "traceback"


def damaged_weights(place: SimpleNamespace, drawn: random.Random) -> Iterator[str]:
    """`report` is asked, whose certificate is about the weights that were measured."""
    copy, file = copied(place), "model.safetensors"
    whole = (copy / file).read_bytes()
    while True:
        (copy / file).write_bytes(damaged(whole, drawn))
        found = of_the_report(copy)
        if found == "shown":
            with contextlib.suppress(LosslessLowRankError):
                found = "whole" if same_model(copy, place.reference) else "accepted"
        yield "accepted" if found == "shown" else found


def same_model(folder: Path, other: Path) -> bool:
    name = "AutoModelForSequenceClassification"
    states = [load_auto(name, str(path)).state_dict() for path in (folder, other)]
    return tensors_fingerprint(states[0]) == tensors_fingerprint(states[1])


def damaged_config(place: SimpleNamespace, drawn: random.Random) -> Iterator[str]:
    """The manifest in `config.json`, which says what the factors are."""
    copy = copied(place)
    whole = (copy / "config.json").read_text()
    while True:
        config = json.loads(whole)
        for _ in range(drawn.randint(1, 3)):
            junk_in(config["quantization_config"], drawn)
        (copy / "config.json").write_text(json.dumps(config))
        try:
            yield "whole" if same_model(copy, place.reference) else "accepted"
        except LosslessLowRankError:
            yield "refused"
        except Exception:  # noqa: BLE001 # whatever comes is what is looked for
            traceback.print_exc()
            yield "traceback"


def damaged_reports(place: SimpleNamespace, drawn: random.Random) -> Iterator[str]:
    """Values, entries and bytes of the report."""
    copy = copied(place)
    (copy / "model.safetensors").unlink()  # what is told by the weights is another study
    whole = (copy / REPORT_NAME).read_text()
    while True:
        report = json.loads(whole)
        if drawn.random() < 0.2:
            report["certificate"]["status"] = drawn.choice(BETTER)
        for _ in range(drawn.randint(1, 3)):
            junk_in(drawn.choice((report, report["certificate"])), drawn)
            if not report.get("certificate") or not isinstance(report["certificate"], dict):
                break
        text = json.dumps(report).encode()
        (copy / REPORT_NAME).write_bytes(text if drawn.random() < 0.8 else damaged(text, drawn))
        yield of_the_report(copy)


def damaged_statistics(place: SimpleNamespace, drawn: random.Random) -> Iterator[str]:
    """Files of calibration statistics."""
    model, file = tiny_model(), place.folder / "statistics"
    loader = DataLoader(batches(6), batch_size=None)
    found = collect_statistics(model, find_targets(model).chosen, loader, Accelerator(cpu=True))
    save_statistics(found, file, "model")
    whole, right = file.read_bytes(), numbers_of(load_statistics(file, "model", CPU))
    while True:
        file.write_bytes(damaged(whole, drawn))
        try:
            yield "whole" if numbers_of(load_statistics(file, "model", CPU)) == right else "accepted"
        except LosslessLowRankError:
            yield "refused"
        except Exception:  # noqa: BLE001 # whatever comes is what is looked for
            traceback.print_exc()
            yield "traceback"


def numbers_of(statistics: Any) -> tuple[Any, ...]:
    tensors = {
        f"{name}.{key}": value for name, layer in statistics.layers.items() for key, value in vars(layer).items()
    }
    return tensors_fingerprint(tensors), statistics.loss, statistics.examples, statistics.units, statistics.groups


def copied(place: SimpleNamespace) -> Path:
    folder = place.folder / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(place.reference, folder))


CAMPAIGN: dict[str, tuple[Callable[[SimpleNamespace, random.Random], Iterator[str]], int]] = {
    "interrupt at any moment of a compression": (interrupts, 400),
    "SIGTERM to the command": (stopped_by(signal.SIGTERM), 40),
    "SIGHUP to the command": (stopped_by(signal.SIGHUP), 40),
    "SIGKILL to the command, then another run": (stopped_by(signal.SIGKILL), 40),
    "full disk": (full_disk, 40),
    "damaged weights": (damaged_weights, 500),
    "damaged manifest in config.json": (damaged_config, 500),
    "damaged statistics": (damaged_statistics, 500),
    "damaged report": (damaged_reports, 500),
}


def run(seed: int, share: float, kinds: list[str]) -> Iterator[Record]:
    with tempfile.TemporaryDirectory() as folder:
        place = prepare(Path(folder))
        for kind in kinds:
            fault, tries = CAMPAIGN[kind]
            tries, outcomes = max(1, round(share * tries)), fault(place, random.Random(seed))
            found = Counter(next(outcomes) for _ in range(tries))
            yield {"fault": kind, "seed": seed, "tries": tries, "outcomes": dict(sorted(found.items()))}


def keep(file: Path, record: Record) -> None:
    """Put a record into a file, in place of an older one of the same fault."""
    kept = known_records(file)
    found = {other["fault"]: other for other in [*kept, record]}
    write_records(file, [found[kind] for kind in CAMPAIGN if kind in found])


def table(records: list[Record]) -> list[str]:
    lines = ["| fault | tries | outcomes | wrong |", "|---|---:|---|---:|"]
    for record in records:
        found = record["outcomes"]
        good = ", ".join(f"{name} {count}" for name, count in found.items() if name not in WRONG)
        wrong = sum(found.get(name, 0) for name in WRONG)
        lines.append(f"| {record['fault']} | {record['tries']} | {good} | {wrong} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="share of the tries")
    parser.add_argument("--faults", nargs="+", choices=list(CAMPAIGN), default=list(CAMPAIGN))
    parser.add_argument("--records", type=Path, help="file for the figures; those of other faults in it are kept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    records = []
    for record in run(arguments.seed, arguments.share, arguments.faults):
        records.append(record)
        print(table(records)[-1], flush=True)
        if arguments.records:
            keep(arguments.records, record)
    print("\n".join(table(records)))
    if any(name in record["outcomes"] for record in records for name in WRONG):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
