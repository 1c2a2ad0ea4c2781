"""The reader against what the safetensors library writes, and against damaged, unsafe and half-written folders."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit.checkpoint.reader import CheckpointReader
from quantkit.checkpoint.safetensors_header import DTYPES, build_header, read_header
from quantkit.errors import CheckpointError, SourceError


def _raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.dim() else _raw(tensor.reshape(1))


def _random(dtype: torch.dtype, rows: int = 3) -> Tensor:
    high = 2 if dtype == torch.bool else 256
    return torch.randint(0, high, (rows, 16), dtype=torch.uint8).view(dtype)


def _save(folder: Path, tensors: dict[str, Tensor], name: str = "model.safetensors", **metadata: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file(tensors, folder / name, metadata=metadata or None)
    return folder / name


def _save_sharded(folder: Path) -> dict[str, Tensor]:
    tensors = {f"layers.{i}.weight": torch.randn(4, 5) for i in range(3)}
    for i, (name, tensor) in enumerate(tensors.items(), 1):
        _save(folder, {name: tensor}, f"model-{i:05d}-of-00003.safetensors")
    weight_map = {name: f"model-{i:05d}-of-00003.safetensors" for i, name in enumerate(tensors, 1)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


def _write_raw(path: Path, fields: object, num_data_bytes: int) -> None:
    text = json.dumps(fields).encode() if not isinstance(fields, bytes) else fields
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(num_data_bytes))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_every_type_reads_as_the_library_wrote_it(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = _random(dtype)
    _save(tmp_path, {"x": tensor, "odd": torch.zeros(3, dtype=torch.uint8)})
    found = CheckpointReader(tmp_path).get("x")
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    assert _raw(found) == _raw(tensor)


@pytest.mark.parametrize("tensor", [torch.tensor(2.5), torch.zeros(0, 3), torch.ones(1, 1, 1, 7)], ids=["scalar", "empty", "four dimensions"])
def test_odd_shapes_read_as_the_library_wrote_them(tmp_path: Path, tensor: Tensor) -> None:
    _save(tmp_path, {"x": tensor})
    found = CheckpointReader(tmp_path).get("x")
    assert found.shape == tensor.shape and torch.equal(found, tensor)


def test_names_follow_the_bytes_of_the_file(tmp_path: Path) -> None:
    path = _save(tmp_path, {"a": torch.zeros(2, dtype=torch.uint8), "b": torch.zeros(2), "c": torch.zeros(2, dtype=torch.float16)})
    reader = CheckpointReader(tmp_path)
    assert reader.names == [t.name for t in sorted(read_header(path).tensors, key=lambda t: t.offset)] == ["b", "c", "a"]
    assert len(reader) == 3 and "a" in reader and "d" not in reader
    assert reader.total_bytes == sum(file.stat().st_size for file in reader.files) > 8 + 4 + 2


def test_sharded_checkpoint_reads_as_a_whole(tmp_path: Path) -> None:
    tensors = _save_sharded(tmp_path)
    reader = CheckpointReader(tmp_path)
    assert reader.names == list(tensors)
    assert all(torch.equal(reader.get(name), tensor) for name, tensor in tensors.items())


def test_shards_without_an_index_read_as_a_whole(tmp_path: Path) -> None:
    tensors = _save_sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert CheckpointReader(tmp_path).names == list(tensors)


def test_a_tensor_is_memory_of_its_own(tmp_path: Path) -> None:
    path = _save(tmp_path, {"x": torch.ones(4)})
    reader = CheckpointReader(tmp_path)
    reader.get("x").zero_()
    assert torch.equal(reader.get("x"), torch.ones(4)) and torch.equal(load_file(path)["x"], torch.ones(4))


def test_metadata_and_config_are_told(tmp_path: Path) -> None:
    _save(tmp_path, {"x": torch.ones(1)}, format="pt", origin="here")
    reader = CheckpointReader(tmp_path)
    assert reader.metadata == {"format": "pt", "origin": "here"}
    assert reader.config == {"model_type": "llama"} and reader.quantization_config is None


@pytest.mark.parametrize(
    "config", [{"quantization_config": {"bits": 4}}, {"text_config": {"quantization_config": {"bits": 4}}}], ids=["top", "nested"]
)
def test_quantization_config_is_found_in_config_json(tmp_path: Path, config: dict[str, object]) -> None:
    _save(tmp_path, {"x": torch.ones(1)})
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert CheckpointReader(tmp_path).quantization_config == {"bits": 4}


def test_quantization_config_is_found_in_a_file_of_its_own(tmp_path: Path) -> None:
    _save(tmp_path, {"x": torch.ones(1)})
    (tmp_path / "quantize_config.json").write_text('{"bits": 3}')
    assert CheckpointReader(tmp_path).quantization_config == {"bits": 3}


@pytest.mark.parametrize("content", [None, "{", "[1]"], ids=["absent", "cut off", "not an object"])
def test_unusable_config_names_its_folder(tmp_path: Path, content: str | None) -> None:
    _save(tmp_path, {"x": torch.ones(1)})
    (tmp_path / "config.json").unlink() if content is None else (tmp_path / "config.json").write_text(content)
    with pytest.raises(SourceError, match=str(tmp_path)):
        _ = CheckpointReader(tmp_path).config


@pytest.mark.parametrize("keep", [0, 5, 40, -4, -1], ids=lambda keep: f"keep {keep}")
def test_truncated_file_is_named_with_both_sizes(tmp_path: Path, keep: int) -> None:
    path = _save(tmp_path, {"x": torch.ones(64), "y": torch.ones(64)})
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    with pytest.raises(CheckpointError, match="truncated") as caught:
        CheckpointReader(tmp_path)
    assert str(path) in str(caught.value) and f"found {len(whole[:keep])}" in str(caught.value)
    assert keep >= 0 or f"expected {len(whole)} bytes" in str(caught.value)


def test_file_that_shrinks_after_opening_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = _save(tmp_path, {"x": torch.ones(1000)})
    reader = CheckpointReader(tmp_path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="became shorter"):
        reader.get("x")


_F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("fields", "num_data_bytes", "message"),
    [
        ({"x": _F32}, 9, "belong to no tensor"),
        ({"x": _F32, "y": _F32}, 8, "overlaps"),
        ({"x": _F32, "y": {**_F32, "data_offsets": [4, 12]}}, 12, "overlaps"),
        ({"x": _F32, "y": {**_F32, "data_offsets": [12, 20]}}, 20, "gap"),
        ({"x": {**_F32, "dtype": "F6_E2M3"}}, 8, "unknown type 'F6_E2M3'"),
        ({"x": {**_F32, "dtype": ["F32"]}}, 8, "unknown type"),
        ({"x": {**_F32, "shape": [3]}}, 8, "cannot fill"),
        ({"x": {**_F32, "shape": [-2]}}, 8, "impossible"),
        ({"x": {**_F32, "shape": [2.0]}}, 8, "impossible"),
        ({"x": {**_F32, "shape": [0, 1 << 40, 1 << 40], "data_offsets": [0, 0]}}, 0, "impossible"),
        ({"x": {**_F32, "data_offsets": [8, 0]}}, 8, "cannot fill"),
        ({"x": {**_F32, "data_offsets": [0, 8, 8]}}, 8, "impossible"),
        ({"x": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, 1, "cannot fill"),
        ({"x": {"dtype": "F32"}}, 8, "lacks"),
        ({"x": None}, 8, "lacks"),
        ({"__metadata__": {"a": 1}, "x": _F32}, 8, "metadata"),
        ([1], 0, "not a JSON object"),
        (b"{", 0, "not valid JSON"),
        (b"\xff\xfe{}", 0, "not valid JSON"),
        (b"[" * 100_000, 0, "not valid JSON"),
        (b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4, "occurs twice"),
    ],
)
def test_header_that_contradicts_itself_is_refused(tmp_path: Path, fields: object, num_data_bytes: int, message: str) -> None:
    path = tmp_path / "model.safetensors"
    _write_raw(path, fields, num_data_bytes)
    with pytest.raises(CheckpointError, match=message) as caught:
        CheckpointReader(tmp_path)
    assert str(path) in str(caught.value)


def test_file_of_another_kind_is_refused_without_reading_a_header_of_its_length(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"PK\x03\x04" + b"x" * 100)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        CheckpointReader(tmp_path)


def test_git_lfs_pointer_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("with_index", [True, False], ids=["index", "numbers"])
def test_absent_shard_is_named(tmp_path: Path, with_index: bool) -> None:
    _save_sharded(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    if not with_index:
        (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors"):
        CheckpointReader(tmp_path)


def test_tensor_absent_from_its_shard_is_named(tmp_path: Path) -> None:
    _save_sharded(tmp_path)
    save_file({"another": torch.ones(1)}, tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"'layers\.1\.weight' \(model-00002"):
        CheckpointReader(tmp_path)


def test_index_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    _save(tmp_path, {"x": torch.ones(1)}, "outside.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../outside.safetensors"}}')
    with pytest.raises(CheckpointError, match="outside of its folder"):
        CheckpointReader(folder)


def test_tensor_in_two_files_without_an_index_is_refused(tmp_path: Path) -> None:
    _save(tmp_path, {"x": torch.ones(1)}, "a.safetensors")
    _save(tmp_path, {"x": torch.zeros(1)}, "b.safetensors")
    with pytest.raises(CheckpointError, match=r"'x' is both in .*a\.safetensors and in .*b\.safetensors"):
        CheckpointReader(tmp_path)


class _Trap:
    """A pickle of this creates a file when it is loaded."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.witness,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_pickle_is_refused_and_never_opened(tmp_path: Path, name: str) -> None:
    witness = tmp_path / "code was run"
    (tmp_path / name).write_bytes(pickle.dumps(_Trap(witness)))
    with pytest.raises(CheckpointError, match="save_pretrained") as caught:
        CheckpointReader(tmp_path)
    assert str(tmp_path / name) in str(caught.value) and not witness.exists()
    pickle.loads((tmp_path / name).read_bytes())
    assert witness.exists(), "the trap works, so its silence above means something"


def test_pickle_beside_safetensors_is_left_alone(tmp_path: Path) -> None:
    witness = tmp_path / "code was run"
    _save(tmp_path, {"x": torch.ones(1)})
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap(witness)))
    assert CheckpointReader(tmp_path).names == ["x"] and not witness.exists()


def test_folder_without_weights_lists_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(SourceError, match=r"notes\.txt"):
        CheckpointReader(tmp_path)
    with pytest.raises(SourceError, match="not a folder"):
        CheckpointReader(tmp_path / "notes.txt")


def test_half_written_output_is_refused(tmp_path: Path) -> None:
    _save(tmp_path, {"x": torch.ones(1)})
    (tmp_path / "ledger.json").write_text("{}")
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="unfinished"):
        CheckpointReader(tmp_path)


def test_unknown_tensor_is_answered_with_near_names(tmp_path: Path) -> None:
    _save(tmp_path, {"model.norm.weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"did you mean 'model\.norm\.weight'"):
        CheckpointReader(tmp_path).get("model.norms.weight")


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    path = _save(tmp_path / "a", {"x": torch.zeros(500_000)})
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    original = CheckpointReader(tmp_path / "a").fingerprint()
    assert CheckpointReader(tmp_path / "b").fingerprint() == original

    content = bytearray(path.read_bytes())
    content[1_000_000:1_040_000] = b"\1" * 40_000
    path.write_bytes(content)
    assert CheckpointReader(tmp_path / "a").fingerprint() != original

    (tmp_path / "b" / "config.json").write_text('{"model_type": "qwen2"}')
    assert CheckpointReader(tmp_path / "b").fingerprint() != original


def test_header_is_read_as_it_was_built(tmp_path: Path) -> None:
    tensors = [("a", torch.float32, (2, 3)), ("pairs", torch.float4_e2m1fn_x2, (2, 4)), ("ü", torch.int8, ())]
    text = build_header(tensors, {"k": "v"})
    assert len(text) % 8 == 0
    (tmp_path / "x.safetensors").write_bytes(text + bytes(24 + 8 + 1))
    header = read_header(tmp_path / "x.safetensors")
    assert [(t.name, t.dtype, t.shape) for t in header.tensors] == tensors
    assert header.metadata == {"k": "v"} and header.data_start == len(text)
