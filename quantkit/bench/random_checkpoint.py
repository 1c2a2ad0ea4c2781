"""A Llama checkpoint of any size with random weights and the reference model's tokenizer, written as it is drawn."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from quantkit.checkpoint.output import copy_side_files
from quantkit.checkpoint.source import resolve
from quantkit.checkpoint.writer import CheckpointWriter, TensorPlan


def write_random_checkpoint(folder: Path, *, layers: int, hidden: int, intermediate: int, seed: int = 0, **config_values: int) -> int:
    """Write a bfloat16 model with normal weights; the size of its weights in bytes.

    Args:
        hidden: a multiple of 128; heads are 128 wide (64 below 512), a quarter of them for keys and values.
        config_values: further values of the config that replace these, such as head_dim=64, num_attention_heads=32, vocab_size=128256.
    """
    folder.mkdir(parents=True)
    reference = resolve("reference").folder
    copy_side_files(reference, folder)
    head = 128 if hidden >= 512 else 64
    heads = hidden // head
    config = json.loads((reference / "config.json").read_text()) | {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers, "head_dim": head,
        "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 4),
    } | config_values  # fmt: skip
    plan = _tensors(config)
    generator = torch.Generator().manual_seed(seed)
    with CheckpointWriter(folder, plan, max_shard_size=1_000_000_000) as writer:
        for tensor in plan:
            drawn = torch.empty(tensor.shape, dtype=torch.bfloat16)
            writer.add(tensor.name, drawn.fill_(1.0) if len(tensor.shape) == 1 else drawn.normal_(0, 0.02, generator=generator))
        writer.close()
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return sum(tensor.nbytes for tensor in plan)


def _tensors(config: dict) -> list[TensorPlan]:
    hidden, intermediate, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {"model.embed_tokens": (config["vocab_size"], hidden), "model.norm": (hidden,)}
    for i in range(config["num_hidden_layers"]):
        block = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries), "post_attention_layernorm": (hidden,), "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden), "mlp.down_proj": (hidden, intermediate),
        }  # fmt: skip
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
    return [TensorPlan(f"{name}.weight", torch.bfloat16, shape) for name, shape in shapes.items()]
