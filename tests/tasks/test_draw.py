"""Drawing by a model's own defaults: which solver, grid, number of steps, start and range they come to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from sfumato.diffusion.solvers import SOLVERS, Ancestral, Euler, Heun, Solver
from sfumato.errors import UserError
from sfumato.networks.unet_2d import UNet2DModel
from sfumato.systems.ddpm import DDPM, DDPMConfig, config_from_diffusers
from sfumato.tasks.draw import choose_schedule, choose_solver, choose_steps, draw, ignores_learned_variance

from .. import tiny


def model(**sections: Any) -> DDPM:
    """A tiny model with random weights, always the same."""
    values = tiny.model_config(labels=()).model_dump()
    for name, changes in sections.items():
        values[name] = values[name] | changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DDPM.create(DDPMConfig.model_validate(values))


def test_the_models_own_options_go_with_its_own_sampler() -> None:
    own = model(sampling={"sampler": "DDPM", "sampler_options": {"variance": "large"}})
    assert choose_solver(own, "DDPMScheduler") == Ancestral(variance="large")
    assert choose_solver(own, "ddim") == Euler()
    mine = Heun()
    assert choose_solver(own, mine) is mine


def test_where_the_schedule_comes_from() -> None:
    own = model(sampling={"schedule": "Leading"})
    assert choose_schedule(own, "ddim", None) == "leading"
    assert choose_schedule(own, "DPM++ 2M Karras", None) == "karras"
    assert choose_schedule(own, "DPM++ 2M Karras", "SGM Uniform") == "sgm_uniform"
    assert choose_schedule(own, "DPM++ 2M Karras", "Automatic") == "karras"
    assert choose_schedule(own, Heun(), None) == "leading"
    for name, method in SOLVERS.items():
        assert choose_schedule(own, name, None) == (method.schedule or "leading")


def test_where_the_number_of_steps_comes_from() -> None:
    own = model(sampling={"steps": 7})
    assert choose_steps(own, "karras", None) == 7 and choose_steps(own, "karras", 4) == 4
    assert choose_steps(own, "ddim25", None) == 25 and choose_steps(own, "10,15,20", None) == 45


@pytest.mark.parametrize(
    ("sampler", "uses"),
    [
        ("ddpm", True), ("euler_ancestral", True), ("dpm_2_ancestral", True), ("dpmpp_2s_ancestral", True),
        ("ddim", False), ("euler", False), ("heun", False), ("dpmpp_2m", False), (Euler(eta=1.0), False),
        (Euler(eta=1.0, variance="learned"), True), ("dpmpp_sde", False),
    ],
)  # fmt: skip
def test_learned_variance_is_used_where_it_can_be(sampler: str | Solver[Any], uses: bool) -> None:
    """A solver object is taken as it is."""
    learned, plain = model(prediction={"learned_variance": True}), model()
    assert getattr(choose_solver(learned, sampler), "variance", None) == "learned" or not uses
    assert ignores_learned_variance(learned, sampler) is not uses
    assert not ignores_learned_variance(plain, sampler)


def test_eta_with_a_learned_variance() -> None:
    own = model(prediction={"learned_variance": True}, sampling={"sampler": "ddim", "sampler_options": {"eta": 1.0}})
    assert choose_solver(own, "ddim") == Euler(eta=1.0, variance="learned")
    assert not ignores_learned_variance(own, None)


def test_start_and_range() -> None:
    """They change what is drawn, and say it exactly: sigma of the first level alone, and a wider range."""
    seen: list[torch.Tensor] = []

    def first(x: torch.Tensor, level: Any, prediction: Any, noise: Any) -> torch.Tensor:
        seen.append(x)
        return x

    options = {"schedule": "leading", "steps": 4}
    whole, alone = (model(sampling={**options, "start": start}) for start in ("marginal", "sigma"))
    draw(whole, seeds=[0], on_step=first)
    draw(alone, seeds=[0], on_step=first)
    sigma = whole.denoiser.schedule.level(750).sigma
    assert torch.allclose(seen[5], seen[0] * float(sigma))
    drawn = [
        draw(model(sampling={"threshold": "static", "limit": limit}), seeds=[0], steps=3) for limit in (0.25, 1.0, 50.0)
    ]
    assert float(drawn[0].abs().max()) <= 0.25 < float(drawn[1].abs().max()) <= 1.0
    kept, derived = (draw(model(sampling={"rederive_eps": flag}), seeds=[0], steps=3) for flag in (False, True))
    assert not torch.equal(kept, derived)


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        ({"sampler_options": {"etta": 1.0}}, "does not take these options"),
        ({"sampler_options": {"eta": 3.0}, "sampler": "ddpm"}, "does not take these options"),
        ({"sampler": "dpmpp_2m", "sampler_options": {"order": 9}}, "order"),
        ({"schedule": "karras", "grid": {"name": "trailing"}}, "the grid is 'trailing', but the schedule is 'karras'"),
        ({"grid": {"name": "trailling"}}, "did you mean 'trailing'"),
    ],
)
def test_configs_that_cannot_be(sampling: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model(sampling=sampling)


def test_options_that_a_grid_does_not_take() -> None:
    own = model(sampling={"grid": {"name": "trailing", "options": {"rho": 3.0}}})
    with pytest.raises(UserError, match="'trailing' does not take these options"):
        draw(own, seeds=[0])


def test_an_inverse_grid_does_not_draw() -> None:
    own = model(sampling={"grid": {"name": "trailing", "inverse": True}})
    with pytest.raises(UserError, match="from pictures to noise"):
        draw(own, seeds=[0])
    assert draw(own, seeds=[0], schedule="karras", steps=2).shape == (1, 3, 8, 8)


def test_a_folders_scheduler_draws_as_diffusers_does() -> None:
    """DDIM with an offset, with clipping that keeps the network's eps, and with an end that is not clean."""
    options = {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": True, "beta_schedule": "scaled_linear"}
    scheduler = DDIMScheduler(**options)
    unet = tiny.model_config(labels=()).unet().to_dict()
    config = config_from_diffusers(unet, {"_class_name": "DDIMScheduler", **options})
    assert (config.sampling.sampler, config.sampling.schedule) == ("ddim", "leading")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        own = DDPM.create(config)
    network: UNet2DModel = own.denoiser.network.eval()  # type: ignore[assignment]
    for p in network.parameters():
        p.data.mul_(0.5)
    scheduler.set_timesteps(5)
    x = torch.randn((1, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    ours = draw(own, seeds=[0], steps=5, on_step=lambda x, level, prediction, noise: seen.append(x) or x)
    x = seen[0]
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t.expand(1)), int(t), x).prev_sample
    assert float((ours - x).abs().max()) <= 1e-4 * float(x.abs().max())
