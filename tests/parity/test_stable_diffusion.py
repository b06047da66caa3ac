"""Stable Diffusion against diffusers' own pipelines: final latents within 1e-5 in float32, pictures within one level.

Both run the same random weights. How far two correct programs may drift apart on them is measured by
`test_the_comparison_means_something`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.checkpoints.formats.families import FAMILIES, Family
from sfumato.images import to_pil
from sfumato.systems import open_as
from sfumato.systems.asked import Asked
from sfumato.systems.exchange import save_folder
from sfumato.systems.latent import Latent
from sfumato.systems.stable_diffusion import open_single_file, parts_of, write_single_file
from sfumato.tasks.draw import draw, draw_latents
from sfumato.tasks.edit import Source, edit, edit_latents

from . import stable_cases as cases

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:Passing `image` as torch tensor", "ignore::FutureWarning")

STEPS, GUIDANCE, SEED = 10, 7.5, 11
PROMPT, NEGATIVE = "a photo of a red hat, and a small dog", "blurry, text"
SAMPLERS = ("ddim", "euler", "dpmpp_2m")
SIZES = ((64, 64), (96, 64))
ASKED = Asked(PROMPT, NEGATIVE)
SAID = {"prompt": PROMPT, "negative_prompt": NEGATIVE}
TOLERANCE = 1e-5


def off(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape and torch.isfinite(theirs).all()
    return float((ours - theirs).abs().max() / theirs.abs().max())


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def levels(pictures: Tensor) -> Tensor:
    """Pictures in [-1, 1] as whole levels, (B, H, W, 3)."""
    return torch.stack([torch.tensor(list(one.tobytes())).view(one.height, one.width, -1) for one in to_pil(pictures)])


def their_levels(pipeline: Any, latents: Tensor) -> Tensor:
    """What diffusers makes of final latents."""
    decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    found = pipeline.image_processor.postprocess(decoded, output_type="np")
    return torch.from_numpy((found * 255).round()).to(torch.uint8)


def check(model: Latent, pipeline: Any, ours: Tensor, theirs: Tensor) -> None:
    """Latents, and pictures after rounding."""
    assert off(ours, theirs) <= TOLERANCE
    drawn, expected = levels(model.pictures(ours)).int(), their_levels(pipeline, theirs).int()
    assert (drawn - expected).abs().max() <= 1
    assert expected.float().std() > 10  # a picture, and no flat field


def their_run(pipeline: Any, **options: Any) -> Tensor:
    settings: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent"}
    options = {"generator": generators([SEED])} | SAID | options
    return pipeline(**(settings | options)).images  # type: ignore[no-any-return]


def our_draw(model: Latent, size: tuple[int, int], **options: Any) -> Tensor:
    options = {"seeds": [SEED], "asked": [ASKED]} | options
    return draw_latents(model, steps=STEPS, guidance=GUIDANCE, size=size, **options)


def our_edit(model: Latent, source: Source, **options: Any) -> Tensor:
    options = {"seeds": [SEED], "asked": [ASKED]} | options
    return edit_latents(model, source, steps=STEPS, guidance=GUIDANCE, **options)


def product(*names: str, strengths: Sequence[float] = (1.0,)) -> list[Any]:
    """Families x samplers x sizes x strengths; each sampler, size and strength of a family is in the fast tests."""
    found = []
    for name, sampler, size, strength in itertools.product(names, SAMPLERS, SIZES, strengths):
        place = SAMPLERS.index(sampler), SIZES.index(size), strengths.index(strength)
        quick = place in [(0, 0, 0), (1, 1, len(strengths) - 1), (2, 0, len(strengths) - 1)]
        label = f"{name} {sampler} {size[0]}x{size[1]} {strength}"
        marks = () if quick else (pytest.mark.slow,)
        found.append(pytest.param(name, sampler, size, strength, marks=marks, id=label))
    return found


# --- what the model reads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd1", "sd2-v"])
@pytest.mark.parametrize("skip", [None, 1, 2])
def test_states_of_prompts(name: str, skip: int | None) -> None:
    """Padding as each version has it; skipped layers on both sides, where diffusers skips on the prompt's alone."""
    case = cases.case(name)
    condition, null = case.model("ddim").conditions([Asked(PROMPT, NEGATIVE, dialect="plain", clip_skip=skip)])
    pipeline = case.pipeline("text", "ddim")
    positive, _ = pipeline.encode_prompt(PROMPT, "cpu", 1, False, clip_skip=skip)
    negative, _ = pipeline.encode_prompt(NEGATIVE, "cpu", 1, False, clip_skip=skip)
    assert off(condition.context, positive) <= 1e-6 and off(null.context, negative) <= 1e-6
    assert off(positive, negative) > 0.1


def test_an_empty_negative_is_the_empty_text() -> None:
    case = cases.case("sd2-base")
    _, null = case.model("ddim").conditions([Asked(PROMPT)])
    _, negative = case.pipeline("text", "ddim").encode_prompt(PROMPT, "cpu", 1, True)
    assert off(null.context, negative) <= 1e-6


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "sampler", "size", "strength"), product("sd1", "sd2-base", "sd2-v"))
def test_text_to_picture(name: str, sampler: str, size: tuple[int, int], strength: float) -> None:
    case = cases.case(name)
    model, pipeline = case.model(sampler), case.pipeline("text", sampler)
    theirs = their_run(pipeline, width=size[0], height=size[1])
    check(model, pipeline, our_draw(model, size), theirs)


@pytest.mark.parametrize(
    ("name", "sampler", "size", "strength"), product("sd1", "sd2-base", "sd2-v", strengths=(0.6, 1.0))
)
def test_picture_to_picture(name: str, sampler: str, size: tuple[int, int], strength: float) -> None:
    case, picture = cases.case(name), cases.picture(*size)
    model, pipeline = case.model(sampler), case.pipeline("picture", sampler)
    theirs = their_run(pipeline, image=picture[None], strength=strength)
    check(model, pipeline, our_edit(model, Source(2 * picture - 1, strength=strength)), theirs)


@pytest.mark.parametrize(
    ("name", "sampler", "size", "strength"),
    product("sd1", "sd2-base", "sd2-v", "sd1-inpainting", "sd2-inpainting", strengths=(0.6, 1.0)),
)
def test_inpainting(name: str, sampler: str, size: tuple[int, int], strength: float) -> None:
    """With the networks that are made for it, and with ordinary ones."""
    case, picture, mask = cases.case(name), cases.picture(*size), cases.mask(*size)
    model, pipeline = case.model(sampler), case.pipeline("inpaint", sampler)
    shown = {"image": picture[None], "mask_image": mask[None, None], "width": size[0], "height": size[1]}
    theirs = their_run(pipeline, strength=strength, **shown)
    check(model, pipeline, our_edit(model, Source(2 * picture - 1, mask=mask, strength=strength)), theirs)


@pytest.mark.parametrize(("name", "sampler", "size", "strength"), product("sd2-depth", strengths=(0.6, 1.0)))
def test_depth(name: str, sampler: str, size: tuple[int, int], strength: float) -> None:
    case, picture, depth = cases.case(name), cases.picture(*size), cases.depth(*size)
    model, pipeline = case.model(sampler), case.pipeline("depth", sampler)
    theirs = their_run(pipeline, image=picture[None], depth_map=depth[None], strength=strength)
    check(model, pipeline, our_edit(model, Source(2 * picture - 1, depth=depth, strength=strength)), theirs)


@pytest.mark.parametrize(("sampler", "size"), [("ddim", (16, 16)), ("euler", (32, 16)), ("dpmpp_2m", (16, 16))])
def test_upscaling(sampler: str, size: tuple[int, int]) -> None:
    """Four times the size, with the noise of step 20 on the small picture."""
    case, picture = cases.case("sd-x4-upscaler"), cases.picture(*size)
    model, pipeline = case.model(sampler), case.pipeline("upscale", sampler)
    theirs = their_run(pipeline, image=picture[None], noise_level=20)
    check(model, pipeline, our_edit(model, Source(2 * picture - 1, noise_level=20)), theirs)


def test_a_mask_that_cuts_latents() -> None:
    """A latent is redrawn where any of its pixels is; diffusers looks at the first alone and gets the whole ones."""
    size = SIZES[1]
    case, picture, cut = cases.case("sd1"), cases.picture(*size), cases.mask(*size, aligned=False)
    model, pipeline = case.model("ddim"), case.pipeline("inpaint", "ddim")
    shown = {"image": picture[None], "mask_image": cases.mask(*size)[None, None], "width": size[0], "height": size[1]}
    theirs = their_run(pipeline, strength=1.0, **shown)
    check(model, pipeline, our_edit(model, Source(2 * picture - 1, mask=cut, strength=1.0)), theirs)


@pytest.mark.parametrize(
    "sampler", ["plms", "euler a", "euler linspace", "euler trailing", "dpmpp_2m karras", "ddim trailing"]
)
def test_other_samplers_and_spacings(sampler: str) -> None:
    """Each from text, and from a picture but for PLMS, whose first step stands twice in diffusers' list."""
    case, picture = cases.case("sd1"), cases.picture(64, 64)
    model, pipeline = case.model(sampler), case.pipeline("text", sampler)
    check(model, pipeline, our_draw(model, (64, 64)), their_run(pipeline, width=64, height=64))
    if sampler == "plms":
        return
    theirs = their_run(case.pipeline("picture", sampler), image=picture[None], strength=0.6)
    check(model, pipeline, our_edit(model, Source(2 * picture - 1, strength=0.6)), theirs)


@pytest.mark.parametrize(
    ("task", "sampler"),
    [("text", "euler a"), ("picture", "euler a"), ("inpaint", "euler a"), ("inpaint with nine channels", "euler a")],
)
def test_a_batch_is_a_list_of_generators(task: str, sampler: str) -> None:
    """Three prompts with seeds of their own, mostly by a sampler that draws noise at every step."""
    seeds, prompts = [5, 6, 90], ["a red hat", "a dog that is asleep", ""]
    case = cases.case("sd1-inpainting" if task.endswith("channels") else "sd1")
    model, pipeline = case.model(sampler), case.pipeline(task.split()[0], sampler)
    size, asked = SIZES[1], [Asked(prompt, NEGATIVE) for prompt in prompts]
    picture, mask = cases.picture(*size), cases.mask(*size)
    options: dict[str, Any] = {"prompt": prompts, "negative_prompt": [NEGATIVE] * 3, "generator": generators(seeds)}
    if task == "text":
        ours, more = our_draw(model, size, seeds=seeds, asked=asked), {"width": size[0], "height": size[1]}
    else:
        masked = None if task == "picture" else mask
        source = Source(2 * picture - 1, mask=masked, strength=0.6)
        ours = our_edit(model, source, seeds=seeds, asked=asked)
        more = {"image": picture.expand(3, -1, -1, -1), "strength": 0.6}
        if masked is not None:
            more |= {"mask_image": mask.expand(3, 1, -1, -1), "width": size[0], "height": size[1]}
    theirs = their_run(pipeline, **options, **more)
    assert off(ours, theirs) <= TOLERANCE
    for i, seed in enumerate(seeds):
        alone = our_draw(model, size, seeds=[seed], asked=asked[i : i + 1]) if task == "text" else our_edit(
            model, source, seeds=[seed], asked=asked[i : i + 1]
        )  # fmt: skip
        assert off(ours[i : i + 1], alone) <= 2e-6


def test_the_last_pictures_are_those_of_the_pipelines() -> None:
    """From a prompt to whole levels, with nothing of ours in between on their side, and nothing of theirs on ours."""
    case, picture = cases.case("sd2-v"), cases.picture(96, 64)
    model = case.model("dpmpp_2m")
    theirs = their_run(case.pipeline("text", "dpmpp_2m"), width=96, height=64, output_type="pil")
    options: dict[str, Any] = {"seeds": [SEED], "asked": [ASKED], "steps": STEPS, "guidance": GUIDANCE}
    ours = to_pil(draw(model, size=(96, 64), **options))
    assert apart(ours[0], theirs[0]) <= 1
    theirs = their_run(case.pipeline("picture", "dpmpp_2m"), image=picture[None], strength=0.6, output_type="pil")
    ours = to_pil(edit(model, Source(2 * picture - 1, strength=0.6), **options))
    assert apart(ours[0], theirs[0]) <= 1


def apart(a: Any, b: Any) -> int:
    """The largest difference of two pictures in levels."""
    assert a.size == b.size
    return max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True))


def test_skipped_layers_draw_what_their_states_say() -> None:
    """diffusers skips no layers of the negative prompt, so it is given the states of both."""
    case = cases.case("sd1")
    model, pipeline = case.model("euler"), case.pipeline("text", "euler")
    states = [pipeline.encode_prompt(text, "cpu", 1, False, clip_skip=1)[0] for text in (PROMPT, NEGATIVE)]
    given = {"prompt": None, "negative_prompt": None, "prompt_embeds": states[0], "negative_prompt_embeds": states[1]}
    theirs = their_run(pipeline, width=64, height=64, **given)
    skipped = our_draw(model, (64, 64), asked=[replace(ASKED, clip_skip=1, dialect="plain")])
    assert off(skipped, theirs) <= TOLERANCE
    assert off(our_draw(model, (64, 64)), theirs) > 1e-3


def test_the_comparison_means_something() -> None:
    """A change of the start by 1e-6 stays small; another word, seed, negative or guidance changes what is drawn."""
    model = cases.case("sd1").model("ddim")
    reference = our_draw(model, (64, 64))

    def nudged(x: Tensor, level: Any, prediction: Any, noise: Any) -> Tensor:
        return x if prediction is not None else x + 1e-6 * torch.randn(x.shape, generator=generators([0])[0])

    assert 0 < off(our_draw(model, (64, 64), on_step=nudged), reference) < TOLERANCE
    for changed in (
        our_draw(model, (64, 64), asked=[Asked(PROMPT + " on a mat", NEGATIVE)]),
        our_draw(model, (64, 64), asked=[Asked(PROMPT)]),
        our_draw(model, (64, 64), seeds=[SEED + 1]),
        draw_latents(model, seeds=[SEED], asked=[ASKED], steps=STEPS, guidance=7.0, size=(64, 64)),
    ):
        assert off(changed, reference) > 100 * TOLERANCE


# --- from every kind of file ------------------------------------------------------------------------------------------


def picture_of(model: Latent) -> Tensor:
    """A small run of whatever kind of model it is."""
    picture = cases.picture(64, 64)
    options: dict[str, Any] = {"seeds": [SEED], "asked": [ASKED], "steps": 3, "guidance": GUIDANCE}
    source = Source(2 * picture - 1, strength=1.0)
    if "masked" in model.shown:
        return edit_latents(model, replace(source, mask=cases.mask(64, 64)), **options)
    if "depth" in model.shown:
        return edit_latents(model, replace(source, depth=cases.depth(64, 64)), **options)
    if model.shown:
        return edit_latents(model, Source(2 * cases.picture(16, 16) - 1), **options)
    return draw_latents(model, size=(64, 64), **options)


def same_weights(a: Latent, b: Latent) -> bool:
    x, y = a.tensors(), b.tensors()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


@pytest.mark.parametrize("name", cases.NAMES)
def test_the_same_picture_from_every_kind_of_file(name: str, tmp_path: Path) -> None:
    """Written as a file and as a folder, and each turned into the other."""
    model = cases.case(name).model("ddim")
    expected = picture_of(model)
    write_single_file(model, tmp_path / "m.safetensors")
    save_folder(model, tmp_path / "folder")
    file, folder = open_as(Latent, tmp_path / "m.safetensors"), open_as(Latent, tmp_path / "folder")
    save_folder(file, tmp_path / "from file")
    write_single_file(folder, tmp_path / "from folder.safetensors")
    turned = open_as(Latent, tmp_path / "from folder.safetensors"), open_as(Latent, tmp_path / "from file")
    for found in (file, folder, *turned):
        assert same_weights(found, model)
        assert torch.equal(picture_of(found), expected)
    assert (tmp_path / "from folder.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "kind"), [("sd1", "text"), ("sd2-v", "text"), ("sd2-inpainting", "inpaint"), ("sd2-depth", "depth")]
)
def test_folders_of_diffusers(name: str, kind: str, tmp_path: Path) -> None:
    """A folder that diffusers wrote draws as the pipeline that wrote it; ours opens there and draws the same."""
    import diffusers

    case = cases.case(name)
    pipeline = case.pipeline(kind, "ddim")
    pipeline.save_pretrained(tmp_path / "theirs")
    model = open_as(Latent, tmp_path / "theirs")
    assert same_weights(model, case.model("ddim"))
    assert torch.equal(picture_of(model), picture_of(case.model("ddim")))
    save_folder(model, tmp_path / "ours")
    none = dict.fromkeys(("depth_estimator", "feature_extractor")) if kind == "depth" else {}  # which it insists on
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours", local_files_only=True, **none)
    again.set_progress_bar_config(disable=True)
    assert type(again) is type(pipeline)
    picture = cases.picture(64, 64)
    shown: dict[str, Any] = {"image": picture[None], "strength": 1.0} if kind != "text" else {}
    if kind == "inpaint":
        shown["mask_image"] = cases.mask(64, 64)[None, None]
    if kind == "depth":
        shown["depth_map"] = cases.depth(64, 64)[None]
    size = {"width": 64, "height": 64} if kind != "depth" else {}
    theirs = their_run(again, num_inference_steps=3, **size, **shown)
    assert off(picture_of(model), theirs) <= TOLERANCE


def test_a_file_of_half_precision(tmp_path: Path) -> None:
    """The same rounding whichever way it came."""
    model = cases.case("sd2-base").model("ddim")
    write_single_file(model, tmp_path / "half.safetensors", dtype=torch.float16)
    file = open_single_file(tmp_path / "half.safetensors").system
    assert isinstance(file, Latent)
    stored = open_single_file(tmp_path / "half.safetensors", dtype=None).system
    assert {t.dtype for t in stored.tensors().values()} == {torch.float16}
    for name, tensor in file.tensors().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, model.tensors()[name].half().float())


# --- the published sizes ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["sd1", "sd2-base", "sd2-v"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Family, Latent]]:
    """A model of the published size from one file in half precision, with random weights."""
    from sfumato.checkpoints.formats.single_file import write

    family = replace(FAMILIES[request.param], scheduler=cases.scheduler_fields(FAMILIES[request.param], "ddim"))
    path = tmp_path_factory.mktemp("whole") / "model.safetensors"
    write(path, family, cases.weights(family, dtype=torch.float16))
    opened = open_single_file(path)
    assert isinstance(opened.system, Latent) and opened.file.dropped == ()
    yield family, opened.system
    path.unlink()


@pytest.fixture(scope="module")
def theirs_whole(whole: tuple[Family, Latent]) -> dict[str, Any]:
    """diffusers' networks over the very same memory; the text tower has its own."""
    family, model = whole
    return cases.their_networks(family, parts_of(model))


@pytest.mark.slow
@torch.no_grad()
def test_the_whole_unet(whole: tuple[Family, Latent], theirs_whole: dict[str, Any]) -> None:
    family, model = whole
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 16, 24, generator=generator)
    context = torch.randn(2, 77, family.text.hidden_size, generator=generator)
    expected = theirs_whole["unet"](x, torch.tensor(321), encoder_hidden_states=context).sample
    found = model.denoiser.network(x, torch.tensor(321.0), context=context)
    assert off(found, expected) <= TOLERANCE


@pytest.mark.slow
@torch.no_grad()
def test_the_whole_autoencoder(whole: tuple[Family, Latent], theirs_whole: dict[str, Any]) -> None:
    _, model = whole
    vae, picture = theirs_whole["vae"], 2 * cases.picture(128, 192)[None] - 1
    posterior, moments = vae.encode(picture).latent_dist, model.encode(picture)
    assert off(moments.mean, posterior.mean * vae.config.scaling_factor) <= TOLERANCE
    assert moments.std is not None and off(moments.std, posterior.std * vae.config.scaling_factor) <= TOLERANCE
    z = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(2))
    assert off(model.pictures(z), vae.decode(z / vae.config.scaling_factor).sample) <= TOLERANCE


@pytest.mark.slow
@torch.no_grad()
def test_the_whole_text_tower(whole: tuple[Family, Latent], theirs_whole: dict[str, Any]) -> None:
    family, model = whole
    condition, null = model.conditions([Asked(PROMPT, NEGATIVE, dialect="plain")])
    tokens = cases.their_tokenizer(family)([PROMPT, NEGATIVE], padding="max_length", max_length=77, return_tensors="pt")
    expected = theirs_whole["text_encoder"](tokens.input_ids)[0]
    assert off(torch.cat([condition.context, null.context]), expected) <= TOLERANCE


@pytest.mark.slow
def test_a_whole_run(whole: tuple[Family, Latent], theirs_whole: dict[str, Any]) -> None:
    import diffusers

    family, model = whole
    scheduler = diffusers.DDIMScheduler.from_config(family.scheduler)
    pipeline = cases.pipeline(family, "text", scheduler, theirs_whole)
    theirs = their_run(pipeline, width=128, height=64, num_inference_steps=2)
    ours = draw_latents(model, seeds=[SEED], asked=[ASKED], steps=2, guidance=GUIDANCE, size=(128, 64))
    check(model, pipeline, ours, theirs)
