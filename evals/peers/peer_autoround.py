"""Quantize a model with auto-round on given token rows. Runs in auto-round's environment.

    python peer_autoround.py MODEL OUT --tokens calib.safetensors --bits 4 --group 64 [--iterations 200] [--asym]

Signed gradient descent on the rounding, at its defaults (200 steps of 8 rows a block), written as GPTQ.
"""

from __future__ import annotations

import time

import peer
import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoTokenizer


def main() -> None:
    parser = peer.make_parser(__doc__, ["signround"])
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--asym", action="store_true")
    args = parser.parse_args()
    rows = load_file(args.tokens)["input_ids"]
    model = peer.load_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = torch.utils.data.DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows], batch_size=8)
    started = time.perf_counter()
    rounder = AutoRound(
        model, tokenizer, scheme=f"W{args.bits}A16", bits=args.bits, group_size=args.group, sym=not args.asym, iters=args.iterations,
        dataset=data, nsamples=len(rows), seqlen=rows.shape[1], batch_size=8, seed=0, device_map="cpu",
    )
    rounder.quantize_and_save(str(args.out), format="auto_gptq")
    quantized = time.perf_counter()
    for inner in [path for path in args.out.iterdir() if path.is_dir()]:  # it may write into a folder of its own naming
        for file in inner.iterdir():
            file.rename(args.out / file.name)
        inner.rmdir()
    peer.print_report(started, quantized, "auto-round")


if __name__ == "__main__":
    main()
