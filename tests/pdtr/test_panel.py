"""What gives a hacked reward away, by hand."""

import math
import re

import numpy as np
import pytest

from pdtr.panel import agreement, group_diversity, hacking_alarm, image_statistics, panel_metrics, source_distance

BLACK, WHITE, RED = (np.broadcast_to(np.array(c, np.uint8), (8, 8, 3)) for c in ((0,) * 3, (255,) * 3, (255, 0, 0)))
CHECKED = np.where(np.indices((8, 8)).sum(0)[..., None] % 2, 255, 0).astype(np.uint8).repeat(3, axis=2)


def test_statistics_of_plain_pictures() -> None:
    black, white, red = (image_statistics(image[None]) for image in (BLACK, WHITE, RED))
    assert [found["saturation"] for found in (black, white, red)] == [0, 0, pytest.approx(1)]
    assert [found["dark_share"] for found in (black, white, red)] == [1, 0, 0]
    assert [found["entropy"] for found in (black, white, red)] == [0, 0, 0]
    assert [found["edge_density"] for found in (black, white, red)] == [0, 0, 0]


def test_statistics_of_a_chequered_picture() -> None:
    """Two grey levels, each half: one bit. Every pixel but the lower right one has a neighbour of the other colour."""
    found = image_statistics(CHECKED[None])
    assert found["entropy"] == pytest.approx(1)
    assert found["edge_density"] == pytest.approx(63 / 64)
    assert found["dark_share"] == 0.5
    assert found["jpeg_bytes"] > image_statistics(WHITE[None])["jpeg_bytes"]


def test_statistics_are_means() -> None:
    both = image_statistics(np.stack([BLACK, RED]))
    assert both["saturation"] == pytest.approx(0.5)
    assert both["dark_share"] == 0.5


def test_diversity_within_groups_only() -> None:
    images = np.stack([BLACK, BLACK, BLACK, WHITE])
    assert group_diversity(images, 2) == pytest.approx(0.5)  # Groups of distance 0 and 1.
    assert group_diversity(images, 4) == pytest.approx(3 / 6)  # Three of six pairs.
    assert math.isnan(group_diversity(images, 1))


def test_an_untouched_source_is_at_distance_0() -> None:
    assert source_distance(np.stack([RED, CHECKED]), [RED, CHECKED]) == 0
    assert source_distance(np.stack([BLACK, BLACK]), [WHITE, BLACK]) == pytest.approx(0.5)


def test_names() -> None:
    images = np.stack([BLACK, WHITE])
    assert set(panel_metrics("t2i", images, 2, [])) == {
        f"image/{name}/t2i"
        for name in ("saturation", "edge_density", "entropy", "dark_share", "jpeg_bytes", "diversity")
    }
    assert panel_metrics("edit", images, 2, [WHITE, WHITE])["image/source_distance/edit"] == pytest.approx(0.5)


def test_agreement_is_of_ranks() -> None:
    values = np.array([0.0, 1.0, 2.0, np.nan])
    assert agreement(values, np.array([1.0, 10.0, 1000.0, 0.0])) == pytest.approx(1)
    assert agreement(values, -values) == pytest.approx(-1)
    assert math.isnan(agreement(values, np.ones(4)))
    assert math.isnan(agreement(values[2:], values[2:]))


def moment(iteration: int, trained: float, held_out: float) -> dict[str, object]:
    noise = np.random.default_rng(iteration).normal(0, 0.05, 100)
    return {"iteration": iteration, "trained": trained + noise, "reward": held_out + noise}


def test_the_alarm_goes_off_where_the_rewards_part() -> None:
    found = hacking_alarm([moment(0, 0.2, 0.3), moment(10, 0.5, 0.6), moment(20, 0.9, 0.4)])
    assert "since iteration 10 the trained reward rose by 0.4" in found
    assert "held-out one fell by 0.2" in found


def test_the_alarm_looks_back_to_the_start_too() -> None:
    """The trained reward has risen by the time that the held-out one is best, and stands while that one falls."""
    found = hacking_alarm([moment(0, 0.2, 0.5), moment(10, 0.6, 0.6), moment(20, 0.6, 0.1)])
    assert re.search(r"since iteration 0 the trained reward rose by 0\.38.* held-out one fell by 0\.41", found)
    # Whatever the trained reward did: a fall from the best alone, to no less than at the start, is none.
    assert hacking_alarm([moment(0, 0.2, 0.3), moment(10, 0.6, 0.6), moment(20, 0.6, 0.4)]) == ""


def test_what_is_weighed_by_name_sets_it_off_where_the_total_stands() -> None:
    """The stage weighs red five times as much as the total that is logged."""
    first, last = moment(0, 0.5, 0.6), moment(20, 0.5, 0.3)
    parts = {"judge": np.full(100, 0.6), "red": np.full(100, 0.1)}
    history = [{**first, "parts": parts}, {**last, "parts": {"judge": parts["judge"] - 0.1, "red": parts["red"] + 0.3}}]
    found = hacking_alarm(history)
    assert re.search(r"since iteration 0 the trained reward \(red\) rose by 0\.300 .* held-out one fell by 0\.", found)
    assert hacking_alarm([first, last]) == ""
    # One that is weighed since a later stage has nothing to be compared with.
    assert hacking_alarm([first, history[1]]) == ""


@pytest.mark.parametrize(
    "last",
    [
        moment(20, 0.9, 0.7),  # Both rise.
        moment(20, 0.4, 0.4),  # Both fall: no reward is hacked so.
        moment(20, 0.9, 0.6),  # The held-out one stands still within its noise.
        moment(20, 0.9, math.nan),
    ],
)
def test_no_alarm_where_they_do_not(last: dict[str, object]) -> None:
    assert hacking_alarm([moment(0, 0.2, 0.3), moment(10, 0.5, 0.6), last]) == ""


def test_no_alarm_from_nothing() -> None:
    assert hacking_alarm([]) == hacking_alarm([moment(0, 1, 1)]) == ""
    assert hacking_alarm([moment(0, 1, math.nan), moment(1, 2, math.nan)]) == ""
