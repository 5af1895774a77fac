"""The device to compute on, and the number format that suits it."""

from __future__ import annotations

from functools import cache

import torch

from llmos.config import Device
from llmos.errors import ConfigError


def resolve_device(device: Device) -> torch.device:
    """Return the device to compute on; `auto` takes a GPU when there is one.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if device is Device.CUDA and not available:
        raise ConfigError(
            "device is set to cuda, but PyTorch sees no CUDA device",
            hint="set LLMOS_DEVICE=cpu, or install a CUDA build of PyTorch and its driver",
        )
    use_gpu = device is Device.CUDA or (device is Device.AUTO and available)
    return torch.device("cuda" if use_gpu else "cpu")


@cache
def emulates_bfloat16() -> bool:
    """Tell whether this CPU has no bfloat16 instructions, so that float32 is 3-4 times faster."""
    features = torch.cpu.get_capabilities()
    native = features.get("avx512_bf16") or features.get("amx_bf16")
    return features.get("architecture") == "x86_64" and not native


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16, or float32 on CPUs that would only emulate it: twice the memory there."""
    return torch.float32 if device.type == "cpu" and emulates_bfloat16() else torch.bfloat16
