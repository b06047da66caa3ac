"""Values that are not finite are found where they arise, before they become a black picture.

A network in half precision may overflow where float32 would not. Each stage (text encoder, network, decoder, encoder)
can be run under watch: when what it gives has a NaN or an infinity and its weights are narrower than float32, they are
widened in place, the call is repeated, and one sentence says so. What is not finite in float32 either is an error.
Where all is well a stage costs one sum over its result more.

>>> import torch
>>> network = torch.nn.Linear(1, 1, bias=False).half()
>>> _ = torch.nn.init.constant_(network.weight, 300.0)
>>> def squared():
...     return network(network(torch.ones(1, 1, dtype=network.weight.dtype))) / 1000
>>> with torch.no_grad():
...     decoded(squared, network, print).item()
the codec's decoder gave values that are not finite in float16; it goes on in float32
90.0
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sfumato.backends import offload
from sfumato.backends.driven import tensors_in
from sfumato.diffusion.denoiser import Prediction
from sfumato.diffusion.guidance import DenoiseFn
from sfumato.diffusion.level import NoiseLevel
from sfumato.images import PictureError

Report = Callable[[str], None]
"""Gets one sentence."""

T = TypeVar("T")


def guarded(denoise: DenoiseFn, networks: Sequence[nn.Module], report: Report) -> DenoiseFn:
    """The same denoiser under watch.

    Args:
        networks: what it calls; widened together, once.
        report: told when that happens, with the number of the evaluation and its time.

    Raises (when called):
        PictureError: when a prediction is not finite in float32 either.
    """
    count = 0

    def watched(x_t: Tensor, level: NoiseLevel, previous_x0: Tensor | None) -> Prediction:
        nonlocal count
        count += 1
        times = level.t.flatten()
        where = f" in evaluation {count} (t = {float(times[0]):.6g})"
        return _finite(lambda: denoise(x_t, level, previous_x0), networks, report, "the network", where, _of_prediction)

    return watched


def decoded(call: Callable[[], T], network: nn.Module | None, report: Report) -> T:
    """What `call` makes of latents with a codec's network (None for pixels), under watch.

    Args:
        call: takes its input in whatever type the network has when it is called, for it may be called twice.

    Raises:
        PictureError: when its result is not finite in float32 either.
    """
    return _finite(call, _some(network), report, "the codec's decoder", "", _tensors)


def encoded(call: Callable[[], T], network: nn.Module | None, report: Report) -> T:
    """What `call` makes of pictures with a codec's network; as `decoded`."""
    return _finite(call, _some(network), report, "the codec's encoder", "", _tensors)


def texts(call: Callable[[], T], network: nn.Module | None, report: Report) -> T:
    """What `call` makes of words with the conditioners' network: conditions; as `decoded`."""
    return _finite(call, _some(network), report, "the text encoder", "", _tensors)


def _some(network: nn.Module | None) -> list[nn.Module]:
    return [] if network is None else [network]


def _finite(
    call: Callable[[], T],
    networks: Sequence[nn.Module],
    report: Report,
    what: str,
    where: str,
    of: Callable[[Any], Iterator[Tensor]],
) -> T:
    """The result of `call`, repeated in float32 where that is needed and can be had."""
    result = call()
    if _all_finite(of(result)):
        return result
    narrow = [dtype for network in networks if (dtype := narrower(network)) is not None]
    if narrow:
        for network in networks:
            network.float()
        report(f"{what} gave values that are not finite in {_name(narrow[0])}{where}; it goes on in float32")
        result = call()
        if _all_finite(of(result)):
            return result
    raise PictureError(f"{what} gave values that are not finite in float32{where}{_damage(networks)}")


def narrower(network: nn.Module) -> torch.dtype | None:
    """The type of the first weights that are narrower than float32; None where there are none, or where they are so
    only at rest."""
    if offload.widens(network):
        return None
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point() and torch.finfo(tensor.dtype).bits < 32:
            return tensor.dtype
    return None


def _all_finite(tensors: Iterator[Tensor]) -> bool:
    """Whether there is no NaN and no infinity. A finite sum says so at once; one that is not may only have overflowed,
    and is looked into."""
    return all(bool(x.sum().isfinite()) or bool(x.isfinite().all()) for x in tensors)


def _of_prediction(prediction: Prediction) -> Iterator[Tensor]:
    """The raw output: what is made of it may have been clamped, which would hide an infinity."""
    yield prediction.out
    if prediction.var_frac is not None:
        yield prediction.var_frac


def _tensors(value: Any) -> Iterator[Tensor]:
    """All floating tensors in a result."""
    return (tensor for tensor in tensors_in(value) if tensor.is_floating_point())


def _damage(networks: Sequence[nn.Module]) -> str:
    """What can be said of the cause: weights that are themselves not finite."""
    for network in networks:
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                return f": its weight {name!r} has such values itself, so the file is damaged or was narrowed too far"
    return ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
