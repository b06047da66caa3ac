"""Vector quantisation: nearest codes, straight-through gradients, both losses, and the care of the table."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sfumato.errors import UserError
from sfumato.networks.vq import VectorQuantizer, code_counts, nearest_codes, perplexity, restart_dead


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantizer(codes: int = 16, dim: int = 4) -> VectorQuantizer:
    module = VectorQuantizer(codes, dim)
    with torch.no_grad():
        module.embedding.weight.copy_(noise(codes, dim, seed=5))
    return module


def brute_force(z: Tensor, table: Tensor) -> Tensor:
    return (z.double()[:, None] - table.double()[None]).square().sum(dim=-1).argmin(dim=1)


@given(st.integers(1, 40), st.integers(2, 30), st.integers(1, 6), st.integers(0, 99), st.integers(1, 200))
def test_the_nearest_code_is_that_of_all_distances_whatever_the_chunk(
    n: int, k: int, d: int, seed: int, chunk: int
) -> None:
    z, table = noise(n, d, seed=seed), noise(k, d, seed=seed + 1000)
    found = nearest_codes(z, table), brute_force(z, table)
    distances = [(z.double() - table.double()[codes]).square().sum(dim=1) for codes in found]
    torch.testing.assert_close(distances[0], distances[1], rtol=1e-5, atol=1e-6)
    again = nearest_codes(z, table, chunk=chunk)
    assert again.shape == (n,)
    near = (z.double() - table.double()[again]).square().sum(dim=1)
    torch.testing.assert_close(near, distances[1], rtol=1e-5, atol=1e-6)


def test_ties_go_to_the_lowest_index() -> None:
    assert nearest_codes(torch.zeros(1, 2), torch.ones(5, 2)).tolist() == [0]


def test_half_types_and_autocast_compare_in_float32() -> None:
    z = noise(64, 4).bfloat16()
    table = (noise(32, 4, seed=1) * 0.01 + z[0].float()).clone()
    with torch.autocast("cpu", torch.bfloat16):
        found = nearest_codes(z, table)
    assert torch.equal(found, brute_force(z, table))


def test_a_quantised_latent_holds_rows_of_the_table() -> None:
    module = quantizer()
    z = noise(2, 4, 3, 5)
    out = module(z)
    assert out.z_q.shape == z.shape and out.codes.shape == (2, 3, 5)
    torch.testing.assert_close(out.z_q, module.lookup(out.codes))
    assert torch.equal(out.codes.flatten(), brute_force(z.movedim(1, -1).flatten(0, 2), module.embedding.weight))
    codes = torch.arange(12).view(1, 3, 4)
    assert torch.equal(module(module.lookup(codes)).codes, codes)


def test_the_table_begins_uniform() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = VectorQuantizer(50, 40)
    weight = module.embedding.weight.detach()
    assert list(module.state_dict()) == ["embedding.weight"]
    assert float(weight.abs().max()) <= 1 / 50
    assert float(weight.std()) == pytest.approx(1 / 50 / math.sqrt(3), rel=0.05)


def test_gradients_pass_straight_through() -> None:
    module, z, upstream = quantizer(), noise(2, 4, 3, 3).requires_grad_(), noise(2, 4, 3, 3, seed=1)
    (module(z).z_q * upstream).sum().backward()
    assert z.grad is not None and torch.equal(z.grad, upstream)
    assert module.embedding.weight.grad is None


def test_each_loss_moves_its_own_side_only() -> None:
    module, z = quantizer(), noise(2, 4, 3, 3).requires_grad_()
    table = module.embedding.weight
    out = module(z)
    gap = module.lookup(out.codes).detach() - z.detach()
    torch.testing.assert_close(out.codebook_loss.detach(), gap.square().mean())
    torch.testing.assert_close(out.commitment_loss.detach(), gap.square().mean())
    to_z, to_table = torch.autograd.grad(out.codebook_loss, [z, table], allow_unused=True)
    assert to_z is None
    pulls = 2 * gap.movedim(1, -1).flatten(0, 2) / gap.numel()
    torch.testing.assert_close(to_table, torch.zeros_like(table).index_add_(0, out.codes.flatten(), pulls))
    to_z, to_table = torch.autograd.grad(out.commitment_loss, [z, table], allow_unused=True)
    assert to_table is None
    torch.testing.assert_close(to_z, -2 * gap / gap.numel())


@pytest.mark.parametrize(("legacy", "of_encoder", "of_table"), [(False, 0.25, 1.0), (True, 1.0, 0.25)])
def test_beta_weighs_the_term_of_its_convention(legacy: bool, of_encoder: float, of_table: float) -> None:
    module, z = quantizer(), noise(2, 4, 3, 3).requires_grad_()
    out = module(z)
    loss = out.loss(0.25, legacy=legacy)
    torch.testing.assert_close(loss, 1.25 * out.codebook_loss)
    got = torch.autograd.grad(loss, [z, module.embedding.weight], retain_graph=True)
    (encoder,) = torch.autograd.grad(out.commitment_loss, z, retain_graph=True)
    (table,) = torch.autograd.grad(out.codebook_loss, module.embedding.weight)
    torch.testing.assert_close(got[0], of_encoder * encoder)
    torch.testing.assert_close(got[1], of_table * table)


def test_layout_of_the_latent_is_kept() -> None:
    module, z = quantizer(), noise(2, 4, 3, 5)
    assert module(z).z_q.is_contiguous()
    last = module(z.contiguous(memory_format=torch.channels_last))
    assert last.z_q.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last.z_q, module(z).z_q)


def test_counts_add_up_over_calls() -> None:
    codes = torch.tensor([[[0, 2], [2, 1]]])
    assert code_counts(codes, 4).tolist() == [1, 1, 2, 0]
    both = code_counts(codes, 4) + code_counts(codes + 1, 4)
    assert torch.equal(both, code_counts(torch.cat([codes, codes + 1]), 4))
    with pytest.raises(UserError, match="codes must lie in 0 to 1, got 2"):
        code_counts(codes, 2)


@pytest.mark.parametrize(
    ("counts", "expected"), [([7, 0, 0], 1.0), ([3, 3, 3, 3], 4.0), ([1, 1, 0, 0], 2.0), ([3, 1], 4 / 3**0.75)]
)
def test_perplexity_is_the_number_of_codes_that_would_be_used_alike(counts: list[int], expected: float) -> None:
    assert perplexity(torch.tensor(counts)) == pytest.approx(expected)


def test_perplexity_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="at least one counted code"):
        perplexity(torch.zeros(4))


def restarted(counts: list[float], candidates: int, seed: int, threshold: float = 1.0) -> tuple[int, Tensor, Tensor]:
    table = noise(len(counts), 3, seed=1)
    pool = noise(candidates, 3, seed=2)
    moved = restart_dead(table, torch.tensor(counts), pool, torch.Generator().manual_seed(seed), threshold)
    return moved, table, pool


def rows(table: Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in table.tolist()}


def test_dead_codes_move_to_different_candidates_and_live_ones_stay() -> None:
    moved, table, pool = restarted([0, 5, 0, 1, 0], candidates=8, seed=0)
    before = noise(5, 3, seed=1)
    assert moved == 3
    assert torch.equal(table[[1, 3]], before[[1, 3]])
    taken = rows(table[[0, 2, 4]])
    assert len(taken) == 3 and taken <= rows(pool)


def test_a_restart_depends_on_the_generator_alone() -> None:
    assert torch.equal(restarted([0] * 6, 20, seed=3)[1], restarted([0] * 6, 20, seed=3)[1])
    assert not torch.equal(restarted([0] * 6, 20, seed=3)[1], restarted([0] * 6, 20, seed=4)[1])


def test_the_threshold_says_what_is_dead() -> None:
    counts = [0.0, 0.5, 1.0, 2.0]
    assert [restarted(counts, 9, 0, threshold)[0] for threshold in (0.0, 0.1, 1.0, 1.5, 3.0)] == [0, 1, 2, 3, 4]


def test_with_few_candidates_only_the_first_dead_codes_move() -> None:
    moved, table, pool = restarted([0, 0, 0, 0], candidates=2, seed=0)
    assert moved == 2
    assert rows(table[:2]) == rows(pool)
    assert torch.equal(table[2:], noise(4, 3, seed=1)[2:])


def test_a_parameter_that_learns_can_be_restarted() -> None:
    module = quantizer(8, 4)
    z = noise(5, 4, 4, 4).requires_grad_()
    module(z).loss().backward()
    pool = z.movedim(1, -1).flatten(0, 2)
    generator = torch.Generator().manual_seed(0)
    assert restart_dead(module.embedding.weight, torch.zeros(8), pool, generator) == 8
    assert module.embedding.weight.requires_grad and module.embedding.weight.is_leaf
    counts = code_counts(module(z).codes, 8)
    assert bool((counts > 0).all())


def test_other_shapes_are_refused() -> None:
    module = quantizer()
    with pytest.raises(UserError, match=r"z must be \(B, 4, H, W\), got \(1, 3, 2, 2\)"):
        module(torch.zeros(1, 3, 2, 2))
    with pytest.raises(UserError, match=r"codes must be integers \(B, H, W\)"):
        module.lookup(torch.zeros(1, 2, 2))
    with pytest.raises(UserError, match="codes must lie in 0 to 15, got 0 to 16"):
        module.lookup(torch.tensor([[[0, 16]]]))
    with pytest.raises(UserError, match=r"needs counts \(16,\) and candidates \(N, 4\), got \(3,\) and \(5, 4\)"):
        restart_dead(module.embedding.weight, torch.zeros(3), torch.zeros(5, 4), torch.Generator())
