"""The front door: open a model, draw pictures.

>>> import sfumato
>>> model = sfumato.load("ddpm-emoji32")
>>> picture = model.generate(count=1, seed=3, steps=2)[0]
>>> picture.size, picture.info["sfumato"]["seed"]
((32, 32), 3)
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sfumato import __version__, models
from sfumato.backends import convolutions, registry
from sfumato.backends import offload as offloading
from sfumato.backends.attention import chosen, using
from sfumato.backends.devices import choose_device, free_host_bytes, native_bfloat16
from sfumato.backends.fast import FastSettings, level
from sfumato.checkpoints.formats import diffusers
from sfumato.checkpoints.formats.families import Prediction, family_named
from sfumato.checkpoints.io import HALVES
from sfumato.codecs.preview import LatentPreview
from sfumato.conditioners.semantic import ClassMap
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.hooks import Hook, keep
from sfumato.diffusion.solvers import SOLVERS, Solver, find
from sfumato.errors import ModelFileError, UserError, nearest, raise_unknown
from sfumato.images import PictureError, to_pil, with_settings
from sfumato.networks.attention import KERNELS, Kernel, attention_kernel, sdpa
from sfumato.systems import Drawing, Opened, fingerprint, open_system
from sfumato.systems.asked import Asked, check_types
from sfumato.systems.config import DTYPES, dtype_name
from sfumato.systems.convert import OWN, save
from sfumato.systems.ddpm import DDPM
from sfumato.systems.latent import Latent
from sfumato.systems.stable_diffusion import config_of, refuse_missing
from sfumato.tasks.draw import (
    LOG,
    Guidance,
    choose_schedule,
    choose_solver,
    choose_steps,
    draw,
    guided_less,
    ignores_learned_variance,
    planned,
)
from sfumato.tasks.edit import Source, composited, edit, enlarged, gone, last_levels, scale_of
from sfumato.tasks.fast import fitted
from sfumato.tasks.original import Given, Original, Values, layout_given, map_restored
from sfumato.training import state
from sfumato.training.first_stage import codec_file

WEIGHTS = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
TILES = ("auto", "always", "never")

# stored where on
_SOMETIMES = (
    "guidance_rescale", "guidance_interval", "perp_neg", "edit", "hires", "opening", "tiled", "fast", "backend",
)  # fmt: skip
_BATCH = 16  # pictures drawn together; each picture's noise is its own, so this changes nothing but memory
_BATCH_PIXELS = 2**20  # … and at most so many pixels, but always one picture
_LARGE = 2**28  # bytes of weights from which a model computes in bfloat16 where the machine does so natively


class Model:
    """An opened model, ready to draw.

    Attributes:
        system: what it is made of (config and denoiser).
        name: for people: the box's name, or the file's.
        sha256: of its weights' file.
        device: where the networks compute.
        dtype: of the networks ("float32", "bfloat16", "float16"); pictures and solvers stay in float32.
        notes: what a user should know of how it was opened, each in one sentence.
        opening: the options of opening that change what it draws; stored with every picture.
        tiles: whether the codec works in tiles: auto (where memory is short), always, never.
        kernel: of attention, by name; auto for the fastest here, by a short measurement.
        backend: who computes the networks: torch, compile or openvino.
        convolution: how torch computes 3x3 convolutions (`backends.convolutions.ALGORITHMS`).
        offload: which weights rest in the CPU's memory until they are needed (`backends.offload.WAYS`).
    """

    def __init__(
        self,
        opened: Opened,
        name: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        tiles: str = "auto",
        kernel: str = "auto",
        backend: str = "auto",
        convolution: str = "auto",
        offload: str = "auto",
    ) -> None:
        if not isinstance(opened.system, DDPM | Latent):
            raise UserError(f"{name} holds a {opened.system.kind} model, which draws nothing by itself")
        refuse_missing(name, opened.missing)
        self.system: Drawing = opened.system
        self.name, self.sha256, self.notes, self.opening = name, opened.sha256, opened.notes, opened.opening
        self.device = choose_device(device)
        self.dtype = "float32" if dtype == "auto" else dtype
        if self.dtype not in DTYPES:
            raise_unknown("dtype", dtype, ["auto", *DTYPES])
        if tiles not in TILES:
            raise_unknown("choice of tiles", tiles, TILES)
        if tiles == "always" and self.system.codec.network is None:
            raise UserError(f"model {name} has no first stage, so there is nothing to compute in tiles")
        self.tiles = tiles
        if kernel != "auto" and kernel not in KERNELS:
            raise_unknown("attention kernel", kernel, ["auto", *KERNELS])
        self.kernel = kernel
        self.backend, networks = registry.chosen(backend), self.system.networks()
        self.offload = offloading.chosen(offload, networks, self.device, DTYPES[self.dtype], self.backend)
        if offload == "auto" and self.offload != "never":
            way = offloading.told(self.offload)
            self.notes += (f"the memory that is free on {self.device} is short, so {way} is on",)
        home = self.device if self.offload == "never" else torch.device("cpu")
        for network in networks.values():
            if self.offload != "half":
                network.to(home, DTYPES[self.dtype])
            network.to(memory_format=registry.BACKENDS[self.backend].memory_format)  # type: ignore[call-overload]
        self.convolution = self._convolution(convolution)
        registry.engage(self.backend, networks, self.device, DTYPES[self.dtype], self.convolution, self.offload)
        self._seen = fingerprint.of(networks)

    @property
    def denoiser(self) -> Denoiser:
        """The network with its schedule and parameterization."""
        return self.system.denoiser

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes the model knows; empty if it has none."""
        return self.system.config.labels

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        count: int = 1,
        seed: int | None = None,
        same_seed: bool = False,
        steps: int | None = None,
        sampler: str | Solver[Any] | None = None,
        schedule: str | None = None,
        guidance: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        negative: str | None = None,
        perp_neg: float | None = None,
        label: str | int | Sequence[str | int] | None = None,
        width: int | None = None,
        height: int | None = None,
        dialect: str | None = None,
        clip_skip: int | None = None,
        variation: int | None = None,
        variation_strength: float | None = None,
        towards: str | None = None,
        towards_seed: int | None = None,
        hires: float | None = None,
        hires_strength: float | None = None,
        layout: str | Path | Sequence[Any] | None = None,
        map: Given | None = None,
        fast: int | FastSettings | None = None,
        on_step: Hook = keep,
        on_plan: Callable[[int], None] | None = None,
    ) -> list[Image.Image]:
        """Draw `count` pictures (of each prompt).

        Args:
            prompt: what to draw, for models that read text; or several, whose pictures follow one another.
            negative: what not to draw; guidance leads away from it.
            perp_neg: weight of what `negative` does not share with the prompt (Perp-Neg); 0 is off, None the model's.
            seed: of the first picture; picture i has `seed + i`. None draws one (it is in the settings).
            same_seed: every prompt's pictures begin again with `seed`, so that prompts can be compared.
            steps, sampler, schedule, guidance: None for the model's own defaults; `sampler` may be a `Solver`. Any
                program's names will do (`sfumato samplers`, `sfumato schedules`); a sampler's may carry the schedule's.
            guidance_rescale: phi in [0, 1], pulls the spread of guided outputs back (Lin 2023).
            guidance_interval: noise-to-signal ratios (low, high) within which guidance acts; None for the model's own.
            label: a class by its name or its place in `labels`, or several in turn; "all" is each; None leaves it open.
            width, height: in pixels; None for the map's, else the model's own. Pixel-space models draw that only.
            dialect: how brackets and weights in prompts are read (a1111, comfy, compel, plain), for CLIP text towers.
            clip_skip: how many of the text tower's last layers are left out (0: none), of both prompts.
            variation: a second seed, towards whose noise each picture's own is turned by `variation_strength` (0.1).
            towards, towards_seed: a second prompt, seed: the `count` pictures lead to it in equal steps, all of `seed`.
            hires: draw, enlarge by this factor, and draw over it once more with `hires_strength` (0.5).
            layout: boxes `{"label": …, "box": [x, y, width, height]}` in fractions of the picture, or their JSON file.
            map: a class for every pixel, a PNG with a palette or of grey values, for models that read maps.
            fast: lossy savings: a level (`backends.fast.LEVELS`, whose interval gives way to the one given) or savings.
            on_step: hook `(x, level, prediction, noise) -> x` (`diffusion.hooks`), before the first, after each step.
            on_plan: told once, before the first step, how many steps there will be in all.

        Returns:
            RGB (or grey) pictures; the settings that made each are in `picture.info["sfumato"]`, and saved with it.

        Raises:
            UserError: for anything the model cannot do, in one sentence.
        """
        check_types(locals())
        _refuse_strength_alone(variation=(variation, variation_strength), hires=(hires, hires_strength))
        texts, names = self._texts(prompt, count), self._named(label)
        words = {"dialect": dialect, "clip_skip": clip_skip} | _places(layout, map)
        words |= _turned(variation, variation_strength)
        if map is not None:
            width, height = width or words["map"].size[0], height or words["map"].size[1]
        each = count if same_seed else len(texts)
        asked = [Asked(text, negative, names[i % each % len(names)], **words) for i, text in enumerate(texts)]
        if way := towards is not None or towards_seed is not None:
            asked = _on_the_way(asked, towards, towards_seed, len(set(texts)) > 1 or variation is not None)
        self._refuse_what_does_not_apply(asked[0], width, height)
        how = Guidance(guidance, guidance_rescale, guidance_interval, perp_neg=perp_neg)
        settings = self._settings(steps, sampler, schedule, how, asked[0], width, height)
        settings |= _second_pass(self.system, hires, hires_strength, settings, words.get("map"))
        settings |= self._savings(fast, settings, sampler, how)
        return self._all(asked, names, seed, settings, sampler, on_step, on_plan, each=each, same=way)

    def edit(
        self,
        picture: Given | Values,
        prompt: str | Sequence[str] | None = None,
        *,
        mask: Given | Values | None = None,
        box: Sequence[int] | None = None,
        outpaint: Sequence[int] | None = None,
        depth: Given | Values | None = None,
        strength: float | None = None,
        noise_level: int | None = None,
        upscale: float | None = None,
        count: int = 1,
        seed: int | None = None,
        same_seed: bool = False,
        steps: int | None = None,
        sampler: str | Solver[Any] | None = None,
        schedule: str | None = None,
        guidance: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        negative: str | None = None,
        perp_neg: float | None = None,
        label: str | int | Sequence[str | int] | None = None,
        dialect: str | None = None,
        clip_skip: int | None = None,
        fast: int | FastSettings | None = None,
        on_step: Hook = keep,
        on_plan: Callable[[int], None] | None = None,
    ) -> list[Image.Image]:
        """Change a picture, `count` times (for each prompt).

        Args:
            picture: a file, a Pillow picture, or values (`tasks.original.Values`: an array (H, W, 3) of uint8 or in
                [0, 1], a tensor (3, H, W) of uint8 or in [-1, 1]), of any size (a pixel-space model takes its own).
            mask, box, outpaint: what is redrawn: where a mask is white; a box (x, y, width, height); what is added on
                the left, top, right and bottom. None: the whole picture. Pixels outside stay as they are, bit for bit,
                with their transparency; what is redrawn is opaque. A mask as values: (H, W), bool or in [0, 1].
            depth: the picture's inverse depth, near is bright, for models that follow it; values (H, W) of any range.
            strength: how far the picture is forgotten, in (0, 1]; None for 0.8, or 1 within a mask.
            noise_level: of the small picture, for models that enlarge; None for 20, or as noisy as it was trained with.
            upscale: enlarge the picture first, so that the model draws over it at the larger size.

        The rest is as in `generate`; `steps` are those of the whole way, of which `strength` takes its part. Settings
        name the picture by path and hash and do not hold it.
        """
        check_types(locals())
        enlarges = scale_of(self.system)
        if upscale is not None and enlarges != 1:
            if upscale != enlarges:
                raise UserError(f"model {self.name} enlarges by {enlarges}, not by {upscale:g}")
            upscale = None
        if noise_level is not None and enlarges == 1:
            raise UserError("the noise of a small picture belongs to models that enlarge; leave it out")
        if strength is not None and enlarges != 1:
            raise UserError(f"model {self.name} enlarges and does not forget; leave the strength out")
        original = Original.of(
            picture, mask=mask, box=box, outpaint=outpaint, depth=depth, strength=strength if enlarges == 1 else 1.0,
            noise_level=noise_level, upscale=upscale,
        )  # fmt: skip
        texts, names = self._texts(prompt, count), self._named(label)
        words: dict[str, Any] = {"dialect": dialect, "clip_skip": clip_skip}
        each = count if same_seed else len(texts)
        asked = [Asked(text, negative, names[i % each % len(names)], **words) for i, text in enumerate(texts)]
        how = Guidance(guidance, guidance_rescale, guidance_interval, perp_neg=perp_neg)
        width, height = (side * enlarges for side in original.picture.size)
        self._refuse_what_does_not_apply(asked[0], width, height)
        settings = self._settings(steps, sampler, schedule, how, asked[0], width, height)
        settings |= {"edit": original.stored()}
        settings |= self._savings(fast, settings, sampler, how)
        return self._all(asked, names, seed, settings, sampler, on_step, on_plan, each=each, original=original)

    def _all(
        self,
        asked: Sequence[Asked],
        names: Sequence[str | None],
        seed: int | None,
        settings: dict[str, Any],
        sampler: Any,
        on_step: Hook,
        on_plan: Callable[[int], None] | None,
        *,
        each: int,
        same: bool = False,
        original: Original | None = None,
    ) -> list[Image.Image]:
        """All pictures, batch by batch; seeds begin again after `each` of them, `same` gives all of them one."""
        first = secrets.randbelow(2**32) if seed is None else seed
        if not 0 <= first < 2**63 - len(asked):
            raise UserError(f"seed must be at least 0 and below 2^63, got {first}")
        self._refuse_what_does_not_apply(asked[0], settings["width"], settings["height"])
        # refuses words that cannot be read, and labels that no picture comes to, before anything is drawn
        self.system.check_words(list(dict.fromkeys([*asked, *(Asked(label=name) for name in names)])))
        pictures: list[Image.Image] = []
        together = _together(settings)
        if self._tiles(settings["width"], settings["height"]):
            settings = settings | {"tiled": True}
        if on_plan is not None:
            on_plan(_steps_each(settings) * -(-each // together) * (len(asked) // each))
        for begin, start in ((b, s) for b in range(0, len(asked), each) for s in range(0, each, together)):
            part = asked[begin + start : begin + min(start + together, each)]
            pictures += self._draw_batch(
                first if same else first + start, part, settings, sampler, on_step, same=same, original=original
            )
        return pictures

    def _tiles(self, width: int, height: int) -> bool:
        """Whether pictures of this size go through the codec in tiles."""
        return self.tiles == "always" or (self.tiles == "auto" and self.system.needs_tiles(width, height))

    def preview_hook(self, show: Callable[[int, Image.Image], None]) -> Hook:
        """A hook for `on_step` that calls `show(step, picture)` with what the picture is becoming, as small as its
        latents, by a linear map that is measured on the model's own codec."""
        try:
            with offloading.resting(self.system.networks()):
                preview = LatentPreview.measured(self.system.codec, torch.Generator().manual_seed(0), self.device)
        except PictureError as error:  # of random latents: what is drawn may decode all the same
            LOG.warning("there are no previews: %s", error)
            return keep
        return preview.hook(1, show)

    def _texts(self, prompt: str | Sequence[str] | None, count: int) -> list[str | None]:
        """The prompt of each picture."""
        if count < 1:
            raise UserError(f"count must be at least 1, got {count}")
        prompts: list[str | None] = [prompt] if prompt is None or isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise UserError("the list of prompts is empty")
        return [text for text in prompts for _ in range(count)]

    def remarks(self, sampler: str | Solver[Any] | None = None) -> list[str]:
        """What a user should know of drawing with this sampler (None: the model's own), each in one sentence."""
        if not ignores_learned_variance(self.system, sampler):
            return []
        name = sampler or self.system.config.sampling.sampler
        title = find(name)[0].title if isinstance(name, str) else type(name).__name__
        return [f"model {self.name} has learned the variance of its steps, which the sampler {title} ignores"]

    def redraw(self, settings: Mapping[str, Any], pictures: Mapping[str, Given] | None = None) -> Image.Image:
        """The picture that stored settings describe, drawn in the same batch as then.

        Args:
            pictures: where "picture", "mask" and "depth" of an edit and a "map" are now, if not where they were.

        Raises:
            UserError: settings that are incomplete or do not fit this model.
        """
        known = ("steps", "sampler", "schedule", "guidance", "width", "height", "dtype")
        classes = map_restored(settings["map"], (pictures or {}).get("map")) if "map" in settings else None
        try:
            batch = settings["batch"]
            first, index, same = int(batch["seed"]), int(batch["index"]), bool(batch.get("same_seed", False))
            said = batch["asked"] if "asked" in batch else [{"label": label} for label in batch["labels"]]
            asked = [Asked.restored(values | ({"map": classes} if "map" in values else {})) for values in said]
            chosen = self._weights() | {key: settings[key] for key in known}
            chosen |= {key: settings[key] for key in _SOMETIMES if key in settings}
            FastSettings.restored(chosen.get("fast", {}))
        except (KeyError, TypeError, ValueError):
            raise UserError("the settings are incomplete, so the picture cannot be drawn again") from None
        if not 0 <= index < len(asked) <= _BATCH or not 0 <= first < 2**63 - _BATCH:
            raise UserError("the settings name a batch that cannot be")
        self._refuse_what_does_not_apply(asked[0], chosen["width"], chosen["height"])
        choose_solver(self.system, chosen["sampler"])
        original = Original.restored(chosen["edit"], pictures) if "edit" in chosen else None
        return self._draw_batch(first, asked, chosen, None, keep, same=same, original=original)[index]

    def _draw_batch(
        self,
        first: int,
        asked: Sequence[Asked],
        settings: dict[str, Any],
        sampler: Any,
        on_step: Hook,
        *,
        same: bool = False,
        original: Original | None = None,
    ) -> list[Image.Image]:
        """Pictures that are drawn together, each with its settings."""
        interval = settings.get("guidance_interval")
        seeds = [first] * len(asked) if same else list(range(first, first + len(asked)))
        how: dict[str, Any] = {
            "seeds": seeds,
            "asked": asked,
            "sampler": settings["sampler"] if sampler is None else sampler,
            "schedule": settings["schedule"],
            "steps": settings["steps"],
            "guidance": Guidance(
                settings["guidance"], settings.get("guidance_rescale", 0.0), tuple(interval) if interval else None,
                perp_neg=settings.get("perp_neg", 0.0),
            ),
            "fast": FastSettings.restored(settings["fast"]) if "fast" in settings else None,
            "tiled": settings.get("tiled", False),
            "on_step": on_step,
        }
        with using(self._kernel()):
            pictures = self._edited(original, how) if original is not None else self._drawn(settings, how)
            made = environment(self.device) | registry.made_with(self.backend)
            made |= {"convolution": self.convolution} if self.convolution != "direct" else {}
        together = {"seed": first, "asked": [one.stored() for one in asked]} | ({"same_seed": True} if same else {})
        shared = settings | {"made_with": made}
        return [
            with_settings(picture, shared | one.stored() | {"seed": seed, "batch": together | {"index": i}})
            for i, (seed, one, picture) in enumerate(zip(seeds, asked, pictures, strict=True))
        ]

    def _kernel(self) -> Kernel:
        """The attention kernel that is asked for; else one that was set by hand, else the fastest here."""
        if self.kernel != "auto":
            return KERNELS[self.kernel]
        own = attention_kernel()
        return own if own is not sdpa else KERNELS[chosen(DTYPES[self.dtype], self.device)]

    def _convolution(self, asked: str) -> str:
        """How torch computes convolutions: as asked, else the fastest here. Raises `UserError` for an unknown way."""
        if asked not in ("auto", *convolutions.ALGORITHMS):
            raise_unknown("way of convolving", asked, ["auto", *convolutions.ALGORITHMS])
        if self.backend != "torch":
            return "direct"
        if asked != "auto":
            return asked
        fastest = convolutions.chosen(DTYPES[self.dtype], self.device)
        if fastest == "winograd" and self._short_for_kernels():
            self.notes += ("the memory that is free is short, so convolutions are direct, which is slower",)
            return "direct"
        return fastest

    def _short_for_kernels(self) -> bool:
        """Whether the CPU's memory is too short for the transformed kernels of a network beside its activations."""
        network, dtype = self.denoiser.network, DTYPES[self.dtype]
        weights = sum(one.numel() for one in network.parameters()) * dtype.itemsize
        return offloading.short(free_host_bytes(), min(convolutions.budget(network, dtype), 4 * weights), weights)

    def _drawn(self, settings: Mapping[str, Any], how: dict[str, Any]) -> list[Image.Image]:
        """New pictures, with a second pass at a larger size where that was asked."""
        width, height = settings["width"], settings["height"]
        again = settings.get("hires")
        if again is None:
            return to_pil(draw(self.system, size=(width, height), **how).cpu())
        x = enlarged(draw(self.system, size=(again["width"], again["height"]), **how), width, height)
        return to_pil(edit(self.system, Source(x, strength=again["strength"]), **how).cpu())

    def _edited(self, original: Original, how: dict[str, Any]) -> list[Image.Image]:
        """Changed pictures; outside the mask the original itself."""
        channels = 3 if isinstance(self.system, Latent) else self.system.config.channels
        source = original.source(channels)
        pictures = to_pil(edit(self.system, source, **how).cpu())
        if source.mask is None:
            return pictures
        if original.clear is not None:
            return [_composited(picture.convert("RGB"), original.clear, source.mask) for picture in pictures]
        kept = original.picture.convert(pictures[0].mode)
        return [_composited(picture, kept, source.mask) for picture in pictures]

    def _named(self, label: str | int | Sequence[str | int] | None) -> list[str | None]:
        """The labels that pictures take in turn; a number is the place in `labels`."""
        one = label is None or isinstance(label, str) or not isinstance(label, Iterable)
        given: list[Any] = [label] if one else list(label) or [None]  # type: ignore[arg-type]
        names = [self._label(value) for value in given]
        if [name.casefold() for name in names if name is not None] == ["all"] and self.labels:
            return list(self.labels)
        return names

    def _label(self, value: Any) -> str | None:
        """The name of a class that was given by its name or its number."""
        if value is None or isinstance(value, str):
            return value
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"a label is a name or a whole number, got {value!r}")
        if not 0 <= value < len(self.labels):
            raise UserError(f"label {value} is not among the model's {len(self.labels)} classes, numbered from 0")
        return self.labels[value]

    def _settings(
        self,
        steps: int | None,
        sampler: Any,
        schedule: str | None,
        guidance: Guidance,
        asked: Asked,
        width: int | None,
        height: int | None,
    ) -> dict[str, Any]:
        """Every setting with the model's defaults filled in, checked before anything is drawn."""
        defaults, led = self.system.config.sampling, asked.says_anything or asked.negative is not None
        if guidance.scale not in (None, 1) and not led:
            raise UserError("--guidance needs a --label or a prompt: without one there is nothing to guide towards")
        if steps is not None and steps < 1:
            raise UserError(f"steps must be at least 1, got {steps}")
        chosen = defaults.sampler if sampler is None else sampler
        choose_solver(self.system, chosen)
        spacing = choose_schedule(self.system, chosen, schedule)
        scale = guidance.scale if guidance.scale is not None else (defaults.guidance if led else 1.0)
        if asked.negative is not None and scale == 1:
            raise UserError("a negative prompt works through guidance, which is off (1); give --guidance above 1")
        if scale == 1 and (guidance.rescale or guidance.interval is not None):
            what = "rescaling" if guidance.rescale else "interval"
            raise UserError(f"the {what} of guidance does nothing where guidance is off (1); give --guidance above 1")
        if guidance.perp_neg and asked.negative is None:
            reads = "give --negative" if "text" in self.system.reads else f"model {self.name} does not read text"
            raise UserError(f"the weight of a negative prompt does nothing without one; {reads}")
        settings = self._weights() | {
            "steps": choose_steps(self.system, spacing, steps),
            "sampler": find(chosen)[0].name if isinstance(chosen, str) else _name_of(self.system, chosen),
            "schedule": spacing,
            "guidance": scale,
            "width": width if width is not None else self.system.config.size,
            "height": height if height is not None else self.system.config.size,
            "dtype": self.dtype,
        }
        if self.opening:
            settings["opening"] = self.opening
        if self.backend != "torch":
            settings["backend"] = self.backend
        if guidance.rescale:
            settings["guidance_rescale"] = guidance.rescale
        interval = guidance.interval if guidance.interval is not None else defaults.guidance_interval
        if interval is not None and scale != 1:
            settings["guidance_interval"] = list(interval)
        weight = guidance.perp_neg if guidance.perp_neg is not None else defaults.perp_neg
        if weight and asked.negative is not None:
            settings["perp_neg"] = weight
        return settings

    def _weights(self) -> dict[str, Any]:
        """What settings say of the weights: the hash of their file, or that they have been altered in Python since."""
        parts = fingerprint.altered(self._seen, fingerprint.of(self.system.networks()))
        if not parts:
            return {"model": self.name, "model_hash": self.sha256}
        return {"model": self.name, "altered": {"parts": list(parts), "model_hash": self.sha256}}

    def save(
        self,
        path: str | Path,
        to: str | None = None,
        *,
        dtype: str | torch.dtype | None = None,
        overwrite: bool = False,
    ) -> tuple[str, ...]:
        """Write the model as its networks are now; the target appears whole or not at all, the model stays as it is.

        Args:
            path: of a file (`.safetensors`), or of a new or empty folder for "diffusers".
            to: "sfumato" (or None), one file with the whole config, for every model; "single-file", Stable Diffusion's
                file; "diffusers", a folder.
            dtype: of the weights: float32, bfloat16 or float16; None keeps the types that they compute in, for a
                large model may have been opened in half precision.
            overwrite: take the place of a file that is there; a folder is never replaced.

        Returns:
            What a user should know of what was written, each in one sentence.

        Raises:
            UserError: for a target that stands in the way, networks with layers around their own, and a model that the
                layout has no place for.
        """
        kind = dtype_name(dtype) if dtype is not None else self.dtype if self.offload == "half" else None
        return save(self.system, path, to=to or OWN, dtype=kind, overwrite=overwrite, what=self.name).notes

    def _savings(
        self, fast: int | FastSettings | None, settings: dict[str, Any], sampler: Any, guidance: Guidance
    ) -> dict[str, Any]:
        """The setting `fast`, checked against the others; what of a level does nothing here is left out and told, and
        an interval that is asked for among the savings takes the place of the model's own."""
        if fast is None:
            return {}
        wanted = fast if isinstance(fast, FastSettings) else level(fast)
        if wanted.interval is not None and "guidance_interval" in settings:
            if isinstance(fast, FastSettings):
                guided_less(guidance, wanted)
                del settings["guidance_interval"]
            else:
                wanted = replace(wanted, interval=None)
        chosen = settings["sampler"] if sampler is None else sampler
        method, levels = planned(self.system, chosen, settings["schedule"], settings["steps"])
        if "edit" in settings:
            levels = last_levels(levels, method, float(settings["edit"]["strength"]))
        told = None if isinstance(fast, FastSettings) else f"level {fast} of savings"
        found, notes = fitted(self.system, wanted, method, levels, guided=settings["guidance"] != 1, told=told)
        if found.changes_network and self.backend != "torch":
            raise UserError(
                f"savings within the network (kept features, merged tokens) need backend torch, not {self.backend}"
            )
        for note in notes:
            LOG.warning(note)
        return {"fast": ({} if isinstance(fast, FastSettings) else {"level": fast}) | found.stored()}

    def _refuse_what_does_not_apply(self, asked: Asked, width: int | None, height: int | None) -> None:
        known = f"; its labels are: {', '.join(self.labels)}" if self.labels else ""
        if "text" not in self.system.reads:
            if asked.prompt is not None:
                raise UserError(f"model {self.name} does not read text, so it takes no prompt{known}")
            if asked.negative is not None:
                raise UserError(f"model {self.name} does not read text, so it takes no negative prompt{known}")
            if asked.dialect is not None or asked.clip_skip is not None:
                what = "dialect" if asked.dialect is not None else "clip skip"
                raise UserError(f"model {self.name} does not read text, so it takes no {what}{known}")
        if asked.label is not None and "label" not in self.system.reads:
            raise UserError("this model has no class labels; leave --label out")
        for what, said in (("layout", asked.layout), ("map", asked.map)):
            if said is not None and what not in self.system.reads:
                raise UserError(f"model {self.name} takes no {what}; leave --{what} out")
        own = self.system.config.size
        for what, size in (("width", width), ("height", height)):
            if size is not None and size != own and isinstance(self.system, DDPM):
                raise UserError(f"model {self.name} draws {own} x {own} pixels; {what} {size} cannot be had")
            if size is not None and not 8 <= size <= 4096:
                raise UserError(f"{what} must be 8 to 4096 pixels, got {size}")


def _refuse_strength_alone(**given: tuple[float | None, float | None]) -> None:
    for what, (value, strength) in given.items():
        if value is None and strength is not None:
            raise UserError(f"{what}_strength does nothing without {what}; give that too, or leave it out")


def _name_of(model: Drawing, solver: Solver[Any]) -> str:
    """The name by which this model would choose that very solver, else how it is written in Python."""
    return next((name for name in SOLVERS if choose_solver(model, name) == solver), repr(solver))


def _places(layout: str | Path | Sequence[Any] | None, classes: Given | None) -> dict[str, Any]:
    """What is said of places, opened: a layout, a map, both or neither."""
    boxes = {} if layout is None else {"layout": layout_given(layout)}
    return boxes | ({} if classes is None else {"map": ClassMap.of(classes)})


def _turned(variation: int | None, strength: float | None) -> dict[str, Any]:
    """What is said of a second seed, towards which the noise is turned: nothing where there is none."""
    return {} if variation is None else {"variation": variation, "strength": 0.1 if strength is None else strength}


def _on_the_way(
    asked: Sequence[Asked], towards: str | None, towards_seed: int | None, several: bool
) -> list[Asked]:
    """The pictures that lead from a prompt and a seed to others, in equal steps."""
    if several:
        raise UserError("pictures on the way to a second prompt or seed begin with one prompt and no variation")
    if len(asked) < 2:
        raise UserError("pictures on the way to a second prompt or seed are at least 2; give a count")
    shares = [i / (len(asked) - 1) for i in range(len(asked))]
    words = [{} if towards is None else {"towards": towards, "share": share} for share in shares]
    seeds = [{} if towards_seed is None else {"variation": towards_seed, "strength": share} for share in shares]
    return [replace(one, **a, **b) for one, a, b in zip(asked, words, seeds, strict=True)]  # type: ignore[arg-type]


def _second_pass(
    system: Drawing, scale: float | None, given: float | None, settings: Mapping[str, Any], classes: ClassMap | None
) -> dict[str, Any]:
    """The settings of a second pass at a larger size, none where none is asked: what the first one draws, and the size
    of the result. A map must be of the picture's size, and cannot be followed at another."""
    strength = 0.5 if given is None else given
    width, height = settings["width"], settings["height"]
    if classes is not None and classes.size != (width, height):
        raise UserError(f"the map is {classes.size[0]} x {classes.size[1]} pixels, the picture {width} x {height}")
    if scale is None:
        return {}
    if classes is not None:
        raise UserError("a second pass at a larger size cannot follow a map; leave one of them out")
    if not isinstance(system, Latent) or scale_of(system) != 1:
        raise UserError("a second pass needs a latent model that draws any size")
    if not 1 < scale <= 8:
        raise UserError(f"the second pass enlarges by more than 1 and at most 8, got {scale}")
    if not 0 < strength <= 1:
        raise UserError(f"the strength of the second pass must be above 0 and at most 1, got {strength}")
    first = {"width": width, "height": height, "strength": strength}
    return {"hires": first, "width": round(width * scale), "height": round(height * scale)}


def _together(settings: Mapping[str, Any]) -> int:
    """How many pictures of this size are drawn in one batch."""
    pixels: int = settings["width"] * settings["height"]
    return max(1, min(_BATCH, _BATCH_PIXELS // pixels))


def _steps_each(settings: Mapping[str, Any]) -> int:
    """How many steps one batch takes."""
    steps: int = settings["steps"]
    if "hires" in settings:
        return steps + gone(steps, float(settings["hires"]["strength"]))
    strength: float = settings["edit"]["strength"] if "edit" in settings else 1
    return gone(steps, strength)


def _composited(drawn: Image.Image, original: Image.Image, mask: torch.Tensor) -> Image.Image:
    """Drawn inside the mask, the original outside, bit for bit."""
    values = [torch.from_numpy(np.atleast_3d(np.array(one))).permute(2, 0, 1) for one in (drawn, original)]
    array = composited(values[0][None], values[1], mask)[0].permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def environment(device: torch.device) -> dict[str, Any]:
    """What pictures are made with, as far as it can change their bytes."""
    made: dict[str, Any] = {"sfumato": __version__, "torch": str(torch.__version__), "device": device.type}
    made |= {"cpu": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    if device.type != "cpu":
        made["gpu"] = str(torch.get_device_module(device).get_device_name(device))
    return made | {"kernel": getattr(attention_kernel(), "__name__", "custom")}


def load(
    path_or_name: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    vae: str | Path | None = None,
    prediction: Prediction = "unknown",
    averaged: bool = False,
    allow_pickle: bool = False,
    tiles: str = "auto",
    kernel: str = "auto",
    backend: str = "auto",
    convolution: str = "auto",
    offload: str = "auto",
) -> Model:
    """Open a model: a name from the box, a model file, a run, a checkpoint, a single file or a folder of Stable
    Diffusion.

    Args:
        path_or_name: None takes the best model in the box.
        device: auto (a GPU if there is one), cpu, or another of torch's device names.
        dtype: of the networks: auto, float32, bfloat16 or float16 (or fp16, bf16, torch.float16 …). "auto" is
            half precision for large models where the machine computes with it natively (bfloat16 on a CPU, float16 on a
            GPU), else float32.
        vae: another first stage: a file, a finished run, a folder or a name from the box.
        prediction: "eps" or "v" where a foreign file does not say it, or says it wrongly.
        averaged: read the running average of the weights (EMA) that some single files keep apart.
        allow_pickle: open `.ckpt` and `.bin`, by a reader that builds tensors and runs nothing.
        tiles: whether large pictures go through the codec in tiles: auto (where memory is short), always, never.
        kernel: of attention: auto (the fastest here, by a short measurement), sdpa, blocks, adaptive or math.
        backend: who computes the networks: auto (torch), torch, compile (torch.compile) or openvino (on the CPU).
        convolution: how torch computes 3x3 convolutions: auto (the fastest here, by a short measurement), direct or
            winograd.
        offload: where memory is short: never (all weights are there), for a GPU networks (text encoders, UNet and codec
            come when they are called) and blocks (UNet and codec block by block), for a CPU half (weights that are
            stored in 16 bits rest so and are widened where they are needed), or auto (by the memory that is free). To
            change weights yourself, take "never": at rest they are rounded to what they rest in.

    Raises:
        UserError: in one sentence, when it cannot be opened.
    """
    wanted = str(path_or_name) if path_or_name is not None else models.BEST
    dtype = dtype_name(dtype)
    if dtype not in ("auto", *DTYPES):
        raise_unknown("dtype", dtype, ["auto", *DTYPES])
    found = weights_of(wanted)
    name = wanted if wanted in models.names() else Path(wanted).resolve().name.removesuffix(".safetensors")
    place = choose_device(device)
    kind = _fitting_dtype(found, place) if dtype == "auto" else dtype
    registry.check(backend, place, DTYPES[kind])
    offloading.check(offload, place, registry.chosen(backend), DTYPES[kind])
    stage = first_stage_of(vae) if vae is not None else None
    halves = offload == "half" or (offload == "auto" and _may_rest_in_half(found, place, kind))
    opened = open_system(
        found, allow_pickle=allow_pickle, prediction=prediction, averaged=averaged, vae=stage,
        dtype=HALVES if halves else DTYPES[kind],
    )  # fmt: skip
    return Model(
        opened, name, device=device, dtype=kind, tiles=tiles, kernel=kernel, backend=backend, convolution=convolution,
        offload=offload,
    )  # fmt: skip


def random_model(
    family: str,
    *,
    device: str = "auto",
    dtype: str = "float32",
    backend: str = "auto",
    convolution: str = "auto",
    offload: str = "auto",
) -> Model:
    """A model of a published layout with random weights: for measuring, not for drawing.

    Args:
        family: a name such as "sd1" or "sd2-v" (`checkpoints.formats.families.FAMILIES`).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        system = Latent.create(config_of(family_named(family)))
    for network in system.networks().values():
        network.eval()
    return Model(
        Opened(system, Path(), ""), f"random {family}", device=device, dtype=dtype, backend=backend,
        convolution=convolution, offload=offload,
    )  # fmt: skip


def _stored_bytes(path: Path) -> int:
    """Of all weights in a file or folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files if p.suffix in WEIGHTS)


def _may_rest_in_half(path: Path, device: torch.device, dtype: str) -> bool:
    """Whether weights would be wider than stored, if they have 16 bits there, and memory may be too short for that."""
    if device.type != "cpu" or dtype != "float32":
        return False
    wide = 2 * _stored_bytes(path)
    return offloading.short(free_host_bytes(), wide, wide)


def _fitting_dtype(path: Path, device: torch.device) -> str:
    """Half precision for a large model where the device computes with it natively, else float32."""
    if _stored_bytes(path) < _LARGE:
        return "float32"
    if device.type != "cpu":
        return "float16"  # which every GPU computes with natively
    return "bfloat16" if native_bfloat16(device) else "float32"


def _no_such_model(wanted: str) -> str:
    known = models.names()
    if not known:
        return f"no model or file is called {wanted!r}, and the box holds no model in this installation"
    return f"no model or file is called {wanted!r}{nearest(wanted, known)}; the box holds: {', '.join(known)}"


def weights_of(path_or_name: str | Path) -> Path:
    """The file to open for what a user names: a model of the box, of a run its finished model or newest averaged
    weights, else the path itself. Raises `UserError` for a bare name that nothing has."""
    if str(path_or_name) in models.names():
        return models.weights(str(path_or_name))
    path = Path(path_or_name)
    if not path.exists() and path.suffix == "" and len(path.parts) == 1:
        raise UserError(_no_such_model(str(path)))
    if not path.exists() and path.suffix not in WEIGHTS and len(path.parts) == 2:  # as models are called on hubs
        raise UserError(f"there is no file or folder {path}; nothing is downloaded, give one that is on this machine")
    if not path.is_dir():
        return path
    if (path / state.AVERAGE).is_file():
        return path / state.AVERAGE
    if (path / "model.safetensors").is_file():
        return path / "model.safetensors"
    newest = state.newest(path)
    if newest is None and (path / state.FOLDER).is_dir():
        raise ModelFileError(f"run {path} has no checkpoint yet")
    return newest / state.AVERAGE if newest is not None else path


def first_stage_of(path: str | Path) -> Path:
    """What another first stage is opened from: a name from the box, a finished run's model, else the file or folder
    itself. Raises `UserError` for a run that is not finished."""
    return Path(path) if diffusers.is_pipeline(path) else codec_file(str(path))
