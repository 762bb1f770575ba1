"""Registration of the kernels as `torch.library` operators, so that `torch.compile` sees one opaque node with known output shapes.

The low-level `Library` is used instead of `torch.library.custom_op`: its call costs microseconds on the CPU, not tens of them.
"""

from collections.abc import Callable
from typing import Any

import torch

library = torch.library.Library("eagle_kernels", "DEF")


def register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define `eagle_kernels::<schema>`. kernel: runs it on CUDA tensors (and on CPU tensors in Triton's interpreter); fake: shapes only."""
    name = schema.split("(", 1)[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def run(*args: Any) -> Any:
        device = next(argument.device for argument in args if isinstance(argument, torch.Tensor))
        if device.type == "cuda":
            with torch.cuda.device(device):
                return kernel(*args)
        return kernel(*args)

    library.impl(name, run, "CUDA")
    library.impl(name, run, "CPU")
    torch.library.register_fake(f"eagle_kernels::{name}", fake, lib=library)
