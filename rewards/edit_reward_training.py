"""Training of an edit reward through trl's RewardTrainer: scores and pairs at once, then calibration."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from rewards.edit_reward_calibration import fit_curve, save_curves
from rewards.edit_reward_data import ScoredEdit, read_edits
from rewards.edit_reward_inputs import EditInputs, EditTemplate
from rewards.edit_reward_losses import bradley_terry_loss, regression_loss
from rewards.edit_reward_pairs import collate, count_edits, stream_pairs

if TYPE_CHECKING:
    from rewards.edit_reward_model import EditRewardModel

# Edits whose mean scores the head starts from.
_HEAD_START = 512


@dataclass(frozen=True)
class TrainingConfig:
    """Train an edit reward on scored edits, calibrate it on validation edits, and save it as a checkpoint.

    Attributes:
        data: folder of scored edits with the splits train and validation.
        base: folder or name on the hub of the Qwen2.5-VL checkpoint to start from, e.g. Qwen/Qwen2.5-VL-7B-Instruct; by
            default the embedded world's own (pdtr scenes-judge).
        output_dir: folder of the trained checkpoint.
        num_epochs: passes over the training edits.
        batch_size: pairs of a step on each device, two edits each.
        accumulation: steps whose gradients are added up.
        learning_rate: peak of AdamW, with a linear warm-up and a cosine; 1e-5 is usual for 7 billion parameters.
        bradley_terry_weight: of the loss on pairs, beside 1 for the regression onto scores; 0 is regression alone.
        temperature: difference of rewards that counts as 1 in the loss on pairs.
        template: one of rewards/templates; the checkpoint's own, or edit_reward.v1, unless given.
        max_pixels: most pixels of a picture; what the checkpoint says unless given.
        gradient_checkpointing: trade time for memory.
        bf16: compute in bfloat16, on a GPU that can.
        seed: of the head, of pairs and of their order.
    """

    data: Path = Path("runs/edit_reward/data")
    base: str = "runs/scenes_judge/judge"
    output_dir: Path = Path("runs/edit_reward/model")
    num_epochs: float = 1.0
    batch_size: int = 32
    accumulation: int = 1
    learning_rate: float = 5e-4
    bradley_terry_weight: float = 0.1
    temperature: float = 0.25
    template: str = ""
    max_pixels: int | None = None
    gradient_checkpointing: bool = False
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_epochs <= 0 or self.batch_size < 1 or self.accumulation < 1:
            raise ValueError("num_epochs, batch_size and accumulation: expected numbers above 0")
        if self.bradley_terry_weight < 0 or self.temperature <= 0:
            raise ValueError("bradley_terry_weight and temperature: expected at least 0 and above 0")


def train_edit_reward(config: TrainingConfig) -> Path:
    """Train, calibrate and save; -> the checkpoint's folder, which ``EditReward`` loads.

    Raises:
        ValueError: the data or the checkpoint cannot be used.
        ModuleNotFoundError: ``trl`` or ``datasets``, of the extra ``judge-training``, is not installed.
    """
    import torch

    from rewards.edit_reward import checkpoint_folder, template_of
    from rewards.edit_reward_model import load_model, make_head

    folder = checkpoint_folder(config.base)
    torch.manual_seed(config.seed)
    model = load_model(folder)
    template = EditTemplate.load(config.template) if config.template else template_of(folder)
    inputs = EditInputs.load(folder, template, config.max_pixels)
    # A checkpoint of the class goes on with the head that it has.
    if type(model).__name__ not in (model.config.architectures or ()):
        first = list(islice(read_edits(config.data, "train"), _HEAD_START))
        make_head(model, [float(np.mean([edit.scores[name] for edit in first])) for name in model.dimensions])
    trainer = make_trainer(model, inputs, config, count_edits(config.data, "train"))
    trainer.train()
    config.output_dir.mkdir(parents=True, exist_ok=True)
    save_checkpoint(trainer.model, inputs, config.output_dir)
    calibrate(trainer.model, inputs, config)
    return config.output_dir


def make_trainer(model: EditRewardModel, inputs: EditInputs, config: TrainingConfig, num_edits: int) -> Any:
    """The trainer, whose data are pairs of ``config.data``."""
    from datasets import IterableDataset

    pairs_a_step = config.batch_size * config.accumulation
    # By name: what a type checker sees of trl depends on whether it is installed.
    trl: Any = import_module("trl")
    arguments = trl.RewardConfig(
        output_dir=str(config.output_dir / "trainer"),
        max_steps=max(1, round(config.num_epochs * num_edits / (2 * pairs_a_step))),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        gradient_checkpointing=config.gradient_checkpointing,
        bf16=config.bf16,
        use_cpu=not _has_accelerator(),
        save_strategy="no",
        logging_steps=20,
        report_to=[],
        seed=config.seed,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    stream = IterableDataset.from_generator(
        _entries, gen_kwargs={"folder": str(config.data), "split": "train", "seed": config.seed}
    )
    return trainer_class()(
        model=model,
        args=arguments,
        data_collator=partial(collate, inputs=inputs, dimensions=model.dimensions),
        train_dataset=stream,
        processing_class=inputs.tokenizer,
        losses=(config.bradley_terry_weight, config.temperature),
    )


def trainer_class() -> Any:
    """The RewardTrainer of trl for pairs of edits with scores; made here because trl is an extra and slow to import."""
    reward_trainer: Any = import_module("trl").RewardTrainer

    class EditRewardTrainer(reward_trainer):  # type: ignore[misc]
        """``regression + weight * Bradley-Terry`` on the last dimension; batches as ``collate`` makes them."""

        _tag_names: ClassVar[list[str]] = []

        def __init__(self, *, losses: tuple[float, float], **arguments: Any) -> None:
            self._pair_weight, self._temperature = losses
            super().__init__(**arguments)

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            """Pairs are ready as they are: pictures cannot be tokenised ahead."""
            return dataset

        def _set_signature_columns_if_needed(self) -> None:
            self._signature_columns = ["pair"]

        def compute_loss(
            self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            arguments = dict(inputs)
            scores, weights = arguments.pop("scores"), arguments.pop("pair_weights")
            outputs = model(**arguments)
            chosen, rejected = outputs.logits[:, -1].chunk(2)
            regression = regression_loss(outputs.logits, scores)
            pairs = bradley_terry_loss(chosen, rejected, weights, self._temperature)
            loss = regression + self._pair_weight * pairs
            metrics = self._metrics["train" if self.model.training else "eval"]
            metrics["regression"].append(regression.item())
            metrics["bradley_terry"].append(pairs.item())
            in_order = ((chosen > rejected) * weights).sum() / weights.sum().clamp(min=1)
            metrics["accuracy"].append(in_order.item())
            return (loss, outputs) if return_outputs else loss

    return EditRewardTrainer


def save_checkpoint(model: EditRewardModel, inputs: EditInputs, folder: Path) -> None:
    """Write a checkpoint as transformers has it: configuration, safetensors, tokenizer, picture settings."""
    # Of another training of the same folder: not of these weights.
    (folder / "calibration.json").unlink(missing_ok=True)
    model.config.edit_reward_template = inputs.template.name
    model.save_pretrained(str(folder))
    inputs.tokenizer.save_pretrained(str(folder))
    inputs.settings.save(folder)
    shutil.rmtree(folder / "trainer", ignore_errors=True)


def calibrate(model: EditRewardModel, inputs: EditInputs, config: TrainingConfig) -> None:
    """Fit a curve a dimension on the validation edits, and write them beside the weights."""
    edits = list(read_edits(config.data, "validation"))
    said = predict(model, inputs, edits, 2 * config.batch_size)
    curves = {
        name: fit_curve(said[:, column], [edit.scores[name] for edit in edits])
        for column, name in enumerate(model.dimensions)
    }
    save_curves(curves, config.output_dir, len(edits))


def predict(
    model: EditRewardModel, inputs: EditInputs, edits: Sequence[ScoredEdit], batch_size: int
) -> NDArray[np.float32]:
    """What the model says of edits, uncalibrated: float32 [N, D]."""
    model.train(False)
    parts = []
    for start in range(0, len(edits), batch_size):
        part = edits[start : start + batch_size]
        parts.append(
            model.rewards(inputs([e.instruction for e in part], [e.source for e in part], [e.image for e in part]))
        )
    return np.concatenate(parts)


def _entries(folder: str, split: str, seed: int) -> Iterator[dict[str, Any]]:
    for pair in stream_pairs(Path(folder), split, seed):
        yield {"pair": pair}


def _has_accelerator() -> bool:
    import torch

    return torch.cuda.is_available()
