"""OpenVINO as a backend: a network is traced, converted and compiled for the CPU, once for each shape of its inputs.

The network itself stays whole and in torch; what OpenVINO computes with is its own copy of the weights, laid out for
the machine. A program is made at the first call of each shape, and made anew where weights, their type or the number of
threads have changed. Nothing is sent anywhere: OpenVINO's `convert_model`, which reports its use, is not what converts
here.

>>> shrunk({"x": torch.zeros(2, 4, 64, 64), "t": torch.zeros(2)}, 8)["x"].shape
torch.Size([2, 4, 16, 16])
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import inspect
import threading
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.backends.driven import Engine, own_forward
from sfumato.errors import UserError
from sfumato.networks.attention import sdpa, set_attention_kernel
from sfumato.networks.transformer import GEGLU

HINTS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
"""How OpenVINO calls the types that it can compute in."""
CAPABILITIES = {torch.float32: "FP32", torch.bfloat16: "BF16", torch.float16: "FP16"}
"""… and how it says that a CPU does."""

LARGE = 2**28
"""Bytes of weights from which only the last two programs of a network are kept, for each holds the weights."""
KEPT = 16
"""Programs of a small network that are kept."""

WAVES = "waves"
"""Inputs of a program that stand for what the sinusoids of a network make of its times."""

_tracing = threading.Lock()


def version() -> str:
    """Of what is installed. Raises `UserError` where nothing is."""
    _openvino()
    return importlib.metadata.version("openvino")


def engine(device: torch.device, dtype: torch.dtype) -> Engine:
    """The engine for networks of that type.

    Raises:
        UserError: where OpenVINO is not installed, the networks are not on the CPU, or it does not compute in that
            type.
    """
    core = _core()
    if device.type != "cpu":
        raise UserError(f"backend openvino computes on the CPU, not on {device.type}; open the model with device cpu")
    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if CAPABILITIES[dtype] not in able:
        kinds = [str(kind).removeprefix("torch.") for kind, name in CAPABILITIES.items() if name in able]
        name = str(dtype).removeprefix("torch.")
        raise UserError(f"backend openvino does not compute in {name} on this CPU, only in {' and '.join(kinds)}")
    return Programs


def _openvino() -> Any:
    try:
        return importlib.import_module("openvino")
    except ImportError:
        raise UserError(
            "backend openvino needs OpenVINO, which is not installed: pip install 'sfumato[openvino]'"
        ) from None


@cache
def _core() -> Any:
    return _openvino().Core()


# --- calls -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """The tensors of one call by the names of its parameters; those of a tuple are numbered ("residuals.0")."""

    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, module: nn.Module, args: Sequence[Any], slots: Mapping[str, Any]) -> Call:
        """What is given, with numbers as tensors and empty slots left out."""
        given = dict(inspect.signature(own_forward(module)).bind(*args, **slots).arguments)
        if isinstance(getattr(module, "time_proj", None), nn.Module):
            given |= _waves(module, given)
        tensors: dict[str, Tensor] = {}
        for name, value in given.items():
            if isinstance(value, tuple):
                tensors |= {f"{name}.{i}": one for i, one in enumerate(value)}
            elif value is not None and not isinstance(value, Mapping):
                tensors[name] = torch.as_tensor(value)
        return cls(tensors)

    @property
    def key(self) -> tuple[Any, ...]:
        """What a program is made for."""
        return (*((name, t.shape, t.dtype) for name, t in self.tensors.items()), torch.get_num_threads())


def _waves(module: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The times of a call for each picture, and what the network's sinusoids make of them and of labels that it takes
    for times: in float32, for OpenVINO would round a time of 999 to bfloat16 before its sine is taken."""
    rows = len(given["x"])
    times = torch.as_tensor(given["t"], dtype=torch.float32).expand(rows)
    known = [times]
    if module.config.class_embed_type == "timestep" and given.get("labels") is not None:
        known.append(given["labels"])
    return {"t": times, WAVES: tuple(module.time_proj(one).float() for one in known)}


def arguments(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of a call again: tensors that were numbered are tuples.

    >>> sorted(arguments({"x": torch.zeros(1), "r.0": torch.zeros(1), "r.1": torch.zeros(1)}))
    ['r', 'x']
    """
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        base, _, index = name.partition(".")
        found[base] = (*found.get(base, ()), tensor) if index else tensor
    return found


def shrunk(tensors: Mapping[str, Tensor], unit: int) -> dict[str, Tensor]:
    """The same tensors for tracing, pictures no larger than they need be: a trace holds for every size.

    Where several tensors have a height and a width they keep theirs, which hang together.
    """
    pictures = [name for name, tensor in tensors.items() if tensor.ndim == 4]
    if len(pictures) != 1:
        return dict(tensors)
    height, width = tensors[pictures[0]].shape[-2:]
    h, w = (min(side, 2 * unit) if side % unit == 0 else side for side in (height, width))
    return {**tensors, pictures[0]: tensors[pictures[0]][..., :h, :w]}


# --- programs --------------------------------------------------------------------------------------------------------


class Programs:
    """The programs of one module; called as its `forward` is.

    Args:
        module: in evaluation, on the CPU.
        unit: height and width of its inputs are multiples of it.
    """

    def __init__(self, module: nn.Module, unit: int) -> None:
        self.module, self.unit = module, unit
        self._kept: OrderedDict[tuple[Any, ...], Program] = OrderedDict()
        self._weights: int | None = None
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **slots: Any) -> Tensor:
        call = Call.of(self.module, args, slots)
        with self._lock:
            return self._program(call)(call.tensors)

    def why_not(self, slots: Mapping[str, Any]) -> str | None:
        """Why a call with these slots cannot be given to OpenVINO; None where it can."""
        if slots.get("adapters"):
            return "what adapters bring is for attention processors"
        if slots.get("guidance") is not None:
            return "it is told the weight of guidance, whose sinusoids need float32"
        table, labels = getattr(self.module, "class_embedding", None), slots.get("labels")
        if isinstance(table, nn.Embedding) and labels is not None and len(labels):
            if int(labels.min()) < 0 or int(labels.max()) >= table.num_embeddings:  # read as zeros by OpenVINO
                return "labels lie outside of its table"
        return None

    def _program(self, call: Call) -> Program:
        weights = state(self.module)
        if weights != self._weights:
            self._kept.clear()
            self._weights = weights
        key = call.key
        if key not in self._kept:
            most = KEPT if _bytes(self.module) < LARGE else 2
            while len(self._kept) >= most:
                self._kept.popitem(last=False)
            self._kept[key] = Program(self.module, call.tensors, self.unit)
        self._kept.move_to_end(key)
        return self._kept[key]


class Program:
    """A module compiled for tensors of certain shapes; called with such tensors by name."""

    def __init__(self, module: nn.Module, tensors: Mapping[str, Tensor], unit: int) -> None:
        dtype = next((p.dtype for p in module.parameters()), torch.float32)
        self._names, self._dtype = list(tensors), dtype
        model = converted(module, tensors, unit)
        config = {
            "INFERENCE_PRECISION_HINT": HINTS[dtype],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "ENABLE_CPU_PINNING": False,
        }
        self._compiled = _core().compile_model(model, "CPU", config)
        self._request = self._compiled.create_infer_request()
        self._source = model._source  # whose memory the smaller weights share still

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        given = [_outside(tensors[name]).numpy() for name in self._names]
        self._request.infer(given, share_inputs=True)
        out: Tensor = torch.from_numpy(self._request.get_output_tensor(0).data).to(self._dtype, copy=True)
        return out


def converted(module: nn.Module, tensors: Mapping[str, Tensor], unit: int) -> Any:
    """An `openvino.Model` of a module, for inputs of exactly these shapes; floats go in and come out as float32."""
    decoder = importlib.import_module("openvino.frontend.pytorch.ts_decoder").TorchScriptPythonDecoder
    manager = importlib.import_module("openvino.frontend").FrontEndManager()
    twin = _twin(module)
    small = shrunk(tensors, unit)
    traced = _Positional(twin, small)
    with _tracing, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the tracer: that it keeps shapes, which is what it is for
        before = set_attention_kernel(sdpa)
        try:
            example = tuple(map(_outside, small.values()))
            graph = torch.jit.trace(traced, example, check_trace=False)  # type: ignore[no-untyped-call]
        finally:
            set_attention_kernel(before)
    frontend, source = manager.load_by_framework("pytorch"), decoder(graph)
    model = frontend.convert(frontend.load(source))
    model.reshape({given: list(tensor.shape) for given, tensor in zip(model.inputs, tensors.values(), strict=True)})
    model._source = source, twin  # whose memory its constants share
    return model


class _Positional(nn.Module):
    """A module called with its tensors in a row, floats in float32, for tracing."""

    def __init__(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.module, self.kinds = module, {name: tensor.dtype for name, tensor in tensors.items()}
        self.eval()

    def forward(self, *tensors: Tensor) -> Tensor:
        typed = {name: tensor.to(kind) for (name, kind), tensor in zip(self.kinds.items(), tensors, strict=True)}
        given = arguments(typed)
        if WAVES in given:
            self.module.time_proj = _Given(given.pop(WAVES))
        out: Tensor = self.module(**given)
        return out.float()


class _Given(nn.Module):
    """Gives what it was given, one thing for each call."""

    def __init__(self, values: tuple[Tensor, ...]) -> None:
        super().__init__()
        self._values = iter(values)

    def forward(self, times: Tensor) -> Tensor:
        return next(self._values)


def _outside(tensor: Tensor) -> Tensor:
    """As a program takes it: floats in float32."""
    return (tensor.float() if tensor.is_floating_point() else tensor).detach().contiguous()


def _twin(module: nn.Module) -> nn.Module:
    """The same module over the same weights, which are copied only where they do not lie in rows, as conversion needs
    them; without what stands in the place of its `forward`."""
    shared: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        plain = tensor.detach().contiguous()
        shared[id(tensor)] = nn.Parameter(plain, False) if isinstance(tensor, nn.Parameter) else plain
    standing = vars(module).pop("forward", None)
    try:
        twin = copy.deepcopy(module, shared)
    finally:
        if standing is not None:
            vars(module)["forward"] = standing
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is GEGLU and type(child.proj) is nn.Linear:
                setattr(parent, name, _Gated(child))
    return twin


class _Gated(nn.Module):
    """A GEGLU whose value and gate are products of their own, into which OpenVINO draws what follows them."""

    def __init__(self, layer: GEGLU) -> None:
        super().__init__()
        self.weights, self.biases = layer.proj.weight.detach().chunk(2), layer.proj.bias.detach().chunk(2)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = (F.linear(x, weight, bias) for weight, bias in zip(self.weights, self.biases, strict=True))
        return value * F.gelu(gate)


def state(module: nn.Module) -> int:
    """A number that changes when a weight is written or replaced."""
    tensors = (*module.parameters(), *module.buffers())
    return hash(tuple((t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version) for t in tensors))


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in module.parameters())
