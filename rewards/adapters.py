"""Reward functions that were written for other libraries, unchanged, as rewards of this one.

Each adapter takes such a function and the traits it wants to be called with, and returns a reward. What the function
gives as None or NaN is NaN here, with a reason. What it gives *instead* of a missing answer, say 0, no adapter can tell
from an answer.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np

from rewards.base import Images, Prompt, Reward, RewardTraits, Scores
from rewards.foreign import (
    Answer,
    Foreign,
    after,
    as_float_tensor,
    as_json,
    as_numbers,
    as_pil,
    as_scores,
    as_tensor,
    check_callable,
    chosen_from,
    column_value,
    gathered,
    has_parameter,
    is_number,
    is_number_per_image,
    metadata_dicts,
    named_reward,
    texts,
)
from rewards.names import hint

_PLAIN = RewardTraits()
_PADDING = -10.0  # What Flow-GRPO's GenEval server puts into accuracies by tag, for images of other tags.


def from_flow_grpo(fn: Foreign, traits: RewardTraits = _PLAIN, images: Literal["float", "uint8"] = "float") -> Reward:
    """A reward of Flow-GRPO (arXiv:2505.05470) or DDPO: ``fn(images, prompts, metadata) -> (scores, info)``.

    Scores are a list, an array or a tensor of B numbers, or a dictionary of them whose ``avg`` is the total, as
    ``multi_score`` returns it; the others become components. ``info`` is left out.

    Args:
        fn: the function; prompts are a list of texts, metadata a list of dictionaries.
        traits: how it wants to be called; name its models in ``fingerprint``.
        images: "float", the tensor [B, 3, H, W] in [0, 1] of Flow-GRPO's trainers, or "uint8", the array [B, H, W, 3].

    Raises:
        ValueError: here, if the function cannot be called so; when called, if it does not return such scores.
    """
    convert = chosen_from("images", images, {"float": as_float_tensor, "uint8": np.copy})
    name = check_callable(fn, "images", "prompts", "metadata")

    def reward(batch: Images, prompts: Sequence[Prompt]) -> Answer:
        answer = fn(convert(batch), texts(prompts), metadata_dicts(prompts))
        return after(answer, partial(_flow_grpo_scores, name, len(batch)))

    return named_reward(reward, name, traits)


def from_flow_grpo_edit(
    fn: Foreign, traits: RewardTraits = _PLAIN, images: Literal["float", "uint8"] = "float"
) -> Reward:
    """A reward of Edit-R1 (arXiv:2510.16888): ``fn(ref_images, images, prompts, metadata) -> (scores, info)``.

    As :func:`from_flow_grpo`; ``ref_images`` are the source images, a PIL image a sample.

    Raises:
        ValueError: as there, and when called, for a prompt without exactly one source image.
    """
    convert = chosen_from("images", images, {"float": as_float_tensor, "uint8": np.copy})
    name = check_callable(fn, "ref_images", "images", "prompts", "metadata")

    def reward(batch: Images, prompts: Sequence[Prompt]) -> Answer:
        for prompt in prompts:
            if len(prompt.source_images) != 1:
                raise ValueError(
                    f"{name}: expected one source image a prompt, got {len(prompt.source_images)} for "
                    f"prompt {prompt.id or prompt.text!r}; score text-to-image prompts with from_flow_grpo"
                )
        sources = [as_pil(prompt.source_images[0]) for prompt in prompts]
        answer = fn(sources, convert(batch), texts(prompts), metadata_dicts(prompts))
        return after(answer, partial(_flow_grpo_scores, name, len(batch)))

    return named_reward(reward, name, traits)


def from_trl(fn: Foreign, columns: Sequence[str] = (), traits: RewardTraits = _PLAIN) -> Reward:
    """A reward function of trl: ``fn(prompts=, completions=, **columns) -> list[float | None]``, sync or async.

    Args:
        fn: the function; prompts are a list of texts, completions a list of PIL images.
        columns: keys of the prompts' metadata that it is given, a list of B values each, as trl does with the columns
            of a dataset.
        traits: how it wants to be called.

    Raises:
        ValueError: here, if the function cannot be called with these columns; when called, if a prompt's metadata
            lacks one, or the function does not return one number or None an image.
    """
    if isinstance(columns, str):
        raise ValueError(f"columns: expected a sequence of names, got the text {columns!r}; write ({columns!r},)")
    name = check_callable(fn, prompts=None, completions=None, **dict.fromkeys(columns))

    def reward(batch: Images, prompts: Sequence[Prompt]) -> Answer:
        values = {column: [column_value(name, column, prompt) for prompt in prompts] for column in columns}
        answer = fn(prompts=texts(prompts), completions=[as_pil(image) for image in batch], **values)
        return after(answer, partial(as_scores, name, len(batch)))

    return named_reward(reward, name, traits)


def from_flow_factory(model: Foreign, traits: RewardTraits = _PLAIN) -> Reward:
    """A reward model of Flow-Factory: ``model(prompt=, image=, condition_images=)`` with ``.rewards`` in its answer.

    ``image`` is a list of PIL images, ``condition_images`` a list of each sample's source images, or None where no
    prompt has one. A model with ``use_tensor_inputs`` gets tensors [3, H, W] in [0, 1]. One that takes ``metadata``, or
    has it among its ``required_fields``, gets each prompt's as JSON, as Flow-Factory hands on a data set's columns.
    Entries of ``extra_info`` that are one number an image become components; all others are left out.

    Args:
        model: the reward model. A groupwise one needs traits of group scope: ``RewardTraits(scope="group")``.
        traits: how it wants to be called.

    Raises:
        ValueError: here, if the model cannot be called so or is groupwise and the traits are not; when called, if it
            does not return one number an image.
    """
    takes_metadata = "metadata" in getattr(model, "required_fields", ()) or has_parameter(model, "metadata")
    known = {"metadata": None} if takes_metadata else {}
    name = check_callable(model, prompt=None, image=None, condition_images=None, **known)
    if traits.scope != "group" and any(base.__name__ == "GroupwiseRewardModel" for base in type(model).__mro__):
        raise ValueError(f"traits: expected group scope for {name}, which is groupwise, got {traits.scope!r}")
    picture = as_float_tensor if getattr(model, "use_tensor_inputs", False) else as_pil

    def reward(batch: Images, prompts: Sequence[Prompt]) -> Answer:
        sources = [[picture(source) for source in prompt.source_images] for prompt in prompts]
        answer = model(
            prompt=texts(prompts),
            image=[picture(image) for image in batch],
            condition_images=sources if any(sources) else None,
            **({"metadata": [as_json(name, prompt) for prompt in prompts]} if takes_metadata else {}),
        )
        return after(answer, partial(_flow_factory_scores, name, len(batch)))

    return named_reward(reward, name, traits)


def from_verl_omni(fn: Foreign, traits: RewardTraits = _PLAIN, image: Literal["uint8", "float"] = "uint8") -> Reward:
    """A scorer of verl-omni: ``fn(data_source=, solution_image=, ground_truth=, extra_info=) -> {"score": number}``.

    It is called for one image at a time, sync or async; ``traits.concurrency`` bounds how many at once. Further numbers
    in its answer become components, NaN for images that lack them; everything else is left out.

    ``data_source`` and ``ground_truth`` are those of the prompt's metadata, or empty and the prompt's text;
    ``extra_info`` is the metadata, and for an edit ``source_img``, the first source image as a PIL image.

    Args:
        fn: the scorer; bind what verl-omni takes from its configuration with ``functools.partial``.
        traits: how it wants to be called; its ``batch_size`` is 1.
        image: ``solution_image`` is a tensor [3, H, W], of "uint8" or, as later versions have it, "float" in [0, 1].

    Raises:
        ValueError: here, if the scorer cannot be called so; when called, if it returns no score.
    """
    picture = chosen_from("image", image, {"uint8": as_tensor, "float": as_float_tensor})
    name = check_callable(fn, data_source=None, solution_image=None, ground_truth=None, extra_info=None)

    def ask(pixels: Images, prompt: Prompt) -> Any:
        sources = {"source_img": as_pil(prompt.source_images[0])} if prompt.source_images else {}
        return fn(
            data_source=prompt.metadata.get("data_source", ""),
            solution_image=picture(pixels),
            ground_truth=prompt.metadata.get("ground_truth", prompt.text),
            extra_info={**sources, **prompt.metadata},
        )

    def reward(batch: Images, prompts: Sequence[Prompt]) -> Answer:
        answers = [ask(pixels, prompt) for pixels, prompt in zip(batch, prompts, strict=True)]
        together = gathered(answers) if any(map(inspect.isawaitable, answers)) else answers
        return after(together, partial(_verl_omni_scores, name))

    return named_reward(reward, name, replace(traits, batch_size=1))


def _flow_grpo_scores(name: str, count: int, answer: Any) -> Scores:
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise ValueError(f"{name}: expected (scores, info), got {answer!r:.80}")
    scores, _ = answer
    if not isinstance(scores, Mapping):
        return as_scores(name, count, scores)
    if "avg" not in scores:
        raise ValueError(f"{name}: expected 'avg' among its scores, got {', '.join(scores)}{hint('avg', scores)}")
    parts = {key: as_numbers(name, key, values, count) for key, values in scores.items() if key != "avg"}
    for key, values in parts.items():
        if key.endswith("_accuracy"):
            values[values == _PADDING] = np.nan
    return as_scores(name, count, scores["avg"], parts)


def _flow_factory_scores(name: str, count: int, answer: Any) -> Scores:
    rewards = getattr(answer, "rewards", None)
    if rewards is None:
        raise ValueError(f"{name}: expected an answer with .rewards, got {answer!r:.80}")
    info = getattr(answer, "extra_info", None) or {}
    # What else is in there may have any shape.
    parts = {key: values for key, values in info.items() if is_number_per_image(values, count)}
    return as_scores(name, count, rewards, {key: as_numbers(name, key, values, count) for key, values in parts.items()})


def _verl_omni_scores(name: str, answers: Sequence[Any]) -> Scores:
    rows = [answer if isinstance(answer, Mapping) else {"score": answer} for answer in answers]
    for row in rows:
        if "score" not in row:
            raise ValueError(f"{name}: expected 'score' in its answer, got {', '.join(row)}{hint('score', row)}")
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if key != "score" and is_number(value))
    parts = {key: [row.get(key) if is_number(row.get(key)) else None for row in rows] for key in keys}
    components = {key: as_numbers(name, key, values, len(rows)) for key, values in parts.items()}
    return as_scores(name, len(rows), [row["score"] for row in rows], components)
