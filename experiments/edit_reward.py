"""``pdtr edit-reward``: make data for a learnt edit reward, train and check one.

Several processes share the training: ``torchrun --nproc-per-node 8 -m pdtr edit-reward train [--flags]``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import tyro

from experiments.flags import Usage, parse
from pdtr.processes import is_first, num_processes

_STEPS = """pdtr edit-reward STEP [--flags]; pdtr edit-reward STEP --help lists a step's flags.

  data   draw edits with a policy, at several qualities, and score them with the ground truth
  train  train a reward on scored or ranked edits, calibrate it, save it as a checkpoint; it starts from a Qwen2.5-VL, a
         large one or the embedded world's own (pdtr scenes-judge)
  check  compare a checkpoint with the scores or ranks of held-out edits"""


def edit_reward(arguments: Sequence[str]) -> None:
    """``pdtr edit-reward data|train|check [--flags]``; the flags of a step: ``pdtr edit-reward STEP --help``.

    Raises:
        ValueError: an unknown step or flag, a bad value, data or a model that cannot be used, a missing package.
    """
    steps: dict[str, Callable[[Sequence[str]], None]] = {"data": _data, "train": _train, "check": _check}
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        print(_STEPS)
        return
    if name not in steps:
        near = get_close_matches(name, steps, 1, cutoff=0.0)[0]
        raise ValueError(
            f"edit-reward: expected what to do, one of {', '.join(steps)}, got {name or 'none'}; "
            f"did you mean: pdtr edit-reward {near}?"
        )
    if num_processes() > 1 and name != "train":
        raise ValueError(
            f"edit-reward {name}: expected one process, got {num_processes()}; processes share train alone, so type: "
            f"pdtr edit-reward {name}"
        )
    # Their bars for every file that is read or written would drown what is said here.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        steps[name](arguments[1:])
    except ModuleNotFoundError as error:
        if error.name not in ("datasets", "trl"):
            raise
        raise ValueError(f"an edit reward's training needs {error.name}: pip install 'pdtr[judge-training]'") from error


def _data(arguments: Sequence[str]) -> None:
    from experiments.edit_reward_data import EditDataConfig, make_data

    print(f"data: {make_data(parse(EditDataConfig(), Usage('pdtr edit-reward data'), arguments))}")


def _train(arguments: Sequence[str]) -> None:
    from rewards.edit_reward_training import TrainingConfig, train_edit_reward

    config = parse(TrainingConfig(), Usage("pdtr edit-reward train"), arguments)
    folder = train_edit_reward(config)
    if is_first():
        print(f"edit reward: {folder}")


@dataclass(frozen=True)
class CheckOptions:
    """Compare a trained edit reward with the scores of held-out edits, or with their ranks where they have no scores.

    Attributes:
        checkpoint: folder of a trained edit reward, or its name on the hub.
        data: folder of judged edits.
        split: which of them.
        resamples: of the bootstrap over prompts.
    """

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    data: Path = Path("runs/edit_reward/data")
    split: str = "test"
    resamples: int = 1000


def _check(arguments: Sequence[str]) -> None:
    options = parse(CheckOptions(tyro.MISSING), Usage("pdtr edit-reward check"), arguments)
    from experiments.edit_reward_check import check_checkpoint, format_found

    print(format_found(check_checkpoint(options.checkpoint, options.data, options.split, options.resamples)))
