from __future__ import annotations

import pytest
import torch

from llmos.config import Device
from llmos.errors import ConfigError
from llmos.models.devices import compute_dtype, emulates_bfloat16, resolve_device

CPU = torch.device("cpu")


def test_bfloat16_is_used_where_it_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    for features, expected in (
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"architecture": "aarch64"}, torch.bfloat16),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda answer=features: answer)
        emulates_bfloat16.cache_clear()
        assert compute_dtype(CPU) is expected
        assert compute_dtype(torch.device("cuda")) is torch.bfloat16
    emulates_bfloat16.cache_clear()


def test_the_device_is_the_one_asked_for() -> None:
    gpu = torch.cuda.is_available()
    assert resolve_device(Device.CPU) == CPU
    assert resolve_device(Device.AUTO).type == ("cuda" if gpu else "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no CUDA device"):
        resolve_device(Device.CUDA)
