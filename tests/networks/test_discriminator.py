"""The patch discriminator, its losses, and the weight that balances them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.networks.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.networks.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    hinge_d,
    hinge_g,
    vanilla_d,
    vanilla_g,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_names_and_shapes_are_the_published_ones() -> None:
    state = PatchDiscriminator().state_dict()
    assert {key.rpartition(".")[0] for key in state} == {f"main.{i}" for i in (0, 2, 3, 5, 6, 8, 9, 11)}
    shapes = {key: tuple(state[key].shape) for key in state if key.endswith("weight")}
    assert shapes == {
        "main.0.weight": (64, 3, 4, 4),
        "main.2.weight": (128, 64, 4, 4),
        "main.3.weight": (128,),
        "main.5.weight": (256, 128, 4, 4),
        "main.6.weight": (256,),
        "main.8.weight": (512, 256, 4, 4),
        "main.9.weight": (512,),
        "main.11.weight": (1, 512, 4, 4),
    }
    biased = {key for key in state if key.endswith(".bias") and state[key.replace("bias", "weight")].ndim == 4}
    assert biased == {"main.0.bias", "main.11.bias"}
    assert sum(p.numel() for p in PatchDiscriminator().parameters()) == 2_765_633


def test_widths_stop_at_eight_times_the_first() -> None:
    widths = [m.out_channels for m in PatchDiscriminator(width=4, n_layers=5).main if isinstance(m, nn.Conv2d)]
    assert widths == [4, 8, 16, 32, 32, 32, 1]


def test_the_same_tensors_for_either_norm() -> None:
    batch = {k: v.shape for k, v in PatchDiscriminator(width=8).named_parameters()}
    assert {k: v.shape for k, v in PatchDiscriminator(width=8, norm="group").named_parameters()} == batch


def test_weights_begin_normal() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PatchDiscriminator()
    for layer in model.main:
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 1000:
            assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        elif isinstance(layer, nn.BatchNorm2d):
            assert float(layer.weight.detach().mean()) == pytest.approx(1.0, abs=0.01)
            assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.3)
            assert not layer.bias.any()


@pytest.mark.parametrize("n_layers", [1, 2, 3])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_one_logit_for_each_patch(norm: Any, n_layers: int) -> None:
    model = PatchDiscriminator(4, width=8, n_layers=n_layers, norm=norm)
    for height, width in ((model.least_size, 32), (33, 47)):
        sides = (height // 2**n_layers - 2, width // 2**n_layers - 2)
        assert model(noise(2, 4, height, width)).shape == (2, 1, *sides)
    with pytest.raises(UserError, match=f"needs pictures of at least {model.least_size} pixels"):
        model(noise(2, 4, model.least_size - 1, 32))


def test_a_patch_sees_seventy_pixels() -> None:
    model = PatchDiscriminator(1, width=2, norm="group").eval()
    for module in model.main:
        if isinstance(module, nn.GroupNorm):
            module.forward = lambda x: x  # type: ignore[method-assign]  # a norm would see the whole picture
    x = noise(1, 1, 128, 128).requires_grad_()
    logits = model(x)
    (seen,) = torch.autograd.grad(logits[0, 0, 7, 7], x)
    touched = seen[0, 0].nonzero()
    assert (touched.max(dim=0).values - touched.min(dim=0).values + 1).tolist() == [70, 70]


def test_group_norm_does_not_mix_pictures() -> None:
    model = PatchDiscriminator(width=8, n_layers=2, norm="group").train()
    x = noise(3, 3, 16, 16)
    torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=1e-4, atol=1e-6)


def test_odd_settings_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'batch'"):
        PatchDiscriminator(norm="bach")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="must be 1 or more, got 3, 64 and 0"):
        PatchDiscriminator(n_layers=0)
    with pytest.raises(UserError, match=r"x must be \(B, 3, H, W\), got \(1, 1, 32, 32\)"):
        PatchDiscriminator(width=8)(torch.zeros(1, 1, 32, 32))


def test_losses_have_their_closed_forms() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert float(hinge_d(real, fake)) == pytest.approx(0.5 * ((0.5 + 2) / 3 + (1 + 2) / 3))
    assert float(hinge_g(fake)) == pytest.approx(2 / 3)
    p_real, p_fake = real.sigmoid(), fake.sigmoid()
    assert float(vanilla_d(real, fake)) == pytest.approx(-0.5 * float(p_real.log().mean() + (1 - p_fake).log().mean()))
    assert float(vanilla_g(fake)) == pytest.approx(-float(p_fake.log().mean()))


@pytest.mark.parametrize(("judge", "forger"), [(hinge_d, hinge_g), (vanilla_d, vanilla_g)], ids=["hinge", "vanilla"])
def test_judge_and_forger_pull_fakes_apart(judge: Any, forger: Any) -> None:
    real, fake = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    to_real, to_fake = torch.autograd.grad(judge(real, fake), [real, fake])
    assert bool((to_real < 0).all() and (to_fake > 0).all())
    (to_fake,) = torch.autograd.grad(forger(fake), fake)
    assert bool((to_fake < 0).all())
    half = judge(real.bfloat16(), fake.bfloat16())
    assert half.dtype == torch.float32


def losses(scale: float = 1.0) -> tuple[Tensor, Tensor, AutoencoderKL]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoencoderConfig(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
        )
        model, judge = AutoencoderKL(config), PatchDiscriminator(width=8, n_layers=2)
    x = noise(2, 3, 16, 16)
    picture, _ = model(x)
    return (picture - x).abs().sum() / len(x), scale * hinge_g(judge(picture)), model


def test_the_weight_is_the_quotient_of_gradients_at_the_last_layer() -> None:
    nll, g, model = losses()
    weight = adaptive_weight(nll, g, model.last_layer)
    norms = []
    for loss in (nll, g):
        model.zero_grad()
        loss.backward(retain_graph=True)
        assert model.last_layer.grad is not None
        norms.append(float(model.last_layer.grad.norm()))
    assert float(weight) == pytest.approx(norms[0] / (norms[1] + 1e-4), rel=1e-5)
    assert weight.shape == () and not weight.requires_grad
    (nll + weight * g).backward()
    assert all(p.grad is not None for p in model.decoder.parameters())


def test_the_weighted_gradients_are_equally_strong() -> None:
    nll, g, model = losses()
    weight = adaptive_weight(nll, g, model.last_layer, delta=0.0)
    gradients = [torch.autograd.grad(loss, model.last_layer, retain_graph=True)[0] for loss in (nll, weight * g)]
    torch.testing.assert_close(gradients[0].norm(), gradients[1].norm())


def test_the_weight_is_clamped_and_touches_no_gradient() -> None:
    nll, g, model = losses(scale=0.0)
    expected = torch.autograd.grad(nll, model.last_layer, retain_graph=True)[0].norm() / 1e-4
    assert float(adaptive_weight(nll, g, model.last_layer, max_weight=1e9)) == pytest.approx(float(expected), rel=1e-5)
    assert float(adaptive_weight(nll, g, model.last_layer)) == 1e4
    assert float(adaptive_weight(nll, g, model.last_layer, max_weight=7.0)) == 7
    assert all(p.grad is None for p in model.parameters())
