"""Quantize a model's linears with torchao, without data. Runs in torchao's environment.

    python peer_torchao.py MODEL OUT --method int --bits 4 --group 64        # IntxWeightOnlyConfig; --hqq for its search of scales
    python peer_torchao.py MODEL OUT --method int8|fp8                       # Int8WeightOnlyConfig, Float8WeightOnlyConfig

Its tensors are written by torchao's own classes only, so the weights are dequantized by them; codes are counted at their bits, not at the
byte that torchao keeps each in.
"""

from __future__ import annotations

import time

import peer
import torch
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_
from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm


def main() -> None:
    parser = peer.make_parser(__doc__, ["int", "int8", "fp8"])
    parser.add_argument("--hqq", action="store_true")
    args = parser.parse_args()
    model = peer.load_model(args.model)
    if args.method == "int":
        search = {"intx_choose_qparams_algorithm": IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY} if args.hqq else {}
        granularity = PerAxis(0) if args.group == -1 else PerGroup(args.group)
        config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{args.bits}"), granularity=granularity, **search)
    else:
        config = Int8WeightOnlyConfig() if args.method == "int8" else Float8WeightOnlyConfig()
    started = time.perf_counter()
    quantize_(model, config, filter_fn=lambda module, name: isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"))
    quantized = time.perf_counter()
    weights, bits = {}, {}
    for name, linear in peer.linears(model).items():
        stored = linear.weight
        weights[name] = stored.dequantize()
        bits[name] = (args.bits if args.method == "int" else 8) * weights[name].numel() + 8 * stored.scale.nbytes
    for name, linear in peer.linears(model).items():
        linear.weight = torch.nn.Parameter(weights[name], requires_grad=False)
    peer.save_dequantized(args.out, args.model, model, weights, bits)
    peer.print_report(started, quantized, "torchao")


if __name__ == "__main__":
    main()
