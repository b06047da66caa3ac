"""Attention with three separate seams: kernel, semantics and weights.

The *kernel* computes softmax(QK')V and is chosen once per process (`set_attention_kernel`). The *semantics*
are a processor, `processor(attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None,
**kwargs)`, the contract that the field knows: `Attention` offers every attribute that a foreign processor
reads. The *weights* are plain linear layers.

>>> attn = Attention(32, heads=4, head_dim=8)
>>> attn(torch.zeros(1, 6, 32)).shape
torch.Size([1, 6, 32])
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import UserError, nearest, raise_unknown

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
"""`(q, k, v, mask, scale) -> out`: q (B, heads, L, D), k, v (B, heads, S, D), mask additive, bool or None."""


WRITTEN_OUT = 2**24
"""Training in half precision on a CPU writes out up to so many scores: torch's own backward pass takes several times
as long there."""


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """torch's scaled dot-product attention, or `math` where that is faster."""
    trained = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if trained and q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        if q.shape[:3].numel() * k.shape[2] <= WRITTEN_OUT:
            return math(q, k, v, mask, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def math(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The equation as written, all scores in memory and in float32: the reference for other kernels."""
    with torch.autocast(q.device.type, enabled=False):
        scores = scale * (q.float() @ k.float().transpose(-1, -2))
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, float("-inf"))
        elif mask is not None:
            scores = scores + mask
        return (scores.softmax(dim=-1) @ v.float()).to(v.dtype)


KERNELS: dict[str, Kernel] = {"sdpa": sdpa, "math": math}
_kernel: Kernel = sdpa


def attention_kernel() -> Kernel:
    """The kernel that default processors use."""
    return _kernel


def set_attention_kernel(kernel: str | Kernel) -> Kernel:
    """Use another kernel, a name in `KERNELS` or a function, from now on. Returns the one before.

    Raises `UserError` for an unknown name.
    """
    global _kernel
    if isinstance(kernel, str):
        if kernel not in KERNELS:
            raise_unknown("attention kernel", kernel, KERNELS)
        kernel = KERNELS[kernel]
    before, _kernel = _kernel, kernel
    return before


class AttnProcessor(nn.Module):
    """The default semantics: plain self- or cross-attention through the chosen kernel. Has no parameters."""

    def forward(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(B, L, C) or (B, C, H, W) -> the same shape; `kwargs` are meant for other processors."""
        residual, shape = hidden_states, hidden_states.shape
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if attn.group_norm is not None and hidden_states.ndim == 4:
            hidden_states = attn.group_norm(hidden_states)
        x = hidden_states.flatten(2).transpose(1, 2) if hidden_states.ndim == 4 else hidden_states
        if attn.group_norm is not None and hidden_states.ndim == 3:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        context = x if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross is not None:
            context = attn.norm_encoder_hidden_states(context)
        q, k, v = (
            attn.split_heads(p(y)) for p, y in ((attn.to_q, x), (attn.to_k, context), (attn.to_v, context))
        )
        mask = None if attention_mask is None else _mask_for_kernel(attn, attention_mask, context.shape[1], q)
        out = attention_kernel()(q, k, v, mask, attn.scale).transpose(1, 2).flatten(2)
        out = cast(Tensor, attn.to_out[1](attn.to_out[0](out)))
        if len(shape) == 4:
            out = out.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            out = residual + out
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor


def _mask_for_kernel(attn: Attention, mask: Tensor, length: int, q: Tensor) -> Tensor:
    """(B, [1 or L,] S), or the same for each of B x heads -> something that broadcasts over (B, heads, L, S)."""
    if len(mask) == len(q) and mask.shape[-1] == length:
        prepared = mask.reshape(len(q), 1, -1, length)
    else:
        repeated = attn.prepare_attention_mask(mask, length, len(q))
        prepared = repeated.view(len(q), attn.heads, -1, repeated.shape[-1])
    return prepared if prepared.dtype == torch.bool else prepared.to(q.dtype)


def accepted_keywords(processor: Any) -> set[str] | None:
    """The names of a processor's parameters; None when it takes any keyword (the default takes none besides its
    own)."""
    plain = isinstance(processor, nn.Module) and type(processor).__call__ is nn.Module.__call__
    parameters = inspect.signature(processor.forward if plain else processor).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return None if takes_any and type(processor) is not AttnProcessor else set(parameters)


class Attention(nn.Module):
    """Multi-head attention whose computation is its `processor`'s.

    Args:
        dim: width of the input (B, L, dim) or (B, dim, H, W).
        heads, head_dim: number and width of the heads.
        context_dim: width of what is attended to; None for self-attention.
        bias: of the query, key and value projections (the output always has one).
        groups: of a GroupNorm before the projections; None for no norm.
        spatial_norm: a norm before the projections that is also told `temb`; instead of a GroupNorm.
        residual: add the input to the output.
        upcast_attention: processors that write out the scores make them in float32. The library's kernels
            always do.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int,
        context_dim: int | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        groups: int | None = None,
        spatial_norm: nn.Module | None = None,
        eps: float = 1e-5,
        residual: bool = False,
        rescale_output_factor: float = 1.0,
        upcast_attention: bool = False,
        processor: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if heads < 1:
            raise UserError(f"attention over {dim} channels with heads of width {head_dim} has no head")
        inner = heads * head_dim
        self.heads, self.inner_dim, self.scale = heads, inner, head_dim**-0.5
        self.residual_connection, self.rescale_output_factor = residual, rescale_output_factor
        self.cross_attention_dim = context_dim if context_dim is not None else dim
        self.is_cross_attention = context_dim is not None
        self.upcast_attention, self.upcast_softmax = upcast_attention, False
        self.group_norm = nn.GroupNorm(groups, dim, eps) if groups is not None else None
        self.spatial_norm = spatial_norm
        self.norm_cross: nn.Module | None = None
        self.norm_q: nn.Module | None = None
        self.norm_k: nn.Module | None = None
        self.to_q = nn.Linear(dim, inner, bias=bias)
        self.to_k = nn.Linear(self.cross_attention_dim, inner, bias=bias)
        self.to_v = nn.Linear(self.cross_attention_dim, inner, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(inner, dim), nn.Dropout(dropout)])
        self.processor: Any = processor if processor is not None else AttnProcessor()

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Run the processor. Keyword arguments that its signature does not name are not passed on."""
        if kwargs and (known := accepted_keywords(self.processor)) is not None:
            kwargs = {name: value for name, value in kwargs.items() if name in known}
        out: Tensor = self.processor(
            self,
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=attention_mask,
            **kwargs,
        )
        return out

    def set_processor(self, processor: Any) -> None:
        """Replace the processor by any callable of the contract."""
        self.__dict__.pop("processor", None)
        self._modules.pop("processor", None)
        self.processor = processor

    def get_processor(self) -> Any:
        """The processor in use."""
        return self.processor

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, L, heads * D) -> (B, heads, L, D)."""
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def head_to_batch_dim(self, x: Tensor, out_dim: int = 3) -> Tensor:
        """(B, L, heads * D) -> (B * heads, L, D), or (B, heads, L, D) when `out_dim` is 4."""
        split = self.split_heads(x)
        return split.flatten(0, 1) if out_dim == 3 else split

    def batch_to_head_dim(self, x: Tensor) -> Tensor:
        """(B * heads, L, D) -> (B, L, heads * D)."""
        return x.reshape(-1, self.heads, *x.shape[1:]).transpose(1, 2).flatten(2)

    def get_attention_scores(
        self, query: Tensor, key: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """`softmax(scale Q K' + mask)` over (B * heads, L, D) and (B * heads, S, D) -> (B * heads, L, S)."""
        dtype = query.dtype
        if self.upcast_attention:
            query, key = query.float(), key.float()
        scores = torch.bmm(query * self.scale, key.transpose(1, 2))
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, float("-inf"))
        elif attention_mask is not None:
            scores = scores + attention_mask
        return (scores.float() if self.upcast_softmax else scores).softmax(dim=-1).to(dtype)

    def prepare_attention_mask(
        self, attention_mask: Tensor | None, target_length: int, batch_size: int, out_dim: int = 3
    ) -> Any:
        """Repeat an additive mask (B, 1, S) for each head: (B * heads, 1, S), or (B, heads, 1, S) for
        `out_dim` 4.

        A mask of another length than `target_length` covers leading keys only: `target_length` keys that are
        never masked follow (what processors that put text before pixels rely on).
        """
        if attention_mask is None:
            return None
        if attention_mask.shape[-1] != target_length:
            unmasked = 1 if attention_mask.dtype == torch.bool else 0
            attention_mask = F.pad(attention_mask, (0, target_length), value=unmasked)
        if out_dim == 4:
            return attention_mask[:, None].repeat_interleave(self.heads, dim=1)
        if len(attention_mask) < batch_size * self.heads:
            attention_mask = attention_mask.repeat_interleave(self.heads, dim=0)
        return attention_mask

    def norm_encoder_hidden_states(self, encoder_hidden_states: Tensor) -> Tensor:
        """Apply `norm_cross` to what is attended to, (B, S, C)."""
        if self.norm_cross is None:
            raise UserError("this attention has no norm_cross")
        if isinstance(self.norm_cross, nn.GroupNorm):
            return cast(Tensor, self.norm_cross(encoder_hidden_states.transpose(1, 2)).transpose(1, 2))
        return cast(Tensor, self.norm_cross(encoder_hidden_states))


class AttentionHost(nn.Module):
    """A network that shows the processors of its attentions by name.

    Their order is the order of module registration, which is part of file formats (IP-Adapter).
    """

    @property
    def attn_processors(self) -> dict[str, Any]:
        """`"<module path>.processor" -> processor`."""
        return {
            f"{name}.processor": a.processor for name, a in self.named_modules() if isinstance(a, Attention)
        }

    def set_attn_processor(self, processor: Any) -> None:
        """Set one processor for every attention, or a dict with exactly the keys of `attn_processors`.

        Raises:
            UserError: when the dict's keys differ or a value is not callable; nothing is changed then.
        """
        places = {f"{name}.processor": a for name, a in self.named_modules() if isinstance(a, Attention)}
        chosen = processor if isinstance(processor, Mapping) else dict.fromkeys(places, processor)
        if set(chosen) != set(places):
            odd = next(iter([k for k in chosen if k not in places] or [k for k in places if k not in chosen]))
            what = "missing" if odd in places else f"unknown{nearest(odd, places)}"
            raise UserError(f"expected exactly the {len(places)} names of attn_processors; {odd!r} is {what}")
        for name, one in chosen.items():
            if isinstance(one, type):
                raise UserError(f"the processor for {name!r} must be an object, not the class: {one.__name__}()")
            if not callable(one):
                raise UserError(f"the processor for {name!r} must be callable, got {type(one).__name__}")
        for name, attention in places.items():
            attention.set_processor(chosen[name])

    def set_default_attn_processor(self) -> None:
        """The default semantics for every attention again; what foreign processors learnt goes with them."""
        self.set_attn_processor(AttnProcessor())

    def warn_of_unused(self, adapters: Mapping[str, Any]) -> None:
        """Warn, once for a name, of keyword arguments that no processor of this network takes."""
        told = self.__dict__.setdefault("_warned_of", set())
        fresh = [name for name in adapters if name not in told]
        if not fresh:
            return
        known = [accepted_keywords(processor) for processor in self.attn_processors.values()]
        for name in fresh:
            if not any(names is None or name in names for names in known):
                told.add(name)
                warnings.warn(f"no attention processor of this network takes {name!r}: it is ignored", stacklevel=3)
