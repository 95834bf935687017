"""The commands of ``pdtr``: each takes its arguments, prints what came of them, and leaves errors to the caller."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import tyro

from experiments.arguments import how_to_go_on, leading_name
from experiments.flags import Usage, parse, parse_run
from pdtr.processes import finish, is_first

if TYPE_CHECKING:
    from agents.policies.base import FlowPolicy
    from rewards.base import Images

# The side in pixels up to which a picture is shown enlarged.
_SMALL = 128


def train(arguments: Sequence[str]) -> None:
    """``pdtr train [RECIPE] [--resume] [--flags]``: run a recipe, print the interference table and the report's path.

    Raises:
        ValueError: an unknown recipe or flag, a bad value, a folder that holds another run.
        KeyboardInterrupt: stopped; its text says how to go on.
    """
    from experiments.recipes import DEFAULT, find_recipe, summary

    name, flags = leading_name(arguments, DEFAULT)
    recipe = find_recipe(name)
    name = recipe.__name__
    usage = Usage(f"pdtr train {name}", f"{summary(recipe)} Other recipes: pdtr recipes.")
    config, resume = parse_run(recipe(), usage, flags)
    if resume:
        _check_recipe(config.output_dir, name)
    from pdtr.launch import train as run

    try:
        path = run(config, resume=resume, recipe=name)
    except KeyboardInterrupt:
        started = (config.output_dir / "config.json").is_file()
        raise KeyboardInterrupt(how_to_go_on(["train", name, *flags], started)) from None
    finish()
    if is_first():
        _print_table(config.output_dir)
        print(f"report: {path}")


@dataclass(frozen=True)
class SampleOptions:
    """Draw images of a prompt, or edits of a picture, and save them side by side.

    Attributes:
        prompt: what to draw; with a source image, what to change.
        source_image: picture to edit, or several for models that take several, in the order in which they are shown;
            resized to the policy's size.
        height: of the images in pixels; as the policy was saved, or 512, when left out. Published models only.
        width: see ``height``.
        keep_shape: edit at the first source's proportions, the longer side as long as the policy's, as UniPic 2.0 does;
            published models only.
        negative_prompt: what a published model is guided away from in text-to-image; as it was saved, or none, when
            left out.
        edit_negative_prompt: and in editing; as it was saved, or for UniPic 2.0's own folders the released script's,
            when left out.
        policy: folder of a run or of a policy; the base that ships with the package when left out.
        num_images: how many to draw.
        seed: of the noise; image i follows from (seed, i) alone.
        guidance_scale: classifier-free guidance, 1 is none; that of the run's evaluation when left out.
        num_inference_steps: denoising steps; those of the run's evaluation when left out.
        shift: of the sigma schedule, above 1 puts more steps at high noise; that of the run's evaluation when left out.
        scale: each pixel becomes a square of this side; when left out, 4 for pictures as small as the embedded world's
            and 1 for others.
        output: where the picture goes; the suffix names the format.
    """

    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]
    source_image: tuple[Path, ...] = ()
    height: int | None = None
    width: int | None = None
    keep_shape: bool = False
    negative_prompt: str | None = None
    edit_negative_prompt: str | None = None
    policy: Path | None = None
    num_images: int = 4
    seed: int = 0
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    shift: float | None = None
    scale: int | None = None
    output: Path = Path("grid.png")

    def __post_init__(self) -> None:
        if self.num_images < 1 or (self.scale is not None and self.scale < 1):
            raise ValueError(f"num_images and scale: expected 1 or more, got {self.num_images} and {self.scale}")


def sample(arguments: Sequence[str]) -> None:
    """``pdtr sample PROMPT [--source-image PATH ...] [--flags]``: draw images, print where they are.

    The sources lead the picture where there are any.

    Raises:
        ValueError: a bad value, or a folder or file that is not what it should be.
        OSError: a file cannot be read or written.
    """
    options = parse(SampleOptions(tyro.MISSING), Usage("pdtr sample"), arguments)
    from PIL import Image

    from pdtr.sampling import evaluation_sampler, image_grid, sample_images
    from rewards.base import Prompt

    if options.output.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"output: expected a picture's name such as grid.png, got {str(options.output)!r}")
    sampler = evaluation_sampler(
        options.policy,
        guidance_scale=options.guidance_scale,
        num_inference_steps=options.num_inference_steps,
        shift=options.shift,
    )
    policy = _sampled_policy(options)
    sources = tuple(_source(path, policy.image_size) for path in options.source_image)
    _note_unknown_words(policy, options.prompt)
    prompt = Prompt(options.prompt, sources)
    images = sample_images(policy, prompt, options.num_images, options.seed, sampler)
    shown = [*sources, *images]
    num_columns = len(shown) if len(shown) <= 8 else 8
    scale = options.scale or (4 if max(policy.image_size) <= _SMALL else 1)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image_grid(np.stack(shown), num_columns, scale)).save(options.output)
    print(options.output)


@dataclass(frozen=True)
class ReportOptions:
    """Write a run's report again, from its logs, and print its table.

    Attributes:
        run_folder: the run's output directory.
    """

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_FOLDER")]


def report(arguments: Sequence[str]) -> None:
    """``pdtr report RUN_FOLDER``: write the report from the run's logs, print the table and the report's path.

    Raises:
        ValueError: the folder is not a run's, or its logs are damaged.
    """
    folder = parse(ReportOptions(tyro.MISSING), Usage("pdtr report"), arguments).run_folder
    from pdtr.report import write_report

    path = write_report(folder)
    _print_table(folder)
    print(f"report: {path}")


def recipes(arguments: Sequence[str]) -> None:
    """``pdtr recipes``: every recipe with its first line."""
    from experiments.recipes import recipes as known
    from experiments.recipes import summary

    if arguments and not {"-h", "--help"} & set(arguments):
        raise ValueError(
            f"recipes: expected no arguments, got {shlex.join(arguments)}; a recipe's flags: pdtr train RECIPE --help"
        )
    found = known()
    width = max(map(len, found)) + 2
    for name, recipe in found.items():
        print(f"{name:<{width}}{summary(recipe)}")


def _check_recipe(folder: Path, name: str) -> None:
    """A run goes on with the recipe that it began with: the flags of another one mean another run."""
    path = folder / "config.json"
    if not path.is_file():
        return
    try:
        begun = json.loads(path.read_text())["recipe"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a run's configuration, got a damaged file ({error})") from error
    if begun != name:
        raise ValueError(
            f"{folder}: expected a run of {name!r} to resume, got one of {begun!r}; "
            f"type: pdtr train {begun} --resume --output-dir {shlex.quote(str(folder))}"
        )


def _sampled_policy(options: SampleOptions) -> FlowPolicy:
    """The policy to draw with, on its device and at the size to draw at."""
    from pdtr.benchmarks.settings import model_settings
    from pdtr.sampling import device_or_gpu, load_policy, policy_folder

    folder = policy_folder(options.policy)
    names = ("height", "width", "negative_prompt", "edit_negative_prompt")
    policy = load_policy(folder, model_settings(folder, **{name: getattr(options, name) for name in names}))
    policy.to(device_or_gpu())
    if options.keep_shape:
        _take_shape(policy, options.source_image)
    return policy


def _source(path: Path, image_size: tuple[int, int]) -> Images:
    from pdtr.sampling import load_source_image

    image, (height, width) = load_source_image(path, image_size)
    if (height, width) != image_size:
        print(f"note: {path} resized from {width}x{height} to {image_size[1]}x{image_size[0]}", file=sys.stderr)
    return image


def _take_shape(policy: FlowPolicy, paths: Sequence[Path]) -> None:
    """Have a published model draw at its source's proportions."""
    from agents.policies.backbone import BackbonePolicy
    from agents.policies.unipic2 import edit_size
    from pdtr.sampling import picture_size

    if not isinstance(policy, BackbonePolicy) or not paths:
        raise ValueError("keep_shape: expected a published model and a source image; leave the flag out")
    policy.resize(*edit_size(picture_size(paths[0]), max(policy.image_size)))


def _note_unknown_words(policy: FlowPolicy, text: str) -> None:
    from pdtr.sampling import unknown_words

    words = unknown_words(policy, text)
    if words:
        print(f"note: the policy does not know {', '.join(words)}", file=sys.stderr)


def _print_table(folder: Path) -> None:
    from pdtr.report import format_table, interference_table

    print(format_table(interference_table(folder)))
