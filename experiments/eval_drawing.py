"""The flags that every ``pdtr eval NAME`` has: data, policy, images, and how they are drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from pdtr.benchmarks.base import Benchmark, Scorer
    from pdtr.benchmarks.scoring import Row


@dataclass(frozen=True)
class DrawOptions(ABC):
    """What every benchmark has: data, policy, images, and how they are drawn.

    Attributes:
        data: the benchmark's published file or folder.
        policy: folder of a run or of a policy to draw with; the base that ships with the package when left out.
        images: a folder of images in the official layout, to score without drawing.
        output: folder of images, scores and results; runs/eval/NAME when left out.
        draw_only: draw, and leave the scoring for another time, or to the official scorer.
        limit: this many prompts, evenly over the file; the numbers are labelled.
        samples: images a prompt in place of the protocol's; the numbers are labelled.
        seed: of the noise.
        guidance_scale: classifier-free guidance, 1 is none; the run's or the policy's own when left out.
        num_inference_steps: denoising steps; the run's or the policy's own when left out.
        shift: of the sigma schedule; the policy's own when left out.
        height: of images in pixels, for published models; as the model was saved, or 512, when left out.
        width: of images in pixels, as height.
        dtype: of a published model; as it was saved, or bfloat16, when left out.
        negative_prompt: what a published model is guided away from in text-to-image; as it was saved, or none, when
            left out.
        edit_negative_prompt: and in editing; as it was saved, or for UniPic 2.0's own folders the released script's,
            when left out.
        chunk_size: images drawn at once.
        device: torch's name of the device for the policy and for scorers; the GPU where there is one, when left out.
        num_threads: torch threads.
    """

    data: Path | None = None
    policy: Path | None = None
    images: Path | None = None
    output: Path | None = None
    draw_only: bool = False
    limit: int | None = None
    samples: int | None = None
    seed: int = 0
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    shift: float | None = None
    height: int | None = None
    width: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    negative_prompt: str | None = None
    edit_negative_prompt: str | None = None
    chunk_size: int = 16
    device: str = ""
    num_threads: int = 2

    NAME: ClassVar[str]
    FILE: ClassVar[str]
    """What its data is called, and where it is to be had."""

    def __post_init__(self) -> None:
        if min(self.chunk_size, self.num_threads) < 1 or self.seed < 0:
            raise ValueError(
                "chunk_size and num_threads of 1 or more and seed of 0 or more: expected, got "
                f"{self.chunk_size}, {self.num_threads} and {self.seed}"
            )
        if self.images is not None and (self.policy is not None or self.draw_only):
            raise ValueError("images: expected no --policy and no --draw-only beside it, for nothing is drawn then")

    @property
    def keeps_shape(self) -> bool:
        """Whether edits are drawn at their sources' proportions."""
        return False

    def used_device(self) -> str:
        """The device that was asked for, or else the GPU where there is one."""
        from pdtr.sampling import device_or_gpu

        return device_or_gpu(self.device)

    @abstractmethod
    def benchmark(self) -> Benchmark:
        """The whole benchmark of the data."""

    @abstractmethod
    def scorer(self) -> AbstractContextManager[Scorer]:
        """What scores its images; a judge's connections are closed in the end."""

    def official_rows(self, benchmark: Benchmark) -> tuple[list[Row], Scorer] | None:
        """What the official scorer has said of the images, where its results are given; None otherwise."""
        return None

    def file(self) -> Path:
        """The data.

        Raises:
            ValueError: none is given.
        """
        if self.data is None:
            raise ValueError(f"data: expected {self.FILE}, got none; type: pdtr eval {self.NAME} --data PATH")
        return self.data


@dataclass(frozen=True)
class EditOptions(DrawOptions):
    """What benchmarks of edits have beside it.

    Attributes:
        image_root: folder that paths of pictures in the data start from; the data's own when left out.
        keep_shape: edit at each source's proportions, the longer side as long as the policy's, as UniPic 2.0's scripts
            do; published models only. Otherwise sources are squashed to the policy's size, which the table tells.
    """

    image_root: Path | None = None
    keep_shape: bool = False

    @property
    def keeps_shape(self) -> bool:
        """See :class:`DrawOptions`."""
        return self.keep_shape
