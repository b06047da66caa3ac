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
    """Public names, and the module `api`, are imported when they are first used, so that `import sfumato` stays light.

    Meanwhile Python's collector of cycles rests: what torch brings stays, and to look through it all again and again
    takes a tenth of the import.
    """
    if name not in _PUBLIC and name != "api":
        raise AttributeError(f"module 'sfumato' has no attribute {name!r}")
    import gc
    from importlib import import_module

    worked = gc.isenabled()
    gc.disable()
    try:
        return import_module("sfumato.api") if name == "api" else getattr(import_module(_PUBLIC[name]), name)
    finally:
        if worked:
            gc.enable()


def __dir__() -> list[str]:
    return sorted(__all__)
