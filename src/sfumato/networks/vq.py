"""Vector quantisation: latents rounded to the nearest row of a learned table, and the care of that table.

The gradient passes the rounding unchanged (straight-through); two losses pull codes to latents and latents to
codes (van den Oord 2017, eq. 3). How often each code is used is counted by the caller, with `code_counts`.

>>> quantize = VectorQuantizer(2, 1)
>>> quantize.embedding.weight.data = torch.tensor([[0.0], [1.0]])
>>> quantize(torch.tensor([[[[0.2, 0.9, 0.6]]]])).codes
tensor([[[0, 1, 1]]])
>>> perplexity(code_counts(torch.tensor([0, 1, 1, 0]), 2))
2.0
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.networks.resnet import widen

CHUNK = 2**24
"""Distances that are held in memory at a time."""


@dataclass(frozen=True)
class Quantized:
    """A quantised latent.

    Attributes:
        z_q: (B, D, H, W), rows of the codebook, with the gradient of the latent before rounding.
        codes: (B, H, W), integers in [0, K).
        codebook_loss: (), `mean((sg[z] - e)^2)`, moves the codes; `sg` stops the gradient.
        commitment_loss: (), `mean((z - sg[e])^2)`, moves the encoder.
    """

    z_q: Tensor
    codes: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor

    def loss(self, beta: float = 0.25, *, legacy: bool = False) -> Tensor:
        """`codebook + beta commitment` (van den Oord 2017, eq. 3), a scalar.

        With `legacy`, `beta codebook + commitment`: what the released VQGAN and latent diffusion code computes, and
        diffusers by default.
        """
        if legacy:
            return beta * self.codebook_loss + self.commitment_loss
        return self.codebook_loss + beta * self.commitment_loss


def nearest_codes(z: Tensor, codebook: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """The row of `codebook` (K, D) nearest to each row of `z` (N, D) in squared L2, as integers (N,).

    `|z - e|^2 = |z|^2 + |e|^2 - 2 z e`, of which the first term is the same for all codes. Computed in float32
    or wider, also under autocast, at most `chunk` distances at a time; ties go to the lowest index.
    """
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        dtype = torch.promote_types(z.dtype, codebook.dtype)
        z, table = widen(z.detach().to(dtype)), widen(codebook.detach().to(dtype))
        squares, across = table.square().sum(dim=1), table.t()
        rows = max(1, chunk // len(table))
        found = [torch.addmm(squares, part, across, alpha=-2).argmin(dim=1) for part in torch.split(z, rows)]
        return found[0] if len(found) == 1 else torch.cat(found)


class VectorQuantizer(nn.Module):
    """A table of codes, `embedding.weight` (K, D), that begins uniform in [-1/K, 1/K]."""

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, dim)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)

    def forward(self, z: Tensor) -> Quantized:
        """Round latents (B, D, H, W) to their nearest codes.

        Straight-through: `z_q = z + sg[e - z]`, so that `d z_q / d z` is the identity (van den Oord 2017, section 3.2).

        Raises:
            UserError: for another width than the codes have.
        """
        table = self.embedding.weight
        if z.ndim != 4 or z.shape[1] != table.shape[1]:
            raise UserError(f"z must be (B, {table.shape[1]}, H, W), got {tuple(z.shape)}")
        rows = z.permute(0, 2, 3, 1)
        codes = nearest_codes(rows.reshape(-1, rows.shape[-1]), table).view(rows.shape[:-1])
        e = self.lookup(codes)
        codebook, commitment = e - z.detach(), z - e.detach()
        return Quantized(
            z_q=z - commitment.detach(),
            codes=codes,
            codebook_loss=widen(codebook).square().mean(),
            commitment_loss=widen(commitment).square().mean(),
        )

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes (B, H, W), integers in [0, K) -> their rows (B, D, H, W).

        Raises:
            UserError: for another shape, or for a code outside the table (found on the CPU only).
        """
        if codes.ndim != 3 or codes.is_floating_point():
            raise UserError(f"codes must be integers (B, H, W), got {codes.dtype} {tuple(codes.shape)}")
        try:
            rows: Tensor = self.embedding(codes.long())
        except IndexError:
            raise UserError(
                f"codes must lie in 0 to {self.embedding.num_embeddings - 1}, "
                f"got {int(codes.min())} to {int(codes.max())}"
            ) from None
        return rows.permute(0, 3, 1, 2)


def code_counts(codes: Tensor, size: int) -> Tensor:
    """How often each of `size` codes occurs in `codes` (any shape): integers (size,). Add them up over calls.

    Raises:
        UserError: when a code lies outside the table.
    """
    counts = torch.bincount(codes.flatten(), minlength=size)
    if len(counts) != size:
        raise UserError(f"codes must lie in 0 to {size - 1}, got {len(counts) - 1}")
    return counts


def perplexity(counts: Tensor) -> float:
    """`exp(-sum p ln p)` of the frequencies `p = counts / sum(counts)`, (K,): from 1 (one code) to K (all alike).

    Raises:
        UserError: when nothing was counted.
    """
    total = counts.sum()
    if total <= 0:
        raise UserError("perplexity needs at least one counted code, got none")
    return float(torch.special.entr(counts.double() / total).sum().exp())


def restart_dead(
    codebook: Tensor, counts: Tensor, candidates: Tensor, generator: torch.Generator, threshold: float = 1.0
) -> int:
    """Give codes that are hardly used a new place: that of an encoder output drawn at random.

    The random restarts of Dhariwal 2020 (Jukebox), section 3.1. The same generator state and the same arguments give
    the same table, bit for bit.

    Args:
        codebook: (K, D), changed in place. An optimizer's running moments of these rows are the caller's to clear.
        counts: (K,), uses since the last call. Codes with fewer than `threshold` are dead.
        candidates: (N, D), encoder outputs. Each is used at most once: with fewer candidates than dead codes only the
            first N dead codes move.
        generator: source of the draw.

    Returns:
        How many codes were moved.

    Raises:
        UserError: when the shapes do not fit.
    """
    if counts.shape != codebook.shape[:1] or candidates.ndim != 2 or candidates.shape[1] != codebook.shape[1]:
        raise UserError(
            f"a codebook {tuple(codebook.shape)} needs counts ({len(codebook)},) and candidates "
            f"(N, {codebook.shape[1]}), got {tuple(counts.shape)} and {tuple(candidates.shape)}"
        )
    dead = (counts < threshold).nonzero().flatten()[: len(candidates)].to(codebook.device)
    drawn = torch.randperm(len(candidates), generator=generator, device=generator.device)[: len(dead)]
    with torch.no_grad():
        codebook[dead] = candidates.detach()[drawn.to(candidates.device)].to(codebook)
    return len(dead)
