"""Who computes a model's networks: torch itself, torch's compiler, or OpenVINO.

A backend takes the networks of an opened model, on their device and in their type, and computes their calls from then
on. Schedules, guidance, solvers, hooks and the watch over values that are not finite see no difference. A codec is cut
at its encoder and decoder; text encoders, which run once for a picture, stay with torch.

>>> chosen("auto"), sorted(BACKENDS)
('torch', ['compile', 'openvino', 'torch'])
>>> network = torch.nn.ModuleDict({"decoder": torch.nn.Linear(2, 2)})
>>> engage("torch", {"codec": network}, torch.device("cpu"), torch.float32)
>>> [one for one, _ in parts({"codec": network})] == [network["decoder"]]
True
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from sfumato.backends import compiled, convolutions, offload, openvino, twins
from sfumato.backends.driven import Engine, drive, release
from sfumato.errors import raise_unknown


@dataclass(frozen=True)
class Backend:
    """One way to compute networks.

    Attributes:
        title: what it is, for people.
        engine: `(device, dtype) -> Engine`; raises `UserError` where it cannot be used. None is torch itself.
        version: of what computes, for the settings of a picture; raises `UserError` where it is not installed.
        memory_format: of the weights that it takes fastest.
    """

    title: str
    engine: Callable[[torch.device, torch.dtype], Engine] | None = None
    version: Callable[[], str] | None = None
    memory_format: torch.memory_format = torch.channels_last


BACKENDS: dict[str, Backend] = {
    "torch": Backend("the library's own path"),
    "compile": Backend("torch.compile", compiled.engine),
    "openvino": Backend("OpenVINO, on the CPU", openvino.engine, openvino.version, torch.contiguous_format),
}
NAMES = ("auto", *BACKENDS)


def chosen(name: str) -> str:
    """The backend that a name stands for; "auto" is torch. Raises `UserError` for an unknown one."""
    if name not in NAMES:
        raise_unknown("backend", name, NAMES)
    return "torch" if name == "auto" else name


def check(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse, with a `UserError`, a backend that is unknown or not installed, or cannot compute there in that type."""
    backend = BACKENDS[chosen(name)]
    if backend.engine is not None:
        backend.engine(device, dtype)


def engage(
    name: str,
    networks: Mapping[str, nn.Module],
    device: torch.device,
    dtype: torch.dtype,
    convolution: str = "direct",
    way: str = "never",
) -> None:
    """Let a backend compute a model's networks from now on.

    Args:
        name: one of `BACKENDS`.
        networks: of a model by the names of its file ("network", "codec", …), on `device` and of `dtype`.
        convolution: of `convolutions.ALGORITHMS`, where torch computes; the others have their own.
        way: of `offload.WAYS`; but for "never" the networks lie in the CPU's memory.

    Raises:
        UserError: where the backend is not installed, or cannot compute there or in that type.
    """
    backend = BACKENDS[name]
    engine = backend.engine(device, dtype) if backend.engine is not None else None
    for network in networks.values():
        offload.release(network)
    for module, unit in parts(networks):
        release(module)
        twins.release(module)
        convolutions.release(module)
        if engine is not None:
            drive(module, engine, unit=unit, name=name)
            continue
        twins.engage(module)
        if convolution == "winograd":
            convolutions.engage(module, dtype)
    offload.engage(networks, device, way)


def parts(networks: Mapping[str, nn.Module]) -> Iterator[tuple[nn.Module, int]]:
    """The modules whose calls a backend computes, each with what height and width of its inputs are multiples of."""
    for name, network in networks.items():
        widths = getattr(getattr(network, "config", None), "block_out_channels", (1,))
        unit = 2 ** (len(widths) - 1)
        if name == "network":
            yield network, unit
        elif name == "codec":
            inner = dict(network.named_children())
            units = {"encoder": unit, "decoder": 1}
            yield from ((inner[part], units[part]) for part in units if part in inner)


def made_with(name: str) -> dict[str, str]:
    """What a picture's settings say of the backend; nothing for torch itself."""
    backend = BACKENDS[name]
    if backend.engine is None:
        return {}
    return {"backend": name if backend.version is None else f"{name} {backend.version()}"}
