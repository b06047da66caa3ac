"""The parts of `sfumato evaluate` that compare sets of pictures: pictures, codec, text and floor.

>>> _line("real", {"PSNR dB": 30.12, "SSIM": 0.9})
'real: PSNR dB 30.12, SSIM 0.9'
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from sfumato.cli.options import number, whole
from sfumato.errors import UserError, raise_unknown

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sfumato.api import Model
    from sfumato.codecs import Codec
    from sfumato.evaluation.captioned import Captioned, Draw, Mapper, Reconstruct, Row, Ruler
    from sfumato.evaluation.judge import Judge
    from sfumato.systems.clip import CLIP
    from sfumato.training.data import PictureSet

Data = Annotated[Path, typer.Option(help="The real pictures, for training and held out: folder or parquet.")]
Fraction = Annotated[
    float, typer.Option(parser=number(0), metavar="F", help="Share that is held out where no split is named.")
]
Caption = Annotated[str, typer.Option(help="Column of --data that is the caption.")]
Style = Annotated[str, typer.Option(help="Column of --data that is the style; it may be absent.")]
Clip = Annotated[
    str | None, typer.Option(help="A CLIP for caption retrieval: name, file or run. [no retrieval, no style accuracy]")
]
Features = Annotated[
    Path | None, typer.Option(help="File of the Inception network's weights, which then is the judge. [EffLite2]")
]
Candidates = Annotated[
    int, typer.Option(parser=whole(2), metavar="N", help="Captions to tell the right one among, all in one style.")
]
Seed = Annotated[int, typer.Option(parser=whole(0), metavar="N", help="Of all that is drawn.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda …")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, with settings, counts and hashes.")]
Fit = Annotated[
    str, typer.Option(metavar="HOW", help="How --data is made square: crop, pad or stretch, as in training.")
]
Upscale = Annotated[bool, typer.Option("--upscale", help="Enlarge pictures that are smaller than the model's.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out pictures that cannot be read.")]
Size = Annotated[int | None, typer.Option(parser=whole(8), metavar="N", help="Side in pixels. [the smallest one's]")]


def floor(
    data: Data,
    clip: Clip = None,
    features: Features = None,
    size: Size = None,
    caption: Caption = "text",
    style: Style = "style",
    validation_fraction: Fraction = 0.0,
    fit: Fit = "crop",
    upscale: Upscale = False,
    skip_bad: SkipBad = False,
    candidates: Candidates = 100,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """The ruler: held-out pictures, those of the nearest captions, and known damages, against the training set."""
    columns: dict[str, Any] = {"caption": caption, "style": style, "validation_fraction": validation_fraction}
    columns |= {"fit": fit, "upscale": upscale, "skip_bad": skip_bad}
    ruler, settings = _ruler(data, size, clip, features, columns, candidates, seed, device)
    table = ruler.floor()
    _progress(1, 2)
    table |= ruler.damages(_maps(ruler.judge))
    _tell(table, settings, as_json)


def pictures(
    pictures: Annotated[
        Path | None, typer.Argument(help="Folder of pictures, or parquet file. [drawn by --model]", show_default=False)
    ] = None,
    *,
    data: Data,
    model: Annotated[str | None, typer.Option(help="Judge this pixel-space model's pictures instead.")] = None,
    count: Annotated[
        int | None, typer.Option(parser=whole(4), metavar="N", help="With --model: pictures to draw. [1000]")
    ] = None,
    steps: Annotated[int | None, typer.Option(parser=whole(1), metavar="N", help="With --model.")] = None,
    guidance: Annotated[float | None, typer.Option(parser=number(0), metavar="G", help="With --model.")] = None,
    label: Annotated[
        str | None,
        typer.Option(help="With --model: column of --data whose values are its classes; drawn in the training shares."),
    ] = None,
    features: Features = None,
    size: Size = None,
    validation_fraction: Fraction = 0.0,
    fit: Fit = "crop",
    upscale: Upscale = False,
    skip_bad: SkipBad = False,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Pictures against the training pictures: KID, Fréchet distance, precision, recall, near-copies."""
    if (pictures is None) == (model is None):
        raise UserError("give either PICTURES or --model")
    if model is None:
        given: dict[str, object] = {"count": count, "steps": steps, "guidance": guidance, "label": label}
        for name, value in given.items():
            if value is not None:
                raise UserError(f"--{name} belongs to --model; leave it out, or give a model in place of PICTURES")
        new = _every_picture(pictures or Path(), size)
        named: dict[str, Any] = {"pictures": str(pictures)}
        side = size or int(new.shape[-1])
    else:
        opened = _open_for_labels(model, label, size, device)
        side = opened.system.config.size
        named = {"model": opened.name, "model_sha256": opened.sha256, "steps": steps, "guidance": guidance}
    columns: dict[str, Any] = {"caption": None, "style": "style", "validation_fraction": validation_fraction}
    columns |= {"label": label, "fit": fit, "upscale": upscale, "skip_bad": skip_bad}
    ruler, settings = _ruler(data, side, None, features, columns, 2, seed, device)
    if model is not None:
        new = _draw_labelled(opened, _training_labels(data, side, columns), count or 1000, seed, steps, guidance)
    counts = {"new": len(new)}
    settings = named | settings | {"counts": counts | settings["counts"]}
    _tell({"new": ruler.row([new]), "real": ruler.row([ruler.held_out.pictures])}, settings, as_json)


def codec(
    model: Annotated[str, typer.Argument(help="A codec: a file or a run.")],
    data: Data,
    clip: Clip = None,
    features: Features = None,
    caption: Caption = "text",
    style: Style = "style",
    validation_fraction: Fraction = 0.0,
    fit: Fit = "crop",
    upscale: Upscale = False,
    skip_bad: SkipBad = False,
    candidates: Candidates = 100,
    seed: Seed = 0,
    batch: Annotated[int, typer.Option(parser=whole(1), metavar="N", help="Pictures at once.")] = 32,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """What a codec makes of the held-out pictures: beside the true ones, and against the training set."""
    from sfumato.evaluation.captioned import reconstructed, reconstruction

    stage, size, sha256 = _open_codec(model)
    columns: dict[str, Any] = {"caption": caption, "style": style, "validation_fraction": validation_fraction}
    columns |= {"fit": fit, "upscale": upscale, "skip_bad": skip_bad}
    ruler, settings = _ruler(data, size, clip, features, columns, candidates, seed, device)
    true = ruler.held_out.pictures
    other = reconstructed(_reconstruct(stage, device), true, batch, _progress)
    row = reconstruction(true, other, _maps(ruler.judge)) | ruler.row([other])
    row |= _codes(stage, ruler.train.pictures, batch, device)
    _tell({"codec": row, "real": ruler.row([true])}, {"model": model, "model_sha256": sha256} | settings, as_json)


def text(
    model: Annotated[str, typer.Argument(help="A text model: a name, a file or a run.")],
    data: Data,
    clip: Clip = None,
    seeds: Annotated[int, typer.Option(parser=whole(1), metavar="N", help="Pictures of each caption.")] = 3,
    steps: Annotated[int | None, typer.Option(parser=whole(1), metavar="N", help="Of the sampler.")] = None,
    sampler: Annotated[str | None, typer.Option(help="Its name. [the model's own]")] = None,
    guidance: Annotated[float | None, typer.Option(parser=number(0), metavar="G", help="[the model's own]")] = None,
    negative: Annotated[str | None, typer.Option(help="A negative prompt.")] = None,
    features: Features = None,
    caption: Caption = "text",
    style: Style = "style",
    validation_fraction: Fraction = 0.0,
    fit: Fit = "crop",
    upscale: Upscale = False,
    skip_bad: SkipBad = False,
    candidates: Candidates = 100,
    seed: Seed = 0,
    batch: Annotated[int, typer.Option(parser=whole(1), metavar="N", help="Pictures at once.")] = 48,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """What a text model draws for the held-out captions: all, unseen pairs of concept and style, unseen concepts."""
    from sfumato import api
    from sfumato.evaluation.captioned import drawn

    opened = api.load(model, device=device)
    size = opened.system.config.size
    columns: dict[str, Any] = {"caption": caption, "style": style, "validation_fraction": validation_fraction}
    columns |= {"fit": fit, "upscale": upscale, "skip_bad": skip_bad}
    own = {"steps": steps, "sampler": sampler, "guidance": guidance, "negative": negative}
    draw = _drawer(opened, own)
    train, held_out = _sets(data, size, columns)
    if held_out.texts is None:
        raise UserError(f"{str(data)!r} has no captions (column {caption!r}); name their column with --caption")
    draw([held_out.prompts[0]], seed)  # refuses what the model cannot do before anything is measured
    ruler, settings = _ruler_of(train, held_out, clip, features, columns, candidates, seed, device, data)
    sets = drawn(draw, held_out.prompts, seeds, seed, batch, _progress)
    named = {"model": opened.name, "model_sha256": opened.sha256, "seeds": seeds} | own
    _tell(ruler.by_part("drawn", sets) | ruler.floor(), named | settings, as_json)


def upscale(
    model: Annotated[str, typer.Argument(help="A model that enlarges pictures: a name, a file or a run.")],
    data: Data,
    steps: Annotated[int | None, typer.Option(parser=whole(1), metavar="N", help="Of the sampler.")] = None,
    sampler: Annotated[str | None, typer.Option(help="Its name. [the model's own]")] = None,
    features: Features = None,
    validation_fraction: Fraction = 0.0,
    fit: Fit = "crop",
    upscale: Upscale = False,
    skip_bad: SkipBad = False,
    seed: Seed = 0,
    batch: Annotated[int, typer.Option(parser=whole(1), metavar="N", help="Pictures at once.")] = 16,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """What a model makes of the held-out pictures made small: beside the true ones, with bicubic interpolation."""
    from sfumato import api
    from sfumato.evaluation.upscaling import enlarged_by, interpolated, nearness
    from sfumato.systems.latent import Latent
    from sfumato.tasks.edit import scale_of

    opened = api.load(model, device=device)
    scale = scale_of(opened.system)
    if scale == 1 or not isinstance(opened.system, Latent):
        raise UserError(f"{opened.name} does not enlarge pictures")
    columns: dict[str, Any] = {"caption": "text", "style": "style", "validation_fraction": validation_fraction}
    columns |= {"fit": fit, "upscale": upscale, "skip_bad": skip_bad}
    ruler, settings = _ruler(data, opened.system.config.size, None, features, columns, 100, seed, device)
    true = ruler.held_out.pictures
    drawn = enlarged_by(
        opened.system, true, seed=seed, batch=batch, steps=steps, sampler=sampler, on_batch=_progress
    )
    bicubic = interpolated(true, scale)
    table = {
        "enlarged": nearness(true, drawn) | ruler.row([drawn]),
        "bicubic": nearness(true, bicubic) | ruler.row([bicubic]),
        "real": ruler.row([true]),
    }
    how = {"scale": scale, "steps": steps, "sampler": sampler}
    _tell(table, {"model": opened.name, "model_sha256": opened.sha256} | how | settings, as_json)


# --- what is read ---------------------------------------------------------------------------------------------------


def _ruler(
    data: Path, size: int | None, clip: str | None, features: Path | None, columns: dict[str, Any], candidates: int,
    seed: int, device: str,
) -> tuple[Ruler, dict[str, Any]]:  # fmt: skip
    train, held_out = _sets(data, size, columns)
    return _ruler_of(train, held_out, clip, features, columns, candidates, seed, device, data)


def _ruler_of(
    train: Captioned, held_out: Captioned, clip: str | None, features: Path | None, columns: dict[str, Any],
    candidates: int, seed: int, device: str, data: Path,
) -> tuple[Ruler, dict[str, Any]]:  # fmt: skip
    """The ruler and the settings, counts and hashes that its figures are told with."""
    from sfumato.backends.devices import choose_device
    from sfumato.evaluation.captioned import Ruler
    from sfumato.evaluation.judge import judge
    from sfumato.evaluation.retrieval import Views

    place = choose_device(device)
    chosen = judge(features, place)
    matcher, sha256 = (None, None) if clip is None else _open_clip(clip, place)
    if matcher is not None and (train.texts is None or held_out.texts is None):
        raise UserError(f"--clip needs captions, but {str(data)!r} has none (column {columns['caption']!r})")
    print(f"measuring {len(train)} training and {len(held_out)} held-out pictures", file=sys.stderr, flush=True)
    ruler = Ruler.of(chosen, train, held_out, matcher and Views(matcher), candidates=candidates, seed=seed)
    settings = {
        "data": str(data), **columns, "size": int(train.pictures.shape[-1]), "seed": seed,
        "judge": chosen.name, "judge_sha256": chosen.network.sha256,
        "clip": clip, "clip_sha256": sha256, "candidates": candidates if clip is not None else None,
        "counts": {"train": len(train), **{name: len(rows) for name, rows in held_out.parts().items()}},
        "train_sha256": train.sha256, "held_out_sha256": held_out.sha256,
    }  # fmt: skip
    return ruler, settings


def _sets(data: Path, size: int | None, columns: dict[str, Any]) -> tuple[Captioned, Captioned]:
    """The training and the held-out pictures."""
    train, held_out = _opened(data, size, columns)
    if held_out is None:
        raise UserError(
            f"{str(data)!r} holds no pictures out: give its rows a column 'split' (train, validation), or name the "
            "share that was held out in training with --validation-fraction"
        )
    style = columns["style"]
    if style != "style" and not any(record.columns.get(style) is not None for record in train.records):
        raise UserError(f"--style: column {style!r} is not in {str(data)!r}")
    return _captioned(train, style), _captioned(held_out, style)


def _opened(data: Path, size: int | None, columns: dict[str, Any]) -> tuple[PictureSet, PictureSet | None]:
    from sfumato.training.data import DataConfig, open_data

    share = columns["validation_fraction"]
    if not 0 <= share < 1:
        raise UserError(f"--validation-fraction: must be below 1, got {share}")
    check_fit(columns["fit"])
    side = size or _smallest_side(data, columns["skip_bad"])
    config = DataConfig(
        path=str(data), size=side, caption=columns["caption"], label=columns.get("label"), validation_fraction=share,
        fit=columns["fit"], upscale=columns["upscale"], skip_bad=columns["skip_bad"],
    )  # fmt: skip
    train, held_out = open_data(config)
    for one in (train, held_out):
        if one is not None:
            check_pictures(one)
    return train, held_out


def check_fit(fit: str) -> None:
    """Refuse an unknown way of making pictures square."""
    from sfumato.training.pictures import Fit as Ways

    if fit not in get_args(Ways):
        raise_unknown("fit", fit, get_args(Ways))


def check_pictures(pictures: PictureSet) -> None:
    """Open every picture, and say which were left out as bad, where that is allowed."""
    from sfumato.training.data import check_all

    if bad := check_all(pictures):
        print(f"left out as bad: {len(bad)}, first {bad[0].key}: {bad[0].reason}", file=sys.stderr)


def _smallest_side(data: Path, skip_bad: bool = False) -> int:
    from sfumato.training.data import DataConfig, check_all, open_data

    everything, _ = open_data(
        DataConfig(path=str(data), size=1, split=None, validation_split=None, caption=None, skip_bad=skip_bad)
    )
    if skip_bad:
        check_all(everything)
    return min(min(everything.open(i).size) for i in range(len(everything)))


def _captioned(pictures: PictureSet, style: str) -> Captioned:
    import torch

    from sfumato.evaluation.captioned import Captioned

    def column(name: str) -> list[str | None]:
        return [None if (v := record.columns.get(name)) in (None, "") else str(v) for record in pictures.records]

    tags = [record.columns.get("tags") or [] for record in pictures.records]
    texts = [pictures.caption_of(i) for i in range(len(pictures))]
    return Captioned(
        torch.cat([batch.images for batch in pictures.in_order(256)]),
        None if None in texts else [str(text) for text in texts],
        column(style),
        column("held_out_by"),
        [some if isinstance(some, str) else " ".join(map(str, some)) for some in tags],
    )


def _every_picture(path: Path, size: int | None) -> Tensor:
    """All pictures of a folder or a parquet file, whatever their split."""
    import torch

    from sfumato.training.data import DataConfig, check_all, open_data

    side = size or _smallest_side(path)
    found, _ = open_data(DataConfig(path=str(path), size=side, split=None, validation_split=None, caption=None))
    check_all(found)
    return torch.cat([batch.images for batch in found.in_order(256)])


# --- what is judged -------------------------------------------------------------------------------------------------


def _open_clip(name: str, device: torch.device) -> tuple[CLIP, str]:
    from sfumato.api import weights_of
    from sfumato.systems import open_system
    from sfumato.systems.clip import CLIP

    opened = open_system(weights_of(name))
    if not isinstance(opened.system, CLIP):
        raise UserError(f"--clip: {name} is a {opened.system.kind} model, not a CLIP")
    opened.system.towers.to(device)
    return opened.system, opened.sha256


def _open_codec(name: str) -> tuple[Codec, int, str]:
    """A codec, alone or inside a latent model; the side of its pictures; the SHA-256 of its file."""
    from sfumato.api import weights_of
    from sfumato.systems import open_codec

    stage, sha256 = open_codec(weights_of(name))
    if stage.config.channels != 3:
        raise UserError(f"{name} is for grey pictures; the judge sees colour pictures")
    return stage.codec, stage.config.size, sha256


def _reconstruct(codec: Codec, device: str) -> Reconstruct:
    """The codec as a function of 8-bit pictures; of a distribution of latents the mean is taken."""
    import torch

    from sfumato.backends.devices import choose_device

    place = choose_device(device)
    if codec.network is not None:
        codec.network.to(place).eval()

    @torch.no_grad()
    def there_and_back(pictures: Tensor) -> Tensor:
        x = pictures.to(place, torch.float32) / 127.5 - 1
        return _bytes(codec.decode(codec.encode(x).mean))

    return there_and_back


def _codes(codec: Codec, pictures: Tensor, batch: int, device: str) -> Row:
    """How many codes of a codebook training pictures use, and how evenly; nothing for other codecs."""
    import torch

    from sfumato.backends.devices import choose_device
    from sfumato.codecs import VQCodec
    from sfumato.evaluation.figures import Figure
    from sfumato.networks.vq import code_counts, perplexity

    if not isinstance(codec, VQCodec):
        return {}
    place, size = choose_device(device), codec.network.config.num_vq_embeddings
    counts = torch.zeros(size, dtype=torch.int64)
    with torch.no_grad():
        for part in torch.split(pictures, batch):
            h = codec.network.encode(part.to(place, torch.float32) / 127.5 - 1)
            counts += code_counts(codec.network.quantize(h).codes, size).cpu()
    used = Figure(float((counts > 0).sum()))
    return {"codes": Figure(float(size)), "codes used in training": used, "perplexity": Figure(perplexity(counts))}


def _drawer(opened: Model, options: dict[str, Any]) -> Draw:
    """The model as a function of prompts and the first one's seed."""
    from sfumato.images import from_pil

    def draw(prompts: Sequence[str], seed: int) -> Tensor:
        given = {name: value for name, value in options.items() if value is not None}
        drawn = opened.generate(list(prompts), count=1, seed=seed, **given)
        return _bytes(from_pil(drawn))

    return draw


def _bytes(x: Tensor) -> Tensor:
    """Pictures in [-1, 1] as 8-bit ones on the CPU."""
    import torch

    return ((x.clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)


def _open_for_labels(model: str, label: str | None, size: int | None, device: str) -> Model:
    from sfumato import api

    opened = api.load(model, device=device)
    if size not in (None, opened.system.config.size):
        raise UserError(f"model {opened.name} draws {opened.system.config.size} pixels; leave --size out")
    if label is not None and not opened.labels:
        raise UserError(f"model {opened.name} has no class labels; leave --label out")
    if label is None and opened.labels:
        raise UserError(f"model {opened.name} has classes; name the column of --data that they come from with --label")
    return opened


def _training_labels(data: Path, size: int, columns: dict[str, Any]) -> list[str] | None:
    """The class of every training picture."""
    if columns["label"] is None:
        return None
    train, _ = _opened(data, size, columns)
    return [train.labels[int(train.label_of(i) or 0)] for i in range(len(train))]


def _draw_labelled(
    opened: Model, labels: list[str] | None, count: int, seed: int, steps: int | None, guidance: float | None
) -> Tensor:
    """`count` pictures with seeds `seed` …, of classes in the shares of `labels`."""
    import torch

    from sfumato.images import from_pil

    generator, batch, parts = torch.Generator().manual_seed(seed), 48, []
    rows = torch.randint(len(labels), (count,), generator=generator).tolist() if labels else []
    for start in range(0, count, batch):
        own = [labels[row] for row in rows[start : start + batch]] if labels else None
        many = min(batch, count - start)
        drawn = opened.generate(count=many, seed=seed + start, label=own, steps=steps, guidance=guidance)
        parts.append(_bytes(from_pil(drawn)))
        _progress(start + many, count)
    return torch.cat(parts)


def _maps(judge: Judge) -> Mapper | None:
    """The judge's feature maps, where it offers them."""
    return getattr(judge.network, "maps", None)


# --- what is told ---------------------------------------------------------------------------------------------------


def _progress(done: int, total: int) -> None:
    if total > done or sys.stderr.isatty():
        print(f"{done}/{total}", file=sys.stderr, flush=True)


def _tell(table: dict[str, Row], settings: dict[str, Any], as_json: bool) -> None:
    if as_json:
        told = {title: {name: figure.json() for name, figure in row.items()} for title, row in table.items()}
        print(json.dumps({"figures": told, "settings": settings}, indent=1, allow_nan=False))
        return
    for title, row in table.items():
        print(_line(title, row))
    print("  " + ", ".join(f"{k} {v}" for k, v in settings.items() if v is not None and k != "counts"))
    print("  pictures: " + ", ".join(f"{name} {count}" for name, count in settings["counts"].items()))


def _line(title: str, row: Mapping[str, object]) -> str:
    """A row of figures on one line."""
    return f"{title}: " + ", ".join(f"{name} {figure}" for name, figure in row.items())
