"""Tiny twins of published recipes: the same run in seconds on a CPU, on random models of the published classes.

Only sizes and weights differ: parts of the models, pictures, prompts, numbers of them, iterations. What is missing is
made under runs/tiny_models when a twin is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.recipes import editing as _editing
from experiments.recipes import sd3 as _sd3
from experiments.recipes import unipic2 as _unipic2

if TYPE_CHECKING:
    from experiments.published_rewards import PublishedRewards
    from pdtr.config import TrainConfig


def unipic2_pdtr_tiny() -> TrainConfig:
    """Tiny twin of unipic2_pdtr: both stages in seconds, on random weights."""
    return _tiny(_unipic2.unipic2_pdtr(), _sd3_base())


def unipic2_metaquery_pdtr_tiny() -> TrainConfig:
    """Tiny twin of unipic2_metaquery_pdtr: both stages in seconds, on random weights."""
    from experiments.tiny_files import metaquery

    return _tiny(_unipic2.unipic2_metaquery_pdtr(), metaquery())


def flow_grpo_sd3_geneval_tiny() -> TrainConfig:
    """Tiny twin of flow_grpo_sd3_geneval: the run in seconds, on random weights."""
    return _tiny(_sd3.flow_grpo_sd3_geneval(), _sd3_base())


def flow_grpo_sd3_ocr_tiny() -> TrainConfig:
    """Tiny twin of flow_grpo_sd3_ocr: the run in seconds, on random weights and the real reader."""
    return _tiny(_sd3.flow_grpo_sd3_ocr(), _sd3_base())


def flow_grpo_sd3_pickscore_tiny() -> TrainConfig:
    """Tiny twin of flow_grpo_sd3_pickscore: the run in seconds, on random weights."""
    return _tiny(_sd3.flow_grpo_sd3_pickscore(), _sd3_base())


def diffusion_nft_sd3_geneval_tiny() -> TrainConfig:
    """Tiny twin of diffusion_nft_sd3_geneval: the run in seconds, on random weights."""
    return _tiny(_sd3.diffusion_nft_sd3_geneval(), _sd3_base())


def flow_grpo_flux_kontext_tiny() -> TrainConfig:
    """Tiny twin of flow_grpo_flux_kontext: the run in seconds, on random weights."""
    from agents.policies.tiny.flux import make_tiny_flux_kontext

    return _tiny(_editing.flow_grpo_flux_kontext(), _made("flux_kontext", make_tiny_flux_kontext))


def diffusion_nft_qwen_image_edit_tiny() -> TrainConfig:
    """Tiny twin of diffusion_nft_qwen_image_edit: the run in seconds, on random weights."""
    from agents.policies.tiny.qwen_image import make_tiny_qwen_image_edit_plus

    base = _made("qwen_image_edit_plus", make_tiny_qwen_image_edit_plus)
    config = _tiny(_editing.diffusion_nft_qwen_image_edit(), base)
    assert config.backbone is not None
    return replace(config, backbone=replace(config.backbone, reference_pixels=64 * 64))


def _tiny(config: TrainConfig, base: Path) -> TrainConfig:
    """A recipe's configuration with its sizes and weights replaced; every other setting stays.

    Args:
        config: the recipe's.
        base: folder of a tiny model of the same pipeline.
    """
    from experiments.published_rewards import PublishedRewards
    from experiments.tiny_files import SIDE
    from pdtr.curriculum import StageCurriculum, Staged
    from pdtr.task_source import PromptFileTasks

    curriculum, tasks, rewards = config.curriculum, config.tasks, config.rewards
    assert isinstance(curriculum, StageCurriculum)
    assert isinstance(tasks, PromptFileTasks)
    assert isinstance(rewards, PublishedRewards)
    assert config.backbone is not None
    return replace(
        config,
        output_dir=config.output_dir.with_name(f"{config.output_dir.name}_tiny"),
        base=base,
        # In float32: a CPU has no fast bfloat16, and a tiny network no need of it.
        backbone=replace(config.backbone, height=SIDE, width=SIDE, dtype="float32", max_sequence_length=32),
        curriculum=Staged(tuple(replace(stage, num_iterations=1) for stage in curriculum.as_stages())),
        tasks=_tiny_tasks(tasks),
        rewards=_tiny_rewards(rewards),
        num_prompts=2,
        group_size=3,
        chunk_size=3,
        evaluation=replace(config.evaluation, num_prompts=2, num_final_prompts=2, every=2, chunk_size=2, num_grid=2),
        checkpoint_every=1,
        num_threads=1,
    )


def _tiny_tasks(tasks: Any) -> Any:
    """The same tasks on a few small prompts; held-out ones are taken out of them."""
    from experiments.published_tasks import OCRTasks, PickScoreTasks
    from experiments.tiny_files import SIDE, prompts

    folder = prompts()
    names = {OCRTasks: "ocr.txt", PickScoreTasks: "captions.txt"}
    texts = folder / names.get(type(tasks), "geneval.jsonl")
    return replace(
        tasks,
        t2i_prompts=texts if tasks.t2i_prompts else None,
        t2i_held_out=None,
        edit_prompts=folder / "edits.jsonl" if tasks.edit_prompts else None,
        image_size=(SIDE, SIDE),
    )


def _tiny_rewards(rewards: PublishedRewards) -> PublishedRewards:
    """The same rewards with tiny weights; in place of a judge, which is a server's, tiny weights too."""
    from experiments.published_rewards import GenEvalWeights, PickScoreWeights
    from experiments.tiny_files import clip, detector, edit_reward

    edit, t2i = rewards.edit, rewards.t2i
    if edit is not None:
        edit = replace(edit, checkpoint=str(edit_reward()), dtype="float32")
    if isinstance(t2i, GenEvalWeights):
        t2i = replace(t2i, detector=str(detector()), colors=str(clip()))
    elif isinstance(t2i, PickScoreWeights):
        t2i = replace(t2i, model=str(clip()), processor="")
    return replace(rewards, edit=edit, t2i=t2i, edit_by="weights")


def _sd3_base() -> Path:
    from agents.policies.tiny.sd3 import make_tiny_sd3

    return _made("sd3", make_tiny_sd3)


def _made(name: str, make: Callable[[Path], Any]) -> Path:
    from experiments.tiny_files import made

    return made(name, make)
