"""The flags of ``pdtr eval NAME``: a dataclass a protocol, which loads its benchmark and makes its scorer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from experiments.eval_drawing import DrawOptions, EditOptions
from experiments.eval_judges import JudgeFlags, judges

if TYPE_CHECKING:
    from pdtr.benchmarks.base import Benchmark, Scorer
    from pdtr.benchmarks.scoring import Row
    from rewards.base import Reward

Detector = Literal["instance", "box", "owl", "grounding", "scenes"]
PreferenceName = Literal["pickscore", "hps", "imagereward", "aesthetic", "clip"]


@dataclass(frozen=True)
class GenEvalOptions(DrawOptions):
    """GenEval: objects, counts, colours and positions, by a detector.

    Attributes:
        detector: which kind of detector; scenes is the embedded world's. None of them is GenEval's own.
        detector_model: its folder or hub id.
        colors_clip: folder or hub id of the CLIP that names colours.
        official_results: the file that GenEval's own evaluate_images.py wrote of these images, to read back.
    """

    detector: Detector = "instance"
    detector_model: str = "facebook/mask2former-swin-small-coco-instance"
    colors_clip: str = "openai/clip-vit-large-patch14"
    official_results: Path | None = None

    NAME = "geneval"
    FILE = "prompts/evaluation_metadata.jsonl of github.com/djghosh13/geneval"

    def benchmark(self) -> Benchmark:
        """See :class:`DrawOptions`."""
        from pdtr.benchmarks.geneval import load_geneval

        return load_geneval(self.file())

    def official_rows(self, benchmark: Benchmark) -> tuple[list[Row], Scorer] | None:
        """See :class:`DrawOptions`."""
        from pdtr.benchmarks.geneval import official_rows

        return None if self.official_results is None else official_rows(self.official_results, benchmark)

    def scorer(self) -> AbstractContextManager[Scorer]:
        """See :class:`DrawOptions`."""
        from pdtr.benchmarks.geneval import detector_scorer, scenes_scorer
        from rewards.checkpoints import Placement
        from rewards.clip_models import ClipSource
        from rewards.colors import ColorClassifier, ColorSettings
        from rewards.detected import DetectedGenEval
        from rewards.detectors import BoxDetector, DetectorSettings, Finder, InstanceDetector
        from rewards.text_detectors import GroundingDetector, OwlDetector

        if self.detector == "scenes":
            return nullcontext(scenes_scorer())
        placement = Placement(self.used_device())
        query = "a photo of a {}" if self.detector == "owl" else "{}"
        settings = DetectorSettings(self.detector_model, query=query, placement=placement)
        kinds: dict[str, Callable[[DetectorSettings], Finder]]
        kinds = {"instance": InstanceDetector, "box": BoxDetector, "owl": OwlDetector, "grounding": GroundingDetector}
        colors = ColorClassifier(ColorSettings(ClipSource(self.colors_clip), placement))
        reward = DetectedGenEval(kinds[self.detector](settings), colors, reading="official")
        return nullcontext(detector_scorer(reward, f"{self.detector} {self.detector_model}"))


@dataclass(frozen=True)
class DPGOptions(JudgeFlags, DrawOptions):
    """DPG-Bench: long prompts as graphs of questions, by a judge that answers yes or no."""

    NAME = "dpg"
    FILE = "dpg_bench/dpg_bench.csv of github.com/TencentQQGYLab/ELLA"

    def benchmark(self) -> Benchmark:
        """See :class:`DrawOptions`."""
        from pdtr.benchmarks.dpg import load_dpg

        return load_dpg(self.file())

    @contextmanager
    def scorer(self) -> Iterator[Scorer]:
        """See :class:`DrawOptions`."""
        from pdtr.benchmarks.dpg import judge_scorer
        from rewards.judges.templates import parse_template
        from rewards.questions import QUESTION_TEMPLATE

        with judges(self, [parse_template(QUESTION_TEMPLATE, "question.v1")]) as (judge,):
            yield judge_scorer(judge)


@dataclass(frozen=True)
class GEditOptions(JudgeFlags, EditOptions):
    """GEdit-Bench: edits of eleven kinds, by VIEScore.

    Attributes:
        language: of the instructions.
        consistency_template: what the judge is asked about the change, a name or a path.
        quality_template: what it is asked about the picture.
    """

    language: Literal["en", "cn"] = "en"
    consistency_template: str = "viescore_sc.v1"
    quality_template: str = "viescore_pq.v1"

    NAME = "gedit"
    FILE = "the parquet files of huggingface.co/datasets/stepfun-ai/GEdit-Bench, a folder"

    def benchmark(self) -> Benchmark:
        """See :class:`DrawOptions`."""
        from pdtr.benchmarks.gedit import load_gedit

        return load_gedit(self.file(), self.language, self.image_root)

    @contextmanager
    def scorer(self) -> Iterator[Scorer]:
        """See :class:`DrawOptions`."""
        from pdtr.benchmarks.gedit import judge_scorer

        with judges(self, [self.consistency_template, self.quality_template]) as (consistency, quality):
            yield judge_scorer(consistency, quality)


@dataclass(frozen=True)
class ImgEditOptions(JudgeFlags, EditOptions):
    """ImgEdit-Bench, its basic suite: edits of nine kinds, three grades of 1 to 5.

    Attributes:
        template: what the judge is asked, a name or a path.
    """

    template: str = "imgedit.v1"

    NAME = "imgedit"
    FILE = "Benchmark/Basic/basic_edit.json of github.com/PKU-YuanGroup/ImgEdit, with --image-root"

    def benchmark(self) -> Benchmark:
        """See :class:`DrawOptions`."""
        from pdtr.benchmarks.imgedit import load_imgedit

        return load_imgedit(self.file(), self.image_root)

    @contextmanager
    def scorer(self) -> Iterator[Scorer]:
        """See :class:`DrawOptions`."""
        from pdtr.benchmarks.imgedit import judge_scorer

        with judges(self, [self.template]) as (judge,):
            yield judge_scorer(judge)


@dataclass(frozen=True)
class OCROptions(DrawOptions):
    """OCR: is the text in quotation marks in the picture?"""

    NAME = "ocr"
    FILE = "dataset/ocr/test.txt of github.com/yifan123/flow_grpo"

    def benchmark(self) -> Benchmark:
        """See :class:`DrawOptions`."""
        from pdtr.benchmarks.ocr import load_ocr

        return load_ocr(self.file())

    def scorer(self) -> AbstractContextManager[Scorer]:
        """See :class:`DrawOptions`."""
        from pdtr.benchmarks.ocr import ocr_scorer
        from rewards.ocr import OCR

        return nullcontext(ocr_scorer(OCR()))


@dataclass(frozen=True)
class DrawBenchOptions(DrawOptions):
    """DrawBench, by preference models.

    Attributes:
        scorers: which, the first is the benchmark's number; of PickScore 18 to 26, HPSv2.1 about 0.3, and so on.
        pickscore_weights: a folder or hub id in place of the published weights; the numbers are labelled.
        clip_weights: the same for CLIPScore.
    """

    scorers: tuple[PreferenceName, ...] = ("pickscore", "hps", "imagereward", "aesthetic")
    pickscore_weights: str = ""
    clip_weights: str = ""

    NAME = "drawbench"
    FILE = "DrawBench's 200 prompts, a line each"

    def benchmark(self) -> Benchmark:
        """See :class:`DrawOptions`."""
        from pdtr.benchmarks.drawbench import load_drawbench

        return load_drawbench(self.file(), self.scorers)

    def scorer(self) -> AbstractContextManager[Scorer]:
        """See :class:`DrawOptions`."""
        from experiments.eval_preferences import preference_models
        from pdtr.benchmarks.drawbench import panel_scorer

        given = {"pickscore": self.pickscore_weights, "clip": self.clip_weights}
        found = {name: preference_models(name, given.get(name, ""), self.used_device()) for name in self.scorers}
        rewards: dict[str, Reward] = {name: reward for name, (reward, _) in found.items()}
        told = [f"{name} with the weights {given[name]}" for name in self.scorers if given.get(name)]
        return nullcontext(panel_scorer(rewards, {name: weights for name, (_, weights) in found.items()}, told))


OPTIONS: dict[str, type[DrawOptions]] = {
    kind.NAME: kind for kind in (GenEvalOptions, DPGOptions, GEditOptions, ImgEditOptions, OCROptions, DrawBenchOptions)
}
