"""The variational bound of one tiny random network, as openai/improved-diffusion evaluates it.

Run in a checkout of https://github.com/openai/improved-diffusion, it prints the golden values of
`test_improved_diffusion`: PYTHONPATH=. python …/tests/parity/improved_diffusion_bpd.py
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPE = (2, 3, 8, 8)


@dataclass(frozen=True)
class Case:
    """A chain and how it is evaluated; names are improved-diffusion's."""

    schedule: str
    steps: int
    variance: str
    clip: bool
    respacing: str = ""


CASES = {
    "learned, cosine": Case("cosine", 50, "LEARNED_RANGE", True),
    "learned, linear": Case("linear", 100, "LEARNED_RANGE", True),
    "large, linear": Case("linear", 100, "FIXED_LARGE", True),
    "small, cosine, unclipped": Case("cosine", 50, "FIXED_SMALL", False),
    "learned, cosine, respaced": Case("cosine", 100, "LEARNED_RANGE", True, "10,8,7"),
}


def weights(*shape: int, seed: int) -> Tensor:
    """Fixed weights; the same on every machine."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float64) * (1.0 + seed)).reshape(shape).float()


def network(x: Tensor, t: Tensor) -> Tensor:
    """Noise (3 channels) and variance (3) from x (B, 3, 8, 8) and t (B,)."""
    hidden = F.conv2d(x, 0.2 * weights(8, 3, 3, 3, seed=1), padding=1)
    hidden = torch.tanh(hidden + torch.cos(t.float() / 20)[:, None, None, None])
    return F.conv2d(hidden, 0.4 * weights(6, 8, 3, 3, seed=2), padding=1) + torch.cat([0.7 * x, 0 * x], dim=1)


def pictures() -> Tensor:
    """On the 8-bit grid, black and white included."""
    values = (128 + 160 * weights(*SHAPE, seed=3)).round().clamp(0, 255)
    return values / 127.5 - 1


def upstream(case: Case) -> dict[str, list[list[float]]]:
    """What `calc_bpd_loop` returns; its noise is drawn after `torch.manual_seed(0)`."""
    from improved_diffusion import gaussian_diffusion as gd  # type: ignore[import-not-found]
    from improved_diffusion.respace import SpacedDiffusion, space_timesteps  # type: ignore[import-not-found]

    variance = gd.ModelVarType[case.variance]
    diffusion = SpacedDiffusion(
        use_timesteps=space_timesteps(case.steps, case.respacing or [case.steps]),
        betas=gd.get_named_beta_schedule(case.schedule, case.steps),
        model_mean_type=gd.ModelMeanType.EPSILON,
        model_var_type=variance,
        loss_type=gd.LossType.RESCALED_MSE,
        rescale_timesteps=False,
    )

    def model(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t) if variance == gd.ModelVarType.LEARNED_RANGE else network(x, t)[:, :3]

    torch.manual_seed(0)
    found = diffusion.calc_bpd_loop(model, pictures(), clip_denoised=case.clip)
    last = found["vb"].shape[1] - 1
    keep = [0, last // 2, last - 1, last]
    return {
        "total": found["total_bpd"].tolist(),
        "prior": found["prior_bpd"].tolist(),
        "vb": found["vb"][:, keep].tolist(),
        "xstart_mse": found["xstart_mse"][:, keep].tolist(),
        "mse": found["mse"][:, keep].tolist(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, case in CASES.items():
        print(f"{name}: {json.dumps(upstream(case))}")
