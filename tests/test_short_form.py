"""The short form: the known script, 2022's defaults, today's names, what is refused, checkpoints."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sfumato
from sfumato import GaussianDiffusion, Unet, UserError
from sfumato.diffusion.assignment import assign
from sfumato.networks.unet_2d import UNet2DConfig, UNet2DModel
from sfumato.random import NoiseSource

SIZE, T = 16, 20
OBJECTIVES = ("pred_noise", "pred_x0", "pred_v")


def unet(**options: Any) -> Unet:
    torch.manual_seed(0)
    return Unet(**{"dim": 8, "dim_mults": (1, 2), **options})


def diffusion(model: nn.Module | None = None, **options: Any) -> GaussianDiffusion:
    return GaussianDiffusion(model or unet(), **{"image_size": SIZE, "timesteps": T, **options})


def pictures(n: int = 4, seed: int = 0, channels: int = 3) -> Tensor:
    return torch.rand((n, channels, SIZE, SIZE), generator=torch.Generator().manual_seed(seed))


def normals(n: int = 4, seed: int = 0) -> Tensor:
    return torch.randn((n, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(seed))


# --- the script ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_known_script() -> None:
    model = Unet(dim=64, dim_mults=(1, 2, 4, 8))
    diffusion = GaussianDiffusion(model, image_size=128, timesteps=1000, loss_type="l1")
    training_images = torch.randn(8, 3, 128, 128)
    with pytest.warns(UserWarning, match=r"expected in \[0, 1\]"):
        loss = diffusion(training_images)
    loss.backward()
    sampled_images = diffusion.sample(batch_size=4)
    assert sampled_images.shape == (4, 3, 128, 128)


def test_the_known_script_made_small() -> None:
    model = sfumato.Unet(dim=8, dim_mults=(1, 2, 4, 8))
    diffusion = sfumato.GaussianDiffusion(model, image_size=16, timesteps=20, loss_type="l1")
    training_images = torch.rand(8, 3, 16, 16)
    loss = diffusion(training_images)
    loss.backward()
    assert loss.shape == () and all(p.grad is not None for p in model.parameters())
    sampled_images = diffusion.sample(batch_size=4)
    assert sampled_images.shape == (4, 3, 16, 16) and not sampled_images.requires_grad
    assert 0 <= float(sampled_images.min()) and float(sampled_images.max()) <= 1
    assert (diffusion.num_timesteps, diffusion.image_size, diffusion.channels) == (20, 16, 3)


OPTIONS: dict[str, dict[str, Any]] = {
    "l2": {"loss_type": "l2"},
    "huber": {"loss_type": "huber"},
    "pred_x0": {"objective": "pred_x0"},
    "pred_v": {"objective": "pred_v"},
    "linear": {"beta_schedule": "linear", "timesteps": 25},
    "linear_pure_noise": {"beta_schedule": "linear", "objective": "pred_v"},
    "linear_pure_noise_eps": {"beta_schedule": "linear"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "sigmoid_settings": {"beta_schedule": "sigmoid", "schedule_fn_kwargs": {"start": -2, "end": 2, "tau": 0.7}},
    "cosine_settings": {"schedule_fn_kwargs": {"s": 0.02}},
    "p2": {"p2_loss_weight_gamma": 1.0, "p2_loss_weight_k": 2},
    "ddim": {"sampling_timesteps": 5},
    "ddim_eta_0": {"sampling_timesteps": 5, "ddim_sampling_eta": 0.0},
    "ddim_today": {"sampling_timesteps": 5, "auto_normalize": True},
    "offset_noise": {"offset_noise_strength": 0.1},
    "min_snr": {"min_snr_loss_weight": True},
    "min_snr_gamma": {"min_snr_loss_weight": True, "min_snr_gamma": 3, "objective": "pred_x0"},
    "immiscible": {"immiscible": True},
    "two_sides": {"image_size": (16, 8)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_trains_and_draws(name: str) -> None:
    made = diffusion(**OPTIONS[name])
    height, width = made._sides
    loss = made(pictures()[..., :height, :width])
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None for p in made.parameters())
    drawn = made.sample(batch_size=2, seed=0)
    assert drawn.shape == (2, 3, height, width) and 0 <= float(drawn.min()) and float(drawn.max()) <= 1


NETWORKS: dict[str, dict[str, Any]] = {
    "self_condition": {"self_condition": True},
    "learned_variance": {"learned_variance": True},
    "both": {"self_condition": True, "learned_variance": True},
    "learned_sinusoidal_cond": {"learned_sinusoidal_cond": True},
    "random_fourier_features": {"random_fourier_features": True, "learned_sinusoidal_dim": 8},
    "full_attn": {"full_attn": (True, False)},
    "flash_attn": {"flash_attn": True},
    "heads": {"attn_heads": 2, "attn_dim_head": (8, 16)},
    "dropout": {"dropout": 0.1},
    "init_dim": {"init_dim": 12, "sinusoidal_pos_emb_theta": 500},
    "grey": {"channels": 1},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_trains_and_draws(name: str) -> None:
    model = unet(**NETWORKS[name])
    made = diffusion(model, sampling_timesteps=6)
    made(pictures(channels=model.channels)).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert diffusion(model, timesteps=3).sample(2).shape == made.sample(2).shape == (2, model.channels, SIZE, SIZE)


# --- 2022 and today --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0"])
def test_the_loss_of_2022(objective: str) -> None:
    """Mean absolute error on the cosine schedule of pictures in [-1, 1], without a weight."""
    made, times, noise = diffusion(objective=objective), torch.tensor([0, 5, 12, 19]), normals()
    u = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((u + 0.008) / 1.008 * torch.pi / 2) ** 2
    bar = torch.cumprod(1 - (1 - f[1:] / f[:-1]).clamp(max=0.999), 0)[times].float().reshape(-1, 1, 1, 1)
    x0 = pictures() * 2 - 1
    x_t = bar.sqrt() * x0 + (1 - bar).sqrt() * noise
    target = noise if objective == "pred_noise" else x0
    wanted = (made.model(x_t, times) - target).abs().flatten(1).mean(1)
    assert made.edition == "2022"
    assert torch.allclose(made(pictures(), noise, times=times, loss_reduction="none"), wanted, rtol=1e-5)
    assert torch.allclose(made(pictures(), noise, times=times), wanted.mean(), rtol=1e-5)
    assert torch.allclose(made.p_losses(x0, times, noise), wanted.mean(), rtol=1e-5)
    assert torch.allclose(made.q_sample(x0, times, noise), x_t, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_weights_of_today(objective: str) -> None:
    made = diffusion(objective=objective, auto_normalize=True)
    snr = made.alphas_cumprod.double() / (1 - made.alphas_cumprod.double())
    wanted = {"pred_noise": torch.ones_like(snr), "pred_x0": snr, "pred_v": snr / (snr + 1)}[objective]
    assert made.edition == "today"
    assert torch.allclose(made.loss_weight.double(), wanted, rtol=1e-4)
    bounded = diffusion(objective=objective, min_snr_loss_weight=True, min_snr_gamma=2)
    assert torch.allclose(bounded.loss_weight.double(), wanted * (snr.clamp(max=2) / snr), rtol=1e-4)
    noise, times = normals(), torch.tensor([1, 5, 12, 19])
    plain = diffusion(made.model, objective=objective, auto_normalize=True, p2_loss_weight_gamma=1e-12)
    ratio = made(pictures(), noise, times=times, loss_reduction="none") / plain(
        pictures(), noise, times=times, loss_reduction="none"
    )
    assert torch.allclose(ratio.double(), wanted[times], rtol=1e-4)


@pytest.mark.parametrize(
    "todays",
    [
        {"objective": "pred_v"},
        {"beta_schedule": "sigmoid"},
        {"schedule_fn_kwargs": {}},
        {"auto_normalize": True},
        {"offset_noise_strength": 0.0},
        {"min_snr_loss_weight": False},
        {"immiscible": False},
    ],
)
def test_any_name_of_today_s_means_today(todays: dict[str, Any]) -> None:
    assert diffusion(**todays).edition == "today"
    assert (
        diffusion(loss_type="l2", beta_schedule="cosine", sampling_timesteps=3, objective="pred_x0").edition == "2022"
    )
    assert (
        diffusion().loss_type == "l1" and diffusion().objective == "pred_noise" and diffusion().ddim_sampling_eta == 1
    )


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0"])
@pytest.mark.parametrize("edition", ["2022", "today"])
def test_ddim_of_both_editions(edition: str, objective: str) -> None:
    """The first step, eta 0: `alpha' x0 + sigma' eps`, x0 clipped and eps anew from it, but for pred_noise in 2022."""
    todays = {"auto_normalize": True} if edition == "today" else {}
    made = diffusion(objective=objective, sampling_timesteps=4, ddim_sampling_eta=0.0, **todays)
    states = made.sample(2, return_all_timesteps=True, seed=3) * 2 - 1
    x, bar = states[:, 0], made.alphas_cumprod
    with torch.no_grad():
        out = made.model(x, torch.full((2,), 19))
    alpha, sigma = bar[19].sqrt(), (1 - bar[19]).sqrt()
    x0 = ((x - sigma * out) / alpha if objective == "pred_noise" else out).clamp(-1, 1)
    anew = (x - alpha * x0) / sigma
    eps = out if objective == "pred_noise" and edition == "2022" else anew
    assert torch.allclose(states[:, 1], bar[14].sqrt() * x0 + (1 - bar[14]).sqrt() * eps, atol=1e-3)
    assert states.shape == (2, 5, 3, SIZE, SIZE)
    if objective == "pred_noise":
        assert float((out - anew).abs().max()) > 0.1


def test_p2_weights() -> None:
    made = diffusion(p2_loss_weight_gamma=0.5, p2_loss_weight_k=2)
    snr = made.alphas_cumprod / (1 - made.alphas_cumprod)
    assert made.edition == "2022" and torch.allclose(made.p2_loss_weight, (2 + snr) ** -0.5, rtol=1e-4)
    assert torch.equal(
        diffusion(p2_loss_weight_gamma=0.5, p2_loss_weight_k=2, objective="pred_v").loss_weight, made.p2_loss_weight
    )


def test_immiscible_trains_on_the_noise_it_assigned() -> None:
    """A network that says what noise is in its input has no loss, whichever picture the noise went to."""

    class Knows(nn.Module):
        channels, out_dim, self_condition = 3, 3, False

        def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
            level = made.schedule.level(t).like(x)
            return (x - level.alpha * (pictures() * 2 - 1)) / level.sigma

    made = diffusion(Knows(), immiscible=True)
    seen: list[Tensor] = []
    made.model.register_forward_hook(lambda _, args, out: seen.append(out))
    noise = normals()
    assert float(made(pictures(), noise, times=torch.full((4,), 9))) < 1e-5
    order = assign(torch.cdist((pictures() * 2 - 1).flatten(1), noise.flatten(1)))
    assert torch.allclose(seen[0], noise[order], atol=1e-5)


def test_the_range_of_pictures() -> None:
    torch.manual_seed(5)
    first = diffusion(auto_normalize=True)(pictures())
    torch.manual_seed(5)
    second = diffusion(auto_normalize=False)(pictures() * 2 - 1)
    assert torch.allclose(first, second)
    assert float(diffusion(timesteps=4, auto_normalize=False).sample(2, seed=0).min()) < -0.1


def test_other_ranges_are_warned_of_once() -> None:
    made = diffusion()
    with pytest.warns(UserWarning, match=r"expected in \[0, 1\], got \[-1, 1\]"):
        made(pictures().round() * 2 - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(pictures() * 3 - 1)
        diffusion()(pictures())
        diffusion(auto_normalize=False)(pictures() * 2 - 1)
    with pytest.raises(UserError, match="divide bytes by 255"):
        made((pictures() * 255).byte())


# --- drawing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"timesteps": 6}, {"sampling_timesteps": 4}])
def test_seeds(options: dict[str, Any]) -> None:
    made = diffusion(**options)
    both, second = made.sample(2, seed=7), made.sample(1, seed=8)
    assert torch.allclose(both[1], second[0], atol=1e-4) and not torch.equal(both[0], both[1])
    torch.manual_seed(0)
    one = made.sample(2)
    torch.manual_seed(0)
    assert torch.equal(one, made.sample(2)) and not torch.equal(one, made.sample(2))
    training = diffusion()
    losses = [(torch.manual_seed(1), training(pictures()))[1] for _ in range(2)]
    assert torch.equal(*losses) and not torch.equal(losses[0], training(pictures()))


def test_all_timesteps() -> None:
    made = diffusion(timesteps=6)
    states = made.sample(2, return_all_timesteps=True, seed=1)
    assert states.shape == (2, 7, 3, SIZE, SIZE)
    assert torch.equal(states[:, -1], made.sample(2, seed=1))
    assert torch.equal(made.p_sample_loop((2, 3, SIZE, SIZE), seed=1), made.sample(2, seed=1))
    few = diffusion(sampling_timesteps=3)
    assert torch.equal(few.ddim_sample((2, 3, SIZE, SIZE), seed=1), few.sample(2, seed=1))


def test_drawing_leaves_the_network_as_it_was() -> None:
    made = diffusion(unet(dropout=0.5), timesteps=3)
    made.model.final_conv.eval()
    drawn = made.sample(2, seed=0)
    assert made.model.training and not made.model.final_conv.training
    made.eval()
    assert torch.equal(made.sample(2, seed=0), drawn)


def test_interpolation() -> None:
    """At time 0 hardly any noise is added: the ends come back nearly, with a network that finds the noise."""

    class Knows(nn.Module):
        channels, out_dim, self_condition = 3, 3, False

        def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
            return x / made.schedule.level(t).like(x).alpha

    made = diffusion(Knows(), objective="pred_x0")
    one, two = pictures(2), pictures(2, seed=1)
    for lam, wanted in ((0.0, one), (1.0, two), (0.25, 0.75 * one + 0.25 * two)):
        assert float((made.interpolate(one, two, t=0, lam=lam, seed=0) - wanted).abs().mean()) < 0.1
    assert made.interpolate(one, two).shape == one.shape
    assert torch.equal(made.interpolate(one, two, seed=1), made.interpolate(one, two, T - 1, 0.5, seed=1))
    for bad in (T, -1):
        with pytest.raises(UserError, match=r"t must lie in 0 … 19"):
            made.interpolate(one, two, t=bad)
    with pytest.raises(UserError, match="one shape"):
        made.interpolate(one, two[:1])


def test_self_conditioning_feeds_the_last_estimate() -> None:
    seen: list[tuple[Tensor | None, Tensor]] = []

    class Watched(Unet):
        def forward(self, x: Tensor, time: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
            seen.append((x_self_cond, super().forward(x, time, x_self_cond)))
            return seen[-1][1]

    made = diffusion(Watched(dim=8, dim_mults=(1, 2), self_condition=True), objective="pred_x0", timesteps=3)
    made.sample(1)
    assert float(seen[0][0].abs().max()) == 0
    for (_, before), (given, _) in zip(seen[:-1], seen[1:], strict=True):
        assert torch.equal(given, before.clamp(-1, 1))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": "pred_nosie"}, "did you mean 'pred_noise'"),
        ({"beta_schedule": "cosin"}, "did you mean 'cosine'"),
        ({"loss_type": "l3"}, "unknown loss_type 'l3'"),
        ({"timestep": 5}, "no option 'timestep' .did you mean 'timesteps'"),
        ({"schedule_fn_kwargs": {"S": 0.1}}, "did you mean 's'"),
        ({"beta_schedule": "sigmoid", "schedule_fn_kwargs": {"clamp_min": 1e-5}}, "unknown schedule_fn_kwargs"),
        ({"beta_schedule": "linear", "timesteps": 25, "schedule_fn_kwargs": {"start": 1}}, "known: none"),
        ({"p2_loss_weight_gamma": 1.0, "min_snr_loss_weight": True}, "two weightings"),
        ({"min_snr_gamma": 5}, "add min_snr_loss_weight=True"),
        ({"sampling_timesteps": T + 1}, "sampling_timesteps must lie in 1 … timesteps"),
        ({"sampling_timesteps": 0}, "sampling_timesteps must lie in 1 … timesteps"),
        ({"timesteps": 1}, "timesteps must be at least 2"),
        ({"timesteps": 20.0}, "timesteps must be a whole number, got 20.0"),
        ({"timesteps": "20"}, "timesteps must be a whole number, got '20'"),
        ({"sampling_timesteps": 5.0}, "sampling_timesteps must be a whole number, got 5.0"),
        ({"channels": 1}, "channels is 1, but Unet says that its pictures have 3"),
        ({"beta_schedule": "linear", "timesteps": 19}, "at least 20 timesteps"),
        ({"ddim_sampling_eta": 2.0}, "eta must lie in"),
        ({"vb_loss_weight": 0.001}, "learned_variance=True"),
        ({"image_size": 15}, "multiple of 2"),
        ({"image_size": (16, 16, 3)}, "one positive whole number or two"),
        ({"offset_noise_strength": -1.0}, "must not be negative"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        diffusion(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dim": 7}, "dim must be even"),
        ({"dim": 2}, "at least 4"),
        ({"dim_mults": ()}, "at least one level"),
        ({"dim_mults": (1, 0)}, r"dim_mults\[1\] must be a whole number of at least 1, got 0"),
        ({"channels": 0}, "channels must be a whole number of at least 1, got 0"),
        ({"channels": 3.0}, "channels must be a whole number of at least 1, got 3.0"),
        ({"out_dim": 0}, "out_dim must be a whole number of at least 1, got 0"),
        ({"full_attn": (True,)}, "full_attn needs one value, or one for each of the 2 levels"),
        ({"learned_sinusoidal_cond": True, "learned_sinusoidal_dim": 5}, "learned_sinusoidal_dim must be even"),
        ({"dim_mult": (1, 2)}, "did you mean 'dim_mults'"),
    ],
)
def test_networks_that_cannot_work_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        unet(**options)


def test_misfits_are_refused() -> None:
    made = diffusion()
    for bad in (pictures()[..., :8], pictures()[:, :1], pictures()[0]):
        with pytest.raises(UserError, match=r"pictures must be \(B, 3, 16, 16\)"):
            made(bad)
    with pytest.raises(UserError, match="multiples of 2"):
        made.model(torch.zeros(1, 3, 7, 8), torch.zeros(1))
    with pytest.raises(UserError, match="seed must not be negative"):
        made.sample(1, seed=-1)
    with pytest.raises(UserError, match="unknown loss_reduction"):
        made(pictures(), loss_reduction="sum")
    for size in (0, -1):
        with pytest.raises(UserError, match=f"batch_size must be at least 1, got {size}"):
            made.sample(size)
    with pytest.raises(UserError, match="batch_size must be a whole number, got 2.0"):
        made.sample(2.0)  # type: ignore[arg-type]
    x = normals(2)
    for times, words in (
        ([0, T], rf"times must lie in 0 … {T - 1} \(timesteps is {T}\), got {T}"),
        ([-1, 0], "got -1"),
        ([0.0, float("nan")], "got nan"),
        ([0, 1, 2], r"one for each of the 2 pictures, got \(3,\)"),
    ):
        for ask in (
            lambda t: made(pictures(2), times=t),
            lambda t: made.p_losses(x, t),
            lambda t: made.q_sample(x, t),
            lambda t: made.model_predictions(x, t),
            lambda t: made.q_posterior(x, x, t),
        ):
            with pytest.raises(UserError, match=words):
                ask(torch.tensor(times))
    with pytest.raises(UserError, match="out_dim must be its channels"):
        diffusion(unet(out_dim=5))
    with pytest.raises(UserError, match="vb_loss_weight must be positive"):
        diffusion(unet(learned_variance=True), vb_loss_weight=0.0)


# --- other networks --------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """A network of (x, t) that tells nothing of itself."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.conv(x) + t.view(-1, 1, 1, 1) / T
        return out


@dataclass
class Answer:
    sample: Tensor


class WithConfig(Plain):
    """A network as diffusers has them: channels in its config, further arguments, an answer with a field."""

    config = SimpleNamespace(in_channels=3, out_channels=3)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: None = None) -> Answer:  # type: ignore[override]
        return Answer(super().forward(sample, timestep))


def test_a_network_of_x_and_t_trains_and_draws() -> None:
    drawn = []
    for kind, options in ((Plain, {"channels": 3}), (WithConfig, {})):
        torch.manual_seed(0)
        made = diffusion(kind(), objective="pred_v", **options)
        assert not made.self_condition and not made.learned_variance
        made(pictures()).backward()
        assert all(p.grad is not None for p in made.model.parameters())
        drawn.append(made.sample(2, seed=0))
    assert drawn[0].shape == (2, 3, SIZE, SIZE) and torch.equal(*drawn)


def test_this_library_s_own_network() -> None:
    levels = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "layers_per_block": 1}
    config = {"block_out_channels": (8,), "norm_num_groups": 4, "in_channels": 1, **levels}
    made = diffusion(UNet2DModel(UNet2DConfig.from_dict(config | {"out_channels": 1})))
    assert made.channels == 1 and made.sample(1, seed=0).shape == (1, 1, SIZE, SIZE)
    made(pictures(channels=1)).backward()
    learned = diffusion(UNet2DModel(UNet2DConfig.from_dict(config | {"out_channels": 2})))
    assert learned.learned_variance and learned.sample(1, seed=0).shape == (1, 1, SIZE, SIZE)


def test_networks_that_cannot_be_called_are_refused() -> None:
    with pytest.raises(UserError, match="Plain does not say how many channels its pictures have; give channels=3"):
        diffusion(Plain())
    with pytest.raises(UserError, match=r"Identity cannot be called as model\(x, t\); wrap it in a module"):
        diffusion(nn.Identity(), channels=3)
    feeding = Plain()
    feeding.channels, feeding.self_condition = 3, True  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"Plain cannot be called as model\(x, t, x_self_cond\)"):
        diffusion(feeding)


# --- what is known of one level --------------------------------------------------------------------------------------


def test_what_goes_with_what() -> None:
    made, x0, noise, t = diffusion(), normals(4, 1), normals(4, 2), torch.tensor([0, 3, 10, T - 1])
    bar = made.alphas_cumprod[t].double().view(-1, 1, 1, 1)
    alpha, sigma = bar.sqrt().float(), (1 - bar).sqrt().float()
    x_t, v = alpha * x0 + sigma * noise, alpha * noise - sigma * x0
    close = {"rtol": 1e-3, "atol": 2e-3}
    torch.testing.assert_close(made.q_sample(x0, t, noise), x_t, **close)
    torch.testing.assert_close(made.predict_v(x0, t, noise), v, **close)
    torch.testing.assert_close(made.predict_start_from_v(x_t, t, v), x0, **close)
    torch.testing.assert_close(made.predict_noise_from_start(x_t, t, x0)[1:], noise[1:], **close)
    torch.testing.assert_close(made.predict_start_from_noise(x_t, t, noise)[:-1], x0[:-1], **close)


def test_the_posterior_is_that_of_the_stored_tables() -> None:
    made, x0, x_t, t = diffusion(), normals(4, 1), normals(4, 2), torch.tensor([0, 3, 10, T - 1])
    mean, variance, log_variance = made.q_posterior(x0, x_t, t)
    first, second, spread, log_spread = (
        made.get_buffer(name)[t].view(-1, 1, 1, 1)
        for name in (
            "posterior_mean_coef1",
            "posterior_mean_coef2",
            "posterior_variance",
            "posterior_log_variance_clipped",
        )
    )
    torch.testing.assert_close(mean, first * x0 + second * x_t)
    torch.testing.assert_close(variance.float(), spread)
    torch.testing.assert_close(log_variance.float(), log_spread)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_predictions_are_the_network_s(objective: str) -> None:
    made, x, t = diffusion(objective=objective), normals(), torch.tensor([1, 3, 10, 15])
    out = made.model(x, t.float())
    noise, x0 = made.model_predictions(x, t)
    torch.testing.assert_close(made.predict_start_from_noise(x, t, noise), x0, rtol=1e-4, atol=1e-4)
    said = {"pred_noise": noise, "pred_x0": x0, "pred_v": made.predict_v(x0, t, noise)}[objective]
    torch.testing.assert_close(said, out, rtol=1e-4, atol=1e-4)
    clipped = made.model_predictions(x, t, clip_x_start=True)
    again = made.model_predictions(x, t, clip_x_start=True, rederive_pred_noise=True)
    assert clipped.pred_x_start.abs().max() <= 1 and torch.equal(clipped.pred_x_start, x0.clamp(-1, 1))
    agreeing = made.predict_noise_from_start(x, t, clipped.pred_x_start)
    torch.testing.assert_close(again.pred_noise, agreeing)
    assert torch.equal(clipped.pred_noise, noise if objective == "pred_noise" else again.pred_noise)


@pytest.mark.parametrize("learned", [False, True])
def test_a_step_is_drawn_from_its_mean_and_variance(learned: bool) -> None:
    made, x = diffusion(unet(learned_variance=learned)).eval(), normals(2)
    for t in (0, 7, T - 1):
        mean, variance, log_variance, x0 = made.p_mean_variance(x, torch.full((2,), t))
        stepped, expected = made.p_sample(x, t, noise=NoiseSource([0, 1], x.shape[1:]))
        torch.testing.assert_close(expected, x0)
        assert torch.isfinite(log_variance).all()
        z = NoiseSource([0, 1], x.shape[1:]).draw()
        spread = torch.sqrt(variance) * z if t else 0
        torch.testing.assert_close(stepped, (mean + spread).float(), rtol=1e-4, atol=1e-4)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_checkpoints_open_and_the_rest_stays() -> None:
    first, second = (diffusion(model, timesteps=6) for model in (unet(), Unet(dim=8, dim_mults=(1, 2))))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.sample(1, seed=0), second.sample(1, seed=0))
    network = {name: tensor for name, tensor in first.state_dict().items() if name.startswith("model.")}
    diffusion(timesteps=6).load_state_dict(network)
    both = nn.ModuleDict({"diffusion": diffusion(timesteps=6)})
    both.load_state_dict({f"diffusion.{name}": tensor for name, tensor in first.state_dict().items()})
    for copied in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert torch.equal(first.sample(1, seed=0), copied.sample(1, seed=0))
    network.popitem()
    with pytest.raises(RuntimeError, match="Missing key"):
        diffusion().load_state_dict(network)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_checkpoints_of_other_types_open(dtype: torch.dtype) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in diffusion().state_dict().items()}
    made = diffusion()
    made.load_state_dict(stored)
    assert torch.equal(made.betas, diffusion().betas)
    with pytest.raises(UserError, match="another noise schedule"):
        diffusion(beta_schedule="sigmoid").load_state_dict(stored)


@pytest.mark.parametrize(
    ("stored", "own", "words"),
    [
        ({"beta_schedule": "sigmoid"}, {}, "theirs is beta_schedule='sigmoid', timesteps=20"),
        ({"timesteps": 50}, {}, r"\(20 timesteps, betas\); theirs is beta_schedule='cosine', timesteps=50"),
        ({"schedule_fn_kwargs": {"s": 0.1}}, {}, "theirs has 20 timesteps"),
        ({"objective": "pred_v"}, {}, "trained with objective='pred_v', not 'pred_noise'"),
        ({"objective": "pred_x0", "auto_normalize": True}, {}, "trained with objective='pred_x0'"),
        ({"auto_normalize": True}, {"objective": "pred_v"}, "trained with objective='pred_noise'"),
        ({"objective": "pred_v", "min_snr_loss_weight": True}, {"objective": "pred_x0"}, "objective='pred_v'"),
    ],
)
def test_checkpoints_of_another_kind_are_refused(stored: dict[str, Any], own: dict[str, Any], words: str) -> None:
    state = diffusion(**stored).state_dict()
    made = diffusion(**own)
    before = copy.deepcopy(made.state_dict())
    with pytest.raises(UserError, match=words):
        made.load_state_dict(state)
    assert all(torch.equal(before[name], tensor) for name, tensor in made.state_dict().items())


@pytest.mark.parametrize(
    ("stored", "own", "words"),
    [
        ({"auto_normalize": True}, {}, "pass min_snr_loss_weight=False"),
        ({"min_snr_loss_weight": True, "min_snr_gamma": 2}, {}, "min_snr_loss_weight=True, min_snr_gamma=2 "),
        ({"p2_loss_weight_gamma": 1.0}, {}, "stored p2_loss_weight is another"),
    ],
)
def test_other_weightings_are_warned_of(stored: dict[str, Any], own: dict[str, Any], words: str) -> None:
    state = diffusion(objective="pred_x0", **stored).state_dict()
    made = diffusion(objective="pred_x0", **own)
    with pytest.warns(UserWarning, match=words):
        made.load_state_dict(state)
    assert torch.equal(made.p2_loss_weight, torch.ones(T))


def test_wrappers_are_told_apart() -> None:
    state = diffusion().state_dict()
    with pytest.raises(UserError, match="its 'model' entry"):
        diffusion().load_state_dict({"step": 1, "model": state})
    with pytest.raises(UserError, match="running average"):
        diffusion().load_state_dict({f"ema_model.{name}": tensor for name, tensor in state.items()})
