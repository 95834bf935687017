"""Text-to-image as an environment: a prompt is observed, the action is the image, and the episode is over."""

from __future__ import annotations

from typing import Any

from gymnasium.spaces import Space

from envs.base import ImageEnv, ImageVectorEnv, Observation
from envs.prompts import PromptPool
from rewards.base import Images, Prompt, Reward


class TextToImageVectorEnv(ImageVectorEnv):
    """``pdtr/TextToImage-v0`` for N prompts at once; see :class:`envs.base.ImageVectorEnv` for the spaces and infos.

    Args:
        num_envs: N.
        reward: what scores the images; ``envs.scenes.rewards.t2i_reward`` unless given.
        prompts: where prompts come from; the embedded world's training prompts unless given.
        image_size: (H, W) in pixels.
        render_mode: ``"rgb_array"``, ``"human"`` or None.

    Raises:
        ValueError: an argument is not as described.
    """

    def __init__(
        self,
        num_envs: int = 1,
        reward: Reward | None = None,
        prompts: PromptPool | None = None,
        image_size: tuple[int, int] = (48, 48),
        render_mode: str | None = None,
    ) -> None:
        if reward is None:
            from envs.scenes.rewards import t2i_reward

            reward = t2i_reward
        if prompts is None:
            from envs.scenes.suite import ScenesPool

            prompts = ScenesPool("t2i")
        super().__init__(num_envs, reward, prompts, image_size, render_mode)

    def _extra_spaces(self) -> dict[str, Space[Any]]:
        return {}

    def _observe(self) -> Observation:
        return {"prompt": tuple(prompt.text for prompt in self._asked)}

    def _check_prompt(self, prompt: Prompt, where: str) -> None:
        if prompt.source_images:
            raise ValueError(
                f"{where}.source_images: expected none for text-to-image, got {len(prompt.source_images)}; "
                "use pdtr/ImageEditing-v0"
            )

    def _advance(self, images: Images) -> bool:
        return True

    def _frame(self, index: int) -> Images:
        return self._canvas(index)


class TextToImageEnv(ImageEnv):
    """``pdtr/TextToImage-v0``: one prompt, one image, one reward.

    The arguments are those of :class:`TextToImageVectorEnv` without ``num_envs``.
    """

    def __init__(
        self,
        reward: Reward | None = None,
        prompts: PromptPool | None = None,
        image_size: tuple[int, int] = (48, 48),
        render_mode: str | None = None,
    ) -> None:
        super().__init__(TextToImageVectorEnv(1, reward, prompts, image_size, render_mode))
