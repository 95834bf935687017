"""Draw a benchmark's images once and keep them: what is there with the same settings is not drawn again.

Sample s of the item with the index i has the noise of (seed, i, s), whatever it is drawn with and however often the
drawing was stopped. ``settings.json`` lies beside the images' folder and has to agree.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.policies.backbone import BackboneSettings
    from agents.policies.base import FlowPolicy
    from agents.samplers import Sampler
    from pdtr.benchmarks.base import Benchmark, Item
    from rewards.base import Images, Prompt

SETTINGS, IMAGES = "settings.json", "images"
# Prompts prepared at a time, so that large text encoders visit the device once for all of them.
_WINDOW = 64
_HASHED_AT_ONCE = 2**24
# Where a policy was found does not change what it draws.
_NOT_COMPARED = ("policy",)
# Settings of a published model that are about memory and speed, and the size, which stands by itself.
_NOT_SEEN = (
    *("height", "width", "offload_encoders", "cached_prompts", "slice_vae", "gradient_checkpointing", "compile"),
    "float32_weights",
)

Missing = tuple["Item", list[int]]


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

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**asdict(self), "image_size": list(self.image_size)}


def model_settings(folder: Path, **changes: Any) -> BackboneSettings | None:
    """How a published model is loaded: as it was saved, with some settings changed; None for the embedded world's.

    Args:
        folder: of the policy, or a repository of the hub.
        changes: settings to change; None leaves them.

    Raises:
        ValueError: a setting out of its range, or one for a policy that has none.
    """
    from agents.policies.loading import is_backbone, saved_settings

    given = {name: value for name, value in changes.items() if value is not None}
    if is_backbone(folder) or not folder.is_dir():
        return replace(saved_settings(folder), **given)
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
    return found


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


def draw(
    policy: FlowPolicy,
    benchmark: Benchmark,
    root: Path,
    sampler: Sampler,
    plan: Plan,
) -> int:
    """Draw what is missing; -> how many images that was.

    Args:
        policy: with the weights to draw with in use.
        benchmark: whose items.
        root: folder of the images.
        sampler: how.
        plan: seed, chunks, and who is told.
    """
    import torch

    missing = [(item, benchmark.layout.missing(root, item, benchmark.samples)) for item in benchmark.items]
    missing = [(item, samples) for item, samples in missing if samples]
    total = sum(len(samples) for _, samples in missing)
    done = 0
    with torch.no_grad():
        for start in range(0, len(missing), _WINDOW):
            window = missing[start : start + _WINDOW]
            prompts = {item.index: item.asked(policy.image_size) for item, _ in window}
            policy.prepare(list(prompts.values()))
            for batch in batches(window, plan.chunk_size):
                asked = [(prompts[item.index], item.index, sample) for item, samples in batch for sample in samples]
                images = _draw_batch(policy, asked, sampler, plan)
                for item, samples in batch:
                    benchmark.layout.write(root, item, dict(zip(samples, images[: len(samples)], strict=True)))
                    images = images[len(samples) :]
                done += len(asked)
                plan.on_images(done, total)
    return total


@dataclass(frozen=True)
class Plan:
    """How drawing goes on.

    Attributes:
        seed: of the noise.
        chunk_size: most images drawn at once; it changes no image but in the last bits.
        on_images: told (drawn, to be drawn) after every batch.
    """

    seed: int = 0
    chunk_size: int = 16
    on_images: Callable[[int, int], None] = lambda done, total: None


def batches(missing: Sequence[Missing], chunk_size: int) -> Iterator[list[Missing]]:
    """Items whole, as many as fit ``chunk_size`` samples; one of more samples than that is a batch of its own."""
    batch: list[Missing] = []
    for item, samples in missing:
        if batch and sum(len(others) for _, others in batch) + len(samples) > chunk_size:
            yield batch
            batch = []
        batch.append((item, samples))
    if batch:
        yield batch


def _draw_batch(
    policy: FlowPolicy, asked: Sequence[tuple[Prompt, int, int]], sampler: Sampler, plan: Plan
) -> list[Images]:
    from agents.rollout import Ask, denoise, encode_asks
    from agents.samplers import derive_seed

    steps = _stochastic_steps(sampler, plan.seed)
    images: list[Images] = []
    for start in range(0, len(asked), plan.chunk_size):
        chunk = asked[start : start + plan.chunk_size]
        condition = encode_asks(policy, [Ask(prompt.text, prompt.source_images) for prompt, _, _ in chunk])
        seeds = [derive_seed(plan.seed, "benchmark", index, sample) for _, index, sample in chunk]
        trajectory = denoise(policy, condition, sampler, steps, seeds)
        images += list(policy.decode(trajectory.x_0).cpu().numpy())
    return images


def _stochastic_steps(sampler: Sampler, seed: int) -> Sequence[int]:
    import torch

    from agents.samplers import derive_seed

    return sampler.stochastic_steps(torch.Generator().manual_seed(derive_seed(seed, "window")))


def describe(settings: Mapping[str, Any] | None) -> str:
    """How images were drawn, on one line."""
    if settings is None:
        return "drawn elsewhere, nobody has said how"
    height, width = settings["image_size"]
    model = settings.get("model") or {}
    dtype = f", {model['dtype']}" if "dtype" in model else ""
    shift = "the policy's own" if settings["shift"] is None else f"{settings['shift']:g}"
    return (
        f"{settings['sampler']}, {settings['num_inference_steps']} steps, guidance {settings['guidance_scale']:g}, "
        f"shift {shift}, {width}x{height}, seed {settings['seed']}{dtype}, policy {settings['policy']} "
        f"({str(settings['policy_sha256'])[:12]})"
    )
