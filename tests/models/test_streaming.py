"""Block by block equals the whole model, for families that differ in masks, rotary tables, norms, caps, experts and weight layout."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit.checkpoint.reader import CheckpointReader
from quantkit.models.architecture import describe, load_config
from quantkit.models.streaming import BlockRunner

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2,         "max_position_embeddings": 64, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
FAMILIES = {
    "llama": SMALL, "mistral": SMALL | {"sliding_window": 8},
    "qwen2": SMALL | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": SMALL, "gemma": SMALL, "gemma2": SMALL | {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": SMALL | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi3": SMALL, "olmo2": SMALL, "cohere": SMALL, "stablelm": SMALL, "granite": SMALL, "starcoder2": SMALL, "smollm3": SMALL,
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2},
    "gpt_neox": SMALL, "opt": SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "falcon": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "alibi": False},
    "mixtral": SMALL | MOE, "qwen2_moe": SMALL | MOE | {"shared_expert_intermediate_size": 32}, "qwen3_moe": SMALL | MOE, "olmoe": SMALL | MOE,
}


RECURRENT = {
    "mamba": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8},
    "lfm2": SMALL | {"layer_types": ["conv", "full_attention", "conv"]},
}
CHUNKED = {
    "llama4_text": SMALL | MOE | {"intermediate_size_mlp": 64, "attention_chunk_size": 8, "no_rope_layers": [1, 0, 1]},
}
"""Attention within chunks, which must be counted from where a text begins."""


def save_random(family: str, folder: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(FAMILIES | RECURRENT | CHUNKED)[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return model


def stream(folder: Path, ids: Tensor, positions: Tensor) -> Tensor:
    """Logits, block by block."""
    reader = CheckpointReader(folder)
    runner = BlockRunner(describe(load_config(folder), reader))
    runner.load_outside(reader)
    hidden = torch.empty(*ids.shape, 32)
    for at in runner.places(None, positions, 2):
        hidden[at] = runner.embed(ids[at], positions[at])
    runner.settle(hidden, ids, positions)
    for index, block in enumerate(runner.architecture.blocks):
        runner.load(block.path, reader)
        for at in runner.places(index, positions, 2):
            hidden[at] = runner.block(index, hidden[at], ids[at], positions[at])
        runner.unload(block.path)
    return runner.logits(hidden, ids, positions)


@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_equals_the_whole_model(family: str, tmp_path: Path) -> None:
    whole = save_random(family, tmp_path)
    ids = torch.randint(3, 64, (2, 20))
    positions = torch.arange(20).expand(2, 20)

    logits = stream(tmp_path, ids, positions)

    with torch.no_grad():
        expected = whole(input_ids=ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES | RECURRENT | CHUNKED)
def test_texts_of_a_row_are_as_they_are_alone(family: str, tmp_path: Path) -> None:
    if family in CHUNKED and Version(version("transformers")) < Version("5.23"):
        pytest.skip("older transformers count chunks from the start of the row")
    save_random(family, tmp_path)
    ids = torch.randint(3, 64, (2, 20))
    positions = torch.cat([torch.arange(9), torch.arange(11)]).expand(2, 20)
    other = torch.cat([ids[:, :9].flip(1), ids[:, 9:]], dim=1)

    logits, alone = stream(tmp_path, ids, positions)[:, 9:], stream(tmp_path, ids[:, 9:], positions[:, 9:])

    torch.testing.assert_close(logits, alone, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(logits, stream(tmp_path, other, positions)[:, 9:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_a_block_is_a_linear_or_named_as_left_alone(family: str, tmp_path: Path) -> None:
    save_random(family, tmp_path)
    reader = CheckpointReader(tmp_path)
    architecture = describe(load_config(tmp_path), reader)
    linears = {f"{linear.name}.weight" for block in architecture.blocks for linear in block.linears}
    alone = {name for block in architecture.blocks for name in block.left_alone}
    matrices = {n for n in reader.names if len(reader.info(n).shape) > 1 and any(f".{i}." in n for i in range(3))}

    assert linears <= set(reader.names)
    unnamed = {m for m in matrices - linears if not any(architecture.stored.find(f"{name}.weight") == m or m.startswith(name) for name in alone)}
    assert not unnamed
