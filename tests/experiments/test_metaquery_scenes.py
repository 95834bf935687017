"""``pdtr metaquery-scenes`` at its smallest: language model, stages A and C, measured; and what the model is taught."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from agents.policies.metaquery import MetaQueryPolicy
from agents.policies.scenes import ScenesPolicy, ScenesPolicyConfig
from envs.scenes.grammar import sample_task
from envs.scenes.world import SceneObject
from experiments.metaquery_phases import run_phases
from experiments.metaquery_scenes import MetaQueryScenesConfig
from experiments.metaquery_vlm import asked_for, draw_questions, new_vlm, reading_of_scenes, told, vlm_shape
from pdtr.sampling import load_policy, policy_folder


def test_every_phase_runs_and_is_not_done_twice(tmp_path: Path) -> None:
    sizes = {"latent_channels": 8, "width": 32, "num_layers": 1, "num_heads": 1}
    ScenesPolicy(ScenesPolicyConfig(("a", "red"), **sizes)).save(tmp_path / "base")  # type: ignore[arg-type]
    config = MetaQueryScenesConfig(
        output_dir=tmp_path / "run",
        base=tmp_path / "base",
        width=32,
        num_layers=1,
        vision_steps=1,
        language_steps=2,
        language_batch_size=6,
        num_queries=4,
        connector_layers=1,
        align_steps=2,
        unify_steps=2,
        t2i_batch_size=4,
        edit_batch_size=4,
        rl_iterations=1,
        num_measured=6,
    )
    results = run_phases(config, lambda line: None)
    assert results.keys() == {"config", "base", "lmm", "align", "unify", "rl"}
    assert 0 <= results["unify"]["t2i"]["strict"] <= 1
    assert results["align"]["held_out"].keys() == {"t2i"}
    assert results["unify"]["held_out"].keys() == {"t2i", "edit"}
    trained = load_policy(policy_folder(tmp_path / "run" / "rl"))
    assert isinstance(trained, MetaQueryPolicy)
    before = load_policy(tmp_path / "run" / "unify" / "policy")
    assert isinstance(before, MetaQueryPolicy)
    assert Path(results["rl"]["report"]).is_file()
    assert not _moved(before.connector, trained.connector)
    assert not _moved(before.lmm, trained.lmm)
    lines: list[str] = []
    assert run_phases(config, lines.append) == json.loads((tmp_path / "run" / "results.json").read_text())
    assert lines == [f"{name}: done before" for name in ("base", "lmm", "align", "unify", "rl")]


def _moved(before: nn.Module, after: nn.Module) -> bool:
    state = after.state_dict()
    return any(not torch.equal(tensor, state[name]) for name, tensor in before.state_dict().items())


def test_what_is_asked_for_has_one_wording() -> None:
    rng = np.random.default_rng(0)
    pair = [{"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": ["left of", 0]}]
    assert asked_for(pair) == "a circle left of a square"
    assert asked_for([{"class": "circle", "count": 3, "color": "red"}]) == "three red circle"
    assert asked_for([{"class": "circle", "count": 1}, {"class": "cross", "count": 1}]) == "a circle, a cross"
    assert all(asked_for(sample_task(rng).metadata["include"]) for _ in range(50))


def test_a_scene_is_told_from_the_top_with_places() -> None:
    low, high = SceneObject("cross", "red", 40.0, 40.0, 6.0), SceneObject("circle", "blue", 10.0, 8.0, 6.0)
    assert told((low, high)) == "top left blue circle, bottom right red cross"
    assert told(()) == "nothing"


def test_every_word_of_questions_and_answers_is_one_token() -> None:
    from agents.policies.query_reader import QueryReader

    lmm, tokenizer, pictures = new_vlm(vlm_shape(32, 1, seed=0))
    reader = QueryReader(lmm, tokenizer, pictures, reading_of_scenes())
    for part in draw_questions(np.random.default_rng(0), 90).values():
        for question in part:
            for text in (question.text, question.answer):
                ids = reader.tokenizer(text, add_special_tokens=False)["input_ids"]
                assert len(ids) == len(text.replace(",", " ,").replace(":", " :").split()), text


@pytest.mark.parametrize("name", ["num_queries", "align_steps", "num_measured"])
def test_settings_that_cannot_run_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        MetaQueryScenesConfig(**{name: 0})  # type: ignore[arg-type]
