from __future__ import annotations

import io
import json
import struct
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sfumato.errors import DataError, UserError
from sfumato.training import pictures
from sfumato.training.data import Batches, DataConfig, PictureSet, check_all, open_data, to_float
from sfumato.training.pictures import decode, fit_square

TINY = Path(__file__).parent.parent / "data" / "tiny64_32px.parquet"


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 24, height: int = 20, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def write_folder(folder: Path, count: int = 7, size: int = 8) -> str:
    """Pictures 00.png, 01.png ... whose pixels are all different."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        noise(size, size, i).save(folder / f"{i:02}.png")
    return str(folder)


def write_parquet(file: Path, **columns: list[Any]) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.table(columns), file, row_group_size=3)
    return str(file)


def opened(path: str | Path, size: int = 8, **options: Any) -> PictureSet:
    return open_data(DataConfig(path=str(path), size=size, **options))[0]


# --- decoding


def test_grey_16_bit_is_scaled_not_clipped() -> None:
    values = np.array([[0, 257, 128 * 257, 65535], [256, 300, 40000, 65534]], dtype=np.uint16)
    expected = np.rint(values / 257).astype(np.uint8)
    for kind in ("PNG", "TIFF"):
        image = decode(encoded(Image.fromarray(values), kind))
        assert image.mode == "RGB"
        assert (np.asarray(image)[..., 1] == expected).all()
        assert (np.asarray(decode(encoded(Image.fromarray(values), kind), channels=1)) == expected).all()


def test_big_endian_16_bit_tiff() -> None:
    header = b"MM\x00\x2a\x00\x00\x00\x08"
    pixels = np.array([[0, 25700], [51400, 65535]], dtype=">u2").tobytes()
    start = 8 + 2 + 12 * 9 + 4  # width, height, bits, compression, meaning, offset, samples, rows, bytes
    tags = {256: 2, 257: 2, 258: 16, 259: 1, 262: 1, 273: start, 277: 1, 278: 2, 279: 8}
    directory = struct.pack(">H", len(tags))
    directory += b"".join(struct.pack(">HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    image = decode(header + directory + b"\0\0\0\0" + pixels, channels=1)
    assert np.asarray(image).tolist() == [[0, 100], [200, 255]]


def test_transparency_is_over_white() -> None:
    rgba = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    rgba.putpixel((1, 1), (0, 0, 200, 255))
    rgba.putpixel((2, 2), (0, 0, 0, 128))
    for kind in ("PNG", "WEBP"):
        image = decode(encoded(rgba, kind, **({"lossless": True} if kind == "WEBP" else {})))
        assert image.getpixel((0, 0)) == (255, 255, 255)
        assert image.getpixel((1, 1)) == (0, 0, 200)
        assert image.getpixel((2, 2)) == (127, 127, 127)
    assert decode(encoded(Image.new("LA", (2, 2), (0, 0)))).getpixel((0, 0)) == (255, 255, 255)


def test_palette_with_alpha_is_over_white() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 0, 90])
    image.putdata([0, 1, 2])
    pixels = [decode(encoded(image, transparency=b"\xff\x00\xff")).getpixel((x, 0)) for x in range(3)]
    assert pixels == [(10, 20, 30), (255, 255, 255), (0, 0, 90)]
    assert decode(encoded(image)).getpixel((1, 0)) == (200, 0, 0)
    assert decode(encoded(image, "GIF", transparency=1)).getpixel((1, 0)) == (255, 255, 255)


def test_colour_key_transparency_is_over_white() -> None:
    rgb = Image.new("RGB", (2, 1), (1, 2, 3))
    rgb.putpixel((1, 0), (9, 9, 9))
    image = decode(encoded(rgb, transparency=(1, 2, 3)))
    assert [image.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (9, 9, 9)]
    deep = Image.fromarray(np.array([[0, 25700]], dtype=np.uint16))
    assert np.asarray(decode(encoded(deep, transparency=0), channels=1)).tolist() == [[255, 100]]


def test_exif_orientation_6_is_turned_upright() -> None:
    stored = Image.new("RGB", (32, 16), "blue")
    stored.paste("red", (0, 0, 16, 16))  # turned a quarter clockwise, the left half becomes the top
    exif = Image.Exif()
    exif[0x0112] = 6
    image = decode(encoded(stored, "JPEG", exif=exif, quality=95))
    assert image.size == (16, 32)
    pixels = np.asarray(image)
    assert pixels[4, 8, 0] > 200 and pixels[28, 8, 2] > 200


def test_cmyk_and_one_bit() -> None:
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    for kind in ("JPEG", "TIFF"):
        red, green, blue = np.asarray(decode(encoded(cmyk, kind)))[8, 8].tolist()
        assert red > 240 and green < 15 and blue < 15
    one = Image.new("1", (2, 1))
    one.putpixel((1, 0), 1)
    assert np.asarray(decode(encoded(one), channels=1)).tolist() == [[0, 255]]
    assert decode(encoded(one)).getpixel((1, 0)) == (255, 255, 255)


def test_grey_and_colour_channels() -> None:
    assert np.asarray(decode(encoded(Image.new("L", (2, 2), 77)))).tolist() == [[[77] * 3] * 2] * 2
    grey = decode(encoded(Image.new("RGB", (2, 2), (255, 0, 0))), channels=1)
    assert grey.mode == "L" and grey.getpixel((0, 0)) == round(255 * 0.299)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_range_are_refused(mode: str) -> None:
    with pytest.raises(DataError, match="32-bit pixels"):
        decode(encoded(Image.new(mode, (4, 4)), "TIFF"))


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_truncated_pictures_are_errors(kind: str) -> None:
    data = encoded(noise(64, 64), kind)
    for share in (0.0, 0.01, 0.5, 0.8):
        with pytest.raises(DataError):
            decode(data[: int(len(data) * share)])


def test_errors_of_foreign_bytes_are_our_own_words() -> None:
    with pytest.raises(DataError, match="not a picture") as caught:
        decode(b"hello")
    assert "0x" not in str(caught.value)
    with pytest.raises(DataError, match="not a picture"):
        decode(encoded(noise(), "ICO"))  # a format that is not on the list


def test_decompression_bombs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(noise(24, 20))
    monkeypatch.setattr(pictures, "MAX_PIXELS", 24 * 20)
    decode(data)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 24 * 20 - 1)
    with pytest.raises(DataError, match="pixels allowed"):
        decode(data)


def test_long_text_in_a_png_is_refused() -> None:
    info = PngInfo()
    info.add_text("comment", "a" * 2_000_000, zip=True)
    with pytest.raises(DataError):
        decode(encoded(noise(), pnginfo=info))


# --- fitting


def test_crop_takes_the_centre() -> None:
    image = noise(13, 8)
    assert (np.asarray(fit_square(image, 8, "crop")) == np.asarray(image)[:, 2:10]).all()
    wide = noise(64, 32)
    expected = wide.resize((16, 8), Image.Resampling.LANCZOS).crop((4, 0, 12, 8))
    difference = np.asarray(fit_square(wide, 8, "crop")).astype(int) - np.asarray(expected)
    assert abs(difference).max() <= 1


def test_pad_keeps_the_whole_picture_on_white() -> None:
    padded = np.asarray(fit_square(Image.new("RGB", (64, 32), "red"), 16, "pad"))
    assert (padded[:4] == 255).all() and (padded[12:] == 255).all()
    assert (padded[4:12] == (255, 0, 0)).all()
    assert fit_square(Image.new("L", (500, 1), 0), 16, "pad").size == (16, 16)


def test_stretch_ignores_the_aspect() -> None:
    image = noise(64, 32)
    expected = image.resize((16, 16), Image.Resampling.LANCZOS)
    assert fit_square(image, 16, "stretch").tobytes() == expected.tobytes()


def test_filters_are_lanczos_and_bicubic() -> None:
    image = noise(20, 20)
    assert fit_square(image, 8, "crop").tobytes() == image.resize((8, 8), Image.Resampling.LANCZOS).tobytes()
    enlarged = fit_square(image, 32, "crop", upscale=True)
    assert enlarged.tobytes() == image.resize((32, 32), Image.Resampling.BICUBIC).tobytes()
    assert fit_square(image, 20, "crop").tobytes() == image.tobytes()


@pytest.mark.parametrize(
    "fit, size, refused",
    [("crop", 21, True), ("crop", 20, False), ("pad", 24, False), ("pad", 25, True), ("stretch", 21, True)],
)
def test_too_small_is_refused(fit: Any, size: int, refused: bool) -> None:
    if refused:
        with pytest.raises(DataError, match=f"smaller than asked: 24x20, but size is {size}"):
            fit_square(noise(24, 20), size, fit)
    assert fit_square(noise(24, 20), size, fit, upscale=True).size == (size, size)


# --- sources


def test_folder_with_caption_files(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", 2)
    (tmp_path / "a" / "00.txt").write_text("a rød kite\n", encoding="utf-8")
    (tmp_path / "a" / "01.caption").write_text("two", encoding="utf-8")
    (tmp_path / "a" / ".hidden.png").write_bytes(b"not seen")
    train = opened(tmp_path)
    assert [record.key for record in train.records] == ["a/00.png", "a/01.png"]
    assert [train.caption_of(i) for i in range(2)] == ["a rød kite", "two"]
    assert train.label_of(0) is None and train.labels == []


def test_class_folders_and_split_folders(tmp_path: Path) -> None:
    for name in ("train/dog/x", "train/cat", "val/cat"):
        write_folder(tmp_path / name, 2)
    train, validation = open_data(DataConfig(path=str(tmp_path), size=8, label="folder"))
    assert train.labels == ["cat", "dog"] and [train.label_of(i) for i in range(4)] == [0, 0, 1, 1]
    assert validation is not None and len(validation) == 2 and validation.labels == train.labels
    assert train.caption_of(0) is None
    plain = opened(tmp_path / "train", label="folder")
    assert plain.labels == ["cat", "dog"] and len(plain) == 4


def test_a_class_named_train_is_a_class(tmp_path: Path) -> None:
    for name in ("train", "plane"):
        write_folder(tmp_path / name, 1)
    assert opened(tmp_path, label="folder").labels == ["plane", "train"]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata(tmp_path: Path, kind: str) -> None:
    write_folder(tmp_path / "p", 2)
    if kind == "jsonl":
        rows = [{"file_name": f"p/0{i}.png", "text": f"number {i}", "kind": 10 - i} for i in range(2)]
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    else:
        text = "file_name,text,kind\np/00.png,number 0,10\np/01.png,number 1,9\n"
        (tmp_path / "metadata.csv").write_text(text)
    train = opened(tmp_path, label="kind")
    assert [train.caption_of(i) for i in range(2)] == ["number 0", "number 1"]
    assert train.labels == (
        ["9", "10"] if kind == "jsonl" else ["10", "9"]
    )  # by value where they are numbers


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 1 is not JSON"),
        ("[1]", "line 1 needs a 'file_name'"),
        ('{"file_name": "no.png"}', "no.png, which is not a picture there"),
        ('{"file_name": "../secret.png"}', "which is not a picture there"),
        ('{"file_name": "00.png"}\n{"file_name": "./00.png"}', "a second time"),
    ],
)
def test_bad_metadata_is_named(tmp_path: Path, line: str, message: str) -> None:
    write_folder(tmp_path / "p", 1)
    (tmp_path / "p" / "metadata.jsonl").write_text(line)
    with pytest.raises(DataError, match=message):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("rows", "line", "count"),
    [("p/00.png,a red, round heart\n", 2, 3), ("p/00.png,\"a red, round heart\"\np/01.png\n", 3, 1)],
)
def test_csv_rows_with_other_fields_than_the_header_are_refused(
    tmp_path: Path, rows: str, line: int, count: int
) -> None:
    write_folder(tmp_path / "p", 2)
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + rows)
    said = f"line {line}: the header names 2 fields, this row has {count}; put quotes around text with commas"
    with pytest.raises(DataError, match=f"metadata.csv {said}"):
        opened(tmp_path)


def test_empty_cells_and_caption_files_are_missing_values(tmp_path: Path) -> None:
    write_folder(tmp_path / "p", 2)
    (tmp_path / "metadata.csv").write_text('file_name,text,kind\np/00.png,"one, two",\n\np/01.png, ,b\n')
    train = opened(tmp_path, caption=None)
    assert [record.columns for record in train.records] == [
        {"folder": "p", "text": "one, two"}, {"folder": "p", "kind": "b"},
    ]  # fmt: skip
    with pytest.raises(DataError, match="1 of 2 pictures in .* have no caption .*first: p/01.png"):
        opened(tmp_path)
    (tmp_path / "p" / "01.txt").write_text(" \n")
    with pytest.raises(DataError, match="1 of 2 pictures in .* have no caption .*first: p/01.png"):
        opened(tmp_path)
    (tmp_path / "p" / "01.txt").write_text("two\n")
    assert opened(tmp_path).caption_of(1) == "two"


def test_captions_count_as_far_as_they_are_asked_for(tmp_path: Path) -> None:
    folder = Path(write_folder(tmp_path / "p", 2))
    (folder / "00.txt").write_text("zero")
    some, none = (open_data(DataConfig(path=str(folder), size=8), captions)[0] for captions in ("some", "none"))
    assert [record.columns.get("text") for record in some.records] == ["zero", None] and some.caption_of(0) is None
    assert [record.columns.get("text") for record in none.records] == [None, None]
    with pytest.raises(DataError, match="caption column 'txt' is not in"):
        open_data(DataConfig(path=str(folder), size=8, caption="txt"), "none")


def test_parquet_with_hugging_face_images() -> None:
    train = opened(TINY, 32, label="group")
    assert len(train) == 64 and train.labels == sorted(train.labels) and len(train.labels) > 3
    record = train.records[5]
    assert record.key == "tiny64_32px.parquet:5"
    assert train.caption_of(5) == record.columns["text"]
    assert train.labels[train.label_of(5) or 0] == record.columns["group"]
    image = train.load(5)
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    assert (image.permute(1, 2, 0).numpy() == np.asarray(train.open(5))).all()
    half = opened(TINY, 16)
    expected = train.open(5).resize((16, 16), Image.Resampling.LANCZOS)
    assert (half.load(5).permute(1, 2, 0).numpy() == np.asarray(expected)).all()


def test_parquet_with_raw_bytes_in_several_files(tmp_path: Path) -> None:
    for number in range(2):
        images = [encoded(noise(8, 8, 10 * number + i)) for i in range(5)]
        write_parquet(tmp_path / f"train-0000{number}-of-00002.parquet", image=images, kind=list(range(5)))
    write_parquet(tmp_path / "test-00000.parquet", image=[encoded(noise(8, 8, 99))], kind=[0])
    config = DataConfig(path=str(tmp_path), size=8, label="kind", validation_split="test")
    train, validation = open_data(config)
    assert len(train) == 10 and validation is not None and len(validation) == 1
    on_demand = open_data(config.model_copy(update={"cache_bytes": 0}))[0]
    for i in (9, 0, 7, 3):
        expected = noise(8, 8, 10 * (i // 5) + i % 5)
        for picture_set in (train, on_demand):
            assert (picture_set.load(i).permute(1, 2, 0).numpy() == np.asarray(expected)).all()
    assert on_demand._cache is None and train._cache is not None


def test_hugging_face_class_names(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    table = pyarrow.table({"img": [{"bytes": encoded(noise(8, 8)), "path": None}] * 2, "label": [1, 0]})
    features = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["bird", "ant"]}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    parquet.write_table(table, tmp_path / "x.parquet")
    train = opened(tmp_path, label="label")
    assert train.labels == ["ant", "bird"] and [train.label_of(i) for i in range(2)] == [0, 1]


def test_parquet_errors(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    write_parquet(file, picture=[b"x"], text=["a"])
    with pytest.raises(DataError, match="no column 'image'; its columns: picture, text"):
        opened(file)
    file.write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="not a whole parquet file"):
        opened(file)
    file.write_bytes(b"text")
    with pytest.raises(DataError, match="neither a folder of pictures nor a parquet file"):
        opened(file)


def test_missing_pyarrow_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"pip install sfumato\[data\]"):
        opened(TINY)


# --- sentences


def test_missing_and_empty_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        opened(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no pictures"):
        opened(tmp_path)
    write_folder(tmp_path, 1)
    write_parquet(tmp_path / "x.parquet", image=[b"x"])
    with pytest.raises(DataError, match="both pictures"):
        opened(tmp_path)


def test_missing_columns_and_splits(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'group'"):
        opened(TINY, 32, label="grup")
    with pytest.raises(DataError, match="caption column 'txt' is not in"):
        opened(TINY, 32, caption="txt")
    with pytest.raises(DataError, match="caption column 'tags' .* is a list; expected text"):
        opened(TINY, 32, caption="tags")
    with pytest.raises(DataError, match="has the split 'trian' .did you mean 'train'"):
        opened(TINY, 32, split="trian")
    with pytest.raises(DataError, match="has the validation_split 'tset'"):
        opened(TINY, 32, validation_split="tset")
    with pytest.raises(DataError, match="must not be trained on"):
        opened(TINY, 32, validation_split="train")
    folder = write_folder(tmp_path / "f", 3)
    with pytest.raises(DataError, match="the split is 'test', but .* has no column 'split'"):
        opened(folder, split="test")
    with pytest.raises(DataError, match="label column 'folder' is not in .*columns: none"):
        opened(folder, label="folder")
    write_folder(tmp_path / "f" / "cat", 2)
    with pytest.raises(DataError, match="3 of 5 pictures in .* have no label .*first: 00.png"):
        opened(folder, label="folder")
    (tmp_path / "f" / "02.txt").write_text("x")
    with pytest.raises(DataError, match="4 of 5 pictures .* have no caption .*data.caption=null"):
        opened(folder)
    assert opened(folder, caption=None).caption_of(2) is None


def test_config_is_closed() -> None:
    pad_and_crop: dict[str, Any] = {"fit": "pad", "random_crop": True}
    shares = [{"validation_fraction": share} for share in (1.0, float("nan"), -0.1)]
    for wrong in ({"sizes": 1}, {"size": 0}, {"channels": 4}, pad_and_crop, *shares):
        with pytest.raises(pydantic.ValidationError):
            DataConfig.model_validate({"path": "x", "size": 8} | wrong)
    config = DataConfig(path="x", size=8)
    assert DataConfig(**config.model_dump()) == config


def test_splits_and_held_out_share(tmp_path: Path) -> None:
    images = [encoded(noise(8, 8, i)) for i in range(6)]
    splits = ["train"] * 3 + ["validation", "test", "train"]
    file = write_parquet(tmp_path / "x.parquet", image=images, split=splits)
    train, validation = open_data(DataConfig(path=file, size=8))
    assert validation is not None and (len(train), len(validation)) == (4, 1)
    assert len(opened(file, split=None)) == 5  # all but the validation pictures
    assert len(opened(file, split=None, validation_split=None)) == 6
    with pytest.raises(DataError, match="names its own 1 validation pictures"):
        opened(file, validation_fraction=0.5)

    def held(count: int) -> set[str]:
        write_folder(tmp_path / "f", count)
        parts = open_data(DataConfig(path=str(tmp_path / "f"), size=8, validation_fraction=0.3))
        assert parts[1] is not None
        keys = [{record.key for record in part.records} for part in parts if part]
        assert len(keys[0] | keys[1]) == count and not keys[0] & keys[1]
        return keys[1]

    few, many = held(30), held(60)
    assert 0 < len(few) < 20 and few == {key for key in many if int(key[:2]) < 30}
    with pytest.raises(DataError, match="leaves 60 pictures to train on and 0 to validate with"):
        opened(tmp_path / "f", validation_fraction=1e-9)


# --- checking


def spoil(folder: Path, names: list[str]) -> None:
    for name in names:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])


def test_bad_pictures_are_named_and_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, 10)
    spoil(tmp_path, ["02.png"])
    with pytest.raises(DataError, match="1 of 10 pictures .*02.png: damaged picture.*truncated"):
        check_all(opened(tmp_path))
    with pytest.raises(DataError, match="02.png in .*damaged"):
        opened(tmp_path).load(2)
    with pytest.raises(DataError, match="02.png in .*damaged"):
        opened(tmp_path).open(2)
    spoil(tmp_path, [f"0{i}.png" for i in range(1, 8)])
    with pytest.raises(DataError, match="7 of 10 .*; and 2 more$"):
        check_all(opened(tmp_path))


def test_skip_bad_leaves_out_and_lists(tmp_path: Path) -> None:
    write_folder(tmp_path, 10)
    spoil(tmp_path, ["02.png", "07.png"])
    (tmp_path / "08.png").unlink()
    noise(4, 4).save(tmp_path / "08.png")
    for i in range(10):
        (tmp_path / f"{i:02}.txt").write_text(str(i))
    train, seen = opened(tmp_path, skip_bad=True), []
    bad = check_all(train, lambda done, total: seen.append((done, total)))
    assert [picture.key for picture in bad] == ["02.png", "07.png", "08.png"]
    assert "smaller than asked: 4x4" in bad[2].reason
    assert seen == [(10, 10)] and len(train) == 7
    left = [0, 1, 3, 4, 5, 6, 9]
    assert [train.caption_of(i) for i in range(7)] == [str(i) for i in left]
    for i, number in enumerate(left):
        assert (train.load(i).permute(1, 2, 0).numpy() == np.asarray(noise(8, 8, number))).all()
    assert check_all(train) == []
    spoil(tmp_path, [f"{i:02}.png" for i in left])
    with pytest.raises(DataError, match="10 of 10 pictures in '[^']*' cannot be used: "):
        check_all(opened(tmp_path, skip_bad=True))


def test_leaving_out_after_batches_is_refused(tmp_path: Path) -> None:
    train = opened(write_folder(tmp_path, 4))
    batches = Batches(train, 2, 0)
    train.leave_out([1])
    with pytest.raises(UserError, match="call check_all before"):
        batches.batch(0)


def test_the_cache_makes_reading_independent_of_the_files(tmp_path: Path) -> None:
    train = opened(write_folder(tmp_path, 3))
    assert check_all(train) == []
    before = [train.load(i) for i in range(3)]
    for file in tmp_path.iterdir():
        file.unlink()
    assert all((train.load(i) == before[i]).all() for i in range(3))
    train.load(0).zero_()
    assert (train.load(0) == before[0]).all()  # what is handed out is not the cache itself
    with pytest.raises(DataError, match="00.png in .*cannot be read: No such file"):
        train.open(0)


# --- order


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> PictureSet:
    return opened(write_folder(tmp_path_factory.mktemp("seven")), flip=True)


def same(one: Any, other: Any) -> bool:
    return bool((one.images == other.images).all() and (one.indices == other.indices).all())


def test_each_epoch_visits_each_picture_once(seven: PictureSet) -> None:
    stream = [i for step in range(21) for i in Batches(seven, 3, seed=5).batch(step).indices.tolist()]
    epochs = [stream[start : start + 7] for start in range(0, 63, 7)]
    assert all(Counter(epoch) == Counter(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 6
    large = Batches(seven, 21, seed=5).batch(0).indices.tolist()  # larger than the set: three epochs at once
    assert large == stream[:21]


def test_the_order_is_stateless(seven: PictureSet) -> None:
    one, other = Batches(seven, 4, seed=1), Batches(seven, 4, seed=1)
    forward = [one.batch(step) for step in range(9)]
    backward = [other.batch(step) for step in reversed(range(9))][::-1]
    assert all(same(a, b) for a, b in zip(forward, backward, strict=True))
    assert any(not same(a, Batches(seven, 4, seed=2).batch(s)) for s, a in enumerate(forward))


def test_the_order_does_not_change_between_versions(seven: PictureSet) -> None:
    assert Batches(seven, 7, seed=0).batch(0).indices.tolist() == [4, 2, 6, 5, 0, 1, 3]
    assert Batches(seven, 7, seed=-1).batch(123).indices.tolist() == [2, 6, 5, 0, 3, 1, 4]


def test_the_order_does_not_depend_on_the_world_size(seven: PictureSet) -> None:
    for step in (0, 1, 2, 50):
        alone = Batches(seven, 6, seed=3).batch(step)
        for world in (2, 3, 6):
            shares = [Batches(seven, 6, 3, rank=r, world_size=world).batch(step) for r in range(world)]
            assert torch.equal(torch.cat([share.indices for share in shares]), alone.indices)
            assert torch.equal(torch.cat([share.images for share in shares]), alone.images)


def test_wrong_sizes_are_refused(seven: PictureSet) -> None:
    for arguments in ({"batch_size": 0}, {"batch_size": 5, "world_size": 2}, {"batch_size": 4, "rank": 1}):
        with pytest.raises(UserError):
            Batches(seven, **{"seed": 0, **arguments})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="negative"):
        Batches(seven, 2, 0).batch(-1)


def test_flips_are_deterministic_and_fair(seven: PictureSet) -> None:
    flipped = total = 0
    for step in range(60):
        batch = Batches(seven, 7, seed=0).batch(step)
        for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
            plain = seven.load(index)
            assert torch.equal(image, plain) or torch.equal(image, plain.flip(-1))
            flipped, total = flipped + torch.equal(image, plain.flip(-1)), total + 1
    assert abs(flipped / total - 0.5) < 0.1  # four standard deviations of 420 fair coins
    assert same(Batches(seven, 7, seed=0).batch(59), batch)


def test_random_crops_lie_inside_and_vary(tmp_path: Path) -> None:
    train = opened(write_folder(tmp_path, 2, size=36), size=16, random_crop=True)
    assert train.config.stored_size == 18 and train.load(0).shape == (3, 16, 16)
    assert torch.equal(train.load(0), train.load_stored(0)[:, 1:17, 1:17])
    found: Counter[tuple[int, int]] = Counter()
    for step in range(90):
        batch = Batches(train, 2, seed=0).batch(step)
        for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
            stored = train.load_stored(index)
            corners = [(y, x) for y in range(3) for x in range(3)]
            places = [(y, x) for y, x in corners if torch.equal(stored[:, y : y + 16, x : x + 16], image)]
            assert len(places) == 1
            found[places[0]] += 1
    assert len(found) == 9 and min(found.values()) > 5
    with pytest.raises(DataError, match="smaller than asked: 36x36, but size is 38"):
        check_all(opened(tmp_path, size=34, random_crop=True))


def test_batches_carry_labels_and_captions() -> None:
    train = opened(TINY, 32, label="group")
    batch = Batches(train, 5, seed=0).batch(3)
    assert batch.images.shape == (5, 3, 32, 32) and batch.indices.dtype == torch.int64
    assert batch.labels is not None and batch.labels.dtype == torch.int64
    assert batch.labels.tolist() == [train.label_of(i) for i in batch.indices.tolist()]
    assert batch.captions == [train.caption_of(i) for i in batch.indices.tolist()]
    assert torch.equal(batch.to_float(), to_float(batch.images))
    bare = Batches(opened(TINY, 32, caption=None, channels=1), 5, seed=0).batch(3)
    assert bare.labels is None and bare.captions is None and bare.images.shape == (5, 1, 32, 32)


def test_in_order_reads_each_once(seven: PictureSet) -> None:
    batches = list(seven.in_order(3))
    assert [len(batch.images) for batch in batches] == [3, 3, 1]
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(7))
    assert torch.equal(batches[2].images[0], seven.load(6))


def test_to_float_spans_minus_one_to_one() -> None:
    values = to_float(torch.arange(256, dtype=torch.uint8))
    assert values.dtype == torch.float32 and values[0] == -1 and values[255] == 1
    assert torch.equal(((values + 1) * 127.5).round().to(torch.uint8), torch.arange(256, dtype=torch.uint8))


# --- prefetch


def reader_threads() -> int:
    return sum(thread.name.startswith("sfumato-data") for thread in threading.enumerate())


def test_prefetch_equals_batch_and_stops(seven: PictureSet) -> None:
    batches = Batches(seven, 4, seed=9)
    stream = batches.prefetch(3)
    for step in range(3, 20):
        assert same(next(stream), batches.batch(step))
    assert reader_threads() == 1 and batches.waited_seconds > 0
    stream.close()
    assert reader_threads() == 0


def test_prefetch_forwards_errors(tmp_path: Path) -> None:
    write_folder(tmp_path, 6)
    spoil(tmp_path, ["03.png"])
    stream = Batches(opened(tmp_path), 2, seed=0).prefetch()
    with pytest.raises(DataError, match="03.png in .*damaged"):
        for _ in range(3):
            next(stream)
    assert reader_threads() == 0
