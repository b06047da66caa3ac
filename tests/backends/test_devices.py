"""Which device computes, in which type, and what memory is free."""

from __future__ import annotations

import platform
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from sfumato.backends import devices
from sfumato.backends.devices import choose_device, free_host_bytes, native_bfloat16
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


# --- memory ----------------------------------------------------------------------------------------------------------

V2 = {"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 600\ninactive_file 50\n"}
V1 = {"memory.limit_in_bytes": "900", "memory.usage_in_bytes": "700", "memory.stat": "total_inactive_file 60\n"}


def test_free_memory_of_this_machine() -> None:
    assert 2**20 < free_host_bytes() <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("said", "files", "free"),
    [
        ("0::/", {"": V2}, 350),  # a container's own root
        ("0::/a/b", {"a": V2, "a/b": V2 | {"memory.max": "800"}}, 150),  # the narrowest limit counts
        ("0::/a/b", {"a": V2, "a/b": V2 | {"memory.max": "max"}}, 350),
        ("0::/a", {"a": V2 | {"memory.current": "2000"}}, 0),
        ("0::/a", {"a": V2 | {"memory.stat": "anon 600\n"}}, 5000),  # what cannot be read is no limit
        ("4:memory:/d/1\n1:cpu:/\n0::/", {"memory": V1}, 260),  # version 1, seen at the root
        ("4:cpu,memory:/d/1", {"memory/d/1": V1, "memory": V1 | {"memory.limit_in_bytes": str(2**63 - 4096)}}, 260),
        ("1:cpu:/\n0::/", {"memory": V1}, 5000),  # in no group for memory
        (None, {"": V2}, 5000),  # not Linux
    ],
)
def test_free_memory_within_limits(
    said: str | None, files: dict[str, dict[str, str]], free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for group, texts in files.items():
        (tmp_path / "groups" / group).mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (tmp_path / "groups" / group / name).write_text(text)
    if said is not None:
        (tmp_path / "own").write_text(said)
    monkeypatch.setattr(devices, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(devices, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5000))
    assert free_host_bytes() == free
