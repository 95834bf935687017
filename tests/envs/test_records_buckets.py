import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.data.buckets import (
    FACTOR,
    RATIOS,
    ProgressiveResolution,
    bucket_size,
    crop_box,
    cropped,
    fix_longer_edge,
    fix_pixels,
    nearest_ratio,
)

SIDES = st.integers(1, 5000)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (256, [(256, 256), (224, 288), (288, 224), (224, 320), (320, 224), (192, 352), (352, 192)]),
        (512, [(512, 512), (448, 576), (576, 448), (416, 640), (640, 416), (384, 672), (672, 384)]),
        (1024, [(1024, 1024), (896, 1184), (1184, 896), (832, 1248), (1248, 832), (768, 1376), (1376, 768)]),
    ],
)
def test_buckets_by_hand(size: int, expected: list[tuple[int, int]]) -> None:
    assert [bucket_size(ratio, size) for ratio in RATIOS] == expected


@pytest.mark.parametrize(
    ("size", "pixels", "expected"),
    [
        ((512, 512), 512, (512, 512)),
        ((384, 512), 512, (448, 608)),  # r = 1.1547: 443.4 and 591.2 pixels.
        ((1024, 1024), 512, (512, 512)),
        ((700, 700), 512, (512, 512)),  # Not 544, whatever the rounding of 512 / 700.
        ((1080, 1920), 512, (384, 704)),  # r = .35556: 384 and 682.7.
        ((3, 3000), 512, (32, 16192)),  # r = 5.397: 16.2 and 16190.5.
    ],
)
def test_fixed_pixels_by_hand(size: tuple[int, int], pixels: int, expected: tuple[int, int]) -> None:
    assert fix_pixels(size, pixels) == expected


@pytest.mark.parametrize(
    ("size", "edge", "expected"),
    [
        ((384, 512), 512, (384, 512)),
        ((1080, 1920), 512, (288, 512)),
        ((1920, 1080), 1024, (1024, 576)),
        ((1000, 1500), 512, (352, 512)),  # 341.3 is 10.67 times 32.
        ((3, 3000), 512, (32, 512)),
    ],
)
def test_fixed_longer_edges_by_hand(size: tuple[int, int], edge: int, expected: tuple[int, int]) -> None:
    assert fix_longer_edge(size, edge) == expected


@given(SIDES, SIDES)
def test_sizes_are_multiples_and_the_nearest_ratio_is_the_nearest(height: int, width: int) -> None:
    for size in (fix_pixels((height, width)), fix_longer_edge((height, width))):
        assert all(side % FACTOR == 0 and side > 0 for side in size)
    pixels = fix_pixels((height, width))
    assert pixels[0] * pixels[1] >= 512 * 512 * (1 - 1e-6)
    chosen = RATIOS[nearest_ratio((height, width))]
    distances = [abs(math.log(w / h * height / width)) for w, h in RATIOS]
    assert abs(math.log(chosen[0] / chosen[1] * height / width)) == min(distances)
    transposed = RATIOS[nearest_ratio((width, height))]
    assert transposed == chosen[::-1]


@given(SIDES, SIDES, st.sampled_from(RATIOS), st.sampled_from([256, 512, 1024]))
def test_crops_are_centred_whole_in_one_direction_and_of_the_buckets_shape(
    height: int, width: int, ratio: tuple[int, int], size: int
) -> None:
    into = bucket_size(ratio, size)
    left, top, right, bottom = crop_box((height, width), into)
    assert left + right == pytest.approx(1)
    assert top + bottom == pytest.approx(1)
    assert max(right - left, bottom - top) == pytest.approx(1)
    assert (right - left) * width / ((bottom - top) * height) == pytest.approx(into[1] / into[0])


def test_a_crop_keeps_the_middle_and_a_resize_the_gradient() -> None:
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (100, 200, 3)).copy()
    found = cropped(ramp, crop_box((100, 200), (100, 100)), (100, 100))
    np.testing.assert_array_equal(found, ramp[:, 50:150])
    half = cropped(ramp, crop_box((100, 200), (50, 50)), (50, 50))
    assert abs(half[25, :, 0].astype(float) - (50.5 + 2 * np.arange(50))).max() <= 1
    assert cropped(ramp, (0.0, 0.0, 1.0, 1.0), (100, 200)) is ramp


def test_the_schedule_is_a_step_function_of_the_batch() -> None:
    resolution = ProgressiveResolution((256, 512, 1024), (0, 10, 30), (64, 16, 4))
    assert [resolution.size(batch) for batch in (0, 9, 10, 29, 30, 10**9)] == [256, 256, 512, 512, 1024, 1024]
    assert [resolution.batch_size(batch, 7) for batch in (0, 10, 30)] == [64, 16, 4]
    assert ProgressiveResolution().batch_size(5, 7) == 7


@pytest.mark.parametrize(
    "fields",
    [((), ()), ((512,), (0, 5)), ((16,), (0,)), ((256, 512), (1, 5)), ((256, 512), (0, 0)), ((256,), (0,), (1, 2))],
)
def test_a_schedule_that_is_none_is_refused(fields: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="resolution"):
        ProgressiveResolution(*fields)
