"""`hf-lossless-lr benchmark`: how long a model takes, or a dense and a compressed one in turns."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers
from transformers.utils import logging

from ..errors import ConfigurationError
from ..evaluation import MOST_THREADS, measure_speed, random_batch
from ..files import write_atomically
from ..ranks import FEWEST_TURNS, TURNS
from ..report import Speed, layer_table, speed_table, write_speed_figure
from .argument_checks import check_files
from .loading import PrecisionArguments, load_auto, load_model


@dataclass(kw_only=True)
class BenchmarkArguments(PrecisionArguments):
    """The settings to measure; each combination of them."""

    batch_sizes: list[int] = field(default_factory=lambda: [1, 8, 32], metadata={"help": "examples in a batch"})
    sizes: list[int] | None = field(
        default=None,
        metadata={
            "help": "tokens of a text, pixels of a side of a picture, samples of a sound; default 128 or what the "
            "model takes, what it was made for (224 where its configuration does not say), 16,000"
        },
    )
    threads: list[int] | None = field(default=None, metadata={"help": "threads of the processor; default as set"})
    device: str = field(default="cpu", metadata={"help": "device to run on"})
    turns: int = field(default=TURNS, metadata={"help": "how often each model is measured"})
    memory: bool = field(default=False, metadata={"help": "measure the peak memory of a pass, too"})
    layers: bool = field(default=False, metadata={"help": "measure the layers one by one, too"})
    json: str | None = field(default=None, metadata={"help": "also write the figures to this file"})
    plot: str | None = field(default=None, metadata={"help": "also draw them into this PNG file"})


def add_parser(commands: Any) -> None:
    """Add the parser of this command."""
    parser = commands.add_parser(
        "benchmark",
        help="measure how long a model takes, or a dense and a compressed one in turns",
        description="Measure end-to-end latency on random inputs: median and quartiles; two models in turns, with the "
        "ratio of their times.",
        dataclass_types=[BenchmarkArguments],
    )
    parser.add_argument("model", help="hub id or local folder of a model")
    parser.add_argument("other", nargs="?", help="a second model, usually the compressed one")


def benchmark(arguments: Any) -> int:
    """Run `hf-lossless-lr benchmark`.

    Args:
        arguments: the parsed arguments.

    Returns:
        Exit code.

    Raises:
        ConfigurationError: if a number cannot be, a file cannot be written, or the models take other inputs.
    """
    for name in ("batch_sizes", "sizes", "threads"):
        if any(value < 1 for value in getattr(arguments, name) or ()):
            raise ConfigurationError(f"--{name}: must be at least 1.")
    if max(arguments.threads or [1]) > MOST_THREADS:
        raise ConfigurationError(f"--threads: must be at most {MOST_THREADS:,}.")
    if arguments.turns < FEWEST_TURNS:
        raise ConfigurationError(f"--turns: must be at least {FEWEST_TURNS}, got {arguments.turns}.")
    check_files(arguments)
    if arguments.device.partition(":")[0] == "meta":
        raise ConfigurationError("--device: there are no numbers on the meta device, and nothing to measure.")
    models = [_loaded(name, arguments.dtype, arguments.device) for name in (arguments.model, arguments.other) if name]
    if len({_inputs_of(model) for model in models}) > 1:
        raise ConfigurationError("the two models take other kinds of input, so their times cannot be compared.")
    speeds: list[Speed] = []
    settings = [
        (threads, examples, size)
        for threads in arguments.threads or [None]
        for size in arguments.sizes or [None]
        for examples in arguments.batch_sizes
    ]
    for threads, examples, size in logging.tqdm(settings, desc="Measuring"):
        batch = random_batch(models[0], examples, size)
        speeds.append(measure_speed(models, batch, arguments.turns, threads, arguments.memory, arguments.layers))
    print(speed_table(speeds))
    if arguments.layers:
        print(f"\n{speeds[-1].setting}, by layer\n{layer_table(speeds[-1])}")
    if arguments.json:
        write_atomically(arguments.json, json.dumps([asdict(speed) for speed in speeds], indent=2) + "\n")
    if arguments.plot:
        write_speed_figure(speeds, arguments.plot)
    return 0


def _inputs_of(model: Any) -> tuple[Any, ...]:
    """Return what two models have in common that take the same inputs."""
    words = getattr(model.config.get_text_config(), "vocab_size", None)
    return model.main_input_name, model.config.is_encoder_decoder, words


def _loaded(name: str, dtype: str, device: str) -> Any:
    """Load a model as the class that its checkpoint names."""
    config = load_auto("AutoConfig", name)
    if not config.architectures:
        raise ConfigurationError(f"{name}: its config.json does not say which class of Transformers it is of.")
    if not hasattr(transformers, config.architectures[0]):
        raise ConfigurationError(
            f"{name}: its class {config.architectures[0]!r} is none of Transformers; load the models yourself and use "
            "hf_lossless_lr.evaluation.measure_speed."
        )
    try:
        return load_model(config.architectures[0], name, dtype).to(torch.device(device)).eval()
    except (RuntimeError, AssertionError) as error:  # the latter from a PyTorch without CUDA
        raise ConfigurationError(f"--device: {device!r} cannot be used: {error}") from error
