"""Lossy savings: off they change no bit, on they do what their settings say, with every solver, and can be replayed."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sfumato
from sfumato.api import Model
from sfumato.backends.fast import LEVELS, FastSettings, applied, level
from sfumato.backends.fast.caching import cached
from sfumato.backends.fast.merging import destinations, matched, merged
from sfumato.condition import Condition
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.guidance import classifier_free
from sfumato.diffusion.level import NoiseLevel
from sfumato.diffusion.schedule import TableSchedule, linear_alpha_bar
from sfumato.diffusion.solvers.registry import SOLVERS
from sfumato.errors import UserError
from sfumato.networks.unet_2d import UNet2DConfig, UNet2DModel
from sfumato.networks.unet_condition import UNet2DConditionConfig, UNet2DConditionModel
from sfumato.replay import replay
from sfumato.systems import Opened
from sfumato.systems.asked import Asked
from sfumato.systems.latent import Latent
from sfumato.tasks.draw import draw_latents
from sfumato.tasks.edit import Source, edit_latents

from .. import stable, tiny

EVERYTHING = FastSettings(interval=(0.3, 5.0), guidance_every=2, cache_every=3, cache_depth=2, merge=0.5)


@functools.cache
def latent() -> Latent:
    return stable.model("sd1")


@functools.cache
def model() -> Model:
    return Model(Opened(latent(), Path("tiny.safetensors"), "0" * 64), "tiny", device="cpu", dtype="float32")


def told() -> UNet2DConditionModel:
    """A network with transformers at all levels but the innermost, two layers each: nine skips."""
    torch.manual_seed(0)
    config = UNet2DConditionConfig.from_dict(
        {
            "block_out_channels": [16, 32, 32],
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
            "norm_num_groups": 8,
            "attention_head_dim": 2,
            "cross_attention_dim": 6,
        }
    )
    return UNet2DConditionModel(config).eval()


def untold() -> UNet2DModel:
    """A network of resampling residual blocks and attention over pixels."""
    torch.manual_seed(0)
    config = UNet2DConfig.from_dict(
        {
            "block_out_channels": [16, 32, 32],
            "layers_per_block": 2,
            "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"],
            "attention_head_dim": 8,
            "norm_num_groups": 8,
        }
    )
    return UNet2DModel(config).eval()


NETWORKS = {"told": (told, 4, {"context": 5}, 8), "untold": (untold, 3, {}, 8)}
"""Each with its channels, the length of its slots, and how many of its skips can be a depth of the cache."""


def asked(name: str, rows: int, seed: int, side: int = 8) -> tuple[Tensor, dict[str, Tensor]]:
    """An input and slots of a network."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, NETWORKS[name][1], side, side, generator=generator)
    return x, {slot: torch.randn(rows, size, 6, generator=generator) for slot, size in NETWORKS[name][2].items()}


def traces(network: nn.Module) -> list[str]:
    """What is not as in a fresh network: methods of instances and hooks."""
    found = [name for name, part in network.named_modules() if "forward" in part.__dict__]
    return found + [name for name, part in network.named_modules() if part._forward_pre_hooks or part._forward_hooks]


# --- kept features ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_whole_calls_change_no_bit_and_kept_features_of_the_same_input_neither(name: str) -> None:
    network = NETWORKS[name][0]()
    x, slots = asked(name, 2, 0)
    other, _ = asked(name, 2, 1)
    wanted, also = network(x, 9, **slots), network(other, 9, **slots)
    work = []
    for depth in (1, 2, 3, 5, NETWORKS[name][3]):
        with cached(network, every=3, depth=depth) as cache:
            assert torch.equal(network(x, 9, **slots), wanted)
            assert torch.equal(network(x, 9, **slots), wanted)
            with FlopCounterMode(display=False) as counter:
                assert torch.equal(network(x, 9, **slots), wanted)
            assert not torch.equal(shallow := network(other, 9, **slots), also)
            assert not torch.equal(shallow, wanted)
            assert torch.equal(network(other, 9, **slots), also)  # whole again
            assert (cache.whole_calls, cache.shallow_calls) == (3, 2)
        work.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        network(x, 9, **slots)
    work.append(counter.get_total_flops())
    assert work == sorted(work) and len(set(work)) == len(work) and work[0] < 0.3 * work[-1]
    assert torch.equal(network(x, 9, **slots), wanted) and traces(network) == []


@torch.no_grad()
@pytest.mark.parametrize("branches", [2, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_conditional_branch_takes_its_part(name: str, branches: int) -> None:
    network = NETWORKS[name][0]()
    x, slots = asked(name, 2 * branches, 0)
    part = {slot: value[-2:] for slot, value in slots.items()}
    with cached(network, every=4, depth=2) as cache:
        network(x, 9, **slots)
        whole = network(x, 9, **slots)
        assert torch.allclose(network(x[-2:], 9, **part), whole[-2:], atol=1e-5)
        assert torch.allclose(network(x, 9, **slots), whole, atol=1e-5)  # and all of it is still there
        assert (cache.whole_calls, cache.shallow_calls) == (2, 2)


@torch.no_grad()
def test_another_size_type_or_number_begins_anew() -> None:
    network = told()
    with cached(network, every=9, depth=1) as cache:
        for rows, side in ((1, 8), (2, 8), (2, 16), (2, 8)):
            x, slots = asked("told", rows, 0, side)
            network(x, 9, **slots)
        assert (cache.whole_calls, cache.shallow_calls) == (4, 0)
        network.double()
        x, slots = asked("told", 2, 0)
        network(x.double(), 9, context=slots["context"].double())
        assert (cache.whole_calls, cache.shallow_calls) == (5, 0)


@torch.no_grad()
def test_the_network_is_as_it_was_after_an_error() -> None:
    network = told()
    with pytest.raises(RuntimeError, match="stop"), applied(network, replace(EVERYTHING, interval=None)):
        assert traces(network)
        raise RuntimeError("stop")
    assert traces(network) == []


@torch.no_grad()
def test_residuals_are_refused() -> None:
    network = told()
    x, slots = asked("told", 1, 0)
    with cached(network, 2, 1), pytest.raises(UserError, match="residuals"):
        network(x, 9, residuals=(x,), **slots)


# --- merged tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(2, 2), (4, 6), (5, 7), (8, 3)])
def test_every_token_finds_its_own_again(height: int, width: int) -> None:
    x = torch.randn(3, height * width, 5, generator=torch.Generator().manual_seed(0))
    to = destinations(height, width, 4)
    assert len(set(to.tolist())) == len(to) == (height // 2) * (width // 2)
    for count in (0, 1, len(to), height * width - len(to)):
        match = matched(x, to, count)
        merged_ = match.merge(x)
        assert merged_.shape[1] == height * width - count
        back = match.part(merged_)
        alone = match.kept[:, : -len(to)]
        wide = alone[..., None].expand(-1, -1, 5)
        assert torch.equal(back.gather(1, wide), x.gather(1, wide))  # those that joined nobody are untouched
        assert torch.allclose(merged_.sum((0, 1)) if count == 0 else x.sum((0, 1)), x.sum((0, 1)), atol=1e-5)
        assert torch.equal(matched(x[1:2], to, count).merge(x[1:2]), merged_[1:2])  # whoever shares the batch


def test_the_most_alike_are_merged_into_their_mean() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [-1.0, 0.5]])[None]
    match = matched(x, torch.tensor([0]), 1)
    assert match.joined.tolist() == [[2]]
    assert torch.allclose(match.part(match.merge(x))[0, [0, 2]], torch.tensor([[0.95, 0.05]] * 2))


@torch.no_grad()
def test_merging_shortens_the_outermost_self_attentions_alone() -> None:
    network, lengths = told(), dict[str, int]()
    x, slots = asked("told", 2, 0)
    wanted = network(x, 9, **slots)
    for name, part in network.named_modules():
        if name.endswith(("to_q", "to_k")):
            part.register_forward_hook(lambda m, a, out, name=name: lengths.__setitem__(name, out.shape[1]))
    with merged(network, 0.5):
        once, twice = network(x, 9, **slots), network(x, 9, **slots)
    places = ("down_blocks.0", "up_blocks.2")
    outer = {name: n for name, n in lengths.items() if "attn1" in name and name.startswith(places)}
    assert len(outer) == 10 and set(outer.values()) == {32}
    others = {n for name, n in lengths.items() if name not in outer}
    assert others == {64, 16, 4, 5}  # cross-attention, the levels below, the words
    assert not torch.equal(once, wanted) and not torch.equal(once, twice)  # the destinations change from call to call
    with merged(network, 0.5):
        assert torch.equal(network(x, 9, **slots), once)
        assert torch.allclose(network(x[:1], 9, **{k: v[:1] for k, v in slots.items()}), twice[:1], atol=1e-5)


# --- guidance --------------------------------------------------------------------------------------------------------


class Recording(nn.Module):
    """Says its labels, and keeps how many rows it was asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.rows = nn.Parameter(torch.zeros(())), list[int]()

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.rows.append(len(x))
        return labels.to(x)[:, None, None, None] + x


def guided(every: int, interval: tuple[float, float] | None = None) -> tuple[Any, Recording]:
    network = Recording()
    denoiser = Denoiser(network, TableSchedule(linear_alpha_bar()))
    one, none = Condition(labels=torch.tensor([3, 3])), Condition(labels=torch.tensor([1, 1]))
    return classifier_free(denoiser, one, none, 2.0, every=every, interval=interval), network


def test_the_difference_is_kept_between() -> None:
    levels = [NoiseLevel.of(9, 0.6, 0.8)] * 5
    x = torch.zeros(2, 1, 2, 2)
    exact, thrifty = guided(1), guided(3)
    for one in levels:
        assert torch.equal(exact[0](x, one, None).out, thrifty[0](x, one, None).out)  # 1 + 2 (3 - 1) = 3 + (3 - 1)
    assert exact[1].rows == [4] * 5 and thrifty[1].rows == [4, 2, 2, 4, 2]


def test_what_is_kept_is_the_difference_bit_for_bit() -> None:
    """Older pictures are drawn again from it: `c + (w - 1) (c - n)` with the difference of the call before."""
    denoiser = Denoiser(Recording(), TableSchedule(linear_alpha_bar()))
    conditions = [Condition(labels=torch.tensor([0.1 * i, 0.7])) for i in (3, 1)]
    x, at = torch.randn(2, 2, 8, 8, 8, generator=torch.Generator().manual_seed(0)), NoiseLevel.of(9, 0.6, 0.8)
    guided = classifier_free(denoiser, *conditions, 7.3, every=2)
    guided(x[0], at, None)
    with_, without = (denoiser(torch.cat([x[0], x[0]]), at, conditions[0].stacked_on(conditions[1])).out.chunk(2)[i]
                      for i in (1, 0))  # fmt: skip
    after = denoiser(x[1], at, conditions[0]).out
    assert torch.equal(guided(x[1], at, None).out, after + (7.3 - 1) * (with_ - without))


def test_calls_are_counted_within_the_interval_alone() -> None:
    denoise, network = guided(2, (0.5, 2.0))
    for nsr in (9.0, 1.9, 1.0, 3.0, 0.7, 0.6, 0.1):
        alpha = (1 + nsr**2) ** -0.5
        denoise(torch.zeros(2, 1, 2, 2), NoiseLevel.of(5, alpha, alpha * nsr), None)
    assert network.rows == [2, 4, 2, 2, 4, 2, 2]


def test_a_difference_of_another_type_is_not_kept() -> None:
    denoise, network = guided(5)
    x, at = torch.zeros(2, 1, 2, 2), NoiseLevel.of(9, 0.6, 0.8)
    denoise(x, at, None)
    network.double()
    denoise(x, at, None)
    assert network.rows == [4, 4]


# --- drawing ---------------------------------------------------------------------------------------------------------


@contextmanager
def rows_asked(network: nn.Module) -> Iterator[list[int]]:
    """How many rows each call of a network is about."""
    rows: list[int] = []
    handle = network.register_forward_pre_hook(lambda module, arguments: rows.append(len(arguments[0])))
    yield rows
    handle.remove()


@pytest.mark.parametrize("sampler", sorted(SOLVERS))
def test_every_solver(sampler: str) -> None:
    how: dict[str, Any] = {"asked": [Asked(prompt="a heart")], "sampler": sampler, "steps": 4, "guidance": 3.0}
    with rows_asked(latent().denoiser.network) as exact:
        wanted = draw_latents(latent(), seeds=[0], **how)
    with rows_asked(latent().denoiser.network) as thrifty:
        found = draw_latents(latent(), seeds=[0], fast=EVERYTHING, **how)
    assert found.shape == wanted.shape and bool(found.isfinite().all())
    assert not torch.equal(found, wanted) and traces(latent().denoiser.network) == []
    assert set(exact) == {2} and set(thrifty) == {1, 2}


def test_a_picture_does_not_depend_on_its_neighbours() -> None:
    said = [Asked(prompt="a red heart"), Asked(prompt="a fish"), Asked(prompt="a sun")]
    how: dict[str, Any] = {"steps": 5, "guidance": 3.0, "fast": EVERYTHING, "sampler": "euler"}
    together = draw_latents(latent(), seeds=[0, 1, 2], asked=said, **how)
    alone = draw_latents(latent(), seeds=[1], asked=said[1:2], **how)
    assert torch.allclose(together[1], alone[0], atol=1e-3 * float(alone.abs().max()))


def test_edits_save_too() -> None:
    source = Source(torch.zeros(3, 64, 64), strength=0.8)
    how: dict[str, Any] = {"asked": [Asked(prompt="a heart")], "steps": 6, "guidance": 3.0}
    wanted = edit_latents(latent(), source, seeds=[0], **how)
    found = edit_latents(latent(), source, seeds=[0], fast=EVERYTHING, **how)
    assert bool(found.isfinite().all()) and not torch.equal(found, wanted)


# --- the front door --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", LEVELS)
def test_levels_are_recorded_with_their_settings(number: int) -> None:
    picture = model().generate("a heart", seed=1, steps=8, fast=number)[0]
    stored = picture.info["sfumato"]["fast"]
    assert stored.pop("level") == number
    assert FastSettings.restored(stored) == level(number)
    assert model().redraw(picture.info["sfumato"]).tobytes() == picture.tobytes()


@pytest.mark.parametrize("negative", [{}, {"negative": "a fish"}, {"negative": "a fish", "perp_neg": 0.5}], ids=str)
def test_levels_save_more_and_more(negative: dict[str, Any]) -> None:
    work = []
    for fast in (None, *LEVELS):
        with FlopCounterMode(display=False) as counter:
            model().generate("a heart", seed=1, steps=8, fast=fast, **negative)
        work.append(counter.get_total_flops())
    assert all(more > less for more, less in pairwise(work))


def test_without_savings_nothing_is_recorded_and_nothing_changes() -> None:
    first = model().generate("a heart", seed=1, steps=3)[0]
    model().generate("a heart", seed=1, steps=3, fast=2)
    second = model().generate("a heart", seed=1, steps=3)[0]
    assert "fast" not in first.info["sfumato"] and first.tobytes() == second.tobytes()


def test_the_interval_by_hand_wins_over_the_levels() -> None:
    picture = model().generate("a heart", seed=1, steps=6, fast=2, guidance_interval=(0.1, 2.0))[0]
    settings = picture.info["sfumato"]
    assert settings["guidance_interval"] == [0.1, 2.0] and "interval" not in settings["fast"]
    with pytest.raises(UserError, match="given twice"):
        model().generate("a heart", steps=6, fast=EVERYTHING, guidance_interval=(0.1, 2.0))


def test_the_models_own_interval_and_the_savings() -> None:
    """Before a level's, it counts; after one that was asked for by itself, it does not."""
    own = latent().config.model_copy(
        update={"sampling": latent().config.sampling.model_copy(update={"guidance_interval": (0.1, 2.0)})}
    )
    drawing = Model(
        Opened(Latent.load(own, latent().tensors(), what="tiny"), Path("own.safetensors"), "0" * 64), "own",
        device="cpu", dtype="float32",
    )  # fmt: skip
    by_level = drawing.generate("a heart", seed=1, steps=6, fast=2)[0]
    assert by_level.info["sfumato"]["guidance_interval"] == [0.1, 2.0]
    assert "interval" not in by_level.info["sfumato"]["fast"]
    by_hand = drawing.generate("a heart", seed=1, steps=6, fast=EVERYTHING)[0]
    assert "guidance_interval" not in by_hand.info["sfumato"]
    assert by_hand.info["sfumato"]["fast"]["interval"] == [0.3, 5.0]
    assert by_hand.tobytes() == model().generate("a heart", seed=1, steps=6, fast=EVERYTHING)[0].tobytes()


def test_what_of_a_level_does_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    picture = model().generate("a heart", seed=1, steps=6, guidance=1.0, fast=2)[0]
    assert "interval does nothing here: guidance is off" in caplog.text
    assert "interval" not in picture.info["sfumato"]["fast"] and picture.info["sfumato"]["fast"]["cache_every"] > 1


@pytest.mark.parametrize(
    ("fast", "options", "reason"),
    [
        (FastSettings(interval=(0.1, 2.0)), {"guidance": 1.0}, "guidance is off"),
        (2, {"steps": 2, "guidance": 1.0}, "too few steps"),
        (9, {}, "no level 9"),
        (FastSettings(), {}, "leave it out"),
        (FastSettings(interval=(0.0, 1e9)), {}, "every step lies within it"),
        (FastSettings(guidance_every=2), {"guidance": 1.0}, "guidance is off"),
        (FastSettings(cache_every=2, cache_depth=99), {}, "cache_depth must be 1 to"),
        (FastSettings(cache_every=2), {"steps": 2}, "too few steps"),
        (FastSettings(guidance_every=2), {"steps": 1}, "one step only"),
    ],
)
def test_savings_that_do_nothing_are_refused(fast: Any, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        model().generate("a heart", **{"steps": 4, "fast": fast} | options)


def test_impossible_settings_are_refused() -> None:
    for values in (
        {"cache_every": 0}, {"guidance_every": 0}, {"merge": 0.8}, {"merge": -0.1}, {"interval": (2.0, 1.0)},
        {"cache_depth": 2},
    ):  # fmt: skip
        with pytest.raises(UserError):
            FastSettings(**values)  # type: ignore[arg-type]


def test_pixel_models_keep_features_and_cannot_merge(tmp_path: Path) -> None:
    opened = sfumato.load(tiny.write_tiny_model(tmp_path / "m.safetensors"))
    picture = opened.generate(seed=3, steps=4, label="dog", guidance=2.0, fast=FastSettings(cache_every=2))[0]
    assert opened.redraw(picture.info["sfumato"]).tobytes() == picture.tobytes()
    with pytest.raises(UserError, match="transformers"):
        opened.generate(steps=4, fast=FastSettings(merge=0.5))
    with pytest.raises(UserError, match="guidance is off"):
        opened.generate(steps=4, fast=FastSettings(guidance_every=2))


def test_a_replay_from_the_file_has_the_same_bytes(tmp_path: Path) -> None:
    path = tiny.write_tiny_model(tmp_path / "m.safetensors")
    target = tmp_path / "one.png"
    options = ("--label", "dog", "--guidance", 2, "--steps", 5, "--seed", 3, "--fast", 2)
    tiny.succeed("generate", "--model", path, *options, "--out", target)
    result = replay(target, path)
    assert result.differences == []
    from PIL import Image

    with Image.open(target) as first:
        assert first.tobytes() == result.picture.tobytes()
    assert tiny.run("generate", "--model", path, "--fast", 7, "--out", tmp_path / "x.png").code == 2
