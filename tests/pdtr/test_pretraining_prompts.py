"""Prompts of a stream: a batch at a time, nothing kept, the encoders left where they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from agents.policies.backbone import BackbonePolicy, BackboneSettings
from agents.policies.loading import load_backbone
from agents.policies.tiny.flux import make_tiny_flux2_klein, make_tiny_flux_kontext
from agents.policies.tiny.qwen_image import make_tiny_qwen_image_edit
from agents.policies.tiny.sd3 import make_tiny_sd3
from agents.policies.tiny.z_image import make_tiny_z_image
from envs.scenes.pretraining import SupervisedBatch
from experiments.pretrain_stage import StageOptions
from pdtr.pretraining_objective import flow_matching_loss
from pdtr.pretraining_run import StageRun
from pdtr.pretraining_stages import PUBLISHED
from tests.agents.backbone_checks import picture, prompts_for
from tests.agents.tiny_metaquery import make_metaquery
from tests.pdtr.test_pretraining_stages import Same

SETTINGS = BackboneSettings(height=64, width=64, dtype="float32")
MAKERS: dict[str, tuple[Callable[[Path], Path], int]] = {
    "sd3": (make_tiny_sd3, 1),
    "flux": (make_tiny_flux_kontext, 1),
    "flux2": (make_tiny_flux2_klein, 1),
    "qwen": (make_tiny_qwen_image_edit, 1),
    "z_image": (make_tiny_z_image, 0),
    "metaquery": (lambda folder: make_metaquery(folder, SETTINGS), 1),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_batchs_embeddings_are_those_of_its_prompts_alone(name: str, tmp_path: Path) -> None:
    """To rounding, which is all that a batch may change: prompts of different lengths, with and without a picture."""
    make, most = MAKERS[name]
    policy = load_backbone(make(tmp_path / name), SETTINGS)
    for num_sources in range(most + 1):
        prompts = prompts_for(policy, num_sources, ("a red circle", "two blue squares left of a tree", ""))
        together = policy.encode_batch(prompts)
        assert together.negative is None
        for index, prompt in enumerate(prompts):
            alone = policy.encode([prompt]).tensors
            assert alone.keys() == together.tensors.keys()
            for key, tensor in alone.items():
                # Those of variable length have zeros after their own end in either.
                length = min(tensor.shape[1], together.tensors[key].shape[1])
                found = together.tensors[key][index, :length]
                torch.testing.assert_close(found, tensor[0, :length], rtol=1e-4, atol=1e-5)


def test_stage_b_asks_its_encoders_once_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_backbone(make_tiny_sd3(tmp_path / "sd3"), replace(StageOptions().backbone, height=64, width=64))
    policy.to("cpu")
    sizes: list[int] = []
    moves: list[object] = []
    policy.text_encoders[-1].register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    encoders = {id(encoder) for encoder in policy.text_encoders}
    move = torch.nn.Module.to

    def watched(module: torch.nn.Module, *arguments: object, **options: object) -> torch.nn.Module:
        if id(module) in encoders and arguments[:1] != (policy.device,):
            moves.append(arguments)
        return move(module, *arguments, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch.nn.Module, "to", watched)
    pictures = np.stack([picture((64, 64), seed) for seed in range(5)])
    batches = {
        "edit": SupervisedBatch(("make it blue", "remove the tree", "add a dog"), pictures[:3], pictures[2:]),
        "t2i": SupervisedBatch([f"a red circle {n}" for n in range(5)], pictures),
    }
    config = replace(PUBLISHED["B"], output_dir=tmp_path, num_steps=2, global_batch_size=8)
    for _ in StageRun(config, policy, Same(batches)).steps():
        pass
    assert sizes == [3, 5] * 2
    assert moves == []
    assert kept(policy) == 0


def test_encoders_that_are_offloaded_visit_once_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_backbone(make_tiny_sd3(tmp_path / "sd3"), replace(SETTINGS, offload_encoders=True))
    places: list[object] = []
    monkeypatch.setattr(policy.text_encoders[0], "to", places.append)
    batch = SupervisedBatch(["a red circle", "a dog"], np.stack([picture((64, 64), seed) for seed in range(2)]))
    flow_matching_loss(PUBLISHED["B"], policy, "t2i", batch, torch.Generator())
    assert places == [policy.device, "cpu"]


def kept(policy: BackbonePolicy) -> int:
    return len(policy._texts) + len(policy._sources)
