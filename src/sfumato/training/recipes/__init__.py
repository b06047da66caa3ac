"""Recipes: what can be trained. A method is one Python file here; a ready-made run of it is one YAML file beside it.

>>> "ddpm-emoji32" in names()
True
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from sfumato import models
from sfumato.checkpoints.io import read_header, stored_config
from sfumato.errors import UserError, nearest, raise_unknown
from sfumato.systems.config import parse
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
    where, text = source(name_or_file)
    values = read_yaml(text, where)
    for override in overrides:
        _override(values, override)
    if data is not None:
        _override_value(values, "data.path", data)
    if codec is not None:
        _override_value(values, "codec", codec)
    _take_data_of_codec(values)
    method = values.get("recipe")
    if not isinstance(method, str) or method not in METHODS:
        hint = nearest(str(method), METHODS)
        raise UserError(f"{where}: recipe must be one of {', '.join(METHODS)}, got {method!r}{hint}")
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
