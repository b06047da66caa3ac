"""SHA-256 of model files, remembered by path, size and time of change, so that a large file is read once.

The memory is a small JSON file in the user's cache folder (`$XDG_CACHE_HOME/sfumato/hashes.json`, by default under
`~/.cache`). It may be deleted at any time; where it cannot be written, files are simply hashed again.

>>> import tempfile
>>> path = Path(tempfile.mkdtemp()) / "a"
>>> _ = path.write_bytes(b"abc")
>>> sha256(path)[:8]
'ba7816bf'
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

_SMALL = 2**24  # files below 16 MiB are hashed in milliseconds; they are remembered too, to be found again by hash
_MOST = 2000


def memory_file() -> Path:
    """Where hashes are remembered."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sfumato" / "hashes.json"


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal; taken from memory when size and time of change are as they were."""
    known, key, stamp = _read(), str(path.resolve()), _stamp(path)
    entry = known.get(key)
    if entry is not None and entry[:2] == stamp and path.stat().st_size >= _SMALL:
        return str(entry[2])
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if entry != [*stamp, digest]:
        known.pop(key, None)
        _write({**known, key: [*stamp, digest]})
    return digest


def remember(folder: Path, digest: str) -> None:
    """Note the hash of a whole folder, so that `find` finds it by it."""
    known, key = _read(), str(folder.resolve())
    entry = [*_stamp(folder), digest]
    if known.get(key) != entry:
        known.pop(key, None)
        _write({**known, key: entry})


def together(*digests: str) -> str:
    """One hash for several files: the only one itself, else the SHA-256 of all of them in this order."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def find(digest: str) -> Path | None:
    """A remembered file (or folder) that still has this SHA-256 by size and time, or None."""
    for key, entry in reversed(_read().items()):
        path = Path(key)
        if entry[2] == digest and path.exists() and _stamp(path) == entry[:2]:
            return path
    return None


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _read() -> dict[str, list[Any]]:
    try:
        known = json.loads(memory_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {k: v for k, v in known.items() if isinstance(v, list) and len(v) == 3}


def _write(known: dict[str, list[Any]]) -> None:
    file = memory_file()
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(dict(list(known.items())[-_MOST:])), encoding="utf-8")
        os.replace(temporary, file)
    except OSError:
        temporary.unlink(missing_ok=True)
