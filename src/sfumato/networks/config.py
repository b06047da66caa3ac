"""What the configs of all networks have in common: they come from JSON and go back to it.

>>> @dataclass(frozen=True)
... class Tiny(NetworkConfig):
...     widths: tuple[int, ...] = (8,)
>>> Tiny.from_dict({"widths": [8, 16], "_note": "left out"}).to_dict()
{'widths': [8, 16]}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self

from sfumato.errors import UserError, raise_unknown


@dataclass(frozen=True)
class NetworkConfig:
    """A frozen dataclass of plain values, tuples for what JSON calls lists."""

    called: ClassVar[str] = "network"
    """What messages call the network."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From JSON: keys that begin with "_" are notes; an unknown key is refused with the nearest name."""
        known = [f.name for f in fields(cls)]
        given: dict[str, Any] = {key: value for key, value in values.items() if not key.startswith("_")}
        for key in given:
            if key not in known:
                raise_unknown(f"{cls.called} key", key, known)
        try:
            return cls(**{key: _tuples(value) for key, value in given.items()})
        except TypeError as error:
            raise UserError(f"the {cls.called}'s config has a value of the wrong type ({error})") from None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {key: _lists(value) for key, value in asdict(self).items()}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value
