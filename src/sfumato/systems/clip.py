"""CLIP: pictures and captions in one space, where a picture lies near the words that describe it (Radford 2021).

The two towers are transformers' `CLIPModel` at any size, with its names. Captions are read word by word with a
vocabulary that was collected from the training captions and travels in the model file, so that the file alone is
enough; a word that is not in it becomes the token of unknown words.

>>> words("Red heart, Noto style: a man’s piñata!")
['red', 'heart', 'noto', 'style', 'a', "man's", 'pinata']
>>> vocabulary(["red heart", "red hat"], limit=2)
('hat', 'red')
>>> CLIPConfig(vocabulary=("hat", "red"), tokens=6).encode(["red heart"]).tolist()
[[2, 5, 1, 3, 0, 0]]
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from sfumato.checkpoints.io import check_fit, component, load_strictly
from sfumato.errors import UserError
from sfumato.networks.outline import made_on
from sfumato.systems.config import Strict

PAD, UNKNOWN, START, END = range(4)
"""The tokens that are not words; the words of the vocabulary follow, in its order."""

MAX_SCALE = 100.0
"""The learned factor of the cosines never exceeds this in training (Radford 2021, section 2.5)."""

_BATCH = 256


class TowerConfig(Strict):
    """One transformer.

    Attributes:
        width: of its hidden states. layers: how many. heads: of its attention, a divisor of the width.
        mlp: hidden width of the layers' perceptrons.
    """

    width: int = Field(ge=8, le=4096)
    layers: int = Field(ge=1, le=64)
    heads: int = Field(ge=1, le=64)
    mlp: int = Field(ge=8, le=16384)

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> TowerConfig:
        if self.width % self.heads:
            raise UserError(f"width {self.width} is not a multiple of its {self.heads} heads")
        return self


class CLIPConfig(Strict):
    """Everything that two towers need to be built and asked.

    Attributes:
        size: side of the pictures in pixels; pictures of another size are resized. patch: side of a patch, a divisor.
        vision, text: the towers.
        embed: numbers in an embedding.
        tokens: longest caption, with its two marks; the rest of a longer one is not read.
        vocabulary: the words that are known.
        title, licence, source: what a person should know of a shipped model; may be empty.
    """

    system: Literal["clip"] = "clip"
    size: int = Field(default=64, ge=8, le=1024)
    patch: int = Field(default=8, ge=2, le=64)
    vision: TowerConfig = TowerConfig(width=192, layers=6, heads=3, mlp=384)
    text: TowerConfig = TowerConfig(width=128, layers=4, heads=4, mlp=256)
    embed: int = Field(default=128, ge=8, le=4096)
    tokens: int = Field(default=24, ge=3, le=512)
    vocabulary: tuple[str, ...] = ()
    title: str = ""
    licence: str = ""
    source: str = ""

    @model_validator(mode="after")
    def _patches_fill_the_picture(self) -> CLIPConfig:
        if self.size % self.patch:
            raise UserError(f"size {self.size} is not a multiple of patch {self.patch}")
        return self

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Tokens of captions, int64 (B, tokens): start, one for each word, end, and padding."""
        known = {word: END + 1 + i for i, word in enumerate(self.vocabulary)}
        rows = torch.full((len(captions), self.tokens), PAD, dtype=torch.int64)
        for row, caption in zip(rows, captions, strict=True):
            ids = [known.get(word, UNKNOWN) for word in words(caption)][: self.tokens - 2]
            row[: len(ids) + 2] = torch.tensor([START, *ids, END])
        return rows

    def unknown_words(self, captions: Iterable[str]) -> Counter[str]:
        """Words of captions that are not in the vocabulary, with the number of captions that hold them."""
        known = set(self.vocabulary)
        return Counter(word for caption in captions for word in set(words(caption)) - known)


def words(caption: str) -> list[str]:
    """The words of a caption: lower case, without accents, an apostrophe inside a word kept."""
    plain = unicodedata.normalize("NFKD", caption.replace("’", "'").casefold())
    plain = "".join(sign for sign in plain if not unicodedata.combining(sign))
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", plain)


def vocabulary(captions: Iterable[str], limit: int) -> tuple[str, ...]:
    """The words of captions, in alphabetical order; the `limit` most frequent ones where there are more."""
    counts = Counter(word for caption in captions for word in words(caption))
    kept = sorted(counts, key=lambda word: (-counts[word], word))[:limit]
    return tuple(sorted(kept))


class Towers(nn.Module):
    """The two transformers as one module.

    Attributes:
        clip: transformers' `CLIPModel`.
    """

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip: Any = clip

    def forward(self, x: Tensor, tokens: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Unit embeddings of pictures and captions, and the factor of their cosines.

        Args:
            x: (B, 3, H, W) in [-1, 1], of the config's size.
            tokens: (C, T) int64.
            keep: (B, K) int64, the patches of each picture that are looked at; None for all.

        Returns:
            (B, E) and (C, E), float32, and a scalar.
        """
        return self.see(x, keep), self.read(tokens), self.clip.logit_scale.float().exp().clamp(max=MAX_SCALE)

    def see(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Unit embeddings (B, E) of pictures (B, 3, H, W) in [-1, 1]; see `forward` for `keep` (Li 2022, FLIP)."""
        tower = self.clip.vision_model
        hidden = tower.embeddings(x)
        if keep is not None:
            kept = (keep + 1).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
            hidden = torch.cat([hidden[:, :1], hidden.gather(1, kept)], 1)
        hidden = tower.encoder(inputs_embeds=tower.pre_layrnorm(hidden)).last_hidden_state
        return F.normalize(self.clip.visual_projection(tower.post_layernorm(hidden[:, 0])).float(), dim=-1)

    def read(self, tokens: Tensor) -> Tensor:
        """Unit embeddings (C, E) of captions as tokens (C, T); what is padding in all of them is left out."""
        longest = int((tokens != PAD).sum(1).max())
        pooled = self.clip.text_model(input_ids=tokens[:, :longest]).pooler_output
        return F.normalize(self.clip.text_projection(pooled).float(), dim=-1)


class CLIP:
    """Two towers that were, or are to be, trained together.

    Attributes:
        config: as stored in its checkpoint.
        towers: the networks.
    """

    kind = "clip"

    def __init__(self, config: CLIPConfig, towers: Towers) -> None:
        self.config, self.towers = config, towers

    @classmethod
    def create(cls, config: CLIPConfig, device: str = "cpu") -> CLIP:
        """A new model with freshly initialised weights (from torch's global generator), or none on "meta".

        Raises:
            UserError: transformers is not installed.
        """
        with made_on(device):
            return cls(config, Towers(_network(config)))

    @classmethod
    def load(cls, config: CLIPConfig, tensors: Mapping[str, Tensor], *, what: str) -> CLIP:
        """A model with stored weights (names `network.…`), in float32; a misfit raises `ModelFileError`."""
        own = component(tensors, "network")
        check_fit(cls.create(config, "meta").towers.clip, own, what=what)
        with torch.random.fork_rng(devices=[]):  # what is drawn is overwritten at once
            model = cls.create(config)
        load_strictly(model.towers.clip, own, what=what)
        model.towers.eval().requires_grad_(False)
        return model

    def tensors(self) -> dict[str, Tensor]:
        """The weights under the names they are stored by."""
        return {f"network.{name}": t for name, t in self.towers.clip.state_dict().items()}

    @torch.no_grad()
    def pictures(self, pictures: Tensor, batch: int = _BATCH) -> Tensor:
        """Unit embeddings, float32 (N, E) on the CPU, of pictures, uint8 (N, 3, H, W).

        Raises:
            UserError: another shape or type.
        """
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
            raise UserError(f"CLIP takes uint8 pictures (N, 3, H, W); got {pictures.dtype} {tuple(pictures.shape)}")
        device, size = self.towers.clip.logit_scale.device, self.config.size
        parts = []
        for part in torch.split(pictures, batch):
            x = part.to(device).float() / 127.5 - 1
            if x.shape[-2:] != (size, size):
                x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
            parts.append(self.towers.see(x).cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def captions(self, captions: Sequence[str], batch: int = _BATCH) -> Tensor:
        """Unit embeddings, float32 (N, E) on the CPU, of captions."""
        device, tokens = self.towers.clip.logit_scale.device, self.config.encode(captions)
        return torch.cat([self.towers.read(part.to(device)).cpu() for part in torch.split(tokens, batch)])


def _network(config: CLIPConfig) -> nn.Module:
    try:
        from transformers import CLIPConfig as Sizes
        from transformers import CLIPModel
    except ImportError:
        raise UserError("CLIP needs transformers: pip install sfumato[text]") from None
    text = _tower(config.text) | {
        "vocab_size": END + 1 + len(config.vocabulary),
        "max_position_embeddings": config.tokens,
        "pad_token_id": PAD,
        "bos_token_id": START,
        "eos_token_id": END,
    }
    vision = _tower(config.vision) | {"image_size": config.size, "patch_size": config.patch}
    sizes = Sizes(
        text_config=text,
        vision_config=vision,
        projection_dim=config.embed,
        logit_scale_init_value=math.log(1 / 0.07),
    )
    make: Any = CLIPModel
    network: nn.Module = make._from_config(sizes, attn_implementation="eager")  # faster on short sequences
    return network


def _tower(config: TowerConfig) -> dict[str, Any]:
    """The fields of transformers' config of one tower."""
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp,
        "hidden_act": "gelu",
    }
