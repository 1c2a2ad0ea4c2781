"""Quantize a model with llm-compressor on given token rows. Runs in llm-compressor's environment.

    python peer_llmcompressor.py MODEL OUT --tokens calib.safetensors --method gptq --bits 4 --group 64 [--observer imatrix_mse] [--asym]

Settings are its own defaults unless an option says otherwise. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import time

import peer
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from safetensors.torch import load_file
from transformers import AutoTokenizer

PRESETS = {
    "w8a8": "W8A8", "fp8-static": "FP8", "fp8-dynamic": "FP8_DYNAMIC", "fp8-block": "FP8_BLOCK", "nvfp4": "NVFP4A16", "mxfp4": "MXFP4A16",
}
INTEGERS = ["gptq", "rtn", "awq"]
DATA_FREE = {"rtn", "fp8-dynamic", "fp8-block", "nvfp4", "mxfp4"}


def make_recipe(args: argparse.Namespace) -> list[GPTQModifier | QuantizationModifier | AWQModifier]:
    family, _, is_gptq = args.method.partition("+")
    rounding = GPTQModifier if is_gptq or args.method == "gptq" else QuantizationModifier
    if family in PRESETS:
        return [rounding(targets=["Linear"], scheme=PRESETS[family], ignore=["lm_head"])]
    strategy = {"strategy": "channel"} if args.group == -1 else {"strategy": "group", "group_size": args.group}
    weights = QuantizationArgs(num_bits=args.bits, type="int", symmetric=not args.asym, observer=args.observer, **strategy)
    scheme = {"config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}, "ignore": ["lm_head"]}
    return [*([AWQModifier(duo_scaling=args.duo_scaling)] if args.method == "awq" else []), rounding(**scheme)]


def main() -> None:
    parser = peer.make_parser(__doc__, [*INTEGERS, *PRESETS, *(f"{name}+gptq" for name in PRESETS)])
    parser.add_argument("--observer", help="llm-compressor's weight observer; its default is min-max")
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--duo-scaling", choices=["both"], default=True, help="AWQ: half of the grid without the weights' share")
    args = parser.parse_args()
    if not torch.accelerator.is_available():
        torch.Tensor.pin_memory = lambda self, *_, **__: self  # its AWQ pins memory for an accelerator that is not there

    rows = load_file(args.tokens)["input_ids"]
    dataset = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()})
    model = peer.load_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    started = time.perf_counter()
    needs_data = args.method not in DATA_FREE or args.observer == "imatrix_mse"
    data = {"dataset": dataset, "num_calibration_samples": len(rows), "max_seq_length": rows.shape[1]} if needs_data else {}
    oneshot(model=model, processor=tokenizer, recipe=make_recipe(args), **data)
    quantized = time.perf_counter()
    model.save_pretrained(args.out, save_compressed=True)
    tokenizer.save_pretrained(args.out)
    peer.print_report(started, quantized, "llmcompressor", "compressed-tensors")


if __name__ == "__main__":
    main()
