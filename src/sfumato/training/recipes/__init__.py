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

from sfumato.errors import UserError, nearest, raise_unknown
from sfumato.systems.config import parse
from sfumato.training.recipes.ddpm import DDPMRecipe

Recipe = DDPMRecipe

METHODS: dict[str, type[Recipe]] = {"ddpm": DDPMRecipe}

_MAX_YAML = 2**20


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


def load(name_or_file: str, overrides: Sequence[str] = (), data: str | None = None) -> Recipe:
    """A recipe with `key=value` overrides (dotted keys, YAML values) and the data path put in.

    Raises:
        UserError: YAML that cannot be read (with its line), an unknown key (nearest named), a value out of range.
    """
    where, text = source(name_or_file)
    values = read_yaml(text, where)
    for override in overrides:
        _override(values, override)
    if data is not None:
        _override_value(values, "data.path", data)
    method = values.get("recipe")
    if method not in METHODS:
        hint = nearest(str(method), METHODS)
        raise UserError(f"{where}: recipe must be one of {', '.join(METHODS)}, got {method!r}{hint}")
    if isinstance(values.get("data", {}), dict) and "path" not in values.get("data", {}):
        raise UserError(f"{where} names no data; give --data FOLDER, or data.path in the recipe")
    recipe = parse(METHODS[method], values, where)
    try:
        recipe.check()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return recipe


def read_yaml(text: str, where: str) -> dict[str, Any]:
    """A YAML mapping, aliases refused. Raises `UserError` with the line of the first problem."""
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise UserError(f"{where}: YAML aliases are not allowed")
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or "not readable"
        raise UserError(f"{where}:{line} malformed YAML ({problem})") from None
    except RecursionError:
        raise UserError(f"{where}: YAML nested too deeply") from None
    if not isinstance(values, dict):
        raise UserError(f"{where}: a recipe is a mapping of keys to values")
    return values


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r} is not understood; write key=value, e.g. train.steps=1000")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
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
