"""Models that are larger than the memory at hand: weights rest where there is room and come when they are needed.

"networks": a network (text encoders, UNet, codec) comes to the device when it is called, and goes when another one is
called or the drawing ends; so a UNet stays there for all steps. "blocks": of UNet and codec only the block that
computes is there; where the device can, the block that followed the last time is copied meanwhile, on its own stream.
Nothing is copied back: at rest each parameter points at the memory that it pointed at before. Weights that were changed
on the device (widened to float32, say) are the exception; they come back with their changes.

"half" is for a CPU that computes in float32: weights that were stored in 16 bits rest so, and those of one block at a
time are widened. Every number is what it would be if all of them were wide, and so is every picture.

>>> networks = {"network": nn.Linear(2, 2), "codec": nn.Linear(2, 2)}
>>> before = networks["network"].weight.data_ptr()
>>> engage(networks, torch.device("cpu"), "networks")
>>> with torch.no_grad(), resting(networks):
...     _ = networks["network"](torch.zeros(1, 2))
...     networks["network"].weight.data_ptr() == before
False
>>> networks["network"].weight.data_ptr() == before
True
>>> fitting(4 * 2**30, {"network": 2**31, "codec": 2**29}), fitting(2**31, {"network": 2**31})
('networks', 'blocks')
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate, chain
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.backends.devices import free_host_bytes
from sfumato.backends.driven import Driven, own_forward
from sfumato.errors import UserError, raise_unknown
from sfumato.networks.attention import Attention
from sfumato.networks.autoencoder import Decoder, Encoder
from sfumato.networks.resnet import Upsample2D
from sfumato.networks.transformer import FeedForward

LOG = logging.getLogger("sfumato")

WAYS = ("never", "networks", "blocks", "half")
NAMES = ("auto", *WAYS)
ROOM = 2**31
"""Bytes that are left for activations: an estimate for 512 pixels in half precision, not a measurement."""
SHARE = 4
"""… but at most so many times the bytes of the weights: small networks make small activations."""
PIECE, SMALL = 2**26, 2**18
"""Of "half": numbers of weights that are widened together at most, where a network has smaller parts; and of a tensor
below which it is not worth it."""

Point = Callable[[Tensor, Tensor], None]
"""`(tensor, values)`: the tensor has these values from now on, wherever they lie."""


# --- which way -------------------------------------------------------------------------------------------------------


def check(name: str, device: torch.device, backend: str = "torch", dtype: torch.dtype = torch.float32) -> None:
    """Refuse, with a `UserError`, a way that is unknown or that cannot be had there, in that type or with that
    backend."""
    if name not in NAMES:
        raise_unknown("way of offload", name, NAMES)
    if name in ("auto", "never"):
        return
    if name == "half":
        if device.type != "cpu" or dtype != torch.float32:
            raise UserError("offload half is for a CPU that computes in float32; leave it out, or give dtype float32")
    elif device.type == "cpu":
        raise UserError(f"{told(name)} is for a GPU; on a CPU there is half, for weights of 16 bits")
    if name != "networks" and backend != "torch":
        raise UserError(f"{told(name)} needs backend torch: {backend} computes a network as a whole")


def told(way: str) -> str:
    """A way in words."""
    return f"offload {way}" if way == "half" else f"offload by {way}"


def chosen(
    name: str, networks: Mapping[str, nn.Module], device: torch.device, dtype: torch.dtype, backend: str = "torch"
) -> str:
    """The way that a name stands for, one of `WAYS`; "auto" goes by the memory that is free there now.

    Args:
        networks: of a model, by name.
        dtype: that they will compute in.

    Raises:
        UserError: as `check`, and for "half" where no weights have 16 bits.
    """
    check(name, device, backend, dtype)
    sizes = {part: sum(_bytes(one, dtype) for one in tensors_of(network)) for part, network in networks.items()}
    present = sum(one.nbytes for network in networks.values() for one in tensors_of(network))
    halves = any(_rests(one) for network in networks.values() for one in tensors_of(network))
    if name == "half" and not halves:
        raise UserError("offload half has nothing to do: this model holds no large weights of 16 bits; leave it out")
    if name != "auto":
        return name
    free, total = free_bytes(device), sum(sizes.values())
    if free is None and device.type == "cpu" and dtype == torch.float32 and backend == "torch" and halves:
        return "half" if short(free_host_bytes(), total - present, total) else "never"
    return fitting(free, sizes, blocks=backend == "torch")


def short(free: int | None, more: int, weights: int) -> bool:
    """Whether memory is too short for so many bytes more, and the activations of networks with weights of so many."""
    return free is not None and more + min(ROOM, SHARE * weights) > free


def fitting(free: int | None, sizes: Mapping[str, int], *, blocks: bool = True) -> str:
    """The first way of `WAYS` that leaves room for activations.

    Args:
        free: bytes of the device's memory; None where that does not matter or is not known, which is "never".
        sizes: bytes of the weights of each network.
        blocks: whether "blocks" can be had; else "networks" is the last one.
    """
    total = sum(sizes.values())
    if not short(free, total, total):
        return "never"
    return "networks" if not blocks or not short(free, max(sizes.values()), total) else "blocks"


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be had on a device with memory of its own, what torch holds there unused included; else None."""
    if not _apart(device):
        return None
    module: Any = torch.get_device_module(device)
    return int(module.mem_get_info(device)[0] + module.memory_reserved(device) - module.memory_allocated(device))


def _apart(device: torch.device) -> bool:
    """Whether a device has memory of its own, into which is copied while it computes."""
    if device.type in ("cpu", "meta"):
        return False
    return all(hasattr(torch.get_device_module(device), name) for name in ("Stream", "mem_get_info"))


def tensors_of(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers, each once."""
    return [*module.parameters(), *module.buffers()]


def _has_weights(module: nn.Module) -> bool:
    return next(chain(module.parameters(), module.buffers()), None) is not None


def _bytes(tensor: Tensor, dtype: torch.dtype) -> int:
    return tensor.numel() * (dtype if tensor.is_floating_point() else tensor.dtype).itemsize


# --- coming and going ------------------------------------------------------------------------------------------------


class Mover:
    """Copies weights to a device.

    Attributes:
        ahead: whether it does so while the device computes, so that it is worth beginning early.
    """

    ahead = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def copies(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies on the device, laid out as the tensors are."""
        later = _apart(self.device)  # the device's own order of work keeps it right
        return [one.to(self.device, copy=True, non_blocking=later) for one in tensors]

    def ready(self) -> None:
        """What is computed from now on finds all copies complete."""


class Streamed(Mover):
    """Copies on a stream of its own, beside what the device computes.

    Memory of a copy that was let go is taken by later copies only, and each of these waits for all work that was begun
    before: so nothing is overwritten that is still read.
    """

    ahead = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._module: Any = torch.get_device_module(device)
        self._side = self._module.Stream(device)

    def copies(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        self._side.wait_stream(self._module.current_stream(self.device))
        with self._module.stream(self._side):
            return super().copies(tensors)

    def ready(self) -> None:
        self._module.current_stream(self.device).wait_stream(self._side)


class Widening(Mover):
    """Copies what has 16 bits in float32, always into the same memory: fresh memory would cost more than the copy."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._room = torch.empty(0, device=device)

    def copies(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Those that rest in 16 bits in float32, laid out as they are; the others themselves."""
        places = list(accumulate((_whole_lines(one) if _rests(one) else 0 for one in tensors), initial=0))
        if len(self._room) < places[-1]:
            with torch.inference_mode(False):  # else calls outside it could not use it
                self._room = torch.empty(places[-1], device=self.device)
        return [self._wide(one, place) if _rests(one) else one for one, place in zip(tensors, places, strict=False)]

    def _wide(self, one: Tensor, place: int) -> Tensor:
        return self._room.as_strided(one.shape, one.stride(), place).copy_(one)


def _rests(tensor: Tensor) -> bool:
    """Whether a tensor of 16 bits is large enough to be widened only where it is needed, and fills its memory."""
    if not tensor.is_floating_point() or tensor.element_size() != 2 or tensor.numel() < SMALL:
        return False
    return tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def _whole_lines(tensor: Tensor) -> int:
    """Its numbers, rounded up so that the next one begins at a multiple of 64 bytes, as torch's own memory does."""
    return -(-tensor.numel() // 16) * 16


def point(tensor: Tensor, values: Tensor) -> None:
    """Let a tensor have these values; it stays the same object."""
    tensor.data = values


State = tuple[int, torch.dtype, int]


def _state(tensor: Tensor) -> State:
    """Changes when a tensor's values are replaced or changed in place."""
    return tensor.data_ptr(), tensor.dtype, 0 if tensor.is_inference() else tensor._version


Away = Mapping[int, tuple[Tensor, State]]
"""By the `id` of a tensor that is on the device: its values and its state at rest."""
NONE_AWAY: Away = {}


class Group:
    """Weights that come and go together."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list({id(one): one for one in tensors}.values())
        self._there: list[tuple[Tensor, Tensor, State, State]] = []

    def values(self, away: Away = NONE_AWAY) -> list[Tensor]:
        """What the tensors point at now, or at rest where they are away."""
        return [away[id(one)][0] if id(one) in away else one.data for one in self.tensors]

    def states(self, away: Away = NONE_AWAY) -> list[State]:
        """Of all its tensors, now, or at rest where they are away."""
        return [away[id(one)][1] if id(one) in away else _state(one) for one in self.tensors]

    def away(self) -> Away:
        """Those of its tensors that are on the device."""
        return {id(tensor): (resting, before) for tensor, resting, before, _ in self._there}

    def come(self, copies: Sequence[Tensor], point: Point) -> None:
        """Point at copies on the device."""
        for tensor, there in zip(self.tensors, copies, strict=True):
            resting, before = tensor.data, _state(tensor)
            point(tensor, there)
            self._there.append((tensor, resting, before, _state(tensor)))

    def go(self, point: Point) -> None:
        """Point at what was there before; what was changed meanwhile is copied."""
        while self._there:
            tensor, resting, _, state = self._there[-1]
            point(tensor, resting if _state(tensor) == state else tensor.data.to(resting.device, copy=True))
            self._there.pop()


class Shuttle:
    """Brings the groups of one model to its device, one at a time.

    Args:
        mover: copies them.
        point: lets a tensor have other values.

    Attributes:
        present: the group that is on the device.
    """

    def __init__(self, mover: Mover, point: Point = point) -> None:
        self.mover, self.point = mover, point
        self.present: Group | None = None
        self.lock = RLock()  # threads that share a model take turns
        self._after: dict[Group, Group] = {}  # what followed the last time
        self._begun: tuple[Group, list[State], list[Tensor]] | None = None

    @property
    def device(self) -> torch.device:
        """Where it brings them."""
        return self.mover.device

    @property
    def widens(self) -> bool:
        """Whether weights rest in fewer bits than they compute with."""
        return isinstance(self.mover, Widening)

    @torch.no_grad()
    def need(self, group: Group) -> None:
        """See to it that a group is on the device, and no other."""
        if group is self.present:
            return
        before, begun = self.present, self._begun
        self.rest()
        if begun is not None and begun[0] is group and begun[1] == group.states():
            copies = begun[2]
        else:
            begun = None  # before there are new ones
            copies = self.mover.copies(group.values())
        self.mover.ready()
        self.present = group
        group.come(copies, self.point)
        if before is not None:
            self._after[before] = group
        if self.mover.ahead and group in self._after:
            self._begin(self._after[group])

    def _begin(self, group: Group) -> None:
        """Begin to copy what will probably follow, where there is room for both; from what rests, also of tensors that
        the present group shares with it."""
        away = self.present.away() if self.present is not None else NONE_AWAY
        try:
            self._begun = group, group.states(away), self.mover.copies(group.values(away))
        except torch.OutOfMemoryError:
            self._begun = None  # it is copied when its turn comes

    @torch.no_grad()
    def rest(self) -> None:
        """Nothing is on the device any more."""
        self._begun = None
        if self.present is not None:
            self.present.go(self.point)
            self.present = None


class Fetching:
    """Stands in the place of a module's `forward`: brings its group, then does what stood there before.

    Args:
        module: whose call it is.
        shuttle: of its model.
        group: that holds its weights; None for what only holds other blocks.
        part: whether the group is a part of its network: it goes before a gradient could come back to it.

    Raises:
        UserError: when called for a gradient, if `part`.
    """

    def __init__(self, module: nn.Module, shuttle: Shuttle, group: Group | None, part: bool = False) -> None:
        self.module, self.shuttle, self.group, self.part = module, shuttle, group, part
        self.standing = vars(module).get("forward")
        self.inner = own_forward(module) if self.standing is None else self.standing

    def __call__(self, *args: Any, **slots: Any) -> Any:
        if self.part and torch.is_grad_enabled():
            self._refuse_gradients([*args, *slots.values()])
        if self.group is not None and self.group is not self.shuttle.present:
            self.shuttle.need(self.group)
        return self.inner(*args, **slots)

    def _refuse_gradients(self, given: Sequence[Any]) -> None:
        weights = self.group.tensors if self.group is not None else []
        if any(isinstance(one, Tensor) and one.requires_grad for one in (*given, *weights)):
            way, better = ("half", "never") if self.shuttle.widens else ("blocks", "networks or never")
            raise UserError(f"{told(way)} computes no gradients; open the model with offload {better}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """For a copy of the module over the same weights; one with weights of its own stays where they are, wide."""
        if not all(memo.get(id(one)) is one for one in tensors_of(self.module)):
            if self.shuttle.widens:  # a module's weights are copied before what stands in its place
                copied = (memo.get(id(one)) for one in tensors_of(self.module))
                _widen(one for one in copied if isinstance(one, Tensor))
            return copy.deepcopy(self.inner, memo)
        other = copy.copy(self)
        other.module, other.standing, other.inner = copy.deepcopy((self.module, self.standing, self.inner), memo)
        return other


# --- networks --------------------------------------------------------------------------------------------------------


def engage(
    networks: Mapping[str, nn.Module],
    device: torch.device,
    way: str,
    *,
    mover: Mover | None = None,
    point: Point = point,
) -> None:
    """Let networks that lie in the CPU's memory compute on a device from now on, without gradients.

    Args:
        networks: of one model by the names of its file ("network", "codec", "conditioner").
        way: one of `WAYS`; "never" changes nothing.
        mover, point: see `Shuttle`; None for what suits the device.
    """
    if way == "never":
        return
    if mover is None:
        mover = _mover(device, way)
    shuttle = Shuttle(mover, point)
    if _apart(device):
        _pin([one for network in networks.values() for one in tensors_of(network)])
    for name, network in networks.items():
        if way == "half":
            _widen_some(network, first=name != "conditioner")
        part = way == "half" or (way == "blocks" and name != "conditioner")
        blocks = list(_divided(network, way)) if part else [network]
        within = {id(one) for block in blocks for one in tensors_of(block)}
        own = [one for one in tensors_of(network) if id(one) not in within]  # beside the blocks: comes with each
        for block in blocks:
            _stand(block, shuttle, Group([*tensors_of(block), *own]), part=part)
        if _fetching(network) is None:
            vars(network)["forward"] = Fetching(network, shuttle, None)


def _mover(device: torch.device, way: str) -> Mover:
    if way == "half":
        return Widening(device)
    return (Streamed if _apart(device) and way == "blocks" else Mover)(device)


def _divided(network: nn.Module, way: str) -> Iterator[nn.Module]:
    """The parts of a network that have weights and are brought by themselves."""
    parts = pieces_of(network) if way == "half" else blocks_of(network)
    return (part for part in parts if _has_weights(part))


def _widen_some(network: nn.Module, *, first: bool) -> None:
    """Give float32 to all that is not worth to rest in 16 bits, and to the `first` of its parameters, a small one:
    whoever asks for the type that a network computes in looks at that."""
    tensors = tensors_of(network)
    _widen(one for i, one in enumerate(tensors) if not _rests(one) or (first and i == 0))


def _widen(tensors: Iterable[Tensor]) -> None:
    """Give float32 to what has a floating type."""
    for one in tensors:
        if one.is_floating_point():
            one.data = one.data.float()


_WHOLE = (Attention, FeedForward, Upsample2D)  # they read the weights of their layers


def pieces_of(module: nn.Module) -> Iterator[nn.Module]:
    """The parts of a network with at most `PIECE` numbers, as large as they can be."""
    children = [child for child in module.children() if _has_weights(child)]
    many = sum(one.numel() for one in tensors_of(module)) > PIECE
    if children and (isinstance(module, nn.ModuleList) or (many and not isinstance(module, _WHOLE))):
        for child in children:
            yield from pieces_of(child)
    else:
        yield module


def blocks_of(network: nn.Module) -> Iterator[nn.Module]:
    """The parts of a network that are brought by themselves: its children, those of a codec's encoder and decoder, and
    each entry of a list."""
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif isinstance(child, Encoder | Decoder):
            yield from blocks_of(child)
        else:
            yield child


def _stand(module: nn.Module, shuttle: Shuttle, group: Group, part: bool) -> None:
    """Let a module and all within bring the group: some are called, or their weights read, by others than their
    parents. What another engine computes as a whole is left as it is within."""
    if _fetching(module) is not None:
        return
    driven = isinstance(standing(module), Driven)
    vars(module)["forward"] = Fetching(module, shuttle, group, part)
    for child in module.children() if not driven else ():
        if _has_weights(child):
            _stand(child, shuttle, group, part)


def _pin(tensors: Sequence[Tensor]) -> None:
    """Let tensors rest in pinned memory, which is copied faster and while the device computes."""
    try:
        for one in tensors:
            one.data = one.data.pin_memory()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        LOG.warning("not all weights can rest in pinned memory, so they come more slowly: %s", reason)


def release(network: nn.Module) -> None:
    """Undo `engage`; the weights stay in the CPU's memory, those that rest in 16 bits wide."""
    for module in network.modules():
        if (forward := _fetching(module)) is not None:
            forward.shuttle.rest()
            if forward.shuttle.widens:
                _widen(tensors_of(module))
            if forward.standing is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = forward.standing


def bring(network: nn.Module | None) -> None:
    """Bring a network before it is called, for those who look where its weights are. Nothing where it is there always,
    or comes block by block."""
    forward = _fetching(network) if network is not None else None
    if forward is not None and forward.group is not None:
        forward.shuttle.need(forward.group)


@contextmanager
def resting(networks: Mapping[str, nn.Module]) -> Iterator[None]:
    """All weights of a model rest in the CPU's memory after this, whatever happens within, and until then other threads
    wait; nothing where they are on the device always."""
    shuttles = {one.shuttle for one in map(_fetching, networks.values()) if one is not None}
    with ExitStack() as held:
        for shuttle in shuttles:
            held.enter_context(shuttle.lock)
        try:
            yield
        finally:
            for shuttle in shuttles:
                shuttle.rest()


def device_of(network: nn.Module) -> torch.device:
    """Where a network computes, wherever its weights rest."""
    forward = _fetching(network)
    return next(network.parameters()).device if forward is None else forward.shuttle.device


def standing(module: nn.Module) -> Any:
    """What stands in the place of a module's `forward` beside this; None for nothing."""
    forward = _fetching(module)
    return vars(module).get("forward") if forward is None else forward.standing


def widens(network: nn.Module) -> bool:
    """Whether a network computes in float32, wherever its weights have 16 bits at rest."""
    forward = _fetching(network)
    return forward is not None and forward.shuttle.widens


def _fetching(module: nn.Module) -> Fetching | None:
    """What brings a module's weights, where something does."""
    forward = vars(module).get("forward")
    return forward if isinstance(forward, Fetching) else None
