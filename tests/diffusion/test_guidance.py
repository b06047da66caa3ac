"""Denoisers and guidance: exact where it is off, linear in its scale, the same batched or not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfumato.condition import Condition
from sfumato.diffusion.analytic import GaussianData
from sfumato.diffusion.denoiser import TIME_1000, Denoiser, Prediction, edm_preconditioning
from sfumato.diffusion.guidance import cfg_plus_plus, classifier_free, clip_x0, dynamic_threshold, perp_neg, unguided
from sfumato.diffusion.level import CLEAN, NoiseLevel
from sfumato.diffusion.parameterization import Parameterization, V
from sfumato.diffusion.sample import sample
from sfumato.diffusion.solvers import Euler
from sfumato.errors import UserError
from sfumato.random import NoiseSource

from .diffusion_cases import PARAMETERIZATIONS, SCHEDULES

LINEAR = SCHEDULES["linear"]
LEVEL = LINEAR.level(400)


class TinyNet(nn.Module):
    """A small conv net with random weights that hears the time, a class label, a vector and tokens."""

    def __init__(self, inputs: int = 3, outputs: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(inputs, 8, 3, padding=1), nn.Conv2d(8, outputs, 3, padding=1)
        self.labels, self.vector = nn.Embedding(5, 8), nn.Linear(4, 8)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) * 0.3
        self.calls: list[dict[str, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, **slots: Tensor) -> Tensor:
        self.calls.append({"x": x.detach(), "t": t, **slots})
        h = self.conv1(x) + torch.sin(t / 100).to(x)[:, None, None, None]
        if "labels" in slots:
            h = h + self.labels(slots["labels"])[..., None, None]
        if "vector" in slots:
            h = h + self.vector(slots["vector"])[..., None, None]
        if "context" in slots:
            h = h + slots["context"].mean((1, 2))[:, None, None, None]
        return self.conv2(torch.tanh(h))


def pictures(batch: int = 2, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randn((batch, channels, 6, 6), generator=torch.Generator().manual_seed(seed))


def conditions(batch: int = 2) -> tuple[Condition, Condition]:
    return Condition(labels=torch.arange(batch)), Condition(labels=torch.full((batch,), 4))


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def denoiser() -> Denoiser:
    return Denoiser(TinyNet(), LINEAR).eval()


def same(a: Prediction, b: Prediction, atol: float = 0.0) -> bool:
    return all(torch.allclose(getattr(a, n), getattr(b, n), rtol=0, atol=atol) for n in ("x0", "eps", "out"))


# --- the denoiser ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PARAMETERIZATIONS.values(), ids=PARAMETERIZATIONS.keys())
def test_a_prediction_solves_its_output(kind: Parameterization) -> None:
    denoiser, x = Denoiser(TinyNet(), LINEAR, kind), pictures()
    p = denoiser(x, LEVEL)
    x0, eps = kind.solve(p.out, x, LEVEL)
    assert torch.equal(p.x0, x0) and torch.equal(p.eps, eps) and p.var_frac is None and p.grad is None
    assert torch.equal(p.out, denoiser.network(x, torch.full((2,), 400.0)))


def test_a_level_per_picture_is_that_picture_s(denoiser: Denoiser) -> None:
    x, times = pictures(3), torch.tensor([10.0, 400.0, 900.0])
    together = denoiser(x, LINEAR.level(times))
    for i, t in enumerate(times):
        alone = denoiser(x[i : i + 1], LINEAR.level(t))
        assert torch.allclose(together.x0[i], alone.x0[0], rtol=1e-5, atol=1e-5)


def test_the_border_casts_to_the_network_and_back() -> None:
    denoiser, x = Denoiser(TinyNet().to(torch.bfloat16), LINEAR), pictures()
    p = denoiser(x, LEVEL, Condition(vector=torch.zeros(2, 4)))
    call = denoiser.network.calls[-1]
    assert call["x"].dtype == call["vector"].dtype == torch.bfloat16 and call["t"].dtype == torch.float32
    assert p.x0.dtype == p.out.dtype == torch.float32


def test_preconditioning_scales_the_input_and_the_time_only() -> None:
    x, flow = pictures(), SCHEDULES["flow"]
    level = flow.level(0.25)
    told = Denoiser(TinyNet(), flow, V, preconditioning=TIME_1000)
    told(x, level)
    assert told.network.calls[-1]["t"].tolist() == [250, 250]
    scaled = Denoiser(TinyNet(), flow, V, preconditioning=edm_preconditioning(0.5))
    p = scaled(x, level)
    assert torch.allclose(scaled.network.calls[-1]["x"], x * float(1 / (0.25**2 + (0.75 * 0.5) ** 2) ** 0.5))
    assert torch.allclose(level.noise(p.x0, p.eps), x, atol=1e-5)


def test_what_goes_before_and_after_the_picture_on_channels() -> None:
    """Self-conditioning puts the previous estimate first (zeros when there is none), `concat` comes last."""
    x, extra = pictures(), torch.full((2, 1, 6, 6), 7.0)
    denoiser = Denoiser(TinyNet(inputs=7), LINEAR, self_condition=True)
    denoiser(x, LEVEL, Condition(concat=extra))
    seen = denoiser.network.calls[-1]["x"]
    assert torch.equal(seen, torch.cat([torch.zeros_like(x), x, extra], dim=1))
    denoiser(x, LEVEL, Condition(concat=extra), 2 * x)
    assert torch.equal(denoiser.network.calls[-1]["x"][:, :3], 2 * x)


def test_learned_variance_is_the_second_half_of_the_channels() -> None:
    denoiser, x = Denoiser(TinyNet(outputs=6), LINEAR, learned_variance=True), pictures()
    p = denoiser(x, LEVEL)
    raw = denoiser.network(x, torch.full((2,), 400.0))
    assert torch.equal(p.out, raw[:, :3]) and torch.equal(p.var_frac, (raw[:, 3:] + 1) / 2)


def test_a_gradient_shifts_both_estimates_along_the_path(denoiser: Denoiser) -> None:
    x = pictures()
    p = denoiser(x, LEVEL)
    assert p.shifted(LEVEL) is p
    pushed = Prediction(p.x0, p.eps, p.out, grad=torch.ones_like(x)).shifted(LEVEL)
    assert pushed.grad is None
    assert torch.allclose(pushed.eps, p.eps - float(LEVEL.sigma))
    assert torch.allclose(LEVEL.noise(pushed.x0, pushed.eps), x, atol=1e-5)


# --- classifier-free guidance ----------------------------------------------------------------------------------------


def test_scale_one_is_off_bit_for_bit(denoiser: Denoiser) -> None:
    condition, null = conditions()
    x = pictures()
    plain, guided = unguided(denoiser, condition), classifier_free(denoiser, condition, null, 1.0, rescale=0.7)
    before = len(denoiser.network.calls)
    assert same(guided(x, LEVEL, None), plain(x, LEVEL, None))
    assert len(denoiser.network.calls) - before == 2  # the null branch is not evaluated


@pytest.mark.parametrize("level", [LEVEL, LINEAR.level(torch.tensor([400.0, 100.0]))], ids=["shared", "per picture"])
@pytest.mark.parametrize("scale", [0.0, 3.0, 7.5])
def test_batched_is_unbatched(denoiser: Denoiser, level: NoiseLevel, scale: float) -> None:
    x, previous = pictures(), pictures(seed=1)
    for options in ({}, {"rescale": 0.5}, {"channels": 2}):
        one, two = (classifier_free(denoiser, *conditions(), scale, batched=b, **options) for b in (True, False))
        a, b = one(x, level, previous), two(x, level, previous)
        assert float((a.out - b.out).abs().max()) <= 1e-6 * max(1.0, scale)
        assert float((a.eps - b.eps).abs().max()) <= 1e-6 * max(1.0, scale)


def test_batched_puts_the_null_first(denoiser: Denoiser) -> None:
    classifier_free(denoiser, *conditions(), 3.0)(pictures(), LEVEL, None)
    assert denoiser.network.calls[-1]["labels"].tolist() == [4, 4, 0, 1]


@pytest.mark.parametrize("batched", [True, False])
def test_guidance_is_linear_in_its_scale(denoiser: Denoiser, batched: bool) -> None:
    """`out`, and with it x0 and eps, moves along one line: null at 0, conditional at 1."""
    x, (condition, null) = pictures(), conditions()
    at = {s: classifier_free(denoiser, condition, null, s, batched=batched)(x, LEVEL, None) for s in (0.0, 1.0, 4.0)}
    assert same(at[0.0], unguided(denoiser, null)(x, LEVEL, None), atol=1e-6)
    for name in ("out", "eps", "x0"):
        null_, cond, far = (getattr(at[s], name) for s in (0.0, 1.0, 4.0))
        assert torch.allclose(far, null_ + 4 * (cond - null_), atol=2e-5)


def test_only_within_the_interval(denoiser: Denoiser) -> None:
    x, (condition, null) = pictures(), conditions()
    everywhere = classifier_free(denoiser, condition, null, 3.0)
    nsr = float(LEVEL.nsr)
    inside = classifier_free(denoiser, condition, null, 3.0, interval=(nsr * 0.9, nsr * 1.1))
    assert same(inside(x, LEVEL, None), everywhere(x, LEVEL, None))
    for t in (300, 500):
        assert same(inside(x, LINEAR.level(t), None), unguided(denoiser, condition)(x, LINEAR.level(t), None))


def test_each_picture_by_its_own_level_within_the_interval(denoiser: Denoiser) -> None:
    """A batch whose levels lie on both sides of the interval's end is what its pictures are alone."""
    x, (condition, null), times = pictures(), conditions(), (300, 700)
    levels, end = LINEAR.level(torch.tensor(times)), float(LINEAR.level(500).nsr)
    for options in ({}, {"rescale": 0.7}, {"channels": 1}, {"batched": False}):
        guided = classifier_free(denoiser, condition, null, 3.0, interval=(0.0, end), **options)  # type: ignore[arg-type]
        together = guided(x, levels, None)
        for i, t in enumerate(times):
            alone = guided(x, LINEAR.level(t), None)
            for name in ("x0", "eps", "out"):
                assert torch.allclose(getattr(together, name)[i], getattr(alone, name)[i], rtol=0, atol=2e-5)


def test_rescale_pulls_the_spread_back(denoiser: Denoiser) -> None:
    """Lin 2023, eq. 15-16: at phi = 1 each picture's output has the conditional one's standard deviation."""
    x, (condition, null) = pictures(), conditions()
    conditional = unguided(denoiser, condition)(x, LEVEL, None).out
    plain = classifier_free(denoiser, condition, null, 8.0)(x, LEVEL, None).out
    full = classifier_free(denoiser, condition, null, 8.0, rescale=1.0)(x, LEVEL, None)
    half = classifier_free(denoiser, condition, null, 8.0, rescale=0.5)(x, LEVEL, None).out
    dims = (1, 2, 3)
    assert torch.allclose(full.out.std(dims), conditional.std(dims), rtol=1e-5)
    assert torch.allclose(half, (full.out + plain) / 2, atol=1e-5)
    assert torch.allclose(LEVEL.noise(full.x0, full.eps), x, atol=1e-5)


def test_only_the_first_channels(denoiser: Denoiser) -> None:
    x, (condition, null) = pictures(), conditions()
    guided = classifier_free(denoiser, condition, null, 3.0)(x, LEVEL, None).out
    plain = unguided(denoiser, condition)(x, LEVEL, None).out
    part = classifier_free(denoiser, condition, null, 3.0, channels=2)(x, LEVEL, None).out
    assert torch.equal(part[:, :2], guided[:, :2])
    assert torch.allclose(part[:, 2:], plain[:, 2:], atol=1e-6)


def test_the_learned_variance_is_the_conditional_one() -> None:
    denoiser = Denoiser(TinyNet(outputs=6), LINEAR, learned_variance=True)
    x, (condition, null) = pictures(), conditions()
    wanted = denoiser(x, LEVEL, condition).var_frac
    for batched in (True, False):
        found = classifier_free(denoiser, condition, null, 3.0, batched=batched)(x, LEVEL, None).var_frac
        assert torch.allclose(found, wanted, atol=1e-6)


def test_the_previous_estimate_reaches_both_branches() -> None:
    denoiser = Denoiser(TinyNet(inputs=6), LINEAR, self_condition=True)
    x, previous = pictures(), pictures(seed=1)
    classifier_free(denoiser, *conditions(), 3.0)(x, LEVEL, previous)
    assert torch.equal(denoiser.network.calls[-1]["x"][:, :3], torch.cat([previous, previous]))


def test_mismatched_conditions_are_refused(denoiser: Denoiser) -> None:
    guided = classifier_free(denoiser, conditions()[0], Condition(), 3.0)
    with pytest.raises(ValueError, match="only one fills 'labels'"):
        guided(pictures(), LEVEL, None)


# --- Perp-Neg --------------------------------------------------------------------------------------------------------


def negatives(batch: int = 2) -> Condition:
    return Condition(labels=torch.full((batch,), 3))


@pytest.mark.parametrize("level", [LEVEL, LINEAR.level(torch.tensor([400.0, 100.0]))], ids=["shared", "per picture"])
@pytest.mark.parametrize("weight", [0.5, 1.0, 3.0])
def test_perp_neg_is_its_definition(denoiser: Denoiser, level: NoiseLevel, weight: float) -> None:
    """Armandpour 2023, picture by picture, batched and unbatched; the null comes first, the condition last."""
    x, (condition, null) = pictures(), conditions()
    without, with_, unwanted = (unguided(denoiser, c)(x, level, None).out for c in (null, condition, negatives()))
    towards, away = with_ - without, unwanted - without
    across = [n - (n * d).sum() / (d * d).sum() * d for n, d in zip(away, towards, strict=True)]
    wanted = without + 4 * (towards - weight * torch.stack(across))
    assert all(abs(float((a * d).sum())) < 1e-5 * float(d.norm()) for a, d in zip(across, towards, strict=True))
    for batched in (True, False):
        found = perp_neg(denoiser, condition, null, negatives(), 4.0, weight, batched=batched)(x, level, None)
        assert torch.allclose(found.out, wanted, atol=2e-5)
        assert torch.allclose(level.noise(found.x0, found.eps), x, atol=1e-4)
        calls = [call["labels"].tolist() for call in denoiser.network.calls[-3:]]
        assert calls[-1] == [4, 4, 3, 3, 0, 1] if batched else calls == [[4, 4], [3, 3], [0, 1]]


def test_perp_neg_without_anything_to_lead_away_from_is_plain_guidance(denoiser: Denoiser) -> None:
    """A weight of 0, a negative that is the null, and one that is the wanted condition itself."""
    x, (condition, null) = pictures(), conditions()
    plain = classifier_free(denoiser, condition, null, 4.0)(x, LEVEL, None)
    for negative, weight in ((negatives(), 0.0), (null, 1.0), (condition, 1.0)):
        assert same(perp_neg(denoiser, condition, null, negative, 4.0, weight)(x, LEVEL, None), plain, atol=2e-5)


def test_perp_neg_leads_away_from_all_of_the_negative_where_nothing_is_wanted(denoiser: Denoiser) -> None:
    x, (_, null) = pictures(), conditions()
    found = perp_neg(denoiser, null, null, negatives(), 4.0, 0.5, batched=False)(x, LEVEL, None).out
    without, unwanted = (unguided(denoiser, c)(x, LEVEL, None).out for c in (null, negatives()))
    assert torch.allclose(found, without - 2 * (unwanted - without), atol=2e-5)


@pytest.mark.parametrize("options", [{"rescale": 0.5}, {"interval": (0.01, 0.2)}, {"every": 2}], ids=str)
def test_perp_neg_takes_what_guidance_takes(denoiser: Denoiser, options: dict[str, Any]) -> None:
    """As `classifier_free` does of the same output: of a negative that is the null."""
    x, (condition, null) = pictures(), conditions()
    plain, perpendicular = (
        classifier_free(denoiser, condition, null, 4.0, **options),
        perp_neg(denoiser, condition, null, null, 4.0, **options),
    )
    for t in (400, 380, 100):
        assert same(plain(x, LINEAR.level(t), None), perpendicular(x, LINEAR.level(t), None), atol=1e-4)


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_weights_of_perp_neg_that_mean_nothing_are_refused(denoiser: Denoiser, weight: float) -> None:
    with pytest.raises(UserError, match="finite number of at least 0"):
        perp_neg(denoiser, *conditions(), negatives(), 4.0, weight)


# --- CFG++ -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0])
def test_cfg_plus_plus_guides_x0_and_keeps_the_null_s_noise(denoiser: Denoiser, scale: float, batched: bool) -> None:
    """Chung 2024, algorithm 2: `x0` from `eps_null + lambda (eps_cond - eps_null)`, renoised with `eps_null`."""
    x, (condition, null) = pictures(), conditions()
    without, with_ = (unguided(denoiser, c)(x, LEVEL, None) for c in (null, condition))
    found = cfg_plus_plus(denoiser, condition, null, scale, batched=batched)(x, LEVEL, None)
    guided = without.eps + scale * (with_.eps - without.eps)
    assert torch.allclose(found.x0, (x - float(LEVEL.sigma) * guided) / float(LEVEL.alpha), atol=1e-5)
    assert torch.allclose(found.eps, without.eps, atol=1e-6)


def test_cfg_plus_plus_at_zero_is_the_null_and_never_off(denoiser: Denoiser) -> None:
    x, (condition, null) = pictures(), conditions()
    none, full = (cfg_plus_plus(denoiser, condition, null, s)(x, LEVEL, None) for s in (0.0, 1.0))
    assert same(none, unguided(denoiser, null)(x, LEVEL, None), atol=1e-6)
    plain = unguided(denoiser, condition)(x, LEVEL, None)
    assert torch.allclose(full.x0, plain.x0, atol=1e-5) and not torch.allclose(full.eps, plain.eps, atol=1e-3)


def test_a_ddim_step_of_cfg_plus_plus_is_plain_guidance_of_a_scale_that_grows_with_the_step(denoiser: Denoiser) -> None:
    """The same point as plain guidance of `w = lambda a' s / (a' s - s' a)` (Chung 2024, section 3)."""
    x, (condition, null), nxt = pictures(), conditions(), LINEAR.level(300)
    noise = NoiseSource([0, 1], (3, 6, 6))
    up = float(nxt.alpha * LEVEL.sigma)
    scale = 0.5 * up / (up - float(nxt.sigma * LEVEL.alpha))
    ends = [
        sample(denoise, Euler(), x, [LEVEL, nxt], LINEAR, noise=noise)
        for denoise in (
            cfg_plus_plus(denoiser, condition, null, 0.5),
            classifier_free(denoiser, condition, null, scale),
        )
    ]
    assert torch.allclose(*ends, atol=2e-5)


def test_cfg_plus_plus_keeps_the_conditional_variance_and_refuses_other_scales() -> None:
    denoiser = Denoiser(TinyNet(outputs=6), LINEAR, learned_variance=True)
    x, (condition, null) = pictures(), conditions()
    found = cfg_plus_plus(denoiser, condition, null, 0.4)(x, LEVEL, None).var_frac
    assert torch.allclose(found, denoiser(x, LEVEL, condition).var_frac, atol=1e-6)
    for scale in (-0.1, 7.5):
        with pytest.raises(UserError, match=r"scale in \[0, 1\]"):
            cfg_plus_plus(denoiser, condition, null, scale)


# --- clipping --------------------------------------------------------------------------------------------------------

FAR = GaussianData(mean=torch.full((3, 4, 4), 2.5), variance=0.5)


@pytest.mark.parametrize("rederive", [True, False])
def test_clipping(rederive: bool) -> None:
    x = pictures(channels=3)[..., :4, :4]
    raw, clipped = FAR(x, LEVEL), clip_x0(FAR, -0.5, 1.0, rederive_eps=rederive)(x, LEVEL, None)
    assert torch.equal(clipped.x0, raw.x0.clamp(-0.5, 1.0)) and torch.equal(clipped.out, raw.out)
    assert torch.equal(clipped.eps, raw.eps) is not rederive
    if rederive:
        assert torch.allclose(LEVEL.noise(clipped.x0, clipped.eps), x, atol=1e-6)


def test_clipping_what_is_inside_changes_nothing() -> None:
    data, x = GaussianData(mean=torch.zeros(3), variance=0.01), torch.zeros(2, 3)
    assert same(clip_x0(data)(x, LEVEL, None), data(x, LEVEL), atol=1e-6)


def test_clipping_at_a_clean_level_keeps_eps() -> None:
    x = torch.full((1, 3, 4, 4), 2.0)
    clipped = clip_x0(FAR)(x, CLEAN, None)
    assert torch.equal(clipped.x0, torch.ones_like(x)) and torch.equal(clipped.eps, torch.zeros_like(x))


@pytest.mark.parametrize("rederive", [True, False])
def test_dynamic_threshold(rederive: bool) -> None:
    """Saharia 2022, section 2.3: per picture, `clamp(x0, -s, s) / s` with s the quantile of |x0|, at least 1."""
    x = torch.stack([torch.linspace(-4, 4, 48), torch.linspace(-0.1, 0.1, 48)]).reshape(2, 3, 4, 4)
    data = GaussianData(mean=torch.zeros(3, 4, 4), variance=4.0)
    raw = data(x, LEVEL)
    found = dynamic_threshold(data, 0.9, rederive_eps=rederive)(x, LEVEL, None)
    s = torch.quantile(raw.x0[0].abs().flatten(), 0.9)
    assert float(s) > 1
    assert torch.allclose(found.x0[0], raw.x0[0].clamp(-s, s) / s, atol=1e-6)
    assert torch.allclose(found.x0[1], raw.x0[1], atol=1e-6)  # well inside: untouched
    assert float(found.x0.abs().max()) <= 1 + 1e-6
    if rederive:
        assert torch.allclose(LEVEL.noise(found.x0, found.eps), x, atol=1e-5)
    else:
        assert torch.equal(found.eps, raw.eps)


def test_dynamic_threshold_at_quantile_one_only_scales() -> None:
    x = torch.linspace(-4, 4, 48).reshape(1, 3, 4, 4)
    data = GaussianData(mean=torch.zeros(3, 4, 4), variance=4.0)
    raw, found = data(x, LEVEL).x0, dynamic_threshold(data, 1.0, maximum=0.8)(x, LEVEL, None).x0
    assert torch.allclose(found, raw * (0.8 / raw.abs().max()), atol=1e-6)


def test_guidance_composes(denoiser: Denoiser) -> None:
    condition, null = conditions()
    inner = classifier_free(denoiser, condition, null, 5.0)
    x = pictures()
    found = clip_x0(inner)(x, LEVEL, None)
    assert torch.equal(found.x0, inner(x, LEVEL, None).x0.clamp(-1, 1))


# --- conditions ------------------------------------------------------------------------------------------------------


def test_conditions_hand_over_only_what_is_filled() -> None:
    tokens = torch.ones(2, 3, 4)
    c = Condition(context=tokens, concat=torch.ones(2, 1, 6, 6), adapters={"image": tokens}, residuals=(tokens,))
    assert set(c.for_network()) == {"context", "adapters", "residuals"}
    assert Condition().for_network() == {}


def test_conditions_move_and_cast_floats_only() -> None:
    c = Condition(labels=torch.ones(2, dtype=torch.int64), context=torch.ones(2, 3, 4), residuals=(torch.ones(1),))
    c = c.to(torch.device("cpu"), torch.float64)
    assert c.labels.dtype == torch.int64 and c.context.dtype == torch.float64 and c.residuals[0].dtype == torch.float64


def test_conditions_stack_slot_by_slot() -> None:
    one, two = torch.ones(1, 2), torch.full((1, 2), 2.0)
    a, b = (Condition(vector=v, residuals=(v, v), adapters={"image": v}) for v in (two, one))
    c = a.stacked_on(b)
    for found in (c.vector, c.residuals[1], c.adapters["image"]):
        assert found.tolist() == [[1, 1], [2, 2]]
    with pytest.raises(ValueError, match="same entries in 'adapters'"):
        a.stacked_on(Condition(vector=one, residuals=(one, one), adapters={"other": one}))


def test_settings_that_mean_nothing_are_refused() -> None:
    denoiser = Denoiser(nn.Identity(), SCHEDULES["linear"])
    with pytest.raises(UserError, match="rising"):
        classifier_free(denoiser, Condition(), Condition(), 2.0, interval=(5, 1))
    with pytest.raises(UserError, match="every >= 1"):
        classifier_free(denoiser, Condition(), Condition(), 2.0, every=0)
    for quantile, maximum in ((2.0, 1.0), (0.0, 1.0), (0.9, 0.0)):
        with pytest.raises(ValueError, match="quantile"):
            dynamic_threshold(unguided(denoiser), quantile, maximum)
