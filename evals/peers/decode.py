"""Read a quantized folder back to float32 weights, from the bytes alone, and count the bits its quantized linears store."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
from containers import Part, decoder_of

Tensors = dict[str, torch.Tensor]
CONSTANT = ("weight_shape", "weight_format", "weight.quant_map", "weight.nested_quant_map", "weight.quant_state")
"""What a format writes beside each linear but what says nothing of its weights: shapes, its own tables, descriptions."""


@dataclass(frozen=True)
class Decoded:
    """A model's float32 tensors, and what its quantized linears cost."""

    tensors: Tensors
    num_linear_weights: int
    linear_bits: int
    file_bytes: int

    @property
    def linear_bpw(self) -> float | None:
        return self.linear_bits / self.num_linear_weights if self.num_linear_weights else None


def read_parts(folder: Path) -> dict[str, Part]:
    """The folder's tensors by module and local name."""
    parts: dict[str, Part] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            module, _, local = name.partition(".weight.")
            module, local = (module, f"weight.{local}") if local else name.rpartition(".")[::2]
            parts.setdefault(module, {})[local] = tensor
    return parts


def stored_bits(part: Part) -> int:
    return 8 * sum(tensor.nbytes for name, tensor in part.items() if not name.startswith(CONSTANT))


def decode_folder(folder: Path) -> Decoded:
    """Every tensor of the folder in float32 under its dense name.

    A folder with `stored.json` holds weights that a peer dequantized itself, since it writes no checkpoint: the file says how many bits
    each linear would store.
    """
    settings = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    tensors: Tensors = {}
    num_weights = num_bits = 0
    for module, part in read_parts(folder).items():
        if decode := decoder_of(part, settings):
            if "bias" in part:
                tensors[f"{module}.bias"] = part.pop("bias").float()
            tensors[f"{module}.weight"] = decode(part, settings)
            num_weights += tensors[f"{module}.weight"].numel()
            num_bits += stored_bits(part)
        else:
            tensors |= {f"{module}.{name}".lstrip("."): tensor.float() for name, tensor in part.items()}
    if (folder / "stored.json").exists():
        stored = json.loads((folder / "stored.json").read_text())
        num_bits = sum(stored.values())
        num_weights = sum(tensors[f"{module}.weight"].numel() for module in stored)
    return Decoded(tensors, num_weights, num_bits, sum(f.stat().st_size for f in folder.glob("*.safetensors")))
