"""Conditions of a recipe: boxes and maps from the data to the network, any names in any order, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato import api
from sfumato.conditioners.layout import Layout, LayoutTokens
from sfumato.conditioners.semantic import Semantic
from sfumato.errors import UserError
from sfumato.replay import replay
from sfumato.systems import open_as
from sfumato.systems.latent import Latent
from sfumato.training import recipes, run, shapes

from .. import tiny
from .codec_cases import CROSS, JOINT, PLAIN, latent_recipe, latent_settings, task_for, trainer_for
from .shape_cases import boxes_iou, colours_drawn, maps_iou
from .training_cases import CPU, assert_equal

LAYOUT: dict[str, Any] = {"kind": "layout", "width": 8}
MAP: dict[str, Any] = {"kind": "semantic", "names": list(shapes.CLASSES)}
NUMBERS: dict[str, Any] = {
    "kind": "layout-tokens",
    "network": {"encoder_layers": 1, "encoder_ffn_dim": 16, "encoder_attention_heads": 2, "head_dim": 4, "d_model": 8},
}
TEXT = JOINT | {"network": JOINT["network"] | {"max_position_embeddings": 24}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    shapes.prepare(folder, count=20, size=16)
    return folder


def recipe_for(data: Path, conditions: dict[str, Any], **own: Any) -> Any:
    values = latent_settings(data, "pixels", conditions=conditions, **own)
    attended = any(c["kind"] not in ("semantic", "label") for c in conditions.values())
    values["model"] = values["model"] | {"network": CROSS if attended else PLAIN}
    return latent_recipe(values)


def test_layouts_reach_the_network(data: Path) -> None:
    task = task_for(recipe_for(data, {"where": LAYOUT | {"dropout": 0.0}}))
    part = task.model.conditioner.parts["where"]
    assert isinstance(part, Layout) and set(part.names) <= set(shapes.CLASSES) and part.width == 8
    told = task._entries(task.data, task.data.gather([0, 3]), torch.Generator(), True, CPU)
    for i, one in zip((0, 3), told, strict=True):
        boxes = task.data.records[i].columns["boxes"]
        assert [(box.label, *map(float, box[1:])) for box in one["where"]] == [(b["label"], *b["box"]) for b in boxes]


def test_maps_reach_the_network(data: Path) -> None:
    task = task_for(recipe_for(data, {"map": MAP | {"mixed": 4, "dropout": 0.0}}))
    part = task.model.conditioner.parts["map"]
    assert isinstance(part, Semantic) and part.names == shapes.CLASSES and part.channels == 4
    assert task.model.denoiser_config.in_channels == 3 + 4
    (told,) = task._entries(task.data, task.data.gather([5]), torch.Generator(), True, CPU)
    with Image.open(task.data.records[5].columns["map"]) as image:
        assert np.array_equal(told["map"].values.numpy(), np.asarray(image))


def test_objects_come_in_any_order_as_numbers(data: Path) -> None:
    task = task_for(recipe_for(data, {"layout": NUMBERS}))
    part = task.model.conditioner.parts["layout"]
    assert isinstance(part, LayoutTokens) and part.length == 92 and part.vocabulary == 8192
    index = next(i for i, r in enumerate(task.data.records) if len(r.columns["boxes"]) == 3)
    batch = task.data.gather([index] * 30)
    orders = {one["layout"] for one in task._entries(task.data, batch, torch.Generator().manual_seed(0), True, CPU)}
    assert len(orders) == 6 and len({frozenset(order) for order in orders}) == 1


def test_the_same_from_parquet(tmp_path: Path, data: Path) -> None:
    """Boxes as lists of structs, maps as encoded pictures in a column of their own."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in ("text", "boxes", "split")}
    columns["image"] = [{"bytes": (data / row["file_name"]).read_bytes()} for row in rows]
    columns["map"] = [{"bytes": (data / row["map"]).read_bytes()} for row in rows]
    parquet.write_table(pyarrow.table(columns), tmp_path / "shapes.parquet")
    conditions = {"layout": LAYOUT, "map": MAP}
    tasks = [task_for(recipe_for(place, conditions)) for place in (data, tmp_path / "shapes.parquet")]
    assert tasks[0].model_config() == tasks[1].model_config()
    told = [task._entries(task.data, task.data.gather([0, 7]), torch.Generator(), True, CPU) for task in tasks]
    assert told[0] == told[1]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_each_is_dropped_in_its_share(data: Path, share: float) -> None:
    conditions = {"layout": LAYOUT | {"dropout": share}, "map": MAP | {"dropout": 0.5}}
    task = task_for(recipe_for(data, conditions))
    entries: list[dict[str, Any]] = [{"layout": (), "map": 0} for _ in range(400)]
    kept = task._kept(entries, torch.Generator().manual_seed(0), True)
    gone = [{name for name in ("layout", "map") if name not in one} for one in kept]
    assert sum("layout" in one for one in gone) / 400 == pytest.approx(share, abs=0.07 if share == 0.5 else 0)
    assert sum("map" in one for one in gone) / 400 == pytest.approx(0.5, abs=0.07)
    assert sum(len(one) == 2 for one in gone) / 400 == pytest.approx(share * 0.5, abs=0.07)
    assert task._kept(entries, torch.Generator(), False) == entries


def test_the_order_of_a_recipe_changes_nothing(tmp_path: Path, data: Path) -> None:
    conditions = {"text": TEXT, "layout": LAYOUT, "map": MAP, "sort": {"kind": "label", "column": "label"}}
    ends = []
    for number, names in enumerate((list(conditions), list(reversed(conditions)))):
        recipe = recipe_for(data, {name: conditions[name] for name in names}, train={"steps": 2})
        trainer = trainer_for(recipe, tmp_path / str(number))
        trainer.train()
        ends.append({n: t.clone() for n, t in trainer.task.network.state_dict().items()})
    assert_equal(ends[0], ends[1])
    width = task_for(recipe_for(data, conditions)).model.conditioner.parts["layout"].width
    assert width == TEXT["network"]["d_model"]  # the text's, not its own


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A model that was trained a little to read words, layouts and maps."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train = {"steps": 8, "sample_every": 8, "samples": 2, "sample_steps": 2, "validate_every": 8}
    train |= {"optimizer": {"lr": 0.02, "warmup": 1}}
    recipe = recipe_for(data, {"text": TEXT, "layout": LAYOUT, "map": MAP}, train=train)
    assert run.train(recipe, folder, device=CPU, say=lambda _: None) == "finished"
    return folder / "model.safetensors"


def test_trained_stored_and_opened_again(everything: Path) -> None:
    model = open_as(Latent, everything)
    assert model.reads == {"text", "layout", "map"} and model.conditioner is not None
    assert {"layout", "map", "text"} == set(model.conditioner.parts)
    assert (everything.parent / "samples").is_dir()


def test_drawn_by_a_layout_and_a_map(everything: Path, data: Path, tmp_path: Path) -> None:
    model = api.load(everything, device="cpu")
    scene = json.loads((data / "metadata.jsonl").read_text().splitlines()[0])
    (tmp_path / "boxes.json").write_text(json.dumps(scene["boxes"]))
    how: dict[str, Any] = {"seed": 3, "steps": 2, "guidance": 30, "map": data / scene["map"]}  # it knows little yet
    (one,) = model.generate(scene["text"], layout=tmp_path / "boxes.json", **how)
    (same,) = model.generate(scene["text"], layout=scene["boxes"], **how)
    (other,) = model.generate(scene["text"], layout=[{"label": "red circle", "box": [0, 0, 1, 1]}], **how)
    assert one.tobytes() == same.tobytes() != other.tobytes()
    told = one.info["sfumato"]
    assert told["layout"] == scene["boxes"] and told["map"]["path"] == str((data / scene["map"]).resolve())
    assert set(told["map"]) == {"path", "sha256"}


def test_replayed(everything: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = json.loads((data / "metadata.jsonl").read_text().splitlines()[1])
    (tmp_path / "boxes.json").write_text(json.dumps(scene["boxes"]))
    (tmp_path / "map.png").write_bytes((data / scene["map"]).read_bytes())
    monkeypatch.chdir(tmp_path)
    tiny.succeed("generate", "--model", everything, "--layout", "boxes.json", "--map", "map.png", "--steps", 2,
                 "--seed", 4, "--count", 2, "--out", "out")  # fmt: skip
    (tmp_path / "boxes.json").unlink()  # it is in the picture
    done = tiny.succeed("replay", "out/5.png", "--model", everything, "--out", "again.png")
    assert "the same bytes" in done.out
    (tmp_path / "map.png").rename(tmp_path / "moved.png")
    with pytest.raises(UserError, match=r"the map, .*map.png, is not here; name it with --map PATH"):
        replay("out/5.png", everything)
    done = tiny.succeed("replay", "out/5.png", "--model", everything, "--map", "moved.png", "--out", "third.png")
    assert (tmp_path / "third.png").read_bytes() == (tmp_path / "out/5.png").read_bytes()
    with pytest.raises(UserError, match="the map is another one than the picture was drawn with"):
        replay("out/5.png", everything, pictures={"map": Image.new("L", (16, 16))})


def test_a_map_says_how_large_the_picture_is(everything: Path) -> None:
    model = api.load(everything, device="cpu")
    for size in ((16, 16), (24, 20), (18, 15)):
        assert model.generate(map=Image.new("L", size), seed=1, steps=1)[0].size == size
    with pytest.raises(UserError, match="the map is 16 x 16 pixels, the picture 32 x 16"):
        model.generate(map=Image.new("L", (16, 16)), width=32)
    with pytest.raises(UserError, match="a second pass at a larger size cannot follow a map"):
        model.generate(map=Image.new("L", (16, 16)), hires=2)


def test_guidance_leads_towards_a_layout_alone(everything: Path) -> None:
    model = api.load(everything, device="cpu")
    boxes = [{"label": "red circle", "box": [0, 0, 1, 1]}]
    a, b = (model.generate(layout=boxes, seed=1, steps=2, guidance=g)[0] for g in (1.0, 4.0))
    assert a.tobytes() != b.tobytes() and b.info["sfumato"]["guidance"] == 4.0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"layout": [{"label": "red circel", "box": [0, 0, 1, 1]}]}, "unknown class of objects .*'red circle'"),
        ({"layout": [{"label": "red circle", "box": [0, 0, 16, 16]}]}, "fractions of the picture's width and height"),
        ({"layout": "away.json"}, "there is no layout at away.json"),
        ({"map": "away.png"}, "there is no map at away.png"),
        ({"map": Image.new("L", (16, 16), 99)}, "the map has the class 99; this model knows 0 to 15"),
        ({"map": Image.new("RGB", (16, 16))}, "of mode RGB"),
    ],
)
def test_what_cannot_be_drawn(everything: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        api.load(everything, device="cpu").generate(seed=1, steps=1, **given)
    assert "\n" not in str(caught.value)


def test_models_that_take_neither(tmp_path: Path) -> None:
    model = api.load(tiny.write_tiny_model(tmp_path / "m.safetensors"), device="cpu")
    with pytest.raises(UserError, match="model m takes no layout; leave --layout out"):
        model.generate(layout=[])
    with pytest.raises(UserError, match="model m takes no map; leave --map out"):
        model.generate(map=Image.new("L", (8, 8)))


@pytest.mark.parametrize(
    ("conditions", "said"),
    [
        ({"layout": {"kind": "layuot"}}, r"unknown kind of condition 'layuot' \(did you mean 'layout'"),
        ({"layout": LAYOUT | {"captions": ["x"]}}, "captions does not belong to conditions of kind 'layout'"),
        ({"map": MAP | {"folder": "x"}}, "folder does not belong to conditions of kind 'semantic'"),
        ({"a": LAYOUT, "b": NUMBERS}, "conditions.a and conditions.b both read the user's layout"),
        ({"text": LAYOUT}, "conditions.text reads prompts, so it cannot be of kind 'layout'"),
        ({"layout": LAYOUT | {"dropout": 2}}, "conditions.layout.dropout: .*got 2"),
    ],
)
def test_recipes_that_are_refused(data: Path, conditions: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        recipe_for(data, conditions)


@pytest.mark.parametrize(
    ("conditions", "column", "value", "said"),
    [
        ({"layout": LAYOUT}, "boxes", [{"label": "a", "box": [1, 2, 3, 4]}], "00000.png in .*fractions of the"),
        ({"layout": LAYOUT}, "boxes", None, "00000.png in .* has no 'boxes'"),
        ({"layout": LAYOUT | {"names": ["red circle"]}}, "boxes", [], "unknown class of objects"),
        ({"map": MAP}, "map", "maps/away.png", "00000.png in .*the map 'maps/away.png' is not the name of a file"),
        ({"map": MAP | {"names": ["ground", "thing"]}}, "text", "a", "names of 2 classes, but there is a map with"),
    ],
)
def test_data_that_do_not_fit(
    tmp_path: Path, data: Path, conditions: dict[str, Any], column: str, value: Any, said: str
) -> None:
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    rows[0][column] = value
    for folder in ("pictures", "maps"):
        (tmp_path / folder).symlink_to(data / folder)
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=said):
        task_for(recipe_for(tmp_path, conditions))


# --- what is learnt


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many") / "shapes"
    shapes.prepare(folder)
    return folder


def learnt(name: str, data: Path, folder: Path) -> api.Model:
    """The packaged recipe, as it is."""
    assert run.train(recipes.load(name, data=str(data)), folder, device=CPU, say=lambda _: None) == "finished"
    return api.load(folder / "model.safetensors", device="cpu")


def unseen(count: int = 48) -> list[shapes.Scene]:
    """Scenes of another seed, none of which is in the set."""
    training, validation = shapes.scenes(4000, 32, 0)
    known = {scene.layout for scene in [*training, *validation]}
    return [scene for i in range(2 * count) if (scene := shapes.scene_of(77, i, 32)).layout not in known][:count]


@pytest.mark.slow
def test_boxes_are_obeyed(many: Path, tmp_path: Path) -> None:
    model, scenes = learnt("latent-layout", many, tmp_path / "run"), unseen()
    pictures = [model.generate(layout=shapes.row_of(s)["boxes"], seed=i)[0] for i, s in enumerate(scenes)]
    assert np.mean(boxes_iou(pictures, scenes)) >= 0.6


@pytest.mark.slow
def test_maps_are_obeyed(many: Path, tmp_path: Path) -> None:
    model, scenes = learnt("latent-semantic", many, tmp_path / "run"), unseen()
    drawn = [shapes.drawn(scene) for scene in scenes]
    pictures = [model.generate(map=classes, seed=i)[0] for i, (_, classes) in enumerate(drawn)]
    assert np.mean(list(maps_iou(pictures, [truth for truth, _ in drawn]).values())) >= 0.6


@pytest.mark.slow
def test_words_and_boxes_are_obeyed_together(many: Path, tmp_path: Path) -> None:
    """Together the boxes are where they were said and the colours those of the words; words alone give the colours."""
    model, scenes = learnt("latent-text-layout", many, tmp_path / "run"), unseen()
    together = [model.generate(s.caption, layout=shapes.row_of(s)["boxes"], seed=i)[0] for i, s in enumerate(scenes)]
    words = [model.generate(scene.caption, seed=i)[0] for i, scene in enumerate(scenes)]
    said = [{shape.colour for shape in scene.shapes} for scene in scenes]
    assert np.mean(boxes_iou(together, scenes)) >= 0.6 > 0.3 > np.mean(boxes_iou(words, scenes))
    for pictures, least in ((together, 0.8), (words, 0.6)):
        assert np.mean([colours_drawn(p) == s for p, s in zip(pictures, said, strict=True)]) >= least
