"""Quantize a model with bitsandbytes through transformers, without data. Runs in bitsandbytes' environment.

    python peer_bitsandbytes.py MODEL OUT --method nf4|fp4|int8 [--double]
"""

from __future__ import annotations

import time

import peer
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig


def main() -> None:
    parser = peer.make_parser(__doc__, ["nf4", "fp4", "int8"])
    parser.add_argument("--double", action="store_true", help="quantize the scales too")
    args = parser.parse_args()
    if args.method == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        dtype = AutoConfig.from_pretrained(args.model).dtype
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=args.method, bnb_4bit_use_double_quant=args.double, bnb_4bit_compute_dtype=dtype
        )
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", quantization_config=config, device_map="cpu")
    quantized = time.perf_counter()
    model.save_pretrained(args.out)
    peer.print_report(started, quantized, "bitsandbytes")


if __name__ == "__main__":
    main()
