"""Typed settings of a training run, shared by every recipe.

>>> TrainConfig(steps=10).batch
64
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sfumato.systems.config import Strict


class OptimizerConfig(Strict):
    """AdamW's settings.

    Attributes:
        lr: peak learning rate.
        schedule: after the warm-up: constant, cosine to zero, or linear to zero.
        warmup: steps of linear warm-up.
        clip_norm: largest norm of the gradient; 0 for no clipping.
    """

    lr: float = Field(default=2e-4, gt=0)
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup: int = Field(default=500, ge=0)
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float = Field(default=1.0, ge=0)


class EMAConfig(Strict):
    """Exponential moving average of the weights: what is sampled and exported.

    Attributes:
        decay: its limit; 0 switches the average off.
        warmup: use `min(decay, (1 + n) / (10 + n))` after n updates, so that early weights are soon forgotten.
    """

    decay: float = Field(default=0.9995, ge=0, lt=1)
    warmup: bool = True


class TrainConfig(Strict):
    """How long, how large, how often.

    Attributes:
        steps: optimizer steps.
        batch: pictures per optimizer step, all processes and accumulation together.
        accumulate: micro-batches per optimizer step.
        precision: fp32, or bf16 / fp16 autocast; auto is bf16 where the device computes with it itself, else fp16 on a
            GPU and fp32 on a CPU.
        seed: of weights, order, augmentation and noise.
        log_every, validate_every, sample_every, save_every: in optimizer steps; 0 switches validation or samples off.
        keep: checkpoints kept, at least 2 (the newest may be the one that a crash interrupts).
        samples: pictures in the sample grid. sample_steps: solver steps for each.
        validation_pictures: at most so many are measured.
        channels_last: memory layout of the network, faster on CPUs and GPUs alike.
        convolution: of 3x3 kernels in fp32 on a CPU: winograd, with fewer products where that gains, or direct, by the
            definition.
        gradient_checkpointing: less memory, about a third slower.
        compile: hand the network to torch's compiler, which takes minutes once and then makes steps faster; on a CPU it
            needs a C++ compiler. For networks that denoise.
        export: type of the finished model's weights.
    """

    steps: int = Field(default=20_000, ge=1)
    batch: int = Field(default=64, ge=1)
    accumulate: int = Field(default=1, ge=1)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    seed: int = Field(default=0, ge=0, lt=2**63)
    log_every: int = Field(default=50, ge=1)
    validate_every: int = Field(default=1000, ge=0)
    sample_every: int = Field(default=1000, ge=0)
    save_every: int = Field(default=1000, ge=1)
    keep: int = Field(default=2, ge=2)
    samples: int = Field(default=16, ge=1, le=256)
    sample_steps: int = Field(default=25, ge=1)
    validation_pictures: int = Field(default=1024, ge=1)
    channels_last: bool = True
    convolution: Literal["direct", "winograd"] = "winograd"
    gradient_checkpointing: bool = False
    compile: bool = False
    export: Literal["float32", "bfloat16", "float16"] = "float32"
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EMAConfig = EMAConfig()


RESUMABLE_CHANGES = (
    "train.steps",
    "train.log_every",
    "train.validate_every",
    "train.sample_every",
    "train.save_every",
    "train.keep",
    "train.samples",
    "train.sample_steps",
    "train.export",
    "train.convolution",
    "data.path",
    "data.cache_bytes",
    "description",
    "model.sampling",
    "model.title",
    "model.licence",
    "model.source",
)
"""Settings, or groups of them, that may differ between a run and its resumption; all others make another run."""
