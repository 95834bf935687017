"""Lets torchvision be imported beside a torch whose build is another than its own; copied into the judge's environment.

Where a torchvision built for CUDA meets a torch for the CPU its native part cannot load, and its import fails at the
schemas of operators (`operator torchvision::nms does not exist`), which takes transformers' image processors and vLLM
with it. They are only declared here: what vLLM needs of torchvision is written in Python.

A `.pth` file imports this in every process of the environment, so torch has to wait until torchvision is asked for.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[object] = []


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Finds nothing itself: it runs once, before torchvision is looked for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            _declare_missing(importlib.util.find_spec("torchvision"))
        return None


def _declare_missing(spec: importlib.machinery.ModuleSpec | None) -> None:
    if spec is None or not spec.submodule_search_locations:
        return
    import torch

    if torch.version.cuda is not None:
        return
    for native in Path(spec.submodule_search_locations[0]).glob("_C.*"):
        try:
            torch.ops.load_library(str(native))
        except OSError:
            continue
    try:
        torch.ops.torchvision.nms  # noqa: B018 - the look-up itself raises where the operator is missing.
    except AttributeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in SCHEMAS:
            library.define(schema)
        # The operators last as long as the object.
        _libraries.append(library)


sys.meta_path.insert(0, _BeforeTorchvision())
