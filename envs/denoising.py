"""The denoising chain of an image environment, transition by transition, for any reinforcement-learning library.

The inner of two nested decision processes (DDPO, arXiv:2305.13301; Flow-GRPO, arXiv:2505.05470): the state is
(x_sigma, sigma, condition), the action is the next latent, and only the last transition is rewarded, by the outer
environment for the decoded image. Nothing is rescaled, clipped or cast: the next state *is* the action, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, iterate
from numpy.typing import NDArray

from envs.base import Observation, describe_array
from envs.chain import Chains, DenoisingChain, Float, draw_seed, draw_seeds
from envs.window import RENDER_MODES, Window, check_render_mode
from rewards.base import Images

_METADATA: dict[str, Any] = {"render_modes": list(RENDER_MODES), "render_fps": 4}
_VECTOR_METADATA: dict[str, Any] = {**_METADATA, "autoreset_mode": AutoresetMode.DISABLED}


class DenoisingVectorEnv(VectorEnv[Observation, Float, NDArray[Any]]):
    """``pdtr/Denoising-v0`` for N chains in step; autoreset is disabled.

    - Observation: ``latents`` float32 [N, C, h, w], ``sigma`` float32 [N, 1], ``condition`` float32 [N, E].
    - Action: the next latents, float32 [N, C, h, w]; they are the next state, bit for bit.
    - Reward: 0 until a chain's last transition, then the outer environment's for the decoded image. Where the outer
      episode goes on (editing in several turns), the next chain starts from fresh noise on the outer's new observation.
    - ``infos``: ``latent_seeds`` after a reset and where a chain starts; the outer's infos after a last transition.

    ``reset(options=...)`` takes ``prompts`` (the outer's) and ``latent_seeds`` (N integers for ``initial_latents``).

    Args:
        num_envs: N.
        outer: the image environment, with N members and autoreset disabled; ``TextToImageVectorEnv`` unless given.
        chain: sigmas, shapes, codec and condition.
        render_mode: ``"rgb_array"``, ``"human"`` or None; a frame is the decoded state.

    Raises:
        ValueError: an argument is not as described.
    """

    metadata = _VECTOR_METADATA

    def __init__(
        self,
        num_envs: int = 1,
        outer: VectorEnv[Any, Any, Any] | None = None,
        chain: DenoisingChain | None = None,
        render_mode: str | None = None,
    ) -> None:
        if outer is None:
            from envs.text_to_image import TextToImageVectorEnv

            outer = TextToImageVectorEnv(num_envs)
        if outer.num_envs != num_envs or outer.metadata.get("autoreset_mode") != AutoresetMode.DISABLED:
            raise ValueError(
                f"outer: expected num_envs={num_envs} and autoreset disabled, got num_envs={outer.num_envs} and "
                f"{outer.metadata.get('autoreset_mode')}"
            )
        self.num_envs = num_envs
        self.outer = outer
        self.chain = chain or DenoisingChain()
        self.render_mode = check_render_mode(render_mode)
        self.single_observation_space = self.chain.observation_space()
        self.single_action_space = self.chain.action_space()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._chains = Chains(self.chain, num_envs)
        self._window = Window("Denoising")

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start N outer episodes and their chains.

        Raises:
            ValueError: an unknown option or a wrong number of prompts or seeds.
        """
        super().reset(seed=seed)
        self._chains.step = -1
        seeds, outer_options = draw_seeds(options or {}, self.num_envs, self.np_random)
        observation, infos = self.outer.reset(seed=seed, options=outer_options)
        self._start(seeds, observation)
        self._show_if_human()
        return self._chains.observe(), {**infos, "latent_seeds": np.array(seeds)}

    def step(self, actions: Float) -> tuple[Observation, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Take the next latents of every chain, float32 [N, C, h, w].

        Raises:
            ValueError: the action has another type or shape, or lies out of bounds.
            gymnasium.error.ResetNeeded: there is no chain under way.
        """
        last = self._chains.advance(actions)
        self._show_if_human()
        if not last:
            going_on = np.zeros(self.num_envs, np.bool_)
            return self._chains.observe(), np.zeros(self.num_envs), going_on, going_on.copy(), {}
        observation, rewards, terminations, truncations, infos = self.outer.step(self._chains.images())
        over = terminations | truncations
        if over.any() != over.all():
            raise ValueError(f"outer: expected episodes that end together, got {over.tolist()}")
        if not over.all():
            self._start([draw_seed(self.np_random) for _ in range(self.num_envs)], observation)
            infos = {**infos, "latent_seeds": np.array(self._chains.seeds)}
        return self._chains.observe(), rewards, terminations, truncations, infos

    def render(self) -> tuple[Images, ...] | None:
        """The decoded state of each chain, or None after showing them (``human``)."""
        if self.render_mode is None:
            return None
        frames = tuple(self._chains.images())
        if self.render_mode == "rgb_array":
            return frames
        self._window.show(np.concatenate(frames, axis=1))
        return None

    def close_extras(self, **kwargs: Any) -> None:
        """Close the window and the outer environment."""
        self._window.close()
        self.outer.close()

    def _start(self, seeds: Sequence[int], observation: Any) -> None:
        self._chains.start(seeds, list(iterate(self.outer.observation_space, observation)))

    def _show_if_human(self) -> None:
        if self.render_mode == "human":
            self.render()


class DenoisingEnv(gymnasium.Env[Observation, Float]):
    """``pdtr/Denoising-v0``: one chain; see :class:`DenoisingVectorEnv`, whose arrays these are without the first axis.

    Args:
        outer: the image environment; ``TextToImageEnv`` unless given.
        chain: sigmas, shapes, codec and condition.
        render_mode: ``"rgb_array"``, ``"human"`` or None.

    Raises:
        ValueError: an argument is not as described.
    """

    metadata = _METADATA

    def __init__(
        self,
        outer: gymnasium.Env[Any, Any] | None = None,
        chain: DenoisingChain | None = None,
        render_mode: str | None = None,
    ) -> None:
        if outer is None:
            from envs.text_to_image import TextToImageEnv

            outer = TextToImageEnv()
        self.outer = outer
        self.chain = chain or DenoisingChain()
        self.render_mode = check_render_mode(render_mode)
        self.observation_space = self.chain.observation_space()
        self.action_space = self.chain.action_space()
        self._chains = Chains(self.chain, 1)
        self._window = Window("Denoising")

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an outer episode and its chain; options ``prompts`` and ``latent_seeds``, one of each.

        Raises:
            ValueError: an unknown option or a wrong number of prompts or seeds.
        """
        super().reset(seed=seed)
        self._chains.step = -1
        seeds, outer_options = draw_seeds(options or {}, 1, self.np_random)
        observation, info = self.outer.reset(seed=seed, options=outer_options)
        self._chains.start(seeds, [observation])
        self._show_if_human()
        return self._observe(), {**info, "latent_seed": seeds[0]}

    def step(self, action: Float) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Take the next latent, float32 [C, h, w].

        Raises:
            ValueError: the action has another type or shape, or lies out of bounds.
            gymnasium.error.ResetNeeded: there is no chain under way.
        """
        if not isinstance(action, np.ndarray) or action.shape != self.chain.latent_shape:
            raise ValueError(f"action: expected float32 {list(self.chain.latent_shape)}, got {describe_array(action)}")
        last = self._chains.advance(action[None])
        self._show_if_human()
        if not last:
            return self._observe(), 0.0, False, False, {}
        observation, reward, terminated, truncated, info = self.outer.step(self._chains.images()[0])
        if not (terminated or truncated):
            seed = draw_seed(self.np_random)
            self._chains.start([seed], [observation])
            info = {**info, "latent_seed": seed}
        return self._observe(), float(reward), terminated, truncated, info

    def render(self) -> Images | None:
        """The decoded state, uint8 [H, W, 3], or None after showing it (``human``)."""
        if self.render_mode is None:
            return None
        frame: Images = self._chains.images()[0]
        if self.render_mode == "rgb_array":
            return frame
        self._window.show(frame)
        return None

    def close(self) -> None:
        """Close the window and the outer environment."""
        self._window.close()
        self.outer.close()

    def _observe(self) -> Observation:
        return {name: value[0] for name, value in self._chains.observe().items()}

    def _show_if_human(self) -> None:
        if self.render_mode == "human":
            self.render()
