"""Changing pictures: what must not change does not, every size comes back, and what is not possible is said."""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from sfumato.api import Model
from sfumato.errors import UserError
from sfumato.systems import Opened
from sfumato.systems.asked import Asked
from sfumato.systems.codec import CodecConfig
from sfumato.systems.latent import Latent, LatentConfig
from sfumato.tasks.draw import draw_latents, slerp
from sfumato.tasks.edit import Source, composited, edit, edit_latents, enlarged, extended

from .. import tiny
from ..parity import stable_cases

SIDES = range(64, 201)


OURS: dict[str, dict[str, Any]] = {
    "latent": {},
    "latent-inpaint": {"hole": {"kind": "masked", "latents": 4}},
    "ldm-inpaint": {"hole": {"kind": "masked", "latents": 4, "order": "mask-last"}},
}
"""Models of our own recipes over a small codec, and one in the layout of latent diffusion's first."""


@functools.cache
def latent(name: str = "sd1") -> Latent:
    if name not in OURS:
        return stable_cases.case(name).new_model("ddim")
    stage = {
        "block_out_channels": [8, 8, 8], "down_block_types": ["DownEncoderBlock2D"] * 3, "norm_num_groups": 4,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
    }  # fmt: skip
    network = {
        "block_out_channels": [8, 16], "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2,
        "norm_num_groups": 4, "layers_per_block": 1,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Latent.create(
            LatentConfig(size=64, codec=CodecConfig(kind="kl", size=64, network=stage), conditions=OURS[name],
                         network=network)
        )  # fmt: skip
    for one in made.networks().values():
        one.eval()
    return made


@functools.cache
def model(name: str = "sd1") -> Model:
    """A tiny model behind the front door."""
    return Model(Opened(latent(name), Path("tiny.safetensors"), "0" * 64), "tiny", device="cpu", dtype="float32")


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of noise, so that any pixel that is touched shows."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def array(image: Image.Image) -> Any:
    return np.asarray(image).astype(int)


def random_mask(dice: random.Random, width: int, height: int) -> Image.Image:
    """Rectangles, ellipses, single pixels and lines; some with grey borders, some inside out, never empty."""
    mask = Image.new("L", (width, height), 0)
    pen = ImageDraw.Draw(mask)
    for _ in range(dice.randint(1, 4)):
        x, y = sorted(dice.sample(range(width), 2)), sorted(dice.sample(range(height), 2))
        shade = 255 if dice.random() < 0.7 else dice.randint(1, 254)
        kind = dice.choice([pen.rectangle, pen.ellipse, pen.line])
        kind((x[0], y[0], x[1], y[1]), fill=shade)
    mask.putpixel((dice.randrange(width), dice.randrange(height)), 255)
    if dice.random() < 0.3:
        mask = mask.point(lambda value: 255 - value)
        mask.putpixel((0, 0), 255)
    return mask


# --- outside the mask ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(50))
def test_pixels_outside_the_mask_do_not_change(number: int) -> None:
    """50 masks x sizes x strengths, with ordinary models and with those made for it: the largest difference is 0."""
    dice = random.Random(number)
    width, height = dice.choice(SIDES), dice.choice(SIDES)
    name = ("sd1", "sd1-inpainting", "sd2-v", "sd2-inpainting", *OURS)[number % 7]
    picture, mask = photo(width, height, number), random_mask(dice, width, height)
    strength = dice.choice([None, 1.0, 0.9, 0.5, 0.34])
    words: dict[str, Any] = {} if name in OURS else {"prompt": "a hat", "guidance": 2.0}
    (found,) = model(name).edit(picture, mask=mask, strength=strength, seed=number, steps=3, **words)
    assert found.size == picture.size and found.mode == "RGB"
    outside = np.asarray(mask) == 0
    apart = np.abs(array(found) - array(picture)).max(axis=2)
    assert not outside.any() or apart[outside].max() == 0
    assert apart[np.asarray(mask) == 255].max() > 0


def test_inside_is_what_was_drawn_and_grey_mixes() -> None:
    drawn, original = torch.full((2, 3, 1, 5), 200, dtype=torch.uint8), torch.full((3, 1, 5), 100, dtype=torch.uint8)
    mask = torch.tensor([[0.0, 1.0, 0.5, 1e-6, 0.25]])
    assert composited(drawn, original, mask)[1, 0, 0].tolist() == [100, 200, 150, 100, 125]
    assert composited(drawn, original, torch.zeros(1, 5)).eq(original).all()


def test_a_batch_keeps_what_is_outside_in_every_picture() -> None:
    picture, mask = photo(70, 90), Image.new("L", (70, 90))
    mask.paste(255, (10, 20, 50, 60))
    found = model().edit(picture, ["a hat", "a dog"], count=2, mask=mask, seed=3, steps=2)
    outside = np.asarray(mask) == 0
    assert len(found) == 4 and all((array(one) == array(picture))[outside].all() for one in found)
    assert len({one.tobytes() for one in found}) == 4


def test_a_box_is_a_mask() -> None:
    picture, mask = photo(80, 72), Image.new("L", (80, 72))
    mask.paste(255, (8, 16, 40, 56))
    options: dict[str, Any] = {"seed": 1, "steps": 2}
    (by_mask,) = model().edit(picture, "a hat", mask=mask, **options)
    (by_box,) = model().edit(picture, "a hat", box=(8, 16, 32, 40), **options)
    assert by_mask.tobytes() == by_box.tobytes()


@pytest.mark.parametrize("sides", [(10, 0, 0, 0), (0, 7, 0, 33), (8, 8, 8, 8), (1, 0, 2, 0)])
def test_outpainting_keeps_the_picture(sides: tuple[int, int, int, int]) -> None:
    picture = photo(75, 66)
    left, top, right, bottom = sides
    for name in ("sd1", "sd2-inpainting"):
        (found,) = model(name).edit(picture, "a hat", outpaint=sides, seed=1, steps=2)
        assert found.size == (75 + left + right, 66 + top + bottom)
        assert found.crop((left, top, left + 75, top + 66)).tobytes() == picture.tobytes()


def test_room_around_a_picture() -> None:
    picture = torch.arange(12.0).view(3, 2, 2)
    larger, mask = extended(picture, 1, 0, 2, 1)
    assert larger.shape == (3, 3, 5) and mask.tolist() == [[1, 0, 0, 1, 1], [1, 0, 0, 1, 1], [1, 1, 1, 1, 1]]
    assert torch.equal(larger[:, :2, 1:3], picture) and torch.equal(larger[:, 0, 0], picture[:, 0, 0])
    for sides in ((0, 0, 0, 0), (-1, 0, 0, 5)):
        with pytest.raises(UserError, match="outpainting adds pixels"):
            extended(picture, *sides)


def test_a_thin_line_is_redrawn() -> None:
    """A mask of one pixel changes the latent it lies in, and that pixel alone."""
    picture, mask = photo(64, 64), Image.new("L", (64, 64))
    mask.putpixel((13, 22), 255)
    (found,) = model().edit(picture, "a hat", mask=mask, seed=1, steps=2)
    changed = np.argwhere(np.abs(array(found) - array(picture)).max(axis=2))
    assert changed.tolist() == [[22, 13]]


# --- sizes -----------------------------------------------------------------------------------------------------------

PAIRS = [tuple(random.Random(9 + i).choices(SIDES, k=2)) for i in range(50)]
QUICK: dict[str, Any] = {"seed": 1, "steps": 2, "sampler": "ddim"}


def drawn_size(width: int, height: int) -> tuple[int, int]:
    (found,) = model().generate(width=width, height=height, **QUICK)
    return found.size


def edited_size(width: int, height: int) -> tuple[int, int]:
    (found,) = model().edit(photo(width, height), strength=1.0, **QUICK)
    return found.size


@pytest.mark.parametrize("side", SIDES)
def test_every_width_and_height_is_drawn(side: int) -> None:
    assert drawn_size(side, 64) == (side, 64) and drawn_size(64, side) == (64, side)


@pytest.mark.parametrize(
    "side", [pytest.param(side, marks=() if side % 8 in (0, 7) else pytest.mark.slow) for side in SIDES]
)
def test_every_width_and_height_is_edited(side: int) -> None:
    assert edited_size(side, 64) == (side, 64) and edited_size(64, side) == (64, side)


@pytest.mark.parametrize("size", PAIRS, ids=str)
def test_pairs_of_sizes(size: tuple[int, int]) -> None:
    assert drawn_size(*size) == size and edited_size(*size) == size


def test_what_is_cropped_away_is_not_missed() -> None:
    """A size that needs no padding draws what the larger grid holds; one that does, its upper left corner."""
    whole, cut = (model().generate("a hat", width=width, height=64, **QUICK)[0] for width in (80, 77))
    assert whole.crop((0, 0, 77, 64)).tobytes() == cut.tobytes()


def test_small_pictures_are_enlarged_by_four() -> None:
    picture = photo(19, 16)
    (found,) = model("sd-x4-upscaler").edit(picture, "a hat", seed=1, steps=2)
    assert found.size == (76, 64)


# --- what an edit begins with ----------------------------------------------------------------------------------------


def source(**changes: Any) -> Source:
    return replace(Source(2 * stable_cases.picture(64, 64) - 1), **changes)


def changed(strength: float) -> float:
    """How far the latents are from those of the picture."""
    own = latent()
    drawn = edit_latents(own, source(strength=strength), seeds=[0], asked=[Asked("a hat")], steps=10)
    return float((drawn - own.encode(source().picture[None]).mean).abs().mean())


def test_strength_is_how_much_is_forgotten() -> None:
    assert changed(0.1) < changed(0.5) < changed(1.0)


@pytest.mark.parametrize(("strength", "steps"), [(0.04, 1), (0.1, 1), (0.5, 5), (0.59, 5), (0.6, 6), (1.0, 10)])
def test_strength_takes_its_part_of_the_steps(strength: float, steps: int) -> None:
    seen: list[Any] = []

    def count(x: Tensor, level: Any, prediction: Any, noise: Any) -> Tensor:
        seen.append(prediction)
        return x

    edit_latents(latent(), source(strength=strength), seeds=[0], steps=10, on_step=count)
    assert len([one for one in seen if one is not None]) == steps


def test_a_mask_and_strength_1_forget_what_was_inside() -> None:
    """Another picture inside the mask makes no difference to a model that is shown masked pictures."""
    mask = stable_cases.mask(64, 64)
    options: dict[str, Any] = {"seeds": [4], "asked": [Asked("a hat")], "steps": 3}
    other = torch.where(mask.bool(), torch.ones(3, 64, 64), source().picture)
    own = latent("sd2-inpainting")
    a = edit_latents(own, source(mask=mask, strength=1.0), **options)
    b = edit_latents(own, source(mask=mask, strength=1.0, picture=other), **options)
    assert torch.equal(a, b)
    assert not torch.equal(a, edit_latents(own, source(mask=mask, strength=1.0, picture=-other), **options))


def test_depths_count_by_their_order_and_not_their_unit() -> None:
    depth, options = stable_cases.depth(64, 64), {"seeds": [1], "asked": [Asked("a hat")], "steps": 3}
    own = latent("sd2-depth")
    near, scaled, turned = (edit_latents(own, source(depth=one), **options) for one in (depth, 3 * depth + 7, -depth))
    torch.testing.assert_close(near, scaled, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(near, turned, rtol=1e-2, atol=1e-2)


def test_noise_on_the_small_picture_counts() -> None:
    own, small = latent("sd-x4-upscaler"), Source(2 * stable_cases.picture(16, 16) - 1)
    options: dict[str, Any] = {"seeds": [1], "asked": [Asked("a hat")], "steps": 2}
    found = [edit_latents(own, replace(small, noise_level=level), **options) for level in (0, 20, 49)]
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
    for level in (50, 999, 2000, 10**30, -1):
        with pytest.raises(UserError, match=rf"noise from 0 to 49, got noise level {level}$"):
            edit_latents(own, replace(small, noise_level=level), **options)


@pytest.mark.parametrize("name", ["sd1", "sd1-inpainting"])
@pytest.mark.parametrize("masked", [True, False])
def test_a_picture_is_the_same_whoever_shares_its_batch(name: str, masked: bool) -> None:
    given = source(mask=stable_cases.mask(64, 64) if masked else None, strength=0.7)
    options: dict[str, Any] = {"steps": 4, "sampler": "euler_ancestral", "guidance": 2.0}
    asked = [Asked("a hat"), Asked("a dog")]
    both = edit(latent(name), given, seeds=[7, 8], asked=asked, **options)
    alone = edit(latent(name), given, seeds=[8], asked=asked[1:], **options)
    torch.testing.assert_close(both[1:], alone, rtol=1e-5, atol=1e-5)
    assert not torch.equal(both[0], both[1])


# --- again -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("sd1", {"strength": 0.6}),
        ("sd1", {"box": (8, 8, 30, 40)}),
        ("sd1-inpainting", {"box": (8, 8, 30, 40), "strength": 0.8}),
        ("sd1", {"outpaint": (9, 0, 0, 16)}),
        ("sd2-v", {"upscale": 1.5, "strength": 0.5}),
        ("sd2-depth", {"depth": True}),
        ("sd-x4-upscaler", {"noise_level": 5}),
        ("sd1-inpainting", {"box": (8, 8, 30, 40), "perp_neg": 0.5}),
        ("sd2-depth", {"depth": True, "perp_neg": 0.5}),
        ("sd-x4-upscaler", {"perp_neg": 1}),
    ],
)
def test_an_edit_is_drawn_again_from_its_settings(name: str, given: dict[str, Any], tmp_path: Path) -> None:
    """The same bytes, from the picture where it was, and from where it is now; another picture is refused."""
    photo(40 if name.startswith("sd-x4") else 72, 40 if name.startswith("sd-x4") else 64).save(tmp_path / "p.png")
    if "depth" in given:
        Image.fromarray(stable_cases.depth(72, 64).numpy().astype(np.uint8)).save(tmp_path / "d.png")
        given = given | {"depth": tmp_path / "d.png"}
    asked = {"seed": 3, "count": 2, "steps": 3, "sampler": "euler_ancestral", "negative": "grey"}
    found = model(name).edit(tmp_path / "p.png", "a (red:1.2) hat", **given, **asked)
    for one in found:
        assert model(name).redraw(one.info["sfumato"]).tobytes() == one.tobytes()
    (tmp_path / "p.png").rename(tmp_path / "moved.png")
    with pytest.raises(UserError, match=r"p\.png"):
        model(name).redraw(found[0].info["sfumato"])
    again = model(name).redraw(found[0].info["sfumato"], {"picture": tmp_path / "moved.png"})
    assert again.tobytes() == found[0].tobytes()
    photo(72, 64, seed=5).save(tmp_path / "other.png")
    with pytest.raises(UserError, match="another picture"):
        model(name).redraw(found[0].info["sfumato"], {"picture": tmp_path / "other.png"})


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"clip_skip": 1, "dialect": "comfy"},
        {"negative": "a fish, " * 40, "perp_neg": 0.5, "clip_skip": 1},
        {"variation": 9, "variation_strength": 0.3},
        {"towards": "a blue fish"},
        {"towards_seed": 8},
        {"hires": 1.5, "hires_strength": 0.6},
        {"width": 70, "height": 90, "guidance_rescale": 0.5},
    ],
)
def test_a_picture_is_drawn_again_from_its_settings(given: dict[str, Any]) -> None:
    found = model().generate("a (red:1.2) hat", count=3, seed=3, steps=3, sampler="euler_ancestral", **given)
    for one in found:
        assert model().redraw(one.info["sfumato"]).tobytes() == one.tobytes()
    assert len({one.tobytes() for one in found}) == 3


def test_the_command_replays_an_edit(tmp_path: Path) -> None:
    from sfumato.systems.stable_diffusion import write_single_file

    write_single_file(latent(), tmp_path / "m.safetensors")
    photo(72, 64).save(tmp_path / "p.png")
    options = ("--model", tmp_path / "m.safetensors", "--steps", 2, "--seed", 4, "--box", "8,8,24,24")
    tiny.succeed("edit", tmp_path / "p.png", "a hat", *options, "--out", tmp_path / "one.png")
    before = (tmp_path / "one.png").read_bytes()
    tiny.succeed("replay", tmp_path / "one.png", "--model", tmp_path / "m.safetensors", "--out", tmp_path / "two.png")
    assert Image.open(tmp_path / "two.png").tobytes() == Image.open(tmp_path / "one.png").tobytes()
    assert (tmp_path / "one.png").read_bytes() == before


# --- mixtures --------------------------------------------------------------------------------------------------------


def test_noise_between_two_noises_keeps_its_spread() -> None:
    a, b = (torch.randn(4, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.allclose(slerp(a, b, 0.0), a, atol=1e-6) and torch.allclose(slerp(a, b, 1.0), b, atol=1e-6)
    assert all(abs(float(slerp(a, b, share / 10).std()) - 1) < 0.02 for share in range(11))
    assert float(torch.lerp(a, b, 0.5).std()) < 0.75
    assert torch.equal(slerp(a, a, 0.3), a) or torch.allclose(slerp(a, a, 0.3), a)


def test_variations_lead_from_one_seed_to_the_other() -> None:
    options: dict[str, Any] = {"steps": 2, "size": (64, 64)}
    ends = [draw_latents(latent(), seeds=[seed], asked=[Asked("a hat")], **options) for seed in (5, 6)]
    ways = [
        draw_latents(latent(), seeds=[5], asked=[Asked("a hat", variation=6, strength=share)], **options)
        for share in (0.0, 0.5, 1.0)
    ]
    torch.testing.assert_close(ways[0], ends[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ways[2], ends[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ways[1], ends[0], atol=0.1)


def test_a_walk_begins_and_ends_at_its_prompts_and_seeds() -> None:
    options: dict[str, Any] = {"steps": 2, "guidance": 2.0}
    walk = model().generate("a hat", towards="a blue fish", count=4, seed=5, **options)
    ends = [model().generate(text, seed=5, **options)[0] for text in ("a hat", "a blue fish")]
    assert all(np.abs(array(a) - array(b)).max() <= 1 for a, b in zip((walk[0], walk[-1]), ends, strict=True))
    walk = model().generate("a hat", towards_seed=9, count=3, seed=5, **options)
    ends = [model().generate("a hat", seed=seed, **options)[0] for seed in (5, 9)]
    assert all(np.abs(array(a) - array(b)).max() <= 1 for a, b in zip((walk[0], walk[-1]), ends, strict=True))


def test_enlarging_keeps_the_range_and_the_mean() -> None:
    small = (2 * stable_cases.picture(16, 24) - 1)[None]
    large = enlarged(small, 48, 72)
    assert large.shape == (1, 3, 72, 48) and float(large.abs().max()) <= 1
    assert torch.allclose(large.mean((2, 3)), small.mean((2, 3)), atol=0.03)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("sd1", {"strength": 0.0}, "strength must be above 0"),
        ("sd1", {"strength": 1.01}, "strength must be above 0"),
        ("sd1", {"strength": float("nan")}, "strength must be above 0"),
        ("sd1", {"mask": torch.zeros(64, 64)}, "the mask is empty.*transparency is not read"),
        ("sd1", {"mask": torch.full((64, 64), 1.5)}, r"a mask lies in \[0, 1\]"),
        ("sd1", {"mask": torch.full((64, 64), float("nan"))}, r"a mask lies in \[0, 1\]"),
        ("sd1", {"mask": torch.ones(64, 32)}, "the mask is 32 x 64 pixels, the picture 64 x 64"),
        ("sd1", {"depth": torch.ones(64, 64)}, "does not follow depths"),
        ("sd2-depth", {}, "needs the picture's map of depths"),
        ("sd2-depth", {"depth": torch.ones(8, 8)}, "the depth is 8 x 8 pixels"),
        ("sd-x4-upscaler", {"mask": torch.ones(64, 64)}, "enlarges whole pictures"),
        ("sd1", {"picture": torch.zeros(1, 64, 64)}, "other channels"),
        ("sd1", {"picture": torch.zeros(64, 64)}, "a picture is"),
    ],
)
def test_sources_that_cannot_be(name: str, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        edit_latents(latent(name), source(**changes), seeds=[0], steps=1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("sd1", {"mask": Image.new("L", (9, 9), 255)}, "the mask is 9 x 9 pixels, the picture 72 x 64"),
        ("sd1", {"box": (60, 0, 20, 10)}, "does not lie within the picture"),
        ("sd1", {"box": (0, 0, 0, 10)}, "does not lie within the picture"),
        ("sd1", {"box": (0, 0, 9, 9), "outpaint": (1, 1, 1, 1)}, "give one of them"),
        ("sd1", {"noise_level": 3}, "models that enlarge"),
        ("sd2-depth", {}, "map of depths"),
        ("sd-x4-upscaler", {"strength": 0.5}, "does not forget"),
        ("sd-x4-upscaler", {"upscale": 3}, "enlarges by 4"),
        ("sd1", {"clip_skip": 3}, "skip must be a whole number from 0 to 2"),
        ("sd1", {"dialect": "comfyui"}, "did you mean 'comfy'"),
        ("sd1", {"prompt": "a <lora:hat:1>"}, "LoRA is not supported"),
        ("sd1", {"negative": "a AND b"}, "AND, which is not supported"),
    ],
)
def test_edits_that_cannot_be(name: str, given: dict[str, Any], says: str) -> None:
    def never(x: Tensor, level: Any, prediction: Any, noise: Any) -> Tensor:
        raise AssertionError("something was drawn")

    with pytest.raises(UserError, match=says) as error:
        model(name).edit(photo(72, 64), **{"prompt": "a hat", "steps": 2, "seed": 0, "on_step": never, **given})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["sd2-depth", "sd-x4-upscaler"])
def test_models_that_need_a_picture_draw_none_without(name: str) -> None:
    with pytest.raises(UserError, match="`sfumato edit` takes one"):
        model(name).generate("a hat", steps=1, seed=0)


@pytest.mark.parametrize("missing", ["nowhere.png", "text.png"])
def test_pictures_that_cannot_be_read(missing: str, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    for place in ("picture", "mask", "depth"):
        given = {"picture": photo(64, 64)} | {place: tmp_path / missing}
        with pytest.raises(UserError, match=missing):
            model("sd2-depth").edit(**given, prompt="a hat", steps=1)
