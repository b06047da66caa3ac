"""Sfumato: diffusion models of pictures, to train and to draw with, on a laptop's CPU first.

>>> import sfumato
>>> sfumato.__version__.count(".")
2
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sfumato.api import Model as Model
    from sfumato.api import load as load
    from sfumato.errors import UserError as UserError
    from sfumato.networks.unet_article import Unet as Unet
    from sfumato.short_form import GaussianDiffusion as GaussianDiffusion

_PUBLIC = {
    "GaussianDiffusion": "sfumato.short_form",
    "Model": "sfumato.api",
    "Unet": "sfumato.networks.unet_article",
    "UserError": "sfumato.errors",
    "load": "sfumato.api",
}

__all__ = ["GaussianDiffusion", "Model", "Unet", "UserError", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used, so that `import sfumato` stays light."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'sfumato' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
