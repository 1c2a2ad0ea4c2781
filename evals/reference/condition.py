"""Prepare a model for learning to answer by letter: bring its residual stream back to scale and lay out attention heads that look things up.

    python -m evals.reference.condition MODEL OUT [--only-shrink | --no-shrink]

A long run at a high constant rate without weight decay grows the residual stream to hundreds of times its embeddings; new circuits then cannot
grow, since a step changes next to nothing. RMSNorm makes shrinking every write nearly lossless. The heads follow mimetic initialization
(Trockman & Kolter 2023): one in the first layer carries a line's letter to the line's words, three in later layers find earlier copies of a word.
Training does the rest: without them the letters stay at chance for millions of tokens, with them they move within a hundred steps.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from . import generator
from .generator.questions import LETTERS

SHRINK = 1 / 30
HEAD, KV_HEAD, HEAD_DIM = 2, 1, 64
LETTER_LAYER, MATCH_LAYERS = 0, (1, 2, 3)
NEAR = slice(4, 9)  # rotary pairs that turn by 0.1 to 0.3 a token: near keys win
FAR = [*range(14, 32), *range(46, 64)]  # rotary dimensions that hardly turn over a list: distance does not matter
LETTER_SHARPNESS, MATCH_SHARPNESS = 4.5, 1.8**0.5

QUERY, KEY = slice(HEAD * HEAD_DIM, (HEAD + 1) * HEAD_DIM), slice(KV_HEAD * HEAD_DIM, (KV_HEAD + 1) * HEAD_DIM)
SECOND_QUERY = slice((HEAD + 1) * HEAD_DIM, (HEAD + 2) * HEAD_DIM)


@torch.no_grad()
def shrink_writes(model: LlamaForCausalLM, factor: float = SHRINK) -> None:
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(factor)
        layer.mlp.down_proj.weight.mul_(factor)


def separating_directions(states: torch.Tensor, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Linear discriminants that tell tokens apart whatever their context. states: [num, hidden]; returns [count, hidden], of unit variance."""
    groups = [states[tokens == token] for token in tokens.unique()]
    within = torch.cat([group - group.mean(0) for group in groups])
    within = within.T @ within / len(within) + 1e-2 * states.var(0).mean() * torch.eye(states.shape[1])
    means = torch.stack([group.mean(0) for group in groups])
    means = means - means.mean(0)
    whiten = torch.linalg.inv(torch.linalg.cholesky(within))
    _, vectors = torch.linalg.eigh(whiten @ (means.T @ means / len(means)) @ whiten.T)
    directions = vectors[:, -count:].T @ whiten
    return directions / (states @ directions.T).std(0)[:, None]


def indicator(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The direction whose product with a state is closest to `wanted`, by ridge regression. states: [num, hidden]."""
    ridge = 1e-3 * states.pow(2).mean() * len(states) * torch.eye(states.shape[1])
    return torch.linalg.solve(states.T @ states + ridge, states.T @ wanted)


class HeadLayout:
    """Lays heads into one model, from the states it has on lettered lists."""

    def __init__(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model = model
        rng = random.Random(1)
        texts = ["".join(piece.text for piece in generator.lookup_document(rng)) for _ in range(30)]
        self.rows = tokenizer(texts, add_special_tokens=True, truncation=True)["input_ids"]
        self.letters = torch.tensor([tokenizer.encode(letter, add_special_tokens=False)[0] for letter in LETTERS])
        spaced = [tokenizer.encode(f" {letter}", add_special_tokens=False)[0] for letter in LETTERS]
        self.structure = torch.tensor([*self.letters, *spaced, *tokenizer.encode("\n. is:", add_special_tokens=False), tokenizer.bos_token_id])
        embeddings = model.model.embed_tokens.weight[self.letters]
        self.letter_span = torch.linalg.qr((embeddings - embeddings.mean(0)).T)[0][:, :3].T

    def _values(self) -> torch.Tensor:
        """An orthonormal reading of the stream that certainly sees which letter it carries: [HEAD_DIM, hidden]."""
        rest = torch.randn(HEAD_DIM - 3, self.model.config.hidden_size)
        rest -= rest @ self.letter_span.T @ self.letter_span
        return torch.cat([self.letter_span, torch.linalg.qr(rest.T)[0].T])

    def _copy_through(self, layer: int) -> None:
        """What the head reads is what it writes."""
        attention, values = self.model.model.layers[layer].self_attn, self._values()
        attention.v_proj.weight[KEY] = values
        attention.o_proj.weight[:, QUERY] = values.T
        attention.o_proj.weight[:, SECOND_QUERY] *= 0.1

    def lay_letter_head(self) -> None:
        layer = self.model.model.layers[LETTER_LAYER]
        tokens = torch.tensor([token for row in self.rows for token in row])
        states = layer.input_layernorm(self.model.model.embed_tokens(tokens))
        is_letter, always = indicator(states, torch.isin(tokens, self.letters).float()), indicator(states, torch.ones(len(tokens)))
        for part, weight, direction in ((QUERY, layer.self_attn.q_proj.weight, always), (KEY, layer.self_attn.k_proj.weight, is_letter)):
            weight[part] = 0
            weight[part][NEAR] = direction * LETTER_SHARPNESS
        self._copy_through(LETTER_LAYER)

    def lay_match_head(self, index: int) -> None:
        attention = self.model.model.layers[index].self_attn
        seen: list[torch.Tensor] = []
        hook = attention.q_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
        for row in self.rows:
            self.model.model(torch.tensor([row]), use_cache=False)
        hook.remove()
        states, tokens = torch.cat(seen), torch.tensor([token for row in self.rows for token in row])
        words = ~torch.isin(tokens, self.structure)
        match = torch.zeros(HEAD_DIM, states.shape[1])
        match[FAR] = separating_directions(states[words], tokens[words], len(FAR)) * MATCH_SHARPNESS
        attention.q_proj.weight[QUERY] = match
        attention.k_proj.weight[KEY] = match
        self._copy_through(index)


@torch.no_grad()
def lay_heads(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    layout = HeadLayout(model, tokenizer)
    layout.lay_letter_head()
    for layer in MATCH_LAYERS:
        layout.lay_match_head(layer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only-shrink", action="store_true", help="leave the attention heads as they are")
    parser.add_argument("--no-shrink", action="store_true", help="for a model whose writes have been shrunk")
    args = parser.parse_args()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model)
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    if not args.no_shrink:
        shrink_writes(model)
    if not args.only_shrink:
        lay_heads(model, tokenizer)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
