"""``pdtr scenes-judge``: train the tiny digit judge of the embedded world, for vLLM to serve."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.flags import Usage, parse

if TYPE_CHECKING:
    from experiments.scenes_judge_model import JudgeInputs
    from experiments.scenes_judge_schedule import Rates
    from experiments.scenes_judge_training import Point
    from rewards.judges.tiny import TinyVLM

CURVE = "curve.csv"
_HEAD = 32


@dataclass(frozen=True)
class ScenesJudgeConfig:
    """Train a tiny Qwen2.5-VL to grade edits of the embedded world in digits, for vLLM to serve.

    It is trained on a policy's own edits, scored by the ground truth (make them with: pdtr edit-reward data), and on
    rendered ones; at the end it may also learn to answer yes or no and to fill in a rubric. The folder is a normal
    checkpoint: pdtr judge serve FOLDER.

    Attributes:
        output_dir: folder of the checkpoint, and of the learning curve beside it.
        data: folder of scored edits.
        start: a judge of this command to train on, with its shape and its vision tower; a new one when left out.
        width: of the language model, a multiple of 32.
        num_layers: of the language model.
        vision_width: of the vision tower, a multiple of 32.
        vision_layers: of the vision tower.
        vision_steps: of the vision tower alone; 0 leaves it as it is.
        num_steps: of the language model, with digits; 0 where a judge that has them goes on to other readouts.
        readout_steps: of the other readouts, after the digits; 900 are enough, 0 is digits alone.
        batch_size: edits of a step.
        rendered_share: of them that are rendered, new ones at every step; the policy's own come round again, and are
            learnt by heart.
        learning_rate: peak, of Muon for the matrices.
        other_learning_rate: peak, of AdamW for the rest.
        readout_rate_share: of both rates, while the other readouts are learnt.
        num_measured: held-out edits of a point of the learning curve.
        seed: of weights and data.
        num_threads: torch threads.
    """

    output_dir: Path = Path("runs/scenes_judge/judge")
    data: Path = Path("runs/edit_reward/data")
    start: Path | None = None
    width: int = 128
    num_layers: int = 4
    vision_width: int = 64
    vision_layers: int = 3
    vision_steps: int = 800
    num_steps: int = 5400
    readout_steps: int = 0
    batch_size: int = 48
    rendered_share: float = 0.75
    learning_rate: float = 4e-3
    other_learning_rate: float = 1e-3
    readout_rate_share: float = 0.25
    num_measured: int = 300
    seed: int = 0
    num_threads: int = 1

    def __post_init__(self) -> None:
        if self.width % _HEAD or self.vision_width % _HEAD or min(self.width, self.vision_width) < _HEAD:
            raise ValueError(f"width, vision_width: expected multiples of 32, got {self.width}, {self.vision_width}")
        for name in ("num_layers", "vision_layers", "num_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        if min(self.num_steps, self.readout_steps) < 0 or self.num_steps + self.readout_steps < 1:
            raise ValueError(
                "num_steps, readout_steps: expected 0 or more each, and 1 or more together, got "
                f"{self.num_steps}, {self.readout_steps}"
            )
        if self.vision_steps < 0 or self.batch_size < 2 or self.num_measured < 2:
            raise ValueError(
                "vision_steps, batch_size, num_measured: expected at least 0, 2, 2, got "
                f"{self.vision_steps}, {self.batch_size}, {self.num_measured}"
            )
        if not 0 < self.rendered_share < 1:
            raise ValueError(f"rendered_share: expected a share between 0 and 1, got {self.rendered_share}")
        rates = (self.learning_rate, self.other_learning_rate, self.readout_rate_share)
        if min(rates) <= 0:
            raise ValueError(f"learning rates: expected numbers above 0, got {', '.join(map(str, rates))}")


def scenes_judge(arguments: Sequence[str]) -> None:
    """``pdtr scenes-judge [--flags]``: train, save, and say how to serve it.

    Raises:
        ValueError: a bad flag or value, no data, or a loss that is no number.
    """
    config = parse(ScenesJudgeConfig(), Usage("pdtr scenes-judge"), arguments)
    # Their bars for every file that is read or written would drown what is said here.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        folder = make_judge(config, _say)
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise ValueError("a judge's training needs datasets: pip install 'pdtr[judge-training]'") from error
    print(f"judge: {folder}; serve it with: pdtr judge serve {folder}")


def make_judge(config: ScenesJudgeConfig, say: Callable[[str], None] = print) -> Path:
    """Train a judge and save it, also at each point of its learning curve; -> its folder.

    Raises:
        ValueError: there is no data, ``start`` is no judge, or a loss is no number.
    """
    import torch

    from experiments.benchmarks.tables import write_csv
    from experiments.scenes_judge_heads import new_judge
    from experiments.scenes_judge_model import judge_inputs, load_judge
    from experiments.scenes_judge_readouts import train_readouts
    from experiments.scenes_judge_training import train_digits, train_vision
    from rewards.edit_reward_data import read_edits
    from rewards.judges.tiny import save_tiny_vlm

    torch.set_num_threads(config.num_threads)
    edits = (list(read_edits(config.data, "train")), list(read_edits(config.data, "validation"))[: config.num_measured])
    shape = _shape(config)
    inputs: JudgeInputs
    if config.start is None:
        inputs = judge_inputs(shape)
        model = new_judge(inputs)
    else:
        model, inputs = load_judge(config.start)
    model.train()
    say(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters, {len(edits[0])} edits")
    train_vision(model, inputs, _rates(config), config.vision_steps, say, edits[0])
    points: list[Point] = []
    for point in train_digits(model, inputs, edits, _rates(config), config.num_steps):
        points.append(point)
        say(
            f"step {point.step}: loss {point.loss:.3f}, held-out Spearman {point.spearman:.3f}, "
            f"changes read as asked {point.asked:.2f}, {point.seconds:.0f} s"
        )
        save_tiny_vlm(config.output_dir, inputs.shape, inputs.tokenizer, model)
        write_csv(config.output_dir / CURVE, points)
    if config.readout_steps:
        train_readouts(model, inputs, edits[0], _rates(config, config.readout_rate_share), config.readout_steps, say)
        save_tiny_vlm(config.output_dir, inputs.shape, inputs.tokenizer, model)
    return config.output_dir


def _shape(config: ScenesJudgeConfig) -> TinyVLM:
    from rewards.judges.tiny import TinyVLM

    return TinyVLM(
        width=config.width,
        num_layers=config.num_layers,
        vision_width=config.vision_width,
        vision_layers=config.vision_layers,
        patch_size=6,  # Two by two are a token: sixteen tokens a picture.
        min_pixels=12 * 12,
        rope_theta=1.5,  # Places of a grid of four by four are told apart by fast rotations only.
        initializer_range=config.width**-0.5,
        seed=config.seed,
    )


def _rates(config: ScenesJudgeConfig, share: float = 1.0) -> Rates:
    from experiments.scenes_judge_schedule import Rates

    return Rates(
        share * config.learning_rate,
        share * config.other_learning_rate,
        config.batch_size,
        config.seed,
        rendered_share=config.rendered_share,
    )


def _say(line: str) -> None:
    print(line, flush=True)
