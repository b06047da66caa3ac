"""Where the pictures come from: published packages, in a folder of the user's, installed, or fetched by npm.

A `Package` has an exact version, since the list of held-out pictures was drawn up for it. `find` looks for packages
in a folder, unpacked or as downloaded (`.tgz` of npm, `.whl` of pip); `installed` among what pip has installed;
`npm_pack` brings them from the npm registry.

>>> import json, pathlib, tempfile
>>> noto = Package("npm", "@iconify-json/noto", "1.2.9")
>>> noto.source, noto.stem
('npm:@iconify-json/noto@1.2.9', 'iconify-json-noto')
>>> with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as workspace:
...     _ = pathlib.Path(folder, "package.json").write_text(json.dumps({"name": noto.name, "version": "1.2.9"}))
...     find([noto], pathlib.Path(folder), pathlib.Path(workspace)) == {noto: pathlib.Path(folder)}
True
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sfumato.errors import DataError

_DEEPEST = 4  # levels of folders searched: FOLDER/node_modules/@scope/name/package.json is the third
_NPM_SECONDS = 900


@dataclass(frozen=True)
class Package:
    """One version of a package on npm or PyPI."""

    registry: Literal["npm", "pypi"]
    name: str
    version: str

    @property
    def source(self) -> str:
        """What the column `source` says, as in ``npm:@iconify-json/noto@1.2.9``."""
        return f"{self.registry}:{self.name}@{self.version}"

    @property
    def stem(self) -> str:
        """What the names of its archives begin with; for PyPI this is also the name of its folder."""
        return self.name.removeprefix("@").replace("/", "-") if self.registry == "npm" else self.name.replace("-", "_")

    def archive_version(self, name: str) -> str | None:
        """The version in the name of one of its archives, None for any other file name."""
        ending = r"-(\d[^-]*)\.tgz" if self.registry == "npm" else r"-(\d[^-]*)-.*\.whl"
        match = re.fullmatch(re.escape(self.stem) + ending, name)
        return match[1] if match else None


def find(packages: Sequence[Package], folder: Path, workspace: Path) -> dict[Package, Path]:
    """Those of `packages` that lie in `folder`, unpacked or as archives, each with its root folder.

    Args:
        packages: what to look for.
        folder: searched four levels deep, links not followed.
        workspace: an empty folder, where archives are unpacked.

    Raises:
        DataError: no such folder, a damaged archive, or a package that is there in other versions only.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {str(folder)!r} to take packages from")
    held = _unpacked(packages, folder)
    for file in _files(folder):
        for package in packages:
            if (version := package.archive_version(file.name)) is not None:
                held.append((package, version, file))
    found = {}
    for package in packages:
        mine = [(version, path) for one, version, path in held if one == package]
        fitting = [path for version, path in mine if version in (package.version, None)]
        if mine and not fitting:
            raise DataError(f"{mine[0][1]} is {package.name} {mine[0][0]}; version {package.version} is expected")
        if fitting:
            found[package] = _opened(package, fitting[0], workspace)
    return found


def _walk(folder: Path) -> Iterable[tuple[Path, list[str]]]:
    for place, subfolders, names in os.walk(folder):
        depth = len(Path(place).relative_to(folder).parts)
        subfolders[:] = sorted(subfolders) if depth < _DEEPEST else []
        yield Path(place), sorted(names)


def _files(folder: Path) -> list[Path]:
    return [place / name for place, names in _walk(folder) for name in names if name.endswith((".tgz", ".whl"))]


def _unpacked(packages: Sequence[Package], folder: Path) -> list[tuple[Package, str | None, Path]]:
    """(package, version if known, root) of every unpacked one; a PyPI package alone does not say its version."""
    held: list[tuple[Package, str | None, Path]] = []
    for place, names in _walk(folder.absolute()):
        described = _described(place / "package.json") if "package.json" in names else {}
        for package in packages:
            if package.registry == "npm" and described.get("name") == package.name:
                held.append((package, str(described.get("version")), place))
            if package.registry == "pypi" and place.name == package.stem:
                notes = sorted(place.parent.glob(f"{package.stem}-*.dist-info"))
                version = notes[0].name.removesuffix(".dist-info").removeprefix(f"{package.stem}-") if notes else None
                held.append((package, version, place))
    return held


def _described(file: Path) -> dict[str, object]:
    try:
        described = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    return described if isinstance(described, dict) else {}


def _opened(package: Package, path: Path, workspace: Path) -> Path:
    """The root folder of a package: `path` itself, or where the archive `path` is unpacked."""
    if path.is_dir():
        return path
    target = workspace / package.stem
    try:
        if package.registry == "npm":
            with tarfile.open(path, "r:gz") as archive:
                archive.extractall(target, filter="data")
        else:
            with zipfile.ZipFile(path) as wheel:
                wheel.extractall(target)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    inner = target / ("package" if package.registry == "npm" else package.stem)
    if not inner.is_dir():
        raise DataError(f"{path} is not the package {package.name}: it has no folder {inner.name!r}")
    return inner


def installed(packages: Iterable[Package]) -> dict[Package, Path]:
    """Those PyPI packages that are installed here, each with its folder; nothing of them is imported.

    Raises:
        DataError: another version is installed.
    """
    found = {}
    for package in packages:
        spec = importlib.util.find_spec(package.stem) if package.registry == "pypi" else None
        if spec is None or not spec.submodule_search_locations:
            continue
        version = importlib.metadata.version(package.name)
        if version != package.version:
            raise DataError(f"{package.name} {version} is installed; version {package.version} is expected")
        found[package] = Path(spec.submodule_search_locations[0])
    return found


def has_npm() -> bool:
    """Whether the npm command is there."""
    return shutil.which("npm") is not None


def npm_pack(packages: Sequence[Package], folder: Path) -> None:
    """Fetch npm packages as `.tgz` into `folder`; npm checks their hashes, and no script of theirs is run.

    Raises:
        DataError: npm failed, for one because the registry was not reached.
    """
    command = [shutil.which("npm") or "npm", "pack", "--ignore-scripts", *(f"{p.name}@{p.version}" for p in packages)]
    remedy = "; fetch them elsewhere with `npm pack` and name their folder with --from"
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_NPM_SECONDS)
    except subprocess.TimeoutExpired:
        raise DataError(f"npm did not bring the packages within {_NPM_SECONDS // 60} minutes{remedy}") from None
    if done.returncode:
        said = re.findall(
            r"^npm error (?!code |errno |syscall )(?:notarget |network )?(.+?)\.?$", done.stderr, re.MULTILINE
        )
        reason = said[0] if said else f"exit code {done.returncode}"
        raise DataError(f"npm could not bring the packages ({reason}){remedy}")
