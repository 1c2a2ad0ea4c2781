"""Read a quantized folder back to float32 weights, from the bytes alone, and count the bits its quantized linears store.

Written from the format descriptions, and sharing nothing with quantkit or any peer, so that a packing mistake in one of them cannot hide.
A `Part` holds one linear's tensors by local name; bitsandbytes' names begin with "weight.".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]
Part = dict[str, torch.Tensor]
Settings = dict[str, Any]
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where in a word of eight nibbles the eight columns lie."""
CONSTANT = ("weight_shape", "weight_format", "weight.quant_map", "weight.nested_quant_map", "weight.quant_state")
"""What a format writes beside each linear but what says nothing of its weights: shapes, its own tables, descriptions."""
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""OCP's E2M1 by its four bits."""


def unpack_bits(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` fields of `bits` bits in each row of int32 words, a dense little-endian stream -> int64 [rows, count]."""
    stream = (words.long().unsqueeze(-1) >> torch.arange(32)) & 1  # [rows, words, 32]
    fields = stream.flatten(1)[:, : count * bits].unflatten(1, (count, bits))
    return (fields << torch.arange(bits)).sum(-1)


def spread(scale: torch.Tensor, columns: int) -> torch.Tensor:
    """[N or 1, G] -> [N or 1, columns], each entry over its group of columns."""
    return scale if scale.shape[1] == 1 else scale.repeat_interleave(columns // scale.shape[1], dim=1)


def decode_packed_integers(part: Part, settings: Settings) -> torch.Tensor:
    """compressed-tensors pack-quantized: weight_packed [N, words], weight_scale [N, G]."""
    n, k = part["weight_shape"].tolist()
    bits = part["weight_packed"].shape[1] * 32 // k
    scale = part["weight_scale"].float()
    zero = torch.full_like(scale, 2 ** (bits - 1))
    if "weight_zero_point" in part:
        zero = unpack_bits(part["weight_zero_point"].T.contiguous(), bits, n).T.float()
    group = part["weight_g_idx"].long() if "weight_g_idx" in part else torch.arange(k) // (k // scale.shape[1])
    codes = unpack_bits(part["weight_packed"], bits, k)
    return (codes - zero[:, group]) * scale[:, group]


def decode_gptq(part: Part, settings: Settings) -> torch.Tensor:
    """GPTQ v1 and v2: qweight [words, N], qzeros [G, words], scales [G, N], g_idx [K]."""
    n, group = part["scales"].shape[1], part["g_idx"].long()
    bits = part["qweight"].shape[0] * 32 // len(group)
    zero = unpack_bits(part["qzeros"], bits, n)
    is_v2 = settings.get("checkpoint_format", settings.get("format")) == "gptq_v2"
    zero = zero if is_v2 else (zero + 1) % 2**bits
    codes = unpack_bits(part["qweight"].T.contiguous(), bits, len(group))
    return (codes - zero.T[:, group]) * part["scales"].float().T[:, group]


def decode_awq(part: Part, settings: Settings) -> torch.Tensor:
    """AWQ GEMM: qweight [K, N/8], qzeros [G, N/8], scales [G, N]; the eight columns of a word in AWQ's order."""
    nibbles = (unpack_bits(part[name], 4, 8 * part[name].shape[1]).unflatten(1, (-1, 8)) for name in ("qweight", "qzeros"))
    codes, zero = (found[..., AWQ_ORDER].flatten(1) for found in nibbles)
    group = torch.arange(len(codes)) // (len(codes) // len(zero))
    return ((codes - zero[group]) * part["scales"].float()[group]).T.contiguous()


def decode_fp4(part: Part, settings: Settings) -> torch.Tensor:
    """NVFP4 (scales float8, divided by one global scale) and MXFP4 (scales powers of two): weight_packed uint8 [N, K/2], low nibble first."""
    packed = part["weight_packed"].long()
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
    if "weight_global_scale" in part:
        scale = part["weight_scale"].float() / part["weight_global_scale"].float()
    else:
        scale = torch.exp2(part["weight_scale"].float() - 127)
    return FP4[codes] * spread(scale, codes.shape[1])


def decode_plain(part: Part, settings: Settings) -> torch.Tensor:
    """One code an element, int8 or float8 [N, K], with a scale for the tensor, each channel, each group or each block."""
    codes = part["weight"].float()
    scale = part["weight_scale_inv" if "weight_scale_inv" in part else "weight_scale"].float()
    scale = scale.reshape(1, 1) if scale.numel() == 1 else scale
    if block := block_structure(settings):
        scale = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: codes.shape[0], : codes.shape[1]]
    if "weight_zero_point" in part:
        codes = codes - spread(part["weight_zero_point"].float(), codes.shape[1])
    return codes * (scale if block else spread(scale, codes.shape[1]))


def block_structure(settings: Settings) -> list[int] | None:
    """Rows and columns of a block, in DeepSeek's words or in compressed-tensors'."""
    if settings.get("weight_block_size"):
        return settings["weight_block_size"]
    groups = settings.get("config_groups", {}).values()
    return next((g["weights"]["block_structure"] for g in groups if g["weights"].get("strategy") == "block"), None)


def decode_bitsandbytes_int8(part: Part, settings: Settings) -> torch.Tensor:
    """weight int8 [N, K], SCB [N], the largest magnitude of each row."""
    return part["weight"].float() * part["SCB"].float().unsqueeze(1) / 127


def decode_bitsandbytes_4bit(part: Part, settings: Settings) -> torch.Tensor:
    """Codes of 4 bits in row-major order, high nibble first, into a stored table; a scale for each block, itself perhaps quantized."""
    state = json.loads(bytes(next(t for name, t in part.items() if name.startswith("weight.quant_state")).tolist()))
    n, k = state["shape"]
    packed = part["weight"].flatten().long()
    codes = torch.stack([packed >> 4, packed & 15], -1).flatten()[: n * k]
    absmax = part["weight.absmax"]
    if "weight.nested_absmax" in part:
        nested = part["weight.nested_absmax"].repeat_interleave(state["nested_blocksize"])[: len(absmax)]
        absmax = part["weight.nested_quant_map"][absmax.long()] * nested + state["nested_offset"]
    return (part["weight.quant_map"][codes] * absmax.float().repeat_interleave(state["blocksize"])[: n * k]).view(n, k)


def decoder_of(part: Part, settings: Settings) -> Any:
    """The function that reads this linear; None where it is not quantized."""
    if "qweight" in part:
        is_awq = settings.get("quant_method") == "awq" or "g_idx" not in part
        return decode_awq if is_awq else decode_gptq
    if "weight_packed" in part:
        return decode_packed_integers if part["weight_packed"].dtype == torch.int32 else decode_fp4
    if "weight.absmax" in part:
        return decode_bitsandbytes_4bit
    if "SCB" in part:
        return decode_bitsandbytes_int8
    return decode_plain if {"weight_scale", "weight_scale_inv"} & part.keys() else None


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
