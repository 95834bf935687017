"""What images were drawn with: made before they are drawn, kept in ``settings.json``, told with every number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.policies.backbone import BackboneSettings
    from pdtr.benchmarks.base import Item

SETTINGS, IMAGES = "settings.json", "images"
_HASHED_AT_ONCE = 2**24
# Where a policy was found does not change what it draws.
_NOT_COMPARED = ("policy",)
# Settings of a published model that are about memory and speed, and the size, which stands by itself.
_NOT_SEEN = (
    *("height", "width", "offload_encoders", "cached_prompts", "slice_vae", "gradient_checkpointing", "compile"),
    "float32_weights",
)
_NEGATIVES = ("negative_prompt", "edit_negative_prompt")
# Letters of a negative prompt in a table; results.json has all of it.
_SHOWN_LETTERS = 32


@dataclass(frozen=True)
class DrawingSettings:
    """Everything that images follow from; written beside them, printed with every number.

    Attributes:
        benchmark: its name.
        prompts: hash of the items of the whole file.
        samples: images a prompt.
        policy: its folder, for the reader.
        policy_sha256: of its files.
        sampler: name of the sampler's class.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance.
        shift: of the sigma schedule; None is the policy's own.
        image_size: (height, width) in pixels.
        seed: of the noise.
        model: settings of a published model, such as dtype and negative prompts; None for others.
        keep_shape: edits have their sources' proportions, the longer side being that of ``image_size``.
    """

    benchmark: str
    prompts: str
    samples: int
    policy: str
    policy_sha256: str
    sampler: str
    num_inference_steps: int
    guidance_scale: float
    shift: float | None
    image_size: tuple[int, int]
    seed: int
    model: Mapping[str, Any] | None = None
    keep_shape: bool = False

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**asdict(self), "image_size": list(self.image_size)}


def model_settings(folder: Path, **changes: Any) -> BackboneSettings | None:
    """How a published model is loaded: as it was saved, with some settings changed; None for the embedded world's.

    One that was not saved by us has the negative prompt of its authors' editing script, where that has one.

    Args:
        folder: of the policy, or a repository of the hub.
        changes: settings to change; None leaves them.

    Raises:
        ValueError: a setting out of its range, or one for a policy that has none.
    """
    from agents.policies.backbone import BackboneSettings
    from agents.policies.loading import backbone_class, is_backbone, saved_settings

    given = {name: value for name, value in changes.items() if value is not None}
    if is_backbone(folder) or not folder.is_dir():
        released = backbone_class(folder).released_edit_negative_prompt
        settings = saved_settings(folder) or BackboneSettings(edit_negative_prompt=released)
        return replace(settings, **given)
    if given:
        raise ValueError(
            f"{', '.join(given)}: only for models in diffusers' layout, got the policy {folder}; leave it out"
        )
    return None


def shown_settings(settings: BackboneSettings | None) -> dict[str, Any] | None:
    """Those of a model's settings that its images follow from."""
    if settings is None:
        return None
    return {name: value for name, value in asdict(settings).items() if name not in _NOT_SEEN}


def folder_sha256(folder: Path) -> str:
    """A hash of a folder's files, names and contents: the same policy has the same one wherever it lies.

    Of a repository of the hub, which is no folder here, it is that of its name.
    """
    if not folder.is_dir():
        return hashlib.sha256(f"hub {folder.as_posix()}".encode()).hexdigest()
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        of_file = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_HASHED_AT_ONCE):
                of_file.update(block)
        total.update(f"{path.relative_to(folder).as_posix()} {of_file.hexdigest()}\n".encode())
    return total.hexdigest()


def read_settings(output: Path) -> dict[str, Any] | None:
    """The settings that the images of a folder were drawn with; None where they are not known.

    Raises:
        ValueError: the file is damaged.
    """
    path = output / SETTINGS
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected the settings of a drawing, got a damaged file ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected the settings of a drawing, got {type(found).__name__}")
    # Drawings from before the setting was there did not keep shapes.
    return {"keep_shape": False, **found}


def claim(output: Path, settings: DrawingSettings) -> None:
    """Write a folder's settings, or check that those of the images that it holds are the same.

    Raises:
        ValueError: they differ (the message says in what), or there are images whose settings nobody knows.
    """
    known = read_settings(output)
    asked = settings.as_json()
    if known is None:
        if (output / IMAGES).is_dir() and any((output / IMAGES).iterdir()):
            raise ValueError(
                f"{output}: expected {SETTINGS} beside {IMAGES}/, got images of unknown settings; choose another "
                f"--output, or score them as they are with --images {output / IMAGES}"
            )
        output.mkdir(parents=True, exist_ok=True)
        (output / SETTINGS).write_text(json.dumps(asked, indent=1) + "\n", "utf-8")
        return
    names = [name for name in {**asked, **known} if name not in _NOT_COMPARED]
    changed = [name for name in names if known.get(name) != asked.get(name)]
    differ = [f"{name} {known.get(name)!r} and not {asked.get(name)!r}" for name in changed]
    if differ:
        raise ValueError(
            f"{output / SETTINGS}: expected images drawn with these settings, got {'; '.join(differ)}; choose another "
            "--output, ask for the same, or delete the folder"
        )


def squashed(items: Sequence[Item], settings: Mapping[str, Any] | None) -> tuple[str, ...]:
    """What is to be told of sources that were not edited at their proportions; empty where there are none.

    UniPic 2.0's scripts keep the proportions as far as multiples of 32 pixels allow, see ``edit_size``: a source is
    squashed where that gives another size than the one it was edited at.
    """
    if settings is None or settings.get("keep_shape") or not any(item.sources for item in items):
        return ()
    from agents.policies.unipic2 import edit_size

    height, width = settings["image_size"]
    sources = [item.sources[0] for item in items if item.sources]
    count = sum(edit_size(source.size(), max(height, width)) != (height, width) for source in sources)
    told = f"{count} of {len(sources)} sources squashed to {width}x{height}; --keep-shape keeps their proportions"
    return (told,) if count else ()


def describe(settings: Mapping[str, Any] | None) -> str:
    """How images were drawn, on one line."""
    if settings is None:
        return "drawn elsewhere, nobody has said how"
    height, width = settings["image_size"]
    size = f"{max(height, width)} on the longer side" if settings.get("keep_shape") else f"{width}x{height}"
    model = settings.get("model") or {}
    negatives = "".join(f", {name.replace('_', ' ')} {_short(model[name])}" for name in _NEGATIVES if model.get(name))
    dtype = f", {model['dtype']}" if "dtype" in model else ""
    shift = "the policy's own" if settings["shift"] is None else f"{settings['shift']:g}"
    return (
        f"{settings['sampler']}, {settings['num_inference_steps']} steps, guidance {settings['guidance_scale']:g}, "
        f"shift {shift}, {size}, seed {settings['seed']}{negatives}{dtype}, policy {settings['policy']} "
        f"({str(settings['policy_sha256'])[:12]})"
    )


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_LETTERS else f"{text[:_SHOWN_LETTERS].rstrip(' ,')} ...")
