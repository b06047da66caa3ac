"""A place to run commands in: models, pictures, recipes and a finished run, made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path

import pytest

from .. import tiny


@pytest.fixture
def run() -> Callable[..., tiny.Result]:
    """`run("generate", "--seed", 1)` runs the command in this process."""
    return tiny.run


@pytest.fixture
def succeed() -> Callable[..., tiny.Result]:
    """Like `run`, for commands that must succeed."""
    return tiny.succeed


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, pictures, a recipe and the run that it trained."""
    folder = tmp_path_factory.mktemp("place")
    tiny.write_tiny_model(folder / "cat-dog.safetensors")
    tiny.write_tiny_model(folder / "free.safetensors", labels=())
    tiny.write_pictures(folder / "pictures")
    tiny.write_recipe(folder / "tiny.yaml")
    with chdir(folder):
        tiny.succeed("train", "tiny.yaml", "--out", "run", "--device", "cpu")
    return folder


@pytest.fixture
def place(template: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the template, which is also the current folder."""
    copy = tmp_path / "place"
    shutil.copytree(template, copy)
    with chdir(copy):
        yield copy
