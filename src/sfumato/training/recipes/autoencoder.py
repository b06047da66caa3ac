"""Train a first stage: an autoencoder with KL regularisation or a codebook, L1, a perceptual loss and a discriminator.

A finished one's decoder can be trained again (`codec`), on latents with noise: a diffusion model's latents are never
quite those of the encoder, and a decoder that has only seen those makes much of little (noise-augmented decoding, Zheng
2025, "Diffusion transformers with representation autoencoders"). Encoder and latents stay, so that models trained on
them take the new decoder as they are.

>>> recipe = AutoencoderRecipe(data={"path": "pictures", "size": 64}, model={"kind": "kl"})
>>> recipe.loss.perceptual_network
'lite0'
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from sfumato.checkpoints.io import load_strictly
from sfumato.codecs import KLCodec, VQCodec
from sfumato.diffusion.objective import Loss
from sfumato.errors import UserError
from sfumato.evaluation.reconstruction import psnr
from sfumato.images import sheet, to_pil
from sfumato.networks.autoencoder import AutoencoderKL, VQModel
from sfumato.networks.discriminator import PatchDiscriminator, hinge_d, hinge_g, vanilla_d, vanilla_g
from sfumato.networks.vq import code_counts, perplexity, restart_dead
from sfumato.random import derived_seed
from sfumato.systems import open_codec
from sfumato.systems.codec import CodecConfig, CodecSystem, standardised
from sfumato.systems.config import Strict, parse
from sfumato.training.cache import LatentCache, full_precision
from sfumato.training.config import OptimizerConfig, TrainConfig
from sfumato.training.data import Batch, DataConfig, PictureSet
from sfumato.training.first_stage import codec_file
from sfumato.training.perceptual import perceptual_loss

_MEASURED = ("latents_mean", "latents_std", "scaling_factor", "shift_factor")


class CodecModelConfig(Strict):
    """The part of a codec's config that a recipe chooses; size and channels come from the data."""

    kind: Literal["kl", "vq"]
    network: dict[str, Any] = Field(default_factory=dict)
    title: str = ""
    licence: str = ""
    source: str = ""


class ReconstructionConfig(Strict):
    """What a reconstruction is measured by. All terms are means over elements or positions.

    Attributes:
        pixel: weight of the mean absolute error.
        open_ends: a pixel that is 0 or 255 in the picture is met by anything beyond it, since pictures are clamped at
            the end: white stays white.
        perceptual: weight of the perceptual distance; 0 for none.
        perceptual_network: "lite0", or a safetensors file with VGG LPIPS's trunk and weights.
        kl: weight of the divergence from the standard normal, in nats per element of the picture. The published 1e-6
            belongs to sums over elements of both terms, which is the same quotient.
        codebook: weight of the codebook's own loss.
        beta: of the commitment loss; `legacy` puts it on the other term, as the released code does.
    """

    pixel: float = Field(default=1.0, ge=0)
    open_ends: bool = True
    perceptual: float = Field(default=1.0, ge=0)
    perceptual_network: str = "lite0"
    kl: float = Field(default=1e-6, ge=0)
    codebook: float = Field(default=1.0, ge=0)
    beta: float = Field(default=0.25, ge=0)
    legacy: bool = False


class DiscriminatorConfig(Strict):
    """The discriminator, which learns for a while before it is listened to.

    Attributes:
        weight: of its share in the loss, beside the adaptive one; 0 for no discriminator.
        start: the step from which it is listened to; `lead` steps earlier it begins to learn, and over `ramp` steps its
            weight rises to the whole.
        max_adaptive: bound of the adaptive weight (published: 1e4).
        kind: hinge or vanilla. width, layers, norm: of `PatchDiscriminator`.
        lr: its learning rate, None for the autoencoder's.
    """

    weight: float = Field(default=0.5, ge=0)
    start: int = Field(default=5000, ge=0)
    lead: int = Field(default=500, ge=0)
    ramp: int = Field(default=1000, ge=0)
    max_adaptive: float = Field(default=1e4, gt=0)
    kind: Literal["hinge", "vanilla"] = "hinge"
    width: int = Field(default=64, ge=1)
    layers: int = Field(default=3, ge=1)
    norm: Literal["batch", "group"] = "group"
    lr: float | None = Field(default=None, gt=0)

    def share(self, step: int) -> float:
        """What part of its weight counts at a step: 0 before `start`, then rising to 1."""
        if not self.weight or step < self.start:
            return 0.0
        return min(1.0, (step - self.start + 1) / self.ramp) if self.ramp else 1.0

    def learns(self, step: int) -> bool:
        """Whether it is trained at a step."""
        return bool(self.weight) and step >= self.start - self.lead


class RestartConfig(Strict):
    """New places for codes that nothing uses: every so many steps, in the first part of the training.

    Attributes:
        every: steps; 0 for never. until: share of all steps after which the codebook is left in peace.
        threshold: uses since the last time below which a code counts as dead.
    """

    every: int = Field(default=100, ge=0)
    until: float = Field(default=0.7, ge=0, le=1)
    threshold: float = Field(default=1.0, ge=0)


class AutoencoderRecipe(Strict):
    """A whole run.

    Attributes:
        data: the pictures. model: kind and network of the codec.
        codec: instead of `model`, a finished codec (run, model file, name) whose decoder is trained again.
        noise: that its latents get meanwhile, in their own standard deviations: normal, with a deviation that is drawn
            for each picture from |N(0, noise^2)|.
        loss, discriminator, restart: see there; `restart` is for codebooks, which stay where only a decoder is trained.
        train: how long, how large, how often.
    """

    recipe: Literal["autoencoder"] = "autoencoder"
    description: str = ""
    data: DataConfig
    model: CodecModelConfig | None = None
    codec: str | None = None
    noise: float = Field(default=0.0, ge=0)
    loss: ReconstructionConfig = ReconstructionConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    restart: RestartConfig = RestartConfig()
    train: TrainConfig = TrainConfig()

    def task(self, data: PictureSet, validation: PictureSet | None) -> AutoencoderTask:
        """What the trainer is given."""
        return AutoencoderTask(self, data, validation)

    def rehearsal(self) -> AutoencoderRecipe:
        """The same with the discriminator heard from the first step on, and codes restarted in every step."""
        now = {"start": 0, "ramp": 0}
        return self.model_copy(
            update={
                "discriminator": self.discriminator.model_copy(update=now),
                "restart": self.restart.model_copy(update={"every": min(1, self.restart.every), "until": 1.0}),
            }
        )

    def stage(self, device: str = "cpu") -> CodecSystem:
        """The codec as training finds it: fresh weights (none on "meta"), or the one whose decoder is trained again."""
        if self.codec is not None:
            return open_codec(codec_file(self.codec))[0]
        return CodecSystem.create(self.config(), device)

    def config(self) -> CodecConfig:
        """The config of the codec that this recipe trains; the scale of its latents is measured at the end."""
        if self.model is None:
            raise UserError("model is missing: kind and network of what is trained")
        if given := sorted({*_MEASURED} & {*self.model.network}):
            raise UserError(f"model.network.{given[0]} is measured when the training ends; leave it out")
        own = {"size": self.data.size, "channels": self.data.channels}
        return parse(CodecConfig, own | self.model.model_dump(), "model").with_network(scaling_factor=1.0)

    def check(self) -> None:
        """Refuse what cannot be built or does not go together; a codec is opened, other weights are not made. Raises
        `UserError`."""
        if self.model is not None and self.codec is not None:
            raise UserError("model and codec each say what is trained; leave one of them out")
        if self.codec is None and self.noise:
            raise UserError("noise is for the decoder of a finished codec; name it with --codec, or leave noise out")
        stage = self.stage("meta")
        if stage.codec.network is None:
            raise UserError(f"{self.codec} has no decoder that could be trained")
        if self.codec is not None:
            self._refuse_what_does_nothing()
        if stage.config.channels != self.data.channels:
            raise UserError(f"the codec takes {stage.config.channels} channels, data.channels is {self.data.channels}")
        factor = stage.codec.factor
        if not 2 <= factor <= 32:
            raise UserError(f"{self._named} has a factor of {factor}; a first stage shrinks by 2 to 32")
        if self.data.size % factor:
            raise UserError(f"data.size {self.data.size} is not a multiple of the codec's factor {factor}")
        if self.data.channels != 3 and self.loss.perceptual:
            raise UserError("loss.perceptual needs colour; for grey pictures set it to 0")
        if self.discriminator.weight:
            judge = PatchDiscriminator(width=8, n_layers=self.discriminator.layers)
            if self.data.size < judge.least_size:
                raise UserError(
                    f"a discriminator of {self.discriminator.layers} layers needs pictures of {judge.least_size} pixels"
                    f", data.size is {self.data.size}; set discriminator.layers lower, or its weight to 0"
                )
        if not self.loss.pixel and not self.loss.perceptual:
            raise UserError("loss.pixel and loss.perceptual are both 0, so nothing would be learnt")


    def _refuse_what_does_nothing(self) -> None:
        """Settings of what is not trained where only a decoder is."""
        idle = {"loss": ("kl", "codebook", "beta", "legacy"), "restart": tuple(RestartConfig.model_fields)}
        for group, names in idle.items():
            own: Any = getattr(self, group)
            for name in names:
                if getattr(own, name) != type(own).model_fields[name].default:
                    raise UserError(f"{group}.{name} does nothing where only a decoder is trained; leave it out")

    @property
    def _named(self) -> str:
        return "model.network" if self.codec is None else f"the codec {self.codec}"


class Reconstruction(nn.Module):
    """Picture to picture through the latents, with what the regularisation needs: the one call that training makes."""

    def __init__(self, network: AutoencoderKL | VQModel) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, noise: Tensor | None, config: ReconstructionConfig) -> tuple[Tensor, Tensor, Tensor]:
        """(reconstruction (B, C, H, W), regularisation (), codes (B, h, w) or none of them (0,))."""
        if isinstance(self.network, AutoencoderKL):
            posterior = self.network.encode(x)
            z = posterior.mode if noise is None else posterior.sample(noise.to(posterior.mean))
            divergence = posterior.kl().mean() / x[0].numel()
            return self.network.decode(z), config.kl * divergence, torch.empty(0)
        q = self.network.quantize(self.network.encode(x))
        x_hat = self.network.decode(q.z_q, quantized=True)
        return x_hat, config.codebook * q.loss(config.beta, legacy=config.legacy), q.codes


class Decoding(nn.Module):
    """The same through a finished codec's latents with noise, where only the way back is trained."""

    def __init__(self, codec: KLCodec | VQCodec) -> None:
        super().__init__()
        self.codec, self.trained = codec, decoder_of(codec.network)

    def forward(self, x: Tensor, noise: Tensor | None, config: ReconstructionConfig) -> tuple[Tensor, Tensor, Tensor]:
        """As `Reconstruction`; `noise` in standard deviations of the latents. The regularisation is 0."""
        with full_precision(), torch.no_grad():
            z = self.codec.encode(x).mean
        return self.codec.decode(z if noise is None else z + noise.to(z)), x.new_zeros(()), torch.empty(0)


def decoder_of(network: AutoencoderKL | VQModel) -> nn.Module:
    """What of an autoencoder leads from latents to pictures, under its own names."""
    parts = nn.Module()
    for name in ("post_quant_conv", "decoder"):
        parts.add_module(name, getattr(network, name))
    return parts


class AutoencoderTask:
    """The trainer's view of a first stage's training (see `sfumato.training.trainer.Task`)."""

    def __init__(self, recipe: AutoencoderRecipe, data: PictureSet, validation: PictureSet | None) -> None:
        self.recipe, self.data, self.validation = recipe, data, validation
        torch.manual_seed(recipe.train.seed)
        self.stage = recipe.stage()
        assert isinstance(self.stage.codec, KLCodec | VQCodec)
        network = self._autoencoder = self.stage.codec.network
        if recipe.train.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        self.network: nn.Module = network
        self.through: nn.Module = Reconstruction(network)
        self._learns_codes = isinstance(network, VQModel) and recipe.codec is None
        if recipe.codec is not None:
            network.eval().requires_grad_(False)
            self._refuse_other_latents()
            self.through = Decoding(self.stage.codec)
            self.network = self.through.trained.requires_grad_(True)
        self.adversary = Discriminator(recipe) if recipe.discriminator.weight else None
        self.distance = perceptual_loss(recipe.loss.perceptual_network) if recipe.loss.perceptual else None
        self.memory: dict[str, Tensor] = {}
        if self._learns_codes:
            assert isinstance(network, VQModel)
            self.memory["code_counts"] = torch.zeros(network.config.num_vq_embeddings, dtype=torch.int64)
        self._step, self._fresh = 0, False

    @torch.no_grad()
    def _refuse_other_latents(self) -> None:
        """Raise `UserError` for latents that are not standard, by which noise is measured, and for weights that would
        be rounded though they are to stay."""
        codec, kind = self.recipe.codec, getattr(torch, self.recipe.train.export)
        moments = self.stage.codec.encode(self.data.gather(range(min(64, len(self.data)))).to_float())
        self.stage.check_scale(LatentCache(moments.mean, moments.std).deviation(), f"the codec {codec}")
        if any(not torch.equal(t, t.to(kind).to(t)) for t in self._autoencoder.state_dict().values()):
            raise UserError(
                f"train.export {self.recipe.train.export} would round the encoder of {codec}, "
                "which is to stay as it is; leave it out"
            )

    def wrap(self, prepare: Callable[[nn.Module], nn.Module]) -> None:
        whole = self.through if isinstance(self.through, Reconstruction | Decoding) else self.through.module
        self.through = prepare(whole)  # type: ignore[arg-type]

    def begin(self, step: int) -> None:
        self._step, self._fresh = step, True

    def loss(self, batch: Batch, generator: torch.Generator, device: torch.device) -> Loss:
        x = batch.to_float().to(device)
        self._autoencoder.to(device)  # what is not trained too
        training = self.network.training
        if self.distance is not None:
            self.distance.to(device)
        if training and self._learns_codes:
            self._care_for_codes(x)
        x_hat, regular, codes = self.through(x, self._noise(x, generator) if training else None, self.recipe.loss)
        seen = x_hat.detach().float().requires_grad_()
        pixel, perceptual = self._errors(seen, x)
        each = self.recipe.loss.pixel * pixel + self.recipe.loss.perceptual * perceptual
        parts = {"reconstruction": each, "pixel": pixel, "perceptual": perceptual, "regularisation": regular}
        figures = {name: float(value.detach().mean()) for name, value in parts.items()}
        if not training:
            figures["psnr"] = float(psnr(_levels(x), _levels(x_hat.float())).mean())
            return Loss(each.mean().detach(), each.detach(), None, each, figures=figures)
        (slope,) = torch.autograd.grad(each.mean(), seen)
        if self.adversary is not None:
            slope, more = self._with_adversary(slope, seen, x_hat, x)
            figures |= more
        if len(codes):
            used = code_counts(codes, len(self.memory["code_counts"]))
            figures["code_perplexity"] = perplexity(used.cpu())
            self._count(used)
        value = _with_gradient(x_hat, slope, each.mean().detach()) + regular
        return Loss(value, each.detach(), None, each, figures=figures)

    def _noise(self, x: Tensor, generator: torch.Generator) -> Tensor | None:
        """The normal numbers that latents are sampled with, or the noise that a decoder meets; None for a codebook."""
        codec, again = self.stage.codec, self.recipe.codec is not None
        if not again and not isinstance(self._autoencoder, AutoencoderKL):
            return None
        shape = (len(x), codec.channels, x.shape[2] // codec.factor, x.shape[3] // codec.factor)
        noise = torch.randn(shape, generator=generator)
        if again:
            noise *= self.recipe.noise * torch.randn(len(x), 1, 1, 1, generator=generator).abs()
        return noise.to(x)

    def _errors(self, x_hat: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pixel error and perceptual distance, (B,) each."""
        error = (x_hat - x).abs()
        if self.recipe.loss.open_ends:
            error = error.masked_fill(((x >= 1) & (x_hat >= 1)) | ((x <= -1) & (x_hat <= -1)), 0.0)
        pixel = error.flatten(1).mean(1)
        if self.distance is None:
            return pixel, torch.zeros_like(pixel)
        return pixel, self.distance(x_hat.clamp(-1, 1), x)

    def _with_adversary(
        self, slope: Tensor, seen: Tensor, x_hat: Tensor, x: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """The gradient at the reconstruction with the discriminator's share in it, and figures.

        `lambda = |dL_rec / dW| / (|dL_gan / dW| + 1e-4)` at the decoder's last layer W (Esser 2021, eq. 7). Both
        gradients at W follow from those at the picture, so each loss is differentiated once.
        """
        assert self.adversary is not None
        config = self.recipe.discriminator
        self.adversary.shown = (x, seen.detach().clamp(-1, 1)) if config.learns(self._step) else None
        share = config.share(self._step)
        if not share:
            return slope, {}
        g = (hinge_g if config.kind == "hinge" else vanilla_g)(self.adversary.network(seen.clamp(-1, 1)))
        (pull,) = torch.autograd.grad(g, seen)
        last = self._autoencoder.last_layer

        def at_last_layer(gradient: Tensor) -> Tensor:
            size = gradient.norm().clamp(min=1e-30)  # brought to 1 meanwhile: float16 holds no gradient of a mean
            (found,) = torch.autograd.grad(x_hat, last, (gradient / size).to(x_hat), retain_graph=True)
            norm: Tensor = found.float().norm() * size
            return norm

        adaptive = (at_last_layer(slope) / (at_last_layer(pull) + 1e-4)).clamp(0, config.max_adaptive)
        figures = {"generator": float(g.detach()), "adaptive_weight": float(adaptive)}
        return slope + config.weight * share * adaptive * pull, figures

    def _care_for_codes(self, x: Tensor) -> None:
        """Restart dead codes when it is time to, alike in all processes."""
        config, counts = self.recipe.restart, self.memory["code_counts"]
        fresh, self._fresh = self._fresh, False
        due = config.every and self._step and self._step % config.every == 0
        if not (fresh and due and self._step < config.until * self.recipe.train.steps):
            return
        network = self._autoencoder
        assert isinstance(network, VQModel)
        with torch.no_grad():
            h = network.encode(x).float().permute(0, 2, 3, 1).flatten(0, 2).contiguous()
        if _several_processes():
            torch.distributed.broadcast(h, 0)
        generator = torch.Generator().manual_seed(derived_seed("codes", self.recipe.train.seed, self._step))
        restart_dead(network.quantize.embedding.weight.data, counts, h, generator, config.threshold)
        counts.zero_()

    def _count(self, used: Tensor) -> None:
        """Add the uses of codes (K,) in all processes to the memory of each."""
        if _several_processes():
            torch.distributed.all_reduce(used)
        self.memory["code_counts"] += used.cpu()

    @torch.no_grad()
    def draw(self, count: int, steps: int) -> Image.Image:
        """Held-out pictures, each above its reconstruction; `steps` do not apply."""
        pictures = self.validation or self.data
        device = next(self.network.parameters()).device
        self._autoencoder.to(device)
        x = pictures.gather(range(min(count, len(pictures)))).to_float()
        rows = []
        for part in torch.split(x, 8):
            x_hat = self.through(part.to(device), None, self.recipe.loss)[0].float().cpu()
            rows += to_pil(part) + to_pil(x_hat)
        return sheet(rows, columns=min(8, len(x)), scale=max(1, 96 // self.recipe.data.size))

    def tensors(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"codec.{name}": tensor for name, tensor in (self._autoencoder.state_dict() | weights).items()}

    def weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        named = {name.removeprefix("codec."): tensor for name, tensor in tensors.items()}
        trained = self.network.state_dict()
        for name, own in self._autoencoder.state_dict().items():
            if name not in trained and not (name in named and torch.equal(named[name].to(own), own)):
                raise UserError(f"the checkpoint is of another codec than {self.recipe.codec}; choose another folder")
        return {name: tensor for name, tensor in named.items() if name in trained or self.recipe.codec is None}

    def model_config(self) -> dict[str, Any]:
        config = self.stage.config
        if self.recipe.codec is not None:  # what is said of the old one's pictures may not hold of the new one
            config = config.model_copy(update={"title": "", "licence": "", "source": ""})
        return config.model_dump(mode="json")

    def finished(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The codec with latents made standard over the training pictures, or as they were."""
        if self.recipe.codec is not None:
            return self.tensors(dict(weights)), self.model_config()
        stage = CodecSystem.create(self.stage.config)
        assert stage.codec.network is not None
        load_strictly(stage.codec.network, dict(weights), what="the codec")
        mean, std = latent_statistics(stage, self.data)
        standard = standardised(stage, mean, std)
        return standard.tensors(), standard.config.model_dump(mode="json")


class Discriminator:
    """The trainer's view of the discriminator (see `sfumato.training.trainer.Adversary`)."""

    def __init__(self, recipe: AutoencoderRecipe) -> None:
        c, own = recipe.discriminator, recipe.train.optimizer
        self.network: nn.Module = PatchDiscriminator(
            recipe.data.channels, width=c.width, n_layers=c.layers, norm=c.norm
        )
        self.through: nn.Module = self.network
        self.optimizer: OptimizerConfig = own.model_copy(update={"lr": c.lr or own.lr, "weight_decay": 0.0})
        self.kind = c.kind
        self.shown: tuple[Tensor, Tensor] | None = None

    def wrap(self, prepare: Callable[[nn.Module], nn.Module]) -> None:
        self.through = prepare(self.network)

    def loss(self) -> Tensor | None:
        if self.shown is None:
            return None
        real, fake = self.shown
        judge = hinge_d if self.kind == "hinge" else vanilla_d
        return judge(self.through(real), self.through(fake))


def _several_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _with_gradient(x_hat: Tensor, slope: Tensor, value: Tensor) -> Tensor:
    """A scalar of this value whose gradient at `x_hat` is `slope`."""
    carrier = (x_hat.float() * slope).sum()
    return carrier - carrier.detach() + value


def _levels(x: Tensor) -> Tensor:
    """Pictures in [-1, 1] as 8-bit RGB ones."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)


@torch.no_grad()
def latent_statistics(stage: CodecSystem, pictures: PictureSet, batch: int = 64) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of the latents, as the codec scales them, spread included, over a whole set."""
    count, total, squares = 0, torch.zeros(stage.codec.channels).double(), torch.zeros(stage.codec.channels).double()
    for part in pictures.in_order(batch):
        moments = stage.codec.encode(part.to_float())
        mean = moments.mean.double()
        spread = moments.std.double().square() if moments.std is not None else torch.zeros_like(mean)
        count += mean[:, 0].numel()
        total += mean.sum((0, 2, 3))
        squares += (mean.square() + spread).sum((0, 2, 3))
    mean = total / count
    return mean.float(), (squares / count - mean.square()).clamp(min=1e-12).sqrt().float()
