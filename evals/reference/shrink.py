"""Let a model learn again whose residual stream has outgrown its embeddings, by shrinking all that is written into the stream.

    python -m evals.reference.shrink MODEL OUT

A long run at a high constant rate without weight decay grows the residual stream to hundreds of times its embeddings; new circuits then cannot
grow, since a step changes next to nothing. RMSNorm makes shrinking every write nearly lossless.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SHRINK = 1 / 30


@torch.no_grad()
def shrink_writes(model: LlamaForCausalLM, factor: float = SHRINK) -> None:
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(factor)
        layer.mlp.down_proj.weight.mul_(factor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    shrink_writes(model)
    model.save_pretrained(args.out)
    PreTrainedTokenizerFast.from_pretrained(args.model).save_pretrained(args.out)


if __name__ == "__main__":
    main()
