"""The trainer of an edit reward: trl's RewardTrainer over a stream of pairs, by one process or several.

Every process reads the same stream and takes its share of each global batch: with as many pairs a step, any number of
processes sees the same pairs in the same step, and their losses are the loss of the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rewards.edit_reward_inputs import EditInputs
from rewards.edit_reward_losses import bradley_terry_loss, regression_loss
from rewards.edit_reward_pairs import collate, stream_pairs

if TYPE_CHECKING:
    from rewards.edit_reward_model import EditRewardModel
    from rewards.edit_reward_training import TrainingConfig


def make_trainer(model: EditRewardModel, inputs: EditInputs, config: TrainingConfig, num_edits: int) -> Any:
    """The trainer, whose data are pairs of ``config.data``; ``num_edits`` is how many edits a pass has."""
    from datasets import IterableDataset

    arguments = _arguments(config)
    pairs_a_step = config.batch_size * config.accumulation * arguments.world_size
    arguments.max_steps = max(1, round(config.num_epochs * num_edits / (2 * pairs_a_step)))
    # Numbers and texts only: what is a list here would be cut into shards, and not dealt batch by batch.
    settings = {"folder": str(config.data), "split": "train", "seed": config.seed, "scored": config.is_scored}
    return trainer_class()(
        model=model,
        args=arguments,
        data_collator=partial(collate, inputs=inputs, dimensions=model.dimensions if config.is_scored else ()),
        train_dataset=IterableDataset.from_generator(_entries, gen_kwargs=settings),
        processing_class=inputs.tokenizer,
        config=config,
    )


def trainer_class() -> Any:
    """The RewardTrainer of trl for pairs of edits with scores; made here because trl is an extra and slow to import."""
    reward_trainer: Any = import_module("trl").RewardTrainer

    class EditRewardTrainer(reward_trainer):  # type: ignore[misc]
        """A weighted sum of regression, and of Bradley-Terry on the last dimension; batches as ``collate`` makes them.

        Batches that have no scores are trained on pairs alone.
        """

        _tag_names: ClassVar[list[str]] = []

        def __init__(self, *, config: TrainingConfig, **arguments: Any) -> None:
            self._config = config
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
            scores, weights = arguments.pop("scores", None), arguments.pop("pair_weights")
            outputs = model(**arguments)
            chosen, rejected = outputs.logits[:, -1].chunk(2)
            norm = self.accelerator.reduce(weights.sum(), reduction="mean")
            parts = {"bradley_terry": bradley_terry_loss(chosen, rejected, weights, self._config.temperature, norm)}
            loss = self._config.bradley_terry_weight * parts["bradley_terry"]
            if scores is not None:
                parts["regression"] = regression_loss(outputs.logits, scores)
                loss = loss + self._config.regression_weight * parts["regression"]
            parts["accuracy"] = ((chosen > rejected) * weights).sum() / norm.clamp(min=1e-8)
            self._note(parts)
            return (loss, outputs) if return_outputs else loss

        def _note(self, parts: Mapping[str, Any]) -> None:
            """Log the means over all processes: one message for all of them."""
            import torch

            means = self.accelerator.reduce(torch.stack([part.detach() for part in parts.values()]), reduction="mean")
            metrics = self._metrics["train" if self.model.training else "eval"]
            for name, mean in zip(parts, means.tolist(), strict=True):
                metrics[name].append(mean)

    return EditRewardTrainer


def _arguments(config: TrainingConfig) -> Any:
    """What transformers' trainer is told; the number of steps is not known yet."""
    # By name: what a type checker sees of trl depends on whether it is installed.
    trl: Any = import_module("trl")
    return trl.RewardConfig(
        output_dir=str(config.output_dir / "trainer"),
        max_steps=1,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        bf16=config.bf16,
        use_cpu=not _has_accelerator(),
        save_strategy="no",
        logging_steps=20,
        report_to=[],
        seed=config.seed,
        disable_tqdm=True,
        remove_unused_columns=False,
        # Dispatched batches are cut along their first axis, which is patches for some tensors and pairs for others.
        accelerator_config={"dispatch_batches": False},
        # Every weight that is trained has a gradient: the search for others costs a pass over the graph.
        ddp_find_unused_parameters=False,
    )


def _entries(folder: str, split: str, seed: int, scored: bool) -> Iterator[dict[str, Any]]:
    for pair in stream_pairs(Path(folder), split, seed, scored):
        yield {"pair": pair}


def _has_accelerator() -> bool:
    import torch

    return torch.cuda.is_available()
