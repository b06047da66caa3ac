"""First stages: autoencoders that shrink a picture by a factor 2 to 32 in height and width.

Two kinds share encoder and decoder. `AutoencoderKL` describes a Gaussian over latents (Kingma 2014; Rombach 2022,
section 3.1), `VQModel` rounds latents to the codes of a learned table (van den Oord 2017; Esser 2021). Their
parameter names are those of diffusers' classes of the same names: checkpoints load by the identity map, both ways.

>>> config = AutoencoderConfig(
...     down_block_types=("DownEncoderBlock2D",) * 2,
...     up_block_types=("UpDecoderBlock2D",) * 2,
...     block_out_channels=(32, 32),
... )
>>> model = AutoencoderKL(config)
>>> posterior = model.encode(torch.zeros(1, 3, 8, 8))
>>> posterior.mean.shape, model.decode(posterior.mode).shape
(torch.Size([1, 4, 4, 4]), torch.Size([1, 3, 8, 8]))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sfumato.errors import UserError, raise_unknown
from sfumato.networks.attention import Attention, AttentionHost
from sfumato.networks.config import NetworkConfig, check_choices, check_levels
from sfumato.networks.norm import GroupNorm
from sfumato.networks.resnet import ACTIVATIONS, Downsample2D, ResnetBlock2D, Upsample2D, activation, widen
from sfumato.networks.vq import VectorQuantizer

EPS = 1e-6
"""Of every normalisation in a first stage."""
SPATIAL_GROUPS = 32
"""Groups of a `SpatialNorm`, whatever `norm_num_groups` says, as in the checkpoints that use it."""

ENCODER_BLOCKS = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
"""Name of a level's kind -> whether attention follows each of its residual blocks."""
DECODER_BLOCKS = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}


@dataclass(frozen=True, kw_only=True)
class FirstStageConfig(NetworkConfig):
    """The fields that both kinds of autoencoder have, with diffusers' names, meanings and defaults.

    Levels run from full resolution inwards in `down_block_types` and `block_out_channels`, outwards in
    `up_block_types`; each but the last halves height and width. `scaling_factor` multiplies a latent before
    diffusion, so that it has about unit variance. `force_upcast` says that the network overflows in float16 and
    must run in a wider type; it is for whoever chooses the type, the network itself never changes it.
    """

    called: ClassVar[str] = "autoencoder"
    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        check_levels(self)
        check_choices(self, {"act_fn": tuple(ACTIVATIONS)}, ENCODER_BLOCKS, DECODER_BLOCKS)
        for field in ("in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups"):
            if getattr(self, field) < 1:
                raise UserError(f"{field} must be 1 or more, got {getattr(self, field)}")
        for channels in self.block_out_channels:
            if channels < 1 or channels % self.norm_num_groups:
                raise UserError(
                    f"block_out_channels {channels} is not a multiple of norm_num_groups {self.norm_num_groups}"
                )
        if not 0 < self.scaling_factor < float("inf"):
            raise UserError(f"scaling_factor must be a positive number, got {self.scaling_factor}")

    @property
    def factor(self) -> int:
        """How many times smaller than the picture the latent is, in height and in width."""
        return int(2 ** (len(self.block_out_channels) - 1))


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(FirstStageConfig):
    """diffusers' fields of `AutoencoderKL`.

    `shift_factor`, `latents_mean` and `latents_std` (one number per latent channel) describe how latents are made
    standard before diffusion, beside `scaling_factor`; the network itself does not apply them.
    """

    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("latents_mean", "latents_std"):
            given = getattr(self, field)
            if given is not None and len(given) != self.latent_channels:
                raise UserError(
                    f"{field} must have one number per latent channel ({self.latent_channels}), got {len(given)}"
                )
        if self.latents_std is not None and min(self.latents_std) <= 0:
            raise UserError(f"latents_std must be positive, got {min(self.latents_std)}")


@dataclass(frozen=True, kw_only=True)
class VQConfig(FirstStageConfig):
    """diffusers' fields of `VQModel`.

    `vq_embed_dim` None means `latent_channels`. `norm_type` "spatial" lets the codes modulate every norm of the
    decoder (Zheng 2022, MoVQ). `lookup_from_codebook` tells other programs that a generator in front of this model
    yields codes; `VQModel.decode` here looks codes up whenever it is given integers.
    """

    latent_channels: int = 3
    force_upcast: bool = False
    num_vq_embeddings: int = 256
    vq_embed_dim: int | None = None
    norm_type: Literal["group", "spatial"] = "group"
    lookup_from_codebook: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_vq_embeddings < 2:
            raise UserError(f"num_vq_embeddings must be 2 or more, got {self.num_vq_embeddings}")
        if self.vq_embed_dim is not None and self.vq_embed_dim < 1:
            raise UserError(f"vq_embed_dim must be 1 or more, got {self.vq_embed_dim}")
        if self.norm_type not in ("group", "spatial"):
            raise_unknown("norm_type", str(self.norm_type), ("group", "spatial"))
        if self.norm_type == "spatial":
            if self.embed_dim != self.latent_channels:
                raise UserError(
                    f"norm_type 'spatial' needs vq_embed_dim equal to latent_channels ({self.latent_channels}), "
                    f"got {self.vq_embed_dim}"
                )
            for channels in self.block_out_channels:
                if channels % SPATIAL_GROUPS:
                    raise UserError(
                        f"norm_type 'spatial' needs block_out_channels in multiples of {SPATIAL_GROUPS}, got {channels}"
                    )

    @property
    def embed_dim(self) -> int:
        """Width of a code."""
        return self.latent_channels if self.vq_embed_dim is None else self.vq_embed_dim


@dataclass(frozen=True)
class DiagonalGaussian:
    """A Gaussian over latents with independent elements: `mean` and `logvar`, each (B, C, H, W)."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> DiagonalGaussian:
        """Mean and log variance stacked over channels (B, 2 C, H, W); log variances are clamped to [-30, 20]."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    @property
    def std(self) -> Tensor:
        """(B, C, H, W), the standard deviation `exp(logvar / 2)`."""
        return (0.5 * self.logvar).exp()

    @property
    def mode(self) -> Tensor:
        """(B, C, H, W), the likeliest latent, which is the mean."""
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """`mean + std noise` (Kingma 2014, eq. 10) for standard normal `noise` (B, C, H, W)."""
        if noise.shape != self.mean.shape:
            raise UserError(f"noise must have the latent's shape {tuple(self.mean.shape)}, got {tuple(noise.shape)}")
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """Divergence from the standard normal in nats, one number per picture, (B,), in float32 or wider.

        `KL = 1/2 sum(mu^2 + sigma^2 - 1 - log sigma^2)` over channels and pixels (Kingma 2014, appendix B).
        """
        mean, logvar = widen(self.mean), widen(self.logvar)
        return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))


class SpatialNorm(nn.Module):
    """GroupNorm whose scale and shift at each pixel come from the quantised latent (Zheng 2022, eq. 5)."""

    def __init__(self, channels: int, latent_channels: int) -> None:
        super().__init__()
        self.norm_layer = GroupNorm(SPATIAL_GROUPS, channels, EPS)
        self.conv_y = nn.Conv2d(latent_channels, channels, 1)
        self.conv_b = nn.Conv2d(latent_channels, channels, 1)

    def forward(self, x: Tensor, z_q: Tensor) -> Tensor:
        """(B, channels, H, W) and (B, latent_channels, h, w) -> (B, channels, H, W)."""
        z_q = F.interpolate(z_q, size=x.shape[-2:])
        return torch.addcmul(self.conv_b(z_q), self.norm_layer(x), self.conv_y(z_q))


class SpatialResnetBlock2D(nn.Module):
    """A residual block whose two norms are `SpatialNorm`s."""

    def __init__(self, channels: int, out_channels: int, latent_channels: int, act: str) -> None:
        super().__init__()
        self.act = activation(act)
        self.norm1 = SpatialNorm(channels, latent_channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = SpatialNorm(out_channels, latent_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else None

    def forward(self, x: Tensor, z_q: Tensor) -> Tensor:
        """(B, channels, H, W) and (B, latent_channels, h, w) -> (B, out_channels, H, W)."""
        hidden = self.conv1(self.act(self.norm1(x, z_q)))
        hidden = self.conv2(self.act(self.norm2(hidden, z_q)))
        out: Tensor = hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))
        return out


@dataclass(frozen=True)
class StageStyle:
    """What all levels of one encoder or decoder have in common.

    `spatial_channels` is the width of the quantised latent that modulates the norms; None for plain GroupNorm.
    """

    groups: int
    act: str
    spatial_channels: int | None = None

    def resnet(self, channels: int, out_channels: int) -> nn.Module:
        """A residual block of this style, without time embedding."""
        if self.spatial_channels is not None:
            return SpatialResnetBlock2D(channels, out_channels, self.spatial_channels, self.act)
        return ResnetBlock2D(channels, out_channels, None, groups=self.groups, eps=EPS, act=self.act)

    def attention(self, channels: int) -> Attention:
        """Self-attention over pixels with a single head and residual."""
        spatial = self.spatial_channels
        return Attention(
            channels,
            heads=1,
            head_dim=channels,
            bias=True,
            groups=self.groups if spatial is None else None,
            spatial_norm=None if spatial is None else SpatialNorm(channels, spatial),
            eps=EPS,
            residual=True,
        )

    def norm(self, channels: int) -> nn.Module:
        """A norm of this style."""
        if self.spatial_channels is not None:
            return SpatialNorm(channels, self.spatial_channels)
        return GroupNorm(self.groups, channels, EPS)


class StageBlock(nn.Module):
    """A stack of residual blocks with or without attention: the base of levels and of the innermost part."""

    gradient_checkpointing = False

    def __init__(self, resnets: list[nn.Module], attentions: list[Attention]) -> None:
        super().__init__()
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)

    def forward(self, x: Tensor, z_q: Tensor | None = None) -> Tensor:
        """(B, C, H, W) and what modulates the norms, (B, c, h, w) or None -> (B, C', H', W')."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            out: Tensor = checkpoint(self._forward, x, z_q, use_reentrant=False)
            return out
        return self._forward(x, z_q)

    def _forward(self, x: Tensor, z_q: Tensor | None) -> Tensor:
        for index in range(len(self.resnets)):
            x = self.resnets[index](x, z_q)
            x = self._attend(index, x, z_q)
        return x

    def _attend(self, index: int, x: Tensor, z_q: Tensor | None) -> Tensor:
        if "attentions" not in self._modules or index >= len(self.attentions):
            return x
        attention = self.attentions[index]
        out: Tensor = attention(x) if z_q is None else attention(x, temb=z_q)
        return out


class EncoderBlock(StageBlock):
    """One level of an encoder: residual blocks, then halving unless it is the innermost level."""

    def __init__(
        self, channels: int, out_channels: int, layers: int, style: StageStyle, *, attention: bool, resample: bool
    ) -> None:
        resnets = [style.resnet(channels if i == 0 else out_channels, out_channels) for i in range(layers)]
        super().__init__(resnets, [style.attention(out_channels) for _ in range(layers)] if attention else [])
        self.downsamplers = nn.ModuleList([Downsample2D(out_channels, padding=0)]) if resample else None

    def _forward(self, x: Tensor, z_q: Tensor | None) -> Tensor:
        x = super()._forward(x, z_q)
        return x if self.downsamplers is None else self.downsamplers[0](x)


class DecoderBlock(StageBlock):
    """One level of a decoder: residual blocks, then doubling unless it is the outermost level."""

    def __init__(
        self, channels: int, out_channels: int, layers: int, style: StageStyle, *, attention: bool, resample: bool
    ) -> None:
        resnets = [style.resnet(channels if i == 0 else out_channels, out_channels) for i in range(layers)]
        super().__init__(resnets, [style.attention(out_channels) for _ in range(layers)] if attention else [])
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels)]) if resample else None

    def _forward(self, x: Tensor, z_q: Tensor | None) -> Tensor:
        x = super()._forward(x, z_q)
        return x if self.upsamplers is None else self.upsamplers[0](x)


class MidBlock(StageBlock):
    """The innermost part: residual block, attention unless switched off, residual block."""

    def __init__(self, channels: int, style: StageStyle, *, attention: bool) -> None:
        resnets = [style.resnet(channels, channels) for _ in range(2)]
        super().__init__(resnets, [style.attention(channels)] if attention else [])


class Encoder(nn.Module):
    """A picture (B, in_channels, H, W) -> features of its latent (B, out_channels, H / factor, W / factor)."""

    def __init__(self, config: FirstStageConfig, out_channels: int) -> None:
        super().__init__()
        widths, style = config.block_out_channels, StageStyle(config.norm_num_groups, config.act_fn)
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            EncoderBlock(
                widths[max(i - 1, 0)],
                widths[i],
                config.layers_per_block,
                style,
                attention=ENCODER_BLOCKS[kind],
                resample=i < last,
            )
            for i, kind in enumerate(config.down_block_types)
        )
        self.mid_block = MidBlock(widths[-1], style, attention=config.mid_block_add_attention)
        self.conv_norm_out = style.norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H / factor, W / factor)."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))
        return out


class Decoder(nn.Module):
    """Features of a latent (B, latent_channels, h, w) -> a picture (B, out_channels, h factor, w factor)."""

    def __init__(self, config: FirstStageConfig, *, spatial: bool = False) -> None:
        super().__init__()
        widths, last = config.block_out_channels[::-1], len(config.block_out_channels) - 1
        style = StageStyle(
            config.norm_num_groups, config.act_fn, spatial_channels=config.latent_channels if spatial else None
        )
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.up_blocks = nn.ModuleList(
            DecoderBlock(
                widths[max(i - 1, 0)],
                widths[i],
                config.layers_per_block + 1,
                style,
                attention=DECODER_BLOCKS[kind],
                resample=i < last,
            )
            for i, kind in enumerate(config.up_block_types)
        )
        self.mid_block = MidBlock(widths[0], style, attention=config.mid_block_add_attention)
        self.conv_norm_out = style.norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor, z_q: Tensor | None = None) -> Tensor:
        """`z_q` (B, latent_channels, h, w) modulates the norms; exactly when the decoder is a spatial one."""
        x = self.mid_block(self.conv_in(z), z_q)
        for block in self.up_blocks:
            x = block(x, z_q)
        x = self.conv_norm_out(x) if z_q is None else self.conv_norm_out(x, z_q)
        out: Tensor = self.conv_out(F.silu(x))
        return out


class FirstStage(AttentionHost):
    """What both kinds of autoencoder have in common. Use `AutoencoderKL` or `VQModel`."""

    decoder: Decoder

    def __init__(self, config: FirstStageConfig) -> None:
        super().__init__()
        self._config = config

    @property
    def factor(self) -> int:
        """How many times smaller than the picture the latent is, in height and in width."""
        return self._config.factor

    @property
    def last_layer(self) -> Tensor:
        """The weight of the decoder's last convolution, where the discriminator's weight is measured."""
        return self.decoder.conv_out.weight

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        self._set_checkpointing(True)

    def disable_gradient_checkpointing(self) -> None:
        """Keep activations for the backward pass, as at the start."""
        self._set_checkpointing(False)

    def _set_checkpointing(self, on: bool) -> None:
        for module in self.modules():
            if isinstance(module, StageBlock):
                module.gradient_checkpointing = on

    def _check_picture(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self._config.in_channels:
            raise UserError(f"x must be (B, {self._config.in_channels}, H, W), got {tuple(x.shape)}")
        if x.shape[-2] % self.factor or x.shape[-1] % self.factor:
            raise UserError(
                f"height and width must be multiples of {self.factor}, got {x.shape[-2]} x {x.shape[-1]}"
            )


class AutoencoderKL(FirstStage):
    """Picture <-> Gaussian over latents, under the names of diffusers' `AutoencoderKL`."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config)
        self.config = c = config
        width = c.latent_channels
        self.encoder = Encoder(c, 2 * width)
        self.decoder = Decoder(c)
        self.quant_conv = nn.Conv2d(2 * width, 2 * width, 1) if c.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(width, width, 1) if c.use_post_quant_conv else None

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """A picture (B, in_channels, H, W) in [-1, 1] -> the Gaussian over its latent.

        H and W are multiples of `factor`; the latent is (B, latent_channels, H / factor, W / factor), unscaled.

        Raises:
            UserError: for another shape.
        """
        self._check_picture(x)
        moments = self.encoder(x)
        return DiagonalGaussian.from_moments(moments if self.quant_conv is None else self.quant_conv(moments))

    def decode(self, z: Tensor) -> Tensor:
        """An unscaled latent (B, latent_channels, h, w) -> a picture (B, out_channels, h factor, w factor).

        The picture lies about in [-1, 1] and is not clamped.

        Raises:
            UserError: for another shape.
        """
        if z.ndim != 4 or z.shape[1] != self.config.latent_channels:
            raise UserError(f"z must be (B, {self.config.latent_channels}, h, w), got {tuple(z.shape)}")
        out: Tensor = self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))
        return out

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, DiagonalGaussian]:
        """The reconstruction of `x` (B, in_channels, H, W) from a draw with `noise` or, without, from the mode."""
        posterior = self.encode(x)
        return self.decode(posterior.mode if noise is None else posterior.sample(noise)), posterior


class VQModel(FirstStage):
    """Picture <-> latent that is rounded to a table of codes, under the names of diffusers' `VQModel`.

    `model.quantize` is the `VectorQuantizer`. Diffusion runs on the latent before rounding (Rombach 2022, section
    3.1), therefore `encode` does not quantise and `decode` does.
    """

    def __init__(self, config: VQConfig) -> None:
        super().__init__(config)
        self.config = c = config
        self.encoder = Encoder(c, c.latent_channels)
        self.quant_conv = nn.Conv2d(c.latent_channels, c.embed_dim, 1)
        self.quantize = VectorQuantizer(c.num_vq_embeddings, c.embed_dim)
        self.post_quant_conv = nn.Conv2d(c.embed_dim, c.latent_channels, 1)
        self.decoder = Decoder(c, spatial=c.norm_type == "spatial")

    def encode(self, x: Tensor) -> Tensor:
        """A picture (B, in_channels, H, W) in [-1, 1] -> its latent before quantisation.

        H and W are multiples of `factor`; the latent is (B, embed_dim, H / factor, W / factor).

        Raises:
            UserError: for another shape.
        """
        self._check_picture(x)
        out: Tensor = self.quant_conv(self.encoder(x))
        return out

    def decode(self, h: Tensor, *, quantized: bool = False) -> Tensor:
        """A latent -> a picture (B, out_channels, h factor, w factor), about in [-1, 1] and not clamped.

        Args:
            h: latents (B, embed_dim, h, w), or codes as integers (B, h, w), which are looked up.
            quantized: `h` holds rows of the codebook already and is used as it is.

        Raises:
            UserError: for another shape.
        """
        if not h.is_floating_point():
            z_q = self.quantize.lookup(h)
        elif h.ndim != 4 or h.shape[1] != self.config.embed_dim:
            raise UserError(
                f"h must be latents (B, {self.config.embed_dim}, h, w) or integer codes (B, h, w), got {tuple(h.shape)}"
            )
        else:
            z_q = h if quantized else self.quantize(h).z_q
        out: Tensor = self.decoder(self.post_quant_conv(z_q), z_q if self.config.norm_type == "spatial" else None)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of `x` (B, in_channels, H, W) through the codes."""
        return self.decode(self.encode(x))
