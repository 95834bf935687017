"""The preference models of ``pdtr eval drawbench`` by their names."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rewards.base import Reward


def preference_models(name: str, weights: str, device: str) -> tuple[Reward, str]:
    """A preference model and what its weights are called.

    Args:
        name: "pickscore", "hps", "imagereward", "aesthetic" or "clip".
        weights: a CLIP of transformers in place of the published one, for pickscore and clip; empty: as published.
        device: torch's name of it.

    Raises:
        ValueError: weights that lead nowhere, or a missing package.
    """
    from rewards.aesthetic import Aesthetic, AestheticSettings
    from rewards.checkpoints import Placement
    from rewards.clip import CLIPScore, CLIPScoreSettings
    from rewards.clip_models import ClipSource
    from rewards.hps import HPS, HPSSettings
    from rewards.imagereward import ImageReward, ImageRewardSettings
    from rewards.pickscore import PickScore, PickScoreSettings

    placement = Placement(device)
    if name == "pickscore":
        pick = PickScoreSettings(placement=placement)
        pick = PickScoreSettings(ClipSource(weights), placement=placement) if weights else pick
        return PickScore(pick), pick.source.model
    if name == "hps":
        hps = HPSSettings(placement=placement)
        return HPS(hps), f"HPS{hps.version}"
    if name == "imagereward":
        ranked = ImageRewardSettings(placement=placement)
        return ImageReward(ranked), ranked.weights
    if name == "aesthetic":
        liked = AestheticSettings(placement=placement)
        return Aesthetic(liked), liked.head
    clip = CLIPScoreSettings(placement=placement)
    clip = CLIPScoreSettings(ClipSource(weights), placement=placement) if weights else clip
    return CLIPScore(clip), f"{clip.source.model} {clip.source.pretrained}".strip()
