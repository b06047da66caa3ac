"""Attention kernels beside torch's own, and the choice among them by a short measurement.

`blocks` computes `softmax(scale Q K') V` for some hundred queries at a time with plain matrix products. On a CPU whose
matrix units are fast in bfloat16 it leaves torch's fused kernel behind; only one block of scores is ever in memory.
Scores are rounded to the type of the inputs, where the fused kernel keeps float32. Where scores are known to be small,
and the values have room for another column, ones in it add up the weights, and one pass of exponentials stands in the
place of the softmax. `adaptive` takes it for long inputs in half precision alone. The names are known to
`set_attention_kernel` once this module is imported.

>>> from sfumato.networks.attention import math
>>> q, k, v = (torch.randn(1, 2, 70, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
>>> bool(torch.allclose(blocks(q, k, v, None, 0.3), math(q, k, v, None, 0.3), atol=1e-6))
True
>>> chosen(torch.float32, torch.device("cpu"))
'sdpa'
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.profiler import record_function

from sfumato.backends.timing import times_as_fast
from sfumato.networks.attention import KERNELS, Kernel, sdpa, set_attention_kernel

SCOPE = "sfumato::attention"
"""What a profile calls the whole of it."""
ROWS = 512
"""Queries in a block: its scores at 4,096 keys are 4 MB in bfloat16, about a core's share of the cache."""
LEAST = 1024
"""Queries and keys below which the fused kernel is not left."""
SAFE = 60.0
"""No score can be larger where the longest query times the longest key is not: its exponential needs no shift then."""
_LOG2_E = 1 / math.log(2)  # powers of two take less time than those of e, and keys are scaled anyway
_LANES = 16  # products into a width that is a multiple of this are fast
_PROBE = (1, 2, 2048, 40)  # the shape that is measured: some hundredths of a second


def blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention block by block; with a mask, gradients or on a GPU by `sdpa`.

    Args:
        q: (B, heads, L, D). k, v: (B, heads, S, D). mask, scale: as every `Kernel`'s.
    """
    trained = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if mask is not None or trained or q.device.type != "cpu":
        return sdpa(q, k, v, mask, scale)
    with record_function(SCOPE):
        return _blocks(q, k, v, scale)


def _blocks(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    count, heads, length, _ = q.shape
    width, rows = v.shape[-1], min(ROWS, q.shape[2])
    room = width % _LANES != 0 and q.dtype != torch.float16  # whose numbers end at 65,504
    out = q.new_empty(count, length, heads, width)  # so that heads need no gathering afterwards
    scores = q.new_empty(rows, k.shape[2])
    mixed = q.new_empty(rows, width + -width % _LANES)
    for b in range(count):
        for h in range(heads):
            queries = q[b, h].contiguous()
            bare = room and bool(_longest(queries) * _longest(k[b, h]) * abs(scale) <= SAFE)
            keys = k[b, h] * (scale * _LOG2_E if bare else scale)
            values = pad(v[b, h], (0, -width % _LANES), value=1.0)
            for start in range(0, length, ROWS):
                n = min(ROWS, length - start)
                torch.mm(queries[start : start + n], keys.t(), out=scores[:n])
                if bare:
                    torch.exp2(scores[:n], out=scores[:n])
                else:
                    torch.softmax(scores[:n], dim=-1, out=scores[:n])
                torch.mm(scores[:n], values, out=mixed[:n])
                part = out[b, start : start + n, h]
                if bare:  # a column of ones has added up the weights
                    torch.div(mixed[:n, :width], mixed[:n, -1:], out=part)
                else:
                    part.copy_(mixed[:n, :width])
    return out.transpose(1, 2)


def _longest(rows: Tensor) -> Tensor:
    """The length of the longest row, float32."""
    length: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32)
    return length.max()


def adaptive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """`blocks` for long inputs in half precision, else `sdpa`."""
    if q.dtype in (torch.bfloat16, torch.float16) and q.shape[2] >= LEAST and k.shape[2] >= LEAST:
        return blocks(q, k, v, mask, scale)
    return sdpa(q, k, v, mask, scale)


KERNELS |= {"blocks": blocks, "adaptive": adaptive}


@cache
def chosen(dtype: torch.dtype, device: torch.device) -> str:
    """The name of the kernel that is faster here: torch's own, or `adaptive`, which can only be so in half precision on
    a CPU. Measured once in a process, at 2,048 tokens in heads of width 40."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return "sdpa"
    q, k, v = (torch.randn(_PROBE, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3))
    gain = times_as_fast(lambda: adaptive(q, k, v, None, 0.16), lambda: sdpa(q, k, v, None, 0.16))
    return "adaptive" if gain > 1 else "sdpa"


@contextmanager
def using(kernel: str | Kernel) -> Iterator[None]:
    """Attention by this kernel within the block. Raises `UserError` for an unknown name."""
    before = set_attention_kernel(kernel)
    try:
        yield
    finally:
        set_attention_kernel(before)
