"""SD3's operations as torch counts them: what is known of them by hand."""

from __future__ import annotations

import pytest

from agents.policies.sd3 import sd35_medium_config
from experiments.benchmarks.sd3_flops import TEXT_TOKENS, Passes, count_passes


def passes(num_layers: int, image_size: int = 64, num_references: int = 0) -> Passes:
    """Of SD3.5-Medium's width, with so many layers and no second attention."""
    sizes = {**sd35_medium_config(), "num_layers": num_layers, "dual_attention_layers": ()}
    return count_passes(sizes, image_size, num_references)


def test_a_layer_costs_what_it_costs_by_hand() -> None:
    """Projections and MLP of image and text, modulations of both, attention over both; a product and a sum are two."""
    width, image = 1536, (64 // 16) ** 2
    tokens = image + TEXT_TOKENS
    linear = tokens * (4 + 8) * width**2 + 2 * 6 * width**2
    attention = 2 * tokens**2 * width
    assert passes(3).forward - passes(2).forward == 2 * (linear + attention)


def test_a_reference_is_as_many_tokens_again() -> None:
    width, image = 1536, (64 // 16) ** 2
    more = [passes(n, num_references=1).forward - passes(n).forward for n in (2, 3)]
    before, after = image + TEXT_TOKENS, 2 * image + TEXT_TOKENS
    assert more[1] - more[0] == 2 * (image * 12 * width**2 + 2 * (after**2 - before**2) * width)


def test_backward_passes_cost_twice_a_forward_pass() -> None:
    found = passes(4)
    assert found.update_full == pytest.approx(3 * found.forward, rel=0.05)
    assert 1.5 * found.forward < found.update_lora < 2.3 * found.forward
    assert found.recomputed == found.forward
