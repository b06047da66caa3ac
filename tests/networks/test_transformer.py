"""Properties of the transformer over pixels and of what its attention rests on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import UserError
from sfumato.networks.attention import Attention, math, sdpa
from sfumato.networks.transformer import GEGLU, ROWS, Attended, BasicTransformerBlock, FeedForward, Transformer2DModel


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(**options: object) -> Transformer2DModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Transformer2DModel(16, heads=2, context_dim=6, groups=4, **options).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_shape_and_memory_format_stay(linear: bool, depth: int) -> None:
    network = build(linear_projection=linear, depth=depth)
    x, attended = noise(2, 16, 4, 6), Attended(noise(2, 3, 6, seed=1))
    out = network(x, attended)
    assert out.shape == x.shape
    assert out.is_contiguous()
    last = network(x.to(memory_format=torch.channels_last), attended)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, out, rtol=1e-5, atol=1e-5)


def test_the_pixels_order_is_nothing_to_it() -> None:
    """Without positions, a transformer of shuffled pixels is the shuffled transformer."""
    network, x, attended = build(), noise(1, 16, 3, 4), Attended(noise(1, 3, 6, seed=1))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))

    def shuffled(y: Tensor) -> Tensor:
        return y.flatten(2)[..., order].unflatten(2, (3, 4))

    torch.testing.assert_close(network(shuffled(x), attended), shuffled(network(x, attended)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("only_cross", [False, True])
def test_masked_tokens_are_as_good_as_absent(only_cross: bool) -> None:
    network = build(only_cross=only_cross)
    x, context = noise(2, 16, 4, 4), noise(2, 5, 6, seed=1)
    mask = torch.tensor([0.0, 0.0, 0.0, -10_000.0, -10_000.0]).expand(2, 1, 5)
    cut = network(x, Attended(context[:, :3]))
    torch.testing.assert_close(network(x, Attended(context, mask)), cut, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(network(x, Attended(context)), cut, atol=1e-3)


def test_only_cross_attention_keeps_the_tokens_apart() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = BasicTransformerBlock(16, heads=2, head_dim=8, context_dim=6, only_cross=True)
    x, context = noise(1, 5, 16), noise(1, 3, 6, seed=1)
    changed = x.clone()
    changed[:, 4] += 1
    out, other = block(x, Attended(context)), block(changed, Attended(context))
    assert torch.equal(out[:, :4], other[:, :4])
    assert not torch.equal(out[:, 4], other[:, 4])


def test_geglu_is_its_equation() -> None:
    layer, x = GEGLU(4, 3), noise(2, 4)
    value, gate = (x @ layer.proj.weight.T + layer.proj.bias).split(3, dim=-1)
    torch.testing.assert_close(layer(x), value * 0.5 * gate * (1 + torch.erf(gate / 2**0.5)))


def test_heads_that_do_not_divide_the_channels_are_refused() -> None:
    with pytest.raises(UserError, match="16 channels cannot be split into 3 attention heads"):
        Transformer2DModel(16, heads=3, context_dim=6, groups=4)


@pytest.mark.parametrize("masked", [False, True])
def test_half_precision_training_on_a_cpu_is_as_close_to_the_truth_as_torchs_kernel(masked: bool) -> None:
    q, k, v = (noise(2, 3, length, 8, seed=length) for length in (7, 5, 4))
    k, v = k, noise(2, 3, 5, 8, seed=4)
    mask = torch.tensor([0.0, 0, 0, -1e4, -1e4]).expand(2, 1, 1, 5) if masked else None
    truth = math(q.double().float(), k, v, mask, 8**-0.5)
    halves = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    half_mask = None if mask is None else mask.bfloat16()
    ours = sdpa(*halves, half_mask, 8**-0.5)
    torchs = F.scaled_dot_product_attention(*halves, attn_mask=half_mask, scale=8**-0.5)
    assert ours.dtype == torch.bfloat16
    assert (ours - truth).abs().max() <= 1.1 * (torchs - truth).abs().max()
    mine = torch.autograd.grad(ours.float().square().sum(), halves)
    reference = torch.autograd.grad(torchs.float().square().sum(), halves)
    for one, other in zip(mine, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)
    with torch.no_grad():
        assert torch.equal(sdpa(*halves, half_mask, 8**-0.5), torchs)


def test_the_reference_kernel_keeps_float32_scores_under_autocast() -> None:
    q, k, v = (noise(1, 2, 6, 8, seed=seed).bfloat16() for seed in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = math(q, k, v, None, 0.5)
    expected = (0.5 * q.float() @ k.float().transpose(-1, -2)).softmax(-1) @ v.float()
    assert torch.equal(out, expected.bfloat16())


def test_upcast_reaches_the_scores_that_processors_write_out() -> None:
    layer = Attention(8, heads=1, head_dim=8, upcast_attention=True)
    query = torch.full((1, 1, 8), 300.0, dtype=torch.float16)
    key = torch.stack([query[0, 0], query[0, 0] - 1])[None]
    assert torch.equal(layer.get_attention_scores(query, key), torch.tensor([[[1.0, 0.0]]], dtype=torch.float16))


@pytest.mark.parametrize("tokens", [1, ROWS, ROWS + 7])
def test_feed_forward_by_rows_is_feed_forward(tokens: int) -> None:
    layer = FeedForward(8).eval()
    x = noise(2, tokens, 8).requires_grad_()
    wanted = layer(x)
    with torch.no_grad():
        found = layer(x)
    assert wanted.requires_grad and found.shape == wanted.shape
    torch.testing.assert_close(found, wanted.detach())


def test_feed_forward_asks_layers_that_are_not_plain() -> None:
    class Louder(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer, x = FeedForward(8).eval(), noise(1, 5, 8)
    with torch.no_grad():
        plain = layer(x)
        gate = layer.net[0]
        assert isinstance(gate, GEGLU)
        louder = Louder(8, 64)
        louder.load_state_dict(gate.proj.state_dict())
        gate.proj = louder
        assert not torch.allclose(layer(x), plain)
        gate.proj = torch.nn.Linear(8, 64)
        gate.proj.load_state_dict(louder.state_dict())
        assert torch.equal(layer(x), plain)
        handle = gate.proj.register_forward_hook(lambda module, inputs, out: 3 * out)
        assert not torch.allclose(layer(x), plain)
        handle.remove()
