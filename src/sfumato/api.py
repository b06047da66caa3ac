"""The front door: open a model, draw pictures.

>>> import sfumato
>>> model = sfumato.load("ddpm-emoji32")
>>> picture = model.generate(count=1, seed=3, steps=2)[0]
>>> picture.size, picture.info["sfumato"]["seed"]
((32, 32), 3)
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sfumato import __version__, models
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.hooks import Hook, keep
from sfumato.diffusion.solvers import Solver, find
from sfumato.errors import ModelFileError, UserError, nearest, raise_unknown
from sfumato.images import to_pil, with_settings
from sfumato.networks.attention import attention_kernel
from sfumato.systems import Drawing, Opened, open_system
from sfumato.systems.asked import Asked
from sfumato.systems.ddpm import DDPM
from sfumato.systems.latent import Latent
from sfumato.tasks.draw import (
    Guidance,
    choose_schedule,
    choose_solver,
    choose_steps,
    draw,
    ignores_learned_variance,
)
from sfumato.training import state
from sfumato.training.trainer import default_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_SOMETIMES = ("guidance_rescale", "guidance_interval")  # settings that are stored where they are not off
_BATCH = 16  # pictures drawn together; each picture's noise is its own, so this changes nothing but memory


class Model:
    """An opened model, ready to draw.

    Attributes:
        system: what it is made of (config and denoiser).
        name: for people: the box's name, or the file's.
        sha256: of its weights' file.
        dtype: of the network ("float32", "bfloat16", "float16"); pictures and solvers stay in float32.
    """

    def __init__(self, opened: Opened, name: str, *, device: str = "auto", dtype: str = "auto") -> None:
        if not isinstance(opened.system, DDPM | Latent):
            raise UserError(f"{name} holds a {opened.system.kind} model, which draws nothing by itself")
        self.system: Drawing = opened.system
        self.name, self.sha256 = name, opened.sha256
        self.device = choose_device(device)
        self.dtype = "float32" if dtype == "auto" else dtype
        if self.dtype not in DTYPES:
            raise_unknown("dtype", dtype, ["auto", *DTYPES])
        for network in self.system.networks().values():
            network.to(self.device, DTYPES[self.dtype]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

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
        steps: int | None = None,
        sampler: str | Solver[Any] | None = None,
        schedule: str | None = None,
        guidance: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        negative: str | None = None,
        label: str | Sequence[str] | None = None,
        width: int | None = None,
        height: int | None = None,
        on_step: Hook = keep,
    ) -> list[Image.Image]:
        """Draw `count` pictures (of each prompt).

        Args:
            prompt: what to draw, for models that read text; or several, whose pictures follow one another.
            negative: what not to draw; guidance leads away from it.
            seed: of the first picture; picture i has `seed + i`. None draws one (it is in the settings).
            steps, sampler, schedule, guidance: None for the model's own defaults; `sampler` may be a `Solver`. Any
                program's names will do (`sfumato samplers`, `sfumato schedules`); a sampler's may carry the schedule's.
            guidance_rescale: phi in [0, 1], pulls the spread of guided outputs back (Lin 2023).
            guidance_interval: noise-to-signal ratios (low, high) within which guidance acts; None for all.
            label: a class of a class-conditional model, or several, which the pictures take in turn; "all" is every
                class in turn; None leaves the class open.
            width, height: in pixels; None for the model's own. A pixel-space model draws its own size only.
            on_step: hook of the sampling loop, `(x, level, prediction, noise) -> x`, called for each batch.

        Returns:
            RGB (or grey) pictures; `picture.info["sfumato"]` holds the settings that made each.

        Raises:
            UserError: for anything the model cannot do, in one sentence.
        """
        if count < 1:
            raise UserError(f"count must be at least 1, got {count}")
        prompts: list[str | None] = [prompt] if prompt is None or isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise UserError("the list of prompts is empty")
        names, texts = self._named(label), [text for text in prompts for _ in range(count)]
        asked = [Asked(text, negative, names[i % len(names)]) for i, text in enumerate(texts)]
        self._refuse_what_does_not_apply(asked[0], width, height)
        first = secrets.randbelow(2**32) if seed is None else seed
        if not 0 <= first < 2**63 - len(asked):
            raise UserError(f"seed must be at least 0 and below 2^63, got {first}")
        how = Guidance(guidance, guidance_rescale, guidance_interval)
        settings = self._settings(steps, sampler, schedule, how, asked[0], width, height)
        # refuses words that cannot be read, and labels that no picture comes to, before anything is drawn
        self.system.conditions(list(dict.fromkeys([*asked, *(Asked(label=name) for name in names)])))
        pictures: list[Image.Image] = []
        for start in range(0, len(asked), _BATCH):
            part = asked[start : start + _BATCH]
            pictures += self._draw_batch(first + start, part, settings, sampler, on_step)
        return pictures

    def steps(self, steps: int | None, sampler: str | Solver[Any] | None, schedule: str | None) -> int:
        """How many steps a picture takes with these settings, None standing for the model's own."""
        chosen = sampler if sampler is not None else self.system.config.sampling.sampler
        return choose_steps(self.system, choose_schedule(self.system, chosen, schedule), steps)

    def remarks(self, sampler: str | Solver[Any] | None = None) -> list[str]:
        """What a user should know of drawing with this sampler (None: the model's own), each in one sentence."""
        if not ignores_learned_variance(self.system, sampler):
            return []
        name = sampler or self.system.config.sampling.sampler
        title = find(name)[0].title if isinstance(name, str) else type(name).__name__
        return [f"model {self.name} has learned the variance of its steps, which the sampler {title} ignores"]

    def redraw(self, settings: Mapping[str, Any]) -> Image.Image:
        """The picture that stored settings describe, drawn in the same batch as then.

        Raises:
            UserError: settings that are incomplete or do not fit this model.
        """
        known = ("steps", "sampler", "schedule", "guidance", "width", "height", "dtype")
        try:
            batch = settings["batch"]
            first, index = int(batch["seed"]), int(batch["index"])
            said = batch["asked"] if "asked" in batch else [{"label": label} for label in batch["labels"]]
            asked = [Asked.restored(values) for values in said]
            chosen = {"model": self.name, "model_hash": self.sha256} | {key: settings[key] for key in known}
            chosen |= {key: settings[key] for key in _SOMETIMES if key in settings}
        except (KeyError, TypeError, ValueError):
            raise UserError("the settings are incomplete, so the picture cannot be drawn again") from None
        if not 0 <= index < len(asked) <= _BATCH or not 0 <= first < 2**63 - _BATCH:
            raise UserError("the settings name a batch that cannot be")
        self._refuse_what_does_not_apply(asked[0], chosen["width"], chosen["height"])
        choose_solver(self.system, chosen["sampler"])
        return self._draw_batch(first, asked, chosen, None, keep)[index]

    def _draw_batch(
        self, first: int, asked: Sequence[Asked], settings: dict[str, Any], sampler: Any, on_step: Hook
    ) -> list[Image.Image]:
        """Pictures that are drawn together, each with its settings."""
        interval = settings.get("guidance_interval")
        x = draw(
            self.system,
            seeds=range(first, first + len(asked)),
            asked=asked,
            sampler=settings["sampler"] if sampler is None else sampler,
            schedule=settings["schedule"],
            steps=settings["steps"],
            guidance=Guidance(
                settings["guidance"], settings.get("guidance_rescale", 0.0), tuple(interval) if interval else None
            ),
            size=(settings["width"], settings["height"]),
            on_step=on_step,
        )
        together = {"seed": first, "asked": [one.stored() for one in asked]}
        shared = settings | {"made_with": environment(self.device)}
        return [
            with_settings(picture, shared | one.stored() | {"seed": first + i, "batch": together | {"index": i}})
            for i, (one, picture) in enumerate(zip(asked, to_pil(x.cpu()), strict=True))
        ]

    def _named(self, label: str | Sequence[str] | None) -> list[str | None]:
        """The labels that pictures take in turn."""
        names: list[str | None] = [label] if label is None or isinstance(label, str) else list(label) or [None]
        if [name.casefold() for name in names if name is not None] == ["all"] and self.labels:
            return list(self.labels)
        return names

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
        settings = {
            "model": self.name,
            "model_hash": self.sha256,
            "steps": choose_steps(self.system, spacing, steps),
            "sampler": find(chosen)[0].name if isinstance(chosen, str) else repr(chosen),
            "schedule": spacing,
            "guidance": scale,
            "width": width or self.system.config.size,
            "height": height or self.system.config.size,
            "dtype": self.dtype,
        }
        if guidance.rescale:
            settings["guidance_rescale"] = guidance.rescale
        if guidance.interval is not None:
            settings["guidance_interval"] = list(guidance.interval)
        return settings

    def _refuse_what_does_not_apply(self, asked: Asked, width: int | None, height: int | None) -> None:
        known = f"; its labels are: {', '.join(self.labels)}" if self.labels else ""
        if "text" not in self.system.reads:
            if asked.prompt is not None:
                raise UserError(f"model {self.name} does not read text, so it takes no prompt{known}")
            if asked.negative is not None:
                raise UserError(f"model {self.name} does not read text, so it takes no negative prompt{known}")
        if asked.label is not None and "label" not in self.system.reads:
            raise UserError("this model has no class labels; leave --label out")
        own = self.system.config.size
        for what, size in (("width", width), ("height", height)):
            if size is not None and size != own and isinstance(self.system, DDPM):
                raise UserError(f"model {self.name} draws {own} x {own} pixels; {what} {size} cannot be had")
            if size is not None and not 8 <= size <= 4096:
                raise UserError(f"{what} must be 8 to 4096 pixels, got {size}")


def environment(device: torch.device) -> dict[str, Any]:
    """What pictures are made with, as far as it can change their bytes."""
    made: dict[str, Any] = {"sfumato": __version__, "torch": str(torch.__version__), "device": device.type}
    made |= {"cpu": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    if device.type != "cpu":
        made["gpu"] = str(torch.get_device_module(device).get_device_name(device))
    return made | {"kernel": getattr(attention_kernel(), "__name__", "custom")}


def load(path_or_name: str | Path | None = None, *, device: str = "auto", dtype: str = "auto") -> Model:
    """Open a model: a name from the box, a model file, a run, a checkpoint, or a diffusers pipeline folder.

    Args:
        path_or_name: None takes the best model in the box.
        device: auto (a GPU if there is one), cpu, or another of torch's device names.
        dtype: of the network: auto (float32), float32, bfloat16 or float16.

    Raises:
        UserError: in one sentence, when it cannot be opened.
    """
    wanted = str(path_or_name) if path_or_name is not None else models.BEST
    if wanted in models.names():
        return Model(open_system(models.weights(wanted)), wanted, device=device, dtype=dtype)
    path = Path(wanted)
    if not path.exists() and path.suffix == "" and len(path.parts) == 1:
        raise UserError(_no_such_model(wanted))
    found = weights_of(path)
    name = path.resolve().name.removesuffix(".safetensors")
    return Model(open_system(found), name, device=device, dtype=dtype)


def _no_such_model(wanted: str) -> str:
    known = models.names()
    if not known:
        return f"no model or file is called {wanted!r}, and the box holds no model in this installation"
    return f"no model or file is called {wanted!r}{nearest(wanted, known)}; the box holds: {', '.join(known)}"


def weights_of(path: Path) -> Path:
    """The file to open for a path: of a run its finished model or newest averaged weights; else the path itself."""
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


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" takes a GPU if torch has one. Raises `UserError` when it is not there."""
    if name == "auto":
        return default_device()
    try:
        device = torch.device(name)
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        if reason.startswith("Expected one of"):  # torch's list of every device it has heard of
            reason = "there is no such kind of device; auto, cpu or the GPU's name in torch are expected"
        raise UserError(f"device {name!r} cannot be used here ({reason})") from None
    return device
