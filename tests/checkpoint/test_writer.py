"""The writer: the safetensors library and transformers' index are its oracles, SIGKILL and a full disk its enemies."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from quantkit.checkpoint.reader import CheckpointReader
from quantkit.checkpoint.safetensors_header import DTYPES
from quantkit.checkpoint.writer import CheckpointWriter, TensorPlan, require_space
from quantkit.errors import OutputError

_BIG = 1 << 40
_ROOT = Path(__file__).parents[2]


def _plan(tensors: dict[str, Tensor]) -> list[TensorPlan]:
    return [TensorPlan(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def _write(folder: Path, tensors: dict[str, Tensor], max_shard_size: int = _BIG) -> CheckpointWriter:
    folder.mkdir(exist_ok=True)
    writer = CheckpointWriter(folder, _plan(tensors), max_shard_size=max_shard_size)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    return writer


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _floats(count: int = 6) -> dict[str, Tensor]:
    return {f"layers.{i}.weight": torch.randn(5, i + 1) for i in range(count)}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_library_loads_every_type_that_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (3, 16), dtype=torch.uint8)
    _write(tmp_path, {"byte": torch.tensor(7, dtype=torch.uint8), "x": raw.view(dtype)})
    found = load_file(tmp_path / "model.safetensors")["x"]
    assert found.dtype == dtype and torch.equal(found.view(torch.uint8), raw)


def test_library_loads_odd_shapes_and_strides(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    tensors = {
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "transposed": base.T,
        "sliced": base[:, ::2],
        "expanded": base[:1].expand(3, 6),
    }
    _write(tmp_path, tensors)
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], tensor) and found[name].shape == tensor.shape for name, tensor in tensors.items())


def test_every_tensor_is_aligned_to_its_type(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(3, dtype=torch.int8),
        "b": torch.zeros(1, dtype=torch.float16),
        "c": torch.zeros(2),
        "d": torch.zeros(1, dtype=torch.int64),
    }
    _write(tmp_path, tensors)
    reader = CheckpointReader(tmp_path)
    assert all(reader.info(name).offset % tensor.itemsize == 0 for name, tensor in tensors.items())


def test_order_of_adding_does_not_show(tmp_path: Path) -> None:
    tensors = _floats()
    _write(tmp_path / "a", tensors, 100)
    (tmp_path / "b").mkdir()
    writer = CheckpointWriter(tmp_path / "b", _plan(tensors), max_shard_size=100)
    for i, name in enumerate(reversed(tensors)):
        writer.add(name, tensors[name])
        if i == 2:
            writer.sync()
    writer.close()
    assert _contents(tmp_path / "a") == _contents(tmp_path / "b")


def test_shards_are_named_and_filled_as_hugging_face_does(tmp_path: Path) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    tensors = {**_floats(), "giant": torch.randn(100, 3), "last": torch.randn(2)}
    writer = _write(tmp_path, tensors, max_shard_size=200)
    expected = split_torch_state_dict_into_shards(tensors, max_shard_size=200)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == expected.tensor_to_filename
    assert index["metadata"]["total_size"] == expected.metadata["total_size"]
    assert [path.name for path in writer.files] == sorted(expected.filename_to_tensors)
    assert sum(path.stat().st_size for path in writer.files) == writer.total_bytes
    assert torch.equal(CheckpointReader(tmp_path).get("giant"), tensors["giant"])


def test_one_shard_has_no_index_and_says_its_format(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, [TensorPlan("x", torch.float32, (1,))], max_shard_size=8, metadata={"origin": "here"})
    writer.add("x", torch.ones(1))
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", framework="pt") as handle:
        assert handle.metadata() == {"format": "pt", "origin": "here"}


def test_a_shard_has_its_full_size_from_its_first_tensor_on(tmp_path: Path) -> None:
    tensors = _floats()
    writer = CheckpointWriter(tmp_path, _plan(tensors), max_shard_size=_BIG)
    assert list(tmp_path.iterdir()) == []
    with writer:
        writer.add("layers.3.weight", tensors["layers.3.weight"])
    assert (tmp_path / "model.safetensors").stat().st_size == writer.total_bytes


def test_what_is_not_planned_is_a_fault_of_ours(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, [TensorPlan("x", torch.float32, (2,))], max_shard_size=8) as writer:
        with pytest.raises(AssertionError):
            writer.add("x", torch.ones(3))
        with pytest.raises(AssertionError):
            writer.add("x", torch.ones(2, dtype=torch.float16))
        with pytest.raises(AssertionError, match="never written"):
            writer.close()


def test_resumed_writer_keeps_what_is_done(tmp_path: Path) -> None:
    tensors = _floats()
    _write(tmp_path / "whole", tensors, 100)
    (tmp_path / "resumed").mkdir()
    names = list(tensors)
    with CheckpointWriter(tmp_path / "resumed", _plan(tensors), max_shard_size=100) as writer:
        for name in names[:3]:
            writer.add(name, tensors[name])
        writer.sync()
        writer.add(names[3], torch.zeros_like(tensors[names[3]]))
    writer = CheckpointWriter(tmp_path / "resumed", _plan(tensors), max_shard_size=100)
    writer.mark_done(names[:3])
    for name in names[3:]:
        writer.add(name, tensors[name])
    writer.close()
    assert _contents(tmp_path / "resumed") == _contents(tmp_path / "whole")


@pytest.mark.parametrize("fault", ["gone", "header", "size"])
def test_done_tensors_need_the_shard_they_were_written_to(tmp_path: Path, fault: str) -> None:
    tensors = _floats()
    _write(tmp_path, tensors)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    path.unlink() if fault == "gone" else path.write_bytes(content + b"x" if fault == "size" else content.replace(b"F32", b"I32", 1))
    with pytest.raises(OutputError, match="--fresh"):
        CheckpointWriter(tmp_path, _plan(tensors), max_shard_size=_BIG).mark_done(["layers.0.weight"])


def test_file_that_a_killed_run_only_created_is_begun_anew(tmp_path: Path) -> None:
    tensors = _floats()
    _write(tmp_path / "whole", tensors)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "model.safetensors").write_bytes(b"\0" * 1000)
    _write(tmp_path / "killed", tensors)
    assert _contents(tmp_path / "killed") == _contents(tmp_path / "whole")


_RUNS = """
    import os, signal, sys
    from pathlib import Path
    import torch
    from quantkit.checkpoint.ledger import Ledger
    from quantkit.checkpoint.writer import CheckpointWriter, TensorPlan

    def run(folder, die_at):
        plan = [TensorPlan(f"blocks.{b}.{i}", torch.float32, (64, 64)) for b in range(8) for i in range(3)]
        writer = CheckpointWriter(folder, plan, max_shard_size=100_000)
        ledger = Ledger.open(folder, {"plan": 1})
        writer.mark_done([name for unit in ledger.units for name in ledger.entry(unit)["names"]])
        steps = 0
        for b in range(8):
            if ledger.is_done(f"block {b}"):
                continue
            names = [f"blocks.{b}.{i}" for i in range(3)]
            for i, name in enumerate(names):
                steps += 1
                if steps == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                writer.add(name, torch.randn(64, 64, generator=torch.Generator().manual_seed(b * 3 + i)))
            writer.sync()
            ledger.record(f"block {b}", {"names": names})
        writer.close()

    folder = Path(sys.argv[1])
    for die_at in map(int, sys.argv[2:]):
        child = os.fork()
        if child == 0:
            run(folder, die_at)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        done = len(Ledger.open(folder, {"plan": 1}).units)
        print(os.waitstatus_to_exitcode(status), done)
"""


def test_killed_and_resumed_run_writes_the_bytes_of_an_unhurt_one(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()

    def run(folder: Path, *die_at: int) -> list[str]:
        command = [sys.executable, "-c", textwrap.dedent(_RUNS), str(folder), *map(str, die_at)]
        return subprocess.run(command, cwd=_ROOT, check=True, capture_output=True, text=True).stdout.splitlines()

    assert run(whole, -1) == ["0 8"]
    assert run(killed, 1, 8, 11, -1) == ["-9 0", "-9 2", "-9 5", "0 8"]
    assert _contents(killed) == _contents(whole)


@pytest.mark.parametrize(("code", "advice"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "read-only"), (errno.EACCES, "may not write")])
def test_refusing_disk_is_named_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, advice: str) -> None:
    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pwrite", refuse)
    with (
        CheckpointWriter(tmp_path, [TensorPlan("x", torch.float32, (1,))], max_shard_size=8) as writer,
        pytest.raises(OutputError, match=f"{tmp_path}/model.safetensors.*{advice}"),
    ):
        writer.add("x", torch.ones(1))


def test_file_over_the_limit_of_the_system_is_an_output_error(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = CheckpointWriter(tmp_path, [TensorPlan("x", torch.float32, (100_000,))], max_shard_size=_BIG)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with writer, pytest.raises(OutputError, match="smaller shards"):
            writer.add("x", torch.ones(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_folder_that_is_not_there_is_an_output_error(tmp_path: Path) -> None:
    with (
        CheckpointWriter(tmp_path / "gone", [TensorPlan("x", torch.float32, (1,))], max_shard_size=8) as writer,
        pytest.raises(OutputError, match="gone"),
    ):
        writer.add("x", torch.ones(1))


def test_too_little_space_is_refused_before_the_work(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(OutputError, match=r"needs 1152921504\.61 GB .* free"):
        require_space(tmp_path / "not" / "yet", 1 << 60)


_COPY = """
    import re, sys
    from pathlib import Path
    import torch
    from quantkit.checkpoint.reader import CheckpointReader
    from quantkit.checkpoint.writer import CheckpointWriter, TensorPlan

    def private_kb():
        text = Path("/proc/self/status").read_text()
        return sum(int(re.search(key + r":\\s+(\\d+)", text)[1]) for key in ("RssAnon", "RssShmem"))

    source, target = map(Path, sys.argv[1:])
    plan = [TensorPlan(f"t{i}", torch.float32, (2048, 2048)) for i in range(16)]
    peak = 0
    torch.ones(1).numpy()
    before = private_kb()
    for folder, reader in ((source, None), (target, source)):
        reader = reader and CheckpointReader(reader)
        writer = CheckpointWriter(folder, plan, max_shard_size=100_000_000)
        for i, tensor in enumerate(plan):
            writer.add(tensor.name, reader.get(tensor.name) if reader else torch.full(tensor.shape, float(i)))
            peak = max(peak, private_kb())
        writer.close()
    print(peak - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")
def test_copying_a_checkpoint_holds_two_tensors_at_most(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    command = [sys.executable, "-c", textwrap.dedent(_COPY), str(tmp_path / "a"), str(tmp_path / "b")]
    # glibc raises its own threshold after the first large free and then keeps such blocks in its heap: slack of malloc, not of ours
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    growth = int(subprocess.run(command, cwd=_ROOT, check=True, capture_output=True, text=True, env=environment).stdout)
    assert growth < 48 * 1024, f"{growth} KiB more for tensors of 16 MiB"
    assert torch.equal(CheckpointReader(tmp_path / "b").get("t15"), torch.full((2048, 2048), 15.0))
    assert sum(path.stat().st_size for path in (tmp_path / "b").glob("*.safetensors")) > 256 << 20
