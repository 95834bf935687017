"""Find the policy of a published model by what its folder says of itself."""

from __future__ import annotations

import importlib
import json
import logging
from pathlib import Path

from agents.policies.backbone import INDEX_NAME, SETTINGS_NAME, BackbonePolicy, BackboneSettings

logger = logging.getLogger(__name__)
# The class that a diffusers folder names, and the policy that runs it: module and class.
POLICIES = {
    "StableDiffusion3Pipeline": ("agents.policies.sd3", "SD3Policy"),
    "StableDiffusion3KontextPipeline": ("agents.policies.sd3", "UniPic2KontextPolicy"),
    "UniPic2MetaQueryPipeline": ("agents.policies.metaquery", "MetaQueryPolicy"),
    "FluxPipeline": ("agents.policies.flux", "FluxPolicy"),
    "FluxKontextPipeline": ("agents.policies.flux", "FluxKontextPolicy"),
    "Flux2KleinPipeline": ("agents.policies.flux2", "Flux2KleinPolicy"),
    "QwenImagePipeline": ("agents.policies.qwen_image", "QwenImagePolicy"),
    "QwenImageEditPipeline": ("agents.policies.qwen_image", "QwenImageEditPolicy"),
    "QwenImageEditPlusPipeline": ("agents.policies.qwen_image", "QwenImageEditPlusPolicy"),
    "ZImagePipeline": ("agents.policies.z_image", "ZImagePolicy"),
}


# Published models without an index are known by their transformer.
_PIPELINES = {
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "SD3Transformer2DKontextModel": "StableDiffusion3KontextPipeline",
}
_TRANSFORMER_CONFIG = "transformer/config.json"
# An SD3 with a connector has its prompts read by a language model: UniPic 2.0 published MetaQuery so.
_CONNECTOR_CONFIG, _METAQUERY = "conditioner/config.json", "UniPic2MetaQueryPipeline"


def load_backbone(source: str | Path, settings: BackboneSettings | None = None) -> BackbonePolicy:
    """Load a published model as the policy of its kind.

    Args:
        source: a folder in diffusers' layout, or a repository of the hub.
        settings: those that the folder was saved with where None, or else the defaults.

    Raises:
        ValueError: it is neither, or of a class that there is no policy for.
    """
    policy_class = backbone_class(source)
    return policy_class.load(source, settings or saved_settings(source) or BackboneSettings())


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


def saved_settings(source: str | Path) -> BackboneSettings | None:
    """The settings that a policy was saved with; None where it was not one of ours.

    Args:
        source: a folder, or a repository of the hub.

    Raises:
        ValueError: there is no such folder or repository, or the file is damaged or not of this version.
    """
    try:
        path = model_file(source, SETTINGS_NAME)
    except FileNotFoundError as error:
        if not Path(source).is_dir() and _is_unknown(str(source), error):
            logger.warning(
                "%s: its own %s, if it has one, is not in the hub's cache and the hub cannot be reached; size, "
                "precision and guidance are taken to be the defaults",
                source,
                SETTINGS_NAME,
            )
        return None
    except OSError as error:
        raise ValueError(
            f"{source}: expected a folder or a repository of the hub, got none ({one_line(error)})"
        ) from error
    try:
        return BackboneSettings(**json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a policy's settings, got others ({error}); delete the file") from error


def _is_unknown(repository: str, error: FileNotFoundError) -> bool:
    """Whether the hub was never asked for a repository's settings, rather than that there are none."""
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError

    found = try_to_load_from_cache(repository, SETTINGS_NAME)
    return isinstance(error.__cause__, LocalEntryNotFoundError) and found is not _CACHED_NO_EXIST


def is_backbone(folder: Path) -> bool:
    """Whether a folder is in diffusers' layout."""
    return any((folder / name).is_file() for name in (INDEX_NAME, _TRANSFORMER_CONFIG))


def pipeline_name(source: str | Path) -> str:
    """The pipeline class that a folder or a repository of the hub names, or else that its parts are those of.

    Raises:
        ValueError: there is no such folder or repository, or it is not in diffusers' layout.
    """
    try:
        name = _index_name(source)
        is_metaquery = name in _PIPELINES.values() and has_file(source, _CONNECTOR_CONFIG)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{source}: expected a folder in diffusers' layout ({INDEX_NAME}) or a repository of the hub, "
            f"got neither ({one_line(error)})"
        ) from error
    return _METAQUERY if is_metaquery else name


def _index_name(source: str | Path) -> str:
    try:
        return str(json.loads(model_file(source, INDEX_NAME).read_text())["_class_name"])
    except FileNotFoundError:
        return _PIPELINES[json.loads(model_file(source, _TRANSFORMER_CONFIG).read_text())["_class_name"]]


def model_file(source: str | Path, name: str) -> Path:
    """One file of a model; of a repository of the hub this file alone is downloaded, or found in the hub's cache.

    Args:
        source: a folder, or a repository of the hub.
        name: with its folders, as in ``"vae/config.json"``.

    Raises:
        FileNotFoundError: the model has no such file, or the hub cannot be reached and its cache has not got it.
        OSError: there is no such repository.
        ValueError: the source is neither a folder nor a name that a repository can have.
    """
    folder = Path(source)
    if folder.is_dir():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no {name} in it")
        return folder / name
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(str(source), name))
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"no {name} in it: {error}") from error


def has_file(source: str | Path, name: str) -> bool:
    """Whether :func:`model_file` has a file."""
    try:
        model_file(source, name)
    except FileNotFoundError:
        return False
    return True


def one_line(error: BaseException) -> str:
    """What an error says, in one line: those of the hub have several."""
    return " ".join(str(error).split())
