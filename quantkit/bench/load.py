"""What loading a model takes: the most private memory at any moment, against what the model and its cache hold in the end."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quantkit.bench.llama_cpp_peer import LlamaCpp, write_gguf
from quantkit.bench.process import Usage, run
from quantkit.bench.random_checkpoint import write_random_checkpoint
from quantkit.checkpoint.reader import CheckpointReader

KV_BYTES = 64 << 20
_IMPORTS = "import quantkit.runtime.llm; from transformers import LlamaForCausalLM"
_LOAD = (
    f"{_IMPORTS}; import sys; source, mode, at_load = sys.argv[1:]\n"
    f"quantkit.runtime.llm.LLM(source, kv_cache_memory={KV_BYTES}, mode=mode, quantization=at_load or None)"
)


@dataclass(frozen=True, slots=True)
class Case:
    """A random model, converted by `recipe` first or quantized at load; what is `packed` is a conversion of as many bits."""

    name: str
    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    at_load: str | None = None
    mode: str = "fast"
    container: str = "compressed-tensors"


@dataclass(frozen=True, slots=True)
class Size:
    layers: int = 10
    hidden: int = 2048
    intermediate: int = 5632


INT8 = (".*=w8a16-channel",)
CASES = (
    Case("bfloat16"),
    Case("4 bits", "w4a16-rtn"),
    Case("4 bits, exact mode", "w4a16-rtn", mode="exact"),
    Case("4 bits, run as 8", "w4a16-rtn", mode="int8"),
    Case("8 bits", "w4a16-rtn", INT8),
    Case("8 bits at load", "w4a16-rtn", INT8, at_load="int8"),
    Case("4 bits at load", "w4a16-rtn", at_load="w4"),
    Case("FP8 at load", "fp8-dynamic", at_load="fp8"),
    Case("NF4 at load", "nf4", at_load="nf4", container="bitsandbytes"),
)


@dataclass(frozen=True, slots=True)
class Result:
    """Bytes: of the packed model, of the imports alone, and what the load used."""

    case: Case
    packed_bytes: int
    import_bytes: int
    usage: Usage

    @property
    def ratio(self) -> float:
        """Peak of the load over the packed model and its cache, imports left out."""
        return (self.usage.peak_private - self.import_bytes) / (self.packed_bytes + KV_BYTES)


@dataclass(frozen=True, slots=True)
class PeerResult:
    """What llama.cpp took: weights it does not rearrange stay mapped from the file, which counts as resident and not as private."""

    name: str
    file_bytes: int
    usage: Usage


def measure(
    cases: tuple[Case, ...] = CASES, work: Path | None = None, size: Size | None = None, peer: LlamaCpp | None = None
) -> Iterator[Result | PeerResult]:
    """Load each case in a process of its own. Needs disk for the model and one conversion."""
    size = size or Size()
    imports = run([sys.executable, "-c", _IMPORTS]).peak_private
    with tempfile.TemporaryDirectory(dir=work) as folder:
        source = Path(folder) / "model"
        write_random_checkpoint(source, layers=size.layers, hidden=size.hidden, intermediate=size.intermediate)
        for case in cases:
            with tempfile.TemporaryDirectory(dir=folder) as converted:
                packed = source if case.recipe is None else _convert(source, Path(converted) / "out", case)
                loaded = source if case.at_load else packed
                usage = run([sys.executable, "-c", _LOAD, str(loaded), case.mode, case.at_load or ""])
                yield Result(case, CheckpointReader(packed).total_bytes, imports, usage)
        if peer is not None:
            yield from _of_llama_cpp(peer, source, Path(folder))


def _of_llama_cpp(peer: LlamaCpp, source: Path, folder: Path) -> Iterator[PeerResult]:
    whole = write_gguf(source, folder / "f16.gguf")
    for kind in ("Q4_0", "Q8_0"):
        model = peer.quantize(whole, folder / f"{kind}.gguf", kind)
        yield PeerResult(f"llama.cpp {kind}, loaded and one token", model.stat().st_size, run(peer.one_token(model)))


def _convert(source: Path, out: Path, case: Case) -> Path:
    assert case.recipe is not None
    overrides = [word for override in case.overrides for word in ("--override", override)]
    run([sys.executable, "-m", "quantkit", "convert", str(source), "-o", str(out), "-r", case.recipe, "-f", case.container, *overrides])
    return out
