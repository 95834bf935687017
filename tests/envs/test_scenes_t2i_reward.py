"""The text-to-image reward of the scenes: the GenEval rule, and nothing else in the picture."""

import re
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from envs.scenes.grammar import SKILLS, sample_task, scene_for
from envs.scenes.render import render
from envs.scenes.rewards import t2i_reward
from envs.scenes.world import Scene, SceneObject
from rewards.base import Prompt
from rewards.checker import check_reward
from rewards.scoring import score

Images = NDArray[np.uint8]
COUNT = 200
RED_CIRCLE = SceneObject("circle", "red", 12.0, 12.0, 7.0)
BLUE_SQUARE = SceneObject("square", "blue", 36.0, 36.0, 7.0)
SCENE = (RED_CIRCLE, BLUE_SQUARE)
CIRCLE = {"class": "circle", "count": 1}


def damaged(images: Images, blur: float, noise: float) -> Images:
    smooth = ndimage.gaussian_filter(images.astype(np.float32), (0, blur, blur, 0), mode="nearest")
    smooth += np.random.default_rng(7).normal(0, noise, images.shape)
    rounded: Images = np.rint(smooth).clip(0, 255).astype(np.uint8)
    return rounded


def test_the_contract_and_the_speed() -> None:
    rng = np.random.default_rng(9)
    tasks = [sample_task(rng, skill=SKILLS[i % 6]) for i in range(48)]
    images = damaged(render([scene_for(rng, task.metadata)[i % 2 :] for i, task in enumerate(tasks)]), 0.9, 8)
    prompts = [Prompt(task.text, (), task.metadata) for task in tasks]
    check_reward(t2i_reward, images, prompts)
    durations = []
    for _ in range(7):
        start = time.perf_counter()
        score(t2i_reward, images, prompts)
        durations.append(time.perf_counter() - start)
    # The fastest of several, since other processes can only add.
    assert min(durations) / len(images) < 2e-3


@pytest.mark.parametrize("skill", SKILLS)
def test_a_scene_that_a_prompt_describes_is_strictly_right(skill: str) -> None:
    rng = np.random.default_rng(1)
    tasks = [sample_task(rng, "train" if i % 2 else "held_out", skill) for i in range(COUNT)]
    prompts = [Prompt(task.text, (), task.metadata) for task in tasks]
    images = render([scene_for(rng, task.metadata) for task in tasks])
    for blur, noise in ((0.0, 0.0), (0.7, 8.0)):
        scores = score(t2i_reward, damaged(images, blur, noise), prompts)
        assert scores.components["strict"].mean() >= 0.99
        assert scores.components["official"].mean() >= 0.99
        assert (scores.total >= 0.99).mean() >= 0.99


def t2i_example(*include: Mapping[str, Any], tag: str = "colors") -> Prompt:
    return Prompt("a prompt", (), {"tag": tag, "include": list(include)})


@pytest.mark.parametrize(
    ("prompt", "scene", "total", "strict", "official"),
    [
        (t2i_example(CIRCLE), (), 0.0, 0.0, 0.0),
        (t2i_example(CIRCLE), (RED_CIRCLE,), 1.0, 1.0, 1.0),
        # An unnamed colour is free.
        (t2i_example(CIRCLE), (replace(RED_CIRCLE, color="black"),), 1.0, 1.0, 1.0),
        # A further object of another class: GenEval does not mind.
        (t2i_example(CIRCLE), SCENE, 1.0, 0.0, 1.0),
        # Count right, colour wrong.
        (t2i_example({**CIRCLE, "color": "green"}), (RED_CIRCLE,), 0.5, 0.0, 0.0),
        # Two of three.
        (
            t2i_example({**CIRCLE, "count": 3}, tag="counting"),
            (RED_CIRCLE, replace(RED_CIRCLE, y=36.0)),
            2 / 3,
            0.0,
            0.0,
        ),
        (t2i_example(CIRCLE, {"class": "square", "count": 1, "position": ["right of", 0]}), SCENE, 1.0, 1.0, 1.0),
        (t2i_example(CIRCLE, {"class": "square", "count": 1, "position": ["above", 0]}), SCENE, 2 / 3, 0.0, 0.0),
    ],
)
def test_t2i_worked_by_hand(prompt: Prompt, scene: Scene, total: float, strict: float, official: float) -> None:
    scores = score(t2i_reward, render([scene]), [prompt])
    assert scores.total[0] == pytest.approx(total)
    assert scores.components["strict"][0] == strict
    assert scores.components["official"][0] == official


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (Prompt("a circle"), "tag: expected one of"),
        (t2i_example({"class": "bench", "count": 1}), r"include\[0\].class: expected one of circle.*'bench'"),
        (t2i_example({**CIRCLE, "color": "pink"}), r"include\[0\].color: expected one of red.*'pink'"),
    ],
)
def test_a_prompt_that_cannot_be_judged_is_masked(broken: Prompt, reason: str) -> None:
    scores = score(t2i_reward, render([(RED_CIRCLE,)] * 3), [t2i_example(CIRCLE), broken, t2i_example(CIRCLE)])
    assert np.isnan(scores.total).tolist() == [False, True, False]
    assert scores.total[[0, 2]].tolist() == [1, 1]
    assert re.search(reason, scores.reasons[1])
    assert np.isnan(score(t2i_reward, render([()]), [broken]).total).all()
