"""The documents are true: every `sfumato …` line in their fenced blocks is run, and the Python of some too.

The lines of one document run in order in one folder of its own, which holds `pictures/` (1.png, 2.png …), `classes/`
(the same in two class sub-folders), `captioned/` (with `metadata.jsonl`), `data.parquet` (with the columns group, text
and split), files of Stable Diffusion made small, `photo.png` with a mask and a map of depths, two layouts,
`boxes.json` and `places.json`, and `prompts.txt`. They run as printed but for their size: a `train` or `check` line
gets the settings `QUICK` appended, a `generate` or `edit` line `--steps 2`, and a line that makes shapes `--count 100`,
which overrule their own. Shell lines may continue with a backslash, begin with `$` or with variables, end in a
comment, and send what they print `> into.file`. Lines of other programs (make, pip, git, accelerate …) are not run.

A translation (`page.zh.md` beside `page.md`) must have the same lines as the original, and is not run again.

A document that needs a model of the box is skipped in an installation without weights.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from sfumato import models
from sfumato.training import recipes

from . import stable, tiny

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(path for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")] if path.is_file())

QUICK = (
    "data.size=16",
    "train.steps=2",
    "train.batch=4",
    "train.accumulate=1",
    "train.samples=1",
    "train.sample_steps=1",
    "train.validation_pictures=4",
    "train.optimizer.warmup=1",
)
SHELLS = ("", "sh", "bash", "shell", "console", "text")

_FENCE = re.compile(
    r"^(?P<fence>`{3,}|~{3,})[ ]*(?P<language>[\w+-]*)[^\n]*\n(?P<body>.*?)^(?P=fence)[ ]*$", re.MULTILINE | re.DOTALL
)


def blocks(document: Path, languages: tuple[str, ...]) -> list[str]:
    """The fenced blocks of these languages."""
    text = document.read_text(encoding="utf-8")
    return [match["body"] for match in _FENCE.finditer(text) if match["language"].lower() in languages]


def commands(document: Path) -> list[list[str]]:
    """The words of every `sfumato …` line."""
    lines = "\n".join(blocks(document, SHELLS)).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        line = re.sub(r"^\s*(\$\s+)?(\w+=\S*\s+)*", "", line)
        if line.startswith("sfumato "):
            found.append(shlex.split(line, comments=True))
    return found


def quick(words: list[str]) -> list[str]:
    """The same command, small."""
    if words[1] in ("train", "check"):
        return [*words, *QUICK]
    if words[1] in ("generate", "edit"):
        return [*words, "--steps", "2"]
    if words[1] == "bench":
        return [*words, "--dtype", "float32", "--kernel", "sdpa", "--repeat", "1"]
    if words[1:4] == ["data", "prepare", "shapes"]:
        return [*words, "--count", "100"]
    return words


def _run(words: list[str]) -> None:
    target = None
    if ">" in words:
        at = words.index(">")
        words, target = words[:at], words[at + 1]
    done = tiny.succeed(*quick(words)[1:])
    if target is not None:
        Path(target).write_text(done.out, encoding="utf-8")


def _needs_box(document: Path) -> bool:
    for words in commands(document):
        if words[1] == "generate" and not any(word.startswith("--model") for word in words):
            return True
    return models.BEST in " ".join(blocks(document, ("python", *SHELLS)))


def _original(document: Path) -> Path | None:
    """What a document is a translation of, if it is one."""
    original = document.with_name(re.sub(r"\.[a-z]{2}\.md$", ".md", document.name))
    return original if original != document and original.is_file() else None


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that someone who has Stable Diffusion has, small."""
    folder = tmp_path_factory.mktemp("stable")
    names = {"model": "sd1", "inpainting": "sd1-inpainting", "depth": "sd2-depth", "upscaler": "sd-x4-upscaler"}
    for file, name in names.items():
        stable.write(folder / f"{file}.safetensors", name)
    tiny.picture(1, size=40).save(folder / "photo.png")
    tiny.picture(2, size=40).convert("L").save(folder / "depth.png")
    tiny.picture(3, size=40).convert("L").point(lambda v: 255 * (v > 100)).save(folder / "mask.png")
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stable_diffusion: Path) -> Path:
    """The folder that a document's reader is in."""
    tiny.write_pictures(tmp_path / "classes", count=24, size=32)
    (tmp_path / "pictures").mkdir()
    for number in range(1, 25):
        tiny.picture(number, size=32).save(tmp_path / f"pictures/{number}.png")
    tiny.write_captioned(tmp_path / "captioned", count=24, size=32)
    shutil.copyfile(tiny.PARQUET, tmp_path / "data.parquet")
    for file, labels in (("boxes", ("red circle", "blue square")), ("places", ("circle", "square"))):
        boxes = [{"label": label, "box": [0.5 * i, 0.5 * i, 0.4, 0.4]} for i, label in enumerate(labels)]
        (tmp_path / f"{file}.json").write_text(json.dumps(boxes), encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("# two\na fox\na wolf\n", encoding="utf-8")
    for file in stable_diffusion.iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands(document: Path, place: Path) -> None:
    if not models.names() and _needs_box(document):
        pytest.skip("the box holds no model in this installation")
    if (original := _original(document)) is not None:
        assert commands(document) == commands(original)
        return
    for words in commands(document):
        _run(words)


@pytest.mark.parametrize("name", ["README.md", "docs/stable-diffusion.md"])
def test_python_of_documents(place: Path, name: str) -> None:
    document = ROOT / name
    if not models.names():
        pytest.skip("the box holds no model in this installation")
    shared: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(document, ("python", "py")):
        exec(compile(block, str(document), "exec"), shared)


def test_lines_are_found(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(
        "```sh\nmake demo\n$ sfumato info a.png   # what it is\nA=1 sfumato train x \\\n  --data 'my pictures'\n```\n"
        "```python\nsfumato = 1\n```\nsfumato in prose\n~~~\nsfumato generate > out.txt\n~~~\n"
    )
    assert commands(document) == [
        ["sfumato", "info", "a.png"],
        ["sfumato", "train", "x", "--data", "my pictures"],
        ["sfumato", "generate", ">", "out.txt"],
    ]
    assert quick(["sfumato", "generate"])[-2:] == ["--steps", "2"]
    assert quick(["sfumato", "train", "x"])[3:] == list(QUICK)


def test_the_network_of_the_page_on_extending_trains_and_draws() -> None:
    shared: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(ROOT / "docs" / "extending.md", ("python",))[2:]:
        exec(compile(block, "extending.md", "exec"), shared)
    assert shared["pictures"].shape == shared["x"].shape == (2, 3, 16, 16)
    assert shared["x"].isfinite().all() and shared["loss"].isfinite()


def test_the_recipe_of_the_page_on_training_is_one(tmp_path: Path) -> None:
    (text,) = blocks(ROOT / "docs" / "train-on-your-own-pictures.md", ("yaml",))
    (tmp_path / "mine.yaml").write_text(text)
    found = recipes.load(str(tmp_path / "mine.yaml"), data=".")
    said = ["data.size=32", "data.flip=true", "model.network.dropout=0.1", "train.steps=40000"]
    assert found == recipes.load("ddpm", said, ".").model_copy(update={"description": ""})


def test_the_solver_of_the_page_on_extending_is_the_real_one() -> None:
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    source, case, *_ = blocks(ROOT / "docs" / "extending.md", ("python",))
    assert source.strip() in (ROOT / "src/sfumato/diffusion/solvers/flow_heun.py").read_text(encoding="utf-8")
    assert case.strip() in (ROOT / "tests/diffusion/solver_cases.py").read_text(encoding="utf-8")
    assert "`src/sfumato/diffusion/solvers/flow_heun.py`" in page
