"""`FactorizedLinear`, and how `nn.Linear` and Transformers' `Conv1D` are seen as a matrix."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigurationError
from .factorized import Factorized
from .layout import fill_dense, register
from .model_state import random_state_kept
from .storage import CHANNEL


class FactorizedLinear(Factorized):
    """A linear layer `y = W x + b` whose weight is stored as low-rank factors.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        rank: rank of the weight; at most `min(in, out)`, and below it for pivoted storage.
        bias: whether the layer has a bias.
        storage: `pivoted` (`rank * (in + out - rank)` numbers) or `two-factor` (`rank * (in + out)`).
        layer_type: name of the dense layer it replaces, `Linear` or `Conv1D`; `dequantize` gives that type back.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        ConfigurationError: if the rank or the storage is not possible.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        storage: str = "pivoted",
        layer_type: str = "Linear",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features, rank, storage)
        self.layer_type = layer_type
        self.pivots_inputs = storage == "pivoted" and in_features < out_features  # permute the narrower side
        stored_in, stored_out = self._stored_sizes()
        self.down = nn.Linear(stored_in, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, stored_out, bias=False, device=device, dtype=dtype)
        self._finish(bias, device, dtype)


class _LinearLayout:
    pivots_narrow_side = True

    def refusal(self, module: nn.Module) -> str | None:
        return None

    def forms(self, module: nn.Module) -> tuple[str, ...]:
        return (CHANNEL,)

    def kernel_size(self, module: nn.Module) -> tuple[int, ...]:
        return ()

    def matrices(self, module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
        return weight[None]

    def row_shape(self, module: nn.Module, x: torch.Tensor) -> torch.Size:
        return x.shape[:-1]

    def positions(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        return None

    def input_rows(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x.unsqueeze(-2)

    def input_key(self, module: nn.Module, x: torch.Tensor) -> Hashable:
        return id(x)

    def random_input(self, module: Any, rows: int) -> torch.Tensor:
        weight = module.weight
        return torch.randn(rows, self.matrices(module, weight).shape[-1], device=weight.device, dtype=weight.dtype)

    def output_rows(self, module: nn.Module, y: torch.Tensor) -> torch.Tensor:
        return y.unsqueeze(-2)

    def factorized(self, module: Any, rank: int, storage: str, form: str = CHANNEL) -> FactorizedLinear:
        if form != CHANNEL:
            raise ConfigurationError(f"form: a {type(module).__name__} has no {form} form.")
        _, out_features, in_features = self.matrices(module, module.weight).shape
        with random_state_kept(module.weight.device):
            return FactorizedLinear(
                in_features,
                out_features,
                rank,
                bias=module.bias is not None,
                storage=storage,
                layer_type="Conv1D" if isinstance(module, Conv1D) else "Linear",
                device=module.weight.device,
                dtype=module.weight.dtype,
            )

    def dense(self, module: FactorizedLinear) -> nn.Module:
        weight = module.down.weight
        kw: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        layer = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, **kw)
        return fill_dense(layer, module, module.dense_weight())


class _Conv1DLayout(_LinearLayout):
    def matrices(self, module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
        return weight.T[None]

    def dense(self, module: FactorizedLinear) -> nn.Module:
        layer = Conv1D(module.out_features, module.in_features).to(module.down.weight)
        return fill_dense(layer, module, module.dense_weight().T)


register(nn.Linear, _LinearLayout())
register(Conv1D, _Conv1DLayout())
