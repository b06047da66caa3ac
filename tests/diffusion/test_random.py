"""Noise belongs to the picture: not to the batch, the order of questions, or the number of steps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfumato.random import NoiseSource

LEAVES = 2**22  # finest intervals of the Brownian path, on log nsr in [-20, 20]
leaf = st.integers(0, LEAVES)


def at(leaf_index: int) -> float:
    return -20 + 40 * leaf_index / LEAVES


def increment(noise: NoiseSource, i: int, j: int) -> torch.Tensor:
    """`W(j) - W(i)`, the normalisation undone."""
    return noise.between(at(i), at(j)) * math.sqrt(abs(at(j) - at(i)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_picture_of_a_batch_is_the_picture_alone(dtype: torch.dtype) -> None:
    batch = NoiseSource([3, 4, 5], (2, 4, 4), dtype=dtype)
    draws = [batch.draw() for _ in range(3)]
    path = batch.between(-1.5, 0.25)
    for i, seed in enumerate(batch.seeds):
        alone = NoiseSource([seed], (2, 4, 4), dtype=dtype)
        assert all(torch.equal(alone.draw()[0], d[i]) for d in draws)
        assert torch.equal(alone.between(-1.5, 0.25)[0], path[i])


def test_draws_are_fresh_and_seeded() -> None:
    noise = NoiseSource([0, 1], (50,))
    first, second = noise.draw(), noise.draw()
    assert first.shape == (2, 50)
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    assert torch.equal(NoiseSource([0, 1], (50,)).draw(), first)


def test_paths_and_draws_do_not_disturb_each_other() -> None:
    plain, mixed = NoiseSource([7], (8,)), NoiseSource([7], (8,))
    step = mixed.between(0, 1)
    assert torch.equal(mixed.draw(), plain.draw())
    assert torch.equal(mixed.between(0, 1), step)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    noise = NoiseSource([7], (8,))
    noise.draw(), noise.between(0, 1)
    assert torch.equal(torch.get_rng_state(), before)


@given(st.lists(leaf, min_size=3, max_size=3, unique=True))
def test_adjoining_intervals_add_up(leaves: list[int]) -> None:
    i, j, k = sorted(leaves)
    noise = NoiseSource([11, 12], (3,), dtype=torch.float64)
    whole, parts = increment(noise, i, k), increment(noise, i, j) + increment(noise, j, k)
    assert torch.allclose(whole, parts, rtol=0, atol=1e-12)


@given(st.lists(leaf, min_size=2, max_size=2, unique=True))
def test_an_interval_walked_back_is_its_negative(leaves: list[int]) -> None:
    u, v = (at(i) for i in leaves)
    noise = NoiseSource([11], (3,))
    assert torch.equal(noise.between(u, v), -noise.between(v, u))


def test_the_path_does_not_depend_on_what_was_asked_before() -> None:
    """Enough other questions to push every remembered node out of the cache."""
    fresh, asked = NoiseSource([5], (4,)), NoiseSource([5], (4,))
    for i in range(40):
        asked.between(-19.7 + i, 19.3 - i / 7)
    for u, v in [(-3.0, -2.9), (0.0, 4.0), (-20.0, 20.0), (1.0, 1.001)]:
        assert torch.equal(asked.between(u, v), fresh.between(u, v))


@pytest.mark.parametrize("ends", [(-20, 20), (-4, -3.5), (0.1, 0.11), (2.0, 2.0005)])
def test_increments_are_unit_normal(ends: tuple[float, float]) -> None:
    n = 40_000
    z = NoiseSource([1], (n,)).between(*ends)
    assert abs(float(z.mean())) < 4 / math.sqrt(n)
    assert abs(float(z.var()) - 1) < 4 * math.sqrt(2 / n)
    assert abs(float((z**4).mean()) - 3) < 4 * math.sqrt(96 / n)


def test_disjoint_increments_and_different_pictures_are_independent() -> None:
    n = 40_000
    noise = NoiseSource([1, 2], (n,))
    a, b = noise.between(-1, 0), noise.between(0, 0.3)
    for x, y in [(a[0], b[0]), (a[0], a[1]), (a[0], b[1]), (a[0], noise.draw()[0])]:
        assert abs(float((x * y).mean())) < 4 / math.sqrt(n)


def test_a_low_precision_batch_gets_the_same_path_rounded_once() -> None:
    """Increments are differences: taken in bfloat16 a short one would be all rounding error."""
    full, low = NoiseSource([9], (1000,)), NoiseSource([9], (1000,), dtype=torch.bfloat16)
    for ends in [(-1.0, 1.0), (0.5, 0.5001)]:
        assert torch.equal(low.between(*ends), full.between(*ends).to(torch.bfloat16))


def test_clean_and_fully_noisy_ends_are_moved_to_the_border() -> None:
    noise = NoiseSource([9], (10,))
    assert torch.equal(noise.between(-math.inf, 0), noise.between(-20, 0))
    assert torch.equal(noise.between(0, math.inf), noise.between(0, 20))


def test_a_new_path_is_independent_of_the_last_and_as_well_fixed_by_the_seed() -> None:
    n = 40_000
    noise, other = NoiseSource([1], (n,)), NoiseSource([1], (n,))
    paths = []
    for _ in range(3):
        paths.append(noise.between(-1, 0))
        assert torch.equal(other.between(-1, 0), paths[-1])
        noise.new_path()
        other.new_path()
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        assert abs(float((paths[a] * paths[b]).mean())) < 4 / math.sqrt(n)


@pytest.mark.parametrize("ends", [(0.0, 0.0), (21.0, 22.0)])
def test_an_empty_interval_is_refused(ends: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="two different ends"):
        NoiseSource([0], (1,)).between(*ends)


def test_another_shape_goes_on_in_the_same_streams() -> None:
    noise = NoiseSource([3, 4], (2, 5))
    first = noise.draw()
    after = noise.reshaped((4, 4)).draw()
    for i, seed in enumerate((3, 4)):
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(first[i], torch.randn(2, 5, generator=generator))
        assert torch.equal(after[i], torch.randn(4, 4, generator=generator))
