"""From files to pictures: finding them, decoding them to upright RGB or grey, and fitting them to a square.

Three steps that know nothing of training. `find_records` lists what a path holds (a folder of pictures, or
parquet files) as `Record`s: a key, where the encoded bytes are, and the other columns. `decode` turns encoded
bytes into an upright Pillow picture on white; `fit_square` resizes that to the asked size.

>>> import io
>>> picture = Image.new("RGBA", (40, 20), (255, 0, 0, 0))          # fully transparent red
>>> buffer = io.BytesIO(); picture.save(buffer, "PNG")
>>> decode(buffer.getvalue()).getpixel((0, 0))                     # alpha is composited over white
(255, 255, 255)
>>> fit_square(decode(buffer.getvalue()), 16, "crop").size
(16, 16)
"""

from __future__ import annotations

import csv
import io
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sfumato.conditioners.semantic import classes_of
from sfumato.errors import DataError, UserError
from sfumato.images import eight_bits

Fit = Literal["crop", "pad", "stretch"]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
CAPTION_SUFFIXES = (".txt", ".caption")
SPLIT_NAMES = {"train": "train", "training": "train", "val": "validation", "valid": "validation",
               "validation": "validation", "dev": "validation", "test": "test"}  # fmt: skip
MAX_PIXELS = 89_478_485
"""The largest picture decoded, in pixels: a quarter of a GiB at 3 bytes each, Pillow's own warning line."""


@dataclass(frozen=True, slots=True)
class Record:
    """One picture of a set: ``key`` names it in messages, ``source`` yields its encoded bytes."""

    key: str
    source: Path | ParquetCell
    columns: dict[str, Any] = field(default_factory=dict)


# ----------------------------------------------------------------------------------------------------------
# decoding


def decode(data: bytes, channels: Literal[1, 3] = 3) -> Image.Image:
    """Decode an encoded picture completely into an upright ``RGB`` (3) or ``L`` (1) Pillow image.

    EXIF rotation is applied, transparency is composited over white, 16-bit grey is divided by 257 (so that
    65535 becomes 255), of an animation the first frame is taken, and CMYK, palette and 1-bit pictures are
    converted.

    Args:
        data: the bytes of a PNG, JPEG, WebP, BMP, GIF or TIFF file; the content decides, not a name.
        channels: 3 for colour, 1 for grey (ITU-R 601 luma).

    Raises:
        DataError: not a picture, truncated, larger than `MAX_PIXELS`, or of a pixel type with no 8-bit
            meaning.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{image.width}x{image.height} is more than the {MAX_PIXELS:,} pixels allowed"
                )
            image.load()
            upright = ImageOps.exif_transpose(image)
        return _on_white(upright).convert("L" if channels == 1 else "RGB")
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"not a picture ({', '.join(FORMATS)} are read), or its header is damaged") from error
    except Exception as error:  # Pillow's readers raise nearly any type on damaged input
        raise DataError(f"damaged picture: {str(error).strip() or type(error).__name__}") from error


def _on_white(image: Image.Image) -> Image.Image:
    """Reduce any pixel type to opaque ``L`` or ``RGB``-convertible 8 bits, transparent parts over white."""
    try:
        image = eight_bits(image)
    except UserError as error:
        raise DataError(str(error)) from None
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    return image.convert("RGB") if image.mode != "L" else image


# ----------------------------------------------------------------------------------------------------------
# fitting


@dataclass(frozen=True, slots=True)
class Fitted:
    """Where the points of a picture came to lie in its square: `x' = x scale + shift` in pixels, axis by axis."""

    scale: tuple[float, float]
    shift: tuple[float, float]


def fitted(picture: tuple[int, int], size: int, fit: Fit) -> Fitted:
    """What `fit_square` does to the points of a picture of (width, height)."""
    width, height = picture
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return Fitted((size / side, size / side), (-left * size / side, -top * size / side))
    if fit == "stretch":
        return Fitted((size / width, size / height), (0, 0))
    inner = _padded_size(picture, size)
    return Fitted(
        (inner[0] / width, inner[1] / height), (float((size - inner[0]) // 2), float((size - inner[1]) // 2))
    )


def _padded_size(picture: tuple[int, int], size: int) -> tuple[int, int]:
    """(width, height) of a whole picture within a square."""
    side = max(picture)
    return max(1, round(picture[0] * size / side)), max(1, round(picture[1] * size / side))


def fit_map(values: np.ndarray, size: int, fit: Fit, beyond: int) -> np.ndarray:
    """A map of classes (H, W) fitted as its picture is, each point taking the class that it falls on.

    Args:
        beyond: what stands around the picture with `fit` "pad".
    """
    height, width = values.shape
    place = fitted((width, height), size, fit)
    middles = np.arange(size) + 0.5
    columns = np.floor((middles - place.shift[0]) / place.scale[0]).astype(np.int64)
    rows = np.floor((middles - place.shift[1]) / place.scale[1]).astype(np.int64)
    found = values[rows.clip(0, height - 1)[:, None], columns.clip(0, width - 1)[None]]
    outside = ((rows < 0) | (rows >= height))[:, None] | ((columns < 0) | (columns >= width))[None]
    return np.where(outside, beyond, found)


def decode_map(data: bytes) -> np.ndarray:
    """A map of classes, int16 (H, W) in 0 .. 255: the palette's indices or the grey values of a PNG.

    Raises:
        UserError: not a PNG, or one of colours.
    """
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.load()
            return classes_of(image).numpy().astype(np.int16)
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise DataError(f"a map of classes must be a whole PNG: {reason}") from error


def fit_square(image: Image.Image, size: int, fit: Fit, *, upscale: bool = False) -> Image.Image:
    """Resize ``image`` to ``size`` x ``size``: Lanczos when shrinking, bicubic when enlarging.

    ``crop`` keeps the central square; ``pad`` keeps the whole picture, centred on white; ``stretch`` ignores
    the aspect.

    Raises:
        DataError: the picture would have to be enlarged (for ``crop`` and ``stretch`` the shorter side, for
            ``pad`` the longer one, is below ``size``) and ``upscale`` is False.
    """
    width, height = image.size
    side = max(width, height) if fit == "pad" else min(width, height)
    if side < size and not upscale:
        raise DataError(
            f"a picture smaller than asked: {width}x{height}, but size is {size} (data.upscale=true enlarges it)"
        )
    if fit == "crop":
        left, top = (width - side) // 2, (height - side) // 2
        return _resize(image, (size, size), (left, top, left + side, top + side))
    if fit == "stretch":
        return _resize(image, (size, size), (0, 0, width, height))
    inner = _padded_size(image.size, size)
    canvas = Image.new(image.mode, (size, size), "white")
    canvas.paste(
        _resize(image, inner, (0, 0, width, height)), ((size - inner[0]) // 2, (size - inner[1]) // 2)
    )
    return canvas


def _resize(image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """The part ``box`` of ``image`` at ``size``; pixels are copied untouched where no scaling is needed."""
    width, height = box[2] - box[0], box[3] - box[1]
    if (width, height) == size:
        return image.crop(box)
    shrinking = width > size[0] or height > size[1]
    return image.resize(size, Image.Resampling.LANCZOS if shrinking else Image.Resampling.BICUBIC, box=box)


# ----------------------------------------------------------------------------------------------------------
# finding


def find_records(path: str, memory: int, *, caption_files: bool = True) -> list[Record]:
    """List the pictures under ``path``, in a fixed order (by name, then by row).

    Args:
        path: a folder of pictures (searched through its sub-folders), a parquet file, or a folder of parquet
            files. memory: bytes of encoded parquet pictures to hold in RAM; beyond it they are read by row
            group when needed. caption_files: whether those beside the pictures are read.

    Raises:
        DataError: nothing there, no pictures in it, both kinds mixed, or unreadable metadata.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise DataError(f"data path {path!r} does not exist")
    if root.is_file():
        with root.open("rb") as handle:
            if handle.read(4) != b"PAR1":
                raise DataError(f"data path {path!r} is neither a folder of pictures nor a parquet file")
        return _parquet_records([root], root.parent, memory)
    files = list(_walk(root))
    pictures = [file for file in files if file.suffix.lower() in SUFFIXES]
    parquets = [file for file in files if file.suffix.lower() == ".parquet"]
    if pictures and parquets:
        raise DataError(
            f"data path {path!r} holds both pictures ({len(pictures)}) and parquet files ({len(parquets)}); "
            "name the folder or file of one kind"
        )
    if parquets:
        return _parquet_records(parquets, root, memory)
    if not pictures:
        raise DataError(
            f"data path {path!r} holds no pictures ({' '.join(sorted(SUFFIXES))}) and no parquet files"
        )
    metadata = [file for file in files if file.name in ("metadata.jsonl", "metadata.csv")]
    return _folder_records(pictures, metadata, root, CAPTION_SUFFIXES if caption_files else ())


def _walk(root: Path) -> Iterator[Path]:
    """Every file under ``root``, sorted, through links but never twice into a folder; no dot names."""
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


def _folder_records(
    pictures: list[Path], metadata: list[Path], root: Path, caption_suffixes: tuple[str, ...]
) -> list[Record]:
    """Records with the columns of ``metadata.jsonl`` or ``.csv``, of caption files and of folder names.

    Metadata comes before a caption file (``text``) and before folder names (``split``, ``folder``). The top
    folders are splits when every one has a split's name and ``train`` is among them; the class of a picture,
    ``folder``, is its top folder below that.
    """
    described: dict[Path, dict[str, Any]] = {}
    for file in metadata:
        described.update(_read_metadata(file))
    beside = {value for row in described.values() for value in row.values() if isinstance(value, Path)}
    plain = [Path(os.path.normpath(picture)) for picture in pictures]
    kept = [i for i, picture in enumerate(plain) if picture not in beside or picture in described]
    pictures, plain = [pictures[i] for i in kept], [plain[i] for i in kept]
    if lost := described.keys() - set(plain):
        raise DataError(
            f"the metadata names {min(lost)}, which is not a picture there ({len(lost)} such rows)"
        )
    parts = [picture.relative_to(root).parts for picture in pictures]
    tops = {part[0] if len(part) > 1 else "" for part in parts}
    has_splits = "train" in _splits(tops)
    records = []
    for picture, name, part in zip(pictures, plain, parts, strict=True):
        columns: dict[str, Any] = {}
        folders = part[:-1]
        if has_splits:
            columns["split"], folders = SPLIT_NAMES[folders[0].lower()], folders[1:]
        if folders:
            columns["folder"] = folders[0]
        for suffix in caption_suffixes:
            if (caption := picture.with_suffix(suffix)).is_file():
                if text := _read_text(caption).strip():
                    columns["text"] = text
                break
        records.append(Record("/".join(part), picture, columns | described.get(name, {})))
    return records


def _splits(names: set[str]) -> set[str]:
    """The splits that ``names`` stand for, or nothing unless each of them is a split's name."""
    return (
        {SPLIT_NAMES[name.lower()] for name in names}
        if all(n.lower() in SPLIT_NAMES for n in names)
        else set()
    )


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as UTF-8 text: {error}") from error


def _read_metadata(file: Path) -> dict[Path, dict[str, Any]]:
    """Picture path to its columns; ``file_name`` is relative to the folder of the metadata file.

    A ``map`` that names a file there becomes its path; such files are no pictures of the set in their own right.
    """
    rows: dict[Path, dict[str, Any]] = {}
    for number, row in _metadata_rows(file):
        if not isinstance(row, dict) or not isinstance(name := row.pop("file_name", None), str):
            raise DataError(f"{file} line {number} needs a 'file_name'")
        target = Path(os.path.normpath(file.parent / name))
        if target in rows:
            raise DataError(f"{file} line {number} describes {name!r} a second time")
        named = row.get("map")
        if isinstance(named, str) and named and (beside := Path(os.path.normpath(file.parent / named))).is_file():
            row["map"] = beside
        rows[target] = row
    return rows


def _metadata_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """Line number and content of each row of a JSON-lines or CSV file."""
    if file.suffix == ".csv":
        yield from _csv_rows(file)
        return
    for number, line in enumerate(_read_text(file).split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(f"{file} line {number} is not JSON: {error}") from error


def _csv_rows(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and filled cells of each row; one with more or fewer fields than the header is refused."""
    reader = csv.reader(io.StringIO(_read_text(file), newline=""))
    header: list[str] = []
    try:
        for cells in reader:
            if not cells:
                continue
            if not header:
                header = cells
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{file} line {reader.line_num}: the header names {len(header)} fields, this row has {len(cells)}; "
                    "put quotes around text with commas"
                )
            yield reader.line_num, {name: cell for name, cell in zip(header, cells, strict=True) if cell.strip()}
    except csv.Error as error:
        raise DataError(f"{file} line {reader.line_num} is not CSV: {error}") from error


# ----------------------------------------------------------------------------------------------------------
# parquet


class ParquetImages:
    """Encoded pictures of one parquet file: all in RAM when ``resident``, else the last two row groups."""

    def __init__(self, file: Any, column: str, resident: bool) -> None:
        self._file, self._column, self._keep = file, column, file.num_row_groups if resident else 2
        counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._groups: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, row: int) -> bytes:
        """The encoded bytes of ``row``; out of order this is slow for a file that is not resident."""
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        with self._lock:
            if group not in self._groups:
                while len(self._groups) >= self._keep:
                    self._groups.popitem(last=False)
                self._groups[group] = self._file.read_row_group(group, columns=[self._column]).column(
                    self._column
                )
            self._groups.move_to_end(group)
            cells = self._groups[group]
        value = cells[row - int(self._starts[group])].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data:
            raise DataError(f"column {self._column!r} holds no bytes in this row")
        return bytes(data)


@dataclass(frozen=True, slots=True)
class ParquetCell:
    """Where one encoded picture lies in a parquet file."""

    images: ParquetImages
    row: int

    def read_bytes(self) -> bytes:
        """The encoded picture."""
        return self.images.read(self.row)


def _parquet_records(files: list[Path], root: Path, memory: int) -> list[Record]:
    """Every row of ``files``; without a ``split`` column the split is what all file names begin with."""
    try:
        import pyarrow.parquet as parquet  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise DataError("reading parquet needs pyarrow: pip install sfumato[data]") from error
    opened = []
    for file in files:
        try:
            opened.append(parquet.ParquetFile(file, memory_map=True))
        except (OSError, ValueError) as error:
            raise DataError(f"{file} is not a whole parquet file: {error}") from error
    columns = [_image_column(table.schema_arrow, path) for table, path in zip(opened, files, strict=True)]
    resident = sum(map(_encoded_bytes, opened, columns)) <= memory
    heads = [file.name.lower().replace("_", "-").replace(".", "-").split("-")[0] for file in files]
    named = "train" in _splits(set(heads))
    records = []
    for file, table, column, head in zip(files, opened, columns, heads, strict=True):
        images = ParquetImages(table, column, resident)
        extra = {"split": SPLIT_NAMES[head]} if named else {}
        prefix = file.relative_to(root).as_posix()
        for row, values in enumerate(_rows(table, column)):
            records.append(Record(f"{prefix}:{row}", ParquetCell(images, row), extra | values))
    return records


def _image_column(schema: Any, file: Path) -> str:
    """``image``, or else the only column of Hugging Face's Image type (a struct with a ``bytes`` field)."""
    if "image" in schema.names:
        return "image"
    structs = [f.name for f in schema if "bytes" in {f.type.field(i).name for i in range(f.type.num_fields)}]
    if len(structs) != 1:
        raise DataError(f"{file} has no column 'image'; its columns: {', '.join(schema.names)}")
    return str(structs[0])


def _encoded_bytes(table: Any, column: str) -> int:
    """Uncompressed size of the picture column, from the file's footer alone."""
    total = 0
    for group in map(table.metadata.row_group, range(table.num_row_groups)):
        for chunk in map(group.column, range(group.num_columns)):
            if chunk.path_in_schema.split(".")[0] == column:
                total += chunk.total_uncompressed_size
    return total


def _rows(table: Any, image_column: str) -> Iterator[dict[str, Any]]:
    """The columns beside the picture, row by row; numbers of Hugging Face's ClassLabel become class names."""
    names = [name for name in table.schema_arrow.names if name != image_column]
    hugging_face = json.loads((table.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
    features = hugging_face.get("info", {}).get("features", {})
    classes = {
        name: feature["names"]
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
    }
    for group in range(table.num_row_groups):
        rows = table.read_row_group(group, columns=names).to_pylist() if names else []
        for row in rows or [{}] * table.metadata.row_group(group).num_rows:
            for name in classes.keys() & row.keys():
                if isinstance(number := row[name], int) and 0 <= number < len(classes[name]):
                    row[name] = classes[name][number]
            yield row
