"""Set-up that every test shares; everything here has to happen before torch is first imported."""

import contextlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

# make test sets both; a bare pytest deserves the same speed.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pdtr", "envs", "rewards", "agents", "experiments")
_TORCHVISION_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _define_missing_torchvision_operators() -> object | None:
    """Lets torchvision be imported where it is installed but its native operators cannot load.

    A torchvision built for CUDA beside a CPU-only torch fails at import (`operator torchvision::nms does not exist`)
    and takes open_clip, peft and diffusers' pipelines with it. That is a defect of such a machine, so it is mended here
    and not in the library. Returns the operators' registration, which lasts as long as the object, or None where there
    is nothing to mend.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return None
    import torch

    if torch.version.cuda is not None:
        return None
    with contextlib.suppress(OSError):
        for native in Path(spec.submodule_search_locations[0]).glob("_C.*"):
            torch.ops.load_library(str(native))
    with contextlib.suppress(AttributeError):
        torch.ops.torchvision.nms  # noqa: B018 - the look-up itself raises where the operator is missing.
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _TORCHVISION_SCHEMAS:
        library.define(schema)
    return library


_torchvision_operators = _define_missing_torchvision_operators()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def source_files() -> list[Path]:
    """Every Python file of the five packages, relative to the root; no package may be empty."""
    files = {package: sorted((ROOT / package).rglob("*.py")) for package in PACKAGES}
    empty = [package for package, found in files.items() if not found]
    assert not empty, f"no Python files under {empty}: the contracts would hold over nothing"
    return [path.relative_to(ROOT) for found in files.values() for path in found]


@pytest.fixture
def tiny_policy() -> Any:
    """A random policy of the real classes: 48 px, 16 channels, width 32, two blocks."""
    import torch

    from agents.policies.scenes import ScenesPolicy, ScenesPolicyConfig

    words = ("a", "red", "blue", "circle", "square", "make", "the", "and", "remove", "two", "squares")
    policy = ScenesPolicy(ScenesPolicyConfig(words, latent_channels=16, width=32, num_layers=2, num_heads=2), seed=3)
    # SD3's output layer starts at zero, so that a fresh model ignores its input; a test wants one that does not.
    for parameter in policy.transformer.parameters():
        generator = torch.Generator().manual_seed(parameter.numel())
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return policy
