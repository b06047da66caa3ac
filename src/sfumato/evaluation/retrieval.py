"""Does a picture show what its caption says? A small CLIP is asked to tell the caption among others.

Top-1 retrieval: the right caption and 99 captions of other concepts *in the same style*, so that the style gives
nothing away; a picture that the right one lies nearest to is a hit, chance is 1 %. Style accuracy: the caption with
each of the styles in turn; the right style must lie nearest. Which other captions a picture meets depends on its own
caption and the seed alone, so drawings and real pictures of one caption meet the same ones.

>>> import torch
>>> one, other = torch.eye(2).unsqueeze(1)
>>> [first_is_nearest(one, torch.stack(pair, 1)).item() for pair in ([one, other], [other, one])]
[True, False]
>>> prompt("red heart", "noto")
'red heart, noto style'
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import UserError
from sfumato.random import derived_seed

CANDIDATES = 100
"""Captions that a picture is shown, the right one included."""


class Matcher(Protocol):
    """What puts pictures and captions into one space, as unit vectors (N, E)."""

    def pictures(self, pictures: Tensor, /) -> Tensor:
        """Of 8-bit pictures (N, 3, H, W)."""
        ...

    def captions(self, captions: Sequence[str], /) -> Tensor:
        """Of captions."""
        ...


@dataclass(frozen=True)
class Views:
    """A matcher that looks at each picture nine times: as it is, and moved by a sixteenth of its side each way.

    What is left open is filled with the edge's own colours; the embeddings are averaged. A small transformer that cuts
    a picture into few patches is surer of itself so. Captions are read once and remembered.
    """

    matcher: Matcher
    _read: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def pictures(self, pictures: Tensor) -> Tensor:
        """Unit vectors (N, E) of 8-bit pictures (N, 3, H, W)."""
        height, width = pictures.shape[-2:]
        down, right = max(1, height // 16), max(1, width // 16)
        wide = F.pad(pictures.float(), (right, right, down, down), mode="replicate").to(torch.uint8)
        views = [
            wide[:, :, top : top + height, left : left + width]
            for top in (0, down, 2 * down)
            for left in (0, right, 2 * right)
        ]
        return F.normalize(torch.stack([self.matcher.pictures(view) for view in views]).mean(0), dim=1)

    def captions(self, captions: Sequence[str]) -> Tensor:
        """Unit vectors (N, E) of captions."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._read]
        if new:
            self._read.update(zip(new, self.matcher.captions(new), strict=True))
        return torch.stack([self._read[caption] for caption in captions])


def prompt(text: str, style: str | None) -> str:
    """A caption with its style, as models are asked for it."""
    return f"{text}, {style} style" if style else text


def first_is_nearest(pictures: Tensor, captions: Tensor) -> Tensor:
    """Whether the first of each picture's captions lies nearer than all others, bool (N,).

    Args:
        pictures: unit vectors (N, E). captions: unit vectors (N, K, E). A tie is no hit.
    """
    cosines = torch.einsum("ne,nke->nk", pictures.double(), captions.double())
    return cosines[:, 0] > cosines[:, 1:].amax(1)


def candidates(
    text: str, style: str | None, known: Mapping[str | None, Sequence[str]], count: int = CANDIDATES, seed: int = 0
) -> list[str]:
    """The right caption's text, then those of `count - 1` other concepts in its style.

    Args:
        known: texts of each style.

    Raises:
        UserError: the style has too few of them.
    """
    others = sorted(set(known.get(style, ())) - {text})
    if count < 2 or len(others) < count - 1:
        raise UserError(
            f"{count} candidates were asked for, but style {style!r} has {len(others) + 1} captions; ask for fewer, "
            "at least 2 (--candidates)"
        )
    generator = torch.Generator().manual_seed(derived_seed("candidates", seed, text, str(style)))
    chosen = torch.randperm(len(others), generator=generator)[: count - 1].tolist()
    return [text, *(others[i] for i in chosen)]


def retrieved(
    matcher: Matcher,
    pictures: Tensor,
    texts: Sequence[str],
    styles: Sequence[str | None],
    known: Mapping[str | None, Sequence[str]],
    count: int = CANDIDATES,
    seed: int = 0,
) -> Tensor:
    """Whether each picture (unit vectors (N, E)) is told by its caption among `count`; bool (N,)."""
    shown = [candidates(text, style, known, count, seed) for text, style in zip(texts, styles, strict=True)]
    prompts = [[prompt(text, style) for text in row] for row, style in zip(shown, styles, strict=True)]
    return first_is_nearest(pictures, _embedded(matcher, prompts))


def style_told(
    matcher: Matcher, pictures: Tensor, texts: Sequence[str], styles: Sequence[str], known: Sequence[str]
) -> Tensor:
    """Whether each picture (unit vectors (N, E)) lies nearest to its caption with the right one of the known styles."""
    if len(known) < 2 or not set(styles) <= set(known):
        raise UserError(f"telling styles apart needs at least 2 that are known; known: {', '.join(known) or 'none'}")
    orders = [[style, *(other for other in known if other != style)] for style in styles]
    prompts = [[prompt(text, style) for style in order] for text, order in zip(texts, orders, strict=True)]
    return first_is_nearest(pictures, _embedded(matcher, prompts))


def _embedded(matcher: Matcher, prompts: list[list[str]]) -> Tensor:
    """Embeddings (N, K, E) of rows of captions, each caption read once."""
    distinct = {text: i for i, text in enumerate(dict.fromkeys(text for row in prompts for text in row))}
    embeddings = matcher.captions(list(distinct))
    return embeddings[torch.tensor([[distinct[text] for text in row] for row in prompts])]
