"""Codecs: pictures to latents and back, with the scale of the latents inside.

A diffusion model sees latents of about unit variance and nothing of the codec; `PixelCodec` is the identity, so that a
pixel-space model is a latent one whose latents are the pictures.

>>> import torch
>>> PixelCodec(3).decode(torch.zeros(1, 3, 8, 8)).shape
torch.Size([1, 3, 8, 8])
"""

from __future__ import annotations

from sfumato.codecs.base import Codec, Moments, PixelCodec
from sfumato.codecs.kl import KLCodec
from sfumato.codecs.vq import VQCodec

__all__ = ["Codec", "KLCodec", "Moments", "PixelCodec", "VQCodec"]
