"""What of an edit reward's model is trained: all of it, all but the vision tower, or low-rank adapters and the head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from rewards.edit_reward_model import EditRewardModel
    from rewards.edit_reward_training import TrainingConfig

# Where the language model is in the model, as its weights are named.
_LANGUAGE = "model.language_model"


def choose_trained(model: EditRewardModel, config: TrainingConfig) -> Any:
    """Freeze what is not trained; -> what :func:`merged` takes: the adapters, None where there are none."""
    if config.lora_rank:
        alpha = 2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha
        return add_adapters(model, config.lora_rank, alpha)
    if config.freeze_vision:
        # With what turns its patches into tokens.
        model.model.visual.requires_grad_(False)
    return None


def add_adapters(model: EditRewardModel, rank: int, alpha: int) -> Any:
    """Train low-rank adapters of the language model's linear layers, and the head, in place of all weights.

    LoRA (Hu et al., arXiv:2106.09685): ``W x + alpha / rank * B A x``, with B zero at first. The model is changed in
    place and stays of its class. Adapters and head are float32, whatever the weights are.

    Args:
        model: whose other weights are left as they are.
        rank: of the adapters.
        alpha: their scale is ``alpha / rank``.

    Returns:
        What :func:`merged` takes.
    """
    from peft import LoraConfig, get_peft_model

    layers: nn.Module = model.get_submodule(_LANGUAGE)
    names = [f"{_LANGUAGE}.{name}" for name, layer in layers.named_modules() if isinstance(layer, nn.Linear)]
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0))
    model.score.float().requires_grad_(True)
    return adapted


def merged(model: EditRewardModel, adapted: Any) -> EditRewardModel:
    """The model with its adapters added to the weights that they belong to, as if it had never had any."""
    if adapted is not None:
        model = adapted.merge_and_unload()
        model.score.to(model.dtype)
    model.requires_grad_(True)
    return model
