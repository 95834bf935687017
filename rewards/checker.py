"""Does a callable keep the reward contract?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rewards.base import Images, Prompt, Reward, reward_name, reward_traits
from rewards.scoring import call_spans, score


def check_reward(reward: Reward, images: Images, prompts: Sequence[Prompt]) -> None:
    """Check that a callable keeps the reward contract on a batch of at least two samples that it can judge.

    Shape and dtype (by :func:`rewards.scoring.score`), an answer for at least one image, the inputs left as they were,
    the same answer twice, and no dependence on the order of the batch or on its size. A reward of group scope may
    depend on what is in its group (entries that share their :class:`Prompt` object), not on the other groups.

    Raises:
        ValueError: a property does not hold; the message says which and what to mend.
    """
    if len(images) < 2:
        raise ValueError(f"check_reward: expected at least two images, got {len(images)}")
    name, before = reward_name(reward), images.copy()
    scores = score(reward, images, prompts)
    first = scores.total
    if not np.array_equal(images, before):
        raise ValueError(f"{name}: changed the images it was given; work on a copy")
    if np.isnan(first).all():
        raise ValueError(
            f"{name}: has no reward for any of the images ({scores.reasons[0]}); check it on some that it can judge"
        )
    traits = reward_traits(reward)
    unit = "image" if traits.scope == "sample" else "group"
    spans = call_spans(replace(traits, batch_size=1), prompts)
    checks = {
        "gave another answer for the same batch; seed it or lower its temperature": score(
            reward, images, prompts
        ).total,
        f"depends on the order of the batch; score every {unit} by itself": score(
            reward, images[::-1].copy(), list(prompts)[::-1]
        ).total[::-1],
        f"depends on the size of the batch; score every {unit} by itself": np.concatenate(
            [score(reward, images[start:stop], prompts[start:stop]).total for start, stop in spans]
        ),
    }
    for message, values in checks.items():
        agree = np.isclose(first, values, rtol=1e-4, atol=1e-5, equal_nan=True)
        if not agree.all():
            # A difference that is NaN is of a reward that is there once only.
            differences = np.nan_to_num(np.abs(first - values), nan=np.inf)
            worst = int(np.where(agree, -1, differences).argmax())
            raise ValueError(f"{name}: {message} (image {worst}: {first[worst]} against {values[worst]})")
