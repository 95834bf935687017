"""A vision-language model with a linear head: the network of a learnt edit reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Qwen2_5_VLModel, Qwen2_5_VLPreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from rewards.edit_reward_data import DIMENSIONS

# Published checkpoints, and those that transformers writes, name the weights as Qwen2-VL first did. transformers looks
# for the translation by the name of the class, and drops the weights that it does not know with a warning.
_PUBLISHED = "Qwen2_5_VLForConditionalGeneration"
_MAPPING: Any = get_checkpoint_conversion_mapping(_PUBLISHED)  # type: ignore[no-untyped-call]
register_checkpoint_conversion_mapping("EditRewardModel", _MAPPING, overwrite=True)


class EditRewardModel(Qwen2_5_VLPreTrainedModel):  # type: ignore[no-untyped-call]
    """Qwen2.5-VL, ``rewards = W h + b`` on the state h of the last token: one number a dimension.

    Skywork-EditReward's shape (UniPic 2.0, arXiv:2509.04548: Qwen2.5-VL-7B, regression onto several dimensions). The
    paper says nothing of the head, so it is the plainest one. ``from_pretrained`` takes one of this class, or any
    Qwen2.5-VL checkpoint, whose language head is dropped and whose reward head is new.

    Args:
        config: a ``Qwen2_5_VLConfig``; its entry ``reward_dimensions`` names the outputs, ``DIMENSIONS`` unless given.
    """

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012 - as transformers declares it.

    def __init__(self, config: Any) -> None:
        # A strict configuration takes entries that it does not know only as attributes.
        config.reward_dimensions = list(getattr(config, "reward_dimensions", None) or DIMENSIONS)
        # trl asks for it: one reward a sequence, of several dimensions here.
        config.num_labels = 1
        super().__init__(config)
        self.model = Qwen2_5_VLModel(config)
        self.score = nn.Linear(config.text_config.hidden_size, len(config.reward_dimensions))
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def dimensions(self) -> tuple[str, ...]:
        """The names of the outputs; the last is the total."""
        return tuple(self.config.reward_dimensions)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        image_grid_thw: Tensor,
        mm_token_type_ids: Tensor,
        use_cache: bool = False,
    ) -> SequenceClassifierOutput:
        """Score sequences that are padded on the right; arguments as :class:`rewards.edit_reward_inputs.EditInputs`.

        Returns:
            An output whose ``logits`` are float32 [B, dimensions].
        """
        states = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            mm_token_type_ids=mm_token_type_ids,
            use_cache=use_cache,
        ).last_hidden_state
        last = attention_mask.sum(dim=1) - 1
        pooled = states[torch.arange(len(states), device=states.device), last]
        # The head may be kept in float32 over weights in bfloat16.
        return SequenceClassifierOutput(logits=self.score(pooled.to(self.score.weight.dtype)).float())

    @torch.no_grad()
    def rewards(self, batch: Mapping[str, Tensor]) -> NDArray[np.float32]:
        """What the model says of a batch of ``EditInputs``, wherever that is, uncalibrated: float32 [B, dimensions]."""
        placed = {name: tensor.to(self.device) for name, tensor in batch.items()}
        placed["pixel_values"] = placed["pixel_values"].to(self.dtype)
        said: NDArray[np.float32] = self(**placed).logits.cpu().numpy()
        return said


def load_model(
    source: str | Path, dtype: torch.dtype = torch.float32, dimensions: Sequence[str] = ()
) -> EditRewardModel:
    """A model of this class from a folder or a name on the hub, ready to score.

    Args:
        source: any Qwen2.5-VL checkpoint.
        dtype: of the weights.
        dimensions: of a head that is new, the total last; a checkpoint of the class keeps the head that it has.

    Raises:
        ValueError: it is no Qwen2.5-VL checkpoint, or its files are damaged.
        OSError: there is no such folder or name.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(source))
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{source}: expected a Qwen2.5-VL checkpoint, got a configuration that is none ({error})"
        ) from error
    if config.model_type != "qwen2_5_vl":
        raise ValueError(
            f"{source}: expected a checkpoint of the Qwen2.5-VL class, got one of {config.model_type!r}; "
            "for instance Qwen/Qwen2.5-VL-7B-Instruct"
        )
    if dimensions and not has_head(config):
        config.reward_dimensions = list(dimensions)
    try:
        model: EditRewardModel = EditRewardModel.from_pretrained(str(source), config=config, dtype=dtype)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{source}: expected the weights of its configuration, got damaged ones ({error})") from error
    model.train(False)
    return model


def has_head(config: Any) -> bool:
    """Whether a checkpoint of this configuration has a trained head: it is one of this class."""
    return EditRewardModel.__name__ in (config.architectures or ())


def make_head(model: EditRewardModel, means: Sequence[float]) -> None:
    """Start the head at the means of the dimensions: nothing is learnt at first but what differs from them."""
    with torch.no_grad():
        model.score.weight.mul_(0.1)
        model.score.bias.copy_(torch.tensor(means))
