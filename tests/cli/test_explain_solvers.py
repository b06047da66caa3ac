"""`sfumato explain solvers`: the figure, the table and the numbers behind them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sfumato.diffusion.schedule import TableSchedule, cosine_alpha_bar
from sfumato.diffusion.solvers import SOLVERS
from sfumato.evaluation.solvers import Error, compare, mixture
from sfumato.explain import FAMILIES, family, kept
from sfumato.random import NoiseSource

from .. import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_tiny_model(tmp_path_factory.mktemp("model") / "model.safetensors")


def test_figure_and_table(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "solvers.png"
    done = tiny.succeed("explain", "solvers", "Euler", "dpm++ 2m", "Euler a", "--model", str(model),
                        "--budgets", "4,8", "--out", str(out))  # fmt: skip
    assert out.stat().st_size > 10_000
    rows = [line for line in done.out.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows[1:]][-1] == "euler_ancestral *"
    assert len(rows) == 4 and "8 evaluations: " in done.out


def test_the_numbers_as_json(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = tiny.succeed("explain", "solvers", "heun", "--model", str(model), "--budgets", "6", "--json",
                        "--out", str(tmp_path / "solvers.svg"))  # fmt: skip
    found = json.loads(done.out[: done.out.rindex("}") + 1])
    assert [e["evaluations"] for e in found["mixture"]] == [5]  # the last step is first order
    assert found["mixture"][0]["ode"] > 0 and found["model"][0]["distribution"] is None


@pytest.mark.parametrize("budgets", ["8,x", "0", ""])
def test_budgets_that_are_not_understood(model: Path, tmp_path: Path, budgets: str) -> None:
    out = tmp_path / "a.png"
    done = tiny.run("explain", "solvers", "--budgets", budgets, "--model", str(model), "--out", str(out))
    assert done.code == 2 and "--budgets" in done.err and not out.exists()


def test_more_evaluations_bring_a_solver_nearer() -> None:
    """On the mixture: both rulers, Euler and the second-order multistep method, which is nearer at the same cost."""
    data, count = mixture(), 400
    draws = data.sample(count, torch.Generator().manual_seed(0))
    found = compare(
        data, TableSchedule(cosine_alpha_bar()), lambda: NoiseSource(range(count), (2,)), spacing="trailing",
        budgets=(10, 40), names=("euler", "dpmpp_2m"), data=draws,
    )  # fmt: skip
    by = {(e.method, e.budget): e for e in found}
    for method in ("euler", "dpmpp_2m"):
        few, many = by[method, 10], by[method, 40]
        assert many.ode is not None and few.ode is not None and many.ode < few.ode / 2
    assert by["dpmpp_2m", 40].ode < by["euler", 40].ode  # type: ignore[operator]


def test_every_sampler_has_its_panel_and_one_without_a_family_has_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {family(name) for name in SOLVERS} == set(FAMILIES)
    assert [family(name) for name in ("dpm_2", "dpm_2_ancestral", "dpm_2m", "dpmpp_2m")] == [
        "Euler, Heun, DPM2", "ancestral", "DPM-Solver", "DPM-Solver++, UniPC",
    ]  # fmt: skip
    monkeypatch.delitem(FAMILIES, "SDE")
    assert family("sa_solver") == "others"


def test_only_what_keeps_to_its_budget_is_recommended() -> None:
    errors = [Error("a", 8, made, 0.1, None) for made in (7, 8, 9, 14)] + [Error("b", 20, 8, 0.1, None)]
    assert [e.evaluations for e in kept(errors, 8)] == [7, 8, 9]


def test_a_stochastic_solver_is_left_out_without_data() -> None:
    data, path = mixture(), TableSchedule(cosine_alpha_bar())
    found = compare(data, path, lambda: NoiseSource(range(4), (2,)), spacing="trailing", budgets=(4,),
                    names=("euler_ancestral", "euler"))  # fmt: skip
    assert [e.method for e in found] == ["euler"]
