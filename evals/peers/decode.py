"""Read a quantized folder back to float32 weights, from the bytes alone.

Written from the format descriptions of compressed-tensors (pack-quantized) and GPTQ (v1, v2), and sharing no code with quantkit or any
peer, so that a packing mistake in one of them cannot hide. Both store a dense little-endian bit stream in int32 words.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]


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


def read_tensors(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def unpack_bits(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` fields of `bits` bits in each row of int32 words -> int64 [rows, count]."""
    stream = (words.long().unsqueeze(-1) >> torch.arange(32)) & 1  # [rows, words, 32]
    fields = stream.flatten(1)[:, : count * bits].unflatten(1, (count, bits))
    return (fields << torch.arange(bits)).sum(-1)


def decode_compressed_tensors(part: Tensors) -> torch.Tensor:
    """weight_packed [N, words] and weight_scale [N, G] -> [N, K]."""
    n, k = part["weight_shape"].tolist()
    bits = part["weight_packed"].shape[1] * 32 // k
    scale = part["weight_scale"].float()
    zero = torch.full_like(scale, 2 ** (bits - 1))
    if "weight_zero_point" in part:
        zero = unpack_bits(part["weight_zero_point"].T.contiguous(), bits, n).T.float()
    group = part["weight_g_idx"].long() if "weight_g_idx" in part else torch.arange(k) // (k // scale.shape[1])
    codes = unpack_bits(part["weight_packed"], bits, k)
    return (codes - zero[:, group]) * scale[:, group]


def decode_gptq(part: Tensors, *, is_v2: bool) -> torch.Tensor:
    """qweight [words, N], qzeros [G, words], scales [G, N], g_idx [K] -> [N, K]."""
    n, group = part["scales"].shape[1], part["g_idx"].long()
    bits = part["qweight"].shape[0] * 32 // len(group)
    zero = unpack_bits(part["qzeros"], bits, n)
    zero = zero if is_v2 else (zero + 1) % 2**bits
    codes = unpack_bits(part["qweight"].T.contiguous(), bits, len(group))
    return (codes - zero.T[:, group]) * part["scales"].float().T[:, group]


def decode_folder(folder: Path) -> Decoded:
    """Every tensor of the folder in float32 under its dense name."""
    stored = read_tensors(folder)
    settings = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    is_v2 = settings.get("checkpoint_format", settings.get("format")) == "gptq_v2"
    modules = sorted({name.rpartition(".")[0] for name in stored if name.endswith((".weight_packed", ".qweight"))})
    tensors: Tensors = {}
    num_weights = num_bits = 0
    for module in modules:
        part = {name.rpartition(".")[2]: stored.pop(name) for name in list(stored) if name.rpartition(".")[0] == module}
        if "bias" in part:
            tensors[f"{module}.bias"] = part.pop("bias").float()
        weight = decode_gptq(part, is_v2=is_v2) if "qweight" in part else decode_compressed_tensors(part)
        part.pop("weight_shape", None)
        tensors[f"{module}.weight"] = weight
        num_weights += weight.numel()
        num_bits += 8 * sum(t.nbytes for t in part.values())
    tensors |= {name: tensor.float() for name, tensor in stored.items()}
    return Decoded(tensors, num_weights, num_bits, sum(f.stat().st_size for f in folder.glob("*.safetensors")))
