"""Images are drawn once: resumed, independent of the chunk, and never mixed with those of other settings."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.policies.backbone import BackboneSettings
from agents.policies.scenes import ScenesPolicy
from agents.samplers import ODE, FlowSDE
from pdtr.benchmarks.base import Benchmark
from pdtr.benchmarks.drawing import (
    DrawingSettings,
    Plan,
    batches,
    claim,
    describe,
    draw,
    folder_sha256,
    model_settings,
    read_settings,
    shown_settings,
)
from pdtr.benchmarks.gedit import load_gedit
from pdtr.benchmarks.geneval import load_geneval
from tests.pdtr.benchmarks.files import gedit_row, write_geneval, write_parquet

SAMPLER = ODE(2, 1.5)


@pytest.fixture
def geneval(tmp_path: Path) -> Benchmark:
    return load_geneval(write_geneval(tmp_path / "m.jsonl")).limited(None, 2)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def pixels(benchmark: Benchmark, root: Path) -> Any:
    return np.stack(
        [image for item in benchmark.items for image in benchmark.layout.read(root, item, benchmark.samples)]
    )


def test_the_chunk_changes_no_image_but_in_the_last_bits(
    tiny_policy: ScenesPolicy, geneval: Benchmark, tmp_path: Path
) -> None:
    for size in (1, 5, 64):
        assert draw(tiny_policy, geneval, tmp_path / str(size), SAMPLER, Plan(0, size)) == 12
    drawn = [pixels(geneval, tmp_path / str(size)).astype(int) for size in (1, 5, 64)]
    assert max(np.abs(drawn[0] - other).max() for other in drawn[1:]) <= 1
    # Samples and prompts have noise of their own.
    assert len({image.tobytes() for image in drawn[0]}) == 12


def test_what_is_there_is_not_drawn_again(tiny_policy: ScenesPolicy, geneval: Benchmark, tmp_path: Path) -> None:
    root = tmp_path / "images"
    draw(tiny_policy, geneval, root, SAMPLER, Plan(0, 4))
    whole = files(root)
    (root / "00003" / "samples" / "0001.png").unlink()
    kept = root / "00000" / "samples" / "0000.png"
    kept.write_bytes(b"kept as it is")
    told: list[tuple[int, int]] = []
    plan = Plan(0, 4, lambda done, total: told.append((done, total)))
    assert draw(tiny_policy, geneval, root, SAMPLER, plan) == 1
    assert told == [(1, 1)]
    again = files(root)
    assert again.pop("00000/samples/0000.png") == b"kept as it is"
    assert {name: again[name] for name in again if "00003" not in name} == {
        name: whole[name] for name in whole if "00003" not in name and name != "00000/samples/0000.png"
    }
    found = np.asarray(geneval.layout.read(root, geneval.items[3], 2)[1]).astype(int)
    (root / "00003" / "samples" / "0001.png").write_bytes(whole["00003/samples/0001.png"])
    assert np.abs(found - geneval.layout.read(root, geneval.items[3], 2)[1]).max() <= 1


def test_a_stopped_drawing_keeps_what_it_has(tiny_policy: ScenesPolicy, geneval: Benchmark, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(tiny_policy, geneval, tmp_path, SAMPLER, Plan(0, 2, stop))
    assert len(list(tmp_path.rglob("*.png"))) == 4
    assert draw(tiny_policy, geneval, tmp_path, SAMPLER, Plan(0, 2)) == 8


def test_another_seed_draws_other_images(tiny_policy: ScenesPolicy, geneval: Benchmark, tmp_path: Path) -> None:
    few = geneval.limited(1, 1)
    for seed in (0, 1):
        draw(tiny_policy, few, tmp_path / str(seed), SAMPLER, Plan(seed))
    assert not np.array_equal(pixels(few, tmp_path / "0"), pixels(few, tmp_path / "1"))


def test_a_stochastic_sampler_draws_the_same_in_any_chunk(
    tiny_policy: ScenesPolicy, geneval: Benchmark, tmp_path: Path
) -> None:
    few = geneval.limited(2, 2)
    for size in (1, 4):
        draw(tiny_policy, few, tmp_path / str(size), FlowSDE(3), Plan(0, size))
    assert np.abs(pixels(few, tmp_path / "1").astype(int) - pixels(few, tmp_path / "4")).max() <= 1


def test_edits_are_drawn_from_their_sources_at_the_policy_s_size(tiny_policy: ScenesPolicy, tmp_path: Path) -> None:
    rows = [gedit_row("a", "color_alter"), gedit_row("b", "color_alter", instruction="change a")]
    rows[1]["input_image_raw"] = gedit_row("b", "x")["input_image"]
    benchmark = load_gedit(write_parquet(tmp_path / "d.parquet", rows))
    asked: list[Any] = []
    encode = tiny_policy.encode
    tiny_policy.encode = lambda prompts: asked.extend(prompts) or encode(prompts)  # type: ignore[method-assign, func-returns-value]
    draw(tiny_policy, benchmark, tmp_path / "images", SAMPLER, Plan(0, 8))
    assert {prompt.source_images[0].shape for prompt in asked} == {(*tiny_policy.image_size, 3)}
    folder = tmp_path / "images" / "fullset" / "color_alter" / "en"
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "a_SRCIMG.png", "b.png", "b_SRCIMG.png"]


def test_items_stay_together_in_a_batch(geneval: Benchmark) -> None:
    missing = [(item, list(range(count))) for item, count in zip(geneval.items, (2, 2, 1, 9, 1, 1), strict=True)]
    sizes = [[len(samples) for _, samples in batch] for batch in batches(missing, 4)]
    assert sizes == [[2, 2], [1], [9], [1, 1]]


# Settings


def settings(**changes: Any) -> DrawingSettings:
    made = DrawingSettings("geneval", "0123", 4, "runs/a/policy", "ff" * 32, "ODE", 40, 4.5, None, (512, 512), 0)
    return replace(made, **changes)


def test_the_same_settings_agree_wherever_the_policy_lies(tmp_path: Path) -> None:
    claim(tmp_path, settings())
    claim(tmp_path, settings(policy="elsewhere", model=None))
    assert read_settings(tmp_path) == settings().as_json()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"guidance_scale": 7.0}, "guidance_scale 4.5 and not 7.0"),
        ({"num_inference_steps": 10, "seed": 1}, "num_inference_steps 40 and not 10; seed 0 and not 1"),
        ({"policy_sha256": "00" * 32}, "policy_sha256"),
        ({"shift": 3.0}, "shift None and not 3.0"),
        ({"image_size": (512, 256)}, r"image_size \[512, 512\] and not \[512, 256\]"),
    ],
)
def test_other_settings_are_an_error_that_names_them(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    claim(tmp_path, settings())
    with pytest.raises(ValueError, match=told):
        claim(tmp_path, settings(**changes))


def test_images_of_unknown_settings_are_not_added_to(tmp_path: Path) -> None:
    (tmp_path / "images" / "00000").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"unknown settings.*--images"):
        claim(tmp_path, settings())
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        claim(tmp_path, settings())


def test_settings_are_said_on_one_line() -> None:
    line = describe(settings().as_json())
    assert (
        line
        == "ODE, 40 steps, guidance 4.5, shift the policy's own, 512x512, seed 0, policy runs/a/policy (ffffffffffff)"
    )
    assert "nobody" in describe(None)


def test_a_folder_s_hash_is_of_names_and_contents(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "w.bin").write_bytes(b"1")
    assert folder_sha256(tmp_path / "a") == folder_sha256(tmp_path / "b")
    (tmp_path / "b" / "deep" / "w.bin").write_bytes(b"2")
    assert folder_sha256(tmp_path / "a") != folder_sha256(tmp_path / "b")


# Published models


def test_a_published_model_is_loaded_as_it_was_saved_but_for_what_is_asked(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    saved = {**asdict(BackboneSettings()), "negative_prompt": "blurred", "width": 256}
    (tmp_path / "pdtr_settings.json").write_text(json.dumps(saved))
    found = model_settings(tmp_path, height=128, width=None, dtype="float16")
    assert found == BackboneSettings(height=128, width=256, dtype="float16", negative_prompt="blurred")
    shown = shown_settings(found)
    assert shown is not None
    assert (shown["dtype"], shown["negative_prompt"]) == ("float16", "blurred")
    # What changes speed alone may change between two parts of a drawing.
    assert shown == shown_settings(replace(found, compile=True, slice_vae=False, offload_encoders=False))
    assert ", float16, policy" in describe(settings(model=shown).as_json())


def test_a_policy_of_the_embedded_world_has_no_such_settings(tiny_policy: ScenesPolicy, tmp_path: Path) -> None:
    tiny_policy.save(tmp_path)
    assert shown_settings(model_settings(tmp_path, height=None)) is None
    with pytest.raises(ValueError, match="height: only for models in diffusers' layout"):
        model_settings(tmp_path, height=64, width=None)


def test_a_repository_of_the_hub_is_known_by_its_name() -> None:
    assert folder_sha256(Path("owner/name")) == folder_sha256(Path("owner/name")) != folder_sha256(Path("owner/other"))


def test_drawing_leaves_no_gradients(tiny_policy: ScenesPolicy, geneval: Benchmark, tmp_path: Path) -> None:
    draw(tiny_policy, geneval.limited(1, 1), tmp_path, SAMPLER, Plan())
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in tiny_policy.transformer.parameters())
