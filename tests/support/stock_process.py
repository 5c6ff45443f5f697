"""A process that has Transformers and not this package: it loads folders and says what their models answer.

`python stock_process.py` reads one line for each folder, `{"folder", "model", "inputs", "outputs"}` as JSON: the class
to load, a safetensors file of its inputs, and where to write what it returns. It answers each with a line, empty where
all went well. One process serves any number of models, as to import Transformers takes seconds.
"""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


class StockTransformers:
    """The other end of such a process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def answers(self, folder: Path, model: str, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors that a model in a folder gives for a batch."""
        inputs, outputs = folder / "inputs.safetensors", folder / "outputs.safetensors"
        save_file({name: value.clone().contiguous() for name, value in batch.items()}, inputs)
        order = {"folder": str(folder), "model": model, "inputs": str(inputs), "outputs": str(outputs)}
        print(json.dumps(order), file=self.process.stdin, flush=True)
        said = self.process.stdout.readline()
        assert said == "\n", f"stock Transformers does not load or run {model}: {said}"
        return load_file(outputs)


@contextmanager
def stock_transformers() -> Iterator[StockTransformers]:
    """Start such a process for the time of the body."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, str(Path(__file__).resolve())]
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with process:
        yield StockTransformers(process)
        process.stdin.close()


def tensors_of(outputs: Any) -> dict[str, torch.Tensor]:
    """Return the floating-point tensors that a model returned, but its loss."""
    found = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor) and name != "loss"}
    return {name: value.clone().contiguous() for name, value in found.items() if value.is_floating_point()}


def serve() -> None:
    """Answer orders until there are no more."""
    sys.modules["hf_lossless_lr"] = None  # type: ignore[assignment]  # to import it is an error
    import transformers

    from support import own_architecture

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            model_class = getattr(transformers, order["model"], None) or getattr(own_architecture, order["model"])
            model, info = model_class.from_pretrained(order["folder"], output_loading_info=True)
            assert not any(info.values()), info
            with torch.no_grad():
                outputs = model.eval()(**load_file(order["inputs"]))
            save_file(tensors_of(outputs), order["outputs"])
        except Exception as error:  # noqa: BLE001 # said to whoever asked
            print(f"{type(error).__name__}: {error}".replace("\n", " "), flush=True)
        else:
            print(flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    serve()
