"""Checkpoints written by GPTQModel and llm-compressor decode to models that give the peers' own logits."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes.functional as bitsandbytes
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.peers.decode import decode_folder
from quantkit.formats.opened import OpenedCheckpoint

PROMPT = """                    GNU GENERAL PUBLIC LICENSE
                       Version 3, 29 June 2007

 Copyright (C) 2007 Free Software Foundation, Inc. <https://fsf.org/>
 Everyone is permitted to copy and distribute verbatim copies
 of this license document, but changing it is not allowed."""
"""The text whose first 64 tokens, in two rows, gave the peers' logits."""

NAMES = [
    "gptq_b4_g128", "gptq_b4_g64_desc", "gptq_b3_g128", "gptq_b8_g128", "ct_w4a16_gptq", "ct_w4a16_asym_awq", "ct_nvfp4a16", "awq_gemm_autoawq",
    "bnb_nf4_dq", "hf_finegrained_fp8_handmade",
]  # fmt: skip
LEAST_AGREEMENT = {"ct_nvfp4a16": 0.96, "awq_gemm_autoawq": 0.95}
"""Of 64 top tokens, where a peer's own arithmetic in 16 bits decides more of them; weights are compared beneath."""
ALL = [*NAMES, "ct_w8a8_gptq", "ct_fp8_block", "ct_fp8_dynamic", "bnb_int8"]
SAME_BYTES = [
    "gptq_b4_g128", "gptq_b3_g128", "gptq_b8_g128", "ct_w4a16_gptq", "ct_w4a16_asym_awq", "ct_w8a8_gptq", "ct_fp8_block", "ct_fp8_dynamic",
    "ct_nvfp4a16", "awq_gemm_autoawq", "bnb_nf4_dq", "bnb_int8", "hf_finegrained_fp8_handmade",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_decoded_weights_give_the_peers_logits(name: str, peers: Path) -> None:
    opened = OpenedCheckpoint(peers / name)
    assert len(opened.schemes) == 28
    model = AutoModelForCausalLM.from_pretrained(peers / "tiny", dtype=torch.float32).eval()
    model.load_state_dict({n: opened.get(n).float() for n in opened.names}, strict=True)
    expected = torch.load(peers / name / "logits.pt", weights_only=True).float()
    ids = torch.tensor(AutoTokenizer.from_pretrained(peers / "tiny").encode(PROMPT, add_special_tokens=False)[:64]).view(2, 32)

    with torch.no_grad():
        logits = model(ids).logits

    assert (logits - expected).abs().mean() < 0.01 * expected.std()
    best = expected.topk(2, dim=-1).values
    differs = logits.argmax(-1) != expected.argmax(-1)
    assert bool((best[..., 0] - best[..., 1])[differs].lt(0.1 * expected.std()).all())  # peers compute in bfloat16
    assert 1 - differs.float().mean() > LEAST_AGREEMENT.get(name, 0.97)


def test_every_checkpoint_of_the_archive_is_compared(peers: Path) -> None:
    quantized = {config.parent.name for config in peers.glob("*/config.json") if "quantization_config" in config.read_text(encoding="utf-8")}

    assert quantized == set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_weights_are_those_of_a_decoder_that_shares_no_code_with_ours(name: str, peers: Path) -> None:
    opened, expected = OpenedCheckpoint(peers / name), decode_folder(peers / name).tensors
    assert len(opened.schemes) == 28 and expected.keys() == set(opened.names)

    for tensor, value in expected.items():
        found = opened.get(tensor).float()
        if name == "bnb_int8":  # SCB / 127 and SCB * (1 / 127) part in the last bit; bitsandbytes itself is compared below
            torch.testing.assert_close(found, value, rtol=2**-22, atol=0)
        else:
            assert torch.equal(found, value), tensor


@pytest.mark.parametrize("name", ["ct_w4a16_gptq", "ct_w4a16_asym_awq", "ct_w8a8_gptq", "ct_fp8_block", "ct_fp8_dynamic", "ct_nvfp4a16"])
def test_weights_are_those_that_compressed_tensors_unpacks(name: str, peers: Path) -> None:
    opened = OpenedCheckpoint(peers / name)
    (group,) = opened.reader.quantization_config["config_groups"].values()
    scheme = QuantizationScheme(**group)
    unpacker = BaseCompressor.get_value_from_registry(group["format"])
    for module in opened.schemes:
        stored = {part.removeprefix(f"{module}."): opened.reader.get(part) for part in opened.parts(module)}
        theirs = unpacker.decompress(stored, scheme)["weight"].float()
        torch.testing.assert_close(opened.get(f"{module}.weight"), theirs, rtol=2**-7, atol=1e-9)  # they compute in bfloat16


@pytest.mark.parametrize("name", ["bnb_nf4_dq", "bnb_int8"])
def test_weights_are_those_that_bitsandbytes_dequantizes(name: str, peers: Path) -> None:
    opened = OpenedCheckpoint(peers / name)
    for module in opened.schemes:
        stored = {part.removeprefix(f"{module}."): opened.reader.get(part) for part in opened.parts(module)}
        if name == "bnb_int8":
            theirs = bitsandbytes.int8_vectorwise_dequant(stored["weight"], stored["SCB"])
        else:
            rest = {part: tensor for part, tensor in stored.items() if part != "weight"}
            state = bitsandbytes.QuantState.from_dict(rest, device=torch.device("cpu"))
            state.dtype = torch.float32
            theirs = bitsandbytes.dequantize_4bit(stored["weight"], state)
        assert torch.equal(opened.get(f"{module}.weight"), theirs)


@pytest.mark.parametrize("name", SAME_BYTES)
def test_encoding_again_gives_the_peers_bytes(name: str, peers: Path) -> None:
    opened = OpenedCheckpoint(peers / name)
    for module, scheme in opened.schemes.items():
        again = opened.format.encode(opened.quantized(module), scheme)
        for stored in opened.parts(module):
            assert same_bytes(again[stored.removeprefix(f"{module}.")], opened.reader.get(stored)), stored


def same_bytes(ours: Tensor, theirs: Tensor) -> bool:
    """Texts are filled up with blanks, so that their length does not depend on what they say."""
    a, b = (bytes(t.contiguous().flatten().view(torch.uint8).tolist()) for t in (ours, theirs))
    return ours.dtype == theirs.dtype and (a.rstrip(b" ") if b.startswith(b'{"') else a) == b
