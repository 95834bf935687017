"""A run on a published model's classes: from a diffusers folder to one, with adapters and in full."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file

from agents.algorithms.flow_grpo import FlowGRPO
from agents.learner import LearnerSettings
from agents.policies.backbone import BackboneSettings
from agents.policies.backbone_settings import Precision
from agents.policies.sd3 import SD3Policy
from agents.policies.tiny.sd3 import make_tiny_sd3
from agents.policies.weights import LoraSettings
from agents.samplers import ODE, FlowSDE
from envs.prompts import FixedPool
from experiments.cli import main
from pdtr.config import EvaluationConfig, TrainConfig
from pdtr.curriculum import SingleTask, pdtr_curriculum
from pdtr.evaluate import evaluate
from pdtr.launch import BASE, train
from pdtr.logbook import read_evaluations, read_metrics, read_scores
from pdtr.sampling import evaluation_sampler, load_policy, policy_folder
from pdtr.tasks import Task
from rewards.base import Prompt
from rewards.pixel import redness

HEIGHT, WIDTH = 48, 64
SETTINGS = BackboneSettings(height=HEIGHT, width=WIDTH, dtype="float32", max_sequence_length=16)
SAMPLER = ODE(2, 2.0, shift=None)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sd3(tmp_path_factory.mktemp("base") / "tiny")


def prompts(task: str, count: int, first: int) -> list[Prompt]:
    rng = np.random.default_rng(first)
    texts = ("a red circle", "two blue squares", "a black bench")
    sources = [(rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8),) if task == "edit" else () for _ in range(count)]
    return [Prompt(texts[i % 3], sources[i], {"tag": texts[i % 3]}, f"{task}/{first + i}") for i in range(count)]


def tasks() -> dict[str, Task]:
    return {
        name: Task(
            name, FixedPool(prompts(name, 4, 0)), redness, prompts(name, 2, 10), prompts(name, 2, 20), (HEIGHT, WIDTH)
        )
        for name in ("edit", "t2i")
    }


def config(folder: Path, base: Path, **changes: Any) -> TrainConfig:
    made = TrainConfig(
        output_dir=folder,
        base=base,
        backbone=SETTINGS,
        algorithm=FlowGRPO(FlowSDE(3, 2.0, shift=None)),
        curriculum=pdtr_curriculum(1, 1),
        num_prompts=2,
        group_size=2,
        chunk_size=4,
        learning_rate=1e-2,
        learner=LearnerSettings(1, ema_decay=0.5),
        lora=LoraSettings(4, 8),
        evaluation=EvaluationConfig(2, 2, every=2, sampler=SAMPLER, chunk_size=2, num_grid=2),
        num_threads=1,
    )
    return replace(made, **changes)


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train(config(folder, base), tasks()).is_file()
    return folder


def test_both_tasks_are_learnt_on_policy(run: Path) -> None:
    rows = read_metrics(run)
    assert [row["tasks"] for row in rows] == [["edit"], ["t2i"]]
    assert all(row["ratio_error"] == 0 and row["grad_norm"] > 0 and row["skipped_updates"] == 0 for row in rows)
    # A stage's reference is what the stage starts from: the base, then the first stage's adapters.
    assert [row["kl_loss"] for row in rows] == [0, 0]


def test_edits_of_several_pictures_are_learnt_on_policy(run: Path, base: Path, tmp_path: Path) -> None:
    """The second reference reaches the policy in rollouts, updates and evaluations."""
    practised = tasks()["edit"]
    rng = np.random.default_rng(7)
    others = {"tune": practised.tune, "final": practised.final, "pool": prompts("edit", 4, 0)}
    seconds = {
        name: [
            replace(one, source_images=(*one.source_images, rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)))
            for one in found
        ]
        for name, found in others.items()
    }
    task = replace(practised, pool=FixedPool(seconds["pool"]), tune=seconds["tune"], final=seconds["final"])
    train(config(tmp_path / "run", base, curriculum=SingleTask("edit", 2)), {"edit": task})
    rows = read_metrics(tmp_path / "run")
    assert all(row["ratio_error"] == 0 and row["grad_norm"] > 0 for row in rows)
    first, alone = (
        next(row for row in read_evaluations(folder) if (row["task"], row["label"]) == ("edit", "base"))
        for folder in (tmp_path / "run", run)
    )
    assert first["reward"] != pytest.approx(alone["reward"], abs=1e-4)
    with Image.open(tmp_path / "run" / "evaluations" / "sources-edit.png") as strip:
        assert strip.size == (2 * 2 * WIDTH, HEIGHT)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_learns_with_a_ratio_of_one(dtype: Precision, base: Path, tmp_path: Path) -> None:
    half = config(tmp_path / "run", base, backbone=replace(SETTINGS, dtype=dtype), curriculum=pdtr_curriculum(2, 2))
    train(half, tasks())
    rows = read_metrics(tmp_path / "run")
    assert all(row["ratio_error"] == 0 for row in rows)
    assert sum(row["skipped_updates"] for row in rows) < len(rows)
    assert all(row["grad_norm"] > 0 for row in rows if not row["skipped_updates"])
    adapters = load_file(tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors")
    assert all(tensor.isfinite().all() for tensor in adapters.values())
    assert any(tensor.any() for name, tensor in adapters.items() if "lora_B" in name)


@pytest.mark.parametrize("task", ["edit", "t2i"])
def test_the_policy_of_a_run_loads_and_draws_as_it_was_measured(run: Path, base: Path, task: str) -> None:
    policy = load_policy(policy_folder(run))
    assert isinstance(policy, SD3Policy)
    assert policy.settings == SETTINGS
    row = next(row for row in read_evaluations(run) if (row["task"], row["label"]) == (task, "after t2i"))
    measured = tasks()[task]
    untrained = load_policy(base, SETTINGS)
    found = {
        name: evaluate(one, measured.make_envs(2), measured.final, SAMPLER).reward
        for name, one in (("saved", policy), ("base", untrained))
    }
    logged = read_scores(run, row)["reward"]
    np.testing.assert_allclose(found["saved"], logged, atol=1e-3)
    assert not np.allclose(found["base"], logged, atol=1e-3)


def test_the_runs_adapters_make_its_policy_of_the_base(run: Path, base: Path) -> None:
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(base)
    pipeline.load_lora_weights(run / "lora")
    policy, plain = load_policy(policy_folder(run)), SD3Policy(pipeline, SETTINGS)
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        velocities = [
            one.velocity(x, torch.tensor(0.7), one.encode(prompts("edit", 2, 0)), 2.0) for one in (policy, plain)
        ]
    assert torch.allclose(*velocities, atol=1e-5)


def test_a_run_may_start_from_another(run: Path, tmp_path: Path) -> None:
    """In full, with float32 weights and passes in bfloat16, at the size that the first run's folder says."""
    changes: dict[str, Any] = {"curriculum": pdtr_curriculum(1, 1), "lora": None}
    settings = replace(SETTINGS, dtype="bfloat16", float32_weights=True, gradient_checkpointing=True)
    train(config(tmp_path / "run", run, backbone=settings, **changes), tasks())
    assert all(row["ratio_error"] == 0 and row["grad_norm"] > 0 for row in read_metrics(tmp_path / "run"))
    policy: Any = load_policy(policy_folder(tmp_path / "run"))
    assert policy.settings == settings
    assert (policy.dtype, policy.transformer.dtype) == (torch.bfloat16, torch.float32)
    assert not (tmp_path / "run" / "lora").exists()
    with pytest.raises(ValueError, match=r"expected float32 parameters to train in full, got torch\.bfloat16"):
        train(config(tmp_path / "other", run, backbone=replace(SETTINGS, dtype="bfloat16"), lora=None), tasks())


def test_settings_are_kept_and_those_of_another_policy_refused(run: Path, base: Path, tmp_path: Path) -> None:
    recorded = json.loads((run / "config.json").read_text())["config"]["backbone"]
    assert (recorded["class"], recorded["height"]) == ("BackboneSettings", HEIGHT)
    assert load_policy(base).image_size == (64, 64)
    published = shutil.copytree(base, tmp_path / "published")
    (published / "pdtr_settings.json").unlink()
    with pytest.raises(ValueError, match="expected at most 256 pixels for these weights' positions, got 512"):
        load_policy(published)
    with pytest.raises(ValueError, match="expected a model in diffusers' layout for the settings of a backbone"):
        load_policy(BASE, SETTINGS)


def test_how_a_published_model_is_drawn_from(run: Path, base: Path) -> None:
    assert evaluation_sampler(base) == ODE(28, 4.5, shift=None)
    assert evaluation_sampler(base, guidance_scale=1.0, shift=2.0) == ODE(28, 1.0, shift=2.0)
    assert evaluation_sampler(run) == evaluation_sampler(run / "policy") == SAMPLER


@pytest.mark.parametrize(
    ("options", "size"), [([], (HEIGHT, WIDTH)), (["--keep-shape"], (64, 32)), (["--scale", "1"], (HEIGHT, WIDTH))]
)
def test_the_command_line_draws_and_edits(run: Path, tmp_path: Path, options: list[str], size: Any) -> None:
    scale = 1 if "--scale" in options else 4
    Image.fromarray(np.full((80, 40, 3), 200, np.uint8)).save(tmp_path / "source.png")
    output = tmp_path / "grid.png"
    arguments = ["sample", "a purple cat", "--policy", str(run), "--num-images", "2", "--output", str(output)]
    with redirect_stdout(io.StringIO()) as said:
        assert main([*arguments, "--source-image", str(tmp_path / "source.png"), *options]) == 0
    assert said.getvalue().strip() == str(output)
    picture = np.asarray(Image.open(output))
    height, width = (side * scale for side in size)
    assert picture.shape == (height, 3 * (width + 2) - 2, 3)
    assert (picture[:, :width] == 200).all()
    assert (picture[:, width + 2 : 2 * width + 2] != picture[:, 2 * width + 4 :]).any()


def test_shapes_are_kept_for_published_models_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "grid.png")
    assert main(["sample", "a red circle", "--keep-shape", "--output", output]) == 2
    assert "keep_shape: expected a published model and a source image" in capsys.readouterr().err
