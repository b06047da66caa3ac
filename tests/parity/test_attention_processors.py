"""Attention processors written for diffusers, and for anyone who follows its contract, run unchanged on our UNet."""

from __future__ import annotations

import functools
import logging
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.networks.attention import AttnProcessor as DefaultProcessor
from sfumato.networks.unet_condition import UNet2DConditionConfig, UNet2DConditionModel

diffusers = pytest.importorskip("diffusers")
attention_processor = pytest.importorskip("diffusers.models.attention_processor")

TINY_SD1: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": [16, 32, 48, 48],
    "norm_num_groups": 8,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}

# The 32 names of Stable Diffusion 1, as IP-Adapter's files number them.
DOWN = [f"down_blocks.{block}.attentions.{layer}" for block in (0, 1, 2) for layer in (0, 1)]
UP = [f"up_blocks.{block}.attentions.{layer}" for block in (1, 2, 3) for layer in (0, 1, 2)]
NAMES = [
    f"{place}.transformer_blocks.0.{attention}.processor"
    for place in [*DOWN, *UP, "mid_block.attentions.0"]
    for attention in ("attn1", "attn2")
]


class AttnProcessor(nn.Module):
    """A published walk-through's class, as it stands there but for names that it leaves undefined."""

    def __init__(
        self,
        hidden_size=None,
        cross_attention_dim=None,
    ):
        super().__init__()

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        temb=None,
    ):
        residual = hidden_states

        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)

        input_ndim = hidden_states.ndim

        if input_ndim == 4:
            batch_size, channel, height, width = hidden_states.shape
            hidden_states = hidden_states.view(batch_size, channel, height * width).transpose(1, 2)

        batch_size, sequence_length, _ = (
            hidden_states.shape if encoder_hidden_states is None else encoder_hidden_states.shape
        )
        attention_mask = attn.prepare_attention_mask(attention_mask, sequence_length, batch_size)

        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        query = attn.to_q(hidden_states)

        if encoder_hidden_states is None:
            encoder_hidden_states = hidden_states
        elif attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)

        key = attn.to_k(encoder_hidden_states)
        value = attn.to_v(encoder_hidden_states)

        query = attn.head_to_batch_dim(query)
        key = attn.head_to_batch_dim(key)
        value = attn.head_to_batch_dim(value)

        attention_probs = attn.get_attention_scores(query, key, attention_mask)
        hidden_states = torch.bmm(attention_probs, value)
        hidden_states = attn.batch_to_head_dim(hidden_states)

        # linear proj
        hidden_states = attn.to_out[0](hidden_states)
        # dropout
        hidden_states = attn.to_out[1](hidden_states)

        if input_ndim == 4:
            hidden_states = hidden_states.transpose(-1, -2).reshape(batch_size, channel, height, width)

        if attn.residual_connection:
            hidden_states = hidden_states + residual

        hidden_states = hidden_states / attn.rescale_output_factor

        return hidden_states


class IPAttnProcessor(nn.Module):
    """Attention to a picture's tokens, which follow the text's (Ye 2023, eq. 3-5)."""

    def __init__(self, hidden_size, cross_attention_dim=None, scale=1.0, num_tokens=2):
        super().__init__()
        self.scale, self.num_tokens = scale, num_tokens
        self.to_k_ip = nn.Linear(cross_attention_dim or hidden_size, hidden_size, bias=False)
        self.to_v_ip = nn.Linear(cross_attention_dim or hidden_size, hidden_size, bias=False)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, strength=1.0):
        text = encoder_hidden_states[:, : -self.num_tokens]
        picture = encoder_hidden_states[:, -self.num_tokens :]
        query = attn.head_to_batch_dim(attn.to_q(hidden_states), out_dim=4)
        out = 0.0
        for scale, key, value in (
            (1.0, attn.to_k(text), attn.to_v(text)),
            (self.scale * strength, self.to_k_ip(picture), self.to_v_ip(picture)),
        ):
            key, value = attn.head_to_batch_dim(key, out_dim=4), attn.head_to_batch_dim(value, out_dim=4)
            out = out + scale * F.scaled_dot_product_attention(query, key, value)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


@functools.cache
def build() -> tuple[UNet2DConditionModel, Any]:
    theirs = diffusers.UNet2DConditionModel(**TINY_SD1).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    ours = UNet2DConditionModel(UNet2DConditionConfig.from_dict(TINY_SD1)).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(length: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 16, 16, generator=generator)
    return x, torch.tensor([3, 977]), torch.randn(2, length, 12, generator=generator)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_the_32_names_are_in_their_order() -> None:
    ours, theirs = build()
    assert len(NAMES) == 32
    assert list(ours.attn_processors) == NAMES
    assert list(theirs.attn_processors) == NAMES


@pytest.mark.parametrize(
    "make",
    [
        attention_processor.AttnProcessor,
        attention_processor.AttnProcessor2_0,
        functools.partial(attention_processor.SlicedAttnProcessor, slice_size=3),
        functools.partial(AttnProcessor, hidden_size=320, cross_attention_dim=768),
    ],
    ids=["AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "walk-through"],
)
@pytest.mark.parametrize("masked", [False, True])
def test_foreign_processors_run_unchanged_and_restore_bit_for_bit(make: Any, masked: bool) -> None:
    network, _ = build()
    x, t, context = inputs()
    mask = torch.tensor([[True, True, True, False, False], [True] * 5]) if masked else None
    keys, processors = list(network.state_dict()), network.attn_processors
    with torch.no_grad():
        before = network(x, t, context=context, context_mask=mask)
        network.set_attn_processor(make())
        assert relative(network(x, t, context=context, context_mask=mask), before) <= 2e-5
        network.set_attn_processor({name: make() for name in processors})
        assert relative(network(x, t, context=context, context_mask=mask), before) <= 2e-5
        network.set_attn_processor(processors)
        assert torch.equal(network(x, t, context=context, context_mask=mask), before)
    assert list(network.state_dict()) == keys
    assert network.attn_processors == processors


def processors_by_name(unet: Any) -> dict[str, Any]:
    """The walk-through's loop, word for word, on either library's network."""
    attn_procs = {}
    unet_sd = unet.state_dict()
    for name in unet.attn_processors.keys():
        cross_attention_dim = None if name.endswith("attn1.processor") else unet.config.cross_attention_dim
        if name.startswith("mid_block"):
            hidden_size = unet.config.block_out_channels[-1]
        elif name.startswith("up_blocks"):
            block_id = int(name[len("up_blocks.")])
            hidden_size = list(reversed(unet.config.block_out_channels))[block_id]
        elif name.startswith("down_blocks"):
            block_id = int(name[len("down_blocks.")])
            hidden_size = unet.config.block_out_channels[block_id]
        if cross_attention_dim is None:
            attn_procs[name] = AttnProcessor()
        else:
            layer_name = name.split(".processor")[0]
            weights = {
                "to_k_ip.weight": unet_sd[layer_name + ".to_k.weight"],
                "to_v_ip.weight": unet_sd[layer_name + ".to_v.weight"],
            }
            attn_procs[name] = IPAttnProcessor(hidden_size=hidden_size, cross_attention_dim=cross_attention_dim)
            attn_procs[name].load_state_dict(weights)
    unet.set_attn_processor(attn_procs)
    return attn_procs


def test_the_walk_throughs_loop_sets_picture_attention_and_keywords_reach_it() -> None:
    ours, theirs = build()
    x, t, context = inputs(7)
    defaults, their_defaults = ours.attn_processors, theirs.attn_processors
    keys = list(ours.state_dict())
    try:
        with torch.no_grad():
            before = ours(x, t, context=context)
            processors_by_name(ours)
            processors_by_name(theirs)
            assert [key for key in ours.state_dict() if "_ip" in key] == [
                key for key in theirs.state_dict() if "_ip" in key
            ]
            full = ours(x, t, context=context)
            assert relative(full, theirs(x, t, context).sample) <= 1e-5
            assert relative(full, before) > 1e-3
            weak = ours(x, t, context=context, adapters={"strength": torch.tensor(0.25)})
            expected = theirs(x, t, context, cross_attention_kwargs={"strength": 0.25}).sample
            assert relative(weak, expected) <= 1e-5
            assert relative(weak, full) > 1e-3
            ours.set_attn_processor(defaults)
            assert torch.equal(ours(x, t, context=context), before)
    finally:
        ours.set_attn_processor(defaults)
        theirs.set_attn_processor(their_defaults)
    assert list(ours.state_dict()) == keys


def test_a_keyword_that_no_processor_takes_is_dropped_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    network, theirs = build()
    x, t, context = inputs()
    with torch.no_grad():
        expected = network(x, t, context=context)
        with pytest.warns(UserWarning, match="no attention processor of this network takes 'strength': it is ignored"):
            out = network(x, t, context=context, adapters={"strength": torch.ones(2)})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = network(x, t, context=context, adapters={"strength": torch.ones(2)})
        with caplog.at_level(logging.WARNING):
            same = theirs(x, t, context, cross_attention_kwargs={"strength": torch.ones(2)}).sample
    assert torch.equal(out, expected)
    assert torch.equal(again, expected)
    assert relative(same, expected) <= 1e-5


def test_one_processor_by_name_leaves_the_others_at_the_default() -> None:
    network, _ = build()
    x, t, context = inputs()
    seen: list[tuple[int, ...]] = []

    class Recorder(DefaultProcessor):
        def forward(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            seen.append(tuple(hidden_states.shape))
            return super().forward(attn, hidden_states, *args, **kwargs)

    defaults = network.attn_processors
    with torch.no_grad():
        before = network(x, t, context=context)
        network.set_attn_processor({**defaults, NAMES[-1]: Recorder()})
        assert torch.equal(network(x, t, context=context), before)
        network.set_attn_processor(defaults)
    assert seen == [(2, 4, 48)]
