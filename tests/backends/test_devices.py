"""Which device computes, and in which type."""

from __future__ import annotations

import platform

import pytest
import torch

from sfumato.backends.devices import choose_device, native_bfloat16
from sfumato.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("machine", "avx512", "amx", "onednn", "native"),
    [
        ("x86_64", True, False, True, True),
        ("AMD64", False, True, True, True),
        ("x86_64", False, False, True, False),  # with AVX512 alone oneDNN emulates it, and says yes
        ("x86_64", False, False, False, False),
        ("aarch64", False, False, True, True),
        ("arm64", False, False, False, False),
    ],
)
def test_bfloat16_of_processors(
    machine: str, avx512: bool, amx: bool, onednn: bool, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    assert native_bfloat16(CPU) == native
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not native_bfloat16(CPU)


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_of_gpus(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    def supported(including_emulation: bool) -> bool:
        asked.append(including_emulation)
        return native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert native_bfloat16(GPU) == native and asked == [False]
    assert native_bfloat16(torch.device("meta"))


def test_a_device_that_is_not_there() -> None:
    assert choose_device("cpu") == CPU and choose_device("auto").type in ("cpu", "cuda", "mps", "xpu")
    with pytest.raises(UserError, match="device 'tpu' cannot be used here .there is no such kind of device"):
        choose_device("tpu")
