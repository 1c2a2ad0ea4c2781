"""Tiny models to convert, calibration that costs nothing, and processes that can be killed without importing torch again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit.conversion.calibration import CalibrationOptions
from quantkit.conversion.options import ConvertOptions

TINY = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
SAME_BYTES_EXCEPT = ("README.md", "quantkit_report.json")


def save_tiny(folder: Path, *, family: str = "llama", dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB", **config: Any) -> Path:
    """A random model as transformers saves it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TINY | config), dtype=dtype).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Change the tensors of a model that lies in one file."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def edit_config(folder: Path, **values: Any) -> Path:
    """Change keys of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """All files that two equal conversions have in common to the byte."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in SAME_BYTES_EXCEPT}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A fresh random llama that a test may damage."""
    return save_tiny(tmp_path / "tiny")


@pytest.fixture(scope="session")
def stories(test_data: Path) -> Path:
    """A real model of 260,000 parameters, trained on stories."""
    return test_data / "data" / "stories260k-hf"


@pytest.fixture
def copied(stories: Path, tmp_path: Path) -> Path:
    """That model, to be damaged."""
    folder = tmp_path / "stories"
    shutil.copytree(stories, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    return folder


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration rows that need no tokenizer: 6 of 64 tokens."""
    path = tmp_path_factory.mktemp("tokens") / "rows.safetensors"
    save_file({"input_ids": torch.randint(3, 96, (6, 64), generator=torch.Generator().manual_seed(7))}, path)
    return path


@pytest.fixture(scope="session")
def options(tokens: Path) -> Callable[..., ConvertOptions]:
    """Options that convert in a second: 4 rows to calibrate on, one to measure on."""

    def build(recipe: str = "w4a16-gptq", **settings: Any) -> ConvertOptions:
        data = {name: settings.pop(name) for name in ("source", "num_samples", "seq_len", "seed", "layout") if name in settings}
        return ConvertOptions(recipe=recipe, calibration=CalibrationOptions(**{"source": str(tokens), "num_samples": 4} | data), **settings)

    return build


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: its exit code or minus the signal, seconds, what it printed, and by how many bytes its memory peaked over its start."""

    code: int
    seconds: float
    stdout: str
    stderr: str
    grown: int


class Launcher:
    """Runs command lines in processes forked from one that has imported everything and run nothing."""

    def __init__(self) -> None:
        settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        environment = os.environ | settings | {"MALLOC_MMAP_THRESHOLD_": "131072"}  # what is let go of is not kept by the allocator
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("launcher.py"))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self, *arguments: str | Path, after: float | None = None, once: Path | None = None, send: str = "SIGKILL") -> Ended:
        """Run `quantkit arguments`; send a signal after some seconds, or once a file is there."""
        assert self._process.stdin and self._process.stdout
        order = {"arguments": [str(a) for a in arguments], "after": after, "once": once and str(once), "send": send}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate("")


@pytest.fixture(scope="session")
def launch() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    launcher.close()
