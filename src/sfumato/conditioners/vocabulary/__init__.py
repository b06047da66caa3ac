"""CLIP's published vocabulary, in the package: 49,408 tokens that every CLIP and OpenCLIP text tower shares.

Ids follow from the list of merges alone: 256 bytes, the same 256 at a word's end, one token per merge, the two marks.

>>> vocabulary, merges = tables()
>>> len(vocabulary), len(merges), vocabulary["horse</w>"], merges[0]
(49408, 48894, 4558, ('i', 'n'))
>>> vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"], vocabulary["!"], vocabulary["!</w>"]
(49406, 49407, 0, 256)
"""

from __future__ import annotations

import functools
import gzip
import hashlib
from importlib.resources import files

from sfumato.errors import ModelFileError

FILE = "bpe_simple_vocab_16e6.txt.gz"
SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
SIZE = 49408
START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"


def byte_letters() -> list[str]:
    """The 256 printable letters that stand for bytes, in the order of CLIP's first 256 ids.

    Bytes that are visible in Latin-1 stand for themselves and come first; the others get the letters from U+0100 on
    (Radford 2019, byte-level BPE).
    """
    visible = [b for b in range(256) if 33 <= b <= 126 or (161 <= b <= 255 and b != 173)]
    return [chr(b) for b in visible] + [chr(256 + i) for i in range(256 - len(visible))]


@functools.cache
def tables() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(token -> id, merges in order); treat both as constants.

    Raises:
        ModelFileError: when the packaged file is damaged.
    """
    data = files(__name__).joinpath(FILE).read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise ModelFileError(f"the packaged vocabulary {FILE} is damaged: install sfumato again")
    letters = byte_letters()
    count = SIZE - 2 * len(letters) - 2
    lines = gzip.decompress(data).decode("utf-8").split("\n")[1 : count + 1]
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    tokens = [*letters, *(letter + END_OF_WORD for letter in letters), *(a + b for a, b in merges), START, END]
    return {token: i for i, token in enumerate(tokens)}, merges
