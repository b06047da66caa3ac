"""How fast a model draws here: seconds of a step and of the decoder, and how much of the machine's own rate that is.

The machine's rate is that of a large matrix product in the same type, measured beside the model; the work is counted by
torch on a copy of the network without memory. A step is one guided call of the network, both branches in one batch.

>>> from sfumato.systems.ddpm import DDPM, DDPMConfig
>>> model = DDPM.create(DDPMConfig(size=8, network={"block_out_channels": [32], "layers_per_block": 1,
...                     "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}))
>>> found = measured(model, 8, 8, repeat=1)
>>> found.step > 0 and found.step_flop > 0
True
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sfumato.backends import attention, convolutions
from sfumato.backends.timing import least_seconds, peak_memory
from sfumato.condition import Condition
from sfumato.diffusion.level import NoiseLevel
from sfumato.networks.unet_condition import UNet2DConditionModel
from sfumato.systems import Drawing
from sfumato.systems.latent import Latent
from sfumato.tasks.draw import at_rest, device_of, shown_of


@dataclass(frozen=True)
class Speed:
    """What was measured.

    Attributes:
        step: seconds of one guided step, the least of several.
        decode: seconds of the codec's decoder; 0 for pixels.
        step_flop, decode_flop: multiplications and additions of each.
        rate: of a large matrix product in the network's type, in FLOP a second.
        memory: the most that the process has held, in bytes: of the CPU's memory, or of the device's elsewhere; None
            where the system does not tell.
    """

    step: float
    decode: float
    step_flop: float
    decode_flop: float
    rate: float
    memory: int | None

    @property
    def share(self) -> float:
        """How much of the machine's rate a step reaches."""
        return self.step_flop / self.step / self.rate

    def picture(self, steps: int) -> float:
        """Seconds of one picture (or batch) in so many steps."""
        return steps * self.step + self.decode


@at_rest
@torch.no_grad()
def measured(
    model: Drawing, width: int, height: int, *, batch: int = 1, guided: bool = True, repeat: int = 3
) -> Speed:
    """Time a model at a size.

    Args:
        batch: pictures at once. guided: both branches of guidance, in one call of twice the batch.
        repeat: how often each part is timed after one call to warm up; the least counts.
    """
    shape, device = model.shape_of(width, height), device_of(model)
    rows = batch * (2 if guided else 1)
    x = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    condition = _condition(model, rows, shape)
    level = model.denoiser.schedule.level(torch.tensor(model.denoiser.schedule.t_range[1] / 2, dtype=torch.float64))

    def step() -> None:
        model.denoiser(x, level, condition, None)

    decode = least_seconds(lambda: model.pictures(x[:batch]), device, repeat) if isinstance(model, Latent) else 0.0
    return Speed(
        step=least_seconds(step, device, repeat),
        decode=decode,
        step_flop=sum(_work(model, x, level, condition).values()),
        decode_flop=_decode_flop(model, x[:batch]),
        rate=matmul_rate(next(model.denoiser.network.parameters()).dtype, device),
        memory=peak_memory(device),
    )


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int = 2048, repeat: int = 5) -> float:
    """FLOP a second of a square matrix product."""
    a = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return 2 * size**3 / least_seconds(lambda: a @ a, device, repeat)


def _condition(model: Drawing, rows: int, shape: tuple[int, int, int]) -> Condition:
    """A condition of the right shapes; what it says does not change the time."""
    network, device = model.denoiser.network, device_of(model)
    context = labels = concat = None
    if isinstance(network, UNet2DConditionModel):
        context = torch.zeros(rows, 77, network.config.context_dim or 1, device=device)
    if getattr(network.config, "num_class_embeds", None):
        labels = torch.zeros(rows, dtype=torch.int64, device=device)
    if (channels := sum(part.channels for part in shown_of(model).values())) > 0:
        concat = torch.zeros(rows, channels, *shape[1:], device=device)
    return Condition(context=context, labels=labels, concat=concat)


def _work(model: Drawing, x: Tensor, level: NoiseLevel, condition: Condition) -> dict[str, float]:
    """Multiplications and additions of one call by kind, by the definition, counted on "meta"."""
    outline = type(model).create(model.config, "meta")  # type: ignore[arg-type]
    meta = torch.device("meta")
    slots = condition.to(meta, torch.float32).for_network()
    seen = x.to(meta) if condition.concat is None else torch.cat([x.to(meta), condition.concat.to(meta)], dim=1)
    with FlopCounterMode(display=False) as counter:
        outline.denoiser.network(seen, torch.zeros(len(x), device=meta), **slots)
    found = dict.fromkeys((*KINDS, REST), 0.0)
    for operation, count in counter.get_flop_counts().get("Global", {}).items():
        found[_kind_of([str(operation)])] += count
    return found


def _decode_flop(model: Drawing, latents: Tensor) -> float:
    if not isinstance(model, Latent) or model.codec.network is None:
        return 0.0
    outline = Latent.create(model.config, "meta")
    with FlopCounterMode(display=False) as counter:
        outline.codec.decode(latents.to(torch.device("meta")))
    return float(counter.get_total_flops())


@at_rest
@torch.no_grad()
def shares(
    model: Drawing, width: int, height: int, *, batch: int = 1, guided: bool = True
) -> dict[str, dict[str, float]]:
    """One step by kind of work (attention, convolution, linear, norm, rest): "seconds", from torch's profiler, and the
    "flop" that it has by the definition."""
    shape, device = model.shape_of(width, height), device_of(model)
    rows = batch * (2 if guided else 1)
    x = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    condition = _condition(model, rows, shape)
    level = model.denoiser.schedule.level(torch.tensor(model.denoiser.schedule.t_range[1] / 2, dtype=torch.float64))
    model.denoiser(x, level, condition, None)
    with torch.profiler.profile() as profiled:
        model.denoiser(x, level, condition, None)
    work = _work(model, x, level, condition)
    found = {kind: {"seconds": 0.0, "flop": work[kind]} for kind in work}
    for event in profiled.events():
        found[_kind(event)]["seconds"] += event.self_cpu_time_total / 1e6
    return found


KINDS = {
    "attention": (attention.SCOPE, "scaled_dot_product", "flash_attention", "softmax", "bmm"),
    "convolution": (convolutions.SCOPE, "convolution", "conv2d", "conv_transpose"),
    "linear": ("addmm", "aten::mm", "aten.mm", "linear", "mkldnn_linear"),
    "norm": ("native_group_norm", "native_layer_norm", "var_mean"),
}
"""Parts of the names of torch's operations, by kind."""
REST = "rest"
"""The kind of all others."""


def _kind(event: Any) -> str:
    """The kind of a profiled operation: that of what it is a part of, if that has one; else its own."""
    names = []
    while event is not None:
        names.append(event.key)
        event = event.cpu_parent
    return _kind_of(names[::-1])


def _kind_of(names: list[str]) -> str:
    """The kind of the first of these names that has one."""
    for name in names:
        for kind, parts in KINDS.items():
            if any(part in name for part in parts):
                return kind
    return REST
