"""The peer of the training benchmarks: denoising_diffusion_pytorch, imported from a folder that nothing else sees.

    pip install --no-deps --target PEER denoising_diffusion_pytorch==2.3.4 einops

Its imports of torchvision, ema_pytorch and pytorch_fid serve its own `Trainer`, which is not compared; they are met by
empty modules, as torchvision would change what this process measures.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

_UNUSED = (
    "torchvision", "torchvision.transforms", "torchvision.utils", "ema_pytorch", "pytorch_fid",
    "pytorch_fid.fid_score", "pytorch_fid.inception",
)  # fmt: skip


def load(folder: Path) -> tuple[Any, Any]:
    """Its `Unet` and `GaussianDiffusion`, from `folder` (as installed by the line above)."""
    if not (folder / "denoising_diffusion_pytorch").is_dir():
        raise SystemExit(f"{folder} holds no denoising_diffusion_pytorch; install it there:\n{__doc__}")
    for name in _UNUSED:
        sys.modules[name] = MagicMock(spec=ModuleType(name), __spec__=None, __path__=[])
        for needed in ("transforms", "utils", "EMA", "fid_score", "inception"):
            setattr(sys.modules[name], needed, MagicMock())
    stand_ins: dict[str, Any] = {**sys.modules}
    stand_ins["pytorch_fid.fid_score"].calculate_frechet_distance = MagicMock()
    stand_ins["pytorch_fid.inception"].InceptionV3 = MagicMock()
    sys.path.insert(0, str(folder))
    from denoising_diffusion_pytorch.denoising_diffusion_pytorch import GaussianDiffusion, Unet

    return Unet, GaussianDiffusion
