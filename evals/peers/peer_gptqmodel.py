"""Quantize a model with GPTQModel at its own defaults, on given token rows. Runs in GPTQModel's environment.

    python peer_gptqmodel.py MODEL OUT --tokens calib.safetensors --bits 4 --group 64 [--desc-act] [--mse 2.4] [--asym]

Its default is symmetric GPTQ with group-aware activation order. The model keeps its own type; on a CPU GPTQModel would otherwise cast
float32 models to bfloat16, which costs it accuracy. The last line printed is JSON: seconds, memory, versions.
"""

from __future__ import annotations

import time

START = time.perf_counter()

import os  # noqa: E402

# GPTQModel 7.6 cannot start on two cores ("Virtual pool 'model_loader:cpu' requests 2 workers"); it sizes its pools from this.
if (os.cpu_count() or 1) < 4:
    os.cpu_count = lambda: 4

import argparse  # noqa: E402
import json  # noqa: E402
import resource  # noqa: E402
from importlib.metadata import version  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from gptqmodel import GPTQModel, QuantizeConfig  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoConfig  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--desc-act", action="store_true")
    parser.add_argument("--mse", type=float, default=0.0, help="exponent of its scale search; 0, its default, is off")
    parser.add_argument("--asym", action="store_true")
    args = parser.parse_args()

    rows = load_file(args.tokens)["input_ids"]
    calibration = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows]
    chosen = {"desc_act": True} if args.desc_act else {}
    config = QuantizeConfig(bits=args.bits, group_size=args.group, sym=not args.asym, mse=args.mse, **chosen)
    model = GPTQModel.load(args.model, config, dtype=AutoConfig.from_pretrained(args.model).dtype or torch.float32)
    started = time.perf_counter()
    model.quantize(calibration, batch_size=1)
    quantized = time.perf_counter()
    model.save(str(args.out))
    print(json.dumps({
        "quantize_seconds": round(quantized - started, 2),
        "process_seconds": round(time.perf_counter() - START, 2),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("gptqmodel", "transformers", "torch")},
    }), flush=True)


if __name__ == "__main__":
    main()
