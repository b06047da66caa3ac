"""Tables of names: read both ways they give back what went in, and nothing is lost without being named."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfumato.checkpoints.keymap import (
    CONVOLVED,
    SAME,
    THIRDS,
    TRANSPOSED,
    Ignored,
    KeyMap,
    Rule,
    Via,
    check_cover,
)
from sfumato.errors import ModelFileError

TABLE = KeyMap(
    [
        Rule("in.{n}.conv.{p}", "down.{n}.op.{p}"),
        Rule("in.0.special.{rest}", "head.{rest}"),
        Rule("{p}.of.{n}.x", "{n}.{p}"),
        Rule("mid.{n}.in_proj_{p}", ("mid.{n}.q.{p}", "mid.{n}.k.{p}", "mid.{n}.v.{p}"), THIRDS),
        Rule("mid.{n}.out.weight", "mid.{n}.out.weight", CONVOLVED),
        Rule("projection", "projection.weight", TRANSPOSED),
    ]
)


@given(st.data())
def test_both_ways_give_back_every_bit(data: st.DataObject) -> None:
    size = st.integers(1, 4)
    a, b, n = data.draw(size), data.draw(size), data.draw(st.integers(0, 30))
    seed = torch.Generator().manual_seed(n)
    theirs = {
        f"in.{n}.conv.weight": torch.randn(a, b, 3, 3, generator=seed),
        "in.0.special.deep.er.bias": torch.randn(a, generator=seed),
        f"bias.of.{n}.x": torch.randn(a, generator=seed),
        f"mid.{n}.in_proj_weight": torch.randn(3 * a, b, generator=seed),
        f"mid.{n}.in_proj_bias": torch.randn(3 * a, generator=seed),
        f"mid.{n}.out.weight": torch.randn(a, b, 1, 1, generator=seed),
        "projection": torch.randn(a, b, generator=seed),
    }
    names = data.draw(st.permutations(list(theirs)))
    ours, unmatched = TABLE.to_ours({name: theirs[name] for name in names})
    assert not unmatched and len(ours) == 11
    assert ours["projection.weight"].shape == (b, a) and ours["projection.weight"].is_contiguous()
    assert ours[f"mid.{n}.out.weight"].shape == (a, b)
    assert torch.equal(ours[f"mid.{n}.k.weight"], theirs[f"mid.{n}.in_proj_weight"][a : 2 * a])
    back, unmatched = TABLE.to_theirs({name: ours[name] for name in data.draw(st.permutations(list(ours)))})
    assert not unmatched and back.keys() == theirs.keys()
    assert all(back[name].shape == theirs[name].shape and torch.equal(back[name], theirs[name]) for name in theirs)
    assert TABLE.names_of_theirs(ours).keys() == ours.keys()
    assert set(TABLE.names_of_theirs(ours).values()) == theirs.keys()


def test_meta_tensors_go_through() -> None:
    ours, _ = TABLE.to_ours({"mid.1.in_proj_weight": torch.empty(6, 2, device="meta")})
    assert ours["mid.1.v.weight"].shape == (2, 2) and ours["mid.1.v.weight"].is_meta
    assert TABLE.to_theirs(ours)[0]["mid.1.in_proj_weight"].shape == (6, 2)


def test_fields_mean_what_they_say() -> None:
    one = torch.ones(1)
    unknown = ["in.x.conv.weight", "in.1.conv.a.b", "in.1.conv.", "in.1.conv", "xin.1.conv.weight"]
    unknown += ["in.0.special.", "a.b.of.1.x", "in", "", "in.-1.conv.weight"]
    assert TABLE.to_ours(dict.fromkeys(unknown, one)) == ({}, unknown)
    assert not any(TABLE.knows(name) for name in unknown) and TABLE.knows("in.12.conv.weight")


def test_a_third_without_the_others_is_unmatched() -> None:
    ours = {"mid.0.q.bias": torch.ones(1), "mid.0.v.bias": torch.ones(1), "down.1.op.bias": torch.ones(1)}
    theirs, unmatched = TABLE.to_theirs(ours)
    assert list(theirs) == ["in.1.conv.bias"] and unmatched == ["mid.0.q.bias", "mid.0.v.bias"]


def test_a_convolution_that_is_a_linear_layer_already_stays() -> None:
    for shape in ((2, 3, 1, 1), (2, 3, 1), (2, 3)):
        assert TABLE.to_ours({"mid.0.out.weight": torch.zeros(shape)})[0]["mid.0.out.weight"].shape == (2, 3)
    kept = TABLE.to_ours({"mid.0.out.weight": torch.zeros(2, 3, 3, 3)})[0]["mid.0.out.weight"]
    assert kept.shape == (2, 3, 3, 3)  # no 1x1 convolution: whoever checks shapes sees it


def test_prefixes_and_sums() -> None:
    table = KeyMap([Rule("a.{p}", "b.{p}")]).under("x.", "y.") + KeyMap([Rule("c", "d")])
    ours, unmatched = table.to_ours({"x.a.bias": torch.ones(1), "c": torch.ones(1), "a.bias": torch.ones(1)})
    assert list(ours) == ["y.b.bias", "d"] and unmatched == ["a.bias"]


def test_two_of_theirs_for_one_of_ours_are_refused() -> None:
    table = KeyMap([Rule("a", "x"), Rule("b", "x")])
    with pytest.raises(ModelFileError, match="b and another tensor of the file would both be x"):
        table.to_ours({"a": torch.ones(1), "b": torch.ones(1)})


def test_rows_that_cannot_be_three_are_refused() -> None:
    with pytest.raises(ModelFileError, match="4 rows, which is no multiple of 3"):
        TABLE.to_ours({"mid.0.in_proj_bias": torch.ones(4)})


@pytest.mark.parametrize(
    ("theirs", "ours", "says"),
    [("a.{n}", "b", "the same fields"), ("a.{n}", "b.{p}", "the same fields"), ("a.{x}", "b.{x}", "unknown field")],
)
def test_a_rule_that_cannot_be_inverted_is_refused(theirs: str, ours: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Rule(theirs, ours)


def test_rules_are_values() -> None:
    assert Rule("a", "b") == Rule("a", ("b",), SAME) != Rule("a", "b", TRANSPOSED)
    assert isinstance(Rule("a", "b").via, Via)


# --- the account


def small(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name.replace("_", "."): torch.empty(shape, device="meta") for name, shape in shapes.items()}


ROWS = KeyMap([Rule("row.{n}.{p}", "line.{n}.{p}")])


def test_everything_is_accounted_for() -> None:
    file = small(row_0_bias=(2,), row_1_bias=(2,), betas=(9,), row_7_bias=(1,), loss_a_b=(1,))
    wanted = small(line_0_bias=(2,), line_1_bias=(2,))
    ignored = (Ignored("betas|row\\.7\\.bias", "tables"), Ignored(r"loss\..+", "losses"))
    found = check_cover(ROWS, file, wanted, ignored, what="m")
    assert found.matched == ("row.0.bias", "row.1.bias")
    assert found.ignored == {"tables": ("betas", "row.7.bias"), "losses": ("loss.a.b",)}
    assert found.dropped == ("betas", "loss.a.b", "row.7.bias")
    assert found.describe() == "2 tensors used; 2 left aside: tables; 1 left aside: losses"


def test_a_reason_fits_whole_names_only() -> None:
    with pytest.raises(ModelFileError, match="betas2 is not known"):
        check_cover(ROWS, small(betas2=(1,)), {}, (Ignored("betas", "tables"),), what="m")


def test_a_misfit_is_told_in_the_names_of_the_file() -> None:
    file = small(row_0_bais=(2,), row_1_bias=(3,))
    wanted = small(line_0_bias=(2,), line_1_bias=(2,))
    with pytest.raises(ModelFileError) as error:
        check_cover(ROWS, file, wanted, what="m.ckpt")
    assert str(error.value) == (
        "m.ckpt does not fit: row.0.bias is missing (did you mean 'row.0.bais'?); "
        "row.0.bais is not known (did you mean 'row.0.bias'?); row.1.bias has shape (3,), expected (2,)"
    )


def test_the_first_ten_are_listed() -> None:
    wanted = {f"line.{n}.bias": torch.empty(1, device="meta") for n in range(40)}
    with pytest.raises(ModelFileError, match=r"row\.9\.bias is missing and 30 more$"):
        check_cover(ROWS, {}, wanted, what="m")
