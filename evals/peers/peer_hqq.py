"""Quantize a model's linears with HQQ, without data. Runs in HQQ's environment.

    python peer_hqq.py MODEL OUT --bits 4 --group 64

HQQ's own Quantizer at its defaults (half-quadratic search of the zero point), along the input (axis 1). It writes no checkpoint that
others read: the weights are dequantized from what it stores, half-precision scales and zero points, and the bits counted.
"""

from __future__ import annotations

import time

import peer
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear


def main() -> None:
    args = peer.make_parser(__doc__, ["hqq"]).parse_args()
    model = peer.load_model(args.model)
    weights, bits = {}, {}
    started = time.perf_counter()
    for name, linear in peer.linears(model).items():
        group = linear.in_features if args.group == -1 else args.group
        config = BaseQuantizeConfig(nbits=args.bits, group_size=group, axis=1)
        # Half precision, HQQ's default for what it stores; float32 would store scales of 32 bits.
        layer = HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu", initialize=True, del_orig=False)
        scale, zero = layer.meta["scale"], layer.meta["zero"]
        codes = layer.unpack(dtype=torch.float32).reshape(-1, group)[: scale.numel()]
        weights[name] = ((codes - zero.float().reshape(-1, 1)) * scale.float().reshape(-1, 1)).reshape(linear.weight.shape)
        bits[name] = args.bits * linear.weight.numel() + 8 * (scale.nbytes + zero.nbytes)
    quantized = time.perf_counter()
    peer.save_dequantized(args.out, args.model, model, weights, bits)
    peer.print_report(started, quantized, "hqq")


if __name__ == "__main__":
    main()
