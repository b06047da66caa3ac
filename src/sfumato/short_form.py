"""The short form: `Unet` and `GaussianDiffusion` as the first tutorials write them, over this library's own parts.

A script written for denoising_diffusion_pytorch in 2022 runs with its import line changed; checkpoints of that package
open. Nothing is computed here: the noise levels are a `TableSchedule`, the loss an `Objective`, the steps `Ancestral`
and `Euler`, the loop `sample`. Of the package's `GaussianDiffusion` all public methods are here but `noise_assignment`
(`diffusion.assignment.assign`); its `Trainer` is not: that is `sfumato train`, or a loop of one's own. Any network of
`(x, t)` may stand in the place of `Unet`.

>>> import torch
>>> from sfumato import GaussianDiffusion, Unet
>>> model = Unet(dim=8, dim_mults=(1, 2))
>>> diffusion = GaussianDiffusion(model, image_size=8, timesteps=4, loss_type="l1")
>>> diffusion(torch.rand(2, 3, 8, 8)).backward()
>>> diffusion.sample(batch_size=2, seed=0).shape
torch.Size([2, 3, 8, 8])
"""

from __future__ import annotations

import inspect
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Never, cast

import torch
from torch import Tensor, nn

from sfumato.backends.convolutions import engage_in_training
from sfumato.diffusion.denoiser import TIME, Denoiser, Preconditioning, Prediction
from sfumato.diffusion.guidance import DenoiseFn, clip_x0, unguided
from sfumato.diffusion.hooks import Hook, keep, told
from sfumato.diffusion.level import CLEAN, NoiseLevel, expand
from sfumato.diffusion.objective import LOSSES, Objective
from sfumato.diffusion.parameterization import EPS, X0, Parameterization, V
from sfumato.diffusion.posterior import learned_log_variance, transition
from sfumato.diffusion.sample import sample, start
from sfumato.diffusion.schedule import TableSchedule, cosine_alpha_bar, linear_alpha_bar, sigmoid_alpha_bar
from sfumato.diffusion.solvers import Ancestral, Euler, Solver
from sfumato.errors import UserError, nearest, raise_unknown
from sfumato.networks.unet_article import Unet
from sfumato.random import NoiseSource

OBJECTIVES: dict[str, Parameterization] = {"pred_noise": EPS, "pred_x0": X0, "pred_v": V}


def _linear(steps: int) -> Tensor:
    """Betas from 0.0001 to 0.02 on 1,000 steps, and so many times as large on fewer (improved-diffusion's rule)."""
    return linear_alpha_bar(steps, 0.1 / steps, 20 / steps)


def _sigmoid(steps: int, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> Tensor:
    return sigmoid_alpha_bar(steps, start, end, tau, ends=torch.float32)


BETA_SCHEDULES: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "linear": (_linear, ()),
    "cosine": (cosine_alpha_bar, ("s",)),
    "sigmoid": (_sigmoid, ("start", "end", "tau")),
}
"""Name -> (table, the names that `schedule_fn_kwargs` may have)."""

_OPTIONS = (
    "image_size",
    "timesteps",
    "sampling_timesteps",
    "loss_type",
    "objective",
    "beta_schedule",
    "schedule_fn_kwargs",
    "p2_loss_weight_gamma",
    "p2_loss_weight_k",
    "ddim_sampling_eta",
    "auto_normalize",
    "offset_noise_strength",
    "min_snr_loss_weight",
    "min_snr_gamma",
    "immiscible",
    "vb_loss_weight",
    "channels",
)

LOG_SNR = Preconditioning("log_snr", TIME.scale, lambda level: 2 * level.half_log_snr.clamp(-10, 10))
"""What a network with Fourier features of its time is told, as by the package's continuous-time class."""


class ModelPrediction(NamedTuple):
    """What `model_predictions` answers, each (B, C, H, W): the noise, and the clean picture in [-1, 1]."""

    pred_noise: Tensor
    pred_x_start: Tensor


class _Called(nn.Module):
    """A network called as `Denoiser` calls networks: the article's `model(x, t, x_self_cond)`, or any `model(x, t)`."""

    def __init__(self, model: nn.Module, contract: _Contract) -> None:
        super().__init__()
        self.model, self.contract = model, contract

    def forward(self, x: Tensor, t: Tensor) -> Any:
        previous, x_t = x.chunk(2, dim=1) if self.contract.self_condition else (None, x)
        return self.model(x_t, t, previous) if self.contract.three else self.model(x_t, t)


class _Contract(NamedTuple):
    """What a network says of itself: its channels, whether it conditions on itself and learns its variance, and whether
    it is called with three arguments rather than two."""

    channels: int
    self_condition: bool
    learned_variance: bool
    three: bool


class GaussianDiffusion(nn.Module):
    """Training and sampling around one network, by the names and defaults that the package had in 2022 (0.27 to 0.29).

    Pictures go in and come out in [0, 1]. `diffusion(pictures)` is the loss of a training step; `sample` draws.

    Args:
        model: a `Unet`; or any network called as `model(x, t, x_self_cond)` with `channels`, `out_dim` and
            `self_condition`; or any called as `model(x, t)`, with x (B, C, H, W) and t (B,), whose channels are its
            attribute `channels`, or `in_channels` of its config, or the argument. If it learns its variance (`out_dim`,
            or `out_channels` of its config, is twice `channels`) the hybrid loss and the learned variance are used
            (what the package calls `LearnedGaussianDiffusion`).
        image_size: height and width in pixels, one number or two.
        timesteps: T, the length of the noise schedule.
        sampling_timesteps: steps of `sample`; fewer than T means DDIM. None for T, which is DDPM's own sampling.
        loss_type: "l1", "l2" or "huber".
        objective: what the network predicts: "pred_noise", "pred_x0", or (today's) "pred_v".
        beta_schedule: "cosine", "linear" (scaled by 1000 / T), or (today's) "sigmoid".
        schedule_fn_kwargs: (today's) the schedule's own settings: s of cosine; start, end, tau of sigmoid.
        p2_loss_weight_gamma, p2_loss_weight_k: weight `(k + SNR)^-gamma` (Choi 2022); gamma 0 for none.
        ddim_sampling_eta: DDIM's noise, 0 (none) to 1.
        auto_normalize: (today's) False: pictures go in and come out in [-1, 1].
        offset_noise_strength: (today's) see `Objective.offset_noise`.
        min_snr_loss_weight, min_snr_gamma: (today's) weight `min(SNR, gamma)` on x0 (Hang 2023); gamma is 5.
        immiscible: (today's) see `Objective.immiscible`.
        vb_loss_weight: weight of the variational bound of a network that learns its variance, 0.001.
        channels: of the pictures, for a network that does not tell; None for what it tells.

    **2022 or today.** Defaults are always 2022's. Without any of today's arguments (those marked so, whatever their
    value, and the two values marked so) everything follows 2022. With one of them, `edition` is "today" and two things
    follow version 2.3.4:

    - the loss is weighted by 1 for pred_noise, SNR for pred_x0, SNR / (SNR + 1) for pred_v; in 2022 by 1. A
      `p2_loss_weight_gamma` other than 0 is the whole weight in both.
    - DDIM of a pred_noise network derives the noise anew from the clipped picture; in 2022 it took the network's own.

    **Other than the package, on purpose.** Sampling runs the network in evaluation mode (no dropout). `interpolate`
    takes and returns pictures in [0, 1] and denoises from the level it noised to. With `immiscible` the target is the
    noise that was assigned. A network with Fourier features, refused there, is told the log SNR. A network that learns
    its variance may condition on itself and predict anything, and its bound at t = 0 uses the posterior variance of
    t = 1 (as improved-diffusion does).

    **Randomness.** Training, and `sample` without a seed, draw from torch's global CPU generator (`torch.manual_seed`).

    **Speed.** In float32 on a CPU the 3x3 convolutions of a `Unet` are computed with fewer products where that gains
    (`backends.convolutions`), rounded at other places; `release(model)` from there undoes it.

    **Checkpoints.** `state_dict` has the package's names. `load_state_dict` takes its state dicts and checks the stored
    schedule against this one; a schedule left out is filled in.

    Raises:
        UserError: for names that are not known, and for arguments that contradict each other or cannot work.
    """

    betas: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: int | Sequence[int],
        timesteps: int = 1000,
        sampling_timesteps: int | None = None,
        loss_type: str = "l1",
        objective: str = "pred_noise",
        beta_schedule: str = "cosine",
        schedule_fn_kwargs: Mapping[str, float] | None = None,
        p2_loss_weight_gamma: float = 0.0,
        p2_loss_weight_k: float = 1.0,
        ddim_sampling_eta: float = 1.0,
        auto_normalize: bool | None = None,
        offset_noise_strength: float | None = None,
        min_snr_loss_weight: bool | None = None,
        min_snr_gamma: float | None = None,
        immiscible: bool | None = None,
        vb_loss_weight: float | None = None,
        channels: int | None = None,
        **unknown: Never,
    ) -> None:
        super().__init__()
        for name in unknown:
            raise UserError(f"GaussianDiffusion has no option {name!r}{nearest(name, _OPTIONS)}")
        if objective not in OBJECTIVES:
            raise_unknown("objective", objective, OBJECTIVES)
        options = (
            schedule_fn_kwargs,
            auto_normalize,
            offset_noise_strength,
            min_snr_loss_weight,
            min_snr_gamma,
            immiscible,
        )
        today = objective == "pred_v" or beta_schedule == "sigmoid" or any(option is not None for option in options)
        self.edition: Literal["2022", "today"] = "today" if today else "2022"
        self.model, self.objective, self.loss_type = model, objective, loss_type
        self._contract = _read_model(model, channels)
        self.channels, self.self_condition, self.learned_variance, _ = self._contract
        timesteps = _whole("timesteps", timesteps, 2)
        self.image_size, self._sides = image_size, _read_size(image_size, model)
        self.auto_normalize, self._warned = auto_normalize is not False, False
        self.num_timesteps, self.ddim_sampling_eta = timesteps, ddim_sampling_eta
        self.schedule = _table(beta_schedule, timesteps, schedule_fn_kwargs or {})
        self.sampling_timesteps = timesteps
        if sampling_timesteps is not None:
            self.sampling_timesteps = _whole("sampling_timesteps", sampling_timesteps)
        if not 1 <= self.sampling_timesteps <= timesteps:
            raise UserError(f"sampling_timesteps must lie in 1 … timesteps ({timesteps}), got {sampling_timesteps}")
        self.is_ddim_sampling = self.sampling_timesteps < timesteps
        self.criterion = Objective(
            loss=_loss(loss_type),
            vlb_weight=_bound_weight(vb_loss_weight, self.learned_variance) / timesteps,
            offset_noise=offset_noise_strength or 0.0,
            immiscible=bool(immiscible),
            **_weighting(today, p2_loss_weight_gamma, p2_loss_weight_k, min_snr_loss_weight, min_snr_gamma),
        )
        self.criterion.check(self.denoiser)
        if isinstance(model, Unet):
            engage_in_training(model)
        self._ancestral = Ancestral(variance="learned" if self.learned_variance else "small")
        self._euler = Euler(eta=ddim_sampling_eta)
        for name, table in self._tables().items():
            self.register_buffer(name, table)

    # --- parts -------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters(), self.betas).device

    @property
    def denoiser(self) -> Denoiser:
        """The network with its schedule and parameterization: what the library's other samplers and guidance take."""
        fourier = bool(getattr(self.model, "random_or_learned_sinusoidal_cond", False))
        return Denoiser(
            _Called(self.model, self._contract),
            self.schedule,
            OBJECTIVES[self.objective],
            preconditioning=LOG_SNR if fourier else TIME,
            learned_variance=self.learned_variance,
            self_condition=self.self_condition,
        )

    def _denoise(self) -> DenoiseFn:
        keeps_noise = self.objective == "pred_noise" and self.edition == "2022"
        return clip_x0(unguided(self.denoiser), rederive_eps=not keeps_noise)

    def extra_repr(self) -> str:
        return (
            f"objective={self.objective!r}, loss_type={self.loss_type!r}, timesteps={self.num_timesteps}, "
            f"sampling_timesteps={self.sampling_timesteps}, edition={self.edition!r}"
        )

    # --- training ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        img: Tensor,
        noise: Tensor | None = None,
        *,
        times: Tensor | None = None,
        offset_noise_strength: float | None = None,
        loss_reduction: str = "mean",
    ) -> Tensor:
        """The loss of a batch of pictures (B, C, H, W) in [0, 1], at times drawn evenly unless they are given.

        Pictures outside [0, 1] are taken as they are, with one warning.
        """
        x_start = self._from_pictures(img)
        wanted = (self.channels, *self._sides)
        if img.ndim != 4 or tuple(img.shape[1:]) != wanted:
            raise UserError(f"pictures must be (B, {', '.join(map(str, wanted))}), got {tuple(img.shape)}")
        if times is None:
            uniform = torch.rand(len(img), generator=torch.default_generator, dtype=torch.float64)
            times = self.schedule.t_from_uniform(uniform)
        return self.p_losses(x_start, times, noise, offset_noise_strength, loss_reduction)

    def p_losses(
        self,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        offset_noise_strength: float | None = None,
        loss_reduction: str = "mean",
    ) -> Tensor:
        """The loss at times t (B,) of pictures in the network's own range [-1, 1]; "none" gives one each, (B,)."""
        if loss_reduction not in ("mean", "none"):
            raise_unknown("loss_reduction", loss_reduction, ("mean", "none"))
        criterion = self.criterion
        if offset_noise_strength is not None:
            criterion = replace(criterion, offset_noise=offset_noise_strength)
        level = self._level(t, len(x_start))
        loss = criterion(self.denoiser, x_start, generator=torch.default_generator, level=level, eps=noise)
        return loss.value if loss_reduction == "mean" else loss.each

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Noise pictures in [-1, 1] to times t (B,) in one jump, with the noise given or fresh."""
        if noise is None:
            noise = torch.randn(x_start.shape, generator=torch.default_generator).to(x_start)
        return self._level(t, len(x_start)).noise(x_start, noise)

    # --- what is known of one level ----------------------------------------------------------------------------------

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The clean picture that goes with x_t and its noise at times t (B,): `(x_t - sigma noise) / alpha`."""
        return EPS.solve(noise, x_t, self._level(t, len(x_t)))[0]

    def predict_noise_from_start(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """The noise that goes with x_t and its clean picture: `(x_t - alpha x0) / sigma`."""
        return X0.solve(x0, x_t, self._level(t, len(x_t)))[1]

    def predict_v(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """`v = alpha noise - sigma x_start` (Salimans 2022)."""
        return V.target(x_start, noise, self._level(t, len(x_start)))

    def predict_start_from_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """The clean picture that goes with x_t and v: `alpha x_t - sigma v`."""
        return V.solve(v, x_t, self._level(t, len(x_t)))[0]

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (B, C, H, W), variance and its logarithm, (B, 1, 1, 1), of the state one step cleaner than t (Ho 2020,
        eq. 6-7). The logarithm is kept above that of 1e-20."""
        now, cleaner = self._level(t, len(x_t)), self.schedule.previous(t)
        step = transition(now, cleaner)
        mean = expand(step.from_x0, x_t) * x_start + expand(step.from_x, x_t) * x_t
        variance = expand(step.variance, x_t)
        return mean.to(x_t.dtype), variance, torch.log(variance.clamp(min=1e-20))

    def model_predictions(
        self,
        x: Tensor,
        t: Tensor,
        x_self_cond: Tensor | None = None,
        clip_x_start: bool = False,
        rederive_pred_noise: bool = False,
    ) -> ModelPrediction:
        """What the network says of states x (B, C, H, W) at times t (B,), in the mode that it is in.

        Args:
            clip_x_start: keep the picture in [-1, 1]; the noise follows from it unless the network predicts noise.
            rederive_pred_noise: then too.
        """
        return self._predictions(x, t, x_self_cond, clip_x_start, rederive_pred_noise)[0]

    def _predictions(
        self, x: Tensor, t: Tensor, previous: Tensor | None, clip: bool, rederive: bool
    ) -> tuple[ModelPrediction, Tensor | None]:
        """The prediction and, of a network that learns its variance, the fraction that says it."""
        level = self._level(t, len(x))
        found = self.denoiser(x, level, None, previous)
        x0, noise = found.x0, found.eps
        if clip:
            x0 = x0.clamp(-1, 1)
            if rederive or self.objective != "pred_noise":
                noise = X0.solve(x0, x, level)[1]
        return ModelPrediction(noise, x0), found.var_frac

    def p_mean_variance(
        self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None, clip_denoised: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean, variance and its logarithm of the network's own step from t, and the clean picture that it expects."""
        prediction, var_frac = self._predictions(x, t, x_self_cond, clip_denoised, False)
        mean, variance, log_variance = self.q_posterior(prediction.pred_x_start, x, t)
        if var_frac is not None:
            beta = transition(self._level(t, len(x)), self.schedule.previous(t)).beta
            first = transition(self.schedule.level(1), self.schedule.level(0)).variance
            least = torch.where(variance > 0, variance, first.to(variance))  # as the bound has it at t = 0
            log_variance = learned_log_variance(var_frac, expand(beta, x), least)
            variance = log_variance.exp()
        return mean, variance, log_variance, prediction.pred_x_start

    def _level(self, t: Tensor, count: int) -> NoiseLevel:
        """The levels of times (B,), or of one time for all. Raises `UserError` for those that there are not."""
        if not isinstance(t, Tensor) or t.ndim > 1 or (t.ndim == 1 and len(t) != count):
            given = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise UserError(f"times must be a tensor of one for each of the {count} pictures, got {given}")
        last = self.num_timesteps - 1
        outside = t[~((t >= 0) & (t <= last))]
        if outside.numel():
            raise UserError(f"times must lie in 0 … {last} (timesteps is {last + 1}), got {outside[0].item()}")
        return self.schedule.level(t)

    # --- sampling ----------------------------------------------------------------------------------------------------

    def sample(
        self, batch_size: int = 16, return_all_timesteps: bool = False, *, seed: int | None = None, on_step: Hook = keep
    ) -> Tensor:
        """New pictures (B, C, H, W) in [0, 1]; with `return_all_timesteps` (B, steps + 1, C, H, W), noise first.

        Args:
            seed: picture i has seed `seed + i`, whoever shares its batch. None draws the seeds.
            on_step: hook of the sampling loop.
        """
        batch_size = _whole("batch_size", batch_size, 1)
        loop = self.ddim_sample if self.is_ddim_sampling else self.p_sample_loop
        return loop((batch_size, self.channels, *self._sides), return_all_timesteps, seed=seed, on_step=on_step)

    def p_sample_loop(
        self, shape: Sequence[int], return_all_timesteps: bool = False, *, seed: int | None = None, on_step: Hook = keep
    ) -> Tensor:
        """`sample` by DDPM's ancestral sampling over all T steps (Ho 2020, alg. 2)."""
        levels = self._levels(range(self.num_timesteps - 1, -1, -1))
        return self._walk(self._ancestral, levels, self._noise(shape, seed), return_all_timesteps, on_step)

    def ddim_sample(
        self, shape: Sequence[int], return_all_timesteps: bool = False, *, seed: int | None = None, on_step: Hook = keep
    ) -> Tensor:
        """`sample` by DDIM over `sampling_timesteps` steps (Song 2021, eq. 12)."""
        evenly = torch.linspace(-1, self.num_timesteps - 1, self.sampling_timesteps + 1)  # float32, cut to whole ones
        levels = self._levels(evenly.int().tolist()[:0:-1])
        return self._walk(self._euler, levels, self._noise(shape, seed), return_all_timesteps, on_step)

    @torch.no_grad()
    def p_sample(
        self, x: Tensor, t: int, x_self_cond: Tensor | None = None, *, noise: NoiseSource | None = None
    ) -> tuple[Tensor, Tensor]:
        """One ancestral step from time t: the state after it and the estimate of the clean picture, both in [-1, 1]."""
        denoise = self._denoise()

        def ask(x: Tensor, level: NoiseLevel) -> Prediction:
            return denoise(x, level, x_self_cond)

        now, nxt = self.schedule.level(t), self.schedule.previous(torch.tensor(t))
        with self._evaluating():
            source = self._noise(x.shape, None) if noise is None else noise
            x, _, _, prediction = self._ancestral.step(ask, x, now, nxt, None, source)
        return x, prediction.x0

    def interpolate(
        self, x1: Tensor, x2: Tensor, t: int | None = None, lam: float = 0.5, *, seed: int | None = None
    ) -> Tensor:
        """Pictures between x1 and x2, (B, C, H, W) in [0, 1]: both noised to time t, mixed, denoised (Ho 2020, fig. 8).

        Args:
            t: None for the noisiest.
            lam: 0 is x1, 1 is x2.
        """
        if x1.shape != x2.shape:
            raise UserError(f"interpolate needs two batches of one shape, got {tuple(x1.shape)} and {tuple(x2.shape)}")
        last = self.num_timesteps - 1
        if not 0 <= (t := last if t is None else t) <= last:
            raise UserError(f"interpolate's t must lie in 0 … {last}, got {t}")
        levels, noise = self._levels(range(t, -1, -1)), self._noise(x1.shape, seed)
        first, second = (levels[0].noise(self._from_pictures(x), noise.draw().to(x)) for x in (x1, x2))
        return self._walk(self._ancestral, levels, noise, False, keep, (1 - lam) * first + lam * second)

    def _walk(
        self, solver: Solver[Any], levels: list[NoiseLevel], noise: NoiseSource, everything: bool, on_step: Hook,
        x: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Follow the levels from x, or from noise. Returns pictures."""
        seen: list[Tensor] = []

        def watch(x: Tensor, level: NoiseLevel, prediction: Prediction | None, source: NoiseSource) -> Tensor:
            x = told(on_step, x, level, prediction, source)
            if everything:
                seen.append(x)
            return x

        x = start(noise, levels[0]) if x is None else x
        with self._evaluating():
            x = sample(self._denoise(), solver, x, levels, self.schedule, noise=noise, on_step=watch)
        x = torch.stack(seen, dim=1) if everything else x
        return (x + 1) / 2 if self.auto_normalize else x

    def _levels(self, times: Sequence[int]) -> list[NoiseLevel]:
        return [*(self.schedule.level(t) for t in times), CLEAN]

    def _noise(self, shape: Sequence[int], seed: int | None) -> NoiseSource:
        if seed is not None and seed < 0:
            raise UserError(f"seed must not be negative, got {seed}")
        first = torch.randint(2**62, (), generator=torch.default_generator).item() if seed is None else seed
        return NoiseSource([int(first) + i for i in range(shape[0])], shape[1:], device=self.device)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """The network in evaluation mode; every part of it is put back as it was."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training

    def _from_pictures(self, img: Tensor) -> Tensor:
        if not img.is_floating_point():
            raise UserError(f"pictures must be floating-point numbers in [0, 1], got {img.dtype}; divide bytes by 255")
        lowest = 0.0 if self.auto_normalize else -1.0
        if not self._warned and img.numel():
            low, high = (float(v) for v in img.detach().aminmax())
            if low < lowest - 1e-3 or high > 1 + 1e-3:
                self._warned = True
                warnings.warn(
                    f"pictures are expected in [{lowest:g}, 1], got [{low:.3g}, {high:.3g}]; they are used as they are "
                    "(this is said once)",
                    stacklevel=5,  # where the diffusion was called
                )
        return img * 2 - 1 if self.auto_normalize else img

    # --- checkpoints -------------------------------------------------------------------------------------------------

    @property
    def _weight_name(self) -> str:
        return "loss_weight" if self.edition == "today" else "p2_loss_weight"

    def _tables(self) -> dict[str, Tensor]:
        """The schedule as the package stores it, all (T,) float32: for its checkpoints, nothing here reads them."""
        times = torch.arange(self.num_timesteps, dtype=torch.float64)
        level, before = self.schedule.level(times), self.schedule.previous(times)
        step, bar, bar_before = transition(level, before), level.alpha**2, before.alpha**2
        tables = {
            "betas": 1 - bar / bar_before,
            "alphas_cumprod": bar,
            "alphas_cumprod_prev": bar_before,
            "sqrt_alphas_cumprod": level.alpha,
            "sqrt_one_minus_alphas_cumprod": level.sigma,
            "log_one_minus_alphas_cumprod": torch.log(1 - bar),
            "sqrt_recip_alphas_cumprod": 1 / level.alpha,
            "sqrt_recipm1_alphas_cumprod": level.nsr,
            "posterior_variance": step.variance,
            "posterior_log_variance_clipped": torch.log(step.variance.clamp(min=1e-20)),
            "posterior_mean_coef1": step.from_x0,
            "posterior_mean_coef2": step.from_x,
            self._weight_name: self.criterion.weight(self.denoiser, level),
        }
        return {name: table.to(torch.float32) for name, table in tables.items()}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Check the stored schedule, and go on with this one's: what is left to load is the network."""
        stored = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        _refuse_wrappers(stored)
        own = {name: table for name, table in self.named_buffers(recurse=False)}
        for name in [*own, "loss_weight", "p2_loss_weight"]:
            found = stored.get(name)
            if found is None:
                continue
            if name.endswith("loss_weight"):
                self._check_weight(name, found)
            elif not _same(own[name], found):
                raise UserError(_other_schedule(found, name, stored, self.num_timesteps))
            state_dict.pop(prefix + name, None)
        state_dict.update({prefix + name: table for name, table in own.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_weight(self, name: str, found: Tensor) -> None:
        """Loss weights betray what the network predicts: refuse another objective, warn of another weighting."""
        if _same(self.get_buffer(self._weight_name), found):
            return
        fits = _objectives_of(found, self.schedule) if name == "loss_weight" else {}
        if fits and self.objective not in fits:
            raise UserError(
                f"these weights were trained with objective={next(iter(fits))!r}, not {self.objective!r}: their "
                "loss_weight says so"
            )
        meant = f"; pass {fits[self.objective]} to go on with theirs" if fits else ""
        warnings.warn(
            f"the stored {name} is another than this diffusion's; sampling is not touched, training goes on with this "
            f"one's{meant}",
            stacklevel=2,
        )


def _read_model(model: nn.Module, channels: int | None) -> _Contract:
    """What a network says of itself, or of it the argument. Raises `UserError` for what cannot be used."""
    name, config = type(model).__name__, getattr(model, "config", None)
    told = getattr(model, "channels", getattr(config, "in_channels", None))
    if channels is not None and told is not None and channels != told:
        raise UserError(f"channels is {channels}, but {name} says that its pictures have {told}")
    if (channels := told if channels is None else channels) is None:
        raise UserError(f"{name} does not say how many channels its pictures have; give channels=3, or as many")
    channels = _whole("channels", channels, 1)
    out_dim = getattr(model, "out_dim", getattr(config, "out_channels", channels))
    if out_dim not in (channels, 2 * channels):
        raise UserError(
            f"the model's out_dim must be its channels ({channels}), or twice that to learn the variance; got {out_dim}"
        )
    conditioned = getattr(model, "self_condition", None)
    three = conditioned is not None and _takes(model, 3)
    if (conditioned and not three) or not _takes(model, 2):
        more = ", x_self_cond" if conditioned else ""
        raise UserError(f"{name} cannot be called as model(x, t{more}); wrap it in a module whose forward takes these")
    return _Contract(channels, bool(conditioned), out_dim == 2 * channels, three)


def _takes(model: nn.Module, count: int) -> bool:
    """Whether a network's `forward` can be called with so many arguments by position."""
    try:
        inspect.signature(model.forward).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # nothing is known of it
        return True
    return True


def _whole(name: str, value: Any, least: int | None = None) -> int:
    """A whole number, of at least `least`. Raises `UserError`."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise UserError(f"{name} must be a whole number, got {value!r}")
    if least is not None and number < least:
        raise UserError(f"{name} must be at least {least}, got {number}")
    return number


def _read_size(image_size: int | Sequence[int], model: nn.Module) -> tuple[int, int]:
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(f"image_size must be one positive whole number or two (height, width), got {image_size!r}")
    factor = getattr(model, "downsample_factor", 1)
    if any(side % factor for side in sides):
        raise UserError(f"image_size must be a multiple of {factor} for this model, got {image_size!r}")
    return sides


def _table(name: str, timesteps: int, settings: Mapping[str, float]) -> TableSchedule:
    if name not in BETA_SCHEDULES:
        raise_unknown("beta_schedule", name, BETA_SCHEDULES)
    table, known = BETA_SCHEDULES[name]
    for key in settings:
        if key not in known:
            raise_unknown(f"schedule_fn_kwargs of beta_schedule {name!r}:", key, known or ("none",))
    if name == "linear" and timesteps < 20:
        raise UserError(
            f"beta_schedule='linear' needs at least 20 timesteps (its last beta is 20 / T), got {timesteps}"
        )
    try:
        return TableSchedule(table(timesteps, **settings))
    except ValueError:
        raise UserError(f"beta_schedule={name!r} with {dict(settings)} has levels that do not get noisier") from None


def _loss(name: str) -> Literal["l1", "l2", "huber"]:
    if name not in LOSSES:
        raise_unknown("loss_type", name, LOSSES)
    return cast(Literal["l1", "l2", "huber"], name)


def _weighting(
    today: bool, p2_gamma: float, p2_k: float, min_snr: bool | None, min_snr_gamma: float | None
) -> dict[str, Any]:
    """The fields of `Objective` that say how levels are weighted."""
    if p2_gamma and min_snr:
        raise UserError("p2_loss_weight_gamma and min_snr_loss_weight are two weightings of the loss; use one")
    if min_snr_gamma is not None and min_snr is None:
        raise UserError("min_snr_gamma does nothing by itself; add min_snr_loss_weight=True")
    if p2_gamma:
        return {"weighting": "p2", "p2_gamma": p2_gamma, "p2_k": p2_k}
    if today:
        bound = 5.0 if min_snr_gamma is None else min_snr_gamma
        return {"weighting": "min_snr", "min_snr_gamma": bound if min_snr else math.inf}
    return {"weighting": "uniform"}


def _bound_weight(given: float | None, learned_variance: bool) -> float:
    if not learned_variance:
        if given is not None:
            raise UserError("vb_loss_weight needs a network that learns its variance: Unet(..., learned_variance=True)")
        return 0.0
    if given is not None and given <= 0:
        raise UserError(f"vb_loss_weight must be positive, got {given}")
    return 0.001 if given is None else given


def _same(own: Tensor, found: Tensor) -> bool:
    """Equal but for the rounding of the type that `found` is stored in."""
    rounding = max(1e-4, 4 * torch.finfo(found.dtype).eps)
    mine = own.to(found.device, found.dtype).float()
    return mine.shape == found.shape and torch.allclose(mine, found.float(), rtol=rounding, atol=1e-12, equal_nan=True)


def _other_schedule(found: Tensor, name: str, stored: Mapping[str, Any], timesteps: int) -> str:
    """One sentence on weights that were trained with another noise schedule, and which one if it is a known one."""
    steps, bar = len(found), stored.get("alphas_cumprod")
    known = [
        (schedule, table) for schedule, (table, _) in BETA_SCHEDULES.items() if steps >= 20 or schedule != "linear"
    ]
    fits = [schedule for schedule, table in known if bar is not None and _same(table(steps), bar)]
    which = f"; theirs is beta_schedule={fits[0]!r}, timesteps={steps}" if fits else f"; theirs has {steps} timesteps"
    return (
        f"these weights were trained with another noise schedule than this one ({timesteps} timesteps, {name}){which}"
    )


def _objectives_of(weight: Tensor, schedule: TableSchedule) -> dict[str, str]:
    """The objectives that today's `loss_weight` can belong to, each with the arguments that give it."""
    level = schedule.level(torch.arange(len(schedule.alpha_bar), dtype=torch.float64))
    snr, fits = (level.alpha / level.sigma) ** 2, {}
    if weight.shape != snr.shape or not weight.is_floating_point():
        return {}
    for name, kind in OBJECTIVES.items():
        clipped = weight.cpu().double() * (kind.determinant(level) / level.sigma) ** 2
        gamma = float(clipped.max())
        if torch.allclose(clipped, snr.clamp(max=gamma), rtol=1e-3):
            unbounded = math.isclose(gamma, float(snr.max()), rel_tol=1e-3)
            bound = f"min_snr_loss_weight=True, min_snr_gamma={gamma:.4g}"
            fits[name] = "min_snr_loss_weight=False" if unbounded else bound
    return fits


def _refuse_wrappers(stored: Mapping[str, Any]) -> None:
    if "model" in stored and not isinstance(stored["model"], Tensor):
        raise UserError("this is a trainer's whole checkpoint; give load_state_dict its 'model' entry")
    if any(name.startswith("ema_model.") for name in stored):
        raise UserError(
            "this is a running average's state; give load_state_dict its entries under 'ema_model.' without that prefix"
        )
