"""`sfumato bench`: figures that are told, and what cannot be measured."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sfumato.backends.attention as backends
from sfumato.backends.timing import peak_memory
from sfumato.networks.attention import KERNELS, math


def test_a_small_model(place: Path, succeed: Callable) -> None:
    options = ("--model", "cat-dog.safetensors", "--repeat", 1, "--dtype", "float32", "--kernel", "sdpa", "--profile")
    (row,) = succeed("bench", *options, "--json").json
    assert (row["kernel"], row["dtype"], row["width"]) == ("sdpa", "float32", 8)
    assert row["step"] > 0 and row["step_flop"] > 1e6 and row["memory"] > 1e7 and row["decode"] == 0
    assert row["share"] == pytest.approx(row["step_flop"] / row["step"] / row["rate"])
    assert list(row["profile"]) == ["attention", "convolution", "linear", "norm", "rest"]
    assert row["profile"]["convolution"]["seconds"] > 0 < row["profile"]["convolution"]["flop"]
    assert sum(part["flop"] for part in row["profile"].values()) == row["step_flop"]
    told = succeed("bench", *options).out.splitlines()
    kinds = {line.split()[0]: line.split()[1:] for line in told[3:]}
    assert list(kinds) == list(row["profile"]) and kinds["convolution"][1].endswith("%")
    assert len(kinds["rest"]) == 1  # which has no products
    assert told[0].startswith("cat-dog, 8 x 8, batch 1") and "of matmul" in told[1] and "float32" in told[2]


@pytest.mark.parametrize(
    ("native", "options", "measured"),
    [
        (True, (), ["float32 sdpa", "bfloat16 sdpa", "bfloat16 adaptive"]),
        (False, (), ["float32 sdpa"]),  # a step in emulated bfloat16 would take minutes
        (False, ("--dtype", "bfloat16"), ["bfloat16 sdpa", "bfloat16 adaptive"]),
        (True, ("--kernel", "math"), ["float32 math", "bfloat16 math"]),
    ],
)
def test_what_is_measured_without_being_asked(
    native: bool, options: tuple[str, ...], measured: list[str], succeed: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def stand_in(given: list[str]) -> dict[str, str]:
        asked.append(f"{given[given.index('--dtype') + 1]} {given[given.index('--kernel') + 1]}")
        return {}

    monkeypatch.setattr("sfumato.backends.devices.native_bfloat16", lambda device: native)
    monkeypatch.setattr("sfumato.cli.bench._in_a_process", stand_in)
    assert succeed("bench", *options, "--json").json == [{}] * len(measured) and asked == measured


def test_memory_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[torch.device]()
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: (asked.append(device), 7)[1])
    assert peak_memory(torch.device("cuda")) == 7 and (peak_memory(torch.device("cpu")) or 0) > 1e7
    assert asked == [torch.device("cuda")]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--kernel", "spda"], "unknown attention kernel 'spda' (did you mean 'sdpa'?)"),
        (["--dtype", "float8"], "unknown dtype 'float8'"),
        (["--random", "sd3"], "unknown family 'sd3'"),
        (["--random", "sd1", "--model", "cat-dog.safetensors"], "give one of them"),
        (["--model", "cat-dog.safetensors", "--width", "64"], "draws 8 x 8 pixels; width 64 cannot be had"),
        (["--model", "cat-dog.safetensors", "--width", "8", "--height", "16"], "height 16 cannot be had"),
    ],
)
def test_one_clear_sentence(place: Path, run: Callable, options: list[str], sentence: str) -> None:
    refused = run("bench", *options)
    assert refused.code == 2 and sentence in refused.err and len(refused.err.splitlines()) == 1


def test_openvino_is_measured_with_the_attention_that_it_has(place: Path, run: Callable) -> None:
    options = ("--model", "cat-dog.safetensors", "--repeat", 1, "--dtype", "float32", "--backend", "openvino")
    found = run("bench", *options)
    if importlib.util.find_spec("openvino") is None:
        assert found.code == 2 and "pip install 'sfumato[openvino]'" in found.err
    else:
        assert found.code == 0 and "float32   openvino " in found.out
    refused = run("bench", *options, "--kernel", "sdpa")
    assert refused.code == 2 and "openvino has an attention of its own; leave --kernel out" in refused.err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys"), [(1300, 1100), (512, 77), (3, 2)])
def test_attention_in_blocks_is_attention(dtype: torch.dtype, queries: int, keys: int) -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, queries, 40, generator=g).to(dtype)
    k, v = (torch.randn(2, 3, keys, 40, generator=g).to(dtype) for _ in range(2))
    exact = math(q.float(), k.float(), v.float(), None, 0.2)
    for name in ("blocks", "adaptive"):
        with torch.no_grad():
            out = KERNELS[name](q, k, v, None, 0.2).float()
        bound = 1e-6 if dtype == torch.float32 else 2e-2
        assert float((out - exact).norm() / exact.norm()) < bound


def test_masks_and_gradients_take_the_plain_way() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 600, 8, generator=g) for _ in range(3))
    mask = torch.rand(600, 600, generator=g) > 0.5
    with torch.no_grad():
        assert torch.allclose(backends.blocks(q, k, v, mask, 0.3), math(q, k, v, mask, 0.3), atol=1e-5)
    leaf = q.clone().requires_grad_()
    backends.blocks(leaf, k, v, None, 0.3).sum().backward()
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all())
