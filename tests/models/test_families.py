"""Every family of decoders that transformers can build small: block by block equals the whole model, and no matrix of a block goes unnamed.

A checkpoint is what `save_pretrained` writes, in the names and layout that the family's files have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from quantkit.checkpoint.reader import CheckpointReader
from quantkit.errors import SourceError
from quantkit.models.architecture import describe, load_config
from tests.models.test_streaming import stream

WIDTH = 32
COMMON: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 64, "sliding_window": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "num_experts_per_token": 2,
    "moe_intermediate_size": 16, "moe_k": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_shared_experts": 1,
    "shared_expert_intermediate_size": 16, "first_k_dense_replace": 1, "moe_layer_start_index": 1, "num_dense_layers": 1, "decoder_sparse_step": 1,
}  # fmt: skip
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_key_head_dim": 8, "linear_value_head_dim": 8,
          "linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4, "linear_num_heads": 4, "linear_head_dim": 8}
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_chunk_size": 8, "mamba_d_ssm": 64}
GPT = {"n_embd": WIDTH, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_inner": 64, "n_ctx": 64, "vocab_size": 64, "rotary_dim": 4,
       "bos_token_id": 1, "eos_token_id": 2}
SLIDING = {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
CONV = {"layer_types": ["conv", "full_attention", "conv"], "block_ff_dim": 64}
GEMMA4 = SLIDING | {"global_head_dim": 8, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64}
HYBRID = {"layers_block_type": ["mamba", "hybrid", "mamba"], "mamba_d_state": 8, "n_mamba_heads": 4, "mamba_ngroups": 1, "mamba_expand": 2,
          "num_key_value_heads": 4, "mamba_dt_rank": 4, "num_mem_blocks": 1, "adapter_rank": 8, "chunk_size": 8}

PLAIN = (
    "afmoe", "apertus", "arcee", "beam", "biogpt", "bitnet", "cohere2_moe", "cwm", "diffllama", "doge", "dots1", "ernie4_5", "ernie4_5_moe",
    "exaone_moe", "flex_olmo", "flint", "glm", "glm4", "glm4_moe", "gpt_neox_japanese", "gpt_oss", "granite_swa", "granitemoe", "granitemoe_swa",
    "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3", "jais2", "jetmoe", "kolibri1",
    "laguna", "mellum", "mimo_v2_flash", "minimax_m2", "minimax_m3_vl_text", "ministral", "nanochat", "nemotron", "olmo", "olmo3", "persimmon",
    "phi", "phimoe", "seed_oss", "solar_open", "vaultgemma",
)
FAMILIES: dict[str, dict[str, Any]] = {family: {} for family in PLAIN} | {
    "aria_text": {"moe_num_shared_experts": 1}, "axk1": LATENT, "bailing_hybrid": LATENT | LINEAR, "bamba": MAMBA | {"attn_layer_indices": [1]},
    "codegen": GPT, "ctrl": GPT | {"dff": 64}, "gpt_bigcode": GPT, "gptj": GPT, "openai-gpt": GPT,
    "cohere2": SLIDING, "exaone4": SLIDING,
    "dbrx": {"d_model": WIDTH, "n_heads": 4, "n_layers": 3, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": WIDTH}},
    "deepseek_v2": LATENT, "deepseek_v3": LATENT, "deepseek_v32": LATENT | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8},
    "falcon_h1": MAMBA, "falcon_mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "gemma4_text": GEMMA4, "glm4_moe_lite": LATENT,
    "inkling2_text": {"unpadded_vocab_size": 60},
    "gpt_neo": {"num_layers": 3, "num_heads": 4, "attention_types": [[["global", "local", "global"], 1]], "window_size": 8},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention", "mamba"], "shared_intermediate_size": 32},
    "granitemoeshared": {"shared_intermediate_size": 32},
    "jamba": {"mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
              "expert_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2_moe": CONV, "lfm3": CONV, "llama4_text": {"intermediate_size_mlp": 64, "attention_chunk_size": 8, "interleave_moe_layer_step": 1},
    "longcat_flash": LATENT | {"num_layers": 2, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 16, "zero_expert_num": 2},
    "minicpm3": LATENT, "minimax": {"layer_types": LINEAR["layer_types"], "block_size": 8},
    "modernbert-decoder": {"local_attention": 8, "global_attn_every_n_layers": 2},
    "mpt": {"d_model": WIDTH, "n_heads": 4, "n_layers": 3, "max_seq_len": 64, "expansion_ratio": 2},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe"], "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 8,
                   "chunk_size": 8, "moe_shared_expert_intermediate_size": 16},
    "olmo_hybrid": LINEAR, "qwen3_5_moe_text": LINEAR, "qwen3_5_text": LINEAR, "qwen3_next": LINEAR,
    "recurrent_gemma": {"lru_width": WIDTH, "attention_window_size": 8, "block_types": ["recurrent", "recurrent", "attention"]},
    "rwkv": {"attention_hidden_size": WIDTH, "context_length": 64}, "youtu": LATENT, "zamba": HYBRID, "zamba2": HYBRID,
    "zamba2 with shared blocks": HYBRID | {"num_hidden_layers": 4, "layers_block_type": ["hybrid", "hybrid", "mamba", "hybrid"], "num_mem_blocks": 2,
                                           "tie_word_embeddings": True},
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gemma3n_text": (GEMMA4 | {"laurel_rank": 8, "intermediate_size": [64] * 3, "activation_sparsity_pattern": [0.0] * 3}, "take states of shape"),
    "gemma4_text": (GEMMA4 | {"num_kv_shared_layers": 1}, "block 2 reads 'full_attention' of an earlier block"),
    "hy_v4": ({}, "take states of shape"),
    "hrm_text": ({}, "pass on more than hidden states"),
    "zaya": ({"num_experts_per_tok": 1}, "block 0 passes on more than hidden states"),
}


def save_random(family: str, folder: Path, settings: dict[str, Any]) -> torch.nn.Module:
    torch.manual_seed(0)
    model_type = family.partition(" ")[0]
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers knows no {model_type}")
    config = AutoConfig.for_model(model_type, **COMMON | settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return model


def some_tokens() -> tuple[Tensor, Tensor]:
    return torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(0)), torch.arange(20).expand(2, 20)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_equals_the_whole_model_and_every_matrix_has_a_name(family: str, tmp_path: Path) -> None:
    whole = save_random(family, tmp_path, FAMILIES[family])
    ids, positions = some_tokens()

    logits = stream(tmp_path, ids, positions)

    with torch.no_grad():
        expected = whole(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected.float(), atol=5e-5, rtol=1e-4)
    assert not unnamed(tmp_path)


def unnamed(folder: Path) -> set[str]:
    """Stored matrices of the blocks that are neither linears nor named as left alone."""
    reader = CheckpointReader(folder)
    architecture = describe(load_config(folder), reader)
    matrices = {
        source
        for block in architecture.blocks for path, parameter in block.module.named_parameters(block.path) if sum(n > 1 for n in parameter.shape) > 1
        for source in architecture.stored.sources(path)
    }  # fmt: skip
    linears = {f"{linear.name}.weight" for block in architecture.blocks for linear in block.linears}
    assert linears <= set(reader.names)
    alone = {name for block in architecture.blocks for name in block.left_alone}
    modules = {name for name in alone if any(name == path for path, _ in architecture.model.named_modules())}
    parameters = {path for path, _ in architecture.model.named_parameters() if path in alone or path.rpartition(".")[0] in modules}
    named = {source for path in parameters for source in architecture.stored.sources(path)} | {f"{name}.weight" for name in alone}
    return matrices - linears - named


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", REFUSED)
def test_blocks_that_need_more_than_hidden_states_are_refused(family: str, tmp_path: Path) -> None:
    settings, reason = REFUSED[family]
    save_random(family, tmp_path, settings)

    with pytest.raises(SourceError, match=f"cannot be run block by block: .*{reason}"):
        stream(tmp_path, *some_tokens())
