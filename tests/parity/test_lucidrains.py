"""The short form against denoising_diffusion_pytorch 2.3.4: names, network, noise levels, losses, steps, checkpoints.

The comparison itself runs where that package is installed (it needs torchvision, which these tests do not). Without it
the golden values stand: what denoising_diffusion_pytorch 2.3.4 gave (torch 2.13.0, CPU, one thread) where the functions
of the golden tests were called with its classes in place of ours, on weights and inputs that are sines of their index.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sfumato.diffusion.guidance import DenoiseFn
from sfumato.diffusion.level import CLEAN, NoiseLevel
from sfumato.diffusion.solvers import Euler
from sfumato.diffusion.solvers.euler import Path as Steps
from sfumato.networks.unet_article import Unet
from sfumato.short_form import GaussianDiffusion

TINY: dict[str, Any] = {"dim": 8, "dim_mults": (1, 2)}
T = 50
TIMES = (0, 1, 2, 10, 25, 40, 48, 49)
OBJECTIVES = ("pred_noise", "pred_x0", "pred_v")
NETWORKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "self_condition": {"self_condition": True},
    "learned_variance": {"learned_variance": True},
    "fixed_fourier": {"random_fourier_features": True},
    "learned_fourier": {"learned_sinusoidal_cond": True, "learned_sinusoidal_dim": 8},
    "full_attention": {"full_attn": True},
    "per_level": {"full_attn": (True, False), "attn_heads": (1, 2), "attn_dim_head": (8, 16)},
    "flash": {"flash_attn": True},
    "sizes": {"init_dim": 12, "out_dim": 5, "channels": 1, "sinusoidal_pos_emb_theta": 500},
    "dropout": {"dropout": 0.3},
}


class Fixed:
    """A noise source that always draws the same."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def draw(self) -> Tensor:
        return self.value


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def distance(found: Tensor, wanted: Tensor) -> float:
    return float(((found - wanted).norm() / wanted.norm()).detach())


def shaken(network: nn.Module) -> nn.Module:
    """Away from the initial weights, where gains are 1 and some outputs are small."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network


# --- with the package ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package() -> Any:
    return pytest.importorskip("denoising_diffusion_pytorch.denoising_diffusion_pytorch", exc_type=ImportError)


@pytest.fixture(scope="module")
def learned(package: Any) -> Any:
    return pytest.importorskip("denoising_diffusion_pytorch.learned_gaussian_diffusion", exc_type=ImportError)


@pytest.mark.parametrize("name", NETWORKS)
def test_network(package: Any, name: str) -> None:
    options = {"dim": 8, "dim_mults": (1, 2), **NETWORKS[name]}
    torch.manual_seed(0)
    theirs = package.Unet(**options)
    torch.manual_seed(0)
    ours = Unet(**options)
    stored = theirs.state_dict()
    assert list(ours.state_dict()) == list(stored)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    if "fourier" not in name:
        assert all(torch.equal(stored[key], value) for key, value in ours.state_dict().items())
    ours.load_state_dict(shaken(theirs).state_dict())
    x, estimate = normals(2, ours.channels, 16, 24), normals(2, ours.channels, 16, 24, seed=1)
    if name == "dropout":  # drawn in the order of memory, and ours is always channels-last
        theirs.to(memory_format=torch.channels_last)
    t = torch.tensor([-3.0, 4.0]) if "fourier" in name else torch.tensor([3.0, 700.0])
    for given in (None, estimate):
        outputs = []
        for network in (ours, theirs):
            torch.manual_seed(0)
            network.zero_grad()
            outputs.append(network(x, t, given))
            outputs[-1].square().mean().backward()
        assert distance(*outputs) < 1e-5
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert not other.requires_grad or distance(one.grad, other.grad) < 1e-4


SETTINGS: dict[str, dict[str, Any]] = {
    "cosine": {"beta_schedule": "cosine"},
    "linear": {"beta_schedule": "linear"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "cosine_s": {"beta_schedule": "cosine", "schedule_fn_kwargs": {"s": 0.1}},
    "sigmoid_tau": {"beta_schedule": "sigmoid", "schedule_fn_kwargs": {"start": 0, "end": 3, "tau": 0.3}},
    "min_snr": {"beta_schedule": "sigmoid", "min_snr_loss_weight": True, "min_snr_gamma": 2},
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("steps", [50, 1000])
@pytest.mark.parametrize("name", SETTINGS)
def test_stored_tables(package: Any, name: str, steps: int, objective: str) -> None:
    settings = {"image_size": 16, "timesteps": steps, "objective": objective, "auto_normalize": True, **SETTINGS[name]}
    network = Unet(**TINY)
    theirs, ours = package.GaussianDiffusion(network, **settings), GaussianDiffusion(network, **settings)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for key, table in theirs.named_buffers():
        assert torch.allclose(ours.get_buffer(key), table, rtol=2e-6, atol=0), key


def pair(package: Any, objective: str, learned: Any = None, **network: Any) -> tuple[Any, GaussianDiffusion]:
    """The package's diffusion and ours after its checkpoint was opened."""
    settings = {"image_size": 16, "timesteps": T, "objective": objective, "beta_schedule": "sigmoid"}
    kind = package.GaussianDiffusion if learned is None else learned.LearnedGaussianDiffusion
    theirs = kind(shaken(package.Unet(**TINY, **network)), **settings)
    ours = GaussianDiffusion(Unet(**TINY, **network), loss_type="l2", **settings)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def looking(diffusion: GaussianDiffusion, twice: bool) -> None:
    diffusion.criterion = replace(diffusion.criterion, self_condition_rate=float(twice))


@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize("network", ["plain", "self_condition", "looks_twice"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss(package: Any, monkeypatch: pytest.MonkeyPatch, objective: str, network: str, offset: float) -> None:
    theirs, ours = pair(package, objective, self_condition=network != "plain")
    looking(ours, network == "looks_twice")
    monkeypatch.setattr(package, "random", lambda: 0.0 if network == "looks_twice" else 1.0)
    pictures, noise = normals(4, 3, 16, 16).sigmoid(), normals(4, 3, 16, 16, seed=1)
    times = torch.tensor([0, 7, 30, T - 1])
    for reduction in ("mean", "none"):
        options = {"offset_noise_strength": offset, "loss_reduction": reduction}
        torch.manual_seed(0)
        wanted = theirs(pictures, noise.clone(), times=times, **options)
        torch.manual_seed(0)
        found = ours(pictures, noise.clone(), times=times, **options)
        assert torch.allclose(found, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_min_snr_loss(package: Any, objective: str) -> None:
    settings = {"image_size": 16, "timesteps": T, "objective": objective, "min_snr_loss_weight": True}
    network = shaken(Unet(**TINY))
    theirs = package.GaussianDiffusion(network, beta_schedule="cosine", **settings)
    ours = GaussianDiffusion(network, loss_type="l2", **settings)
    pictures, noise, times = normals(3, 3, 16, 16).sigmoid(), normals(3, 3, 16, 16, seed=1), torch.tensor([1, 9, 40])
    wanted, found = theirs(pictures, noise, times=times), ours(pictures, noise, times=times)
    assert torch.allclose(found, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ancestral_step(package: Any, monkeypatch: pytest.MonkeyPatch, objective: str, self_condition: bool) -> None:
    theirs, ours = pair(package, objective, self_condition=self_condition)
    x, noise = normals(2, 3, 16, 16), normals(2, 3, 16, 16, seed=1)
    monkeypatch.setattr(torch, "randn_like", lambda x: noise)
    for estimate in (None, normals(2, 3, 16, 16, seed=2).clamp(-1, 1)) if self_condition else (None,):
        for t in TIMES:
            wanted, found = theirs.p_sample(x, t, estimate), ours.p_sample(x, t, estimate, noise=Fixed(noise))
            assert distance(found[0], wanted[0]) < 1e-5 and distance(found[1], wanted[1]) < 1e-5


def euler_step(
    denoise: DenoiseFn,
    ours: GaussianDiffusion,
    eta: float,
    x: Tensor,
    t: int,
    to: int,
    z: Tensor,
    estimate: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One DDIM step of ours from time t to time `to` (-1: clean)."""

    def ask(x: Tensor, level: NoiseLevel) -> Any:
        return denoise(x, level, estimate)

    nxt = CLEAN if to < 0 else ours.schedule.level(to)
    steps = Steps(ours.schedule, 1)
    x, _, _, prediction = Euler(eta=eta).step(ask, x, ours.schedule.level(t), nxt, steps, Fixed(z))  # type: ignore[arg-type]
    return x, prediction.x0


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ddim_steps(
    package: Any, monkeypatch: pytest.MonkeyPatch, objective: str, self_condition: bool, eta: float
) -> None:
    """Each step of a run of the package's, from the state that it had there (a whole run would amplify rounding)."""
    theirs, ours = pair(package, objective, self_condition=self_condition)
    theirs.sampling_timesteps, theirs.ddim_sampling_eta = 7, eta
    noise = normals(2, 3, 16, 16, seed=1)
    monkeypatch.setattr(torch, "randn_like", lambda x: noise)
    states = theirs.ddim_sample((2, 3, 16, 16), return_all_timesteps=True) * 2 - 1
    times = torch.linspace(-1, T - 1, 8).int().tolist()[::-1]
    estimate, denoise = None, ours._denoise()
    with torch.no_grad():
        for i, (t, to) in enumerate(zip(times[:-1], times[1:], strict=True)):
            found, estimate = euler_step(denoise, ours, eta, states[:, i], t, to, noise, estimate)
            assert distance(found, states[:, i + 1]) < 1e-5


@pytest.mark.parametrize("steps", [1, 3, 7, 49])
def test_ddim_times(package: Any, steps: int) -> None:
    seen: list[list[int]] = [[], []]
    for i, kind in enumerate((package.GaussianDiffusion, GaussianDiffusion)):
        network = Unet(**TINY)
        network.register_forward_pre_hook(lambda _, args, i=i: seen[i].append(int(args[1][0])))
        diffusion = kind(network, image_size=8, timesteps=T, sampling_timesteps=steps, beta_schedule="cosine")
        diffusion.ddim_sample((1, 3, 8, 8))
    assert seen[0] == seen[1] and len(seen[0]) == steps


def test_learned_variance(package: Any, learned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = pair(package, "pred_noise", learned, learned_variance=True)
    x, noise = normals(3, 3, 16, 16), normals(3, 3, 16, 16, seed=1)
    times = torch.tensor([1, 20, T - 1])
    for reduction in ("mean", "none"):
        wanted = theirs(x.sigmoid(), noise, times=times, loss_reduction=reduction)
        found = ours(x.sigmoid(), noise, times=times, loss_reduction=reduction)
        assert torch.allclose(found, wanted, rtol=1e-5, atol=0)
    monkeypatch.setattr(torch, "randn_like", lambda x: noise)
    for t in TIMES:
        assert distance(ours.p_sample(x, t, noise=Fixed(noise))[0], theirs.p_sample(x, t)[0]) < 1e-5


@pytest.mark.parametrize("network", ["plain", "self_condition", "learned_variance"])
def test_checkpoints_both_ways(package: Any, learned: Any, tmp_path: Path, network: str) -> None:
    kind = learned if network == "learned_variance" else None
    theirs, ours = pair(package, "pred_noise", kind, **NETWORKS[network])
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    ours.load_state_dict(load_file(tmp_path / "theirs.safetensors"))
    theirs.load_state_dict(ours.state_dict())
    for name, tensor in theirs.model.state_dict().items():
        assert torch.equal(tensor, ours.model.state_dict()[name])


# --- golden values ---------------------------------------------------------------------------------------------------


def sines(*shape: int, phase: float = 0.0) -> Tensor:
    count = math.prod(shape)
    return torch.sin(0.37 * torch.arange(count, dtype=torch.float64) + phase).reshape(shape).float()


def of_sines(network: Any) -> Any:
    with torch.no_grad():
        for i, parameter in enumerate(network.parameters()):
            parameter.copy_(0.3 * sines(*parameter.shape, phase=float(i)))
    return network


def resnet(name: str, dim_in: int, dim_out: int) -> dict[str, tuple[int, ...]]:
    names: dict[str, tuple[int, ...]] = {
        f"{name}.mlp.1.weight": (2 * dim_out, 32),
        f"{name}.mlp.1.bias": (2 * dim_out,),
    }
    for block, width in (("block1", dim_in), ("block2", dim_out)):
        names[f"{name}.{block}.proj.weight"] = (dim_out, width, 3, 3)
        names[f"{name}.{block}.proj.bias"] = (dim_out,)
        names[f"{name}.{block}.norm.g"] = (1, dim_out, 1, 1)
    if dim_in != dim_out:
        names |= conv(f"{name}.res_conv", dim_in, dim_out, 1)
    return names


def conv(name: str, dim_in: int, dim_out: int, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (dim_out, dim_in, size, size), f"{name}.bias": (dim_out,)}


def attention(name: str, dim: int, *, full: bool) -> dict[str, tuple[int, ...]]:
    names = {f"{name}.mem_kv": (2, 4, 4, 32) if full else (2, 4, 32, 4), f"{name}.norm.g": (1, dim, 1, 1)}
    names[f"{name}.to_qkv.weight"] = (384, dim, 1, 1)
    if full:
        return names | conv(f"{name}.to_out", 128, dim, 1)
    return names | conv(f"{name}.to_out.0", 128, dim, 1) | {f"{name}.to_out.1.g": (1, dim, 1, 1)}


def expected_names(inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    """The state dict of `Unet(dim=8, dim_mults=(1, 2))`, in order."""
    names = conv("init_conv", inputs, 8, 7)
    names |= {
        "time_mlp.1.weight": (32, 8),
        "time_mlp.1.bias": (32,),
        "time_mlp.3.weight": (32, 32),
        "time_mlp.3.bias": (32,),
    }
    names |= resnet("downs.0.0", 8, 8) | resnet("downs.0.1", 8, 8) | attention("downs.0.2", 8, full=False)
    names |= conv("downs.0.3.1", 32, 8, 1)
    names |= resnet("downs.1.0", 8, 8) | resnet("downs.1.1", 8, 8) | attention("downs.1.2", 8, full=True)
    names |= conv("downs.1.3", 8, 16, 3)
    names |= resnet("ups.0.0", 24, 16) | resnet("ups.0.1", 24, 16) | attention("ups.0.2", 16, full=True)
    names |= conv("ups.0.3.1", 16, 8, 3)
    names |= resnet("ups.1.0", 16, 8) | resnet("ups.1.1", 16, 8) | attention("ups.1.2", 8, full=False)
    names |= conv("ups.1.3", 8, 8, 3)
    names |= resnet("mid_block1", 16, 16) | attention("mid_attn", 16, full=True) | resnet("mid_block2", 16, 16)
    return names | resnet("final_res_block", 16, 8) | conv("final_conv", 8, outputs, 1)


def digest(network: Any) -> str:
    """Of the names and shapes of a state dict, in order."""
    lines = [f"{name} {tuple(tensor.shape)}" for name, tensor in network.state_dict().items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def outputs(network: Any, fourier: bool) -> list[float]:
    """Three numbers of an output, and its mean size."""
    times = torch.tensor([-3.0, 4.0]) if fourier else torch.tensor([3.0, 700.0])
    shape = (2, network.channels, 8, 8)
    with torch.no_grad():
        out = of_sines(network)(sines(*shape), times, sines(*shape, phase=2.0) if network.self_condition else None)
    return [*out.flatten()[[0, 77, -1]].tolist(), out.abs().mean().item()]


def losses(unet: Any, diffusion: Any, objective: str, **options: Any) -> list[float]:
    """The loss of three pictures at times 1, 10 and 18 of 20."""
    made = diffusion(of_sines(unet(**TINY)), image_size=8, timesteps=20, objective=objective, **options)
    pictures, noise = sines(3, 3, 8, 8) / 2 + 0.5, 1.4 * sines(3, 3, 8, 8, phase=1.0)
    with torch.no_grad():
        each: Tensor = made(pictures, noise, times=torch.tensor([1, 10, 18]), loss_reduction="none")
    return each.tolist()


GOLDEN_NETWORKS = {
    "plain": ("2a2510ead2a736b0", [-0.3739461, 0.4301616, 0.5565469, 1.214123]),
    "self_condition": ("b4d9fd99144f15d5", [1.210705, -1.058586, 0.3557391, 1.12461]),
    "learned_variance": ("4fb7b2f40884ac3b", [-0.3739462, 0.4301616, -0.5005945, 0.8626702]),
    "fixed_fourier": ("1c4f2d6ec367220e", [-0.2005031, -0.3216801, -0.4895481, 0.9924614]),
    "learned_fourier": ("a40aafb73da5d638", [-0.1956253, -0.3142569, -0.448488, 0.9973287]),
    "full_attention": ("24cdaa1ce26e774d", [-0.7567577, -0.02926257, -0.4273863, 0.7264922]),
    "per_level": ("17224b2544a1d72f", [0.2901249, 1.450771, -0.4173891, 0.9280531]),
    "flash": ("2a2510ead2a736b0", [-0.373946, 0.4301614, 0.5565472, 1.214123]),
    "sizes": ("f6f839b755fbfe30", [0.6001376, 1.097804, 0.5336939, 0.5013063]),
}
"""Digest of the state dict, then `outputs`."""

GOLDEN_LOSSES = {
    "pred_noise": ([3.251957, 7.612972, 4.405372], [0.6857004, 7.611084, 4.495337]),
    "pred_x0": ([93.11324, 4.684393, 0.01972294], [13.67772, 4.711449, 0.05821481]),
    "pred_v": ([2.92462, 2.566499, 0.01667572], [0.600292, 2.575536, 0.04841153]),
}
"""`losses` on the cosine schedule, and on the sigmoid one with min-SNR weights."""

GOLDEN_STEPS = {
    "pred_noise": ([0.5176907, -0.8147638, -0.9559563], [1.020541, -1.236502, -1.345045]),
    "pred_x0": ([0.3645654, -0.5724955, -0.6554353], [0.2995472, -0.506632, -0.5265335]),
    "pred_v": ([0.4882386, -0.743632, -0.8926044], [0.7075522, -0.932662, -1.129996]),
}
"""Three numbers after `p_sample` at time 10 of 20, and after DDIM's step from 19 to 12 with eta 0.5."""


@pytest.mark.parametrize("name", GOLDEN_NETWORKS)
def test_golden_network(name: str) -> None:
    network = Unet(**{**TINY, **NETWORKS[name]})
    names, numbers = GOLDEN_NETWORKS[name]
    assert digest(network) == names
    assert outputs(network, "fourier" in name) == pytest.approx(numbers, rel=1e-4, abs=1e-5)
    channels_last = network.to(memory_format=torch.channels_last)
    assert outputs(channels_last, "fourier" in name) == pytest.approx(numbers, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "inputs", "outputs"), [({"self_condition": True}, 6, 3), ({"learned_variance": True}, 3, 6)]
)
def test_golden_names(options: dict[str, Any], inputs: int, outputs: int) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in Unet(**TINY, **options).state_dict().items()}
    wanted = expected_names(inputs, outputs)
    assert found == wanted and list(found) == list(wanted) and len(found) == 141


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_golden_losses(objective: str) -> None:
    cosine, sigmoid = GOLDEN_LOSSES[objective]
    today = {"loss_type": "l2", "auto_normalize": True}
    assert losses(Unet, GaussianDiffusion, objective, **today) == pytest.approx(cosine, rel=1e-4)
    min_snr = {"beta_schedule": "sigmoid", "min_snr_loss_weight": True}
    assert losses(Unet, GaussianDiffusion, objective, loss_type="l2", **min_snr) == pytest.approx(sigmoid, rel=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_golden_steps(objective: str) -> None:
    network = of_sines(Unet(**TINY))
    made = GaussianDiffusion(network, image_size=8, timesteps=20, objective=objective, auto_normalize=True)
    x, z = sines(2, 3, 8, 8), 1.4 * sines(2, 3, 8, 8, phase=1.0)
    with torch.no_grad():
        ancestral, _ = made.p_sample(x, 10, noise=Fixed(z))  # type: ignore[arg-type]
        ddim, _ = euler_step(made._denoise(), made, 0.5, x, 19, 12, z, None)
    for found, wanted in zip((ancestral, ddim), GOLDEN_STEPS[objective], strict=True):
        assert found.flatten()[[0, 77, -1]].tolist() == pytest.approx(wanted, rel=1e-4)
