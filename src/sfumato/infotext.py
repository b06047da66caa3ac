"""Settings as the texts that other programs write into pictures: AUTOMATIC1111's `parameters`, ComfyUI's graph.

`infotext` writes the `parameters` text with that program's own keys and names, so that it and all who read it know what
ours mean: "DPM++ 2M" for `dpmpp_2m`, "Clip skip: 2" where one layer is left out, the first pass's size beside "Hires
upscale". It loses what has no key there (guidance's rescaling, the way to a second prompt …); a picture's JSON keeps
everything. `parse_infotext` and `parse_comfy` read, into the names that `Model.generate` and `Model.edit` take.

>>> settings = {"prompt": "a fox", "steps": 20, "sampler": "dpmpp_2m", "schedule": "karras", "seed": 7, "clip_skip": 1}
>>> text = infotext(settings).rpartition(", Version")[0]
>>> print(text)
a fox
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, Seed: 7, Clip skip: 2
>>> parse_infotext(text) == settings | {"sampler": "DPM++ 2M", "schedule": "Karras"}
True
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

from sfumato.errors import UserError

Settings = Mapping[str, Any]

_LABELS = {
    "steps": "Steps",
    "sampler": "Sampler",
    "schedule": "Schedule type",
    "guidance": "CFG scale",
    "seed": "Seed",
    "size": "Size",
    "model_hash": "Model hash",
    "model": "Model",
    "vae_hash": "VAE hash",
    "vae": "VAE",
    "variation": "Variation seed",
    "variation_strength": "Variation seed strength",
    "strength": "Denoising strength",
    "clip_skip": "Clip skip",
    "hires": "Hires upscale",
    "resize": "Hires resize",
}
_KEYS = {label: key for key, label in _LABELS.items() if key != "resize"}
_TYPES: dict[str, Callable[[str], Any]] = {
    "steps": int, "guidance": float, "seed": int, "variation": int, "variation_strength": float, "strength": float,
    "clip_skip": lambda text: _layers(int(text)), "hires": float,
}  # fmt: skip
_NEGATIVE = "Negative prompt:"
_PAIR = re.compile(r'(\w[\w \-/]{1,100}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')  # bounded names: linear time
_LONGEST_LINE = 100_000

_SAMPLERS = {
    "dpmpp_2m": "DPM++ 2M", "dpmpp_sde": "DPM++ SDE", "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_2m_sde_heun": "DPM++ 2M SDE Heun", "dpmpp_2s_ancestral": "DPM++ 2S a", "dpmpp_3m_sde": "DPM++ 3M SDE",
    "euler_ancestral": "Euler a", "euler": "Euler", "lms": "LMS", "heun": "Heun", "dpm_2": "DPM2",
    "dpm_2_ancestral": "DPM2 a", "dpm_fast": "DPM fast", "dpm_adaptive": "DPM adaptive", "ddim": "DDIM", "plms": "PLMS",
    "uni_pc": "UniPC", "lcm": "LCM",
}  # fmt: skip
_SCHEDULES = {
    "karras": "Karras", "exponential": "Exponential", "sgm_uniform": "SGM Uniform", "kl_optimal": "KL Optimal",
    "align_your_steps": "Align Your Steps", "simple": "Simple", "normal": "Normal", "ddim_uniform": "DDIM",
    "beta_t": "Beta",
}  # fmt: skip


# --- AUTOMATIC1111's `parameters` ---------------------------------------------------------------------------------


def infotext(settings: Settings) -> str:
    """Write settings as the `parameters` text of Stable Diffusion front ends; `parse_infotext` reads it back.

    The prompt, `Negative prompt: ...` where there is one, and a line `Steps: 20, Sampler: ..., Version: ...`. Samplers
    and schedules that AUTOMATIC1111's lists hold are written as there, others by our names.

    Args:
        settings: read here are `prompt`, `negative`, `steps`, `sampler`, `schedule`, `guidance`, `seed`,
            `width`, `height`, `model_hash` (its first ten digits are written), `model`, `vae` and `vae_hash` (or
            `opening`), `variation` with `variation_strength` (or `strength`), `strength` (or that of `edit`),
            `clip_skip`, `hires` with `hires_strength` (or what a finished picture has under `hires`) and
            `other` (a dict of further names and values). What is missing, None or empty is left out.
    """
    pairs = [(_LABELS[key], value) for key, value in _values(settings).items()]
    pairs += [*(settings.get("other") or {}).items(), ("Version", f"Sfumato {_version()}")]
    line = ", ".join(f"{label}: {_quoted(value)}" for label, value in pairs if value not in (None, ""))
    prompt, negative = (settings.get(key) or "" for key in ("prompt", "negative"))
    return f"{prompt}\n{f'{_NEGATIVE} {negative}' if negative else ''}".strip() + f"\n{line}"


def _values(settings: Settings) -> dict[str, Any]:
    """What stands behind each label, in their order."""
    values = {key: settings.get(key) for key in _LABELS}
    values["sampler"] = _SAMPLERS.get(str(values["sampler"]), values["sampler"])
    values["schedule"] = _SCHEDULES.get(str(values["schedule"]), values["schedule"])
    if isinstance(values["clip_skip"], int):
        values["clip_skip"] += 1  # A1111 counts the layer whose output is taken, from the end
    if settings.get("width") is not None and settings.get("height") is not None:
        values["size"] = f"{settings['width']}x{settings['height']}"
    if isinstance(vae := _within(settings, "opening").get("vae"), Mapping):
        values |= {"vae": PurePath(str(vae.get("path", ""))).name, "vae_hash": vae.get("sha256")}
    for key in ("model_hash", "vae_hash"):
        values[key] = str(values[key])[:10] if values[key] else None
    return values | _strengths(settings) | _passes(settings)


def _strengths(settings: Settings) -> dict[str, Any]:
    """Of the variation, which a finished picture has under `strength`, and of what is forgotten of a picture."""
    own, told = settings.get("strength"), {"variation_strength": settings.get("variation_strength")}
    if settings.get("variation") is not None and told["variation_strength"] is None:
        own, told = None, {"variation_strength": own}
    if settings.get("hires_strength") is not None:
        own = settings["hires_strength"]
    return told | {"strength": _within(settings, "edit").get("strength", own)}


def _passes(settings: Settings) -> dict[str, Any]:
    """Of a finished picture with two passes: the size of the first, and how the second one changes it."""
    first = _within(settings, "hires")
    smaller, larger = ([one.get(side, 0) for side in ("width", "height")] for one in (first, settings))
    if not all(isinstance(side, int) and side > 0 for side in (*smaller, *larger)):
        return {}
    factor = larger[0] / smaller[0]
    told = {"size": f"{smaller[0]}x{smaller[1]}", "strength": first.get("strength")}
    for digits in (1, 2, 3):
        scale = round(factor, digits)
        if all(round(side * scale) == wanted for side, wanted in zip(smaller, larger, strict=True)):
            return told | {"hires": f"{scale:g}"}
    return told | {"hires": None, "resize": f"{larger[0]}x{larger[1]}"}


def _within(settings: Settings, key: str) -> Settings:
    """A dict among the settings, empty where there is none."""
    value = settings.get(key)
    return value if isinstance(value, Mapping) else {}


def parse_infotext(text: str) -> dict[str, Any]:
    """Read the `parameters` text of Stable Diffusion front ends into the keys that `infotext` writes.

    The last line counts as settings if it holds at least three `name: value` pairs; else it is prompt. Names
    that have no key here, and values that do not read as the number they should be, are kept as text under
    `other`; the program's own name is under `version`. Nothing is filled in that the text does not say.
    `width` and `height` are the first pass's where there are two; the strength of the second is `hires_strength`.

    Raises:
        UserError: the last line is longer than 100,000 characters.
    """
    *lines, last = text.strip().split("\n")
    if len(last) > _LONGEST_LINE:
        raise UserError(
            f"the settings line of the picture's text has {len(last)} characters; "
            f"at most {_LONGEST_LINE} are read"
        )
    pairs = _PAIR.findall(last)
    if len(pairs) < 3:
        lines, pairs = [*lines, last], []
    parts: dict[str, list[str]] = {"prompt": []}
    current = "prompt"
    for line in (line.strip() for line in lines):
        if line.startswith(_NEGATIVE):
            current, line = "negative", line.removeprefix(_NEGATIVE).strip()
        parts.setdefault(current, []).append(line)
    settings: dict[str, Any] = {key: "\n".join(found) for key, found in parts.items()}
    for label, value in pairs:
        _keep_pair(settings, label.strip(), _unquoted(value.strip()))
    _sort_strengths(settings)
    return settings if text.strip() else {}


def _keep_pair(settings: dict[str, Any], label: str, value: str) -> None:
    key = "version" if label == "Version" else _KEYS.get(label)
    size = re.fullmatch(r"(\d{1,9})x(\d{1,9})", value)
    if key == "size" and size:
        settings["width"], settings["height"] = int(size[1]), int(size[2])
        return
    try:
        if key is not None and key != "size":
            settings[key] = _TYPES.get(key, str)(value)
            return
    except ValueError:
        pass  # not the number that belongs here: kept as it stands, below
    settings.setdefault("other", {})[label] = value


def _sort_strengths(settings: dict[str, Any]) -> None:
    """One label stands for two strengths; and a variation without one says nothing."""
    other = settings.get("other", {})
    if "strength" in settings and ("hires" in settings or _LABELS["resize"] in other):
        settings["hires_strength"] = settings.pop("strength")
    if ("variation" in settings) != ("variation_strength" in settings):
        key = "variation" if "variation" in settings else "variation_strength"
        settings.setdefault("other", {})[_LABELS[key]] = str(settings.pop(key))


def _layers(skip: int) -> int:
    """A1111's clip skip as the number of layers that are left out."""
    if skip < 1:
        raise ValueError(skip)
    return skip - 1


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,\n:]|^"', text) else text


def _unquoted(text: str) -> str:
    if len(text) < 2 or text[0] != '"' or text[-1] != '"':
        return text
    try:
        return str(json.loads(text))
    except ValueError:
        return text


def _version() -> str:
    try:
        return importlib.metadata.version("sfumato")
    except importlib.metadata.PackageNotFoundError:
        return "(source tree)"


# --- other programs -----------------------------------------------------------------------------------------------

_INVOKE = ("invokeai_metadata", "sd-metadata", "Dream", "dream")
_NOVEL = ("uc", "sampler", "v4_prompt")

# ComfyUI's class of node, its input -> our name
_NODES = {
    ("CheckpointLoaderSimple", "ckpt_name"): "model",
    ("VAELoader", "vae_name"): "vae",
    ("EmptyLatentImage", "width"): "width",
    ("EmptyLatentImage", "height"): "height",
}
_KSAMPLER: dict[str, tuple[str, type | tuple[type, ...]]] = {
    "seed": ("seed", int),
    "steps": ("steps", int),
    "cfg": ("guidance", (int, float)),
    "sampler_name": ("sampler", str),
    "scheduler": ("schedule", str),
}
_READ = {"KSampler", "CLIPTextEncode", "VAEDecode", "SaveImage", "PreviewImage", *(name for name, _ in _NODES)}


def program_of(texts: Mapping[str, str]) -> str | None:
    """Which program's settings a picture's texts (name -> text, as in a PNG) hold, beside A1111's; None for nobody's.

    >>> program_of({"sd-metadata": "{}"}), program_of({"Comment": "Created with GIMP"})
    ('InvokeAI', None)
    """
    if any(name in texts for name in _INVOKE):
        return "InvokeAI"
    graphs = [_object(texts.get(name, "")) for name in ("prompt", "workflow")]
    if "nodes" in graphs[1] or any(isinstance(one, Mapping) and "class_type" in one for one in graphs[0].values()):
        return "ComfyUI"
    comment = _object(texts.get("Comment", ""))
    if texts.get("Software") == "NovelAI" or any(name in comment for name in _NOVEL):
        return "NovelAI"
    return None


def parse_comfy(text: str) -> dict[str, Any] | None:
    """Read ComfyUI's graph (its text `prompt`) into the keys that `parse_infotext` gives, or None where it is not
    plain: one KSampler that follows a text. Away from what it leads is read where that is a text too.

    Nodes that change the picture and are not read are named under `other`.
    """
    graph = {key: node for key, node in _object(text).items() if isinstance(node, Mapping)}
    kinds = [str(node.get("class_type")) for node in graph.values()]
    if sum("ksampler" in kind.casefold() or "samplercustom" in kind.casefold() for kind in kinds) != 1:
        return None
    if "KSampler" not in kinds:
        return None
    given = _within(next(node for node in graph.values() if node.get("class_type") == "KSampler"), "inputs")
    prompt, negative = (_words(graph, given.get(name)) for name in ("positive", "negative"))
    values = {ours: given.get(theirs) for theirs, (ours, _) in _KSAMPLER.items()}
    fit = all(isinstance(given.get(name), kind) for name, (_, kind) in _KSAMPLER.items())
    if prompt is None or not fit:
        return None
    settings = {"prompt": prompt} | ({"negative": negative} if negative else {}) | values
    for (kind, name), ours in _NODES.items():
        found = [_within(node, "inputs").get(name) for node in graph.values() if node.get("class_type") == kind]
        if len(found) == 1 and isinstance(found[0], str | int):
            settings[ours] = found[0]
    if isinstance(given.get("denoise"), int | float) and given["denoise"] < 1:
        settings["strength"] = given["denoise"]
    if unread := sorted(set(kinds) - _READ):
        settings["other"] = {"Nodes that are not read": ", ".join(unread)}
    return settings | {"version": "ComfyUI"}


def _words(graph: Settings, link: Any) -> str | None:
    """The text that a link of ComfyUI's graph leads to, None where that is not a text as it stands."""
    node = _within(graph, str(link[0])) if isinstance(link, list) and link else {}
    text = _within(node, "inputs").get("text")
    return text if node.get("class_type") == "CLIPTextEncode" and isinstance(text, str) else None


def _object(text: str) -> dict[str, Any]:
    """A JSON object, empty where the text is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
