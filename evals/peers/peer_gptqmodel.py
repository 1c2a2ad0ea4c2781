"""Quantize a model with GPTQModel on given token rows. Runs in GPTQModel's environment.

    python peer_gptqmodel.py MODEL OUT --tokens calib.safetensors --method gptq|awq --bits 4 --group 64 [--desc-act] [--mse 2.4] [--asym]

Its default is symmetric GPTQ with group-aware activation order. The model keeps its own type; on a CPU GPTQModel would otherwise cast
float32 models to bfloat16, which costs it accuracy.
"""

from __future__ import annotations

import os
import time

import peer

# GPTQModel 7.6 cannot start on two cores ("Virtual pool 'model_loader:cpu' requests 2 workers"); it sizes its pools from this.
if (os.cpu_count() or 1) < 4:
    os.cpu_count = lambda: 4

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import load_file
from transformers import AutoConfig


def main() -> None:
    parser = peer.make_parser(__doc__, ["gptq", "awq"])
    parser.add_argument("--desc-act", action="store_true")
    parser.add_argument("--mse", type=float, default=0.0, help="exponent of its scale search; 0, its default, is off")
    parser.add_argument("--asym", action="store_true")
    args = parser.parse_args()

    rows = load_file(args.tokens)["input_ids"]
    calibration = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows]
    chosen = {"desc_act": True} if args.desc_act else {}
    if args.method == "awq":
        chosen = {"quant_method": "awq", "format": "gemm"}
    config = QuantizeConfig(bits=args.bits, group_size=args.group, sym=args.method == "gptq" and not args.asym, mse=args.mse, **chosen)
    model = GPTQModel.load(args.model, config, dtype=AutoConfig.from_pretrained(args.model).dtype or torch.float32)
    started = time.perf_counter()
    model.quantize(calibration, batch_size=1, **({"backend": BACKEND.AWQ_TORCH} if args.method == "awq" else {}))
    quantized = time.perf_counter()
    model.save(str(args.out))
    peer.print_report(started, quantized, "gptqmodel")


if __name__ == "__main__":
    main()
