"""Images are drawn once: resumed, independent of the chunk, and never mixed with those of other settings."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from agents.policies.backbone import BackbonePolicy, BackboneSettings
from agents.policies.loading import load_backbone
from agents.policies.scenes import ScenesPolicy
from agents.policies.sd3 import UNIPIC2_EDIT_NEGATIVE_PROMPT
from agents.policies.tiny.sd3 import make_tiny_sd3
from agents.samplers import ODE, FlowSDE
from pdtr.benchmarks.base import Benchmark, Scorer
from pdtr.benchmarks.drawing import Artist, Plan, batches, draw
from pdtr.benchmarks.gedit import load_gedit
from pdtr.benchmarks.geneval import load_geneval
from pdtr.benchmarks.pictures import Picture
from pdtr.benchmarks.results import results_of
from pdtr.benchmarks.settings import (
    DrawingSettings,
    claim,
    describe,
    folder_sha256,
    model_settings,
    read_settings,
    shown_settings,
    squashed,
)
from pdtr.sampling import evaluation_sampler
from rewards.pixel import redness
from tests.pdtr.benchmarks.files import gedit_row, plain, png, write_geneval, write_parquet

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


def test_settings_from_before_shapes_were_kept_agree(tmp_path: Path) -> None:
    claim(tmp_path, settings())
    path = tmp_path / "settings.json"
    old = json.loads(path.read_text())
    del old["keep_shape"]
    path.write_text(json.dumps(old))
    claim(tmp_path, settings())
    with pytest.raises(ValueError, match="keep_shape False and not True"):
        claim(tmp_path, settings(keep_shape=True))


def test_settings_are_said_on_one_line() -> None:
    line = describe(settings().as_json())
    assert (
        line
        == "ODE, 40 steps, guidance 4.5, shift the policy's own, 512x512, seed 0, policy runs/a/policy (ffffffffffff)"
    )
    assert "nobody" in describe(None)
    model = {"negative_prompt": "", "edit_negative_prompt": "blurry, low quality, low resolution, distorted"}
    told = describe(settings(keep_shape=True, model=model).as_json())
    assert ", 512 on the longer side, seed 0, edit negative prompt 'blurry, low quality, low resolut ...', " in told


# Shapes


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> BackbonePolicy:
    """SD3 in miniature, which draws 64 pixels."""
    return load_backbone(make_tiny_sd3(tmp_path_factory.mktemp("sd3")))


def edits(folder: Path, *sizes: tuple[int, int]) -> Benchmark:
    """GEdit-Bench over plain pictures of these (height, width)."""
    pictures = [{"bytes": png(plain(size=size)), "path": "p.png"} for size in sizes]
    rows = [
        gedit_row(f"e{index}", "color_alter", input_image=picture, input_image_raw=picture)
        for index, picture in enumerate(pictures)
    ]
    return load_gedit(write_parquet(folder / "d.parquet", rows))


def test_edits_keep_their_sources_proportions(published: BackbonePolicy, tmp_path: Path) -> None:
    benchmark = edits(tmp_path, (24, 48), (30, 30), (96, 32), (10, 20))
    assert draw(published, benchmark, tmp_path / "images", SAMPLER, Plan(0, 3, keep_shape=True)) == 4
    images = [benchmark.layout.read(tmp_path / "images", item, 1)[0] for item in benchmark.items]
    # The longer side is the policy's 64 pixels, the other the nearest multiple of 32.
    assert [image.shape[:2] for image in images] == [(32, 64), (64, 64), (64, 32), (32, 64)]
    assert published.image_size == (64, 64)
    # What was drawn together, and at which size before, changes nothing.
    draw(published, replace(benchmark, items=benchmark.items[2:3]), tmp_path / "alone", SAMPLER, Plan(keep_shape=True))
    alone = benchmark.layout.read(tmp_path / "alone", benchmark.items[2], 1)[0]
    assert np.abs(alone.astype(int) - images[2]).max() <= 1


def test_the_size_is_the_policy_s_again_after_an_error(published: BackbonePolicy, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(published, edits(tmp_path, (24, 48)), tmp_path, SAMPLER, Plan(0, 1, stop, keep_shape=True))
    assert published.image_size == (64, 64)


def test_a_policy_of_one_size_keeps_no_shape(tiny_policy: ScenesPolicy, tmp_path: Path) -> None:
    artist = Artist(tmp_path, tiny_policy, SAMPLER)
    with pytest.raises(ValueError, match=r"keep_shape: expected a published model, got ScenesPolicy.*48x48 only"):
        artist.draw(edits(tmp_path, (24, 48)), tmp_path / "out", Plan(keep_shape=True))
    assert not (tmp_path / "out").exists()


def test_squashed_sources_are_told(tmp_path: Path) -> None:
    benchmark = edits(tmp_path, (24, 48), (30, 30), (30, 31), (96, 32))
    items, drawing = benchmark.items, settings(image_size=(64, 64)).as_json()
    # 30 x 31 is a square to within a multiple of 32.
    told = ("2 of 4 sources squashed to 64x64; --keep-shape keeps their proportions",)
    assert squashed(items, drawing) == told
    assert squashed(items, settings(image_size=(64, 64), keep_shape=True).as_json()) == squashed(items, None) == ()
    assert squashed(items[1:3], drawing) == ()
    found = results_of(benchmark, Scorer(redness, {}), [], drawing)
    assert found.deviations == (*benchmark.deviations, *told)
    assert squashed(load_geneval(write_geneval(tmp_path / "m.jsonl")).items, drawing) == ()


def test_a_picture_s_size_is_the_way_up_that_its_camera_meant(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for name in ("a.jpg", "a.png", "a.webp"):
        Image.fromarray(plain(size=(20, 30))).save(tmp_path / name, exif=exif)
        assert Picture(name, tmp_path / name).size() == Picture(name, tmp_path / name).load().shape[:2] == (30, 20)
    (tmp_path / "b.png").write_text("none")
    with pytest.raises(ValueError, match=r"b\.png: expected a PNG, JPEG, WEBP picture"):
        Picture("b.png", tmp_path / "b.png").size()


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


@pytest.mark.parametrize("has_index", [True, False])
def test_unipic2_s_own_folder_is_drawn_as_released(has_index: bool, tmp_path: Path) -> None:
    name = "model_index.json" if has_index else "transformer/config.json"
    kind = "StableDiffusion3KontextPipeline" if has_index else "SD3Transformer2DKontextModel"
    (tmp_path / "transformer").mkdir()
    (tmp_path / name).write_text(json.dumps({"_class_name": kind}))
    assert evaluation_sampler(tmp_path) == ODE(50, 3.5, shift=None)
    released = model_settings(tmp_path)
    assert released == BackboneSettings(edit_negative_prompt=UNIPIC2_EDIT_NEGATIVE_PROMPT)
    assert model_settings(tmp_path, edit_negative_prompt="", negative_prompt="dull") == BackboneSettings(
        negative_prompt="dull"
    )
    # A run says what it was trained with.
    (tmp_path / "pdtr_settings.json").write_text(json.dumps(asdict(BackboneSettings())))
    assert model_settings(tmp_path) == BackboneSettings()


def test_sd3_and_metaquery_have_defaults_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    assert evaluation_sampler(tmp_path) == ODE(28, 4.5, shift=None)
    assert model_settings(tmp_path) == BackboneSettings()
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "UniPic2MetaQueryPipeline"}))
    assert evaluation_sampler(tmp_path) == ODE(50, 3.5, shift=None)
    assert model_settings(tmp_path) == BackboneSettings(edit_negative_prompt=UNIPIC2_EDIT_NEGATIVE_PROMPT)


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
