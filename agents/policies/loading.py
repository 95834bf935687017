"""Find the policy of a published model by what its folder says of itself."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from agents.policies.backbone import INDEX_NAME, SETTINGS_NAME, BackbonePolicy, BackboneSettings

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


# Published folders without an index are known by their transformer.
_PIPELINES = {
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "SD3Transformer2DKontextModel": "StableDiffusion3KontextPipeline",
}
_TRANSFORMER_CONFIG = Path("transformer") / "config.json"


def load_backbone(source: str | Path, settings: BackboneSettings | None = None) -> BackbonePolicy:
    """Load a published model as the policy of its kind.

    Args:
        source: a folder in diffusers' layout, or a repository of the hub.
        settings: those that the folder was saved with where None, or else the defaults.

    Raises:
        ValueError: it is neither, or of a class that there is no policy for.
    """
    return backbone_class(source).load(source, saved_settings(source) if settings is None else settings)


def backbone_class(source: str | Path) -> type[BackbonePolicy]:
    """The policy of a folder's or a repository's kind.

    Raises:
        ValueError: as :func:`load_backbone`.
    """
    name = pipeline_name(source)
    if name not in POLICIES:
        raise ValueError(f"{source}: expected a pipeline of one of {', '.join(POLICIES)}, got {name}")
    module, policy = POLICIES[name]
    policy_class: type[BackbonePolicy] = getattr(importlib.import_module(module), policy)
    return policy_class


def saved_settings(source: str | Path) -> BackboneSettings:
    """The settings that a policy was saved with, the defaults where it was not one of ours.

    Raises:
        ValueError: the file is damaged or not of this version.
    """
    path = Path(source) / SETTINGS_NAME
    if not path.is_file():
        return BackboneSettings()
    try:
        return BackboneSettings(**json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a policy's settings, got others ({error}); delete the file") from error


def is_backbone(folder: Path) -> bool:
    """Whether a folder is in diffusers' layout."""
    return any((folder / name).is_file() for name in (INDEX_NAME, _TRANSFORMER_CONFIG))


def pipeline_name(source: str | Path) -> str:
    """The pipeline class that a folder or a repository of the hub names.

    Raises:
        ValueError: there is no such folder or repository, or it is not in diffusers' layout.
    """
    folder = Path(source)
    try:
        if (folder / INDEX_NAME).is_file():
            return str(json.loads((folder / INDEX_NAME).read_text())["_class_name"])
        if folder.is_dir():
            return _PIPELINES[json.loads((folder / _TRANSFORMER_CONFIG).read_text())["_class_name"]]
        from diffusers import DiffusionPipeline

        pipeline_class: Any = DiffusionPipeline
        return str(pipeline_class.load_config(str(source))["_class_name"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{source}: expected a folder in diffusers' layout ({INDEX_NAME}) or a repository of the hub, "
            f"got neither ({error})"
        ) from error
