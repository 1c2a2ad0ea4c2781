"""Checkpoints written by GPTQModel and llm-compressor decode to models that give the peers' own logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit.formats.opened import OpenedCheckpoint

PROMPT = """                    GNU GENERAL PUBLIC LICENSE
                       Version 3, 29 June 2007

 Copyright (C) 2007 Free Software Foundation, Inc. <https://fsf.org/>
 Everyone is permitted to copy and distribute verbatim copies
 of this license document, but changing it is not allowed."""
"""The text whose first 64 tokens, in two rows, gave the peers' logits."""

NAMES = ["gptq_b4_g128", "gptq_b4_g64_desc", "gptq_b3_g128", "gptq_b8_g128", "ct_w4a16_gptq", "ct_w4a16_asym_awq"]


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
    assert (logits.argmax(-1) == expected.argmax(-1)).float().mean() > 0.97


@pytest.mark.parametrize("name", ["gptq_b4_g128", "gptq_b3_g128", "gptq_b8_g128", "ct_w4a16_gptq", "ct_w4a16_asym_awq", "ct_w8a8_gptq"])
def test_encoding_again_gives_the_peers_bytes(name: str, peers: Path) -> None:
    opened = OpenedCheckpoint(peers / name)
    for module, scheme in opened.schemes.items():
        again = opened.format.encode(opened.quantized(module), scheme)
        for stored in opened.parts(module):
            assert torch.equal(again[stored.rpartition(".")[2]], opened.reader.get(stored)), stored
