"""Training of an edit reward through trl's RewardTrainer: scores and pairs at once, then calibration."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rewards.edit_reward_calibration import fit_curve, save_curves
from rewards.edit_reward_data import TOTAL, ScoredEdit, read_dimensions, read_edits
from rewards.edit_reward_inputs import EditInputs, EditTemplate
from rewards.edit_reward_pairs import count_edits
from rewards.edit_reward_trainer import make_trainer

if TYPE_CHECKING:
    from rewards.edit_reward_model import EditRewardModel

logger = logging.getLogger(__name__)

# Edits whose mean scores the head starts from.
_HEAD_START = 512


@dataclass(frozen=True)
class TrainingConfig:
    """Train an edit reward on scored edits, calibrate it on validation edits, and save it as a checkpoint.

    Attributes:
        data: folder of judged edits with the splits train and validation.
        base: folder or name on the hub of the Qwen2.5-VL checkpoint to start from, e.g. Qwen/Qwen2.5-VL-7B-Instruct; by
            default the embedded world's own (pdtr scenes-judge).
        output_dir: folder of the trained checkpoint.
        num_epochs: passes over the training edits.
        batch_size: pairs of a step in each process, two edits each.
        accumulation: steps whose gradients are added up.
        learning_rate: peak of AdamW, with a linear warm-up and a cosine; 1e-5 is usual for 7 billion parameters.
        regression_weight: of the loss on scores; with 0 ranks are enough, and the total is all that the reward says.
        bradley_terry_weight: of the loss on pairs; 0 is regression alone.
        temperature: difference of rewards that counts as 1 in the loss on pairs.
        template: one of rewards/templates; the checkpoint's own, or edit_reward.v1, unless given.
        max_pixels: most pixels of a picture; what the checkpoint says unless given.
        gradient_checkpointing: trade time for memory.
        bf16: compute in bfloat16, on a GPU that can; with adapters the weights that are not trained are bfloat16 too.
        freeze_vision: do not train the vision tower.
        lora_rank: of adapters of the language model, which are trained with the head in place of all weights and added
            to them at the end; 0 is none.
        lora_alpha: scale of the adapters times their rank; twice the rank unless given.
        seed: of the head, of pairs and of their order.
    """

    data: Path = Path("runs/edit_reward/data")
    base: str = "runs/scenes_judge/judge"
    output_dir: Path = Path("runs/edit_reward/model")
    num_epochs: float = 1.0
    batch_size: int = 32
    accumulation: int = 1
    learning_rate: float = 5e-4
    regression_weight: float = 1.0
    bradley_terry_weight: float = 0.1
    temperature: float = 0.25
    template: str = ""
    max_pixels: int | None = None
    gradient_checkpointing: bool = False
    bf16: bool = False
    freeze_vision: bool = False
    lora_rank: int = 0
    lora_alpha: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_epochs <= 0 or self.batch_size < 1 or self.accumulation < 1:
            raise ValueError("num_epochs, batch_size and accumulation: expected numbers above 0")
        if min(self.bradley_terry_weight, self.regression_weight) < 0 or self.temperature <= 0:
            raise ValueError(
                "regression_weight, bradley_terry_weight and temperature: expected at least 0, at least 0 and above 0, "
                f"got {self.regression_weight}, {self.bradley_terry_weight} and {self.temperature}"
            )
        if self.bradley_terry_weight == self.regression_weight == 0:
            raise ValueError("regression_weight and bradley_terry_weight: expected one above 0, got 0 and 0")
        if self.lora_rank < 0 or (self.lora_alpha is not None and self.lora_alpha <= 0):
            raise ValueError(
                "lora_rank and lora_alpha: expected 0 (no adapters) or more, and above 0, got "
                f"{self.lora_rank} and {self.lora_alpha}"
            )

    @property
    def is_scored(self) -> bool:
        """Whether edits need scores."""
        return self.regression_weight > 0


def train_edit_reward(config: TrainingConfig) -> Path:
    """Train, calibrate and save; -> the checkpoint's folder, which ``EditReward`` loads.

    Processes that torchrun or accelerate has started share the work; the first of them writes.

    Raises:
        ValueError: the data or the checkpoint cannot be used.
        ModuleNotFoundError: ``trl`` or ``datasets``, of the extra ``judge-training``, is not installed.
    """
    from rewards.edit_reward import checkpoint_folder, template_of
    from rewards.edit_reward_adapters import choose_trained, merged

    folder = checkpoint_folder(config.base)
    model = start_model(config, folder)
    template = EditTemplate.load(config.template) if config.template else template_of(folder)
    inputs = EditInputs.load(folder, template, config.max_pixels)
    num_edits = count_edits(config.data, "train", config.is_scored, inputs)
    is_calibrated = has_validation(config)
    adapted = choose_trained(model, config)
    trainer = make_trainer(model, inputs, config, num_edits)
    trainer.train()
    model = merged(trainer.model, adapted)
    if trainer.is_world_process_zero():
        config.output_dir.mkdir(parents=True, exist_ok=True)
        save_checkpoint(model, inputs, config.output_dir)
    if is_calibrated:
        calibrate(model, inputs, config)
    # Nobody goes on before the checkpoint is complete.
    trainer.accelerator.wait_for_everyone()
    return config.output_dir


def start_model(config: TrainingConfig, folder: Path) -> EditRewardModel:
    """The model that training starts from, with a head for the dimensions of the data.

    Raises:
        ValueError: the data have no scores and need them, or the checkpoint's head says something else.
    """
    import torch

    from rewards.edit_reward_model import has_head, load_model, make_head

    dimensions = read_dimensions(config.data, "train") if config.is_scored else (TOTAL,)
    if not dimensions:
        raise ValueError(
            f"{config.data}, split train: expected edits with scores, got a split without; train on their ranks alone: "
            "--regression-weight 0"
        )
    torch.manual_seed(config.seed)
    # What adapters are added to is not trained: it needs no more digits than the forward pass.
    dtype = torch.bfloat16 if config.bf16 and config.lora_rank else torch.float32
    model = load_model(folder, dtype, dimensions)
    # A checkpoint of the class goes on with the head that it has.
    if not has_head(model.config):
        first = list(islice(read_edits(config.data, "train"), _HEAD_START)) if config.is_scored else []
        make_head(model, [_mean([edit.scores[name] for edit in first]) for name in dimensions])
    elif config.is_scored and (set(model.dimensions), model.dimensions[-1]) != (set(dimensions), dimensions[-1]):
        raise ValueError(
            f"{config.data}: expected scores {', '.join(model.dimensions)} as the head of {config.base} has, got "
            f"{', '.join(dimensions)}; start from a checkpoint without a head, such as Qwen/Qwen2.5-VL-7B-Instruct"
        )
    return model


def save_checkpoint(model: EditRewardModel, inputs: EditInputs, folder: Path) -> None:
    """Write a checkpoint as transformers has it: configuration, safetensors, tokenizer, picture settings."""
    # Of another training of the same folder: not of these weights.
    (folder / "calibration.json").unlink(missing_ok=True)
    model.config.edit_reward_template = inputs.template.name
    model.save_pretrained(str(folder))
    inputs.tokenizer.save_pretrained(str(folder))
    inputs.settings.save(folder)
    shutil.rmtree(folder / "trainer", ignore_errors=True)


def has_validation(config: TrainingConfig) -> bool:
    """Whether there are scored edits to calibrate on: without regression there need not be.

    Raises:
        ValueError: the validation split is missing, cannot be used, or is scored on other dimensions.
    """
    if not config.is_scored:
        found = list(config.data.glob("validation-*.parquet")) and read_dimensions(config.data, "validation")
        if not found:
            logger.warning("%s: no scored validation edits: the reward says what is better, on no scale", config.data)
            return False
    else:
        train, validation = (read_dimensions(config.data, split) for split in ("train", "validation"))
        if set(train) != set(validation):
            raise ValueError(
                f"{config.data}, split validation: expected the dimensions of train, {', '.join(train)}, got "
                f"{', '.join(validation) or 'none'}; score both splits on the same"
            )
    # Its first usable edit: it complains where there is none.
    next(read_edits(config.data, "validation"))
    return True


def calibrate(model: EditRewardModel, inputs: EditInputs, config: TrainingConfig) -> None:
    """Fit a curve a dimension on the validation edits, and write them beside the weights.

    Without regression that is the total alone.
    """
    edits = list(read_edits(config.data, "validation"))
    said = _shared(model, inputs, edits, 2 * config.batch_size)
    curves = {}
    for column, name in enumerate(model.dimensions):
        is_total = column == len(model.dimensions) - 1
        if is_total or config.is_scored:
            curves[name] = fit_curve(said[:, column], [edit.total if is_total else edit.scores[name] for edit in edits])
    if _place()[0] == 0:
        save_curves(curves, config.output_dir, len(edits))


def _shared(
    model: EditRewardModel, inputs: EditInputs, edits: Sequence[ScoredEdit], batch_size: int
) -> NDArray[np.float32]:
    """:func:`predict`, a share of the edits in each process; all of them get all of it."""
    import torch

    rank, count = _place()
    said = torch.zeros(len(edits), len(model.dimensions), device=model.device)
    said[rank::count] = torch.from_numpy(predict(model, inputs, edits[rank::count], batch_size)).to(model.device)
    if count > 1:
        torch.distributed.all_reduce(said)
    found: NDArray[np.float32] = said.cpu().numpy()
    return found


def predict(
    model: EditRewardModel, inputs: EditInputs, edits: Sequence[ScoredEdit], batch_size: int
) -> NDArray[np.float32]:
    """What the model says of edits, uncalibrated: float32 [N, D]."""
    model.train(False)
    parts = [np.empty((0, len(model.dimensions)), np.float32)]
    for start in range(0, len(edits), batch_size):
        part = edits[start : start + batch_size]
        parts.append(
            model.rewards(inputs([e.instruction for e in part], [e.source for e in part], [e.image for e in part]))
        )
    return np.concatenate(parts)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def _place() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()
