"""Recipes whose reward is a learnt judge behind a server; the ground truth is measured, and never trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.recipes import scenes

if TYPE_CHECKING:
    from pdtr.config import TrainConfig


def pdtr_scenes_judge() -> TrainConfig:
    """PDTR's editing stage trained on a digit judge behind vLLM, measured by the ground truth."""
    from experiments.scenes_judge_reward import JudgeRewards
    from pdtr.curriculum import Staged, pdtr_curriculum

    config = scenes.pdtr_scenes()
    # Half as long again as in pdtr_scenes: where a judge starts to be hacked is what is looked for.
    editing, _ = pdtr_curriculum(150, 1).as_stages()
    return replace(
        config,
        output_dir=Path("runs/pdtr_scenes_judge"),
        # As in pdtr_scenes, but for the weight of strict success: a judge gives one grade and no components.
        curriculum=Staged((replace(editing, decay_share=0.5),)),
        rewards=JudgeRewards(),
        # A group: a chunk is judged while the next is drawn, and only the last one is waited for.
        chunk_size=config.group_size,
        evaluation=replace(config.evaluation, every=15),
    )
