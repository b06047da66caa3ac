"""Sets of real pictures with their captions, and the figures of what codecs and text models make of them.

What is measured comes in as a function: `Reconstruct`, pictures to pictures, or `Draw`, captions and seeds to pictures;
this file knows nothing of how they do it. All pictures are 8-bit RGB, (N, 3, H, W).

>>> import torch
>>> white = torch.full((2, 3, 16, 16), 255, dtype=torch.uint8)
>>> found = reconstruction(white, white - 1, maps=None)
>>> {name: round(figure.value, 2) for name, figure in found.items()}
{'PSNR dB': 48.13, 'SSIM': 1.0, 'background error /255': 1.0}
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.evaluation import figures as bootstrap
from sfumato.evaluation.baseline import nearest_captions
from sfumato.evaluation.damages import DAMAGES
from sfumato.evaluation.figures import Figure
from sfumato.evaluation.judge import Judge, Real, compare, remembered
from sfumato.evaluation.reconstruction import background_error, feature_distance, psnr, ssim
from sfumato.evaluation.retrieval import CANDIDATES, Matcher, prompt, retrieved, style_told
from sfumato.evaluation.retrieval import candidates as listed

Row = dict[str, Figure]
Progress = Callable[[int, int], None]
_BATCH = 64

PARTS: dict[str, str] = {"pair": "held-out pairs", "concept": "held-out concepts"}
"""Values of the column `held_out_by` and what they are called: a concept unseen in one style, and one unseen in all."""


class Reconstruct(Protocol):
    """Encodes pictures, uint8 (B, 3, H, W), and decodes them again, to uint8 of the same shape."""

    def __call__(self, pictures: Tensor, /) -> Tensor: ...


class Draw(Protocol):
    """Draws a picture, uint8 (B, 3, H, W), for each prompt; prompt i has the seed `seed + i`."""

    def __call__(self, prompts: Sequence[str], seed: int, /) -> Tensor: ...


class Mapper(Protocol):
    """Feature maps of pictures, uint8 (B, 3, H, W), layer by layer (B, C, h, w)."""

    def __call__(self, pictures: Tensor, /) -> list[Tensor]: ...


@dataclass(frozen=True)
class Captioned:
    """Real pictures and what is known of them.

    Attributes:
        pictures: uint8 (N, 3, H, W).
        texts: captions, without the style; None for pictures without.
        styles, held_out_by: of each picture, None where the set does not say.
        tags: further words of each picture.
    """

    pictures: Tensor
    texts: Sequence[str] | None
    styles: Sequence[str | None]
    held_out_by: Sequence[str | None]
    tags: Sequence[str]

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def prompts(self) -> list[str]:
        """The captions as models are asked for them. Raises `UserError` where there are none."""
        return [prompt(text, style) for text, style in zip(self.captions, self.styles, strict=True)]

    @property
    def captions(self) -> Sequence[str]:
        """The captions without the style. Raises `UserError` where there are none."""
        if self.texts is None:
            raise UserError("these pictures have no captions")
        return self.texts

    @property
    def sha256(self) -> str:
        """Of the pixels and prompts, in order."""
        digest = hashlib.sha256(self.pictures.contiguous().numpy().tobytes())
        digest.update("\n".join(self.prompts if self.texts is not None else []).encode())
        return digest.hexdigest()

    def part(self, held_out_by: str) -> Tensor:
        """Rows (n,) of the pictures that are held out in one way."""
        return torch.tensor([i for i, by in enumerate(self.held_out_by) if by == held_out_by], dtype=torch.int64)

    def parts(self) -> dict[str, Tensor]:
        """Rows of all pictures, and of the ways in which pictures are held out where the set tells them apart."""
        found = {"all": torch.arange(len(self))}
        found |= {title: rows for by, title in PARTS.items() if len(rows := self.part(by)) > 3}
        return found


def reconstruction(pictures: Tensor, others: Tensor, maps: Mapper | None) -> Row:
    """Figures of pictures beside the ones they should be, as means over pictures.

    Args:
        pictures, others: uint8 (N, 3, H, W), the true ones first.
        maps: of the judge; None for no feature distance.
    """
    row = {"PSNR dB": bootstrap.mean(psnr(pictures, others)), "SSIM": bootstrap.mean(ssim(pictures, others))}
    if maps is not None:
        pairs = zip(torch.split(pictures, _BATCH), torch.split(others, _BATCH), strict=True)
        row["feature distance"] = bootstrap.mean(torch.cat([feature_distance(maps(a), maps(b)) for a, b in pairs]))
    error = background_error(pictures, others)
    if (known := ~error.isnan()).any():
        row["background error /255"] = bootstrap.mean(error[known])
    return row


def reconstructed(
    reconstruct: Reconstruct, pictures: Tensor, batch: int = 32, progress: Progress | None = None
) -> Tensor:
    """What a codec makes of pictures. Raises `UserError` when it does not keep to 8-bit pictures of their shape."""
    parts = []
    for part in torch.split(pictures, batch):
        other = reconstruct(part)
        if other.dtype != torch.uint8 or other.shape != part.shape:
            raise UserError(f"a codec must give back what it gets, {tuple(part.shape)}; got {tuple(other.shape)}")
        parts.append(other.cpu())
        if progress is not None:
            progress(sum(map(len, parts)), len(pictures))
    return torch.cat(parts)


def drawn(
    draw: Draw, prompts: Sequence[str], each: int, seed: int = 0, batch: int = 48, progress: Progress | None = None
) -> list[Tensor]:
    """`each` sets of pictures of all prompts, uint8 (N, 3, H, W); prompt i of set s has seed `seed + each * i + s`."""
    jobs = [text for text in prompts for _ in range(each)]
    parts: list[Tensor] = []
    for start in range(0, len(jobs), batch):
        texts = jobs[start : start + batch]
        pictures = draw(texts, seed + start)
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or len(pictures) != len(texts):
            raise UserError(f"a model must draw one 8-bit picture for each prompt; got {tuple(pictures.shape)}")
        parts.append(pictures.cpu())
        if progress is not None:
            progress(min(start + batch, len(jobs)), len(jobs))
    pictures = torch.cat(parts)
    return [pictures[s::each] for s in range(each)]


@dataclass(frozen=True)
class Ruler:
    """Everything that figures are measured with: the judge, the real pictures, a CLIP.

    Attributes:
        judge: the network. real: its features of `train` and `held_out`.
        matcher: None for no caption retrieval.
        candidates, seed: of the retrieval and of resamplings.
    """

    judge: Judge
    train: Captioned
    held_out: Captioned
    real: Real
    matcher: Matcher | None = None
    candidates: int = CANDIDATES
    seed: int = 0

    @classmethod
    def of(
        cls, judge: Judge, train: Captioned, held_out: Captioned, matcher: Matcher | None = None, *,
        candidates: int = CANDIDATES, seed: int = 0,
    ) -> Ruler:  # fmt: skip
        """With the features of the real pictures measured. Raises `UserError` where a style has too few captions."""
        if matcher is not None and held_out.texts is not None:
            known = texts_by_style(train, held_out)
            for text, style in zip(held_out.texts, held_out.styles, strict=True):
                listed(text, style, known, candidates, seed)
        real = Real.of(judge, remembered(judge, train.pictures), remembered(judge, held_out.pictures), seed)
        return cls(judge, train, held_out, real, matcher, candidates, seed)

    def row(self, sets: Sequence[Tensor]) -> Row:
        """Figures of one or more sets of pictures that were made for the held-out captions.

        Args:
            sets: uint8 (N, 3, H, W), picture i of each for held-out picture i; or any pictures, where no CLIP is at
                hand.
        """
        return self._figures(*self._looked_at(sets), None)

    def by_part(self, title: str, sets: Sequence[Tensor]) -> dict[str, Row]:
        """Rows of all held-out captions and of each part: "title, held-out pairs" …; arguments as of `row`."""
        features, embeddings = self._looked_at(sets)
        table = {}
        for part, rows in self.held_out.parts().items():
            own = [one[rows] for one in features], [one[rows] for one in embeddings]
            table[title if part == "all" else f"{title}, {part}"] = self._figures(*own, rows)
        return table

    def caption_figures(self, embeddings: Sequence[Tensor], rows: Tensor | None = None) -> Row:
        """Retrieval and style accuracy.

        Args:
            embeddings: of one or more sets, the CLIP's (N, E), picture i of each for held-out picture i, or `rows[i]`.
            rows: which of the held-out pictures they stand for; None for all.
        """
        if self.matcher is None:
            raise UserError("captions can be told by a CLIP only; name one")
        chosen = range(len(self.held_out)) if rows is None else rows.tolist()
        texts = [self.held_out.captions[i] for i in chosen] * len(embeddings)
        styles = [self.held_out.styles[i] for i in chosen] * len(embeddings)
        groups = [prompt(text, style) for text, style in zip(texts, styles, strict=True)]
        pictures, by_style = torch.cat(list(embeddings)), texts_by_style(self.train, self.held_out)
        hits = retrieved(self.matcher, pictures, texts, styles, by_style, self.candidates, self.seed)
        found = {"retrieval": bootstrap.share(hits, groups, self.seed)}
        known = sorted({style for style in (*self.train.styles, *self.held_out.styles) if style is not None})
        if len(known) > 1 and None not in styles:
            told = style_told(self.matcher, pictures, texts, [str(style) for style in styles], known)
            found["style accuracy"] = bootstrap.share(told, groups, self.seed)
        return found

    def _looked_at(self, sets: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The judge's features and the CLIP's embeddings of each set; no embeddings where captions cannot be told."""
        can_tell = self.matcher if self.held_out.texts is not None else None
        embeddings = [can_tell.pictures(pictures) for pictures in sets] if can_tell is not None else []
        return [self.judge.features(pictures) for pictures in sets], embeddings

    def _figures(self, features: list[Tensor], embeddings: list[Tensor], rows: Tensor | None) -> Row:
        found = compare(self.judge, features, self.real, seed=self.seed)
        return found | (self.caption_figures(embeddings, rows) if embeddings else {})

    def nearest(self) -> Tensor:
        """The baseline: for each held-out caption the picture of the nearest training caption in the same style."""
        known = [f"{text} {tags}" for text, tags in zip(self.train.captions, self.train.tags, strict=True)]
        found = nearest_captions(self.held_out.captions, known, (self.held_out.styles, self.train.styles))
        return self.train.pictures[torch.tensor(found)]

    def floor(self) -> dict[str, Row]:
        """The real held-out pictures, and those of the nearest training captions where there are captions."""
        table = self.by_part("real", [self.held_out.pictures])
        if self.held_out.texts is not None and self.train.texts is not None:
            table |= self.by_part("nearest caption", [self.nearest()])
        return table

    def damages(self, maps: Mapper | None) -> dict[str, Row]:
        """The held-out pictures, damaged in known ways."""
        table = {}
        for name, damage in DAMAGES.items():
            worse = damage(self.held_out.pictures)
            table[name] = reconstruction(self.held_out.pictures, worse, maps) | self.row([worse])
        return table


def texts_by_style(*sets: Captioned) -> dict[str | None, list[str]]:
    """The captions of each style."""
    known: dict[str | None, list[str]] = {}
    for some in sets:
        for text, style in zip(some.captions, some.styles, strict=True):
            known.setdefault(style, []).append(text)
    return known
