"""What tiny twins run on: random models of the published classes and a few prompts, made on demand."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

ROOT = Path("runs/tiny_models")
SIDE = 64
CLASSES = ("bench", "cat", "clock", "cup")
# What the tiny detector finds.
_FOUND = ("bench", "clock")
_WORDS = ("Open", "Go", "Stop", "Cafe", "Exit", "Sale")
_EDITS = ("make it red", "remove the cup", "add a clock", "turn the bench blue")


def made(name: str, make: Callable[[Path], Any]) -> Path:
    """The folder of a name under ``ROOT``, made where it is missing.

    It is whole or not there: several processes of one run may make it at once, and the first one's stays.
    """
    folder = ROOT / name
    if folder.is_dir():
        return folder
    ROOT.mkdir(parents=True, exist_ok=True)
    partial = Path(mkdtemp(dir=ROOT, prefix=f".{name}-"))
    try:
        make(partial)
        os.replace(partial, folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def write_prompts(folder: Path) -> None:
    """Prompts of every kind: ``geneval.jsonl``, ``ocr.txt``, ``captions.txt`` and ``edits.jsonl`` with pictures."""
    import numpy as np
    from PIL import Image

    from envs.geneval_prompts import save_rows, training_prompts
    from rewards.geneval import TAGS

    rows = [row for row in training_prompts(4000, 0, ratio=dict.fromkeys(TAGS, 1)) if _is_known(row)]
    save_rows(folder / "geneval.jsonl", rows)
    signs = [f'a {thing} with a sign that says "{word}"' for word in _WORDS for thing in CLASSES]
    (folder / "ocr.txt").write_text("\n".join(signs) + "\n")
    captions = [f"a {first} beside a {second}" for first in CLASSES for second in CLASSES]
    (folder / "captions.txt").write_text("\n".join(captions) + "\n")
    rng = np.random.default_rng(0)
    edits = []
    for index in range(16):
        name = f"{index:02}.png"
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(folder / name)
        edits.append({"prompt": _EDITS[index % len(_EDITS)], "image": name})
    (folder / "edits.jsonl").write_text("".join(json.dumps(edit) + "\n" for edit in edits))


def _is_known(row: dict[str, Any]) -> bool:
    return all(clause["class"] in _FOUND for clause in row["include"])


def prompts() -> Path:
    """The folder of :func:`write_prompts`."""
    return made("prompts", write_prompts)


def edit_reward() -> Path:
    """A learnt edit reward on a tiny Qwen2.5-VL."""
    from rewards.tiny.edit_reward import make_tiny_edit_reward

    return made("edit_reward", lambda folder: make_tiny_edit_reward(folder, _EDITS))


def detector() -> Path:
    """A tiny Mask2Former that finds some benches and clocks in noise, not as many in each picture."""
    from rewards.tiny.detectors import save_mask2former

    return made("mask2former", lambda folder: save_mask2former(folder, CLASSES, certainty=2.5))


def clip() -> Path:
    """A tiny CLIP."""
    from rewards.tiny.clip import save_clip

    return made("clip", save_clip)


def metaquery() -> Path:
    """A tiny UniPic2-MetaQuery: a new connector between a tiny Qwen2.5-VL and a tiny SD3."""
    from agents.policies.tiny.sd3 import make_tiny_sd3

    sd3 = made("sd3", make_tiny_sd3)
    return made("metaquery", lambda folder: _write_metaquery(folder, sd3))


def _write_metaquery(folder: Path, sd3: Path) -> None:
    import torch

    from agents.policies.backbone import BackboneSettings
    from agents.policies.connector import ConnectorConfig
    from agents.policies.metaquery import MetaQueryPolicy
    from agents.policies.metaquery_parts import MetaQueryPipeline
    from rewards.judges.tiny import TinyVLM, save_tiny_vlm, tiny_tokenizer

    settings = BackboneSettings(SIDE, SIDE, dtype="float32")
    sizes = ConnectorConfig(8, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    with TemporaryDirectory() as vlm:
        save_tiny_vlm(Path(vlm), TinyVLM(initializer_range=0.1), tiny_tokenizer(["Generate an image: a", *_EDITS]))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipeline = MetaQueryPipeline.from_parts(sd3, Path(vlm), sizes, settings=settings)
        MetaQueryPolicy(pipeline, settings).save(folder)
