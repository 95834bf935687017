"""What text-to-image and editing environments share: prompts in, finished images as actions, rewards out.

The outer of two nested decision processes: an observation is what is asked, an action is a whole image. The vector
environment is the native one; the single environment is it with one member.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Box, Dict, Space
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from envs.prompts import PromptPool
from envs.spaces import UnicodeText, describe_text
from envs.window import RENDER_MODES, Window, check_render_mode
from rewards.base import Images, Prompt, Reward, Scores
from rewards.scoring import score

Observation = dict[str, Any]
_PAPER = 255
_METADATA: dict[str, Any] = {"render_modes": list(RENDER_MODES), "render_fps": 1}
_VECTOR_METADATA: dict[str, Any] = {**_METADATA, "autoreset_mode": AutoresetMode.DISABLED}


class ImageVectorEnv(VectorEnv[Observation, Images, NDArray[Any]], ABC):
    """N prompts at once; every action is N images.

    All members start and end together, and none is reset by itself (``AutoresetMode.DISABLED``): whoever trains
    chooses the next prompts, by ``reset(options={"prompts": [N prompts]})``; without the option they are drawn from the
    pool by the environment's own generator.

    - Observation: ``prompt``, a tuple of N texts; what a subclass adds.
    - Action: uint8 [N, H, W, 3].
    - Reward: float64 [N], NaN where it is not available; ``infos["reward_available"]``, bool [N], says where it is.
    - ``infos``: ``prompt_ids``, object [N]; after a step also ``components``, a mapping of names to float32 [N], and
      ``reasons``, why there is no reward, by the member's index.

    Args:
        num_envs: N.
        reward: what the images are scored by.
        prompts: where prompts come from.
        image_size: (H, W) in pixels.
        render_mode: ``"rgb_array"``, ``"human"`` (a window, where there is a display) or None.

    Raises:
        ValueError: an argument is not as described.
    """

    metadata = _VECTOR_METADATA

    def __init__(
        self,
        num_envs: int,
        reward: Reward,
        prompts: PromptPool,
        image_size: tuple[int, int],
        render_mode: str | None = None,
    ) -> None:
        self.num_envs = _positive("num_envs", num_envs)
        height, width = _image_size(image_size)
        self.render_mode = check_render_mode(render_mode)
        if not callable(reward):
            raise ValueError(f"reward: expected a callable (images, prompts) -> rewards, got {type(reward).__name__}")
        if not isinstance(prompts, PromptPool):
            raise ValueError(
                f"prompts: expected a pool with draw(rng, count, difficulty), got {type(prompts).__name__}; "
                "wrap a list in envs.prompts.FixedPool"
            )
        self.reward = reward
        self.prompts = prompts
        self.image_shape = (height, width, 3)
        self.text_space = UnicodeText()
        self.single_action_space = Box(0, 255, self.image_shape, np.uint8)
        self.single_observation_space = Dict({"prompt": self.text_space, **self._extra_spaces()})
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self._asked: tuple[Prompt, ...] = ()
        self._images: Images | None = None
        self._window = Window(type(self).__name__)

    @abstractmethod
    def _extra_spaces(self) -> dict[str, Space[Any]]:
        """Spaces of one member's observation beside the prompt's."""

    @abstractmethod
    def _observe(self) -> Observation:
        """The observation, in arrays of its own."""

    @abstractmethod
    def _check_prompt(self, prompt: Prompt, where: str) -> None:
        """Raise a ValueError for a prompt that this environment cannot ask for."""

    @abstractmethod
    def _advance(self, images: Images) -> bool:
        """Take the images in after they were scored; whether the episode is over."""

    @abstractmethod
    def _frame(self, index: int) -> Images:
        """One member's picture for :meth:`render`."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start N episodes.

        Args:
            seed: seed of the generator that draws prompts, for all members together.
            options: ``{"prompts": N prompts}`` to choose them.

        Raises:
            ValueError: an unknown option, a wrong number of prompts, or a prompt that cannot be asked for here.
        """
        super().reset(seed=seed)
        self._asked = ()
        options = options or {}
        check_options(options, ("prompts",))
        chosen = options.get("prompts")
        if chosen is None:
            chosen = self.prompts.draw(self.np_random, self.num_envs)
        self._asked = self._checked_prompts(chosen)
        self._images = None
        self._show_if_human()
        return self._observe(), {"prompt_ids": self._prompt_ids()}

    def step(self, actions: Images) -> tuple[Observation, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Hand in N images, uint8 [N, H, W, 3], and have them scored.

        Raises:
            ValueError: the action has another type or shape.
            gymnasium.error.ResetNeeded: there is no episode under way.
        """
        if not self._asked:
            raise ResetNeeded(f"{type(self).__name__}.step: no episode is under way; call reset first")
        images = self._checked_action(actions)
        scores = score(self.reward, images, self._asked)
        infos = self._infos(scores)
        self._images = images
        over = self._advance(images)
        observation = self._observe()
        self._show_if_human()
        if over:
            self._asked = ()
        rewards = scores.total.astype(np.float64)
        return observation, rewards, np.full(self.num_envs, over), np.zeros(self.num_envs, np.bool_), infos

    def render(self) -> tuple[Images, ...] | None:
        """One frame a member (``rgb_array``), or None after showing them side by side (``human``)."""
        if self.render_mode is None:
            return None
        if self._images is None and not self._asked:
            raise ResetNeeded(f"{type(self).__name__}.render: there is nothing to show yet; call reset first")
        frames = tuple(self._frame(index) for index in range(self.num_envs))
        if self.render_mode == "rgb_array":
            return frames
        self._window.show(np.concatenate(frames, axis=1))
        return None

    def close_extras(self, **kwargs: Any) -> None:
        """Close the window."""
        self._window.close()

    def _show_if_human(self) -> None:
        if self.render_mode == "human":
            self.render()

    def _canvas(self, index: int) -> Images:
        """A copy of a member's last image, blank before the first."""
        if self._images is None:
            return np.full(self.image_shape, _PAPER, np.uint8)
        image: Images = self._images[index].copy()
        return image

    def _prompt_ids(self) -> NDArray[np.object_]:
        ids = np.empty(self.num_envs, object)
        ids[:] = [prompt.id for prompt in self._asked]
        return ids

    def _infos(self, scores: Scores) -> dict[str, Any]:
        return {
            "prompt_ids": self._prompt_ids(),
            "reward_available": ~np.isnan(scores.total),
            "components": dict(scores.components),
            "reasons": dict(scores.reasons),
        }

    def _checked_prompts(self, prompts: object) -> tuple[Prompt, ...]:
        if not isinstance(prompts, Sequence) or len(prompts) != self.num_envs:
            got = f"{len(prompts)}" if isinstance(prompts, Sequence) else type(prompts).__name__
            raise ValueError(f"prompts: expected a sequence of num_envs={self.num_envs} prompts, got {got}")
        for index, prompt in enumerate(prompts):
            if not isinstance(prompt, Prompt):
                raise ValueError(f"prompts[{index}]: expected a rewards.base.Prompt, got {type(prompt).__name__}")
            if prompt.text not in self.text_space:
                raise ValueError(
                    f"prompts[{index}].text: expected {self.text_space.description}, got {describe_text(prompt.text)}"
                )
            self._check_prompt(prompt, f"prompts[{index}]")
        return tuple(prompts)

    def _checked_action(self, actions: object) -> Images:
        expected = (self.num_envs, *self.image_shape)
        if not isinstance(actions, np.ndarray) or actions.dtype != np.uint8 or actions.shape != expected:
            raise ValueError(f"action: expected uint8 {list(expected)}, got {describe_array(actions)}")
        # The caller may draw the next images into the same array while these are scored.
        return actions.copy()


class ImageEnv(gymnasium.Env[Observation, Images], ABC):
    """One member of an :class:`ImageVectorEnv` as a plain environment.

    The same observations, without the leading axis; ``info`` holds ``prompt_id``, and after a step
    ``reward_available``, ``components`` (a mapping of names to floats) and ``reason`` (empty where there is a reward).
    """

    metadata = _METADATA

    def __init__(self, vector: ImageVectorEnv) -> None:
        self.vector = vector
        self.render_mode = vector.render_mode
        self.observation_space = vector.single_observation_space
        self.action_space = vector.single_action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode; ``options={"prompts": [prompt]}`` chooses the prompt.

        Raises:
            ValueError: see :meth:`ImageVectorEnv.reset`.
        """
        super().reset(seed=seed)
        self.vector.np_random = self.np_random
        observation, infos = self.vector.reset(options=options)
        return _first(observation), {"prompt_id": infos["prompt_ids"][0]}

    def step(self, action: Images) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Hand in an image, uint8 [H, W, 3]; the reward is NaN where it is not available.

        Raises:
            ValueError: the action has another type or shape.
            gymnasium.error.ResetNeeded: there is no episode under way.
        """
        shape = self.vector.image_shape
        if not isinstance(action, np.ndarray) or action.dtype != np.uint8 or action.shape != shape:
            raise ValueError(f"action: expected uint8 {list(shape)}, got {describe_array(action)}")
        observation, rewards, terminations, truncations, infos = self.vector.step(action[None])
        info = {
            "prompt_id": infos["prompt_ids"][0],
            "reward_available": bool(infos["reward_available"][0]),
            "components": {name: float(values[0]) for name, values in infos["components"].items()},
            "reason": infos["reasons"].get(0, ""),
        }
        return _first(observation), float(rewards[0]), bool(terminations[0]), bool(truncations[0]), info

    def render(self) -> Images | None:
        """The frame, uint8 [H, W, 3] (``rgb_array``), or None after showing it (``human``)."""
        frames = self.vector.render()
        return frames[0] if frames is not None else None

    def close(self) -> None:
        """Close the window."""
        self.vector.close()


def check_options(options: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise a ValueError for a reset option that is not known."""
    for name in options:
        if name not in known:
            nearest = get_close_matches(str(name), known, 1, cutoff=0)[0]
            raise ValueError(f"options: expected {' or '.join(known)}, got {name!r}; did you mean {nearest!r}?")


def describe_array(value: object) -> str:
    """Type and shape of an array, or the type of what came in its place."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__


def _first(observation: Observation) -> Observation:
    return {name: value[0] for name, value in observation.items()}


def _positive(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
    return int(value)


def _image_size(value: object) -> tuple[int, int]:
    if not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError(f"image_size: expected (height, width), got {value!r}")
    return _positive("image_size[0]", value[0]), _positive("image_size[1]", value[1])
