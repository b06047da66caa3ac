"""Which finished codec a training is given by name.

>>> codec_file("emoji").name
'model.safetensors'
"""

from __future__ import annotations

from pathlib import Path

from sfumato import models
from sfumato.errors import UserError
from sfumato.systems.exchange import holds_first_stage
from sfumato.training import state


def codec_file(path: str) -> Path:
    """What a codec's name means: a model of the box, a run's finished model, else that file or diffusers folder itself.

    Raises:
        UserError: when the run is not finished, since the latents' scale is measured at the end.
    """
    if path in models.names():
        return models.weights(path)
    if not Path(path).is_dir() or holds_first_stage(path):
        return Path(path)
    if (Path(path) / state.AVERAGE).is_file():
        raise UserError(f"{path} is a checkpoint, whose latents are not measured yet; give the finished run")
    finished = Path(path) / state.MODEL
    if not finished.is_file():
        raise UserError(f"the codec's run {path} is not finished: it has no {state.MODEL}")
    return finished
