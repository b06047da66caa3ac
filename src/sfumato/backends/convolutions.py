"""How a network's 3x3 convolutions are computed on a CPU: by the definition, or with fewer products.

`engage` gives a network's convolutions the ways of `backends.winograd`, for calls without gradients; names, weights and
everything else of them stay. Where weights are changed in place the transformed kernels are made anew.
`engage_in_training` is for a network that learns, in float32: its kernels are transformed in every step.

>>> network = nn.Sequential(nn.Conv2d(3, 96, 3, padding=1), nn.Conv2d(96, 128, 3, padding=1)).requires_grad_(False)
>>> x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
>>> own = network(x)
>>> engage(network)
>>> [fits(conv) for conv in network], bool(torch.allclose(network(x), own, atol=1e-4))
([False, True], True)
>>> release(network)
>>> torch.equal(network(x), own)
True
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.profiler import record_function

from sfumato.backends import winograd
from sfumato.backends.driven import own_forward
from sfumato.backends.offload import standing
from sfumato.backends.timing import times_as_fast
from sfumato.networks.resnet import Upsample2D

ALGORITHMS = ("direct", "winograd")
"""How a 3x3 convolution may be computed: by the definition (torch), or so."""
SCOPE = "sfumato::convolution"
"""What a profile calls the whole of it."""
LEAST_CHANNELS = {torch.bfloat16: 192, torch.float16: 192, torch.float32: 96}
"""Channels in and out below which the definition is as fast, in each type."""
LEAST_PIXELS, LEAST_PIXELS_OF_SIX = 256, 4096
"""Pixels of a picture below which the definition is as fast, for 16 matrices are then read for a handful of rows; and
from which tiles of 6x6 are worth the memory of their kernels, where not all of a network's have room."""
SHARE, LEAST_BUDGET = {2: 0.43, 4: 0.55}, {2: 2**28, 4: 3 * 2**28}
"""Transformed kernels take at most this share of the network's own weights, by the bytes of a number, or so many bytes:
all of Stable Diffusion 1 from 16 x 16 on has room in float32, and all of its decoder."""
LEAST_IN_TRAINING, LEAST_WORK = 64, 600_000_000
"""Channels, and tiles of all pictures of a call, below which a step that learns gains nothing; and the operations of a
call, by the definition."""
_PROBE = (2, 640, 16, 16)  # the shape that is measured: some hundredths of a second


class Convolving:
    """Stands in the place of the `forward` of a convolution, or of a doubling with its convolution.

    Args:
        module: a `Conv2d` that `fits`, or an `Upsample2D` whose convolution does.
        store: where the network's transformed kernels are.
    """

    def __init__(self, module: nn.Conv2d | Upsample2D, store: Store) -> None:
        self.module, self.store, self.doubles = module, store, isinstance(module, Upsample2D)
        self.forget()
        store.members.append(self)

    def __call__(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        possible = self._possible(x, size)
        wanted = possible and self._worthwhile(x)
        outputs = self._outputs(x) if wanted else 2
        self.wanted, self.outputs = wanted, outputs
        kernels = self.store.kernels(self, outputs) if wanted else None
        if kernels is not None:
            with record_function(SCOPE):
                return (winograd.convolve_doubled if self.doubles else winograd.convolve)(x, kernels, self.conv.bias)
        if possible and self._unfolds(x):
            with record_function(SCOPE):
                return winograd.convolve_unfolded(x, self.conv.weight, self.conv.bias)
        own = own_forward(self.module)
        out: Tensor = own(x) if size is None else own(x, size)
        return out

    def _possible(self, x: Tensor, size: tuple[int, int] | None) -> bool:
        """Whether this call can be computed otherwise than by the module. `size`: what a doubling is told to give."""
        if self.doubles and not _untouched(self.conv):
            return False
        if not _computes(x, self.conv.weight) or x.dtype not in LEAST_CHANNELS or len(x) == 0:
            return False
        if torch.is_grad_enabled() and any(one.requires_grad for one in (x, *self.conv.parameters())):
            return False
        return not self.doubles or size in (None, (2 * x.shape[2], 2 * x.shape[3]))

    def _worthwhile(self, x: Tensor) -> bool:
        """Whether fewer products gain."""
        height, width = x.shape[2:]
        return self.doubles or (height % 2 == width % 2 == 0 and height * width >= LEAST_PIXELS)

    def _outputs(self, x: Tensor) -> int:
        """Of a tile, each way: by the picture's size and type alone, so that a batch changes nothing."""
        height, width = x.shape[2:]
        worth = self.store.roomy or height * width >= LEAST_PIXELS_OF_SIX
        return 4 if x.dtype == torch.float32 and worth and height % 4 == width % 4 == 0 else 2

    def _unfolds(self, x: Tensor) -> bool:
        """Whether one product of the unfolded picture is faster than torch's convolution in float32, which brings all
        kernels into another order at every call: where there are more of them than pixels."""
        return not self.doubles and x.dtype == torch.float32 and 2 * x.shape[2] * x.shape[3] <= len(self.conv.weight)

    @property
    def conv(self) -> nn.Conv2d:
        """The convolution, as it is now."""
        conv = self.module.conv if isinstance(self.module, Upsample2D) else self.module
        assert conv is not None
        return conv

    @property
    def dtype(self) -> torch.dtype:
        """That it computes in: the network's, or a wider one that its weight has been given since."""
        return torch.promote_types(self.store.dtype, self.conv.weight.dtype)

    def forget(self) -> None:
        """Whether calls are computed so, and in tiles of so many outputs a side, until one has told."""
        self.wanted, self.outputs = True, 4 if self.dtype == torch.float32 else 2

    def transformed(self, outputs: int) -> Tensor:
        """The kernels of the weights as they are now."""
        weight = self.conv.weight.detach()
        return winograd.transformed_doubled(weight) if self.doubles else winograd.transformed(weight, outputs)

    def bytes(self, outputs: int) -> int:
        """Of the transformed kernels, for tiles of so many outputs each way."""
        return (9 if self.doubles else (outputs + 2) ** 2) * self.conv.weight.numel() * self.dtype.itemsize // 9

    def state(self, outputs: int) -> tuple[int, int, int]:
        """Changes when the weights are replaced or changed in place, and with the tiles."""
        weight = self.conv.weight
        return weight.data_ptr(), 0 if weight.is_inference() else weight._version, outputs


class Store:
    """The transformed kernels of one network, made when they are first needed, within a budget.

    Small kernels are those of high resolutions, which gain the most for each byte: room is kept for them.

    Args:
        budget: in bytes.
        dtype: that the network computes in.
    """

    def __init__(self, budget: int, dtype: torch.dtype) -> None:
        self.budget, self.dtype, self.members = budget, dtype, list[Convolving]()
        self._kept: dict[Convolving, tuple[tuple[int, int, int], Tensor]] = {}

    def kernels(self, member: Convolving, outputs: int) -> Tensor | None:
        """Of a member, for tiles of so many outputs each way; None where the budget has no room for them."""
        state, kept = member.state(outputs), self._kept.get(member)
        if kept is None and self._taken(member) + member.bytes(outputs) > self.budget:
            return None
        if kept is None or kept[0] != state:
            kept = self._kept[member] = (state, member.transformed(outputs))
        return kept[1]

    @cached_property
    def roomy(self) -> bool:
        """Whether it has room for the kernels of 6x6 tiles everywhere."""
        return sum(one.bytes(4) for one in self.members) <= self.budget

    def _taken(self, member: Convolving) -> int:
        """Bytes of what is there and of what has precedence, unless its last call had no use for it."""
        size = member.conv.weight.numel()
        return sum(
            one.bytes(one.outputs)
            for one in self.members
            if one in self._kept or (one.wanted and one.conv.weight.numel() < size)
        )

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes its own."""
        return vars(self) | {"_kept": {}}

    def clear(self) -> None:
        """Forget all of them."""
        self._kept.clear()
        for one in self.members:
            one.forget()


def _untouched(conv: nn.Module) -> bool:
    """Whether a convolution that is not called itself is still the one that was there: no adapter, no hook."""
    return fits(conv) and standing(conv) is None and not (conv._forward_hooks or conv._forward_pre_hooks)


def fits(module: nn.Module, dtype: torch.dtype | None = None, *, least: int | None = None) -> bool:
    """Whether a module is a 3x3 convolution that may be computed so, of a width that gains.

    Args:
        dtype: that it computes in; None for that of its weight.
        least: channels that gain; None for `LEAST_CHANNELS`.
    """
    if type(module) is not nn.Conv2d:
        return False
    enough = least or LEAST_CHANNELS.get(dtype or module.weight.dtype, sys.maxsize)
    return (
        (module.kernel_size, module.stride, module.padding, module.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and module.groups == 1
        and module.padding_mode == "zeros"
        and min(module.in_channels, module.out_channels) >= enough
    )


def engage(network: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Let the convolutions of a network that fit be computed so from now on.

    Args:
        dtype: that it computes in; None for that of its weights.
    """
    dtype = dtype or next((parameter.dtype for parameter in network.parameters()), torch.float32)
    doublings = [m for m in network.modules() if isinstance(m, Upsample2D) and m.conv and fits(m.conv, dtype)]
    inside = {one.conv for one in doublings}
    plain = [m for m in network.modules() if isinstance(m, nn.Conv2d) and fits(m, dtype) and m not in inside]
    store = Store(budget(network, dtype), dtype)
    members = [*(Convolving(module, store) for module in doublings), *(Convolving(module, store) for module in plain)]
    for one in members:
        vars(one.module)["forward"] = one


def budget(network: nn.Module, dtype: torch.dtype) -> int:
    """Bytes that the transformed kernels of a network may take, which computes in this type."""
    weights = sum(parameter.numel() for parameter in network.parameters()) * dtype.itemsize
    return max(LEAST_BUDGET.get(dtype.itemsize, 0), int(SHARE.get(dtype.itemsize, 0) * weights))


def _computes(x: Tensor, weight: Tensor) -> bool:
    """Whether a call computes a batch of pictures on a CPU, in the weight's own type, and nobody looks into it: it is
    not traced, compiled, imitated, transformed by `torch.func`, differentiated forwards or under autocast."""
    return not (
        x.device.type != "cpu"
        or x.dtype != weight.dtype
        or x.dim() != 4
        or type(x) not in (Tensor, nn.Parameter)
        or torch.is_autocast_enabled("cpu")
        or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


# --- learning --------------------------------------------------------------------------------------------------------


class Learning(nn.Conv2d):
    """A convolution that learns: what `engage_in_training` makes of those that fit."""

    def _get_name(self) -> str:
        return "Conv2d"

    def forward(self, x: Tensor) -> Tensor:
        """As every convolution's."""
        if not self._gains(x):
            return super().forward(x)
        out: Tensor = winograd.Convolution.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return out

    def _gains(self, x: Tensor) -> bool:
        """Whether this call can be computed in tiles, and there are enough of them for the transforms."""
        if not _computes(x, self.weight) or x.dtype != torch.float32:
            return False
        batch, _, height, width = x.shape
        tiles = batch * height * width // 16
        worth = tiles >= LEAST_IN_TRAINING and 32 * tiles * self.weight.numel() >= LEAST_WORK
        return worth and height % 4 == width % 4 == 0


def engage_in_training(network: nn.Module) -> None:
    """Let the convolutions of a network that learns in float32 on a CPU be computed with fewer products, forwards and
    backwards, where that gains: 1.2 to 2.2 times as fast where there is much to do. Names and weights stay."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and fits(module, least=LEAST_IN_TRAINING) and "forward" not in vars(module):
            module.__class__ = Learning


def release(network: nn.Module) -> None:
    """Let them be computed by the definition again."""
    for module in network.modules():
        if isinstance(vars(module).get("forward"), Convolving):
            del vars(module)["forward"]
        if type(module) is Learning:
            module.__class__ = nn.Conv2d  # type: ignore[assignment]


# --- what is kept ----------------------------------------------------------------------------------------------------


@contextmanager
def holding(network: nn.Module | None) -> Iterator[None]:
    """The transformed kernels that are made in the block are forgotten at its end: their memory is free for what comes
    next, and what is computed so never depends on what was computed before."""
    try:
        yield
    finally:
        for module in network.modules() if network is not None else ():
            convolving = standing(module)
            if isinstance(convolving, Convolving):
                convolving.store.clear()
        winograd.work.clear()


# --- choice ----------------------------------------------------------------------------------------------------------


@cache
def chosen(dtype: torch.dtype, device: torch.device) -> str:
    """"winograd" where it is faster than the definition here, which can only be on a CPU; else "direct". Measured once
    in a process, with 640 channels at 16 x 16, where the two are well apart."""
    if device.type != "cpu" or dtype not in LEAST_CHANNELS:
        return "direct"
    x = torch.ones(_PROBE, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.ones(_PROBE[1], _PROBE[1], 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
    kernels = winograd.transformed(weight, 2)
    gain = times_as_fast(lambda: winograd.convolve(x, kernels, None), lambda: F.conv2d(x, weight, padding=1))
    return "winograd" if gain > 1 else "direct"
