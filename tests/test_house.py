"""The habits of the house, enforced: who may import whom, light imports, examples that run, randomness that is passed
in, and commands that need no network."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sfumato import models
from sfumato.systems.exchange import save_folder

from . import stable, tiny

SOURCE = Path(__file__).parents[1] / "src" / "sfumato"
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}

BELOW_SYSTEMS = {"condition", "random", "infotext", "images", "networks", "diffusion", "backends"}
BELOW_SYSTEMS |= {"codecs", "conditioners", "adapters", "checkpoints"}
BELOW_TASKS = BELOW_SYSTEMS | {"systems"}
BELOW_API = BELOW_TASKS | {"tasks", "evaluation", "training", "models"}

# layer -> the layers of ours that it may import beside itself; `errors` may be imported by all
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "condition": set(),
    "random": set(),
    "infotext": set(),
    "images": {"infotext"},
    "models": set(),
    "networks": set(),
    "diffusion": {"condition", "random"},
    "backends": {"networks"},
    "codecs": {"networks", "condition", "random", "images"},
    "conditioners": {"networks", "condition", "random", "images"},
    "adapters": {"networks", "condition", "conditioners"},
    "checkpoints": {"networks"},
    "systems": BELOW_SYSTEMS,
    "tasks": BELOW_TASKS,
    "evaluation": BELOW_TASKS | {"tasks"},
    "training": BELOW_TASKS | {"tasks", "evaluation", "models"},
    "short_form": {"backends", "diffusion", "networks", "random"},
    "api": BELOW_API | {"__init__"},
    "replay": BELOW_API | {"__init__", "api"},
    "explain": BELOW_API | {"__init__", "api"},
    "cli": BELOW_API | {"__init__", "api", "replay", "explain"},
    "server": BELOW_API | {"__init__", "api", "replay", "explain"},
    "web": BELOW_API | {"__init__", "api", "replay", "explain"},
    "__init__": {"api", "short_form", "networks"},
    "__main__": {"cli"},
}

NOT_OURS = ("torchvision", "diffusers")


def _name(file: Path) -> str:
    """The module's dotted name."""
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _layer(module: str) -> str:
    """The layer of a module: what follows `sfumato.`, or `__init__` for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def _imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every module imported, at the top or inside functions, with its line; of `from package import x`, x where it is
    a module of ours."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"line {node.lineno}: imports are absolute here"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if _is_module(inner) else node.module, node.lineno


def _is_module(name: str) -> bool:
    path = SOURCE.parent.joinpath(*name.split("."))
    return name.startswith("sfumato.") and (path.is_dir() or path.with_suffix(".py").is_file())


def _id(file: Path) -> str:
    return str(file.relative_to(SOURCE))


# --- who may import whom ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES, ids=_id)
def test_imports_follow_the_table(file: Path) -> None:
    layer = _layer(_name(file))
    assert layer in ALLOWED, f"{layer} has no row in the import table"
    allowed = ALLOWED[layer] | {layer, "errors"}
    for module, line in _imported(TREES[file]):
        assert module.split(".")[0] not in NOT_OURS, f"line {line}: {module} must not be imported"
        if module.split(".")[0] == "sfumato":
            assert _layer(module) in allowed, f"line {line}: {layer} must not import {module}"


def test_table_knows_no_cycles() -> None:
    """Every layer lies strictly above those that it may import."""

    def height(layer: str, above: tuple[str, ...] = ()) -> int:
        assert layer not in above, f"cycle: {' -> '.join((*above, layer))}"
        lower = ALLOWED[layer] - {"__init__"}
        return 1 + max((height(one, (*above, layer)) for one in lower), default=0)

    assert height("cli") > height("api") > height("training") > height("systems") > height("networks")


def _in_fresh_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def test_importing_sfumato_is_light() -> None:
    """It loads nothing but itself and the standard library, so it costs less than `import torch`."""
    code = "import sys; before = set(sys.modules); import sfumato; print(*sorted(set(sys.modules) - before))"
    loaded = _in_fresh_python(code).split()
    foreign = [name for name in loaded if name.split(".")[0] not in sys.stdlib_module_names]
    assert foreign == ["sfumato"]


@pytest.mark.parametrize("form", ["file", "folder"])
def test_stable_diffusion_needs_no_transformers(tmp_path: Path, form: str) -> None:
    """Importing it takes half as long as everything else that opening such a model takes."""
    place = stable.write(tmp_path / "sd.safetensors")
    if form == "folder":
        save_folder(stable.model(), place := tmp_path / "sd")
    code = (
        f"import sys, sfumato; model = sfumato.load({str(place)!r})\n"
        "model.generate('a (red:1.2) hat', negative='blue', steps=2, seed=1, guidance=3.0, width=64, height=64)\n"
        "print(*sorted(sys.modules))"
    )
    loaded = {name.split(".")[0] for name in _in_fresh_python(code).split()}
    assert "tokenizers" in loaded
    assert not {"transformers", "diffusers", "sympy", "huggingface_hub", "scipy", "sklearn", "pandas"} & loaded


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("generate", "--help"), ("recipes", "--help")])
def test_help_does_not_wait_for_torch(arguments: tuple[str, ...]) -> None:
    code = (
        f"import sys; sys.argv = ['sfumato', *{arguments!r}]\n"
        "from sfumato.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as exit: assert not exit.code\n"
        "print('LOADED', *sys.modules)"
    )
    shown, _, loaded = _in_fresh_python(code).partition("LOADED")
    assert "sfumato" in shown
    assert not {"torch", "numpy", "PIL"} & set(loaded.split())


def test_public_names_are_there() -> None:
    import sfumato

    for name in sfumato.__all__:
        assert getattr(sfumato, name) is not None
    assert set(sfumato.__all__) <= set(dir(sfumato))
    with pytest.raises(AttributeError, match="no attribute 'lood'"):
        _ = sfumato.lood


# --- docstrings and examples --------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES, ids=_id)
def test_module_opens_with_a_paragraph_and_an_example(file: Path) -> None:
    tree = TREES[file]
    text = ast.get_docstring(tree)
    assert text, "no docstring"
    if file.name == "__init__.py" and len(tree.body) == 1:
        return  # a package that only groups modules
    assert ">>>" in text, "no example"


@pytest.mark.parametrize("file", FILES, ids=_id)
def test_examples_run(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    if not models.names() and "sfumato.load(" in (ast.get_docstring(TREES[file]) or ""):
        pytest.skip("the box holds no model in this installation")
    if ">>>" not in text:
        return
    result = doctest.testmod(importlib.import_module(_name(file)))
    assert result.failed == 0 and result.attempted > 0


def _public(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Public functions and classes of a module, and public methods of public classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                        yield f"{node.name}.{inner.name}", inner


@pytest.mark.parametrize("file", FILES, ids=_id)
def test_public_names_are_described(file: Path) -> None:
    """Functions and classes of a module have a docstring; a method may leave it to the class or protocol it fulfils."""
    bare = [name for name, node in _public(TREES[file]) if "." not in name and not ast.get_docstring(node)]
    assert not bare, f"no docstring: {', '.join(bare)}"


@pytest.mark.parametrize("file", FILES, ids=_id)
def test_everything_is_annotated(file: Path) -> None:
    bare = []
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            arguments += [a for a in (node.args.vararg, node.args.kwarg) if a is not None]
            lacking = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            if lacking or node.returns is None:
                bare.append(f"{node.name} (line {node.lineno})")
    assert not bare, f"annotations are missing: {', '.join(bare)}"


@pytest.mark.parametrize("file", FILES, ids=_id)
def test_functions_fit_on_a_screen(file: Path) -> None:
    long = [
        f"{node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for node in ast.walk(TREES[file])
        if isinstance(node, ast.FunctionDef) and node.end_lineno and node.end_lineno - node.lineno >= 80
    ]
    assert not long, ", ".join(long)


# --- randomness and devices ---------------------------------------------------------------------------------------

RANDOM = {"randn", "rand", "randint", "randperm", "normal", "bernoulli", "multinomial"}
RANDOM_LIKE = {"randn_like", "rand_like", "randint_like"}  # they take no generator on older torch, so never


def _calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Calls `torch.name(...)` with their names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of = node.func.value
            if isinstance(of, ast.Name) and of.id == "torch":
                yield node.func.attr, node


@pytest.mark.parametrize("file", FILES, ids=_id)
def test_randomness_is_passed_in(file: Path) -> None:
    bare = []
    for name, call in _calls(TREES[file]):
        passed = any(keyword.arg == "generator" for keyword in call.keywords)
        if name in RANDOM_LIKE or (name in RANDOM and not passed):
            bare.append(f"torch.{name} (line {call.lineno})")
    assert not bare, f"without a generator: {', '.join(bare)}"


@pytest.mark.parametrize("file", FILES, ids=_id)
def test_no_device_is_named(file: Path) -> None:
    """No literal "cuda", no `.cuda()`, no `torch.cuda`: devices come from outside."""
    found = []
    for node in ast.walk(TREES[file]):
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        if re.fullmatch(r"cuda(:\d+)?", text) or (isinstance(node, ast.Attribute) and node.attr == "cuda"):
            found.append(f"line {node.lineno}")
    assert not found, ", ".join(found)


# --- no network ---------------------------------------------------------------------------------------------------


def test_commands_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def blocked(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a socket was opened")

    for name in ("socket", "create_connection", "getaddrinfo", "socketpair"):
        monkeypatch.setattr(socket, name, blocked)
    with pytest.raises(AssertionError, match="a socket was opened"):
        socket.socket()
    monkeypatch.chdir(tmp_path)
    tiny.write_tiny_model(tmp_path / "m.safetensors")
    tiny.write_pictures(tmp_path / "pictures")
    tiny.write_recipe(tmp_path / "tiny.yaml")
    for command in (
        "generate --model m.safetensors --seed 1 --label cat --out a.png",
        "info a.png",
        "info m.safetensors --json",
        "train tiny.yaml --out run --dry-run",
        "train tiny.yaml --out run train.steps=2",
        "info run",
        "generate --model run --count 2 --out out",
        "recipes ls",
        "recipes show ddpm-emoji32",
        "recipes validate tiny.yaml",
        "models ls",
        "doctor",
        *([f"models show {models.BEST}"] if models.names() else []),
    ):
        tiny.succeed(*command.split())
