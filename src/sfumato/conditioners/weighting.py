"""What a fragment's weight does to the text encoder's states: the formulas of three programs.

`z` are the states of one window, (L, C), or of several, (N, L, C); `w` the weight of each token, marks and padding 1.

>>> z, w = torch.tensor([[1.0, 3.0], [2.0, 6.0]]), torch.tensor([1.0, 2.0])
>>> scale_keeping_mean(z, w).mean(), (scale_keeping_mean(z, w)[1] / scale_keeping_mean(z, w)[0]).tolist()
(tensor(3.), [4.0, 4.0])
>>> away_from_empty(z, torch.ones_like(z), w).tolist()
[[1.0, 3.0], [3.0, 11.0]]
>>> [round(share, 3) for share in without_shares([1.0, 0.5, 0.0])]
[0.0, 1.0, 63661.977]
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sfumato.errors import UserError


def scale_keeping_mean(states: Tensor, weights: Tensor) -> Tensor:
    """AUTOMATIC1111's emphasis "Original": `z' = w z`, then `z' mean(z) / mean(z')`, means over one whole window.

    Source: stable-diffusion-webui, `sd_emphasis.py`. Windows are scaled apart from each other. That program takes the
    means over the windows of a batch of prompts at once, where it encodes several; here the batch changes nothing.

    Args:
        states: (…, L, C).
        weights: (…, L).

    Raises:
        UserError: where the weights make the mean zero, so that it cannot be restored.
    """
    if bool((weights == 1).all()):
        return states
    scaled = states * weights[..., None]
    ratio = states.mean((-2, -1), keepdim=True) / scaled.mean((-2, -1), keepdim=True)
    if not bool(ratio.isfinite().all()):
        raise UserError("the prompt's weights cancel out: the mean of its states cannot be restored")
    return torch.where((weights == 1).all(-1)[..., None, None], states, scaled * ratio)


def away_from_empty(states: Tensor, empty: Tensor, weights: Tensor) -> Tensor:
    """ComfyUI's weights: `z' = e + w (z - e)`, e the state of the empty prompt at the same place.

    Source: ComfyUI, `sd1_clip.py`, `encode_token_weights`; compel uses the same, `build_weighted_embedding_tensor`.

    Args:
        states: (…, L, C).
        empty: (L, C), the empty prompt's window.
        weights: (…, L); where 1, the state is untouched to the bit.
    """
    w = weights[..., None]
    return torch.where(w == 1, states, empty + w * (states - empty))


def without_shares(weights: Sequence[float]) -> list[float]:
    """compel's share of "the prompt without this fragment" for weights below 1: `tan((1 - w) pi / 2)`.

    The prompt itself has share 1, so at weight 0.5 the two meet half way; a weight is at least 1e-5 here.

    Source: compel 2, `embeddings_provider.py`, `get_embeddings_for_weighted_prompt_fragments`.
    """
    return [math.tan((1 - max(weight, 1e-5)) * math.pi / 2) for weight in weights]


def blend(states: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """`sum_i s_i z_i / sum_i s_i`.

    compel: z_0 are the states of the whole prompt (share 1), z_i those with fragment i hidden from attention, all of
    them after `away_from_empty`; so a fragment below 1 is both nearer to the empty prompt and blended away.
    """
    share = torch.tensor(shares, dtype=states[0].dtype, device=states[0].device)
    mixed: Tensor = torch.tensordot(share / share.sum(), torch.stack(list(states)), dims=1)
    return mixed
