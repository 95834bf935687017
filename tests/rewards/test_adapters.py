"""Functions written as the users of other libraries write them, run unchanged, with numbers worked out by hand."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import asyncio
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rewards.adapters import from_flow_factory, from_flow_grpo, from_flow_grpo_edit, from_trl, from_verl_omni
from rewards.base import Prompt, Reward, RewardTraits, reward_name, reward_traits
from rewards.checker import check_reward
from rewards.pixel import jpeg_incompressibility
from rewards.scoring import score

NAN = float("nan")
# Pixels 0, 51, 102, 153: 0, 0.2, 0.4, 0.6 of white.
IMAGES = np.arange(4, dtype=np.uint8).repeat(2 * 3 * 3).reshape(4, 2, 3, 3) * 51
SOURCE = np.full((2, 3, 3), 51, np.uint8)
PROMPTS = [Prompt(text, metadata={"answer": len(text), "tag": "x"}) for text in ("a", "bb", "ccc", "dddd")]
EDITS = [Prompt(text, (SOURCE,)) for text in ("a", "bb", "ccc", "dddd")]
NOISE = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)


# As in flow_grpo/rewards.py: a factory that takes a device and returns the function.
def jpeg_size():
    def _fn(images, prompts, metadata):
        if isinstance(images, torch.Tensor):
            images = (images * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
            images = images.transpose(0, 2, 3, 1)
        sizes = []
        for image in images:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, format="JPEG", quality=95)
            sizes.append(buffer.tell() / 1000)
        return np.array(sizes), {}

    return _fn


def brightness_score(device):
    weight = torch.nn.Parameter(torch.ones(3, device=device))  # Scores come back with a gradient, in bfloat16.

    def _fn(images, prompts, metadata):
        assert images.shape[1] == 3
        return (images.mean((2, 3)) @ weight / 3).bfloat16(), {}

    return _fn


def multi_score(device, score_dict):
    fns = {"brightness": brightness_score(device), "jpeg": jpeg_size()}

    def _fn(images, prompts, metadata, only_strict=True):
        total: list[Any] = []
        details: dict[str, Any] = {}
        for name, weight in score_dict.items():
            scores, _ = fns[name](images, prompts, metadata)
            details[name] = scores
            total = [t + weight * s for t, s in zip(total or [0] * len(scores), scores, strict=True)]
        details["color_accuracy"] = [1.0, -10.0, 0.0, -10.0]
        details["avg"] = total
        return details, {}

    return _fn


def test_flow_grpo_s_functions_see_the_very_pixels() -> None:
    for images in ("float", "uint8"):
        reward = from_flow_grpo(jpeg_size(), images=images)
        assert score(reward, NOISE, PROMPTS).total.tolist() == jpeg_incompressibility(NOISE, PROMPTS).tolist()
        check_reward(reward, NOISE, PROMPTS)


def test_flow_grpo_s_tensors() -> None:
    found = score(from_flow_grpo(brightness_score("cpu")), IMAGES, PROMPTS)
    np.testing.assert_allclose(found.total, [0, 0.2, 0.4, 0.6], rtol=4e-3)


def test_flow_grpo_s_multi_score() -> None:
    reward = from_flow_grpo(multi_score("cpu", {"brightness": 0.5, "jpeg": 2.0}), RewardTraits(batch_size=4))
    found = score(reward, IMAGES, PROMPTS)
    assert list(found.components) == ["brightness", "jpeg", "color_accuracy"]
    expected = 0.5 * found.components["brightness"] + 2 * found.components["jpeg"]
    np.testing.assert_allclose(found.total, expected, rtol=1e-2)
    # The padding of images with another tag is no accuracy.
    np.testing.assert_array_equal(found.components["color_accuracy"], np.array([1, NAN, 0, NAN], np.float32))
    assert reward_name(reward) == "multi_score._fn"
    assert reward_traits(reward).batch_size == 4


def test_what_a_function_does_to_its_inputs_stays_with_it() -> None:
    def rude(images, prompts, metadata):
        images[:] = 0
        prompts.clear()
        metadata[0]["ref_image"] = 1
        return [1.0] * len(images), {}

    images = IMAGES.copy()
    score(from_flow_grpo(rude, images="uint8"), images, PROMPTS)
    assert np.array_equal(images, IMAGES)
    assert PROMPTS[0].metadata == {"answer": 1, "tag": "x"}


def test_flow_grpo_s_edit_functions() -> None:
    def similarity(ref_images, images, prompts, metadatas):
        if not isinstance(ref_images, torch.Tensor):
            ref_images = np.array([np.array(image) for image in ref_images])
        reference = torch.from_numpy(ref_images).permute(0, 3, 1, 2) / 255
        return 1 - (images - reference).abs().mean((1, 2, 3)), {}

    reward = from_flow_grpo_edit(similarity)
    np.testing.assert_allclose(score(reward, IMAGES, EDITS).total, [0.8, 1, 0.8, 0.6], rtol=1e-6)
    check_reward(reward, IMAGES, EDITS)
    with pytest.raises(
        ValueError, match=r"similarity: expected one source image a prompt, got 0 for prompt 'a'; score"
    ):
        score(reward, IMAGES, PROMPTS)


# As in trl's documentation.
def correct_length(prompts, completions, answer, **kwargs):
    return [None if a == 3 else float(c.size[0] == a) for c, a in zip(completions, answer, strict=True)]


async def judged(prompts, completions, **kwargs):
    await asyncio.sleep(0)
    return [len(prompt) + completion.getpixel((0, 0))[0] / 51 for prompt, completion in zip(prompts, completions)]  # noqa: B905


def test_trl_s_functions() -> None:
    found = score(from_trl(correct_length, columns=["answer"]), IMAGES, PROMPTS)
    np.testing.assert_array_equal(found.total, np.array([0, 0, NAN, 0], np.float32))
    assert found.reasons == {2: "correct_length gave no score"}
    assert score(from_trl(judged), IMAGES, PROMPTS).total.tolist() == [1, 3, 5, 7]
    check_reward(from_trl(judged), IMAGES, PROMPTS)


def test_trl_s_columns() -> None:
    reward = from_trl(correct_length, columns=["answer"])
    lacking = [Prompt("a", metadata={"anwser": 1}, id="p0")] * 4
    with pytest.raises(
        ValueError, match="expected 'answer' in the metadata of prompt 'p0', got the keys anwser; did you"
    ):
        score(reward, IMAGES, lacking)
    with pytest.raises(
        ValueError, match=r"columns: expected a sequence of names, got the text 'answer'; write \('answ"
    ):
        from_trl(correct_length, columns="answer")

    def strict(prompts, completions, answer):
        return []

    with pytest.raises(ValueError, match=r"as .*strict\(prompts=, completions=, anser=\), .* did you mean 'answer'\?"):
        from_trl(strict, columns=["anser"])
    with pytest.raises(ValueError, match="missing a required argument: 'answer'; bind other arguments with functools"):
        from_trl(strict)


# As in Flow-Factory's guide, without its base classes.
@dataclass
class RewardModelOutput:
    rewards: Any
    extra_info: dict[str, Any] | None = None


class GroupwiseRewardModel:
    pass


class Sharpness:
    use_tensor_inputs = False

    def __call__(self, prompt, image=None, video=None, condition_images=None, condition_videos=None, **kwargs):
        assert all(isinstance(picture, Image.Image) for picture in image)
        values = torch.tensor([np.asarray(picture).mean() / 51 for picture in image])
        info = {
            "given": [len(c) for c in condition_images] if condition_images else None,
            "texts": prompt,
            "double": values * 2,
            "matrix": torch.zeros(len(prompt), 2),
            "scalar": np.float32(1),
        }
        return RewardModelOutput(rewards=values, extra_info=info)


class TensorModel:
    use_tensor_inputs = True

    def __call__(self, prompt, image=None, condition_images=None, **kwargs):
        return RewardModelOutput(rewards=[(i - c[0]).mean() for i, c in zip(image, condition_images, strict=True)])


class RankModel(GroupwiseRewardModel):
    def __call__(self, prompt, image=None, condition_images=None, **kwargs):
        means = torch.tensor([np.asarray(picture).mean() for picture in image])
        return RewardModelOutput(rewards=means.argsort().argsort().float() / len(prompt))


def test_flow_factory_s_models() -> None:
    reward = from_flow_factory(Sharpness())
    found = score(reward, IMAGES, PROMPTS)
    assert found.total.tolist() == [0, 1, 2, 3]
    assert {name: values.tolist() for name, values in found.components.items()} == {"double": [0, 2, 4, 6]}
    assert score(reward, IMAGES, EDITS).components["given"].tolist() == [1, 1, 1, 1]
    mixed = [*PROMPTS[:2], *EDITS[2:]]
    assert score(reward, IMAGES, mixed).components["given"].tolist() == [0, 0, 1, 1]
    check_reward(reward, IMAGES, PROMPTS)
    assert reward_name(reward) == "Sharpness"


def test_flow_factory_s_tensors() -> None:
    found = score(from_flow_factory(TensorModel()), IMAGES, EDITS)
    np.testing.assert_allclose(found.total, [-0.2, 0, 0.2, 0.4], atol=1e-6)


class ByColumns(GroupwiseRewardModel):
    """As its GenEval has it: a data set's columns come as JSON, by keyword."""

    required_fields = ("image", "prompt", "metadata")

    def __call__(self, prompt, image=None, **kwargs):
        return RewardModelOutput(rewards=[float(json.loads(entry)["count"]) for entry in kwargs["metadata"]])


class ByName:
    def __call__(self, prompt, metadata, image=None, condition_images=None):
        return RewardModelOutput(rewards=[float(json.loads(entry)["count"]) for entry in metadata])


@pytest.mark.parametrize(("model", "scope"), [(ByColumns(), "group"), (ByName(), "sample")])
def test_flow_factory_s_metadata(model: Any, scope: Any) -> None:
    reward = from_flow_factory(model, RewardTraits(scope=scope))
    prompts = [Prompt("a", metadata={"count": count, "tag": "counting"}) for count in (3, 1, 2, 5)]
    assert score(reward, IMAGES, prompts).total.tolist() == [3, 1, 2, 5]
    with pytest.raises(ValueError, match=r"metadata\['box'\]: expected JSON, got ndarray"):
        score(reward, IMAGES[:1], [Prompt("a", metadata={"box": np.zeros(2)})])


def test_flow_factory_s_groups() -> None:
    reward = from_flow_factory(RankModel(), RewardTraits(scope="group"))
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    assert score(reward, IMAGES, prompts).total.tolist() == [0, 0.5, 0, 0.5]
    check_reward(reward, IMAGES, prompts)
    with pytest.raises(
        ValueError, match="traits: expected group scope for RankModel, which is groupwise, got 'sample'"
    ):
        from_flow_factory(RankModel())


# As in verl-omni's reward_score folder.
async def compute_score_light(data_source, solution_image, ground_truth, extra_info, **kwargs):
    await asyncio.sleep(0)
    assert solution_image.dtype == torch.uint8
    assert solution_image.shape == (3, 2, 3)
    raw = solution_image.float().mean().item() / 51
    extra = {"light_late": 1} if raw > 2 else {}
    return {"score": raw + len(ground_truth), "light_raw": raw, "text": ground_truth, **extra}


def compute_score(data_source, solution_image, ground_truth, extra_info, server_url):
    assert (data_source, server_url) == ("ocr", "http://localhost")
    source = extra_info["source_img"]
    return float(solution_image.max() - source.getpixel((0, 0))[0] / 255) if ground_truth != "none" else None


def test_verl_omni_s_asynchronous_scorers() -> None:
    reward = from_verl_omni(compute_score_light, RewardTraits(concurrency=4, batch_size=8, fingerprint="v1"))
    assert reward_traits(reward) == RewardTraits("sample", 1, 4, "v1")
    found = score(reward, IMAGES, PROMPTS)
    assert found.total.tolist() == [1, 3, 5, 7]
    assert found.components["light_raw"].tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(found.components["light_late"], np.array([NAN, NAN, NAN, 1], np.float32))
    assert set(found.components) == {"light_raw", "light_late"}
    check_reward(reward, IMAGES, PROMPTS)


def test_verl_omni_s_plain_scorers() -> None:
    scorer = partial(compute_score, server_url="http://localhost")
    metadata = [{"data_source": "ocr", "ground_truth": text} for text in ("x", "none", "z", "w")]
    prompts = [Prompt("edit", (SOURCE,), each) for each in metadata]
    found = score(from_verl_omni(scorer, image="float"), IMAGES, prompts)
    np.testing.assert_allclose(found.total, np.array([-0.2, NAN, 0.2, 0.4]), atol=1e-6)
    assert found.reasons == {1: "compute_score gave no score"}


def test_a_scorer_called_with_several_images_itself() -> None:
    async def several() -> list[float]:
        answer: Any = from_verl_omni(compute_score_light)(IMAGES, PROMPTS)
        total: list[float] = (await answer).total.tolist()
        return total

    assert asyncio.run(several()) == [1, 3, 5, 7]


def answers(adapter: Callable[..., Reward], answer: Any) -> Reward:
    """A reward whose function gives this answer, whatever it is asked."""

    def foreign(*args, **kwargs):
        return answer

    return adapter(foreign)


@pytest.mark.parametrize("values", [[1, None, NAN, 2], np.array([1, NAN, NAN, 2]), torch.tensor([1, NAN, NAN, 2])])
def test_what_is_missing_stays_missing_in_every_adapter(values: Any) -> None:
    rewards = [
        answers(from_flow_grpo, (values, {})),
        answers(from_flow_grpo, ({"avg": values}, {})),
        answers(from_flow_grpo_edit, (values, {})),
        answers(from_trl, values),
        answers(from_flow_factory, RewardModelOutput(values)),
    ]
    for reward in rewards:
        found = score(reward, IMAGES, EDITS)
        np.testing.assert_array_equal(found.total, np.array([1, NAN, NAN, 2], np.float32))
        assert found.reasons == dict.fromkeys((1, 2), "answers.foreign gave no score")
    for missing in (None, NAN, {"score": None}, {"score": NAN, "raw": 1}):
        assert np.isnan(score(answers(from_verl_omni, missing), IMAGES, EDITS).total).all()


@pytest.mark.parametrize(
    ("adapter", "answer", "message"),
    [
        (from_flow_grpo, ([1, 2, 3], {}), "expected scores as 4 numbers, one an image, got 3"),
        (from_flow_grpo, [1, 2, 3, 4], r"expected \(scores, info\), got \[1, 2, 3, 4\]"),
        (from_flow_grpo, (torch.zeros(4, 1), {}), r"expected scores as 4 numbers, got tensor\(\[\[0"),
        (
            from_flow_grpo,
            ({"avgs": [1, 2, 3, 4]}, {}),
            "expected 'avg' among its scores, got avgs; did you mean 'avgs'",
        ),
        (from_flow_grpo, ({"avg": [1] * 4, "ocr": [1]}, {}), "expected ocr as 4 numbers, one an image, got 1"),
        (from_flow_grpo_edit, ([1], {}), "expected scores as 4 numbers, one an image, got 1"),
        (from_trl, [1.0], "expected scores as 4 numbers, one an image, got 1"),
        (from_trl, 1.0, "expected scores as 4 numbers, got 1.0"),
        (from_trl, None, "expected scores as 4 numbers, got None"),
        (from_trl, ["1", "2", "3", "4"], r"expected scores as 4 numbers, got \['1'.*'1' is text"),
        (from_flow_factory, [1, 2, 3, 4], r"expected an answer with .rewards, got \[1, 2"),
        (from_flow_factory, RewardModelOutput([1.0]), "expected scores as 4 numbers, one an image, got 1"),
        (from_verl_omni, {"scores": 1}, "expected 'score' in its answer, got scores; did you mean 'scores'"),
        (from_verl_omni, {"score": [1, 2]}, r"expected scores as 1 numbers, got \[\[1, 2\]\]"),
    ],
)
def test_wrong_answers_name_the_function(adapter: Callable[..., Reward], answer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"answers.foreign: {message}"):
        score(answers(adapter, answer), IMAGES, EDITS)


def geneval(images, prompts, metadatas, only_strict):
    return [1.0] * len(images), {}


def test_functions_that_cannot_be_called_are_refused_at_once() -> None:
    with pytest.raises(
        ValueError, match=r"geneval: .* missing a required argument: 'only_strict'; bind other arguments"
    ):
        from_flow_grpo(geneval)
    assert score(from_flow_grpo(partial(geneval, only_strict=True)), IMAGES, PROMPTS).total.tolist() == [1] * 4
    adapters: Sequence[Callable[[Any], Reward]] = (from_flow_grpo, from_trl, from_flow_factory, from_verl_omni)
    for adapter in adapters:
        with pytest.raises(ValueError, match="expected a function, got str 'pickscore'"):
            adapter("pickscore")
    with pytest.raises(ValueError, match="images: expected one of float, uint8, got 'unit8'; did you mean 'uint8'"):
        from_flow_grpo(jpeg_size(), images="unit8")  # type: ignore[arg-type]


def test_an_error_of_a_function_is_its_own() -> None:
    def fails(prompts, completions):
        raise ConnectionError("no server")

    with pytest.raises(ConnectionError, match="no server"):
        score(from_trl(fails), IMAGES, PROMPTS)
