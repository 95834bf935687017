"""``pdtr sample`` with published models: several sources, and what an image is guided away from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agents.policies.backbone import BackboneSettings
from agents.policies.sd3 import UNIPIC2_EDIT_NEGATIVE_PROMPT
from agents.policies.tiny.sd3 import make_tiny_sd3
from experiments.cli import main

SIDE = 64
Sample = Callable[..., Any]


@pytest.fixture(scope="module")
def kontext(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """UniPic2-Kontext in miniature, as it was released but for its size."""
    folder = make_tiny_sd3(tmp_path_factory.mktemp("kontext"))
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": "StableDiffusion3KontextPipeline"}))
    return folder


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.png" for name in ("tall", "wide")]
    for path, shape, value in zip(paths, ((40, 20), (30, 60)), (40, 200), strict=True):
        Image.fromarray(np.full((*shape, 3), value, np.uint8)).save(path)
    return paths


@pytest.fixture
def sample(kontext: Path, tmp_path: Path) -> Sample:
    """Draws one image; -> the whole picture."""

    def run(*arguments: object) -> Any:
        output = tmp_path / "grid.png"
        flags = ("--policy", kontext, "--num-images", 1, "--scale", 1, "--num-inference-steps", 2, "--output", output)
        assert main(["sample", "a red cat", *map(str, (*flags, *arguments))]) == 0
        return np.asarray(Image.open(output)).astype(int)

    return run


def test_several_sources_are_shown_to_the_model_in_order(sample: Sample, sources: list[Path]) -> None:
    both = sample("--source-image", *sources)
    assert both.shape == (SIDE, 3 * (SIDE + 2) - 2, 3)
    assert [both[0, column, 0] for column in (0, SIDE + 2)] == [40, 200]
    drawn = both[:, -SIDE:]
    for others in (sources[:1], sources[1:]):
        assert np.abs(drawn - sample("--source-image", *others)[:, -SIDE:]).max() > 1


def test_images_have_the_asked_size(sample: Sample, sources: list[Path]) -> None:
    assert sample("--height", 32, "--width", 48).shape == (32, 48, 3)
    assert sample("--height", 32, "--source-image", sources[0]).shape == (32, 2 * (SIDE + 2) - 2, 3)
    wide = sample("--height", 32, "--width", 32, "--source-image", sources[1], "--keep-shape")
    assert wide.shape == (32, 2 * (32 + 2) - 2, 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--height", "33"), "height: expected a multiple of 16"),
        (("--height", "0"), "height"),
        (("--width", "64", "--policy", ""), "width: only for models in diffusers' layout"),
    ],
)
def test_a_size_that_cannot_be_is_one_line(
    arguments: Sequence[str], said: str, kontext: Path, tmp_path: Path, capsys: Any
) -> None:
    policy = () if "--policy" in arguments else ("--policy", str(kontext))
    arguments = [part for part in arguments if part not in ("--policy", "")]
    assert main(["sample", "a cat", *policy, *arguments, "--output", str(tmp_path / "grid.png")]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_the_first_source_s_shape_is_kept(sample: Sample, sources: list[Path]) -> None:
    assert sample("--source-image", *sources, "--keep-shape").shape == (64, 3 * (32 + 2) - 2, 3)
    assert sample("--source-image", *sources[::-1], "--keep-shape").shape == (32, 3 * (64 + 2) - 2, 3)


def test_a_model_of_one_source_refuses_more(sources: list[Path], tmp_path: Path, capsys: Any) -> None:
    flags = ("--source-image", *map(str, sources), "--output", str(tmp_path / "grid.png"))
    assert main(["sample", "a red circle", *flags]) == 2
    assert "expected all with one source image" in capsys.readouterr().err.splitlines()[-1]


def test_a_negative_prompt_is_the_asked_one_of_the_task(sample: Sample, sources: list[Path]) -> None:
    edit = ("--source-image", sources[0])
    for flag, changes_an_edit in (("--negative-prompt", False), ("--edit-negative-prompt", True)):
        for arguments, is_changed in ((edit, changes_an_edit), ((), not changes_an_edit)):
            change = np.abs(sample(*arguments) - sample(*arguments, flag, "two blue dogs")).max()
            assert bool(change > 1) == is_changed


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), BackboneSettings(edit_negative_prompt=UNIPIC2_EDIT_NEGATIVE_PROMPT)),
        (("--edit-negative-prompt", ""), BackboneSettings()),
        (("--negative-prompt", "dull", "--edit-negative-prompt", "blur"), BackboneSettings(
            negative_prompt="dull", edit_negative_prompt="blur"
        )),
    ],
)  # fmt: skip
def test_unipic2_s_own_folder_has_the_released_negative_prompt(
    arguments: Sequence[str], expected: BackboneSettings, kontext: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = shutil.copytree(kontext, tmp_path / "released")
    (released / "pdtr_settings.json").unlink()
    asked: list[BackboneSettings | None] = []

    def load(folder: Path, settings: BackboneSettings | None) -> Any:
        asked.append(settings)
        raise ValueError("its 512 pixels are too many for the tiny model")

    monkeypatch.setattr("pdtr.sampling.load_policy", load)
    assert main(["sample", "a cat", "--policy", str(released), *arguments]) == 2
    assert asked == [expected]
