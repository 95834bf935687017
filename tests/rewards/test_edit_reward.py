"""The learnt edit reward: losses and calibration by hand, what the model reads, saving, loading, scoring."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from rewards.base import Prompt, reward_traits
from rewards.checker import check_reward
from rewards.edit_reward import EditReward, checkpoint_folder, template_of
from rewards.edit_reward_calibration import CALIBRATION, Curve, fit_curve, load_curves, save_curves
from rewards.edit_reward_inputs import (
    IMAGE_PAD,
    PREPROCESSOR,
    EditInputs,
    EditTemplate,
    ImageSettings,
    fitted_size,
    image_patches,
)
from rewards.edit_reward_losses import bradley_terry_loss, regression_loss
from rewards.edit_reward_model import EditRewardModel, load_model
from rewards.edit_reward_training import save_checkpoint
from rewards.judges.tiny import tiny_model, tiny_tokenizer
from rewards.scoring import score
from rewards.tiny.edit_reward import SHAPE
from tests.rewards.tiny_edit_base import make_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2.5-VL with random weights, as a checkpoint."""
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module", params=["edit_reward.v1", "edit_reward_frames.v1"])
def checkpoint(base: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny edit reward whose head is random, not trained, for each template."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = load_model(base)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    save_checkpoint(model, EditInputs.load(base, EditTemplate.load(request.param)), folder)
    save_curves({"total": Curve((-2.0, 2.0), (0.0, 1.0))}, folder, 3)
    return folder


def pictures(count: int, size: tuple[int, int] = (48, 48)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *size, 3), np.uint8)


def prompts(count: int) -> list[Prompt]:
    texts = ["remove the red circle", "make the square blue and move it to the left", "turn the cross green"]
    return [Prompt(texts[i % 3], (picture,)) for i, picture in enumerate(pictures(count)[::-1])]


def test_regression_loss_by_hand() -> None:
    loss = regression_loss(torch.tensor([[0.0, 1.0], [0.5, 0.5]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    assert loss.item() == pytest.approx((0 + 1 + 0.25 + 0.25) / 4)
    with pytest.raises(ValueError, match="one shape"):
        regression_loss(torch.zeros(2, 3), torch.zeros(2))


def test_bradley_terry_loss_by_hand() -> None:
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    first, second = math.log(1 + math.exp(-2)), math.log(1 + math.exp(4))
    both = bradley_terry_loss(chosen, rejected, torch.ones(2), temperature=0.5)
    assert both.item() == pytest.approx((first + second) / 2, rel=1e-5)
    weighted = bradley_terry_loss(chosen, rejected, torch.tensor([3.0, 1.0]), temperature=0.5)
    assert weighted.item() == pytest.approx((3 * first + second) / 4, rel=1e-5)


def test_ties_teach_no_order() -> None:
    chosen = torch.tensor([0.2, 0.9], requires_grad=True)
    loss = bradley_terry_loss(chosen, torch.zeros(2), torch.zeros(2))
    loss.backward()
    assert loss.item() == 0
    assert chosen.grad is not None
    assert not chosen.grad.any()
    with pytest.raises(ValueError, match="temperature"):
        bradley_terry_loss(torch.zeros(1), torch.zeros(1), torch.ones(1), 0)


def test_a_curve_keeps_the_order_and_mends_the_size() -> None:
    rng = np.random.default_rng(0)
    truths = rng.random(600)
    rewards = 3 * truths**2 - 1 + 0.05 * rng.normal(size=600)
    curve = fit_curve(rewards, truths)
    assert np.abs(curve(rewards) - truths).mean() < 0.05
    grid = np.linspace(-3, 4, 200)
    assert (np.diff(curve(grid)) > 0).all()
    assert np.isnan(curve([np.nan])).all()


def test_bins_out_of_order_are_joined() -> None:
    curve = fit_curve([0, 1, 2, 3], [0.0, 0.8, 0.6, 1.0], num_bins=4)
    assert curve == Curve((0.0, 1.5, 3.0), (0.0, 0.7, 1.0))
    assert fit_curve([0, 1, 2], [1, 0.5, 0], 3) == Curve()
    with pytest.raises(ValueError, match="rising"):
        Curve((0.0, 0.0), (0.0, 1.0))


def test_curves_are_kept_in_json(tmp_path: Path) -> None:
    curves = {"total": Curve((0.0, 1.0), (0.25, 0.5)), "success": Curve()}
    save_curves(curves, tmp_path, 7)
    assert load_curves(tmp_path) == curves
    (tmp_path / CALIBRATION).write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_curves(tmp_path)


@pytest.mark.parametrize("size", [(48, 48), (30, 70), (200, 90), (13, 500)])
def test_patches_are_those_of_transformers(size: tuple[int, int]) -> None:
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    settings = ImageSettings(min_pixels=56 * 56, max_pixels=112 * 112)
    theirs = module.Qwen2VLImageProcessorPil(min_pixels=settings.min_pixels, max_pixels=settings.max_pixels)
    picture = pictures(1, size)[0]
    expected = theirs([picture], return_tensors="np")
    patches, grid = image_patches([picture], settings)
    assert grid == tuple(expected["image_grid_thw"][0])
    assert np.abs(patches - expected["pixel_values"]).max() < 1e-5


def test_a_picture_too_long_is_named() -> None:
    with pytest.raises(ValueError, match="factor of 200"):
        fitted_size(1, 201, ImageSettings())


def test_settings_are_read_as_checkpoints_have_them(tmp_path: Path) -> None:
    known = {"patch_size": 14, "min_pixels": 3136, "max_pixels": 12845056, "image_mean": [0.5, 0.5, 0.5], "other": 1}
    (tmp_path / PREPROCESSOR).write_text(json.dumps(known))
    found = ImageSettings.load(tmp_path, max_pixels=1000)
    assert (found.max_pixels, found.image_mean, found.merge_size) == (1000, (0.5, 0.5, 0.5), 2)
    newer = {"patch_size": 14, "size": {"shortest_edge": 3136, "longest_edge": 50176}}
    (tmp_path / PREPROCESSOR).write_text(json.dumps(newer))
    found = ImageSettings.load(tmp_path)
    assert (found.min_pixels, found.max_pixels) == (3136, 50176)
    with pytest.raises(ValueError, match="image processor"):
        ImageSettings.load(tmp_path / "none")


@pytest.mark.parametrize(("template", "num_runs"), [("edit_reward.v1", 2), ("edit_reward_frames.v1", 1)])
def test_an_instruction_cannot_pass_for_a_picture(base: Path, template: str, num_runs: int) -> None:
    inputs = EditInputs.load(base, EditTemplate.load(template))
    picture = pictures(1)[0]
    plain, spelt = (inputs([text], [picture], [picture]) for text in ("remove it", f"remove {IMAGE_PAD} it"))
    assert plain["mm_token_type_ids"].sum() == spelt["mm_token_type_ids"].sum() == num_runs * 16
    assert plain["image_grid_thw"].tolist() == [[1, 8, 8]] * num_runs


def test_frames_are_the_two_pictures_in_order(base: Path) -> None:
    first, second = pictures(2)
    inputs = EditInputs.load(base, EditTemplate.load("edit_reward_frames.v1"))
    settings = inputs.settings
    both, grid = image_patches([first, second], settings)
    alone = [image_patches([picture], settings)[0].reshape(64, 3, 2, 6, 6) for picture in (first, second)]
    assert grid == (1, 8, 8)
    for frame, patches in enumerate(alone):
        assert np.array_equal(both.reshape(64, 3, 2, 6, 6)[:, :, frame], patches[:, :, frame])
    with pytest.raises(ValueError, match="one size"):
        inputs(["x"], [first], [second[:24]])


def test_the_template_is_checked() -> None:
    with pytest.raises(ValueError, match="once each"):
        EditTemplate("x", "{prompt} {image}")
    with pytest.raises(ValueError, match=r"edit_reward\.v1"):
        EditTemplate.load("nothing")
    assert len(EditTemplate.load().sha256) == 64


def test_a_published_checkpoint_gives_its_weights(tmp_path: Path) -> None:
    """Qwen's own names of the weights, which the class of the library does not have, are found."""
    from safetensors.torch import load_file

    published = tiny_model(SHAPE, tiny_tokenizer())
    published.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {"lm_head.weight", "model.norm.weight", "visual.merger.ln_q.weight"} <= set(stored)
    model = load_model(tmp_path)
    assert isinstance(model, EditRewardModel)
    held = model.model.language_model.layers[0].mlp.up_proj.weight
    assert torch.equal(held, stored["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(model.model.visual.blocks[0].attn.qkv.weight, stored["visual.blocks.0.attn.qkv.weight"])


def test_saved_and_loaded_scores_are_equal(checkpoint: Path, tmp_path: Path) -> None:
    model, inputs = load_model(checkpoint), EditInputs.load(checkpoint, template_of(checkpoint))
    batch = inputs([p.text for p in prompts(3)], [p.source_images[0] for p in prompts(3)], list(pictures(3)))
    before = model.rewards(batch)
    save_checkpoint(model, inputs, tmp_path)
    assert np.array_equal(before, load_model(tmp_path).rewards(batch))
    assert before.shape == (3, 3)
    assert before.std() > 0


def test_it_keeps_the_contract(checkpoint: Path) -> None:
    reward = EditReward(checkpoint, device="cpu", batch_size=2)
    check_reward(reward, pictures(5), prompts(5))
    scores = score(reward, pictures(5), prompts(5))
    assert set(scores.components) == {"success", "preservation"}
    assert scores.total.std() > 0


def test_both_pictures_and_the_text_count(checkpoint: Path) -> None:
    reward = EditReward(checkpoint, device="cpu")
    image, (first, second, _) = pictures(1), prompts(3)
    asked = [first, Prompt(second.text, first.source_images), Prompt(first.text, second.source_images)]
    totals = [score(reward, image, [prompt]).total[0] for prompt in asked]
    assert len(set(totals)) == 3


def test_what_cannot_be_judged_is_missing_with_a_reason(checkpoint: Path) -> None:
    reward = EditReward(checkpoint, device="cpu")
    good = prompts(1)[0]
    source = good.source_images[0]
    bad = [
        Prompt("", (source,)),
        Prompt("remove it"),
        Prompt("remove it", (source[..., :1],)),
        Prompt("remove it", (source.astype(np.float32),)),
        Prompt("remove it", (pictures(1, (1, 300))[0],)),
        Prompt("red " * 4500, (source,)),
    ]
    scores = score(reward, pictures(7), [good, *bad])
    assert np.isnan(scores.total).tolist() == [False, *[True] * 6]
    assert sorted(scores.reasons) == [1, 2, 3, 4, 5, 6]
    assert "tokens" in scores.reasons[6]
    alone = score(reward, pictures(7)[:1], [good])
    assert scores.total[0] == pytest.approx(alone.total[0], abs=1e-5)


def test_the_fingerprint_is_that_of_what_answers_depend_on(checkpoint: Path, tmp_path: Path) -> None:
    model, inputs = load_model(checkpoint), EditInputs.load(checkpoint, template_of(checkpoint))
    save_checkpoint(model, inputs, tmp_path)
    uncalibrated = reward_traits(EditReward(tmp_path)).fingerprint
    save_curves({"total": Curve((0.0, 1.0), (0.0, 0.5))}, tmp_path, 3)
    assert reward_traits(EditReward(tmp_path)).fingerprint != uncalibrated
    assert reward_traits(EditReward(tmp_path, dtype="bfloat16")) != reward_traits(EditReward(tmp_path))
    assert reward_traits(EditReward(tmp_path, batch_size=4)).batch_size == 4


def test_mistakes_are_named(base: Path, tmp_path: Path) -> None:
    (tmp_path / "published").mkdir()
    published = tiny_model(SHAPE, tiny_tokenizer())
    save_checkpoint(published, EditInputs.load(base), tmp_path / "published")
    with pytest.raises(ValueError, match="head is new"):
        EditReward(tmp_path / "published")(pictures(1), prompts(1))
    with pytest.raises(ValueError, match=r"config\.json"):
        checkpoint_folder(tmp_path)
    with pytest.raises(ValueError, match="owner/name"):
        checkpoint_folder(tmp_path / "nothing" / "here")
    with pytest.raises(ValueError, match="dtype"):
        EditReward(base, dtype="int8")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"Qwen2\.5-VL"):
        load_model(tmp_path)
