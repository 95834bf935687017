"""Published models by path and by name, from a cache of the hub as huggingface_hub lays it out, and from a server."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from torch import Tensor

from agents.policies.backbone import BackboneSettings
from agents.policies.connector import ConnectorConfig
from agents.policies.loading import load_backbone, pipeline_name, saved_settings
from agents.policies.metaquery import MetaQueryPolicy
from agents.policies.metaquery_parts import LANGUAGE_MODEL, MetaQueryPipeline, MetaQueryTraits
from agents.policies.metaquery_vae import load_vae, save_codec
from agents.policies.query_reader import Reading
from agents.policies.scenes_parts import PatchCodec
from agents.policies.sd3 import SD3Policy
from agents.policies.tiny.sd3 import make_tiny_sd3
from agents.samplers import ODE
from tests.agents.backbone_checks import draw, prompts_for
from tests.agents.tiny_metaquery import make_metaquery

SETTINGS = BackboneSettings(height=64, width=64, dtype="float32", max_sequence_length=16)
KONTEXT, METAQUERY = "Skywork/UniPic2-SD3.5M-Kontext-2B", "Skywork/UniPic2-Metaquery-9B"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
Publish = Callable[[str, Path], None]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models: ``metaquery`` and ``kontext`` as UniPic 2.0 published its own, and what MetaQuery was made of."""
    root = tmp_path_factory.mktemp("models")
    policy, metaquery = make_metaquery(root, SETTINGS), root / "metaquery"
    for name in ("transformer", "vae", "scheduler", "conditioner"):
        shutil.copytree(policy / name, metaquery / name)
    shutil.copytree(make_tiny_sd3(root / "plain"), root / "kontext")
    (root / "kontext" / "model_index.json").unlink()
    for folder in (metaquery, root / "kontext"):
        rewrite(folder / "transformer" / "config.json", _class_name="SD3Transformer2DKontextModel")
    return root


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Put a folder into the hub's cache under a name; nothing but the cache is asked."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def published(name: str, folder: Path) -> None:
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, repository / "snapshots" / COMMIT)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)

    return published


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def both_tasks(policy: Any) -> Tensor:
    sampler = ODE(2, 3.0, shift=None)
    return torch.cat([draw(policy, prompts_for(policy, num_sources), sampler) for num_sources in (0, 1)])


# By what a folder or a repository holds


def test_metaquery_as_published_loads_by_path_and_by_name(root: Path, publish: Publish) -> None:
    """No index and no language model: the connector tells what it is, and Qwen2.5-VL comes from its own repository."""
    publish(LANGUAGE_MODEL, root / "qwen")
    publish(METAQUERY, root / "metaquery")
    whole = both_tasks(load_backbone(root / "policy", SETTINGS))
    for source in (root / "metaquery", METAQUERY, Path(METAQUERY)):
        policy = load_backbone(source, SETTINGS)
        assert isinstance(policy, MetaQueryPolicy)
        assert policy.pipeline.traits == MetaQueryTraits()
        assert torch.equal(both_tasks(policy), whole)


@pytest.mark.parametrize("has_connector", [True, False])
def test_a_connector_makes_it_metaquery_whatever_pipeline_an_index_names(
    root: Path, has_connector: bool, publish: Publish, tmp_path: Path
) -> None:
    shutil.copytree(root / "metaquery", tmp_path / "model")
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "StableDiffusion3KontextPipeline"}')
    if not has_connector:
        shutil.rmtree(tmp_path / "model" / "conditioner")
    publish(METAQUERY, tmp_path / "model")
    expected = "UniPic2MetaQueryPipeline" if has_connector else "StableDiffusion3KontextPipeline"
    assert pipeline_name(tmp_path / "model") == pipeline_name(METAQUERY) == expected


def test_a_saved_policy_by_name_has_its_own_language_model_and_traits(
    root: Path, publish: Publish, tmp_path: Path
) -> None:
    policy = load_backbone(root / "policy", SETTINGS)
    policy.pipeline.traits = MetaQueryTraits(Reading(positions="mrope"))
    policy = MetaQueryPolicy(policy.pipeline, SETTINGS)
    policy.save(tmp_path / "saved")
    publish("someone/metaquery", tmp_path / "saved")
    loaded = load_backbone("someone/metaquery", SETTINGS)
    assert loaded.pipeline.traits == policy.pipeline.traits
    assert torch.equal(both_tasks(loaded), both_tasks(policy))


@pytest.mark.parametrize("name", ["kontext", "plain"])
def test_kontext_without_an_index_loads_by_name(name: str, root: Path, publish: Publish) -> None:
    publish(KONTEXT, root / name)
    policy = load_backbone(KONTEXT, SETTINGS)
    assert isinstance(policy, SD3Policy)
    assert torch.equal(both_tasks(policy), both_tasks(load_backbone(root / "plain", SETTINGS)))


def test_a_policy_is_put_together_from_names(root: Path, publish: Publish) -> None:
    publish("stabilityai/stable-diffusion-3.5-medium", root / "sd3")
    publish(LANGUAGE_MODEL, root / "qwen")
    sizes = ConnectorConfig(6, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    found = []
    names = Path("stabilityai/stable-diffusion-3.5-medium"), Path(LANGUAGE_MODEL)
    for generator, lmm in (names, (root / "sd3", root / "qwen")):
        torch.manual_seed(0)
        pipeline = MetaQueryPipeline.from_parts(generator, lmm, sizes, settings=SETTINGS)
        found.append(both_tasks(MetaQueryPolicy(pipeline, SETTINGS)))
    assert torch.equal(*found)


def test_the_embedded_worlds_codec_loads_by_name(publish: Publish, tmp_path: Path) -> None:
    codec = PatchCodec(8, 12)
    codec.mean += 0.5
    save_codec(codec, tmp_path / "model" / "vae")
    publish("someone/scenes", tmp_path / "model")
    loaded = load_vae("someone/scenes", torch.bfloat16)
    assert isinstance(loaded, PatchCodec)
    assert loaded.state_dict().keys() == codec.state_dict().keys()
    assert all(torch.equal(tensor, codec.state_dict()[name]) for name, tensor in loaded.state_dict().items())


# From a hub that answers


@pytest.fixture
def hub(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A server that has the models of ``root`` as the hub has repositories; -> the files that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            owner, name, _, _, file = self.path.lstrip("/").split("/", 4)
            path = root / name / file
            asked.append(f"{owner}/{name}/{file}")
            if path.is_file():
                headers = {"ETag": f'"{file}"', "Content-Length": str(path.stat().st_size)}
            else:
                headers = {
                    "X-Error-Code": "EntryNotFound" if path.parents[file.count("/")].is_dir() else "RepoNotFound"
                }
            self.send_response(200 if path.is_file() else 404)
            for key, value in {"X-Repo-Commit": COMMIT, **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET" and path.is_file():
                self.wfile.write(path.read_bytes())

        do_GET = do_HEAD

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    constants = {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": False,
    }
    for name, value in constants.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    yield asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("metaquery", "UniPic2MetaQueryPipeline"),
        ("kontext", "StableDiffusion3KontextPipeline"),
        ("plain", "StableDiffusion3Pipeline"),
        ("policy", "UniPic2MetaQueryPipeline"),
    ],
)
def test_the_kind_is_found_by_a_few_small_files(
    name: str, expected: str, hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pipeline_name(f"someone/{name}") == expected
    small = ("model_index.json", "transformer/config.json", "conditioner/config.json")
    assert set(hub) <= {f"someone/{name}/{file}" for file in small}
    # Once more without the hub: what it answered, "no such file" too, is in the cache.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert pipeline_name(f"someone/{name}") == expected


def test_a_policy_of_ours_has_its_settings_from_the_hub_too(
    root: Path, hub: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert saved_settings("someone/policy") == saved_settings(root / "policy") == SETTINGS
    assert saved_settings("someone/metaquery") is None
    with pytest.raises(ValueError, match=r"^someone/nothing: expected a folder or a repository of the hub, got none"):
        saved_settings("someone/nothing")
    # Once more without the hub.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert saved_settings("someone/policy") == SETTINGS
    assert saved_settings("someone/metaquery") is None
    assert caplog.messages == []
    # Of one whose settings were never asked for nobody can say.
    assert saved_settings("someone/kontext") is None
    assert "someone/kontext: its own pdtr_settings.json, if it has one, is not in the hub's cache" in caplog.text


def test_a_repository_that_is_not_there_is_one_line(hub: list[str]) -> None:
    with pytest.raises(
        ValueError, match=r"^someone/nothing: expected .* or a repository of the hub, got neither"
    ) as caught:
        load_backbone("someone/nothing", SETTINGS)
    assert "\n" not in str(caught.value)
    assert hub == ["someone/nothing/model_index.json"]


# Mistakes


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ((), r"expected a folder .* or a repository of the hub, got neither \(no transformer/config.json"),
        (("transformer", "conditioner"), "expected transformer/, vae/, scheduler/, got none that load"),
        (("transformer", "vae", "scheduler", "conditioner"), f"{LANGUAGE_MODEL}: expected a Qwen2.5-VL .* as lmm/"),
    ],
)
def test_what_is_missing_is_one_line(
    parts: tuple[str, ...], said: str, root: Path, publish: Publish, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for part in parts:
        shutil.copytree(root / "metaquery" / part, model / part)
    publish(METAQUERY, model)
    for source in (model, METAQUERY):
        with pytest.raises(ValueError, match=f"^{re.escape(str(source))}: .*{said}") as caught:
            load_backbone(source, SETTINGS)
        assert "\n" not in str(caught.value)


def test_a_connector_without_weights_is_named(root: Path, publish: Publish, tmp_path: Path) -> None:
    shutil.copytree(root / "metaquery", tmp_path / "model")
    next((tmp_path / "model" / "conditioner").glob("*.safetensors")).unlink()
    publish(LANGUAGE_MODEL, root / "qwen")
    publish(METAQUERY, tmp_path / "model")
    for source in (tmp_path / "model", METAQUERY):
        with pytest.raises(ValueError, match="expected a connector in conditioner/, got none") as caught:
            load_backbone(source, SETTINGS)
        assert "\n" not in str(caught.value)
