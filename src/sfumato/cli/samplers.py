"""`sfumato samplers` and `sfumato schedules`: what the two options of `sfumato generate` may be.

>>> described = list_of_samplers()
>>> next(one["order"] for one in described if one["name"] == "heun")
2
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


def samplers(as_json: AsJson = False) -> None:
    """List the samplers: name, order, evaluations a step, and what other programs call them."""
    _show(list_of_samplers(), as_json, ("name", "title", "order", "evaluations", "noise", "also known as"))


def schedules(as_json: AsJson = False) -> None:
    """List the spacings of steps, and what other programs call them."""
    _show(list_of_schedules(), as_json, ("name", "title", "also known as"))
    if not as_json:
        print("\nalso respacing specs: 250, ddim50, 10,15,20 (so many steps in each equal section)")


def list_of_samplers() -> list[dict[str, Any]]:
    """Every sampler: name, title, order, evaluations of the network in a step, whether it draws noise, aliases."""
    from sfumato.diffusion.solvers import SOLVERS

    return [
        {
            "name": method.name, "title": method.title, "order": method.order, "evaluations": method.evaluations,
            "stochastic": method.stochastic, "schedule": method.schedule, "aliases": list(method.aliases),
        }
        for _, method in sorted(SOLVERS.items())
    ]  # fmt: skip


def list_of_schedules() -> list[dict[str, Any]]:
    """Every spacing: name, title, what it is, aliases."""
    from sfumato.diffusion import grid as grids
    from sfumato.diffusion import solvers  # noqa: F401  (a spacing may be named there)

    return [
        {"name": one.name, "title": one.title, "summary": one.summary, "aliases": list(one.aliases)}
        for _, one in sorted(grids.GRIDS.items())
    ]


def _show(described: Sequence[Mapping[str, Any]], as_json: bool, columns: Sequence[str]) -> None:
    if as_json:
        print(json.dumps(described, indent=1, ensure_ascii=False))
        return
    rows = [list(columns), *([_cell(one, column) for column in columns] for one in described)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _cell(one: Mapping[str, Any], column: str) -> str:
    if column == "also known as":
        return ", ".join(one["aliases"])
    if column == "noise":
        return "yes" if one["stochastic"] else "no"
    return str(one[column])
