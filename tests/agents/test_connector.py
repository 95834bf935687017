"""The connector: its size, its published names, what it does with queries, and its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from agents.policies.connector import Connector, ConnectorConfig

SMALL = ConnectorConfig(5, 24, 32, 48, 2, 4, 20, 12)


@pytest.fixture
def connector() -> Connector:
    torch.manual_seed(0)
    return Connector(SMALL).eval()


def test_the_published_size_is_what_the_facts_add_up_to() -> None:
    attention = 4 * (1536 * 1536 + 1536)
    mlp = 1536 * 8960 + 8960 + 8960 * 1536 + 1536
    norms = 2 * 2 * 1536
    encoder = 24 * (attention + mlp + norms)
    projectors = (3584 * 1536 + 1536) + (1536 * 2048 + 2048) + (1536 * 4096 + 4096)
    queries = 256 * 3584
    assert encoder == 887_642_112
    assert projectors + queries == 15_867_392
    with torch.device("meta"):
        published = Connector(ConnectorConfig())
    assert sum(parameter.numel() for parameter in published.parameters()) == encoder + projectors + queries
    assert encoder + projectors + queries == 903_509_504


def test_weights_have_the_published_names(connector: Connector) -> None:
    layer = {
        *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
        *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
    }
    modules = {"projector_1", "projector_2", "projector_3"}
    modules |= {f"connector.layers.{index}.{name}" for index in range(2) for name in layer}
    wanted = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")} | {"meta_queries"}
    assert set(connector.state_dict()) == wanted


def test_queries_and_layers_start_as_published() -> None:
    torch.manual_seed(0)
    wide = Connector(ConnectorConfig(200, 400, 64, 96, 1, 2, 8, 8))
    assert float(wide.meta_queries.detach().std()) == pytest.approx(400**-0.5, rel=0.02)
    layer = wide.connector.layers[0]
    bound = (6 / (64 + 96)) ** 0.5
    assert 0.95 * bound < float(layer.mlp.fc1.weight.detach().abs().max()) <= bound
    assert 0 < float(layer.mlp.fc1.bias.detach().abs().max()) < 1e-5
    assert not layer.self_attn.q_proj.bias.any()


def test_it_has_no_positions_no_mask_and_no_last_norm(connector: Connector) -> None:
    states = torch.randn(3, 5, 24)
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        embeds, pooled = connector(states)
        permuted, same = connector(states[:, order])
        changed, _ = connector(torch.cat([states[:, :4], states[:, 4:] + 1], 1))
    assert embeds.shape == (3, 5, 20)
    assert pooled.shape == (3, 12)
    assert torch.allclose(permuted, embeds[:, order], atol=1e-5)
    assert torch.allclose(same, pooled, atol=1e-5)
    assert (changed[:, 0] - embeds[:, 0]).abs().max() > 1e-4  # The first query sees the last one.


def test_pooled_is_a_projection_of_the_mean_over_queries(connector: Connector) -> None:
    with torch.no_grad():
        hidden = connector.connector(connector.projector_1(states := torch.randn(2, 5, 24))).last_hidden_state
        assert torch.allclose(connector(states)[1], connector.projector_2(hidden).mean(1), atol=1e-5)


def test_a_saved_folder_has_the_published_form_and_loads_alike(connector: Connector, tmp_path: Path) -> None:
    connector.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "StableDiffusion3Conditioner"
    assert config["connector_config"] == {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    loaded = Connector.load(tmp_path).eval()
    states = torch.randn(2, 5, 24)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(loaded(states), connector(states), strict=True))


def test_a_foreign_or_misfit_folder_is_named(connector: Connector, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a connector's folder"):
        Connector.load(tmp_path)
    connector.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_queries": 6}))
    with pytest.raises(ValueError, match="weights do not fit"):
        Connector.load(tmp_path)


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="num_attention_heads: expected a divisor of hidden_size 1536, got 7"):
        ConnectorConfig(num_attention_heads=7)
    with pytest.raises(ValueError, match="num_queries"):
        ConnectorConfig(num_queries=0)
