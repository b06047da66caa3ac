"""What the configs of all networks have in common: they come from JSON and go back to it.

>>> @dataclass(frozen=True)
... class Tiny(NetworkConfig):
...     widths: tuple[int, ...] = (8,)
>>> Tiny.from_dict({"widths": [8, 16], "_note": "left out"}).to_dict()
{'widths': [8, 16]}
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
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


def check_levels(config: Any) -> None:
    """Refuse a config whose lists of levels differ in length. Raises `UserError`."""
    counts = [len(v) for v in (config.block_out_channels, config.down_block_types, config.up_block_types)]
    if len(set(counts)) != 1 or 0 in counts:
        raise UserError(
            "block_out_channels, down_block_types and up_block_types must have equally many levels, "
            f"got {counts[0]}, {counts[1]} and {counts[2]}"
        )


def check_choices(
    config: Any, choices: Mapping[str, Collection[Any]], down: Collection[str], up: Collection[str]
) -> None:
    """Refuse fields outside their known values, and unknown kinds of blocks, naming the nearest. Raises `UserError`."""
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise_unknown(name, str(getattr(config, name)), [str(k) for k in known])
    for field, blocks in (("down_block_types", down), ("up_block_types", up)):
        for kind in getattr(config, field):
            if kind not in blocks:
                raise_unknown(f"entry in {field}", kind, blocks)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value
