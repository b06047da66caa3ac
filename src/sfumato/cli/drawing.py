"""What `sfumato generate` and `sfumato edit` share: their options, and what becomes of the pictures.

>>> picture_path(Path("out"), 7).as_posix()
'out/7.png'
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli.options import first_seed_number, number, whole
from sfumato.errors import UserError, raise_unknown

if TYPE_CHECKING:
    from PIL import Image

    from sfumato.api import Model

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

_FRAME = re.compile(r"\d{3,}\.png")


def place(text: str | Path) -> Path:
    """A parser of where pictures go: a file or a folder."""
    if str(text) in ("", "-"):
        raise typer.BadParameter(f"{str(text)!r} is neither a file nor a folder (standard output takes no pictures)")
    return Path(text)


# --- options ---------------------------------------------------------------------------------------------------------

ModelName = Annotated[
    str | None, typer.Option(help="A name from `sfumato models ls`, a file, a run or a folder. [best in the box]")
]
Seed = Annotated[
    int | None,
    typer.Option(parser=first_seed_number, metavar="N", help="Of the first picture; picture i has seed + i."),
]
SameSeed = Annotated[
    bool, typer.Option("--same-seed", help="Each prompt begins with the first seed; files are <seed>-<prompt>.png.")
]
Prompts = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Prompts from a text file, one a line; # begins a remark.")
]
Count = Annotated[int, typer.Option(parser=whole(1), metavar="N", help="Pictures (of each prompt).")]
Steps = Annotated[int | None, typer.Option(parser=whole(1), metavar="N", help="Sampling steps. [the model's own]")]
Sampler = Annotated[
    str | None, typer.Option(help="One of `sfumato samplers`, by any of its names. [the model's own]")
]
Schedule = Annotated[
    str | None, typer.Option(help="Spacing of steps, one of `sfumato schedules`. [the sampler's or model's own]")
]
GuidanceScale = Annotated[
    float | None, typer.Option(parser=number(0), metavar="W", help="Classifier-free guidance; 1 is off.")
]
Rescale = Annotated[
    float, typer.Option(parser=number(0), metavar="PHI", help="Pull the spread of guided outputs back, 0 to 1.")
]
Interval = Annotated[
    str | None,
    typer.Option(metavar="LOW,HIGH", help="Noise-to-signal ratios between which guidance acts. [the model's own]"),
]
Negative = Annotated[str | None, typer.Option(help="What not to draw, for models that read text.")]
PerpNeg = Annotated[
    float | None,
    typer.Option(
        parser=number(0),
        metavar="W",
        help="Weight of what --negative does not share with the prompt (Perp-Neg); 0 is off. [the model's own]",
    ),
]
Label = Annotated[
    list[str] | None,
    typer.Option(help="A class of the model (see `sfumato info`); several are taken in turn; all for every one."),
]
Dialect = Annotated[
    str | None, typer.Option(help="How weights in prompts are written: a1111, comfy, compel or plain. [a1111]")
]
ClipSkip = Annotated[
    int | None, typer.Option(parser=whole(0), metavar="N", help="Last layers of CLIP's text tower to leave out.")
]
Fast = Annotated[
    int | None,
    typer.Option(parser=whole(1), metavar="LEVEL", help="Nearly the same picture for less work: 1, 2 or 3. [exact]"),
]
Vae = Annotated[Path | None, typer.Option(help="Another first stage: a file, a run or a folder.")]
Predicts = Annotated[str | None, typer.Option(metavar="eps|v", help="What a foreign file's network predicts.")]
Ema = Annotated[bool, typer.Option("--ema", help="Read the averaged weights that some files keep apart.")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Open .ckpt and .bin, by a reader that runs nothing in them.")
]
Tiles = Annotated[str, typer.Option(help="Decode in tiles: auto (where memory is short), always or never.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda …")]
Backend = Annotated[str, typer.Option(help="Who computes the networks: auto (torch), torch, compile or openvino.")]
Offload = Annotated[
    str,
    typer.Option(
        help="Weights that rest where there is room: auto, never; for a small GPU networks or blocks; for a CPU with "
        "little memory half."
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        parser=place, metavar="PATH", help="FILE.png for one picture or a sheet; a folder takes <seed>.png."
    ),
]
Sheet = Annotated[bool, typer.Option("--sheet", help="One contact sheet of all pictures.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
AsJson = Annotated[bool, typer.Option("--json", help="Describe what was made as JSON.")]
Previews = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Write what the picture is becoming there, step by step.")
]


def interval(text: str | None) -> tuple[float, float] | None:
    """Two numbers with a comma between them."""
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--guidance-interval takes two numbers, LOW,HIGH; got {text!r}") from None
    return low, high


def prompts(given: list[str] | None, file: Path | None) -> list[str]:
    """The prompts of the command line, or those of a file: its lines without empty ones and those that begin with #."""
    if file is None:
        for text in given or []:
            with suppress(OSError, ValueError):
                if Path(text).suffix and Path(text).suffix.lower() not in _SUFFIXES and Path(text).is_file():
                    tell_notes([f"the prompt {text!r} is the name of a file; --prompts {text} reads prompts from it"])
        return list(given or [])
    if given:
        raise UserError("prompts stand on the command line or in the file of --prompts; give one of them")
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not a text file in UTF-8, which prompts must be") from None
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise UserError(f"{file} holds no prompt")
    return found


def numbers(text: str | None, option: str, what: str) -> tuple[int, int, int, int] | None:
    """Four whole numbers with commas between them."""
    if text is None:
        return None
    try:
        a, b, c, d = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} takes four whole numbers, {what}; got {text!r}") from None
    return a, b, c, d


def opened(
    model: str | None,
    *,
    device: str,
    dtype: str,
    vae: Path | None,
    prediction: str | None,
    ema: bool,
    allow_pickle: bool,
    tiles: str,
    backend: str = "auto",
    offload: str = "auto",
) -> Model:
    """Open the model, and say what a user should know of it."""
    from sfumato import api
    from sfumato.backends.devices import native_bfloat16

    if prediction not in (None, "eps", "v"):
        raise_unknown("prediction", str(prediction), ["eps", "v"])
    found = api.load(
        model, device=device, dtype=dtype, vae=vae, prediction=prediction or "unknown", averaged=ema,  # type: ignore[arg-type]
        allow_pickle=allow_pickle, tiles=tiles, backend=backend, offload=offload,
    )  # fmt: skip
    tell_notes(found.notes)
    if found.dtype == "bfloat16" and not native_bfloat16(found.device):
        tell_notes(["this device only emulates bfloat16, which is slow; --dtype auto takes what suits it"])
    return found


def tell_notes(notes: Iterable[str]) -> None:
    """Say, on stderr, what a user should know, a sentence each."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


# --- where pictures go -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Destination:
    """Where pictures go.

    Attributes:
        out: a file or a folder.
        total: how many pictures.
        sheet, overwrite: as on the command line.
        same: all have one seed, so that the folder's names are numbered.
        each: how many pictures each of several prompts has from the same seeds, so that names say which; None where
            seeds run on.
    """

    out: Path
    total: int
    sheet: bool
    overwrite: bool
    same: bool = False
    each: int | None = None

    @property
    def single(self) -> bool:
        """Whether it is a file."""
        return self.out.suffix.lower() in _SUFFIXES

    def check(self, seed: int | None, previews: Path | None, given: Mapping[str, Path | None]) -> None:
        """Refuse what is impossible before anything is loaded.

        Args:
            seed: of the first picture, where it was said.
            previews: the folder of previews.
            given: files that pictures are made from, by what they are; none of them may be written over.
        """
        self._check_out()
        if seed is not None and seed >= 2**63 - self.total:
            raise UserError(f"seed must be at least 0 and below 2^63, got {seed}")
        if seed is not None or self.single:
            refuse_inputs(self.paths(seed or 0), given)
        if previews is not None:
            self._check_previews(previews)

    def _check_previews(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file, not a folder")
        own = self.out.parent if self.single else self.out
        if folder.resolve() == own.resolve() and (not self.single or _FRAME.fullmatch(self.out.name)):
            raise UserError(f"previews and pictures would have the same names in {folder}; choose another --previews")
        frames = sorted(one.name for one in folder.glob("*.png") if _FRAME.fullmatch(one.name))
        if frames and not self.overwrite:
            raise UserError(
                f"{folder} holds previews already ({frames[0]}); choose another --previews, or add --overwrite"
            )

    def _check_out(self) -> None:
        out = self.out
        if out.suffix and not self.single and not out.is_dir():
            raise UserError(f"{out}: pictures are written as {', '.join(_SUFFIXES)}; without an ending it is a folder")
        if self.single and self.total > 1 and not self.sheet:
            raise UserError(
                f"{out} takes one picture, but {self.total} were asked for; name a folder, or add --sheet"
            )
        if self.single and not self.overwrite:
            _refuse_existing([out])
        folder = out.parent if self.single else out
        for path in (folder, *folder.parents):
            if path.exists() and not path.is_dir():
                raise UserError(f"{path} is a file, not a folder")

    def paths(self, seed: int) -> list[Path]:
        """The files, given the first seed; those that exist are refused."""
        if self.sheet:
            found = [self.out if self.single else self.out / f"sheet-{seed}.png"]
        elif self.single:
            found = [self.out]
        elif self.same:
            found = [self.out / f"{seed}-{i}.png" for i in range(self.total)]
        elif self.each is not None and self.each < self.total:
            found = [self.out / f"{seed + i % self.each}-{i // self.each}.png" for i in range(self.total)]
        else:
            found = [picture_path(self.out, seed + i) for i in range(self.total)]
        if not self.overwrite:
            _refuse_existing(found)
        return found


def picture_path(folder: Path, seed: int) -> Path:
    """Where the picture of that seed goes in a folder."""
    return folder / f"{seed}.png"


def first_seed(seed: int | None, as_json: bool) -> int:
    """The seed asked for, or a new one, which is said."""
    import secrets

    if seed is not None:
        return seed
    drawn = secrets.randbelow(2**32)
    if not as_json:
        print(f"seed {drawn}")
    return drawn


def _refuse_existing(paths: list[Path]) -> None:
    for path in paths:
        if path.exists():
            raise UserError(f"{path} exists already; choose another --out, or add --overwrite")


def refuse_inputs(paths: list[Path], given: Mapping[str, Path | None]) -> None:
    """Refuse to write over files that pictures are made from (by what they are)."""
    for path in paths:
        for what, source in given.items():
            if source is not None and path.exists() and source.exists() and path.samefile(source):
                raise UserError(f"{path} is the {what} itself, which a replay needs again; choose another --out")


# --- drawing and writing ---------------------------------------------------------------------------------------------


def make(
    draw: Callable[..., list[Image.Image]],
    model: Model,
    where: Destination,
    seed: int,
    as_json: bool,
    previews: Path | None,
) -> None:
    """Draw with a bar, write the files and tell their names.

    Args:
        draw: takes `on_step` and `on_plan`, gives the pictures.
    """
    paths = where.paths(seed)
    with _progress() as (plan, advance), _overflow_explained(), _previewing(model, previews, advance) as hook:
        pictures = draw(on_step=hook, on_plan=plan)
    with _folder(paths[0].parent):
        _save(pictures, paths, where, model)
    _tell(pictures, paths, as_json)


@contextmanager
def _previewing(model: Model, folder: Path | None, advance: Any) -> Iterator[Any]:
    """The hook of the bar, and with a folder one that writes what x0 is believed to be after every step."""
    if folder is None:
        yield advance
        return
    from sfumato.diffusion.hooks import chain
    from sfumato.images import save_picture

    folder.mkdir(parents=True, exist_ok=True)

    def show(step: int, picture: Image.Image) -> None:
        save_picture(picture, folder / f"{step:03d}.png", {}, overwrite=True)

    yield chain(model.preview_hook(show), advance)


@contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """Make a folder for what follows; if that fails, the folders made here are removed again where they are empty."""
    from sfumato.checkpoints.io import explain_os_error

    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        for path in made:
            with suppress(OSError):
                path.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"could not write to {folder}: {explain_os_error(error)}") from None
        raise


@contextmanager
def _overflow_explained() -> Iterator[None]:
    """A model whose result is no picture is not the user's error: one sentence and exit code 3."""
    from sfumato.images import PictureError

    try:
        yield
    except PictureError as error:
        print(f"sfumato: {error}", file=sys.stderr)
        raise typer.Exit(3) from None


@contextmanager
def _progress() -> Iterator[tuple[Callable[[int], None], Callable[..., Any]]]:
    """What is told the number of steps, and a hook for the sampling loop: a bar on a terminal, some lines elsewhere."""
    done = total = 0
    if not sys.stderr.isatty():

        def begin(steps: int) -> None:
            nonlocal total
            total = steps

        def quiet(x: Any, level: Any, prediction: Any, noise: Any) -> Any:
            nonlocal done
            done += prediction is not None
            if prediction is not None and (done == total or done % max(1, total // 5) == 0):
                print(f"step {done}/{total}", file=sys.stderr, flush=True)
            return x

        yield begin, quiet
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("drawing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("drawing", total=None)

        def show(x: Any, level: Any, prediction: Any, noise: Any) -> Any:
            if prediction is not None:
                bar.advance(task)
            return x

        yield (lambda steps: bar.update(task, total=steps)), show


def _save(pictures: list[Image.Image], paths: list[Path], where: Destination, model: Model) -> None:
    from sfumato import images

    if not where.sheet:
        for picture, path in zip(pictures, paths, strict=True):
            images.save_picture(picture, path, overwrite=where.overwrite)
        return
    first = dict(pictures[0].info["sfumato"])
    first.pop("batch")
    settings = first | {"sheet": [p.info["sfumato"]["seed"] for p in pictures]}
    said = [p.info["sfumato"].get("prompt") for p in pictures]
    if len(set(said)) > 1:
        settings = {key: value for key, value in settings.items() if key != "prompt"} | {"prompts": said}
    labels = [text or "" for text in said] if any(said) else None
    whole = images.sheet(pictures, labels=labels, scale=max(1, 128 // model.system.config.size))
    images.save_picture(whole, paths[0], settings, overwrite=where.overwrite)


def _tell(pictures: list[Image.Image], paths: list[Path], as_json: bool) -> None:
    if as_json:
        settings = [dict(p.info["sfumato"]) for p in pictures]
        print(json.dumps({"files": [str(p) for p in paths], "pictures": settings}, indent=1, ensure_ascii=False))
        return
    for path in paths:
        print(path)
