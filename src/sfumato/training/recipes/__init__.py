"""Recipes: what can be trained. A method is one Python file here; a ready-made run of it is one YAML file beside it.

A file says under `recipe` which ready-made one it changes: what it leaves out is taken from there, as with overrides on
the command line. Under `method` it names the method alone and takes what it leaves out from the method's defaults; so
do the ready-made ones and the `config.yaml` of a run.

>>> "ddpm-emoji32" in names()
True
>>> merged({"train": {"steps": 9, "batch": 4}}, {"train": {"steps": 7}})
{'train': {'steps': 7, 'batch': 4}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from sfumato import models
from sfumato.checkpoints.io import read_header, stored_config
from sfumato.diffusion import grid as grids
from sfumato.errors import UserError, nearest, raise_unknown
from sfumato.systems.config import CONTINUOUS, SamplingConfig, parse
from sfumato.training.config import TrainConfig
from sfumato.training.recipes.autoencoder import AutoencoderRecipe
from sfumato.training.recipes.clip import CLIPRecipe
from sfumato.training.recipes.ddpm import DDPMRecipe
from sfumato.training.recipes.latent import PIXELS, LatentRecipe

Recipe = DDPMRecipe | AutoencoderRecipe | LatentRecipe | CLIPRecipe

METHODS: dict[str, type[DDPMRecipe] | type[AutoencoderRecipe] | type[LatentRecipe] | type[CLIPRecipe]] = {
    "autoencoder": AutoencoderRecipe,
    "clip": CLIPRecipe,
    "ddpm": DDPMRecipe,
    "latent": LatentRecipe,
}

_STEPS = {"model.sampling.steps": SamplingConfig().steps, "train.sample_steps": TrainConfig().sample_steps}
_MAX_YAML = 2**20
_MAX_DEPTH = 30


def names() -> list[str]:
    """The recipes that come with the package."""
    folder = resources.files(__name__)
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def source(name_or_file: str) -> tuple[str, str]:
    """(where it is from, its YAML text) of a recipe by name, or of a file when that ends in .yaml or .yml.

    Raises:
        UserError: an unknown recipe (the nearest is named), a missing or oversized file.
    """
    if name_or_file.endswith((".yaml", ".yml")):
        path = Path(name_or_file)
        if not path.is_file():
            raise UserError(f"no recipe file at {path}")
        if path.stat().st_size > _MAX_YAML:
            raise UserError(f"{path} is larger than a recipe can be ({_MAX_YAML} bytes)")
        try:
            return str(path), path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read as text: {error}") from None
    if name_or_file not in names():
        raise_unknown("recipe", name_or_file, names())
    return name_or_file, (resources.files(__name__) / f"{name_or_file}.yaml").read_text(encoding="utf-8")


def load(
    name_or_file: str, overrides: Sequence[str] = (), data: str | None = None, codec: str | None = None
) -> Recipe:
    """A recipe with `key=value` overrides (dotted keys, YAML values) and the paths of data and codec put in.

    A codec that is a run also says which data to take, and how, where nothing else does.

    Raises:
        UserError: YAML that cannot be read (with its line), an unknown key (nearest named), a value out of range.
    """
    where, values, own = _layers(name_or_file)
    for override in overrides:
        _override(values, override)
        _override(own, override)
    if data is not None:
        _override_value(values, "data.path", data)
    if codec is not None:
        _override_value(values, "codec", codec)
    _take_data_of_codec(values)
    method = values.get("recipe")
    if not isinstance(method, str) or method not in METHODS:
        raise UserError(f"{where}: recipe cannot be changed by an override; name the other recipe instead")
    _fit_steps(values, own)
    named = values.get("codec")
    if method == "latent" and named is None:
        raise UserError(f"{where} names no codec; give --codec RUN of a first stage, or codec=pixels for none")
    if method == "autoencoder" and named is None and values.get("model") is None:
        raise UserError(f"{where} names neither a model nor a codec; give --codec RUN of the one to train on")
    known = [*models.names(), *[PIXELS] * (method == "latent")]
    if isinstance(named, str) and named not in known and not Path(named).exists():
        raise UserError(f"{where}: there is no codec at {named}{nearest(named, models.names())}")
    if isinstance(values.get("data", {}), dict) and "path" not in values.get("data", {}):
        raise UserError(f"{where} names no data; give --data FOLDER, or data.path in the recipe")
    recipe = parse(METHODS[method], values, where)
    try:
        recipe.check()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return recipe


def read_values(name_or_file: str) -> tuple[str, dict[str, Any]]:
    """(where it is from, its settings) of a recipe: with those that a file inherits, and its method under `recipe`.

    Raises:
        UserError: as `source` and `read_yaml`; a file that names neither a recipe nor a method.
    """
    where, values, _ = _layers(name_or_file)
    return where, values


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, those `above` first. Conditions, and a group of another name or kind, replace what is below."""
    result = dict(below)
    for key, value in above.items():
        under = below.get(key)
        if key == "conditions" or not isinstance(value, Mapping) or not isinstance(under, Mapping):
            result[key] = value
        else:
            other = any(mark in value and value[mark] != under.get(mark) for mark in ("name", "kind"))
            result[key] = dict(value) if other else merged(under, value)
    return result


def _layers(name_or_file: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(where it is from, all settings, those that are the user's own) of a recipe by name or file."""
    where, text = source(name_or_file)
    own = read_yaml(text, where)
    if "method" in own:
        method = own.pop("method")
        if "recipe" in own:
            raise UserError(f"{where}: recipe and method each say what is trained; leave one of them out")
        if not isinstance(method, str) or method not in METHODS:
            hint = nearest(str(method), METHODS)
            raise UserError(f"{where}: method must be one of {', '.join(METHODS)}, got {method!r}{hint}")
        values = {"recipe": method, **own}
        return where, values, own if name_or_file.endswith((".yaml", ".yml")) else {}
    base, known = own.get("recipe"), sorted({*names(), *METHODS})
    if not isinstance(base, str) or base not in known:
        raise UserError(f"{where}: recipe must be one of {', '.join(known)}, got {base!r}{nearest(str(base), known)}")
    if base not in names() or _written_out(own):
        return where, dict(own), own
    below = {key: value for key, value in _layers(base)[1].items() if key != "description"}
    own = {key: value for key, value in own.items() if key != "recipe"}
    return where, merged(below, own), own


def _written_out(values: Mapping[str, Any]) -> bool:
    """Whether this is the config of an older run, which holds every setting though it names its method as a recipe."""
    every = ("keep", "export", "validation_pictures", "ema.warmup", "optimizer.eps", "optimizer.clip_norm")
    return all(_at(values, f"train.{key}") is not None for key in every)


def _fit_steps(values: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Lower the numbers of sampling steps that nobody asked for to those that a short table of noise levels has, and
    take those of a respacing spec from it."""
    table, name = _at(values, "model.schedule.steps"), _at(values, "model.schedule.name")
    spacing = _at(values, "model.sampling.schedule")
    spaced = grids.spec_steps(spacing) if isinstance(spacing, str) else None
    if values["recipe"] not in ("ddpm", "latent"):
        return
    if spaced is not None and _at(own, "train.sample_steps") is None:
        _override_value(values, "train.sample_steps", spaced)
    if name in CONTINUOUS or not isinstance(table, int) or isinstance(table, bool) or table < 1:
        return
    for key, usual in _STEPS.items():
        steps = _at(values, key)
        if _at(own, key) is None and (usual if steps is None else steps) > table:
            _override_value(values, key, table)


def _at(values: Mapping[str, Any], key: str) -> Any:
    """What stands at a dotted key, None for nothing."""
    inner: Any = values
    for part in key.split("."):
        inner = inner.get(part) if isinstance(inner, Mapping) else None
    return inner


def _take_data_of_codec(values: dict[str, Any]) -> None:
    """Put what the codec's run says of its data, or its file of its size, before what the recipe says."""
    codec, own = values.get("codec"), values.get("data", {})
    if not isinstance(codec, str) or not isinstance(own, dict):
        return
    file = models.weights(codec) if codec in models.names() else Path(codec)
    if file.is_file() and "size" not in own:
        stored = stored_config(file, read_header(file)) or {}
        values["data"] = own | ({"size": stored["size"]} if "size" in stored else {})
    config = Path(codec) / "config.yaml"
    if not config.is_file():
        return
    learnt = read_yaml(source(str(config))[1], str(config)).get("data", {})
    if isinstance(learnt, dict):
        values["data"] = {key: value for key, value in learnt.items() if key != "cache_bytes"} | own


def read_yaml(text: str, where: str) -> dict[str, Any]:
    """A YAML mapping; aliases and repeated keys are refused. Raises `UserError` with the line of the first problem."""
    try:
        _refuse_bombs(text, where)
        if (repeated := _repeated_key(yaml.compose(text, Loader=yaml.SafeLoader))) is not None:
            raise UserError(f"{where}:{_line(repeated.start_mark)} the key {repeated.value!r} comes twice")
        values = yaml.safe_load(text)
    except UserError:
        raise
    except yaml.YAMLError as error:
        line = _line(getattr(error, "problem_mark", None))
        problem = getattr(error, "problem", None) or "not readable"
        raise UserError(f"{where}:{line} malformed YAML ({problem})") from None
    except ValueError as error:  # a date or number that looks right and is not
        raise UserError(f"{where}: malformed YAML ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{where}: a recipe is a mapping of keys to values")
    return values


def _refuse_bombs(text: str, where: str) -> None:
    """Raise `UserError` for what makes a small YAML text large: aliases, and nesting, which takes quadratic time."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"{where}:{_line(event.start_mark)} YAML aliases are not allowed")
        if depth > _MAX_DEPTH:
            raise UserError(f"{where}:{_line(event.start_mark)} YAML nested deeper than {_MAX_DEPTH} levels")


def _line(mark: Any) -> str:
    """The place of a YAML problem as a part of a sentence."""
    return f" line {mark.line + 1}:" if mark else ""


def _repeated_key(node: yaml.Node | None) -> yaml.ScalarNode | None:
    """The first key that a mapping somewhere under `node` has twice."""
    seen: set[str] = set()
    inner: list[yaml.Node] = list(node.value) if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    return key
                seen.add(key.value)
            inner.append(value)
    return next((found for child in inner if (found := _repeated_key(child)) is not None), None)


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r} is not understood; write key=value, e.g. train.steps=1000")
    try:
        _refuse_bombs(text, repr(key))
        value = yaml.safe_load(text)
    except UserError:
        raise
    except (yaml.YAMLError, ValueError):
        raise UserError(f"{override!r}: the value is not readable YAML") from None
    _override_value(values, key, value)


def _override_value(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    inner: Any = values
    for parent in parents:
        inner = inner.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise UserError(f"{key}: {parent} is a value, not a group of keys")
    inner[last] = value
