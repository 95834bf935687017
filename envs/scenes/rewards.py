"""The two rewards of the embedded world: the GenEval rule for text-to-image, success times preservation for edits.

Both are plain functions ``(images, prompts) -> Scores`` that score every image by itself. A prompt that cannot be
judged gives NaN with a reason, and leaves the others of its batch as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from envs.scenes.detector import detect
from envs.scenes.edit_goals import Edit, read_edit
from envs.scenes.edit_reading import CONFIDENT
from envs.scenes.edit_reward import Source, judge, with_baseline
from envs.scenes.world import COLORS, SHAPES
from rewards.base import Images, Prompt, Scores
from rewards.geneval import Detection, GenEvalRule, Metadata, validate_metadata

# One threshold for all skills: GenEval's .3 and .9 belong to its Mask2Former. Where the detector here is above this,
# a shape is undamaged or a little blurred and noisy.
RULE = GenEvalRule(threshold=CONFIDENT, counting_threshold=CONFIDENT)


def t2i_reward(images: Images, prompts: Sequence[Prompt]) -> Scores:
    """The GenEval rule over the scenes' detector.

    The total is the dense score of Flow-GRPO (arXiv:2505.05470), see ``GenEvalRule.dense``; the components are

    - ``strict``: every count, colour and position is as asked, and no further sure object is in the picture;
    - ``official``: the benchmark's own evaluation (arXiv:2310.11513).

    Differs: GenEval's photographs hold what they like beside what is asked, a scene holds nothing else, so ``strict``
    counts the objects of every class; the thresholds fit the detector here. A colour that a prompt does not name is
    free, in GenEval as here.

    Args:
        images: uint8 [B, H, W, 3].
        prompts: B prompts with GenEval metadata over ``SHAPES`` and ``COLORS``.

    Returns:
        Scores, float32 [B]; NaN, with a reason, where the metadata is not such.
    """
    values, reasons = np.full((3, len(images)), np.nan, np.float32), {}
    rows = []
    for row, prompt in enumerate(prompts):
        try:
            _check_scene_metadata(prompt.metadata)
            rows.append(row)
        except ValueError as error:
            reasons[row] = str(error)
    for row, detections in zip(rows, detect(images[rows]), strict=True):
        values[:, row] = _t2i_values(detections, prompts[row].metadata)
    return Scores(values[0], {"strict": values[1], "official": values[2]}, reasons)


def _t2i_values(detections: Sequence[Detection], metadata: Metadata) -> tuple[float, float, float]:
    result = RULE.dense(detections, metadata)
    asked = sum(clause["count"] for clause in metadata["include"])
    alone = sum(d.confidence > CONFIDENT for d in detections) == asked
    return result.score, float(result.strict and alone), float(RULE.official(detections, metadata))


def _check_scene_metadata(metadata: Metadata) -> None:
    validate_metadata(metadata)
    for index, clause in enumerate(metadata["include"]):
        for key, names in (("class", SHAPES), ("color", tuple(COLORS))):
            if key in clause and clause[key] not in names:
                raise ValueError(f"include[{index}].{key}: expected one of {', '.join(names)}, got {clause[key]!r}")


def edit_reward(images: Images, prompts: Sequence[Prompt]) -> Scores:
    """Success of the instruction times preservation of all that it does not name, both in [0, 1].

    The untouched source scores 0, and so, nearly, does a picture that has what was asked for and lost the rest; one
    operation of two earns a quarter. The components are ``strict`` (everything is done, everything else is in its
    place within ``STRICT_OFFSET`` pixels, nothing is added), ``success`` and ``preservation``; see
    ``envs.scenes.edit_reward``.

    Args:
        images: uint8 [B, H, W, 3].
        prompts: B prompts with the metadata of ``envs.scenes.edits`` and their source picture, of the images' size.

    Returns:
        Scores, float32 [B]; NaN, with a reason, where the metadata is malformed or the source is missing or unfit.
    """
    values = np.full((4, len(images)), np.nan, np.float32)
    sources, errors = _sources(images.shape[1:], prompts)
    rows = [row for row, prompt in enumerate(prompts) if id(prompt) in sources]
    for row, detections in zip(rows, detect(images[rows]), strict=True):
        judged = judge(sources[id(prompts[row])], images[row], detections)
        values[:, row] = judged.success * judged.preservation, judged.strict, judged.success, judged.preservation
    names = ("strict", "success", "preservation")
    reasons = {row: errors[id(prompt)] for row, prompt in enumerate(prompts) if id(prompt) in errors}
    return Scores(values[0], dict(zip(names, values[1:], strict=True)), reasons)


def _sources(shape: tuple[int, ...], prompts: Sequence[Prompt]) -> tuple[dict[int, Source], dict[int, str]]:
    """Sources, or why there is none, by the identity of their prompts: those of a group are read once."""
    unique = {id(prompt): prompt for prompt in prompts}
    edits: dict[int, tuple[Edit, NDArray[np.uint8]]] = {}
    sources: dict[int, Source] = {}
    errors: dict[int, str] = {}
    for key, prompt in unique.items():
        try:
            edits[key] = read_edit(prompt.metadata), _source_picture(prompt, shape)
        except ValueError as error:
            errors[key] = str(error)
    found = detect(np.stack([picture for _, picture in edits.values()])) if edits else []
    for (key, (edit, picture)), seen in zip(edits.items(), found, strict=True):
        try:
            sources[key] = with_baseline(edit, picture, seen)
        except ValueError as error:
            errors[key] = str(error)
    return sources, errors


def _source_picture(prompt: Prompt, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    if not prompt.source_images:
        raise ValueError("source_images: expected the picture to edit, got none")
    picture = prompt.source_images[0]
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.shape != shape:
        got = f"{picture.dtype} {list(picture.shape)}" if isinstance(picture, np.ndarray) else type(picture).__name__
        raise ValueError(f"source_images[0]: expected uint8 {list(shape)}, as the images are, got {got}")
    return picture
