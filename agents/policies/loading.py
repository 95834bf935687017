"""Find the policy of a published model by what its folder says of itself."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from agents.policies.backbone import BackbonePolicy, BackboneSettings

INDEX_NAME = "model_index.json"
# The class that a diffusers folder names, and the policy that runs it: module and class.
POLICIES = {
    "StableDiffusion3Pipeline": ("agents.policies.sd3", "SD3Policy"),
    "StableDiffusion3KontextPipeline": ("agents.policies.sd3", "SD3Policy"),
    "UniPic2MetaQueryPipeline": ("agents.policies.metaquery", "MetaQueryPolicy"),
    "FluxPipeline": ("agents.policies.flux", "FluxPolicy"),
    "FluxKontextPipeline": ("agents.policies.flux", "FluxKontextPolicy"),
    "Flux2KleinPipeline": ("agents.policies.flux2", "Flux2KleinPolicy"),
    "QwenImagePipeline": ("agents.policies.qwen_image", "QwenImagePolicy"),
    "QwenImageEditPipeline": ("agents.policies.qwen_image", "QwenImageEditPolicy"),
    "QwenImageEditPlusPipeline": ("agents.policies.qwen_image", "QwenImageEditPlusPolicy"),
    "ZImagePipeline": ("agents.policies.z_image", "ZImagePolicy"),
}


def load_backbone(source: str | Path, settings: BackboneSettings) -> BackbonePolicy:
    """Load a published model as the policy of its kind.

    Args:
        source: a folder in diffusers' layout, or a repository of the hub.
        settings: see :class:`BackboneSettings`.

    Raises:
        ValueError: it is neither, or of a class that there is no policy for.
    """
    name = pipeline_name(source)
    if name not in POLICIES:
        raise ValueError(f"{source}: expected a pipeline of one of {', '.join(POLICIES)}, got {name}")
    module, policy = POLICIES[name]
    policy_class: type[BackbonePolicy] = getattr(importlib.import_module(module), policy)
    return policy_class.load(source, settings)


def pipeline_name(source: str | Path) -> str:
    """The pipeline class that a folder or a repository of the hub names.

    Raises:
        ValueError: there is no such folder or repository, or it is not in diffusers' layout.
    """
    index = Path(source) / INDEX_NAME
    try:
        if Path(source).is_dir():
            return str(json.loads(index.read_text())["_class_name"])
        from diffusers import DiffusionPipeline

        pipeline_class: Any = DiffusionPipeline
        return str(pipeline_class.load_config(str(source))["_class_name"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{source}: expected a folder in diffusers' layout ({INDEX_NAME}) or a repository of the hub, "
            f"got neither ({error})"
        ) from error
