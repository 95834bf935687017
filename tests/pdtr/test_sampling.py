"""How a saved policy is found, checked and drawn from."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from agents.policies.scenes import ScenesPolicy, ScenesPolicyConfig
from agents.samplers import ODE
from pdtr.sampling import evaluation_sampler, load_policy, unknown_words

SIZES: dict[str, Any] = {"latent_channels": 8, "width": 32, "num_layers": 1, "num_heads": 2}
OF_RUN = ODE(num_inference_steps=5, guidance_scale=1.5, shift=2.0)
DEFAULT = ScenesPolicyConfig(())
OF_CLASS = ODE(DEFAULT.num_inference_steps, DEFAULT.guidance_scale, shift=DEFAULT.sigma_shift)


def tiny(**changes: Any) -> ScenesPolicy:
    return ScenesPolicy(ScenesPolicyConfig(("a", "circle", "red"), **{**SIZES, **changes}))


def write(folder: Path, content: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def run_config(sampler: Mapping[str, Any]) -> dict[str, Any]:
    return {"recipe": "r", "config": {"evaluation": {"sampler": {"class": "ODE", **sampler}}}}


@pytest.mark.parametrize("path", ["run", "run/policy"])
def test_a_run_s_policy_is_drawn_as_the_run_was_evaluated(path: str, tmp_path: Path) -> None:
    write(tmp_path / "run", run_config(asdict(OF_RUN)))
    write(tmp_path / "run/policy", {"num_inference_steps": 3, "guidance_scale": 9.0, "sigma_shift": 7.0})
    assert evaluation_sampler(tmp_path / path) == OF_RUN


def test_the_policy_of_a_run_is_known_from_within_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "run", run_config(asdict(OF_RUN)))
    monkeypatch.chdir(write(tmp_path / "run/policy", {}))
    assert evaluation_sampler(Path(".")) == OF_RUN


def test_a_policy_without_a_run_says_itself_how_it_is_drawn(tmp_path: Path) -> None:
    folder = write(tmp_path / "own", {"num_inference_steps": 3, "guidance_scale": 9.0, "sigma_shift": 7.0})
    assert evaluation_sampler(folder) == ODE(num_inference_steps=3, guidance_scale=9.0, shift=7.0)


def test_what_a_policy_does_not_say_is_its_class_s_default(tmp_path: Path) -> None:
    assert evaluation_sampler(write(tmp_path / "silent", {"vocabulary": ["a"]})) == OF_CLASS
    half = evaluation_sampler(write(tmp_path / "half", {"num_inference_steps": 3}))
    assert half == ODE(3, OF_CLASS.guidance_scale, shift=OF_CLASS.shift)


@pytest.mark.parametrize(
    "foreign", [{"config": {}}, {"config": 3}, {"config": {"evaluation": None}}, run_config({"shift": 2.0}), {}]
)
def test_a_foreign_configuration_falls_back_to_the_policy(foreign: object, tmp_path: Path) -> None:
    assert evaluation_sampler(write(tmp_path / "foreign", foreign)) == OF_CLASS
    write(tmp_path / "run", foreign)
    write(tmp_path / "run/policy", {"num_inference_steps": 3})
    assert evaluation_sampler(tmp_path / "run").num_inference_steps == 3


def test_changes_come_last_and_none_changes_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "own", {"num_inference_steps": 3, "guidance_scale": 9.0, "sigma_shift": 7.0})
    found = evaluation_sampler(folder, guidance_scale=None, num_inference_steps=4, shift=1.5)
    assert found == ODE(num_inference_steps=4, guidance_scale=9.0, shift=1.5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "expected a JSON object, got list"),
        ("{", "expected JSON, got a damaged file"),
        ("\x00\xff", "expected JSON, got a damaged file"),
        ('{"sigma_shift": "four"}', "expected numbers as the sampler's settings"),
        ('{"sigma_shift": -1}', "shift: expected a positive number"),
    ],
)
def test_a_damaged_configuration_is_a_mistake(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        evaluation_sampler(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 64},  # The weights have other shapes.
        {"num_heads": 0},  # No such network.
        {"vocabulary": 5},
        {"colour": "red"},  # No such field.
    ],
)
def test_a_policy_that_does_not_fit_its_configuration_is_a_mistake(changes: dict[str, Any], tmp_path: Path) -> None:
    tiny().save(tmp_path)
    assert load_policy(tmp_path).config == tiny().config
    write(tmp_path, {**json.loads((tmp_path / "config.json").read_text()), **changes})
    with pytest.raises(ValueError, match="expected a policy, got a damaged or a foreign one"):
        load_policy(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A red circle.", []),
        ("a RED-circle", []),
        ("a purple circle, purple", ["purple", ","]),
        ("a red's circle", ["s"]),
        ("a café", ["caf"]),
        ("a круг !", ["круг"]),
        ("", []),
    ],
)
def test_unknown_words_are_those_that_the_encoder_does_not_know(text: str, expected: list[str]) -> None:
    policy = tiny()
    assert unknown_words(policy, text) == expected
    if text.isascii():
        indices = policy.words.encoder.tokenize([text], 20)
        assert (1 in indices) == bool(expected)
