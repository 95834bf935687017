import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from agents.algorithms.diffusion_nft import DiffusionNFT
from agents.algorithms.flow_grpo import FlowGRPO
from experiments.recipes import DEFAULT, find_recipe, recipes, summary
from pdtr.curriculum import StageCurriculum
from pdtr.stages import Stage

ORDER_STUDY = ("edit_then_t2i", "t2i_then_edit", "joint", "edit_only", "t2i_only")
EXPECTED = {"pdtr_scenes", "smoke", "flow_grpo_scenes", "pdtr_scenes_judge", *ORDER_STUDY}


def stages_of(name: str) -> tuple[Stage, ...]:
    curriculum = find_recipe(name)().curriculum
    assert isinstance(curriculum, StageCurriculum)
    return curriculum.as_stages()


def test_the_recipes_are_the_public_functions() -> None:
    assert set(recipes()) >= EXPECTED
    assert DEFAULT in recipes()
    assert all(not name.startswith("_") for name in recipes())


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_each_recipe_describes_itself_and_has_a_folder_of_its_own(name: str) -> None:
    assert summary(find_recipe(name)).endswith(".")
    assert find_recipe(name)().output_dir.name == name


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_recipe_gives_a_new_configuration_at_each_call(name: str) -> None:
    assert find_recipe(name)().curriculum is not find_recipe(name)().curriculum


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_every_stage_fills_whole_chunks(name: str) -> None:
    config = find_recipe(name)()
    for stage in stages_of(name):
        for share in stage.shares(0).values():
            samples = config.num_prompts * share * config.group_size
            assert samples % config.chunk_size == 0, f"{name}, stage {stage.name}: {samples} samples"


def test_names_may_be_written_with_hyphens() -> None:
    assert find_recipe("pdtr-scenes") is find_recipe("pdtr_scenes")


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="got 'smokey'; did you mean 'smoke'"):
        find_recipe("smokey")


def test_pdtr_is_editing_and_then_text_to_image() -> None:
    assert [dict(stage.mixture) for stage in stages_of("pdtr_scenes")[:1]] == [{"edit": 1.0}]
    assert max(stages_of("pdtr_scenes")[1].mixture.items(), key=lambda item: item[1])[0] == "t2i"
    assert isinstance(find_recipe("pdtr_scenes")().algorithm, DiffusionNFT)
    assert isinstance(find_recipe("flow_grpo_scenes")().algorithm, FlowGRPO)


def test_the_arms_of_the_order_study_differ_in_their_curriculum_alone() -> None:
    first = find_recipe(ORDER_STUDY[0])()
    for name in ORDER_STUDY[1:]:
        config = find_recipe(name)()
        assert replace(config, output_dir=first.output_dir, curriculum=first.curriculum) == first
        assert config.curriculum != first.curriculum


def test_the_stages_of_every_arm_differ_in_name_and_mixture_alone() -> None:
    first = stages_of(ORDER_STUDY[0])
    for name in ORDER_STUDY[1:]:
        same = [
            replace(stage, name=model.name, mixture=model.mixture)
            for stage, model in zip(stages_of(name), first, strict=True)
        ]
        assert same == list(first), name


def test_the_arms_of_the_order_study_practise_what_they_are_called() -> None:
    mixtures = {name: [set(stage.mixture) for stage in stages_of(name)] for name in ORDER_STUDY}
    assert mixtures == {
        "edit_then_t2i": [{"edit"}, {"t2i"}],
        "t2i_then_edit": [{"t2i"}, {"edit"}],
        "joint": [{"edit", "t2i"}, {"edit", "t2i"}],
        "edit_only": [{"edit"}, {"edit"}],
        "t2i_only": [{"t2i"}, {"t2i"}],
    }


def test_listing_the_recipes_does_not_load_torch(root: Path) -> None:
    program = "import sys; from experiments.recipes import recipes; print(len(recipes()), 'torch' in sys.modules)"
    finished = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert finished.stdout.split() == [str(len(recipes())), "False"]
