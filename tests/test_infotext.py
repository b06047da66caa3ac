"""Settings as other programs write them: AUTOMATIC1111's keys and names, both ways, and ComfyUI's graph."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.diffusion.grid import GRIDS
from sfumato.diffusion.solvers import SOLVERS, find
from sfumato.errors import UserError
from sfumato.infotext import _SAMPLERS, _SCHEDULES, infotext, parse_comfy, parse_infotext, program_of

from .test_images import FULL


def line(settings: dict[str, Any]) -> str:
    """The settings of the text, without prompts and version."""
    return infotext(settings).splitlines()[-1].rpartition(", Version")[0]


def test_infotext_is_the_published_form() -> None:
    text, version = infotext(FULL | {"model_hash": "abcdef1234567890"}).split(", Version: ")
    assert text == (
        "a fox, oil on canvas\n"
        "Negative prompt: blurry: very\n"
        "Steps: 20, Sampler: DDIM, Schedule type: Karras, CFG scale: 7.0, Seed: 1099511627776, Size: 64x32, "
        'Model hash: abcdef1234, Model: "fox, the second", Denoising strength: 0.7'
    )
    assert version.startswith("Sfumato ")


def test_infotext_leaves_out_what_is_none() -> None:
    text = infotext({"prompt": None, "negative": "", "seed": 0, "sampler": None, "width": 3, "guidance": 0.0})
    assert text.rpartition(", Version")[0].strip() == "CFG scale: 0.0, Seed: 0"


def test_infotext_round_trip() -> None:
    back = parse_infotext(infotext(FULL))
    assert back.pop("version").startswith("Sfumato ")
    assert back == FULL | {"sampler": "DDIM", "schedule": "Karras"}


def test_foreign_infotext() -> None:
    text = (
        "a fox, (red:1.2)\nsecond line \nNegative prompt: blurry\nlow quality\n"
        "Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5.5, Seed: 1, Size: 512x768, "
        'Model hash: abcdef1234, Model: a-b_c, Clip skip: 2, Lora hashes: "x: 1, y: 2", Version: v1.10.1'
    )
    parsed = parse_infotext(text)
    assert parsed == {
        "prompt": "a fox, (red:1.2)\nsecond line",
        "negative": "blurry\nlow quality",
        "steps": 28,
        "sampler": "DPM++ 2M",
        "schedule": "Karras",
        "guidance": 5.5,
        "seed": 1,
        "width": 512,
        "height": 768,
        "model_hash": "abcdef1234",
        "model": "a-b_c",
        "clip_skip": 1,
        "other": {"Lora hashes": "x: 1, y: 2"},
        "version": "v1.10.1",
    }
    assert parse_infotext(infotext(parsed)) | {"version": "v1.10.1"} == parsed


def test_two_pairs_are_a_prompt_and_wrong_numbers_are_kept() -> None:
    assert parse_infotext("fox: red, dog: blue") == {"prompt": "fox: red, dog: blue"}
    assert parse_infotext("  \n ") == {}
    parsed = parse_infotext("Steps: many, Size: big, Seed: 3")
    assert parsed == {"prompt": "", "seed": 3, "other": {"Steps": "many", "Size": "big"}}
    with pytest.raises(UserError, match="at most 100000 are read"):
        parse_infotext("a" * 100_001)


@pytest.mark.parametrize("unit", ["a", "a ", " ", "a:", 'ab:"x,', 'ab:"\\', '"'])
def test_long_lines_take_linear_time(unit: str) -> None:
    start = time.process_time()
    parse_infotext(unit * (90_000 // len(unit)))
    assert time.process_time() - start < 2


@given(st.text(max_size=200))
def test_any_text_parses(text: str) -> None:
    assert isinstance(parse_infotext(text), dict)


# --- each thing under A1111's key ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"seed": 7, "variation": 8, "strength": 0.2}, "Seed: 7, Variation seed: 8, Variation seed strength: 0.2"),
        ({"seed": 7, "edit": {"strength": 0.4}}, "Seed: 7, Denoising strength: 0.4"),
        (
            {"width": 96, "height": 96, "hires": {"width": 64, "height": 64, "strength": 0.4}},
            "Size: 64x64, Denoising strength: 0.4, Hires upscale: 1.5",
        ),
        (
            {"width": 60, "height": 46, "hires": {"width": 40, "height": 31, "strength": 0.5}},
            "Size: 40x31, Denoising strength: 0.5, Hires upscale: 1.5",
        ),
        (
            {"width": 60, "height": 90, "hires": {"width": 40, "height": 32, "strength": 0.5}},
            "Size: 40x32, Denoising strength: 0.5, Hires resize: 60x90",
        ),
        (
            {"variation": 8, "strength": 0.1, "width": 16, "height": 16,
             "hires": {"width": 8, "height": 8, "strength": 0.5}},
            "Size: 8x8, Variation seed: 8, Variation seed strength: 0.1, Denoising strength: 0.5, Hires upscale: 2",
        ),
        ({"clip_skip": 0}, "Clip skip: 1"),
        ({"clip_skip": 1}, "Clip skip: 2"),
        ({"opening": {"vae": {"path": "/a/b/soft.pt", "sha256": "0123456789abc"}}},
         "VAE hash: 0123456789, VAE: soft.pt"),
        ({"sampler": "dpmpp_3m", "schedule": "leading"}, "Sampler: dpmpp_3m, Schedule type: leading"),
        ({"guidance_rescale": 0.7, "steps": 3}, "Steps: 3"),
    ],
)  # fmt: skip
def test_what_a_finished_picture_has_stands_under_its_key(settings: dict[str, Any], told: str) -> None:
    assert line(settings) == told


@pytest.mark.parametrize("settings", [{"clip_skip": "x"}, {"hires": {}}, {"hires": {"width": "a"}}, {"edit": 3}])
def test_settings_that_someone_changed_do_no_harm(settings: dict[str, Any]) -> None:
    assert infotext(settings | {"width": 8, "height": 8})


def test_names_are_a1111s_and_ours_find_them_again() -> None:
    assert _SAMPLERS.keys() <= SOLVERS.keys() and _SCHEDULES.keys() <= GRIDS.keys()
    for ours, theirs in _SAMPLERS.items():
        assert find(theirs)[0].name == ours
    assert line({"sampler": "dpmpp_2m", "schedule": "sgm_uniform"}) == "Sampler: DPM++ 2M, Schedule type: SGM Uniform"


def test_a1111s_keys_are_read_into_our_names() -> None:
    parsed = parse_infotext(
        "fox\nSteps: 20, Seed: 1, Size: 512x512, VAE hash: 735e4c3a44, VAE: soft.safetensors, Variation seed: 8, "
        "Variation seed strength: 0.2, Denoising strength: 0.4, Clip skip: 3, Hires upscale: 1.5, Hires steps: 4"
    )
    assert parsed == {
        "prompt": "fox", "steps": 20, "seed": 1, "width": 512, "height": 512, "vae_hash": "735e4c3a44",
        "vae": "soft.safetensors", "variation": 8, "variation_strength": 0.2, "hires": 1.5, "hires_strength": 0.4,
        "clip_skip": 2, "other": {"Hires steps": "4"},
    }  # fmt: skip
    again = parse_infotext(infotext(parsed))
    assert again.pop("version") and again == parsed


def test_one_label_is_sorted_by_its_neighbours() -> None:
    alone = "Steps: 2, Seed: 3, Denoising strength: 0.4"
    assert parse_infotext(alone)["strength"] == 0.4
    resized = parse_infotext(f"{alone}, Hires resize: 8x8")
    assert resized["hires_strength"] == 0.4 and resized["other"] == {"Hires resize": "8x8"}
    half = parse_infotext(f"{alone}, Variation seed: 4, Clip skip: 0")
    assert half["strength"] == 0.4 and half["other"] == {"Clip skip": "0", "Variation seed": "4"}


# --- other programs -----------------------------------------------------------------------------------------------

GRAPH: dict[str, Any] = {
    "3": {"class_type": "KSampler", "inputs": {
        "seed": 5, "steps": 20, "cfg": 8, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1,
        "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}},
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "fox.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a fox", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["4", 1]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0]}},
}  # fmt: skip
READ = {
    "prompt": "a fox", "negative": "blurry", "seed": 5, "steps": 20, "guidance": 8, "sampler": "dpmpp_2m",
    "schedule": "karras", "model": "fox.safetensors", "width": 512, "height": 768, "version": "ComfyUI",
}  # fmt: skip


def changed(node: str, **inputs: Any) -> dict[str, Any]:
    return GRAPH | {node: GRAPH[node] | {"inputs": GRAPH[node]["inputs"] | inputs}}


def test_a_plain_graph_is_read() -> None:
    assert parse_comfy(json.dumps(GRAPH)) == READ
    assert (parse_comfy(json.dumps(changed("3", denoise=0.5))) or {})["strength"] == 0.5
    lone = {key: value for key, value in READ.items() if key != "negative"}
    assert parse_comfy(json.dumps(changed("3", negative=["12", 0]))) == lone
    more = parse_comfy(json.dumps(GRAPH | {"10": {"class_type": "LoraLoader", "inputs": {}}}))
    assert more == READ | {"other": {"Nodes that are not read": "LoraLoader"}}


@pytest.mark.parametrize(
    "graph",
    [
        changed("6", text=["10", 0]),
        changed("3", seed=["10", 0]),
        changed("3", positive=["12", 0]),
        changed("3", positive=None),
        GRAPH | {"10": GRAPH["3"]},
        GRAPH | {"3": GRAPH["3"] | {"class_type": "KSamplerAdvanced"}},
        GRAPH | {"3": {"class_type": "KSampler"}},
        {},
    ],
)
def test_another_graph_is_not(graph: dict[str, Any]) -> None:
    assert parse_comfy(json.dumps(graph)) is None


@pytest.mark.parametrize(
    ("texts", "program"),
    [
        ({"prompt": json.dumps(GRAPH)}, "ComfyUI"),
        ({"workflow": '{"nodes": []}'}, "ComfyUI"),
        ({"invokeai_metadata": "{}"}, "InvokeAI"),
        ({"Dream": '"a fox" -s50 -S7'}, "InvokeAI"),
        ({"Comment": '{"steps": 28, "uc": "blurry"}'}, "NovelAI"),
        ({"Software": "NovelAI", "Description": "a fox"}, "NovelAI"),
        ({"Comment": "Created with GIMP", "Software": "GIMP", "prompt": "a fox"}, None),
        ({"prompt": "[" * 100_000}, None),
        ({}, None),
    ],
)
def test_whose_settings_they_are(texts: dict[str, str], program: str | None) -> None:
    assert program_of(texts) == program


@given(st.recursive(st.none() | st.text() | st.integers() | st.floats(), lambda inner: st.dictionaries(
    st.sampled_from(["class_type", "inputs", "KSampler", "positive", "1"]), inner | st.just("KSampler"))))  # fmt: skip
def test_any_json_is_read_or_not(value: Any) -> None:
    text = json.dumps(value)
    assert parse_comfy(text) is None and program_of({"prompt": text}) in (None, "ComfyUI")
