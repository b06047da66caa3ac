"""The average of the weights: its closed form, and that lending it to the network changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sfumato.training.ema import EMA


def followed(decay: float, warmup: bool, values: torch.Tensor) -> EMA:
    """The average after a scalar weight went through `values`."""
    module = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        module.weight.fill_(float(values[0]))
        ema = EMA(module, decay, warmup)
        for value in values[1:]:
            module.weight.fill_(float(value))
            ema.update()
    return ema


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_closed_form_without_warmup(decay: float) -> None:
    values = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    updates = len(values) - 1
    ages = torch.arange(updates - 1, -1, -1, dtype=torch.float64)
    expected = decay**updates * values[0] + ((1 - decay) * decay**ages * values[1:]).sum()
    ema = followed(decay, False, values)
    assert ema.updates == updates
    assert float(ema.averages["weight"]) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.9999])
def test_closed_form_with_warmup(decay: float) -> None:
    values = torch.randn(60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    decays = [min(decay, (1 + n) / (10 + n)) for n in range(len(values) - 1)]
    weights = [torch.tensor([*decays[n + 1 :], 1.0]).double().prod() * (1 - d) for n, d in enumerate(decays)]
    expected = torch.tensor(decays).double().prod() * values[0]
    expected = expected + sum(w * v for w, v in zip(weights, values[1:], strict=True))
    assert float(followed(decay, True, values).averages["weight"]) == pytest.approx(float(expected), abs=1e-6)


def test_decay_zero_is_the_weights_themselves() -> None:
    values = torch.tensor([1.0, -2.5, 0.1])
    for warmup in (False, True):
        assert torch.equal(followed(0.0, warmup, values).averages["weight"].flatten(), values[-1:])


def test_the_average_is_float32_and_leaves_integers_alone() -> None:
    module = nn.BatchNorm1d(2).to(torch.bfloat16)
    ema = EMA(module, 0.9)
    assert "num_batches_tracked" not in ema.averages
    assert {t.dtype for t in ema.averages.values()} == {torch.float32}
    ema.update()


def network() -> tuple[nn.Module, EMA]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = EMA(module, 0.5, warmup=False)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    ema.update()
    return module, ema


def test_in_place_lends_the_average_and_gives_the_weights_back() -> None:
    module, ema = network()
    before = {n: t.clone() for n, t in module.state_dict().items()}
    grad = [p.requires_grad for p in module.parameters()]
    with ema.in_place():
        for name, average in ema.averages.items():
            assert torch.equal(module.state_dict()[name], average)
        assert torch.is_grad_enabled()
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    assert [p.requires_grad for p in module.parameters()] == grad


def test_in_place_gives_the_weights_back_after_an_exception() -> None:
    module, ema = network()
    before = {n: t.clone() for n, t in module.state_dict().items()}
    averages = {n: t.clone() for n, t in ema.averages.items()}
    with pytest.raises(KeyboardInterrupt), ema.in_place():
        raise KeyboardInterrupt
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    assert all(torch.equal(t, averages[n]) for n, t in ema.averages.items())


def test_load_goes_on_where_the_other_was() -> None:
    module, ema = network()
    kept, updates = {n: t.clone() for n, t in ema.averages.items()}, ema.updates
    again = EMA(module, 0.5, warmup=False)
    again.load(kept, updates)
    kept["0.weight"].zero_()
    with torch.no_grad():
        module[0].weight.add_(1)  # type: ignore[operator, union-attr]
    ema.update()
    again.update()
    assert ema.updates == again.updates == updates + 1
    assert all(torch.equal(t, ema.averages[n]) for n, t in again.averages.items())


def test_load_refuses_other_tensors() -> None:
    module, ema = network()
    with pytest.raises(KeyError):
        ema.load({}, 3)
    with pytest.raises(RuntimeError):
        ema.load({n: t.new_zeros(7) for n, t in ema.averages.items()}, 3)
