"""The pixel rewards by hand."""

import io

import numpy as np
import pytest
from PIL import Image

from rewards.base import Images, Prompt
from rewards.checker import check_reward
from rewards.pixel import jpeg_compressibility, jpeg_incompressibility, redness

REWARDS = [jpeg_compressibility, jpeg_incompressibility, redness]


def pictures() -> Images:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    ramp = np.broadcast_to(np.arange(0, 256, 16, dtype=np.uint8)[:, None, None], (16, 16, 3))
    return np.stack([np.zeros((16, 16, 3), np.uint8), ramp, noise])


@pytest.mark.parametrize(
    ("color", "expected"),
    [
        ((255, 0, 0), 1.0),
        ((0, 255, 255), -1.0),
        ((0, 255, 0), -0.5),
        ((120, 120, 120), 0.0),
        ((102, 51, 0), (102 - 25.5) / 255),
    ],
)
def test_redness_of_one_color(color: tuple[int, int, int], expected: float) -> None:
    images = np.broadcast_to(np.array(color, np.uint8), (2, 4, 5, 3))
    np.testing.assert_allclose(redness(images, [Prompt("")] * 2), [expected] * 2, atol=1e-7)


def test_redness_is_a_mean_over_pixels() -> None:
    image = np.zeros((1, 2, 2, 3), np.uint8)
    image[0, 0, 0] = (255, 0, 0)
    assert redness(image, [Prompt("")]) == pytest.approx([0.25])


def test_jpeg_size_in_thousands_of_bytes() -> None:
    images = pictures()
    sizes = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=95)
        sizes.append(len(file.getvalue()) / 1000)
    found = jpeg_incompressibility(images, [Prompt("")] * 3)
    np.testing.assert_allclose(found, sizes, rtol=1e-6)
    # Headers and tables alone are some 0.6 kB, to which a plain picture adds nearly nothing.
    assert 0.5 < found[0] < 0.7
    assert found[0] < found[1] < found[2] - 0.1
    np.testing.assert_array_equal(jpeg_compressibility(images, [Prompt("")] * 3), -found)


@pytest.mark.parametrize("reward", REWARDS)
def test_contract(reward: object) -> None:
    check_reward(reward, pictures(), [Prompt(str(i)) for i in range(3)])  # type: ignore[arg-type]
