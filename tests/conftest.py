"""Where the tests find real models and peers' checkpoints, and what keeps them offline."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import torch  # behind the number of threads, which it reads

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, whose own functions are made for the one or the other then


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real models and texts: QUANTKIT_TEST_DATA, by default `shared` beside the checkout."""
    folder = Path(os.environ.get("QUANTKIT_TEST_DATA", Path(__file__).parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no test data at {folder}; set QUANTKIT_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def peers(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints that GPTQModel and llm-compressor really wrote, with the logits of the models they loaded."""
    archive = test_data / "peers" / "peers.tar.xz"
    if not archive.exists():
        pytest.skip(f"no peers' checkpoints at {archive}")
    folder = tmp_path_factory.mktemp("peers")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / "peers"


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is taken from the user's cache, nor left there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
