"""What every peer's script reads and prints, and how a peer without a checkpoint of its own hands over its weights."""

from __future__ import annotations

import argparse
import json
import resource
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any


def make_parser(description: str | None, methods: list[str]) -> argparse.ArgumentParser:
    """MODEL OUT --tokens FILE --method M --bits B --group G; a group of -1 is one scale for each output channel."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=Path, help="token rows; methods without calibration need none")
    parser.add_argument("--method", choices=methods, default=methods[0])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    return parser


def print_report(started: float, quantized: float, *packages: str) -> None:
    """The last line on stdout: seconds, memory, versions."""
    import torch

    print(json.dumps({
        "quantize_seconds": round(quantized - started, 2),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in (*packages, "transformers", "torch")},
    }), flush=True)


def load_model(path: str) -> Any:
    """The model in its own type."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()


def linears(model: Any) -> dict[str, Any]:
    """The linears that peers quantize by default: all but the head."""
    import torch

    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")}


def save_dequantized(out: Path, model_folder: str, model: Any, weights: dict[str, Any], bits: dict[str, int]) -> None:
    """Write a plain folder of the model with `weights` ([N, K] by linear) in float32, and `stored.json`: the bits each linear would store."""
    from safetensors.torch import save_file

    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in tied}
    tensors |= {f"{name}.weight": weight.detach().float() for name, weight in weights.items()}
    out.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(Path(model_folder) / "config.json", out)
    (out / "stored.json").write_text(json.dumps(bits, indent=1))
