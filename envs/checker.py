"""Check that an environment keeps this library's contract, beyond what Gymnasium's own checker asks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Box, Dict
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, iterate
from numpy.typing import NDArray

from envs.base import ImageEnv, ImageVectorEnv, Observation
from envs.denoising import DenoisingEnv, DenoisingVectorEnv
from envs.spaces import UnicodeText
from rewards.base import Images, Prompt, Values

AnyEnv = gymnasium.Env[Any, Any] | VectorEnv[Any, Any, Any]

_SEED = 7
_MAX_STEPS = 1000
_TEXTS = (
    "a red circle",
    "",
    "\N{WOMAN}\N{ZERO WIDTH JOINER}\N{ROCKET} and \N{SLEUTH OR SPY}\N{VARIATION SELECTOR-16}",
    "\N{HEBREW LETTER SHIN}\N{HEBREW LETTER LAMED} \N{RIGHT-TO-LEFT OVERRIDE}abc\N{POP DIRECTIONAL FORMATTING}",
    "line one\nline two\t\x00end",
    "a very long prompt " * 1000,
)


def check_image_env(env: AnyEnv) -> None:
    """Check an image environment, or the denoising chain of one, single or vector.

    Gymnasium's ``check_env`` without a warning (single environments); spaces; autoreset disabled; the same episode from
    the same seed; prompts of any script chosen by ``reset(options={"prompts": ...})``, their source images observed
    unchanged; a missing reward delivered as NaN and reported; a ValueError that says what was expected and what came
    for a bad action, option or number of prompts. For a chain also: the next state is the action, bit for bit, and the
    reward is 0 before the last transition.

    Args:
        env: the environment; wrappers are taken off.

    Raises:
        ValueError: a property does not hold; the message says which and what to mend.
    """
    bare: AnyEnv = env.unwrapped
    if isinstance(bare, gymnasium.Env):
        _check_gymnasium(bare)
    else:
        _check_vector(bare)
    members = _Members(bare)
    if isinstance(bare, DenoisingEnv | DenoisingVectorEnv):
        check_image_env(bare.outer)
        _check_chain(members)
    else:
        _check_spaces(members)
        _check_prompts(members)
    _check_seeding(members)
    _check_refusals(members)
    _check_end(members)
    _check_missing_reward(members)


class _Members:
    """A single environment as a vector of one, so that every check is written once."""

    def __init__(self, env: AnyEnv) -> None:
        self.env = env
        single = isinstance(env, gymnasium.Env)
        self.count = 1 if isinstance(env, gymnasium.Env) else env.num_envs
        self.observation_space: Any = getattr(env, "observation_space" if single else "single_observation_space")
        self.action_space: Any = getattr(env, "action_space" if single else "single_action_space")

    def reset(self, seed: int | None = None, **options: Any) -> tuple[list[Observation], dict[str, Any]]:
        observation, infos = self.env.reset(seed=seed, options=options)
        return self._split(observation), infos

    def step(self, actions: Any) -> tuple[list[Observation], NDArray[Any], bool, dict[str, Any]]:
        """The observations, rewards, whether the episode is over, and the infos."""
        single = isinstance(self.env, gymnasium.Env)
        outcome: Any = self.env.step(actions[0] if single else actions)
        observation, rewards, terminated, truncated, infos = outcome
        over = np.atleast_1d(terminated) | np.atleast_1d(truncated)
        if over.any() != over.all():
            raise ValueError(f"step: expected all members to end together, got {over.tolist()}")
        return self._split(observation), np.atleast_1d(rewards), bool(over.all()), infos

    def actions(self, seed: int = _SEED) -> NDArray[Any]:
        """Sampled actions, [N, ...]."""
        self.action_space.seed(seed)
        return np.stack([self.action_space.sample() for _ in range(self.count)])

    def finish(self) -> list[tuple[NDArray[Any], dict[str, Any]]]:
        """Sampled actions to the end of the episode: the rewards and infos of every step."""
        steps = []
        for number in range(_MAX_STEPS):
            _, rewards, over, infos = self.step(self.actions(number))
            steps.append((rewards, infos))
            if over:
                return steps
        raise ValueError(f"step: expected the episode to end, got {_MAX_STEPS} steps without an end")

    def _split(self, observation: Any) -> list[Observation]:
        if isinstance(self.env, gymnasium.Env):
            return [observation]
        return list(iterate(self.env.observation_space, observation))


def _check_gymnasium(env: gymnasium.Env[Any, Any]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            check_env(env, skip_render_check=env.spec is None)
        except AssertionError as error:
            raise ValueError(f"gymnasium's check_env: {error}") from error
    if caught:
        raise ValueError(f"gymnasium's check_env: expected no warning, got: {caught[0].message}")


def _check_vector(env: VectorEnv[Any, Any, Any]) -> None:
    mode = env.metadata.get("autoreset_mode")
    if mode != AutoresetMode.DISABLED:
        raise ValueError(
            f"metadata['autoreset_mode']: expected AutoresetMode.DISABLED, got {mode}; the curriculum chooses the next "
            "prompts through reset"
        )
    for name in ("observation_space", "action_space"):
        expected, got = batch_space(getattr(env, f"single_{name}"), env.num_envs), getattr(env, name)
        if expected != got:
            raise ValueError(f"{name}: expected batch_space(single_{name}, {env.num_envs}), got {got}")


def _check_spaces(members: _Members) -> None:
    action, space = members.action_space, members.observation_space
    is_image = isinstance(action, Box) and action.dtype == np.uint8 and len(action.shape) == 3 and action.shape[2] == 3
    if not is_image or (action.low != 0).any() or (action.high != 255).any():
        raise ValueError(f"action_space: expected Box(0, 255, (H, W, 3), uint8), got {action}")
    if not isinstance(space, Dict) or not isinstance(space.spaces.get("prompt"), UnicodeText):
        raise ValueError(f"observation_space: expected a Dict with 'prompt': UnicodeText, got {space}")
    source = space.spaces.get("source_image")
    if source is not None and source != action:
        raise ValueError(f"observation_space['source_image']: expected the action's space, {action}, got {source}")
    several = space.spaces.get("source_images")
    if several is None:
        return
    count = several.shape[0] if isinstance(several, Box) and len(several.shape) == 4 else 0
    if count < 2 or several != Box(0, 255, (count, *action.shape), np.uint8):
        raise ValueError(f"observation_space['source_images']: expected two or more of {action}, got {several}")


def _check_prompts(members: _Members) -> None:
    for start in range(len(_TEXTS)):
        prompts = _probes(members, start)
        before = [image.copy() for prompt in prompts for image in prompt.source_images]
        observations, infos = members.reset(prompts=prompts)
        for observation, prompt in zip(observations, prompts, strict=True):
            _check_asked(observation, prompt)
        ids = [infos["prompt_id"]] if "prompt_id" in infos else list(infos.get("prompt_ids", ()))
        if ids != [prompt.id for prompt in prompts]:
            raise ValueError(f"infos: expected the prompts' ids, {[p.id for p in prompts]}, got {ids}")
        for observation in observations:
            _observed_sources(observation)[:] = 0
        after = [image for prompt in prompts for image in prompt.source_images]
        if not all(np.array_equal(a, b) for a, b in zip(before, after, strict=True)):
            raise ValueError("source_image: expected an array of the observation's own, got the prompt's; copy it")


def _check_asked(observation: Observation, prompt: Prompt) -> None:
    if observation["prompt"] != prompt.text:
        raise ValueError(
            f"reset(options={{'prompts': ...}}): expected to observe {prompt.text[:60]!r}, got "
            f"{str(observation['prompt'])[:60]!r}; ask for the prompts that were given, unchanged"
        )
    sources = _observed_sources(observation)
    if len(sources) and not np.array_equal(sources, np.stack(prompt.source_images)):
        raise ValueError("source_image: expected the prompt's own pixels, got others; hand them on unchanged")


def _num_sources(members: _Members) -> int:
    """Pictures that an observation has, by its space: those of ``source_images``, or ``source_image``, or none."""
    spaces = members.observation_space.spaces
    return int(spaces["source_images"].shape[0]) if "source_images" in spaces else int("source_image" in spaces)


def _observed_sources(observation: Observation) -> NDArray[np.uint8]:
    """A view of the pictures of an observation, [K, H, W, 3]."""
    if "source_image" in observation:
        return np.asarray(observation["source_image"])[None]
    return np.asarray(observation.get("source_images", np.empty(0, np.uint8)))


def _probes(members: _Members, start: int) -> list[Prompt]:
    """Prompts of several scripts, with as many random source images as are observed."""
    rng = np.random.default_rng(start)
    shape, count = members.action_space.shape, _num_sources(members)
    return [
        Prompt(
            _TEXTS[(start + index) % len(_TEXTS)],
            tuple(rng.integers(0, 256, (count, *shape), np.uint8)),
            {},
            f"probe/{start}/{index}",
        )
        for index in range(members.count)
    ]


def _check_seeding(members: _Members) -> None:
    episodes = [(members.reset(_SEED), members.finish(), members.reset(), members.finish()) for _ in range(2)]
    if not data_equivalence(episodes[0], episodes[1], exact=True):
        raise ValueError(
            f"reset(seed={_SEED}): expected the same episodes from the same seed and actions, got others; draw from "
            "self.np_random alone, and seed whatever the reward draws"
        )


def _check_refusals(members: _Members) -> None:
    good = members.actions()
    bad = {
        "another dtype": good.astype(np.float64),
        "another height": good[:, :, 1:],
        "a missing axis": good[..., 0],
        "a list": [None] * members.count,
    }
    if not isinstance(members.env, gymnasium.Env):
        bad["another number of actions"] = np.concatenate([good, good[:1]])
    for name, actions in bad.items():
        members.reset(_SEED)
        _expect_refusal(f"step with {name}", partial(members.step, actions))
    _expect_refusal("reset(options={'promts': []})", partial(members.reset, promts=[]))
    _expect_refusal("reset with no prompts in options", partial(members.reset, prompts=[]))


def _expect_refusal(what: str, call: Callable[[], object]) -> None:
    fix = "raise a ValueError that says what was expected and what it got"
    try:
        call()
    except ValueError as error:
        message = str(error)
        if "expected" in message and "got" in message:
            return
        raise ValueError(f"{what}: expected a message with 'expected' and 'got', got {message!r}; {fix}") from error
    except Exception as error:
        raise ValueError(f"{what}: expected a ValueError, got {type(error).__name__}: {error}; {fix}") from error
    raise ValueError(f"{what}: expected a ValueError, got no error; {fix}")


def _check_end(members: _Members) -> None:
    members.reset(_SEED)
    members.finish()
    try:
        members.step(members.actions())
    except ResetNeeded:
        return
    raise ValueError(
        "step after the end: expected gymnasium.error.ResetNeeded, got another step; autoreset is disabled here"
    )


def _check_missing_reward(members: _Members) -> None:
    """Rewards and ``reward_available`` agree, and a reward that fails comes through as NaN."""
    members.reset(_SEED)
    _check_available(members.finish(), None)
    outer: Any = members.env
    while isinstance(outer, DenoisingEnv | DenoisingVectorEnv):
        outer = outer.outer.unwrapped
    image_env = outer.vector if isinstance(outer, ImageEnv) else outer
    if not isinstance(image_env, ImageVectorEnv):
        return
    reward = image_env.reward
    try:
        image_env.reward = _not_available
        members.reset(_SEED)
        _check_available(members.finish(), False)
    finally:
        image_env.reward = reward


def _not_available(images: Images, prompts: object) -> Values:
    return np.full(len(images), np.nan, np.float32)


def _check_available(steps: list[tuple[NDArray[Any], dict[str, Any]]], expected: bool | None) -> None:
    rewards, infos = steps[-1]
    if "reward_available" not in infos:
        raise ValueError(f"infos: expected 'reward_available' with the reward, got {sorted(infos)}")
    available = np.atleast_1d(infos["reward_available"])
    if not np.array_equal(available, ~np.isnan(rewards)) or (expected is not None and (available != expected).any()):
        raise ValueError(
            f"rewards: expected NaN where no reward is available, and only there, got {rewards.tolist()} with "
            f"reward_available {available.tolist()}; never put a number in its place"
        )


def _check_chain(members: _Members) -> None:
    members.reset(_SEED)
    sigma, over, number = np.inf, False, 0
    while not over and number < _MAX_STEPS:
        actions = members.actions(number)
        observations, rewards, over, infos = members.step(actions)
        number += 1
        if not all(np.array_equal(o["latents"], a) for o, a in zip(observations, actions, strict=True)):
            # A chain that begins anew, in editing of several turns, starts from fresh noise.
            if not infos.keys() & {"latent_seed", "latent_seeds"}:
                raise ValueError("latents: expected the action as the next state, bit for bit, got other values")
            sigma = np.inf
            continue
        if not observations[0]["sigma"][0] < sigma:
            raise ValueError(f"sigma: expected it to fall, got {observations[0]['sigma'][0]} after {sigma}")
        sigma = observations[0]["sigma"][0]
        if sigma > 0 and rewards.any():
            raise ValueError(f"rewards: expected 0 before the last transition, got {rewards.tolist()} at sigma {sigma}")
