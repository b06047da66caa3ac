"""What all tests share: one thread, the `slow` mark, and reproducible property tests."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch
from hypothesis import settings

settings.register_profile("sfumato", deadline=None, derandomize=True)
settings.load_profile("sfumato")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", default=False, help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes minutes; skipped unless --slow is given")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow; give --slow to run it")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Not the user's own memory of hashes, and nothing left in the machine's folder for temporary files."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["TMPDIR"] = tempfile.tempdir = str(tmp_path_factory.mktemp("tmp"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Timings and floating-point sums that do not depend on how many cores the machine has."""
    torch.set_num_threads(1)
