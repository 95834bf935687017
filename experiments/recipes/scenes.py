"""Recipes for the embedded world.

Configurations are imported inside the functions: a list of the recipes must not wait for torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pdtr.config import TrainConfig
    from pdtr.curriculum import StageCurriculum, Staged

# A stage of any arm of the order study.
_STAGE_ITERATIONS = 24


def pdtr_scenes() -> TrainConfig:
    """Progressive dual-task training on the embedded world: editing, then text-to-image."""
    from agents.algorithms.diffusion_nft import DiffusionNFT
    from agents.learner import LearnerSettings
    from agents.samplers import ODE
    from pdtr.config import EvaluationConfig, TrainConfig
    from pdtr.curriculum import pdtr_curriculum

    # Without guidance, as published: half the forward passes, and learning makes up for it before long.
    # The base was trained with this shift; most of what is where is decided at high sigma.
    sampler = ODE(num_inference_steps=8, shift=4.0)
    return TrainConfig(
        output_dir=Path("runs/pdtr_scenes"),
        algorithm=DiffusionNFT(
            rollout_sampler=sampler,
            beta=1.0,  # Published for a single reward.
            num_sigmas=2,  # In editing four learnt no more: there it is the prompts that differ, not the noise.
            kl_coef=0.03,  # Full weights leave their reference faster than adapters: published is a three-hundredth.
            old_rate=0.001,  # Published: the policy that draws lags the more the longer the run is.
            old_max=0.5,  # Published.
        ),
        # A quarter of the second stage's prompts rehearse the first task; the paper has no rehearsal. With one
        # iteration in eight for it, editing lost 3.5 and 7 points in two runs.
        curriculum=_tuned(
            # Editing teaches text-to-image nearly as fast as its own practice does; with 50 and 160 it learnt less.
            pdtr_curriculum(100, 100, rehearsal=0.25),
            # Two lost some of what the first stage had taught, four kept it; with three there is time for more prompts,
            # of which two rollouts' gradients agree the least by now.
            later_changes={"num_sigmas": 3},
        ),
        num_prompts=12,  # Two a skill; in editing it is the prompts that differ, more than the noise.
        group_size=8,  # Large enough that most groups hold both successes and failures.
        chunk_size=24,  # Three groups: matrices large enough for two cores, and scoring overlaps drawing.
        learning_rate=2e-4,  # 1e-4 learnt at half the speed, 5e-4 not steadily.
        learner=LearnerSettings(
            num_minibatches=2,  # Two optimiser steps a rollout.
            ema_decay=0.97,  # Averages over the last thirty steps or so.
        ),
        evaluation=EvaluationConfig(
            num_prompts=120,  # 20 a skill: the curve's standard error is below 5 points.
            num_final_prompts=600,  # 100 a skill: about 2 points.
            every=30,  # Eight points a task over the run; each costs about six seconds.
            sampler=sampler,
        ),
        checkpoint_every=10,  # At most 10 iterations are lost to a kill.
    )


def smoke() -> TrainConfig:
    """Every part of a run at its smallest, within a minute; what continuous integration runs."""
    from agents.algorithms.diffusion_nft import DiffusionNFT
    from agents.samplers import ODE
    from pdtr.curriculum import pdtr_curriculum

    config = pdtr_scenes()
    sampler = ODE(num_inference_steps=4, shift=4.0)  # Enough to leave the noise; quality is not the point.
    return replace(
        config,
        output_dir=Path("runs/smoke"),
        algorithm=DiffusionNFT(rollout_sampler=sampler),
        curriculum=pdtr_curriculum(2, 2),  # Two iterations: the second starts from the state that the first left.
        num_prompts=4,
        group_size=6,
        chunk_size=12,  # Two chunks an iteration, so that scoring overlaps drawing.
        evaluation=replace(
            config.evaluation,
            num_prompts=12,  # Two a skill.
            num_final_prompts=24,  # Four a skill.
            every=2,  # Once a stage.
            sampler=sampler,
            chunk_size=12,
            num_grid=6,  # One a skill.
        ),
        checkpoint_every=1,  # Every iteration can be resumed from.
    )


def flow_grpo_scenes() -> TrainConfig:
    """PDTR's curriculum with Flow-GRPO in place of DiffusionNFT: a clipped policy gradient on the denoising chain."""
    from agents.algorithms.flow_grpo import FlowGRPO
    from agents.samplers import FixedWindow, FlowSDE
    from pdtr.curriculum import pdtr_curriculum

    config = pdtr_scenes()
    return replace(
        config,
        output_dir=Path("runs/flow_grpo_scenes"),
        algorithm=FlowGRPO(
            rollout_sampler=FlowSDE(
                num_inference_steps=8,
                shift=4.0,  # The base was trained with it.
                noise_level=0.7,  # Published.
                window=FixedWindow(0, 4),  # Those of high sigma, where it is decided what is where.
            ),
            clip_range=3e-5,  # A third of the published: so that a quarter of the ratios reach it.
            kl_coef=0.0,  # The distance stays so small (1e-9) that no weight in use would have an effect.
        ),
        # 3e-4 lost editing again after 30 iterations, 8e-4 destroyed the policy within 20.
        learning_rate=1.5e-4,
        curriculum=_tuned(pdtr_curriculum(60, 90, rehearsal=0.25), later_rate=1.0),
        learner=replace(config.learner, num_minibatches=4),  # From the second step on the clip acts.
    )


def edit_then_t2i() -> TrainConfig:
    """Order study: editing first, text-to-image second (PDTR)."""
    from pdtr.curriculum import pdtr_curriculum

    return _order_arm("edit_then_t2i", pdtr_curriculum(_STAGE_ITERATIONS, _STAGE_ITERATIONS))


def t2i_then_edit() -> TrainConfig:
    """Order study: text-to-image first, editing second."""
    from pdtr.curriculum import reversed_order

    return _order_arm("t2i_then_edit", reversed_order(_STAGE_ITERATIONS, _STAGE_ITERATIONS))


def joint() -> TrainConfig:
    """Order study: both tasks in every iteration, half the prompts each."""
    from pdtr.curriculum import Joint

    return _order_arm("joint", _twice(Joint(_STAGE_ITERATIONS)))


def edit_only() -> TrainConfig:
    """Order study: editing alone, for as long as both stages together."""
    from pdtr.curriculum import SingleTask

    return _order_arm("edit_only", _twice(SingleTask("edit", _STAGE_ITERATIONS)))


def t2i_only() -> TrainConfig:
    """Order study: text-to-image alone, for as long as both stages together."""
    from pdtr.curriculum import SingleTask

    return _order_arm("t2i_only", _twice(SingleTask("t2i", _STAGE_ITERATIONS)))


def _order_arm(name: str, curriculum: StageCurriculum) -> TrainConfig:
    """``pdtr_scenes`` with two other stages, equally long in every arm: the arms differ in what is practised alone.

    Made smaller than the recipe, for there are five arms and a seed of each takes minutes.
    """
    config = pdtr_scenes()
    return replace(
        config,
        output_dir=Path("runs/order_study") / name,
        curriculum=_tuned(curriculum),
        evaluation=replace(config.evaluation, num_final_prompts=360),  # 60 a skill, and three seeds an arm.
    )


def _twice(curriculum: StageCurriculum) -> Staged:
    """Its only stage two times, so that learning rate and reference change when they do in the arms of two tasks."""
    from pdtr.curriculum import Staged

    (stage,) = curriculum.as_stages()
    return Staged((stage, replace(stage, name=f"{stage.name} again")))


def _tuned(
    curriculum: StageCurriculum, later_rate: float = 0.5, later_changes: Mapping[str, float] | None = None
) -> Staged:
    """The same stages with this world's reward weights and learning rates, later ones with changes of their own."""
    from pdtr.curriculum import Staged
    from pdtr.stages import Constant

    settings: dict[str, Any] = {
        # The dense reward alone is raised by pictures that are nearly right, and strict success lost on the way.
        "reward_weights": {"strict": Constant(1.0)},
        # At a constant rate success peaked and fell again, as the noise of the gradients gathered in the weights.
        "decay_share": 0.5,
    }
    first, *later = curriculum.as_stages()
    # At the first stage's rate DiffusionNFT's second one lost what the first had taught, and learnt little itself.
    settings_later = {**settings, "learning_rate_scale": later_rate, "algorithm": later_changes or {}}
    calm = [replace(stage, **settings_later) for stage in later]
    return Staged((replace(first, **settings), *calm))
