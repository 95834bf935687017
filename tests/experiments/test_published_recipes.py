"""Published recipes have the published constants, and their tiny twins run end to end."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from agents.algorithms.diffusion_nft import DiffusionNFT
from agents.algorithms.flow_grpo import FlowGRPO
from agents.policies.base import JOINT_ATTENTION
from agents.policies.flux import FluxKontextPolicy
from agents.samplers import FlowSDE
from envs.geneval_prompts import combination, load_rows
from experiments.cli import main
from experiments.published_rewards import PublishedRewards
from experiments.recipes import find_recipe, recipes
from pdtr.config import TrainConfig
from pdtr.curriculum import StageCurriculum
from pdtr.logbook import read_evaluations, read_metrics

TWINS = sorted(name for name in recipes() if name.endswith("_tiny"))
# What a twin may have otherwise than its recipe.
SIZES = {
    *("output_dir", "base", "backbone", "curriculum", "tasks", "rewards", "num_prompts", "group_size", "chunk_size"),
    *("evaluation", "checkpoint_every", "num_threads"),
}


def stages(config: TrainConfig) -> list[str]:
    assert isinstance(config.curriculum, StageCurriculum)
    return [stage.name for stage in config.curriculum.as_stages()]


def test_every_published_recipe_has_a_twin() -> None:
    modules = {f"experiments.recipes.{name}" for name in ("sd3", "unipic2", "editing")}
    published = {name for name, recipe in recipes().items() if recipe.__module__ in modules}
    assert {name.removesuffix("_tiny") for name in TWINS} == published


def test_unipic2_has_the_papers_constants() -> None:
    config = find_recipe("unipic2_pdtr")()
    assert isinstance(config.algorithm, FlowGRPO)
    sampler = config.algorithm.rollout_sampler
    assert isinstance(sampler, FlowSDE)
    assert (sampler.num_inference_steps, sampler.noise_level, config.algorithm.kl_coef) == (10, 0.7, 0.04)
    assert (config.group_size, config.num_prompts * config.group_size, config.learning_rate) == (16, 256, 3e-4)
    assert config.lora is not None
    assert (config.lora.rank, config.lora.alpha) == (32, 64)
    assert config.backbone is not None
    assert (config.backbone.height, config.backbone.width) == (512, 512)
    assert stages(config) == ["edit", "t2i"]
    # Nine of ten steps are learnt: timestep_fraction 0.99.
    assert sampler.stochastic_steps() == tuple(range(9))


def test_published_weights_of_the_kl_have_the_published_divisor() -> None:
    """0.04 and 0.01 are of code that leaves the steps' sizes out; the KL itself would weigh some 13 times as much."""
    found = {}
    for name, recipe in recipes().items():
        algorithm = recipe().algorithm
        if name not in TWINS and isinstance(algorithm, FlowGRPO) and algorithm.kl_divisor == "diffusion":
            found[name] = algorithm.kl_coef
    assert found == {
        "flow_grpo_sd3_geneval": 0.04,
        "flow_grpo_sd3_ocr": 0.04,
        "flow_grpo_sd3_pickscore": 0.01,
        "unipic2_pdtr": 0.04,
        "unipic2_metaquery_pdtr": 0.04,
    }


def test_prompts_have_the_published_number_of_tokens() -> None:
    found = {}
    for name in sorted(TWINS):
        backbone = find_recipe(name.removesuffix("_tiny"))().backbone
        assert backbone is not None
        found[name.removesuffix("_tiny")] = backbone.max_sequence_length
    # 0 is the model's own: 256 for UniPic2's; Qwen-Image-Edit's text encoder has no limit.
    own = {"unipic2_pdtr", "unipic2_metaquery_pdtr", "diffusion_nft_qwen_image_edit"}
    assert found == {name: 0 if name in own else 128 for name in found}


def test_flux_kontext_has_the_adapters_of_its_own_script() -> None:
    lora = find_recipe("flow_grpo_flux_kontext")().lora
    assert lora is not None
    assert (lora.rank, lora.alpha) == (64, 128)
    assert lora.target_modules is not None
    # What FLUX's policies have by default, and the single blocks' MLPs.
    assert set(lora.target_modules) == {*FluxKontextPolicy.lora_targets, "proj_mlp"}


def test_qwen_image_edit_adapts_attention_and_sees_sources_at_the_images_size() -> None:
    config = find_recipe("diffusion_nft_qwen_image_edit")()
    assert config.lora is not None
    assert config.backbone is not None
    assert (config.lora.rank, config.lora.alpha) == (32, 64)
    assert config.lora.target_modules == JOINT_ATTENTION
    assert config.backbone.reference_pixels == config.backbone.height * config.backbone.width == 512 * 512
    assert (config.num_prompts, config.group_size, config.chunk_size) == (24, 12, 3)


def test_flow_grpos_three_settings_differ_where_the_published_ones_do() -> None:
    found = {}
    for name in ("geneval", "ocr", "pickscore"):
        config = find_recipe(f"flow_grpo_sd3_{name}")()
        assert isinstance(config.algorithm, FlowGRPO)
        found[name] = (config.num_prompts, config.group_size, config.algorithm.kl_coef, config.learner.ema_every)
    assert found == {"geneval": (48, 24, 0.04, 8), "ocr": (48, 24, 0.04, 8), "pickscore": (48, 24, 0.01, 8)}


def test_diffusion_nft_is_free_of_guidance() -> None:
    for name in ("diffusion_nft_sd3_geneval", "diffusion_nft_qwen_image_edit"):
        algorithm = find_recipe(name)().algorithm
        assert isinstance(algorithm, DiffusionNFT)
        assert (algorithm.sampler().guidance_scale, algorithm.kl_coef, algorithm.beta) == (1.0, 1e-4, 1.0)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "data/editing/train.jsonl"),
        (["--tasks.edit-prompts", "here.jsonl"], "data/geneval/train.jsonl"),
        (["--tasks.t2i-prompts", "here.jsonl", "--tasks.edit-prompts", "here.jsonl"], "train one (pdtr edit-reward"),
    ],
)
def test_what_is_missing_is_one_line_before_anything_is_loaded(
    flags: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "here.jsonl").write_text("none of its rows is read\n")
    assert main(["train", "unipic2_pdtr", "--base", "model", *flags]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_missing_model_and_a_missing_file_say_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "Skywork/UniPic2-SD3.5M-Kontext-2B"
    assert main(["train", "unipic2_pdtr", "--base", f"models/{name}"]) == 2
    assert f"hf download {name} --local-dir models/{name}" in capsys.readouterr().err
    (tmp_path / "model").mkdir()
    assert main(["train", "flow_grpo_sd3_ocr", "--base", "model"]) == 2
    error = capsys.readouterr().err
    assert "data/ocr/train.txt" in error
    assert "--tasks.t2i-prompts FILE" in error


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the twins run: they share their tiny models."""
    return tmp_path_factory.mktemp("twins")


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_differs_in_sizes_and_runs_to_its_report(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    twin, real = find_recipe(name)(), find_recipe(name.removesuffix("_tiny"))()
    same = {entry.name for entry in fields(TrainConfig)} - SIZES
    assert {entry: getattr(twin, entry) for entry in same} == {entry: getattr(real, entry) for entry in same}
    assert type(twin.rewards) is type(real.rewards)
    assert type(twin.tasks) is type(real.tasks)
    assert twin.evaluation.sampler == real.evaluation.sampler
    assert main(["train", name]) == 0, capsys.readouterr().err
    run = twin.output_dir
    assert (run / "report.html").is_file()
    rows = read_metrics(run)
    assert [row["stage_name"] for row in rows] == stages(real)
    assert all(row["skipped_updates"] == 0 for row in rows)
    assert all(row[f"missing_ratio/{task}"] == 0 for row in rows for task in row["tasks"])
    # Where a group's rewards differ, it is learnt from; random pictures show no text, and may all be as good.
    differ = [any(row[f"zero_std_ratio/{task}"] < 1 for task in row["tasks"]) for row in rows]
    assert all(row["grad_norm"] > 0 for row, may_learn in zip(rows, differ, strict=True) if may_learn)
    assert differ[0] or (isinstance(twin.rewards, PublishedRewards) and twin.rewards.edit is None)
    # The average that is saved moves every ema_every steps, and so not at all in the shortest of Flow-GRPO's runs.
    adapters = load_file(run / "lora" / "pytorch_lora_weights.safetensors")
    # FLUX.1-Kontext's alone are in the MLPs too, and they are in those of the blocks that have no other.
    assert any(".proj_mlp." in name_of for name_of in adapters) == (name == "flow_grpo_flux_kontext_tiny")
    assert any("mlp" in name_of or ".ff." in name_of for name_of in adapters) == (name == "flow_grpo_flux_kontext_tiny")
    has_moved = any(bool(tensor.any()) for name_of, tensor in adapters.items() if ".lora_B." in name_of)
    is_averaged = len(rows) * real.learner.num_minibatches >= real.learner.ema_every
    assert has_moved == (is_averaged and any(differ))
    tasks = {task for row in rows for task in row["tasks"]}
    assert {row["task"] for row in read_evaluations(run)} == tasks
    assert all(np.isfinite(row["reward"]) for row in read_evaluations(run))


def test_prompts_for_geneval_leave_its_test_set_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["prompts", "geneval", "--output", "first.jsonl", "--num", "60"]) == 0
    assert main(["prompts", "geneval", "--output", "other.jsonl", "--num", "60", "--without", "first.jsonl"]) == 0
    assert "60 prompts, none of the 60 of first.jsonl" in capsys.readouterr().out
    first, other = ({combination(row) for row in load_rows(Path(name))} for name in ("first.jsonl", "other.jsonl"))
    assert not first & other
    # Without a test set the same seed draws the same prompts, which are then kept out: they are not empty sets.
    assert len(first) > 40
    assert main(["prompts", "geneval", "--output", "first.jsonl"]) == 2
    assert "choose another --output" in capsys.readouterr().err
