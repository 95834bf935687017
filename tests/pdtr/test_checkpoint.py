"""Checkpoints: bit for bit back, every damage found, and whole under kills and full disks."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdtr import checkpoint
from pdtr.checkpoint import (
    CheckpointError,
    checkpoint_name,
    checkpoints,
    clean_up,
    latest,
    load_state,
    optimizer_state,
    prune,
    restore_optimizer,
    save_state,
)

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
    torch.complex64, torch.bool,
]  # fmt: skip
FILES = ["tensors.safetensors", "meta.json", "manifest.json"]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Any bit pattern, NaNs and infinities among them; booleans stay booleans."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    return (raw[..., 0] > 127) if dtype == torch.bool else raw.view(dtype)[..., 0].clone()


def write(run: Path, step: int) -> Path:
    folder = run / checkpoint_name(step)
    save_state(folder, {"weight": torch.full((40,), float(step)), "step": torch.tensor(step)}, {"step": step})
    return folder


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=4), st.integers(0, 2**31)), max_size=8
    ),
    st.dictionaries(st.text(), st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists)),
)
def test_tensors_and_meta_come_back_bit_for_bit(tmp_path_factory, entries, meta) -> None:
    folder = tmp_path_factory.mktemp("run") / checkpoint_name(1)
    tensors = {f"t.{i}": random_tensor(dtype, tuple(shape), seed) for i, (dtype, shape, seed) in enumerate(entries)}
    save_state(folder, tensors, meta)
    state = load_state(folder)
    assert_same(state.tensors, tensors)
    assert state.meta == meta


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3)])
def test_every_dtype_and_shape(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensors = {"x": random_tensor(dtype, shape, 3)}
    save_state(tmp_path / "x", tensors, {})
    assert_same(load_state(tmp_path / "x").tensors, tensors)


def test_floats_of_meta_come_back_exactly(tmp_path: Path) -> None:
    meta = {"values": [0.1, 1e-320, 1 / 3, 2.0**70, -0.0]}
    save_state(tmp_path / "x", {}, meta)
    assert [value.hex() for value in load_state(tmp_path / "x").meta["values"]] == [v.hex() for v in meta["values"]]


def test_views_shared_memory_and_gradients(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "base": base,
        "same": base,
        "transposed": base.T,
        "row": base[1],
        "rest": base[2:],
        "wide": base[:1].expand(5, 6),
        "leaf": torch.nn.Parameter(torch.ones(3)),
        "last": torch.ones(1, 2, 3, 4).to(memory_format=torch.channels_last),
    }
    save_state(tmp_path / "x", tensors, {})
    assert_same(load_state(tmp_path / "x").tensors, {name: tensor.detach() for name, tensor in tensors.items()})


@pytest.mark.parametrize("meta", [{1: 2}, {"a": (1, 2)}, {"a": float("nan")}, {"a": {1, 2}}, {"a": [float("inf")]}])
def test_meta_that_would_not_read_back_is_refused(tmp_path: Path, meta: dict) -> None:
    with pytest.raises(ValueError, match="meta:"):
        save_state(tmp_path / "x", {}, meta)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tensor", [torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.complex128)])
def test_a_tensor_that_cannot_be_written_is_named(tmp_path: Path, tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="tensor 'odd': expected a dense tensor"):
        save_state(tmp_path / "x", {"odd": tensor}, {})
    assert list(tmp_path.iterdir()) == []


def assert_offers(folder: Path, previous: Path | None, problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem) as caught:
        load_state(folder)
    assert str(folder) in str(caught.value)
    assert caught.value.previous == previous
    assert str(previous) in str(caught.value) if previous else "no whole checkpoint before it" in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_a_flip_of_any_byte_is_found(tmp_path: Path, name: str) -> None:
    previous, folder = write(tmp_path, 1), write(tmp_path, 2)
    original = (folder / name).read_bytes()
    for position in range(len(original)):
        for mask in (0x01, 0x20, 0x80):
            damaged = bytearray(original)
            damaged[position] ^= mask
            (folder / name).write_bytes(damaged)
            with pytest.raises(CheckpointError) as caught:
                load_state(folder)
            assert caught.value.previous == previous
    (folder / name).write_bytes(original)
    assert load_state(folder).meta == {"step": 2}


@pytest.mark.parametrize("name", FILES)
def test_a_truncation_anywhere_is_found(tmp_path: Path, name: str) -> None:
    previous, folder = write(tmp_path, 1), write(tmp_path, 2)
    original = (folder / name).read_bytes()
    for length in range(len(original)):
        (folder / name).write_bytes(original[:length])
        assert_offers(folder, previous, name)
    (folder / name).write_bytes(original + b" ")
    assert_offers(folder, previous, name)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    previous, folder = write(tmp_path, 1), write(tmp_path, 2)
    (folder / name).unlink()
    assert_offers(folder, previous, name)
    (folder / name).mkdir()
    assert_offers(folder, previous, name)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[]", "foreign format"),
        ('{"format": "other"}', "foreign format"),
        ('{"format": "pdtr-checkpoint", "version": 2}', "expected version 1 of the format, got 2"),
        ('{"format": "pdtr-checkpoint", "version": 1}', "is damaged"),
        ('{"format": "pdtr-checkpoint", "version": 1, "files": []}', "is damaged"),
        ('{"format": "pdtr-checkpoint", "version": 1, "files": {"meta.json": 3}}', "is damaged"),
        ("{", "cannot be read"),
    ],
)
def test_a_wrong_manifest_is_named(tmp_path: Path, text: str, problem: str) -> None:
    folder = write(tmp_path, 2)
    (folder / "manifest.json").write_text(text)
    assert_offers(folder, None, problem)


def test_files_of_another_checkpoint_are_found(tmp_path: Path) -> None:
    previous, folder = write(tmp_path, 1), write(tmp_path, 2)
    shutil.copy(previous / "tensors.safetensors", folder)
    assert_offers(folder, previous, "SHA-256")


def test_the_newest_whole_checkpoint_before_is_offered(tmp_path: Path) -> None:
    folders = [write(tmp_path, step) for step in (1, 2, 3, 4)]
    for folder in folders[1:3]:
        (folder / "meta.json").write_text("{}")
    assert_offers(folders[2], folders[0], "meta.json is truncated or was changed: expected 14 bytes, got 2")
    assert_offers(folders[1], folders[0], "meta.json")
    (folders[0] / "meta.json").write_text("{}")
    assert_offers(folders[2], None, "meta.json")


def test_folders_that_are_no_checkpoints(tmp_path: Path) -> None:
    last = [write(tmp_path / "run", step) for step in (1, 2)][-1]
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "model.safetensors").write_bytes(b"x")
    assert_offers(tmp_path / "foreign", None, "manifest.json is missing")
    assert_offers(tmp_path / "nowhere", None, "there is no such folder")
    assert_offers(tmp_path / "run", last, r"manifest.json is missing.*it is a folder of checkpoints")
    assert_offers(tmp_path / "run" / checkpoint_name(9), last, "there is no such folder")
    assert_offers(tmp_path / "run" / "step-2", last, "there is no such folder")


def test_a_foreign_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not a checkpoint, and is not overwritten"):
        save_state(tmp_path / "thesis", {}, {})
    assert (tmp_path / "thesis" / "text.tex").read_text() == "years of work"


def test_a_checkpoint_is_replaced_even_if_damaged(tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    (folder / "manifest.json").unlink()
    assert write(tmp_path, 3) == folder
    assert load_state(folder).meta == {"step": 3}
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_checkpoints_are_ordered_by_step(tmp_path: Path) -> None:
    assert checkpoints(tmp_path / "nowhere") == []
    assert latest(tmp_path) is None
    folders = [write(tmp_path, step) for step in (0, 999_999, 1_000_000, 120)]
    (tmp_path / "step-5").mkdir()
    (tmp_path / "step-000007").write_text("a file")
    (tmp_path / ".writing-step-000009").mkdir()
    assert checkpoints(tmp_path) == [folders[0], folders[3], folders[1], folders[2]]
    assert latest(tmp_path) == folders[2]
    assert folders[3].name == "step-000120"
    with pytest.raises(ValueError, match="step: expected at least 0, got -1"):
        checkpoint_name(-1)


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    folders = [write(tmp_path, step) for step in range(5)]
    assert prune(tmp_path, 2) == folders[:3]
    assert sorted(tmp_path.iterdir()) == folders[3:]
    assert prune(tmp_path, 2) == []
    with pytest.raises(ValueError, match="keep: expected at least 1, got 0"):
        prune(tmp_path, 0)


def test_what_a_kill_left_behind_is_cleaned(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    folder.rename(tmp_path / ".replaced-step-000001")
    shutil.copytree(tmp_path / ".replaced-step-000001", tmp_path / ".writing-step-000001")
    assert latest(tmp_path) is None
    clean_up(tmp_path)
    assert list(tmp_path.iterdir()) == [folder]
    assert load_state(folder).meta == {"step": 1}
    shutil.copytree(folder, tmp_path / ".replaced-step-000001")
    write(tmp_path, 2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000001", "step-000002"]
    clean_up(tmp_path / "nowhere")


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from pdtr.checkpoint import checkpoint_name, clean_up, latest, load_state, prune, save_state

def tensors(step):
    return {f"layer.{i}": torch.full((20_000,), float(step * 10 + i)) for i in range(10)}

def write_for_ever(run, started):
    clean_up(run)
    newest = latest(run)
    step = 0 if newest is None else load_state(newest).meta["step"]
    while True:
        # Every other checkpoint is written twice, so that replacing one is killed too.
        step += random.random() < 0.5
        save_state(run / checkpoint_name(step), tensors(step), {"step": step})
        os.write(started, b".")
        prune(run, 2)

run, kills, leftovers, last = Path(sys.argv[1]), int(sys.argv[2]), 0, 0
save_state(run / checkpoint_name(0), tensors(0), {"step": 0})
begun = time.perf_counter()
save_state(run / checkpoint_name(1), tensors(1), {"step": 1})
duration = time.perf_counter() - begun
random.seed(0)
for kill in range(kills):
    seed = random.random()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        random.seed(seed)
        write_for_ever(run, writer)
    os.read(reader, 1)
    time.sleep(3 * duration * seed)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    os.close(reader), os.close(writer)
    leftovers += any(path.name.startswith(".") for path in run.iterdir())
    found = load_state(latest(run))
    step = found.meta["step"]
    # One step may be lost: that of a checkpoint killed while it was being replaced; clean_up puts it back.
    assert step >= last - 1, (step, last)
    clean_up(run)
    found = load_state(latest(run))
    step = found.meta["step"]
    assert step >= last, (step, last)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors(step).items())
    last = step
print(kills, leftovers, last)
"""


def test_the_latest_checkpoint_is_whole_after_every_kill(tmp_path: Path, root: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), "25"]
    finished = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    kills, leftovers, last = map(int, finished.stdout.split())
    assert kills == 25
    assert leftovers >= 5, "the kills have to hit the middle of writing"
    assert last > 5


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("fails_at", range(6))
def test_a_full_disk_leaves_the_previous_checkpoint_untouched(tmp_path: Path, monkeypatch, number, fails_at) -> None:
    """The disk is full at the nth flush: of either file, the manifest, the folder."""
    previous = write(tmp_path, 1)
    before = {path.name: path.read_bytes() for path in previous.iterdir()}
    real, calls = os.fsync, []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == fails_at + 1:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if fails_at < 4:
        with pytest.raises(CheckpointError, match="the disk is full") as caught:
            write(tmp_path, 2)
        # There is no failed checkpoint to delete: what is there is the one to go on from.
        assert "delete" not in str(caught.value)
        assert "free some space and resume: the run goes on from step-000001" in str(caught.value)
        assert caught.value.previous == previous
        assert [path.name for path in tmp_path.iterdir()] == [previous.name]
    assert {path.name: path.read_bytes() for path in previous.iterdir()} == before
    assert load_state(previous).meta == {"step": 1}


def test_a_full_disk_under_safetensors_is_told_as_such(tmp_path: Path, monkeypatch) -> None:
    from safetensors import SafetensorError

    def fail(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(CheckpointError, match=r"the disk is full.* goes on from the beginning, for there is no check"):
        write(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_another_failure_is_passed_on_and_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="broken disk"):
        write(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).to(dtype)


def adamw(module: torch.nn.Module, **options) -> torch.optim.Optimizer:
    layers = [module[0].parameters(), module[2].parameters()]
    groups = [{"params": list(layers[0]), "lr": 1e-2}, {"params": list(layers[1]), "weight_decay": 0.3}]
    return torch.optim.AdamW(groups, lr=3e-3, betas=(0.8, 0.95), **options)


MAKE = {
    "adamw": adamw,
    "adamw_tensor_lr": lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(3e-3), foreach=False),
    "adamw_amsgrad": lambda m: adamw(m, amsgrad=True),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "sgd_momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.1),
}


def train(module: torch.nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator, steps: int) -> None:
    dtype = next(module.parameters()).dtype
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.randn(4, 5, generator=generator).to(dtype)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("stop", [0, 1, 5])
def test_a_resumed_optimiser_equals_one_that_never_stopped(tmp_path: Path, name: str, dtype, stop: int) -> None:
    whole = model(dtype)
    whole_optimizer, generator = MAKE[name](whole), torch.Generator().manual_seed(1)
    train(whole, whole_optimizer, generator, stop)
    optimizer_tensors, meta = optimizer_state(whole_optimizer)
    tensors = {f"optimizer.{key}": value for key, value in optimizer_tensors.items()}
    tensors |= {f"model.{key}": value for key, value in whole.state_dict().items()}
    save_state(tmp_path / checkpoint_name(stop), {**tensors, "generator": generator.get_state()}, meta)
    train(whole, whole_optimizer, generator, 6)

    state = load_state(tmp_path / checkpoint_name(stop))
    resumed = model(dtype)
    torch.nn.init.zeros_(resumed[0].weight)
    resumed_optimizer, resumed_generator = MAKE[name](resumed), torch.Generator().manual_seed(99)
    resumed.load_state_dict({k.removeprefix("model."): v for k, v in state.tensors.items() if k.startswith("model.")})
    of_optimizer = {k.removeprefix("optimizer."): v for k, v in state.tensors.items() if k.startswith("optimizer.")}
    before = {key: value.clone() for key, value in of_optimizer.items()}
    restore_optimizer(resumed_optimizer, of_optimizer, state.meta)
    resumed_generator.set_state(state.tensors["generator"])
    train(resumed, resumed_optimizer, resumed_generator, 6)

    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))
    assert_same(optimizer_state(resumed_optimizer)[0], optimizer_state(whole_optimizer)[0])
    assert optimizer_state(resumed_optimizer)[1] == optimizer_state(whole_optimizer)[1]
    assert_same(of_optimizer, before)


def test_hyper_parameters_come_back() -> None:
    first, second = adamw(model()), torch.optim.AdamW(model().parameters())
    first.param_groups[0]["lr"] = 0.123
    tensors, meta = optimizer_state(first)
    again = adamw(model())
    restore_optimizer(again, tensors, json.loads(json.dumps(meta)))
    assert again.param_groups[0]["lr"] == 0.123
    assert again.param_groups[1]["betas"] == (0.8, 0.95)
    with pytest.raises(ValueError, match="expected shapes"):
        restore_optimizer(second, tensors, meta)


def test_state_of_another_dtype_than_the_parameter_is_kept() -> None:
    module = model(torch.bfloat16)
    optimizer = adamw(module)
    train(module, optimizer, torch.Generator().manual_seed(0), 1)
    parameter = module[0].weight
    optimizer.state[parameter]["exp_avg"] = torch.full(parameter.shape, 1 / 3, dtype=torch.float32)
    other = model(torch.bfloat16)
    restored = adamw(other)
    restore_optimizer(restored, *optimizer_state(optimizer))
    assert_same(
        {"exp_avg": restored.state[other[0].weight]["exp_avg"]}, {"exp_avg": optimizer.state[parameter]["exp_avg"]}
    )


def test_a_mismatched_optimiser_is_named() -> None:
    module = model()
    optimizer = adamw(module)
    train(module, optimizer, torch.Generator().manual_seed(0), 1)
    tensors, meta = optimizer_state(optimizer)
    with pytest.raises(ValueError, match="expected optimizer SGD, got AdamW"):
        restore_optimizer(torch.optim.SGD(module.parameters(), lr=0.1), tensors, meta)
    with pytest.raises(ValueError, match=r"expected shapes \[\[\[3, 7\], \[3\]\]\]"):
        restore_optimizer(torch.optim.AdamW(module[2].parameters()), tensors, meta)
    tensors.pop("state.1.exp_avg")
    with pytest.raises(ValueError, match=r"expected a tensor 'state\.1\.exp_avg'"):
        restore_optimizer(adamw(module), tensors, meta)


def test_the_manifest_is_written_last(tmp_path: Path, monkeypatch) -> None:
    written: list[str] = []
    real = checkpoint._flush
    monkeypatch.setattr(checkpoint, "_flush", lambda path: (written.append(path.name), real(path)))
    folder = write(tmp_path, 1)
    assert written == [*FILES, f".writing-{folder.name}", tmp_path.name]
