"""Text rendering: does the image show the text that the prompt has in quotation marks?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rewards.base import Images, Prompt, Scores
from rewards.checkpoints import Once, Placement, require_package, scorer_traits

Read = Callable[[Images], Sequence[tuple[str, float]]]
"""One image uint8 [H, W, 3] to its lines of text in reading order, each with a confidence in [0, 1]."""
_QUOTE = '"'
_CURLY = ("“", "”", "„", "«", "»")


@dataclass(frozen=True)
class OCRSettings:
    """How the OCR reward reads and scores.

    Attributes:
        min_confidence: lines that were read with less are left out. Flow-GRPO asks for more than 0, but its PaddleOCR
            has dropped lines below 0.5 before (``drop_score``), so 0.5 is what was published.
        excess_penalty: how much a reward loses where the image has more text than was asked for:
            ``excess_penalty * min(1, excess length / target length)``, down to 0. The published reward has none, and
            pays for a target that is repeated all over the image.
        threads: of each network; more than 1 only helps on an idle machine.
        batch_size: most images of a call; they are read one by one.

    Raises:
        ValueError: a number out of its range.
    """

    min_confidence: float = 0.5
    excess_penalty: float = 0.0
    threads: int = 1
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("min_confidence", "excess_penalty"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number in [0, 1], got {getattr(self, name)}")
        for name in ("threads", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")


class OCR:
    """Flow-GRPO's OCR reward, in [0, 1]: 1 where the target is read, somewhere, exactly.

    r = 1 - min(d, |target|) / |target|,  d = 0 if target in text else Levenshtein(target, text)

    The target is what stands between the prompt's first pair of straight quotation marks; the text is all lines that
    were read, joined. Spaces and case count in neither. Liu et al., Flow-GRPO, arXiv:2505.05470, ``flow_grpo/ocr.py``.

    A prompt without a target is not available; :func:`ocr_target` says so when prompts are loaded. Components:
    ``exact`` (1 where the text is the target and nothing else) and ``excess`` (how many characters more, as a share).

    Differs: the networks are PP-OCRv6's in RapidOCR's package, with no download, and not PaddleOCR 2.9.1's, so numbers
    are not comparable to the last digit; an image that cannot be read is NaN, where the published code gives 0.

    Args:
        settings: how it is read and scored.
        read: another reader; by default RapidOCR, on the CPU as published.

    Raises:
        ValueError: no reader is given, and RapidOCR is not installed.
    """

    def __init__(self, settings: OCRSettings | None = None, read: Read | None = None) -> None:
        self.settings = settings or OCRSettings()
        if read is None:
            require_package("rapidocr", "ocr")
            require_package("onnxruntime", "ocr")
        reader = (
            "rapidocr" if read is None else f"{read.__module__}.{getattr(read, '__qualname__', type(read).__name__)}"
        )
        placement = Placement(batch_size=self.settings.batch_size)
        self.traits = scorer_traits("OCR", self.settings, placement, reader=reader)
        self._read = Once(partial(_rapidocr, self.settings.threads) if read is None else lambda: read)

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Score images uint8 [B, H, W, 3], one prompt each -> [B]."""
        read = self._read()
        total, exact, excess = (np.full(len(images), np.nan, np.float32) for _ in range(3))
        reasons: dict[int, str] = {}
        for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            try:
                target = _plain(ocr_target(prompt.text))
                text = self._text(read, image)
            except Unread as unread:
                reasons[index] = str(unread)
                continue
            excess[index] = max(len(text) - len(target), 0) / len(target)
            exact[index] = text == target
            penalty = self.settings.excess_penalty * min(float(excess[index]), 1.0)
            total[index] = max(ocr_score(target, text) - penalty, 0.0)
        return Scores(total, {"exact": exact, "excess": excess}, reasons)

    def _text(self, read: Read, image: Images) -> str:
        try:
            lines = read(image)
        except Exception as error:
            # Whatever the networks stumble over, it is this image that has no reward.
            raise Unread(f"the image could not be read: {type(error).__name__}: {error}") from error
        return _plain("".join(line for line, confidence in lines if confidence >= self.settings.min_confidence))


class Unread(ValueError):
    """A prompt that names no text, or an image that cannot be read; the message says which and what to do."""


def ocr_target(text: str) -> str:
    """What a prompt wants to be read: the text between its first pair of straight quotation marks.

    Call it when prompts are loaded, so that a file that was made with other quotation marks is refused there.

    Raises:
        Unread: a ValueError; there is no pair, or nothing but space in it.
    """
    parts = text.split(_QUOTE)
    if len(parts) < 3:
        curly = next((mark for mark in _CURLY if mark in text), "")
        hint = f"; replace {curly} and its like by straight ones" if curly else ""
        raise Unread(
            f'expected the text to render in straight quotation marks, as in: a sign that says "Open"; '
            f"got {text!r}{hint}"
        )
    if not parts[1].strip():
        raise Unread(f"expected a text in the first pair of quotation marks, got nothing in {text!r}")
    return parts[1]


def ocr_score(target: str, text: str) -> float:
    """1 - min(d, |target|) / |target|, where d is 0 if the target is part of the text, else their Levenshtein distance.

    Args:
        target: not empty; both without spaces and in lower case, as they are compared as they stand.
        text: what was read.
    """
    if target in text:
        return 1.0
    return 1.0 - min(levenshtein(target, text), len(target)) / len(target)


def levenshtein(first: str, second: str) -> int:
    """How many characters have to be put in, taken out or replaced to make one text the other."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        above_left, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            above_left, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above_left + (a != b))
    return row[-1]


def _plain(text: str) -> str:
    return text.replace(" ", "").lower()


def _rapidocr(threads: int) -> Read:
    from rapidocr import RapidOCR

    parameters = {
        "Global.log_level": "error",
        "Global.use_cls": False,
        # Lines are chosen by our own setting.
        "Global.text_score": 0.0,
        "EngineConfig.onnxruntime.intra_op_num_threads": threads,
        "EngineConfig.onnxruntime.inter_op_num_threads": threads,
    }
    engine: Any = RapidOCR(params=parameters)

    def read(image: Images) -> list[tuple[str, float]]:
        # It expects OpenCV's order of channels.
        found = engine(np.ascontiguousarray(image[..., ::-1]))
        return list(zip(found.txts or (), map(float, found.scores or ()), strict=True))

    # The networks are loaded by the first image with text: a missing file shows here, not as images that go unread.
    if not read(_sample()):
        raise RuntimeError("rapidocr reads nothing on an image with text; its models are damaged: install it again")
    return read


def _sample() -> Images:
    canvas = Image.new("RGB", (160, 64), "white")
    ImageDraw.Draw(canvas).text((10, 10), "Sample", fill="black", font=ImageFont.load_default(size=36))
    return np.asarray(canvas)
