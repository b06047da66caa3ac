"""A data set of synthetic scenes: one to three shapes of different kinds and colours on white, none overlapping.

Each picture comes with a caption ("a red circle and a blue square"), the boxes of its shapes (in fractions of width
and height), a map with a class for every pixel, and a label. Small enough to draw in seconds and simple enough that a
test can see whether a model obeys. The same count, size and seed give the same bytes; scenes that are held out for
validation are no training scenes.

>>> scene = scene_of(seed=0, number=1, size=32)
>>> scene.caption, scene.shapes[0].box(32)
('a blue circle, a purple triangle and a green square', [0.1875, 0.09375, 0.34375, 0.34375])
>>> picture, classes = drawn(scene)
>>> picture.size, classes.mode, CLASSES[classes.getextrema()[1]]
((32, 32), 'P', 'purple triangle')
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from sfumato.checkpoints.io import explain_os_error
from sfumato.errors import UserError

KINDS = ("circle", "square", "triangle")
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 80, 200),
    "yellow": (240, 200, 30),
    "purple": (150, 60, 190),
}
CLASSES = ("ground", *(f"{colour} {kind}" for colour in COLOURS for kind in KINDS))
"""Names of the classes of a map, by value."""

HELD_OUT = 10
"""One picture in so many is for validation."""

_FINE = 4  # pictures are drawn so many times as large, then made small: smooth borders
_NUMBERS = ("one shape", "two shapes", "three shapes")


@dataclass(frozen=True)
class Shape:
    """One shape: left, top and side of its square in pixels."""

    kind: str
    colour: str
    left: int
    top: int
    side: int

    @property
    def name(self) -> str:
        """Such as "red circle"."""
        return f"{self.colour} {self.kind}"

    def apart_from(self, other: Shape) -> bool:
        """Whether at least a pixel lies between both squares."""
        return (
            self.left > other.left + other.side
            or other.left > self.left + self.side
            or self.top > other.top + other.side
            or other.top > self.top + self.side
        )

    def box(self, size: int) -> list[float]:
        """[x, y, width, height] in fractions of a picture of `size` pixels."""
        return [self.left / size, self.top / size, self.side / size, self.side / size]


@dataclass(frozen=True)
class Scene:
    """Shapes on white, in a picture of `size` x `size` pixels."""

    size: int
    shapes: tuple[Shape, ...]

    @property
    def caption(self) -> str:
        """Such as "a red circle, a green triangle and a blue square"."""
        names = [f"a {shape.name}" for shape in self.shapes]
        return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)

    @property
    def layout(self) -> frozenset[Shape]:
        """The scene without the order of its shapes."""
        return frozenset(self.shapes)


def scene_of(seed: int, number: int, size: int, attempt: int = 0) -> Scene:
    """Scene `number` of a set; another `attempt` gives another scene."""
    chance = random.Random(f"shapes {seed} {number} {attempt}")
    count = chance.randint(1, len(KINDS))
    names = list(zip(chance.sample(KINDS, count), chance.sample(list(COLOURS), count), strict=True))
    while True:
        shapes: list[Shape] = []
        for kind, colour in names:
            side = chance.randint(round(0.25 * size), round((0.55 - 0.07 * count) * size))
            left, top = (chance.randint(1, size - side - 1) for _ in range(2))
            shapes.append(Shape(kind, colour, left, top, side))
        if all(a.apart_from(b) for i, a in enumerate(shapes) for b in shapes[:i]):
            return Scene(size, tuple(shapes))


def drawn(scene: Scene) -> tuple[Image.Image, Image.Image]:
    """The picture (RGB) and its map (a palette whose numbers are those of `CLASSES`)."""
    fine = scene.size * _FINE
    picture = Image.new("RGB", (fine, fine), "white")
    classes = Image.new("P", (scene.size, scene.size), 0)
    classes.putpalette([value for name in CLASSES for value in _colour_of(name)])
    for shape in scene.shapes:
        mask = Image.new("L", (fine, fine), 0)
        _fill(ImageDraw.Draw(mask), shape)
        picture.paste(COLOURS[shape.colour], mask=mask)
        small = mask.resize(classes.size, Image.Resampling.BOX).point([0] * 128 + [255] * 128)
        classes.paste(CLASSES.index(shape.name), mask=small)
    return picture.resize((scene.size, scene.size), Image.Resampling.BOX), classes


def _colour_of(name: str) -> tuple[int, int, int]:
    """Of a class, in the palette of maps: its shape's colour, darker for each kind."""
    if name == CLASSES[0]:
        return 255, 255, 255
    colour, kind = name.split()
    red, green, blue = (value * (4 - KINDS.index(kind)) // 4 for value in COLOURS[colour])
    return red, green, blue


def _fill(pen: ImageDraw.ImageDraw, shape: Shape) -> None:
    """Fill one shape on a canvas that is finer than the scene."""
    left, top, side = (value * _FINE for value in (shape.left, shape.top, shape.side))
    right, bottom = left + side - 1, top + side - 1
    if shape.kind == "circle":
        pen.ellipse((left, top, right, bottom), fill=255)
    elif shape.kind == "square":
        pen.rectangle((left, top, right, bottom), fill=255)
    else:
        pen.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=255)


def scenes(count: int, size: int, seed: int) -> tuple[list[Scene], list[Scene]]:
    """Those to train on and those held out, whose layouts are none of the others'."""
    held_out = max(1, count // HELD_OUT)
    training = [scene_of(seed, number, size) for number in range(count - held_out)]
    known = {scene.layout for scene in training}
    validation: list[Scene] = []
    for number in range(count - held_out, count):
        attempt = 0
        while (scene := scene_of(seed, number, size, attempt)).layout in known:
            attempt += 1
        validation.append(scene)
    return training, validation


def row_of(scene: Scene) -> dict[str, Any]:
    """The columns of a picture in `metadata.jsonl`; `places` are its boxes without their colours."""
    return {
        "text": scene.caption,
        "label": _NUMBERS[len(scene.shapes) - 1],
        "boxes": [{"label": shape.name, "box": shape.box(scene.size)} for shape in scene.shapes],
        "places": [{"label": shape.kind, "box": shape.box(scene.size)} for shape in scene.shapes],
    }


def prepare(
    out: Path, count: int = 4000, size: int = 32, seed: int = 0, on_progress: Callable[[int, int], None] | None = None
) -> tuple[int, int]:
    """Write a set: `metadata.jsonl`, `pictures/` and `maps/`.

    Args:
        out: a folder that is empty or not there yet.
        count: of pictures, at least 2; one in ten is for validation.
        size: of a side, 16 to 512 pixels.

    Returns:
        How many there are to train on and to validate with.

    Raises:
        UserError: for other numbers, or a folder that has something in it or cannot be written.
    """
    if count < 2:
        raise UserError(f"a set has at least 2 pictures, one of them for validation, got {count}")
    if not 16 <= size <= 512:
        raise UserError(f"pictures of shapes have 16 to 512 pixels, got {size}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already and is not an empty folder; choose another one")
    training, validation = scenes(count, size, seed)
    try:
        for name in ("pictures", "maps"):
            (out / name).mkdir(parents=True)
        rows = []
        for number, scene in enumerate([*training, *validation]):
            rows.append(_write(scene, out, number, "train" if number < len(training) else "validation"))
            if on_progress is not None:
                on_progress(number + 1, count)
        (out / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"could not write to {out}: {explain_os_error(error)}") from None
    return len(training), len(validation)


def _write(scene: Scene, out: Path, number: int, split: str) -> str:
    """Write picture and map; returns the row."""
    picture, classes = drawn(scene)
    names = {"file_name": f"pictures/{number:05}.png", "map": f"maps/{number:05}.png"}
    picture.save(out / names["file_name"], "PNG")
    classes.save(out / names["map"], "PNG")
    return json.dumps(names | {"split": split} | row_of(scene))
