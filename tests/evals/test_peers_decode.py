"""The comparison's own decoder: each peer's checkpoint gives the logits that the peer itself computed from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.peers.decode import decode_folder, decode_fp4, decode_plain

PROMPT = """                    GNU GENERAL PUBLIC LICENSE
                       Version 3, 29 June 2007

 Copyright (C) 2007 Free Software Foundation, Inc. <https://fsf.org/>
 Everyone is permitted to copy and distribute verbatim copies
 of this license document, but changing it is not allowed."""
"""The text whose first 64 tokens, in two rows, gave the peers' logits."""

ROWS, WEIGHTS = 2048, 589_824
"""Output channels and weights of the seven linears of a block."""
INPUTS = 6 * 256 + 512
"""Input channels of the same: GPTQ stores the group of each as an int32."""
BITS = {
    "awq_gemm_autoawq": 4 + (16 + 4) / 128,
    "bnb_int8": 8 + 32 * ROWS / WEIGHTS,
    "bnb_nf4_dq": 4 + 8 / 64 + 32 / (64 * 256),
    "ct_fp8_block": 8 + 16 / 128**2,
    "ct_fp8_dynamic": 8 + 16 * ROWS / WEIGHTS,
    "ct_nvfp4a16": 4 + 8 / 16 + 7 * 32 / WEIGHTS,
    "ct_w4a16_asym_awq": 4 + (16 + 4) / 128,
    "ct_w4a16_gptq": 4 + 16 / 128,
    "ct_w8a8_gptq": 8 + 16 * ROWS / WEIGHTS,
    "gptq_b3_g128": 3 + (16 + 3) / 128 + 32 * INPUTS / WEIGHTS,
    "gptq_b4_g128": 4 + (16 + 4) / 128 + 32 * INPUTS / WEIGHTS,
    "gptq_b4_g64_desc": 4 + (16 + 4) / 64 + 32 * INPUTS / WEIGHTS,
    "gptq_b8_g128": 8 + (16 + 8) / 128 + 32 * INPUTS / WEIGHTS,
    "hf_finegrained_fp8_handmade": 8 + 32 / 128**2,
}
"""Bits a weight by hand: codes, scales, zero points."""


@pytest.mark.parametrize("name", BITS)
def test_decoded_weights_give_the_peers_own_logits(name: str, peers: Path) -> None:
    decoded = decode_folder(peers / name)
    model = AutoModelForCausalLM.from_pretrained(peers / "tiny", dtype=torch.float32).eval()
    model.load_state_dict(decoded.tensors, strict=True)
    expected = torch.load(peers / name / "logits.pt", weights_only=True).float()
    ids = torch.tensor(AutoTokenizer.from_pretrained(peers / "tiny").encode(PROMPT, add_special_tokens=False)[:64]).view(2, 32)

    with torch.no_grad():
        logits = model(ids).logits

    assert (logits - expected).abs().mean() < 0.01 * expected.std()  # the peer ran in bfloat16, some with quantized activations
    assert decoded.linear_bpw == pytest.approx(BITS[name], abs=1e-4)


def test_mxfp4_is_read_low_nibble_first_with_powers_of_two():
    packed = torch.zeros(1, 32, dtype=torch.uint8)
    packed[0, 0], packed[0, 16] = 0x21, 0xFA  # codes 1, 2 and 10, 15: 0.5, 1 and -1, -6
    weight = decode_fp4({"weight_packed": packed, "weight_scale": torch.tensor([[128, 126]], dtype=torch.uint8)}, {})
    assert weight[0, :2].tolist() == [1.0, 2.0] and weight[0, 32:34].tolist() == [-0.5, -3.0]


@pytest.mark.parametrize(("scale", "settings", "expected"), [
    (torch.tensor([2.0]), {}, [[2, 4, 6, 8], [10, 12, 14, 16]]),
    (torch.tensor([[1.0], [2.0]]), {}, [[1, 2, 3, 4], [10, 12, 14, 16]]),
    (torch.tensor([[1.0, 2.0], [3.0, 4.0]]), {}, [[1, 2, 6, 8], [15, 18, 28, 32]]),
    (torch.tensor([[1.0, 2.0]]), {"weight_block_size": [2, 3]}, [[1, 2, 3, 8], [5, 6, 7, 16]]),
], ids=["tensor", "channel", "group", "ragged block"])
def test_one_scale_serves_a_tensor_a_channel_a_group_or_a_block(scale, settings, expected):
    codes = torch.arange(1, 9).view(2, 4).to(torch.float8_e4m3fn)
    assert decode_plain({"weight": codes, "weight_scale": scale}, settings).tolist() == expected
