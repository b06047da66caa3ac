"""Attention kernels beside torch's own, known by name once this module is imported (`sfumato bench` compares them).

`blocks` computes `softmax(scale Q K') V` for some hundred queries at a time with plain matrix products. On a CPU whose
matrix units are fast in bfloat16 it leaves torch's fused kernel behind; only one block of scores is ever in memory.
Scores are rounded to the type of the inputs, where the fused kernel keeps float32.

>>> from sfumato.networks.attention import math
>>> q, k, v = (torch.randn(1, 2, 70, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
>>> bool(torch.allclose(blocks(q, k, v, None, 0.3), math(q, k, v, None, 0.3), atol=1e-6))
True
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.networks.attention import KERNELS, sdpa

ROWS = 512
"""Queries in a block: its scores at 4,096 keys are 4 MB in bfloat16, about a core's share of the cache."""
LEAST = 1024
"""Queries below which the fused kernel is not left."""


def blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention block by block; with a mask, short inputs, gradients or on a GPU by `sdpa`.

    Args:
        q: (B, heads, L, D). k, v: (B, heads, S, D). mask, scale: as every `Kernel`'s.
    """
    trained = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if mask is not None or trained or q.device.type != "cpu":
        return sdpa(q, k, v, mask, scale)
    return _blocks(q, k, v, scale)


def _blocks(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    count, heads, length, _ = q.shape
    out = torch.empty(count, length, heads, v.shape[-1], dtype=q.dtype)  # so that heads need no gathering afterwards
    scores = torch.empty(min(ROWS, length), k.shape[2], dtype=q.dtype)
    shares = torch.empty_like(scores)
    for b in range(count):
        for h in range(heads):
            keys, values = (k[b, h] * scale).t(), v[b, h].contiguous()
            queries = q[b, h].contiguous()
            for start in range(0, length, ROWS):
                rows = min(ROWS, length - start)
                torch.mm(queries[start : start + rows], keys, out=scores[:rows])
                torch.softmax(scores[:rows], dim=-1, out=shares[:rows])
                out[b, start : start + rows, h] = shares[:rows] @ values
    return out.transpose(1, 2)


def adaptive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """`blocks` for long inputs in half precision, else `sdpa`."""
    if q.dtype in (torch.bfloat16, torch.float16) and q.shape[2] >= LEAST and k.shape[2] >= LEAST:
        return blocks(q, k, v, mask, scale)
    return sdpa(q, k, v, mask, scale)


KERNELS |= {"blocks": blocks, "adaptive": adaptive}
