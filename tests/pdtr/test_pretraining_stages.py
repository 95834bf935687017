"""The three stages: the published numbers, what each trains, the cycle, and resuming to the bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.policies.backbone_settings import BackboneSettings
from agents.policies.metaquery import MetaQueryPolicy
from agents.policies.scenes import ScenesPolicy, ScenesPolicyConfig
from envs.scenes.pretraining import SupervisedBatch
from pdtr.pretraining_data import ScenesSource
from pdtr.pretraining_loop import LOG, pretrain_stage
from pdtr.pretraining_objective import flow_matching_loss, trained_modules
from pdtr.pretraining_run import StageRun
from pdtr.pretraining_stages import PUBLISHED, Stage, StageConfig, learning_rate_scale
from pdtr.pretraining_state import restore_stage, save_stage
from tests.agents.tiny_metaquery import make_metaquery
from tests.pdtr.stage_jobs import SIZES, held_out, make_base, save_metaquery

Make = Callable[[], MetaQueryPolicy]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny MetaQuery policy of the embedded world in a folder, its language model random."""
    root = tmp_path_factory.mktemp("made")
    make_base().save(root / "base")
    save_metaquery(root / "base", root / "policy")
    return root / "policy"


@pytest.fixture
def policy(made: Path) -> MetaQueryPolicy:
    return load(made)


def load(folder: Path) -> MetaQueryPolicy:
    from experiments.metaquery_phases import SETTINGS

    return MetaQueryPolicy.load(folder, SETTINGS)


class Same:
    """The same batches again and again."""

    def __init__(self, batches: dict[str, SupervisedBatch]) -> None:
        self.batches = batches

    def next_batch(self, task: str) -> SupervisedBatch:
        return self.batches[task]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass

    def load_shares(self, states: Sequence[Mapping[str, Any]]) -> None:
        pass


def small(stage: Stage, output_dir: Path, **changes: Any) -> StageConfig:
    examples = 5 if stage == "A" else 8
    sizes: dict[str, Any] = {"num_steps": 4, "global_batch_size": examples, "checkpoint_every": 2, "evaluate_every": 2}
    return replace(PUBLISHED[stage], output_dir=output_dir, **{"learning_rate": 1e-3, **sizes, **changes})


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_published_numbers() -> None:
    found = {
        stage: (config.num_steps, config.learning_rate, config.global_batch_size, set(config.cycle))
        for stage, config in PUBLISHED.items()
    }
    assert found == {
        "A": (500_000, 1e-4, 1024, {"t2i"}),
        "B": (200_000, 4e-5, 128, {"t2i", "edit"}),
        "C": (200_000, 4e-5, 128, {"t2i", "edit"}),
    }
    for config in PUBLISHED.values():
        assert (config.betas, config.eps, config.weight_decay) == ((0.9, 0.95), 1e-8, 0.05)
        assert (config.text_dropout, config.edit_text_dropout, config.sigma_shift) == (0.1, 0.0, 3.0)


def test_the_rate_warms_up_for_a_hundredth_and_falls_as_a_cosine() -> None:
    config = StageConfig(num_steps=1000)
    assert learning_rate_scale(config, 0) == pytest.approx(1e-5)
    assert learning_rate_scale(config, 5) == pytest.approx(0.500005)
    assert learning_rate_scale(config, 10) == 1
    assert learning_rate_scale(config, 505) == pytest.approx(0.5)
    assert learning_rate_scale(config, 10 + 330) == pytest.approx(0.75)
    assert learning_rate_scale(config, 999) == pytest.approx(2.517e-6, rel=1e-3)


@pytest.mark.parametrize("stage", ["A", "C"])
def test_a_stage_trains_its_modules_and_the_language_model_answers_as_before(
    stage: Stage, policy: MetaQueryPolicy, tmp_path: Path
) -> None:
    before = {name: state(module) for name, module in _modules(policy).items()}
    spoken = _answer(policy)
    run = StageRun(small(stage, tmp_path), policy, ScenesSource(SIZES), held_out())
    folder = pretrain_stage(run, report=lambda line: None)
    changed = {name for name, module in _modules(policy).items() if not same(before[name], state(module))}
    assert changed == ({"connector"} if stage == "A" else {"connector", "transformer"})
    assert all(torch.equal(a, b) for a, b in zip(spoken, _answer(policy), strict=True))
    moved = state(policy.connector)
    assert all(not torch.equal(moved[k], v) for k, v in before["connector"].items() if k.endswith("weight"))
    assert not torch.equal(moved["meta_queries"], before["connector"]["meta_queries"])
    assert same(moved, state(load(folder).connector))


def _modules(policy: MetaQueryPolicy) -> dict[str, torch.nn.Module]:
    return {"connector": policy.connector, "transformer": policy.transformer, "lmm": policy.lmm}


def _answer(policy: MetaQueryPolicy) -> list[Tensor]:
    """Logits of what the language model says of a picture, as anyone would ask it."""
    batch = policy.reader.tokenize(["what is it?"], [(np.full((48, 48, 3), 90, np.uint8),)])
    said = policy.lmm.generate(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        pixel_values=batch.pixels,
        image_grid_thw=batch.grids,
        mm_token_type_ids=(batch.ids == policy.reader.image_id).int(),
        max_new_tokens=3,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return list(said.logits)


def test_stage_b_trains_the_transformer_behind_frozen_encoders(tmp_path: Path) -> None:
    policy = make_base()
    words, transformer = state(policy.words), state(policy.transformer)
    run = StageRun(small("B", tmp_path), policy, ScenesSource(SIZES), held_out())
    lines: list[str] = []
    folder = pretrain_stage(run, report=lines.append)
    assert same(words, state(policy.words))
    assert not same(transformer, state(policy.transformer))
    assert same(state(policy.transformer), state(ScenesPolicy.load(folder).transformer))
    assert len(lines) == 2
    rows = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[0]["held_out"].keys() == {"edit", "t2i"}


def test_a_policy_without_a_connector_is_refused() -> None:
    with pytest.raises(ValueError, match="stage A: expected a MetaQueryPolicy"):
        StageRun(PUBLISHED["A"], make_base(), ScenesSource(SIZES))


@pytest.mark.parametrize("muon_learning_rate", [0.0, 1e-3])
def test_a_resumed_stage_equals_the_one_that_was_never_stopped(
    made: Path, tmp_path: Path, muon_learning_rate: float
) -> None:
    def run(name: str) -> StageRun:
        config = small("C", tmp_path / name, muon_learning_rate=muon_learning_rate)
        return StageRun(config, load(made), ScenesSource(SIZES, seed=3), held_out())

    whole = run("whole")
    pretrain_stage(whole, report=lambda line: None)
    pretrain_stage(run("parts"), report=lambda line: None)
    # Throw the last steps away: what is left is the checkpoint of step 2.
    shutil.rmtree(tmp_path / "parts" / "step-000004")
    lines: list[str] = []
    resumed = run("parts")
    pretrain_stage(resumed, resume=True, report=lines.append)
    assert "resumed at step 2" in lines[0]
    for name, module in whole.modules.items():
        assert same(state(module), state(resumed.modules[name]))
    assert whole.source.state_dict() == resumed.source.state_dict() == {"drawn": {"edit": 4, "t2i": 4}}
    logs = [
        [{**json.loads(line), "seconds": 0} for line in (tmp_path / name / LOG).read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1]


def test_a_gradient_that_is_not_finite_is_left_out_and_remembered(made: Path, tmp_path: Path) -> None:
    run = StageRun(small("C", tmp_path), load(made), ScenesSource(SIZES), held_out())
    before = {name: state(module) for name, module in run.modules.items()}
    run.parameters[0].grad = torch.full_like(run.parameters[0], torch.inf)
    run._step()
    assert run.num_skipped == 1
    assert all(same(before[name], state(module)) for name, module in run.modules.items())
    assert all(parameter.grad is None for parameter in run.parameters)
    path = save_stage(run)
    again = StageRun(small("C", tmp_path), load(made), ScenesSource(SIZES), held_out())
    restore_stage(again, path)
    assert again.num_skipped == 1
    # The hundredth in a row is the last.
    run._skipped_in_a_row = 99
    run.parameters[0].grad = torch.full_like(run.parameters[0], torch.nan)
    with pytest.raises(ValueError, match="got 100 in a row that were not; train in bfloat16"):
        run._step()


def test_a_stage_in_float16_learns_under_a_scaled_loss(tmp_path: Path) -> None:
    settings = BackboneSettings(height=64, width=64, dtype="float16", float32_weights=True)
    folder = make_metaquery(tmp_path, settings)
    policy = MetaQueryPolicy.load(folder, settings)
    before = {name: state(module) for name, module in trained_modules(policy, "C").items()}
    pictures = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
    batches = {
        "edit": SupervisedBatch(("make the square blue",) * 3, pictures[:3], pictures[5:]),
        "t2i": SupervisedBatch(("a red circle",) * 5, pictures[:5], None),
    }
    run = StageRun(small("C", tmp_path / "run"), policy, Same(batches))
    pretrain_stage(run, report=lambda line: None)
    assert run.loss_scale.value > 1
    assert run.num_skipped < run.config.num_steps
    for name, module in run.modules.items():
        assert not same(before[name], state(module))
        assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_another_setting_or_another_model_is_refused(made: Path, tmp_path: Path) -> None:
    run = StageRun(small("C", tmp_path), load(made), ScenesSource(SIZES))
    path = save_stage(run)
    other = StageRun(small("C", tmp_path, learning_rate=2e-3), load(made), ScenesSource(SIZES))
    with pytest.raises(ValueError, match=r"got learning_rate = 0.002 where the run has 0.001"):
        restore_stage(other, path)
    restore_stage(StageRun(small("C", tmp_path, evaluate_every=1), load(made), ScenesSource(SIZES)), path)
    saved = save_stage(StageRun(small("B", tmp_path / "b"), make_base(), ScenesSource(SIZES)))
    wider = ScenesPolicy(ScenesPolicyConfig(("a", "red"), latent_channels=8, width=64, num_layers=2, num_heads=2))
    with pytest.raises(ValueError, match="expected the weights of this policy's transformer, got others"):
        restore_stage(StageRun(small("B", tmp_path / "b"), wider, ScenesSource(SIZES)), saved)


def test_a_folder_with_a_run_or_with_another_stages_is_refused(made: Path, tmp_path: Path) -> None:
    run = StageRun(small("C", tmp_path, num_steps=2), load(made), ScenesSource(SIZES))
    pretrain_stage(run, report=lambda line: None)
    with pytest.raises(ValueError, match="expected a new folder, got one with step-000002"):
        pretrain_stage(run, report=lambda line: None)
    other = StageRun(small("A", tmp_path), load(made), ScenesSource(SIZES))
    with pytest.raises(ValueError, match="expected stage A's checkpoint, got C's"):
        pretrain_stage(other, resume=True, report=lambda line: None)
    other = StageRun(small("C", tmp_path, num_steps=2, muon_learning_rate=1e-3), load(made), ScenesSource(SIZES))
    with pytest.raises(ValueError, match=r"got muon_learning_rate = 0.001 where the run has 0.0"):
        pretrain_stage(other, resume=True, report=lambda line: None)


def test_a_step_is_the_mean_over_its_whole_batch_whatever_it_is_cut_into(made: Path, tmp_path: Path) -> None:
    """Two cycles of half the size give the gradient of their joint mean: both tasks, weighed by their examples."""
    policy = load(made)
    config = small("C", tmp_path, global_batch_size=16, text_dropout=0.0)
    run = StageRun(config, policy, ScenesSource(SIZES, seed=5))
    run._accumulate()
    found = [parameter.grad.clone() for parameter in run.parameters if parameter.grad is not None]
    run.optimizers[0].zero_grad()
    source = ScenesSource(SIZES, seed=5)
    for draw, task in enumerate(("edit", "t2i") * 2):
        batch = source.next_batch(task)
        loss = run._loss(config, task, batch, ("train", 0, draw))
        (loss * len(batch.texts) / 16).backward()  # type: ignore[no-untyped-call]
    wanted = [parameter.grad for parameter in run.parameters if parameter.grad is not None]
    assert len(found) == len(wanted) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_batches_that_do_not_fill_a_step_are_named(policy: MetaQueryPolicy, tmp_path: Path) -> None:
    run = StageRun(small("C", tmp_path, global_batch_size=12), policy, ScenesSource(SIZES))
    with pytest.raises(ValueError, match="got 12 where the source's batches add up to 16"):
        next(run.steps())


def test_texts_are_dropped_in_text_to_image_alone(policy: MetaQueryPolicy, tmp_path: Path) -> None:
    config = small("C", tmp_path, text_dropout=0.999999)
    batches = held_out()

    def loss(task: str, batch: SupervisedBatch) -> float:
        return flow_matching_loss(config, policy, task, batch, torch.Generator().manual_seed(0)).item()

    for task, batch in batches.items():
        others = replace(batch, texts=["a red circle"] * len(batch.texts))
        assert (loss(task, batch) == loss(task, others)) == (task == "t2i")


def test_pictures_of_a_size_that_cannot_be_drawn_are_refused(policy: MetaQueryPolicy, tmp_path: Path) -> None:
    batch = SupervisedBatch(["a"], np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="expected multiples of 12 pixels"):
        flow_matching_loss(small("A", tmp_path), policy, "t2i", batch, torch.Generator())
    with pytest.raises(ValueError, match=r"pictures: expected \(height, width\) \(48, 48\), got \(32, 32\)"):
        flow_matching_loss(small("B", tmp_path), make_base(), "t2i", batch, torch.Generator())


def test_weights_in_half_precision_are_refused(policy: MetaQueryPolicy) -> None:
    policy.connector.to(torch.bfloat16)
    with pytest.raises(ValueError, match="expected float32 weights"):
        StageRun(PUBLISHED["A"], policy, ScenesSource(SIZES))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stage": "D"}, "stage: expected one of A, B, C"),
        ({"sigma_law": "cosine"}, "sigma_law"),
        ({"num_steps": 0}, "num_steps"),
        ({"text_dropout": 1.0}, "text_dropout"),
        ({"cycle": ()}, "cycle: expected 't2i' and 'edit' in turn"),
        ({"cycle": ("edit", "t2i")}, "only 't2i' in stage A"),
        ({"learning_rate": 0.0}, "learning_rate"),
    ],
)
def test_settings_that_cannot_run_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        StageConfig(**changes)


def test_the_embedded_worlds_source_goes_on_where_it_was() -> None:
    whole, first = ScenesSource(SIZES, seed=1), ScenesSource(SIZES, seed=1)
    for task in ("edit", "t2i", "edit"):
        whole.next_batch(task)
        first.next_batch(task)
    second = ScenesSource(SIZES, seed=1)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for task in ("t2i", "edit"):
        wanted, found = whole.next_batch(task), second.next_batch(task)
        assert list(wanted.texts) == list(found.texts)
        assert np.array_equal(wanted.targets, found.targets)
    with pytest.raises(ValueError, match="expected one of edit, t2i, got 'inpaint'"):
        whole.next_batch("inpaint")
