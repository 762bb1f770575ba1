"""Linear layers with 4-bit weights that stay as they are: the frozen base of QLoRA (arXiv 2305.14314), computed by bitsandbytes.

A weight is NF4 in blocks of 64, and the blocks' largest values are 8-bit numbers in blocks of 256 (double quantisation): 4.13 bits per
parameter. Codes and scales are buffers, so an optimizer does not see them, FSDP does not shard them and a checkpoint has them as they are.
"""

from typing import Any

import torch
from torch import Tensor, nn

from eagle_model.layers import replace_layer

BLOCK, OUTER_BLOCK = 64, 256
_BUFFERS = ("codes", "absmax", "absmax_scales", "absmax_offset")


class QuantizedLinear(nn.Linear):
    """`W x + b` with W in NF4. `weight` is computed from the codes at every access, in float32."""

    def __init__(self, base: nn.Linear, *, empty: bool = False) -> None:
        """The weights of `base`, rounded. empty: buffers of their sizes with any content, for values that are loaded later."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.bias = base.bias
        _bitsandbytes()
        device, elements = base.weight.device, base.weight.numel()
        if empty:
            blocks = -(-elements // BLOCK)
            codes = torch.empty((elements + 1) // 2, 1, dtype=torch.uint8, device=device)
            absmax = torch.empty(blocks, dtype=torch.uint8, device=device)
            scales = torch.empty(-(-blocks // OUTER_BLOCK), device=device)
            offset = torch.empty((), device=device)
        else:
            codes, absmax, scales, offset = _rounded(base.weight)
        for name, values in zip(_BUFFERS, (codes, absmax, scales, offset), strict=True):
            self.register_buffer(name, values)

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        """Round `weight`, [out, in] on any device, into the buffers."""
        buffers: Any = self
        for name, values in zip(_BUFFERS, _rounded(weight.to(buffers.codes.device)), strict=True):
            getattr(self, name).copy_(values)

    def _state(self, dtype: torch.dtype) -> Any:
        """What bitsandbytes calls the state of the codes; dtype: of the values that they become."""
        functional = _bitsandbytes()
        buffers: Any = self
        device = buffers.codes.device
        outer = functional.QuantState(
            absmax=buffers.absmax_scales, code=_map("dynamic", device), blocksize=OUTER_BLOCK, dtype=torch.float32
        )
        return functional.QuantState(
            absmax=buffers.absmax,
            shape=torch.Size((self.out_features, self.in_features)),
            code=_map("nf4", device),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=buffers.absmax_offset,
            state2=outer,
        )

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The rounded weight, float32 [out, in]."""
        return _bitsandbytes().dequantize_4bit(self.codes, self._state(torch.float32))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """x: [..., in] -> [..., out]. Backward computes the weight again, so that no copy of it waits for backward."""
        from bitsandbytes import matmul_4bit  # pyright: ignore[reportMissingImports]

        return matmul_4bit(x, self.codes, self._state(x.dtype), bias=None if self.bias is None else self.bias.to(x.dtype))

    def dequantized(self) -> nn.Linear:
        """A plain layer with the rounded weight."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight, layer.bias = nn.Parameter(self.weight, requires_grad=False), self.bias
        return layer

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, nf4"


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The layers in 4 bits by name, those with an adapter too."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The buffers of a layer with this weight."""
    codes, state = _bitsandbytes().quantize_4bit(
        weight.detach().float().contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    return codes, state.absmax, state.state2.absmax, state.offset


def dequantize(model: nn.Module) -> list[str]:
    """Give layers without an adapter plain weights again, the rounded ones; returns the layers' names."""
    found = {name: layer for name, layer in model.named_modules() if type(layer) is QuantizedLinear}
    for name, layer in found.items():
        replace_layer(model, name, layer.dequantized())
    return list(found)


def parameter_count(model: nn.Module) -> int:
    """Parameters of a model, those in 4 bits included."""
    quantized = sum(layer.in_features * layer.out_features for layer in quantized_layers(model).values())
    return sum(parameter.numel() for parameter in model.parameters()) + quantized


_MAPS: dict[tuple[str, torch.device], Tensor] = {}


def _map(name: str, device: torch.device) -> Tensor:
    """Tables of bitsandbytes: the 16 values of NF4, the 256 of its 8-bit numbers."""
    if (name, device) not in _MAPS:
        functional = _bitsandbytes()
        made = functional.get_4bit_type("nf4", device=device) if name == "nf4" else functional.create_dynamic_map().to(device)
        _MAPS[name, device] = made
    return _MAPS[name, device]


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes.functional  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"4-bit weights need bitsandbytes ({error}): pip install 'eagle-model[qlora]'") from error
    return bitsandbytes.functional
