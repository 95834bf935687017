"""Image editing as an environment, in one turn or several, each on the agent's own last image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Space

from envs.base import ImageEnv, ImageVectorEnv, Observation, describe_array
from envs.prompts import PromptPool, SourcedPool
from envs.spaces import UnicodeText, describe_text
from rewards.base import Images, Prompt, Reward


class ImageEditingVectorEnv(ImageVectorEnv):
    """``pdtr/ImageEditing-v0`` for N instructions at once; see :class:`envs.base.ImageVectorEnv`.

    The observation adds ``source_image``, uint8 [N, H, W, 3]: the prompt's own picture at first, and after each step
    the image that was just handed in. Where the pool's prompts have K > 1 pictures (:class:`envs.prompts.SourcedPool`)
    it is ``source_images``, uint8 [N, K, H, W, 3]: the first one is edited, turn after turn, the others stay.
    With ``num_turns`` above 1 the episode goes on that many steps, and each turn is scored against that turn's source.

    What is asked for in turn k > 1 is ``prompt.metadata["turns"][k - 2]``, a mapping with ``"prompt"`` and whatever
    metadata the reward needs for that turn (nothing is inherited). Where the list is absent or at its end, the
    instruction before is asked for again, with its metadata: the agent may mend its own image. A later turn's prompt
    has the id ``<id>/turn<k>``, and likewise its group.

    Args:
        num_envs: N.
        reward: what scores the images; ``envs.scenes.rewards.edit_reward`` unless given.
        prompts: where prompts come from; the embedded world's training instructions unless given.
        image_size: (H, W) in pixels, of sources and results.
        num_turns: steps in an episode.
        render_mode: ``"rgb_array"``, ``"human"`` or None; a frame shows the turn's sources beside the result.

    Raises:
        ValueError: an argument is not as described.
    """

    def __init__(
        self,
        num_envs: int = 1,
        reward: Reward | None = None,
        prompts: PromptPool | None = None,
        image_size: tuple[int, int] = (48, 48),
        num_turns: int = 1,
        render_mode: str | None = None,
    ) -> None:
        if isinstance(num_turns, bool) or not isinstance(num_turns, int) or num_turns < 1:
            raise ValueError(f"num_turns: expected an integer of at least 1, got {num_turns!r}")
        if reward is None:
            from envs.scenes.rewards import edit_reward

            reward = edit_reward
        if prompts is None:
            from envs.scenes.suite import ScenesPool

            prompts = ScenesPool("edit")
        self.num_turns = num_turns
        self.num_sources = max(1, prompts.num_sources) if isinstance(prompts, SourcedPool) else 1
        self._turn = 1
        self._begun: tuple[Prompt, ...] = ()
        self._before: Images | None = None
        super().__init__(num_envs, reward, prompts, image_size, render_mode)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """See :meth:`envs.base.ImageVectorEnv.reset`; every prompt has as many sources as the pool's, of [H, W]."""
        self._turn, self._before = 1, None
        result = super().reset(seed=seed, options=options)
        self._begun = self._asked
        return result

    def _extra_spaces(self) -> dict[str, Space[Any]]:
        if self.num_sources == 1:
            return {"source_image": Box(0, 255, self.image_shape, np.uint8)}
        return {"source_images": Box(0, 255, (self.num_sources, *self.image_shape), np.uint8)}

    def _sources(self) -> Images:
        """[N, K, H, W, 3]."""
        return np.stack([np.stack(prompt.source_images) for prompt in self._asked])

    def _observe(self) -> Observation:
        sources = self._sources()
        seen = {"source_image": sources[:, 0]} if self.num_sources == 1 else {"source_images": sources}
        return {"prompt": tuple(prompt.text for prompt in self._asked), **seen}

    def _check_prompt(self, prompt: Prompt, where: str) -> None:
        images, count = prompt.source_images, "one" if self.num_sources == 1 else str(self.num_sources)
        if len(images) != self.num_sources:
            raise ValueError(
                f"{where}.source_images: expected {count}, uint8 {list(self.image_shape)}, got {len(images)} images; "
                "the pool says how many (num_sources)"
            )
        for image in images:
            if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape != self.image_shape:
                raise ValueError(
                    f"{where}.source_images: expected {count}, uint8 {list(self.image_shape)}, got "
                    f"{describe_array(image)}; resize the picture, or set image_size"
                )
        if self.num_turns > 1:
            check_turns(prompt, where, self.text_space)

    def _advance(self, images: Images) -> bool:
        """The images become the sources of the next turn, or of the final observation."""
        self._before = self._sources()
        self._turn += 1
        over = self._turn > self.num_turns
        self._asked = tuple(
            self._next(index, prompt, image, over)
            for index, (prompt, image) in enumerate(zip(self._asked, images, strict=True))
        )
        return over

    def _next(self, index: int, prompt: Prompt, image: Images, over: bool) -> Prompt:
        begun = self._begun[index]
        turns = begun.metadata.get("turns", ())
        text, metadata = prompt.text, prompt.metadata
        if not over and self._turn - 2 < len(turns):
            turn = turns[self._turn - 2]
            text, metadata = turn["prompt"], {key: value for key, value in turn.items() if key != "prompt"}
        group = f"{begun.group}/turn{self._turn}" if begun.group else ""
        return Prompt(text, (image, *prompt.source_images[1:]), metadata, f"{begun.id}/turn{self._turn}", group)

    def _frame(self, index: int) -> Images:
        before = self._asked[index].source_images if self._before is None else self._before[index]
        return np.concatenate([*before, self._canvas(index)], axis=1)


class ImageEditingEnv(ImageEnv):
    """``pdtr/ImageEditing-v0``: one instruction and its source image, ``num_turns`` edits.

    The arguments are those of :class:`ImageEditingVectorEnv` without ``num_envs``.
    """

    def __init__(
        self,
        reward: Reward | None = None,
        prompts: PromptPool | None = None,
        image_size: tuple[int, int] = (48, 48),
        num_turns: int = 1,
        render_mode: str | None = None,
    ) -> None:
        super().__init__(ImageEditingVectorEnv(1, reward, prompts, image_size, num_turns, render_mode))


def check_turns(prompt: Prompt, where: str, text_space: UnicodeText) -> None:
    """Raise a ValueError where ``metadata["turns"]`` is there and is no list of mappings with a ``"prompt"``."""
    turns = prompt.metadata.get("turns", [])
    if not isinstance(turns, list | tuple):
        raise ValueError(f"{where}.metadata['turns']: expected a list of mappings, got {type(turns).__name__}")
    for number, turn in enumerate(turns):
        text = turn.get("prompt") if isinstance(turn, Mapping) else turn
        if not isinstance(turn, Mapping) or text not in text_space:
            raise ValueError(
                f"{where}.metadata['turns'][{number}]: expected a mapping with 'prompt', {text_space.description}, "
                f"got {describe_text(text)}"
            )
