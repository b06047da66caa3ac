"""The ruler on sets whose figures are known: the same pictures, the same captions' pictures, damaged ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.evaluation.baseline import nearest_captions
from sfumato.evaluation.captioned import Ruler, drawn, reconstructed, reconstruction
from sfumato.evaluation.damages import DAMAGES, blur, jpeg
from sfumato.evaluation.figures import Figure, deviation, mean, share
from sfumato.evaluation.judge import compare, remembered
from sfumato.evaluation.kid import frechet_distance, kid
from sfumato.evaluation.reconstruction import psnr

from .judge_cases import SIZE, STYLES, Colours, Thumbnail, captioned, picture, thumbnail


@pytest.fixture
def ruler() -> Ruler:
    """40 concepts; of 8 the second style is held out, 6 more are held out whole."""
    pairs = [(n, style) for n in range(40) for style in STYLES]
    held_out = [(n, "ringed") for n in range(8)] + [(n, "plain") for n in range(40, 46)]
    train = captioned(*zip(*[pair for pair in pairs if pair not in held_out], strict=True))
    by = ["pair"] * 8 + ["concept"] * 6
    numbers, styles = zip(*held_out, strict=True)
    return Ruler.of(thumbnail(), train, captioned(numbers, styles, by), Colours(), candidates=20)


# --- figures ---------------------------------------------------------------------------------------------------------


def test_deviation_of_a_share_is_the_binomial_one() -> None:
    hits = torch.arange(400) % 4 == 0
    found = share(hits)
    assert found.value == 0.25 and found.deviation == pytest.approx((0.25 * 0.75 / 400) ** 0.5, rel=0.1)


def test_groups_stand_or_fall_together() -> None:
    """Each picture four times over tells no more than once."""
    values = torch.randn(50, generator=torch.Generator().manual_seed(0))
    once = mean(values).deviation
    again = mean(values.repeat(4), [str(i) for i in range(50)] * 4).deviation
    assert once is not None and again == pytest.approx(once, rel=1e-6)
    assert mean(values.repeat(4)).deviation == pytest.approx(once / 2, rel=0.1)
    assert deviation(values[:1]) is None and deviation(values, ["a"] * 50) is None


def test_what_is_not_finite_is_null_in_json() -> None:
    assert Figure(math.inf, math.nan).json() == {"value": None, "deviation": None}
    assert Figure(2.0, 0.5).times(10).json() == {"value": 20.0, "deviation": 5.0}


# --- the judge -------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_their_columns(ruler: Ruler) -> None:
    new = ruler.judge.features(DAMAGES["blur 1 px"](ruler.held_out.pictures))
    found = compare(ruler.judge, [new], ruler.real)
    assert found["KID-Thumbnail x1000"].value == pytest.approx(1000 * kid(new[:, :8], ruler.real.train[:, :8])[0])
    assert found["FD-Thumbnail"].value == pytest.approx(frechet_distance(new[:, 4:], ruler.real.train[:, 4:]))
    assert found["near copies"].value == float((ruler.real.train[:, None] == new).all(2).any(0).double().mean())


def test_several_sets_are_averaged_where_numbers_of_pictures_matter(ruler: Ruler) -> None:
    sets = [ruler.judge.features(DAMAGES[name](ruler.held_out.pictures)) for name in ("blur 1 px", "half size")]
    both = compare(ruler.judge, sets, ruler.real)
    each = [compare(ruler.judge, [one], ruler.real) for one in sets]
    for name in ("FD-Thumbnail", "precision", "recall", "near copies"):
        assert both[name].value == pytest.approx(sum(one[name].value for one in each) / 2), name
    assert both["KID-Thumbnail x1000"].value == pytest.approx(
        1000 * kid(torch.cat(sets)[:, :8], ruler.real.train[:, :8])[0]
    )


def test_features_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    judge, pictures = thumbnail(), torch.stack([picture(n, "plain") for n in range(5)])
    measured: list[int] = []
    monkeypatch.setattr(Thumbnail, "__call__", lambda self, x: measured.append(len(x)) or x.float().mean((2, 3)))
    first = remembered(judge, pictures)
    assert torch.equal(first, remembered(judge, pictures)) and measured == [5]
    remembered(judge, pictures[:4])
    assert measured == [5, 4]
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(b"damaged")
    assert torch.equal(first, remembered(judge, pictures)) and measured == [5, 4, 5]


# --- rows ------------------------------------------------------------------------------------------------------------


def test_real_pictures_are_told_and_the_floor_has_its_parts(ruler: Ruler) -> None:
    table = ruler.floor()
    titles = ["", ", held-out pairs", ", held-out concepts"]
    assert list(table) == [f"{of}{part}" for of in ("real", "nearest caption") for part in titles]
    assert all(table[f"real{part}"]["retrieval"].value == 1 for part in titles)
    assert table["real"]["style accuracy"].value == 1
    assert table["nearest caption"]["retrieval"].value == 0  # no training picture shows what is held out …
    assert table["nearest caption"]["style accuracy"].value == 1  # … but all are of the right style
    assert table["nearest caption"]["near copies"].value == 1


def test_damages_say_how_near_they_are_too(ruler: Ruler) -> None:
    table = ruler.damages(Thumbnail().maps)
    assert list(table) == ["blur 0.5 px", "blur 0.7 px", "blur 1 px", "JPEG 75", "half size", "noise 3/255"]
    quality = [table[name]["PSNR dB"].value for name in ("blur 0.5 px", "blur 0.7 px", "blur 1 px")]
    assert quality == sorted(quality, reverse=True)
    assert set(table["JPEG 75"]) >= {"SSIM", "feature distance", "background error /255", "FD-Thumbnail", "retrieval"}


def test_noise_on_white_is_half_of_a_normal(ruler: Ruler) -> None:
    """E max(0, -3 z) = 3 / sqrt(2 pi) = 1.197 before rounding."""
    white = torch.full((4, 3, 64, 64), 255, dtype=torch.uint8)
    row = reconstruction(white, DAMAGES["noise 3/255"](white), None)
    assert row["background error /255"].value == pytest.approx(3 / math.sqrt(2 * math.pi), rel=0.02)


def test_blur_keeps_the_sum_and_spreads_a_point_as_a_gaussian() -> None:
    point = torch.zeros(1, 3, 21, 21, dtype=torch.uint8)
    point[:, :, 10, 10] = 255
    found = blur(point, 1.0)
    assert found[0, 0, 10, 10].item() == round(255 / (2 * math.pi))
    assert found.sum((2, 3)).float().sub(255).abs().max() <= 8  # rounding
    assert psnr(point, jpeg(point, 75))[0] > 20


def test_reconstruction_of_all_pictures_in_batches(ruler: Ruler) -> None:
    sizes: list[int] = []

    def darker(pictures: Tensor) -> Tensor:
        sizes.append(len(pictures))
        return pictures - 1

    other = reconstructed(darker, ruler.held_out.pictures.clamp(min=1), batch=5)
    assert sizes == [5, 5, 4] and len(other) == 14
    with pytest.raises(UserError, match="give back what it gets"):
        reconstructed(lambda x: x[:, :, :4], ruler.held_out.pictures)


def test_drawings_have_seeds_of_their_own(ruler: Ruler) -> None:
    asked: list[tuple[str, int]] = []

    def draw(prompts: Sequence[str], seed: int) -> Tensor:
        asked.extend((text, seed + i) for i, text in enumerate(prompts))
        return torch.stack([torch.full((3, SIZE, SIZE), seed + i, dtype=torch.uint8) for i in range(len(prompts))])

    sets = drawn(draw, ["a", "b", "c"], each=2, seed=10, batch=4)
    assert asked == [("a", 10), ("a", 11), ("b", 12), ("b", 13), ("c", 14), ("c", 15)]
    assert [one[:, 0, 0, 0].tolist() for one in sets] == [[10, 12, 14], [11, 13, 15]]
    with pytest.raises(UserError, match="one 8-bit picture for each prompt"):
        drawn(lambda prompts, seed: torch.zeros(1, 3, 8, 8), ["a"], 1)


def test_drawings_of_the_right_thing_score(ruler: Ruler) -> None:
    right, wrong = ruler.held_out.pictures, 255 - ruler.held_out.pictures
    table = ruler.by_part("drawn", [right, wrong])
    alone = ruler.caption_figures([Colours().pictures(wrong)])
    for name in ("retrieval", "style accuracy"):
        assert alone[name].value < 0.5
        assert table["drawn"][name].value == pytest.approx((1 + alone[name].value) / 2), name
    assert table["drawn, held-out pairs"]["retrieval"].deviation is not None


def test_too_few_captions_are_refused_before_anything_is_measured() -> None:
    some = captioned(range(8), ["plain"] * 8)
    judge = thumbnail()
    with pytest.raises(UserError, match="100 candidates were asked for, but style 'plain' has 8 captions"):
        Ruler.of(judge, some, some, Colours())


# --- the nearest caption ---------------------------------------------------------------------------------------------


def test_rare_words_weigh_more() -> None:
    known = ["face with tears", "face with hat", "cowboy", "face with smile"]
    assert nearest_captions(["cowboy face"], known) == [2]
    assert nearest_captions(["Smile!"], known) == [3]


def test_ties_are_spread_and_always_the_same() -> None:
    known = [f"face {i}" for i in range(8)]
    asked = [f"unheard {i}" for i in range(40)]
    found = nearest_captions(asked, known)
    assert len(set(found)) > 5 and found == nearest_captions(asked, known)
    assert found[3] == nearest_captions(asked[3:4], known)[0]


def test_styles_do_not_mix() -> None:
    known, styles = ["red heart", "red hat"], ["noto", "flat"]
    assert nearest_captions(["red heart"] * 2, known, (["flat", "noto"], styles)) == [1, 0]
    with pytest.raises(UserError, match="no caption to compare 'red heart' with in 'fluent'"):
        nearest_captions(["red heart"], known, (["fluent"], styles))
