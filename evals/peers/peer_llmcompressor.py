"""Quantize a model with llm-compressor at its own defaults, on given token rows. Runs in llm-compressor's environment.

    python peer_llmcompressor.py MODEL OUT --tokens calib.safetensors --method gptq --bits 4 --group 64 [--observer imatrix_mse] [--asym]

The last line printed is JSON: seconds, memory, versions.
"""

from __future__ import annotations

import time

START = time.perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402
import resource  # noqa: E402
from importlib.metadata import version  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402
from datasets import Dataset  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: E402
from llmcompressor.modifiers.quantization import QuantizationModifier  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def make_recipe(args: argparse.Namespace) -> GPTQModifier | QuantizationModifier:
    weights = QuantizationArgs(
        num_bits=args.bits, type="int", symmetric=not args.asym, strategy="group", group_size=args.group, observer=args.observer
    )
    modifier = GPTQModifier if args.method == "gptq" else QuantizationModifier
    return modifier(config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--method", choices=["gptq", "rtn"], default="gptq")
    parser.add_argument("--observer", help="llm-compressor's weight observer; its default is min-max")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--asym", action="store_true")
    args = parser.parse_args()

    rows = load_file(args.tokens)["input_ids"]
    dataset = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()})
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    started = time.perf_counter()
    needs_data = args.method == "gptq" or args.observer == "imatrix_mse"
    data = {"dataset": dataset, "num_calibration_samples": len(rows), "max_seq_length": rows.shape[1]} if needs_data else {}
    oneshot(model=model, processor=tokenizer, recipe=make_recipe(args), **data)
    quantized = time.perf_counter()
    model.save_pretrained(args.out, save_compressed=True)
    tokenizer.save_pretrained(args.out)
    print(json.dumps({
        "quantize_seconds": round(quantized - started, 2),
        "process_seconds": round(time.perf_counter() - START, 2),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("llmcompressor", "compressed-tensors", "transformers", "torch")},
    }))


if __name__ == "__main__":
    main()
