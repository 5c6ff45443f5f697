"""Judging layers that another method puts in the place of the targets, by what our own are judged by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..checkpoint import LosslessLowRankConfig
from ..layers import ModelState, at_hand, checkpoint_bytes, in_place, on_device
from ..report import Certificate, Speed
from ..timing import Clock
from ..verdict import paired_outcomes
from .calibration import Calibration, check_unchanged
from .speed import measured_speed
from .summary import Certified, certificate_of

Make = Callable[[Mapping[str, nn.Module]], Mapping[str, nn.Module]]
"""From the targets by name, which it leaves as they are, to what takes their places; others stay dense.

It may give back layers in the place of others, too, that have no submodules; they do not count as parameters kept.
"""


@dataclass(frozen=True)
class Judgement:
    """What a compression made of a model.

    Attributes:
        keep_ratio: parameters of the targeted weights, kept divided by original ones.
        bytes: the same of the bytes of all tensors of the checkpoint.
        loss: mean loss on the held-out data of the dense and of the compressed model, in nats.
        accuracy: the same of the accuracy; None where the head has none.
        certificate: what is certified; None where the data cannot carry a certificate.
        speed: how long both take for a calibration batch; None where that was not measured.
        seconds: time of the compression, without the statistics.
        changed: whether there is a layer in another's place at all.
    """

    keep_ratio: float
    bytes: float
    loss: tuple[float, float]
    accuracy: tuple[float, float] | None
    certificate: Certificate | None
    speed: Speed | None
    seconds: float
    changed: bool = True

    def share(self, config: LosslessLowRankConfig) -> float:
        """Return the share that the model keeps of what the configured size counts; parameters, unless it is bytes."""
        return self.bytes if config.size == "bytes" else self.keep_ratio


def judge(
    calibration: Calibration, config: LosslessLowRankConfig, make: Make, earlier: Sequence[Certified]
) -> Judgement:
    """Make layers, and judge the model with them in place; it is dense before and afterwards.

    Args:
        calibration: the calibration of the model.
        config: margins and confidence.
        make: makes the layers.
        earlier: what was judged on the same data.

    Returns:
        The judgement.
    """
    model, unfused, device = calibration.dense.model, calibration.dense.unfused, calibration.accelerator.device
    targets, before, clock = calibration.factors.targets.chosen, ModelState(model), Clock()
    settings = dict(vars(model.config))  # a loss may set its problem_type
    fused = {path: model.get_submodule(path) for path in unfused}
    try:
        with at_hand(model):
            check_unchanged(calibration)
            with in_place(model, unfused), on_device(model, device, targets.values()):
                with clock.timed("making"), torch.no_grad():
                    layers = make(targets)
                data, accelerator = calibration.parts.held_out, calibration.accelerator
                outcomes = paired_outcomes(model, layers, data, accelerator, "Evaluating", temperatures=True)
                speed = measured_speed(calibration, layers, fused, config)
                with in_place(model, layers):
                    size = checkpoint_bytes(model)
    except BaseException:
        before.restore()
        raise
    finally:
        vars(model.config).update(settings)
    dense = {name: curve.dense_parameters for name, curve in calibration.factors.curves.items()}
    untouched = sum(numbers for name, numbers in dense.items() if name not in layers)
    made = _numbers(layer for name, layer in layers.items() if name in dense)
    kept = (untouched + made) / sum(dense.values())
    fingerprint = calibration.parts.fingerprints["held_out"]
    found = Judgement(
        keep_ratio=kept,
        bytes=size / calibration.dense.bytes,
        loss=outcomes.mean_loss,
        accuracy=outcomes.accuracy,
        certificate=None,
        speed=speed,
        seconds=clock.seconds["making"],
        changed=bool(layers),
    )
    certificate, _ = certificate_of(found.changed, config, outcomes, fingerprint, found.share(config), earlier)
    return replace(found, certificate=certificate)


def _numbers(layers: Iterable[nn.Module]) -> int:
    """Return the parameters of layers without their biases; what layers share counts once."""
    parameters = (each for layer in layers for each in layer.named_parameters())
    return sum({id(p): p.numel() for name, p in parameters if name.rpartition(".")[2] != "bias"}.values())
