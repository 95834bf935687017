"""What vLLM serves of the embedded world's judge is what its training sees: the same prompt, patches and digits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from experiments.edit_reward_reading import rendered_edits
from experiments.scenes_judge_heads import new_judge
from experiments.scenes_judge_model import judge_inputs, load_judge
from experiments.scenes_judge_reward import JudgeRewards
from experiments.scenes_judge_training import score_edits
from rewards.base import Prompt
from rewards.edit_reward_data import ScoredEdit
from rewards.judges.tiny import TinyVLM, favour_labels, save_tiny_vlm
from rewards.scoring import score
from tests.judges_real.conftest import Serving

pytestmark = [pytest.mark.judge, pytest.mark.timeout(900)]

SHAPE = TinyVLM(patch_size=6, min_pixels=144, rope_theta=1.5, initializer_range=0.1)


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judge that was not trained, but answers in labels, each picture another one."""
    inputs = judge_inputs(SHAPE)
    model = new_judge(inputs)
    favour_labels(model, inputs.tokenizer)
    return save_tiny_vlm(tmp_path_factory.mktemp("scenes") / "judge", SHAPE, inputs.tokenizer, model)


@pytest.fixture(scope="module")
def scenes_server(judge_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    serving = Serving(judge_folder, tmp_path_factory.mktemp("scenes_serving"), 30_000 + os.getpid() % 2_000)
    serving.ensure()
    yield serving
    serving.stop()


def test_vllm_reads_what_the_training_reads(judge_folder: Path, scenes_server: Serving) -> None:
    found = rendered_edits(np.random.default_rng(0), 12, 4)
    edits = [ScoredEdit(str(i), str(i), e.instruction, e.source, e.image, e.scores) for i, e in enumerate(found)]
    expected = score_edits(*load_judge(judge_folder), edits)
    judge = JudgeRewards(scenes_server.url, min_label_mass=0.05).make_rewards()["edit"]
    prompts = [Prompt(edit.instruction, (edit.source,)) for edit in edits]
    served = score(judge, np.stack([edit.image for edit in edits]), prompts)
    assert served.reasons == {}
    assert np.abs(served.total - expected).max() < 1e-3
    assert np.std(expected) > 1e-3, "a judge that says the same of everything compares nothing"
