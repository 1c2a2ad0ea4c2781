"""What a calibrated conversion holds after a block, it holds after every later one: nothing grows with the depth of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.bench.process import run
from quantkit.bench.random_checkpoint import write_random_checkpoint

LAYERS, BLOCK_BYTES = 6, 3_145_728 * 4
CODE = """
import json, sys
from pathlib import Path
from quantkit.conversion.calibration import CalibrationOptions
from quantkit.conversion.convert import Silent, convert
from quantkit.conversion.options import ConvertOptions

class Watching(Silent):
    def __init__(self):
        self.held = []

    def block(self, index, results, *, resumed):
        lines = Path("/proc/self/status").read_text().splitlines()
        self.held.append(1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")))

listener = Watching()
convert(sys.argv[1], sys.argv[2], ConvertOptions(calibration=CalibrationOptions(num_samples=8, seq_len=64)), listener)
print(json.dumps(listener.held))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's own account of a process")
def test_memory_does_not_grow_from_block_to_block(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "model", layers=LAYERS, hidden=512, intermediate=1536)

    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path / "model"), str(tmp_path / "out")], capture_output=True, text=True, check=True)

    held = json.loads(done.stdout)
    assert len(held) == LAYERS
    assert max(held[1:]) - held[0] < BLOCK_BYTES / 2


TURN = """
import sys, torch
from quantkit.core.hadamard import Hadamard
from quantkit.core.products import fast_products
from quantkit.models.rotation import Fold

torch.set_num_threads(1)
embedding, gain = torch.ones(65536, 1024, dtype=torch.bfloat16), torch.ones(1024)
fold = Fold(inputs=Hadamard(1024), gain="norm")
with fast_products():
    turned = fold.applied(embedding, gain, torch.bfloat16) if sys.argv[1] == "turned" else embedding.clone()
print(turned.shape)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's own account of a process")
def test_a_rotated_embedding_takes_little_beside_itself_and_the_original() -> None:
    turned, copied = (run([sys.executable, "-c", TURN, way]).peak_private for way in ("turned", "copied"))

    assert turned - copied < 0.75 * 65536 * 1024 * 2
