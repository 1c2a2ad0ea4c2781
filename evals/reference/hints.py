"""Losses of the hints in training documents: what a place in a question should know half-way through the network, and where it should look.

Four-choice questions take three steps, each useless without the others: to recall the answer, to recognize it among the choices, to fetch its letter.
From the letters alone this was not learned in millions of tokens; with every step told, it is learned in some hundred thousand. Hints shape the
training only: nothing is added to the model.
"""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

HEAD = 2


def residual_stream(model: LlamaForCausalLM, ids: torch.Tensor) -> list[torch.Tensor]:
    """The stream before each layer and after the last: num layers + 1 times [rows, context, hidden]."""
    llama = model.model
    depths = [llama.embed_tokens(ids)]
    places = torch.arange(ids.shape[1], device=ids.device)[None]
    rotary = llama.rotary_emb(depths[0], places)
    for layer in llama.layers:
        depths.append(layer(depths[-1], attention_mask=None, position_ids=places, position_embeddings=rotary))
    return depths


def says_losses(model: LlamaForCausalLM, depths: list[torch.Tensor], says: torch.Tensor) -> dict[str, torch.Tensor]:
    """Cross entropy of predicting a token early. says: [num, 4] of row, place, depth, token."""
    losses = {}
    for depth in says[:, 2].unique().tolist():
        row, place, _, token = says[says[:, 2] == depth].T
        logits = model.lm_head(model.model.norm(depths[depth][row, place]))
        losses[f"says_{depth}"] = torch.nn.functional.cross_entropy(logits.float(), token, reduction="none")
    return losses


def looks_losses(model: LlamaForCausalLM, depths: list[torch.Tensor], looks: torch.Tensor) -> dict[str, torch.Tensor]:
    """Cross entropy of one head's attention with the place to look at. looks: [num, 4] of row, place, layer, place looked at."""
    losses = {}
    for index in looks[:, 2].unique().tolist():
        row, place, _, wanted = looks[looks[:, 2] == index].T
        scores = _attention_scores(model, index, depths[index])[row, place]
        seen = torch.arange(scores.shape[1], device=scores.device) <= place[:, None]
        losses[f"looks_{index}"] = torch.nn.functional.cross_entropy(scores.float().masked_fill(~seen, float("-inf")), wanted, reduction="none")
    return losses


def _attention_scores(model: LlamaForCausalLM, index: int, stream: torch.Tensor) -> torch.Tensor:
    """Of the head HEAD, before mask and softmax: [rows, context, context]."""
    layer, size = model.model.layers[index], model.config.head_dim
    kv_head = HEAD * model.config.num_key_value_heads // model.config.num_attention_heads
    states = layer.input_layernorm(stream)
    query = torch.nn.functional.linear(states, layer.self_attn.q_proj.weight[HEAD * size : (HEAD + 1) * size])
    key = torch.nn.functional.linear(states, layer.self_attn.k_proj.weight[kv_head * size : (kv_head + 1) * size])
    rotary = model.model.rotary_emb(stream, torch.arange(stream.shape[1], device=stream.device)[None])
    query, key = apply_rotary_pos_emb(query[:, None], key[:, None], *rotary)
    return (query @ key.mT)[:, 0] * size**-0.5
