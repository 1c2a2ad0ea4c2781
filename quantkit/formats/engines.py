"""Which engines load a stored model, and why not: a table of engines, containers and rules, as of autumn 2026.

A rule that answers is a reason against; the first one is told. Adding an engine is one row. Facts come from reading the engines' sources; where
there are none, the verdict is None and not a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from quantkit import __version__
from quantkit.core.scheme import CHANNEL
from quantkit.errors import UsageError, did_you_mean
from quantkit.formats import engine_rules as r
from quantkit.formats.engine_rules import Rule, Stored
from quantkit.formats.kv_scales import kv_scheme

CONTAINERS = {
    "gptq": "GPTQ (packed integers with scales and zero points a group)",
    "compressed-tensors": "compressed-tensors (the container of llm-compressor and vLLM)",
    "awq": "AWQ (4-bit integers, activation-aware scales folded in)",
    "fp8": "FP8 (8-bit floats with a scale a tensor or a block, as DeepSeek's)",
    "bitsandbytes": "bitsandbytes (NF4, FP4 or LLM.int8)",
    "gguf": "GGUF (llama.cpp's file)",
    "modelopt": "NVIDIA ModelOpt (FP8 or NVFP4)",
    "mxfp4": "MXFP4 (4-bit floats with a power of two a block, as gpt-oss)",
    "auto-round": "AutoRound (Intel)",
    "torchao": "torchao (PyTorch tensor subclasses)",
    "hqq": "HQQ (half-quadratic quantization)",
    "quanto": "optimum-quanto",
    "fbgemm_fp8": "FBGEMM FP8",
    "quark": "AMD Quark",
    "aqlm": "AQLM (additive codebooks)",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an engine of this version loads the model; None where it is not known. `reason` says why not, or what it takes."""

    engine: str
    version: str
    loads: bool | None
    reason: str
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"notes": list(self.notes)}


@dataclass(frozen=True, slots=True)
class Engine:
    """A row of the table.

    Attributes:
        rules: what it refuses, by layout (see `layout_of`); a layout that is absent is not known. A string refuses always.
        notes: what is worth knowing where it loads.
        how: what must be done or installed to load, by layout; "" for everything.
    """

    name: str
    version: str
    rules: Mapping[str, tuple[Rule, ...] | str]
    notes: tuple[Rule, ...] = ()
    how: Mapping[str, str] | None = None


_PLUGIN = "its core no longer reads it; a plugin does"
_ONLY_DEQUANTIZES = "reads GPTQ and AWQ; this it can only dequantize, to quantize anew"
_CONVERTED = "by convert_hf_to_gguf.py"
_DECODED = f"{_CONVERTED}, decoded to be quantized anew"

ENGINES = (
    Engine(
        "vLLM",
        "0.33",
        {
            "plain": (),
            "gptq": (r.only_bits(4, 8), r.symmetric, r.no_act_order, r.only_groups(CHANNEL, 32, 64, 128), r.uniform_fusion),
            "ct-packed": (r.dense_packing, r.uniform_fusion, r.marlin_experts, r.fp8_kv_cache),
            "ct-int8": (r.uniform_fusion, r.fp8_kv_cache),
            "ct-a8": (
                r.only_schemes(r"w8a8-int8|w4a8(-g\d+|-channel)?", "symmetric weights of 4 bits, or of 8 a row, under int8"),
                r.uniform_fusion, r.fp8_kv_cache,
            ),
            "ct-afp8": (r.only_schemes("w4afp8", "symmetric 4-bit weights in groups of 128 under FP8"), r.uniform_fusion, r.fp8_kv_cache),
            **dict.fromkeys(("ct-fp8", "ct-fp4"), (r.uniform_fusion, r.fp8_kv_cache)),
            **dict.fromkeys(("awq", "fp8"), (r.uniform_fusion,)),
            **dict.fromkeys(("modelopt", "mxfp4"), ()),
            **dict.fromkeys(("bitsandbytes", "gguf"), _PLUGIN),
        },
        notes=(r.scales_are_cast, r.marlin_pads),
        how={
            "ct-a8": "4-bit weights under int8 on Arm CPUs and Intel GPUs alone: it has no kernel for NVIDIA's",
            "ct-afp8": "on Hopper GPUs alone",
        },
    ),
    Engine(
        "SGLang",
        "0.5.23",
        {
            "plain": (),
            "gptq": (r.only_bits(2, 3, 4, 8), r.uniform_fusion),
            "ct-packed": (r.only_bits(4, 8), r.dense_packing, r.uniform_fusion),
            "ct-int8": (r.uniform_fusion,),
            **dict.fromkeys(("ct-a8", "ct-afp8"), "has no scheme for weights of fewer bits under quantized activations outside experts"),
            **dict.fromkeys(("ct-fp8", "ct-fp4", "awq", "fp8"), (r.uniform_fusion,)),
            **dict.fromkeys(("bitsandbytes", "gguf", "modelopt"), ()),
        },
        notes=(r.scales_are_cast, r.marlin_only, r.kv_cache_by_option),
    ),
    Engine(
        "transformers",
        "5.24",
        {
            "plain": (),
            "gptq": (r.only_bits(2, 3, 4, 8), r.multiples(32, 32), r.damping_in_range, r.plain_head, r.one_scheme),
            **dict.fromkeys(("ct-packed", "ct-afp8"), (r.dense_packing, r.asymmetric_packed, r.one_scheme_with_experts)),
            **dict.fromkeys(("ct-int8", "ct-a8", "ct-fp8"), (r.one_scheme_with_experts,)),
            "ct-fp4": (r.one_scheme_with_experts, r.no_nvfp4_experts),
            "bitsandbytes": (r.no_experts,),
            **dict.fromkeys(("ct-kv-cache", "awq", "gguf"), ()),
            "fp8": (r.in_blocks,),
            "modelopt": "does not know this quant_method",
        },
        notes=(r.kv_cache_ignored, r.blocks_within_rows),
        how={
            "gptq": "needs gptqmodel >= 1.4.3 and optimum >= 1.24",
            "awq": "needs gptqmodel",
            "bitsandbytes": "needs bitsandbytes",
            "gguf": "with gguf_file=",
            "ct-packed": "needs compressed-tensors; weights are decoded on every forward",
            **dict.fromkeys(("ct-int8", "ct-a8", "ct-afp8", "ct-fp8", "ct-fp4"), "needs compressed-tensors; slow"),
            "ct-kv-cache": "needs compressed-tensors",
        },
    ),
    Engine(
        "TGI",
        "3 (in maintenance)",
        {
            "plain": (),
            "gptq": (r.only_bits(2, 3, 4, 8), r.plain_head),
            **dict.fromkeys(("ct-packed", "ct-afp8"), (r.one_layout, r.only_bits(4, 8), r.plain_head)),
            **dict.fromkeys(("ct-int8", "ct-fp8"), (r.one_layout, r.plain_head)),
            **dict.fromkeys(("awq", "fp8", "bitsandbytes"), ()),
            **dict.fromkeys(("ct-a8", "ct-fp4"), "of compressed-tensors it reads packed integers, W8A8 with a scale a row, and FP8"),
            "gguf": "only its llama.cpp backend reads it",
        },
        how={"ct-afp8": "runs the weights alone; activations keep their 16 bits"},
    ),
    Engine(
        "llama.cpp",
        "2026-09",
        {
            "plain": (),
            "gptq": (r.only_bits(2, 4, 8), r.one_width),
            **dict.fromkeys(("ct-packed", "ct-afp8"), (r.one_config_group, r.grouped, r.whole_words)),
            **dict.fromkeys(("ct-int8", "ct-a8", "ct-fp8"), (r.one_config_group, r.rows_or_blocks)),
            "ct-fp4": (r.only_schemes("nvfp4", "of 4-bit floats NVFP4 alone"),),
            **dict.fromkeys(("fp8", "modelopt", "gguf"), ()),
            "awq": "its converter reads no AWQ",
            "bitsandbytes": "its converter reads no bitsandbytes",
        },
        how={
            "plain": _CONVERTED,
            **dict.fromkeys(("gptq", "ct-packed", "ct-int8", "ct-a8", "ct-afp8", "ct-fp8", "fp8"), _DECODED),
            "ct-fp4": f"{_CONVERTED}; NVFP4 is repacked",
        },
    ),
    Engine(
        "GPTQModel",
        "7.6",
        {
            **dict.fromkeys(("plain", "awq"), ()),
            "gptq": (r.only_bits(2, 3, 4, 8), r.multiples(32, 32), r.only_groups(CHANNEL, 16, 32, 64, 128, 256, 512, 1024)),
            **dict.fromkeys(("ct-packed", "ct-int8", "ct-a8", "ct-afp8", "ct-fp8", "ct-fp4", "fp8"), _ONLY_DEQUANTIZES),
            **dict.fromkeys(("gguf", "bitsandbytes"), "reads GPTQ and AWQ only"),
        },
        how={"plain": "to quantize it"},
    ),
    Engine("quantkit", __version__, {"": (r.unread_here,)}),
)


def find_engine(name: str) -> Engine:
    """An engine by its name, in any case.

    Raises:
        UsageError: there is none of this name.
    """
    by_name = {engine.name.lower(): engine for engine in ENGINES}
    if name.lower() not in by_name:
        raise UsageError(f"unknown engine {name!r}; {did_you_mean(name.lower(), by_name)}")
    return by_name[name.lower()]


def verdicts(stored: Stored) -> list[Verdict]:
    """One verdict for every engine of the table."""
    return [verdict(engine, stored) for engine in ENGINES]


def layout_of(stored: Stored) -> str:
    """The row's key for a model: its container, and for compressed-tensors what is in it."""
    if stored.container is None:
        return "plain"
    if stored.container != "compressed-tensors":
        return stored.container
    if stored.layers:
        return _layout_of_layers(stored)
    formats = {str(group.get("format")) for group in r.config_groups(stored)} | {str(stored.config.get("format"))}
    if any("fp4" in f or "fp6" in f for f in formats):
        return "ct-fp4"
    if any("float" in f or "fp8" in f for f in formats):
        return "ct-fp8"
    return "ct-kv-cache" if kv_scheme(stored.config) is not None and not r.config_groups(stored) else "ct-other"


def _layout_of_layers(stored: Stored) -> str:
    """The layout of compressed-tensors that asks most of an engine."""
    specs = [(layer.scheme.weight, layer.scheme.activation) for layer in stored.layers]
    if any(weight is not None and weight.kind == "e2m1" for weight, _ in specs):
        return "ct-fp4"
    if any(weight is not None and weight.kind == "e4m3" for weight, _ in specs):
        return "ct-fp8"
    if all(activation is None for _, activation in specs):
        return "ct-packed"
    if all(layer.scheme.name == "w8a8-int8" for layer in stored.layers if layer.scheme.activation):
        return "ct-int8"
    return "ct-afp8" if all(activation is None or activation.kind == "e4m3" for _, activation in specs) else "ct-a8"


def verdict(engine: Engine, stored: Stored) -> Verdict:
    layout = layout_of(stored)
    rules = engine.rules.get(layout, engine.rules.get(""))
    if rules is None:
        return Verdict(engine.name, engine.version, None, f"not known for {stored.container}")
    refusal = rules if isinstance(rules, str) else next((reason for rule in rules if (reason := rule(stored))), None)
    if refusal:
        return Verdict(engine.name, engine.version, False, refusal)
    how = (engine.how or {}).get(layout, "")
    return Verdict(engine.name, engine.version, True, how, tuple(note for rule in engine.notes if (note := rule(stored))))
