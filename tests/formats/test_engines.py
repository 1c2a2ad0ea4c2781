"""The verdicts that users stumble over, each stated once, from the engines' documented behaviour."""

from __future__ import annotations

import re

import pytest
import torch

from quantkit.core.scheme_names import parse_scheme
from quantkit.formats.engine_rules import Stored, StoredLayer
from quantkit.formats.engines import CONTAINERS, ENGINES, Verdict, verdicts

SHAPE = (256, 512)
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")


def stored(container: str | None, *schemes: str, shape: tuple[int, int] = SHAPE, **settings: object) -> Stored:
    """One attention block: the first scheme for all, or one each."""
    chosen = schemes * len(NAMES) if len(schemes) == 1 else schemes
    layers = tuple(StoredLayer(f"model.layers.0.self_attn.{n}", shape, parse_scheme(s)) for n, s in zip(NAMES, chosen, strict=False))
    return Stored(container, **{"layers": layers if schemes else (), "model_dtype": torch.bfloat16, "scale_dtype": torch.bfloat16} | settings)


def verdict(engine: str, model: Stored) -> Verdict:
    return next(v for v in verdicts(model) if v.engine == engine)


FP8_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
KV_CACHE = {"config_groups": {}, "kv_cache_scheme": FP8_CACHE}
LOADS = [
    ("vLLM", stored("gptq", "w4a16"), True, ""),
    ("vLLM", stored("gptq", "w8a16-channel"), True, ""),
    ("vLLM", stored("gptq", "w3a16"), False, "4 and 8 bits"),
    ("vLLM", stored("gptq", "w4a16-asym"), False, "symmetric weights only"),
    ("vLLM", stored("gptq", "w4a16-g16"), False, "group sizes"),
    ("vLLM", stored("gptq", "w4a16", config={"desc_act": True}), False, "desc_act"),
    ("vLLM", stored("gptq", "w4a16-channel", config={"desc_act": True}), True, ""),
    ("vLLM", stored("compressed-tensors", "w3a16-asym-g64"), True, ""),
    ("vLLM", stored("compressed-tensors", "w4a16", "w4a16", "w8a16", "w4a16"), False, "q_proj is w4a16.*v_proj is w8a16"),
    ("vLLM", stored("compressed-tensors", "w4a16", "w4a16", "w4a16", "w8a16"), True, ""),
    ("vLLM", stored("compressed-tensors", "w4a16", "w4a16", plain=("model.layers.0.self_attn.v_proj",)), False, "v_proj is none"),
    ("vLLM", stored("compressed-tensors", "fp8-block", "fp8-dynamic", "fp8-dynamic", "fp8-block"), False, "q_proj is fp8-block.*fp8-dynamic"),
    ("vLLM", stored("fp8", "fp8-static", "fp8-static", plain=("model.layers.0.self_attn.v_proj",)), False, "v_proj is none"),
    ("SGLang", stored("awq", "w4a16-asym", "w4a16-asym", plain=("model.layers.0.self_attn.v_proj",)), False, "v_proj is none"),
    ("vLLM", stored("bitsandbytes", unread="not read"), False, "plugin"),
    ("SGLang", stored("compressed-tensors", "w4a16-asym"), True, ""),
    ("SGLang", stored("compressed-tensors", "w3a16"), False, "4 and 8 bits"),
    ("SGLang", stored("gptq", "w3a16-asym"), True, ""),
    ("transformers", stored("compressed-tensors", "w4a16"), True, "needs compressed-tensors"),
    ("transformers", stored("compressed-tensors", "w4a16-asym"), False, r"dequantize=True"),
    ("transformers", stored("compressed-tensors", "w3a16", packs_whole_words=True), False, "packed as before"),
    ("transformers", stored("fp8", "fp8-block"), True, ""),
    ("transformers", stored("fp8", "fp8-tensor"), False, "one scale a tensor"),
    ("transformers", stored("fp8", "fp8-static"), False, "one scale a tensor, which it reads from compressed-tensors"),
    ("transformers", stored("compressed-tensors", "fp8-static"), True, ""),
    ("transformers", stored("compressed-tensors", "fp8-tensor"), True, ""),
    ("transformers", stored("gptq", "w4a16"), True, "gptqmodel"),
    ("transformers", stored("gptq", "w4a16-channel", shape=(64, 172)), False, "172 -> 64"),
    ("transformers", stored("gptq", "w4a16", config={"damp_percent": 0}), False, "damp_percent"),
    ("transformers", stored("gptq", "w4a16", "w4a16", "w4a16", "w8a16"), False, "w4a16 and w8a16"),
    ("vLLM", stored("compressed-tensors", "w4a8"), True, "Arm CPUs and Intel GPUs alone"),
    ("vLLM", stored("compressed-tensors", "w4a8-channel"), True, "no kernel for NVIDIA"),
    ("vLLM", stored("compressed-tensors", "w4a8-asym"), False, "symmetric weights of 4 bits.* and here are layers of w4a8-asym"),
    ("vLLM", stored("compressed-tensors", "w3a8"), False, "here are layers of w3a8"),
    ("vLLM", stored("compressed-tensors", "w4afp8"), True, "Hopper"),
    ("vLLM", stored("compressed-tensors", "w4afp8-g64"), False, "groups of 128"),
    ("SGLang", stored("compressed-tensors", "w4a8"), False, "outside experts"),
    ("SGLang", stored("compressed-tensors", "w8a8-int8"), True, ""),
    ("transformers", stored("compressed-tensors", "w4a8-asym"), True, "slow"),
    ("transformers", stored("compressed-tensors", "w4afp8-asym"), False, "dequantize=True"),
    ("TGI", stored("compressed-tensors", "w8a8-int8"), True, ""),
    ("TGI", stored("compressed-tensors", "w8a8-int8", config={"format": "mixed-precision"}), False, "one layout"),
    ("TGI", stored("compressed-tensors", "w4a8"), False, "packed integers, W8A8"),
    ("TGI", stored("compressed-tensors", "w4afp8"), True, "activations keep their 16 bits"),
    ("llama.cpp", stored("compressed-tensors", "w4a8"), False, "a scale a row or a block"),
    ("llama.cpp", stored("compressed-tensors", "w4a8-channel"), True, ""),
    ("llama.cpp", stored("compressed-tensors", "fp8-block"), True, ""),
    ("llama.cpp", stored("compressed-tensors", "fp8-tensor"), False, "a scale a row or a block"),
    ("llama.cpp", stored("compressed-tensors", "mxfp4"), False, "NVFP4 alone"),
    ("llama.cpp", stored("compressed-tensors", "nvfp4"), True, "repacked"),
    ("llama.cpp", stored("gptq", "w3a16"), False, "2, 4 and 8 bits"),
    ("llama.cpp", stored("gptq", "w4a16", "w4a16", "w4a16", "w8a16"), False, "one bit width"),
    ("llama.cpp", stored("compressed-tensors", "w4a16-channel"), False, "in groups only"),
    ("llama.cpp", stored("compressed-tensors", "w4a16", config={"config_groups": {"a": {}, "b": {}}}), False, "one config group"),
    ("llama.cpp", stored("compressed-tensors", "w3a16"), False, "older layout"),
    ("llama.cpp", stored("awq", unread="not read"), False, "AWQ"),
    ("GPTQModel", stored("gptq", "w4a16-asym"), True, ""),
    ("GPTQModel", stored("compressed-tensors", "w4a16"), False, "dequantize"),
    ("quantkit", stored("gptq", "w3a16-asym"), True, ""),
    ("quantkit", stored("awq", unread="AWQ is not read yet"), False, "AWQ is not read yet"),
    ("TGI", stored("compressed-tensors", config={"format": "nvfp4-pack-quantized"}, unread="not read"), False, "FP8"),
    ("TGI", stored("compressed-tensors", config={"format": "float-quantized"}, unread="not read"), True, ""),
    ("SGLang", stored("hqq", unread="not read"), None, "not known"),
    ("vLLM", stored("compressed-tensors", "fp8-static", config=KV_CACHE), True, ""),
    ("vLLM", stored("compressed-tensors", "w4a16", config={"kv_cache_scheme": FP8_CACHE | {"type": "int"}}), False, "takes symmetric 8-bit floats"),
    ("vLLM", stored("compressed-tensors", "nvfp4", config={"kv_cache_scheme": FP8_CACHE | {"symmetric": False}}), False, "FP8.*asymmetric"),
    ("vLLM", stored("compressed-tensors", config=KV_CACHE), None, "not known"),
    ("transformers", stored("compressed-tensors", config=KV_CACHE), True, "needs compressed-tensors"),
]


@pytest.mark.parametrize(("engine", "model", "loads", "reason"), LOADS, ids=lambda value: value if isinstance(value, str) else "")
def test_verdict(engine: str, model: Stored, loads: bool | None, reason: str) -> None:
    found = verdict(engine, model)

    assert found.loads is loads, found
    assert re.search(reason, found.reason), found.reason


def test_an_unquantized_model_loads_everywhere() -> None:
    assert all(v.loads for v in verdicts(Stored(None)))


def test_blocks_wider_than_a_row_are_told_of() -> None:
    wide, narrow = (verdict("transformers", stored("bitsandbytes", scheme, shape=(256, 256))) for scheme in ("nf4-b2048", "nf4-b256"))

    assert wide.loads and any("blocks wider than a row, as those of" in note for note in wide.notes) and not narrow.notes


def test_experts_of_a_layer_share_one_scheme_where_they_are_fused() -> None:
    layers = [StoredLayer(f"model.layers.0.mlp.experts.{i}.{n}", SHAPE, parse_scheme("w4a16")) for i in range(2) for n in ("gate_proj", "down_proj")]
    odd = StoredLayer("model.layers.0.mlp.experts.2.down_proj", SHAPE, parse_scheme("w8a16"))

    assert verdict("vLLM", stored("compressed-tensors", layers=tuple(layers))).loads
    assert "experts.2.down_proj is w8a16" in verdict("vLLM", stored("compressed-tensors", layers=(*layers, odd))).reason


EXPERTS = tuple(f"model.layers.0.mlp.experts.{n}.{part}_proj" for n in range(2) for part in ("gate", "up", "down"))


def mixture(container: str, scheme: str, attention: str | None = None) -> Stored:
    layers = tuple(StoredLayer(name, SHAPE, parse_scheme(scheme)) for name in EXPERTS)
    alone = StoredLayer("model.layers.0.self_attn.o_proj", SHAPE, parse_scheme(attention or scheme))
    return Stored(container, layers=(alone, *layers), model_dtype=torch.bfloat16, scale_dtype=torch.bfloat16)


@pytest.mark.parametrize(("engine", "model", "loads", "reason"), [
    ("transformers", mixture("compressed-tensors", "w4a16"), True, ""),
    ("transformers", mixture("compressed-tensors", "w4a16", "w8a16"), False, "with experts takes every layer for the main scheme"),
    ("transformers", mixture("compressed-tensors", "fp8-block", "fp8-dynamic"), False, "fp8-block and fp8-dynamic"),
    ("transformers", mixture("compressed-tensors", "mxfp4"), True, ""),
    ("transformers", mixture("compressed-tensors", "nvfp4"), False, r"global scale.*experts\.0\.gate_proj"),
    ("transformers", mixture("bitsandbytes", "nf4"), False, r"experts\.0\.gate_proj"),
    ("transformers", mixture("bitsandbytes", "int8"), False, "stacks experts"),
    ("vLLM", mixture("compressed-tensors", "w4a16", "w3a16"), True, ""),
    ("vLLM", mixture("compressed-tensors", "w3a16"), False, r"4 and 8 symmetric bits.*w3a16"),
    ("vLLM", mixture("compressed-tensors", "w4a16-asym"), False, "symmetric"),
], ids=str)  # fmt: skip
def test_experts_load_where_engines_have_a_way_for_them(engine: str, model: Stored, loads: bool, reason: str) -> None:
    found = verdict(engine, model)

    assert found.loads is loads and re.search(reason, found.reason)


def test_scales_that_loaders_cast_are_noted() -> None:
    cast = stored("gptq", "w4a16", scale_dtype=torch.float16)

    assert any("float16 and cast to the model's bfloat16" in note for note in verdict("vLLM", cast).notes)
    assert any("cast" in note for note in verdict("SGLang", cast).notes)
    assert not verdict("vLLM", stored("gptq", "w4a16")).notes


def test_every_container_has_a_verdict_from_every_engine_and_no_refusal_without_a_reason() -> None:
    for container in CONTAINERS:
        found = verdicts(stored(container, unread="not read"))
        assert [v.engine for v in found] == [engine.name for engine in ENGINES]
        assert all(v.reason for v in found if not v.loads)


def test_what_becomes_of_a_kv_caches_scales_is_a_note_where_they_do_nothing_by_themselves() -> None:
    model = stored("compressed-tensors", "w4a16", config=KV_CACHE)

    notes = {v.engine: " ".join(v.notes) for v in verdicts(model)}

    assert "--kv-cache-dtype fp8_e4m3" in notes["SGLang"] and "model's own type" in notes["transformers"]
    assert not any("KV cache" in " ".join(v.notes) for v in verdicts(stored("compressed-tensors", "w4a16")))
