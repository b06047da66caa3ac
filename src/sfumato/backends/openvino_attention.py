"""OpenVINO's fused attention, for a network that torch computes otherwise.

OpenVINO computes softmax(QK')V in one pass whose scores stay in the cache, with sums in float32. One program
is made for each shape, in some hundredths of a second; it reads queries, keys and values where they lie, and writes
where it is told. Only where it is called does `openvino` have to be installed.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from sfumato.backends import openvino

KEPT = 32
"""Programs that are kept, those used last: a network of Stable Diffusion has 8 shapes, a program some MB."""


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale Q K') V.

    Args:
        q: (B, heads, L, D) on the CPU, read where it lies if it is a transposed (B, L, heads, D), else copied.
        k: (B, heads, S, D). v: (B, heads, S, any width).

    Raises:
        UserError: where OpenVINO is not installed.
    """
    own = q.shape[-1] ** -0.5  # what OpenVINO scales by
    lying = [one.detach().transpose(1, 2).contiguous() for one in (q if scale == own else q * (scale / own), k, v)]
    out = q.new_empty(*lying[0].shape[:3], v.shape[-1])
    with _lock:
        request = _request(tuple(one.shape for one in lying), q.dtype)
        for index, one in enumerate(lying):
            request.set_input_tensor(index, _shared(one))
        request.set_output_tensor(0, _shared(out))
        request.infer()
    return out.transpose(1, 2)


_lock = threading.Lock()
_requests: OrderedDict[tuple[Any, ...], Any] = OrderedDict()


def _request(shapes: tuple[torch.Size, ...], dtype: torch.dtype) -> Any:
    """The program for these shapes, made where there is none yet."""
    key = (shapes, dtype, torch.get_num_threads())
    if key not in _requests:
        while len(_requests) >= KEPT:
            _requests.popitem(last=False)
        _requests[key] = openvino.compiled(_graph(shapes, dtype), dtype).create_infer_request()
    _requests.move_to_end(key)
    return _requests[key]


def _graph(shapes: tuple[torch.Size, ...], dtype: torch.dtype) -> Any:
    """Tensors (B, tokens, heads, width) in, the same out; heads change places with tokens within."""
    ov, ops = openvino.package(), openvino.package("opset13")
    swap = ops.constant([0, 2, 1, 3], dtype=int)
    given = [ops.parameter(list(shape), getattr(ov.Type, openvino.HINTS[dtype])) for shape in shapes]
    heads = ops.scaled_dot_product_attention(*(ops.transpose(one, swap) for one in given))
    return ov.Model([ops.transpose(heads, swap)], given)


def _shared(tensor: Tensor) -> Any:
    """A view of its memory for OpenVINO."""
    ov = openvino.package()
    bits = tensor if tensor.dtype == torch.float32 else tensor.view(torch.uint16)
    return ov.Tensor(bits.numpy(), ov.Shape(list(tensor.shape)), getattr(ov.Type, openvino.HINTS[tensor.dtype]))
