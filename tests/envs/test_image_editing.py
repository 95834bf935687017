from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ResetNeeded

from envs.image_editing import ImageEditingEnv, ImageEditingVectorEnv
from envs.prompts import FixedPool
from envs.scenes.edits import sample_edit
from envs.scenes.render import render
from envs.scenes.suite import edit_prompts
from rewards.base import Images, Prompt

SIZE = (4, 5)


def picture(level: int, size: tuple[int, int] = SIZE) -> Images:
    return np.full((*size, 3), level, np.uint8)


class Recorder:
    """A reward that keeps what it was asked: the mean difference to the source."""

    def __init__(self) -> None:
        self.asked: list[Sequence[Prompt]] = []

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Any:
        self.asked.append(prompts)
        return np.array([image.mean() - p.source_images[0].mean() for image, p in zip(images, prompts, strict=True)])


def test_one_turn() -> None:
    reward = Recorder()
    env = ImageEditingVectorEnv(2, reward, image_size=SIZE)
    prompts = [Prompt("a", (picture(10),), id="p"), Prompt("b", (picture(20),), id="q")]
    observation, infos = env.reset(options={"prompts": prompts})
    assert observation["prompt"] == ("a", "b")
    np.testing.assert_array_equal(observation["source_image"], np.stack([picture(10), picture(20)]))
    assert observation in env.observation_space
    images = np.stack([picture(15), picture(50)])
    observation, rewards, terminations, _, infos = env.step(images)
    assert rewards.tolist() == [5.0, 30.0]
    assert terminations.tolist() == [True, True]
    np.testing.assert_array_equal(observation["source_image"], images)
    assert infos["prompt_ids"].tolist() == ["p", "q"]
    # The very objects: rewards read a group's source once by it.
    assert all(a is b for a, b in zip(reward.asked[0], prompts, strict=True))
    with pytest.raises(ResetNeeded):
        env.step(images)


def test_turns_are_on_the_agents_own_images() -> None:
    reward = Recorder()
    env = ImageEditingVectorEnv(2, reward, image_size=SIZE, num_turns=4)
    turns = [{"prompt": "then b", "tag": "move"}, {"prompt": "then c"}]
    prompts = [
        Prompt("a", (picture(10),), {"turns": turns, "tag": "add"}, "p", "g"),
        Prompt("again", (picture(20),), {"tag": "remove"}, "q"),
    ]
    observation, _ = env.reset(options={"prompts": prompts})
    seen, rewards, ids, over = [observation["prompt"]], [], [], []
    for level in (11, 13, 16, 20):
        observation, reward_now, terminations, _, infos = env.step(np.stack([picture(level), picture(level + 20)]))
        seen.append(observation["prompt"])
        rewards.append(reward_now.tolist())
        ids.append(infos["prompt_ids"].tolist())
        over.append(terminations.tolist())
        np.testing.assert_array_equal(observation["source_image"][0], picture(level))
    assert seen[:4] == [("a", "again"), ("then b", "again"), ("then c", "again"), ("then c", "again")]
    assert rewards == [[1.0, 11.0], [2.0, 2.0], [3.0, 3.0], [4.0, 4.0]]
    assert ids == [["p", "q"], ["p/turn2", "q/turn2"], ["p/turn3", "q/turn3"], ["p/turn4", "q/turn4"]]
    assert over == [[False] * 2] * 3 + [[True] * 2]
    assert [dict(asked[0].metadata) for asked in reward.asked[1:]] == [{"tag": "move"}, {}, {}]
    assert [dict(asked[1].metadata) for asked in reward.asked] == [{"tag": "remove"}] * 4
    assert [asked[0].group for asked in reward.asked] == ["g", "g/turn2", "g/turn3", "g/turn4"]


def test_a_new_episode_forgets_the_turns() -> None:
    env = ImageEditingVectorEnv(1, Recorder(), image_size=SIZE, num_turns=2)
    prompt = Prompt("a", (picture(10),), {"turns": [{"prompt": "b"}]})
    for _ in range(2):
        env.reset(options={"prompts": [prompt]})
        observation, _, terminations, *_ = env.step(picture(1)[None])
        assert (observation["prompt"], terminations.tolist()) == (("b",), [False])


def test_scenes_reward_a_done_edit_and_not_the_source() -> None:
    prompts = edit_prompts("train", 12, 0)
    env = gymnasium.make_vec("pdtr/ImageEditing-v0", num_envs=12)
    observation, _ = env.reset(options={"prompts": prompts})
    _, untouched, *_ = env.step(observation["source_image"])
    assert untouched.tolist() == [0.0] * 12
    rng = np.random.default_rng(0)
    edits = [sample_edit(rng) for _ in range(12)]
    done = [Prompt(e.text, (render([e.source])[0],), e.metadata, str(i)) for i, e in enumerate(edits)]
    env.reset(options={"prompts": done})
    _, rewards, _, _, infos = env.step(render([e.target for e in edits]))
    assert infos["reward_available"].all()
    assert rewards.min() > 0.8


def test_mending_in_a_second_turn_is_rewarded() -> None:
    """The instruction stands; an agent that left the source alone may still do it in the next turn."""
    edit = sample_edit(np.random.default_rng(1), skill="recolor")
    source, target = render([edit.source, edit.target])
    env = ImageEditingEnv(num_turns=2)
    env.reset(options={"prompts": [Prompt(edit.text, (source,), edit.metadata)]})
    _, first, over, *_ = env.step(source)
    _, second, end, *_ = env.step(target)
    assert (first, over, end) == (0.0, False, True)
    assert second > 0.8


def test_the_single_environment() -> None:
    env = gymnasium.make("pdtr/ImageEditing-v0", num_turns=2)
    observation, info = env.reset(seed=5)
    assert observation["source_image"].shape == (48, 48, 3)
    assert observation in env.observation_space
    assert env.step(observation["source_image"])[2] is False
    assert env.step(observation["source_image"])[2] is True
    assert info["prompt_id"].startswith("edit/train/")


def test_several_sources_of_which_the_first_is_edited() -> None:
    reward = Recorder()
    prompts = [Prompt("a", (picture(10), picture(1))), Prompt("b", (picture(20), picture(2)))]
    env = ImageEditingVectorEnv(2, reward, FixedPool(prompts), SIZE, num_turns=2, render_mode="rgb_array")
    observation, _ = env.reset(options={"prompts": prompts})
    assert observation in env.observation_space
    assert observation["source_images"].shape == (2, 2, *SIZE, 3)
    assert observation["source_images"][:, :, 0, 0, 0].tolist() == [[10, 1], [20, 2]]
    observation, rewards, *_ = env.step(np.stack([picture(15), picture(50)]))
    # The second turn edits what the first has made, and has the other picture still.
    assert observation["source_images"][:, :, 0, 0, 0].tolist() == [[15, 1], [50, 2]]
    assert rewards.tolist() == [5.0, 30.0]
    _, rewards, *_ = env.step(np.stack([picture(16), picture(60)]))
    assert rewards.tolist() == [1.0, 10.0]
    assert [image.mean() for image in reward.asked[1][0].source_images] == [15, 1]
    frame = (env.render() or ())[0]
    assert frame[0, :: SIZE[1], 0].tolist() == [15, 1, 16]
    with pytest.raises(ValueError, match=r"source_images: expected 2, uint8 \[4, 5, 3\], got 1 images; the pool says"):
        env.reset(options={"prompts": [Prompt("a", (picture(1),))] * 2})


def test_frames_show_the_source_beside_the_result() -> None:
    env = ImageEditingVectorEnv(1, Recorder(), image_size=SIZE, num_turns=2, render_mode="rgb_array")
    env.reset(options={"prompts": [Prompt("a", (picture(10),))]})
    frames = []
    for level in (0, 30, 40):
        if level:
            env.step(picture(level)[None])
        (frame,) = env.render() or ()
        assert frame.shape == (4, 10, 3)
        frames.append((int(frame[0, 0, 0]), int(frame[0, 5, 0])))
    assert frames == [(10, 255), (10, 30), (30, 40)]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt("a"), r"source_images: expected one, uint8 \[4, 5, 3\], got 0 images"),
        (Prompt("a", (picture(1), picture(1))), "got 2 images"),
        (Prompt("a", (picture(1, (5, 4)),)), r"got uint8 \[5, 4, 3\]; resize the picture, or set image_size"),
        (Prompt("a", (picture(1).astype(float),)), "got float64"),
        (Prompt("a", (picture(1),), {"turns": "b"}), r"metadata\['turns'\]: expected a list of mappings, got str"),
        (Prompt("a", (picture(1),), {"turns": [{"text": "b"}]}), r"metadata\['turns'\]\[0\]: expected .* got NoneType"),
        (Prompt("a", (picture(1),), {"turns": ["b"]}), r"metadata\['turns'\]\[0\]: expected a mapping"),
    ],
)
def test_bad_prompts(prompt: Prompt, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageEditingVectorEnv(1, Recorder(), image_size=SIZE, num_turns=2).reset(options={"prompts": [prompt]})


@pytest.mark.parametrize("num_turns", [0, 1.5, True])
def test_bad_number_of_turns(num_turns: Any) -> None:
    with pytest.raises(ValueError, match="num_turns: expected an integer of at least 1"):
        ImageEditingEnv(num_turns=num_turns)
