"""Precisions of the computation and devices: what `parallel.dtype: auto` means, and where `model.fp8` can run."""

from __future__ import annotations

import logging
from typing import Any

from eagle_train.config import Config, ConfigError

logger = logging.getLogger(__name__)


def has_bfloat16(device: str) -> bool:
    """Whether a kind of device (`cpu` or `cuda`) multiplies bfloat16 matrices in hardware.

    GPUs from compute capability 8.0; CPUs with AVX512-BF16 or AMX, or Arm's BF16 extension.
    """
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu: Any = torch.cpu
    checks = [getattr(cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    if any(supported() for supported in checks if supported is not None):
        return True
    capabilities = cpu.get_capabilities() if hasattr(cpu, "get_capabilities") else {}
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))


def auto_dtype(device: str) -> str:
    """The precision that `parallel.dtype: auto` means on a kind of device."""
    return "bfloat16" if has_bfloat16(device) else "float32"


def warn_of_slow_bfloat16(config: Config, device: str) -> None:
    """Log a warning when bfloat16 is configured and the device does not compute it natively."""
    if config.parallel.dtype == "bfloat16" and not has_bfloat16(device):
        logger.warning(
            "parallel.dtype is bfloat16, for which this %s has no instructions; on such a CPU a step of SmolLM2-135M took 163 s in "
            "bfloat16 and 15 s in float32. Set parallel.dtype: auto or float32",
            "CPU" if device == "cpu" else "GPU",
        )


def warn_of_slow_fp8(config: Config, device: str) -> None:
    """Log a warning when `model.fp8` is set and the device can only round to 8-bit floats."""
    if config.model.fp8 and device == "cpu":
        logger.warning(
            "model.fp8 on a CPU rounds as a GPU does and multiplies in %s: for tests; steps are slower than without it",
            config.parallel.dtype,
        )


def check_fp8(config: Config, device: str) -> None:
    """`check_fp8_gpu` of this process's GPU. `parallel.dtype` must be resolved."""
    import torch

    from eagle_kernels import float8_hardware

    if config.model.fp8 and device == "cuda":
        capability = torch.cuda.get_device_capability()
        check_fp8_gpu(config, torch.cuda.get_device_name(), capability, able=float8_hardware(device))


def check_fp8_gpu(config: Config, gpu: str, capability: tuple[int, int], *, able: bool) -> None:
    """Raises ConfigError when `model.fp8` is set and a GPU, or the precision of the run, has no products of 8-bit floats."""
    if not config.model.fp8:
        return
    if not able:
        raise ConfigError(
            f"model.fp8: {gpu} has compute capability {'.'.join(map(str, capability))}, and products of 8-bit floats need an "
            "NVIDIA GPU of 8.9 (Ada), 9.0 (Hopper) or newer; remove model.fp8"
        )
    if config.parallel.dtype != "bfloat16":
        raise ConfigError(f"model.fp8: the run computes in {config.parallel.dtype}; set parallel.dtype: bfloat16, or remove model.fp8")
