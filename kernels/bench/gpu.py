"""Check and time the Triton kernels on the GPU at hand, beside torch's operators: one command, a table and JSON. Nothing new begins after 500 s.

    python kernels/bench/gpu.py [--weights int4 fp8] [--rows 1 4 16 64 128 512 2048] [--shapes 6144x4096 4096x4096] [--json FILE]

Every product is checked against float64 before it is timed. Weights are rotated over more memory than caches hold, all calls of a rotation lie in one
CUDA graph, and methods take turns; a time is the median of the rounds, for one call. Percentages are of what a sum over memory reads on this GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from quantkit_kernels import reference

SHAPES = ["6144x4096", "4096x4096", "28672x4096", "4096x14336", "10240x8192", "8192x28672", "37888x3584", "3584x18944"]
"""Outputs by inputs of joined linears of Llama-3-8B, of Llama-3-70B and of Qwen2.5-7B."""
ROWS = [1, 4, 16, 64, 128, 512, 2048]
BATCHES = [(1, 4096), (1, 32768), (8, 4096), (32, 4096), (128, 1024)]
"""Sequences that decode, and the keys of each."""
COLD_BYTES = 4 * 60 << 20
GROUP, ROUNDS, REPLAYS, SECONDS = 128, 5, 20, 500
NF4 = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]
Run = Callable[[], Tensor]


def graph_of(runs: list[Run]) -> Callable[[], float]:
    """Seconds of one of these calls, in a graph of them all."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        runs[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()

    def timed() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / REPLAYS / len(runs)

    return timed


def medians(methods: dict[str, list[Run]]) -> dict[str, float]:
    """Seconds of each, in turns; those that fail are left out with a line."""
    graphs = {}
    for name, runs in methods.items():
        try:
            graphs[name] = graph_of(runs)
        except Exception as error:  # a peer may lack a kernel for the shape; the table says so
            print(f"  {name} does not run: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, timed in graphs.items():
            times[name].append(timed())
    return {name: statistics.median(found) for name, found in times.items()}


def levels_of(weights: str) -> tuple[int, Tensor | None]:
    """Bits of a code and what codes stand for; None for integers less 2^(bits - 1)."""
    if weights == "fp8":
        return 8, reference.every_e4m3()
    return (4, torch.tensor({"nf4": NF4, "fp4": reference.E2M1}[weights])) if weights in ("nf4", "fp4") else (int(weights.removeprefix("int")), None)


def linears(weights: str, rows: int, columns: int, counts: list[int], bandwidth: float) -> list[dict[str, Any]]:
    from quantkit_kernels.gpu import low_bit_linear

    bits, levels = levels_of(weights)
    copies = max(2, -(-COLD_BYTES * 8 // (rows * columns * bits)))
    packed, first = [], None
    for _ in range(copies):
        codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, device="cuda")
        codes = torch.where(codes & 127 == 127, codes - 1, codes) if weights == "fp8" else codes
        scale = (torch.rand(rows, columns // GROUP, device="cuda") * 0.02 + 0.001).bfloat16()
        packed.append(low_bit_linear.pack(codes, scale, 1 << (bits - 1), bits, levels))
        first = first or (codes, scale)
    codes, scale = first
    numbers = codes.double() - (1 << (bits - 1)) if levels is None else levels.cuda().double()[codes.long()]
    exact = (numbers.view(rows, -1, GROUP) * scale.double()[..., None]).view(rows, columns)
    dense = [torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(max(2, -(-COLD_BYTES // (2 * rows * columns))))]
    tiny = []
    if weights == "int4":
        halves = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
        words = torch.ops.aten._convert_weight_to_int4pack(halves, 8)
        zeros = torch.stack([scale.T, torch.zeros_like(scale.T)], dim=-1).contiguous()
        tiny = [words.clone() for _ in range(copies)]
    found = []
    for count in counts:
        x = torch.randn(count, columns, device="cuda", dtype=torch.bfloat16)
        y, expected = low_bit_linear.linear(x, packed[0], exact=False).double(), x.double() @ exact.T
        error = float((y - expected).norm() / expected.norm())
        assert error < 1e-2, f"{weights} {rows}x{columns} with {count} rows is off by {error}"
        methods = {
            "quantkit": [lambda w=w, x=x: low_bit_linear.linear(x, w, exact=False) for w in packed],
            "bf16 F.linear": [lambda w=w, x=x: functional.linear(x, w) for w in dense],
        }  # fmt: skip
        if tiny:
            methods["tinygemm"] = [lambda w=w, x=x: torch.ops.aten._weight_int4pack_mm(x, w, GROUP, zeros) for w in tiny]
        seconds = medians(methods)
        ours, read = seconds["quantkit"], rows * columns * bits / 8 + 2 * scale.numel() + 2 * count * (rows + columns)
        each = {
            "weights": weights, "shape": f"{rows}x{columns}", "rows": count, "error": error,
            "microseconds": {name: 1e6 * value for name, value in seconds.items()}, "gb_per_second": read / ours / 1e9,
            "of_bandwidth": read / ours / bandwidth, "tflops": 2 * count * rows * columns / ours / 1e12,
            "times": {name: value / ours for name, value in seconds.items() if name != "quantkit"},
        }  # fmt: skip
        found.append(each)
        speed = f"{each['gb_per_second']:6.0f} GB/s {each['of_bandwidth']:5.0%} {each['tflops']:6.0f} TFLOP/s"
        others = "  ".join(f"{ratio:.2f} x {name}" for name, ratio in each["times"].items())
        print(f"{weights:>5} {rows}x{columns} x {count:<5} {1e6 * ours:8.1f} us {speed}  {others}", flush=True)
    return found


def decoding(bandwidth: float) -> list[dict[str, Any]]:
    """Attention of Llama-3-8B's heads, one token a sequence, over shuffled blocks."""
    from quantkit_kernels.gpu.paged_attention import paged_attention

    heads, kv_heads, head_dim, block_size, found = 32, 8, 128, 16, []
    for batch, length in BATCHES:
        per_sequence = -(-length // block_size)
        shape = (batch * per_sequence, kv_heads, head_dim, block_size)
        k = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        v = torch.randn(shape[0], kv_heads, block_size, head_dim, device="cuda", dtype=torch.bfloat16)
        tables = torch.randperm(shape[0], device="cuda", dtype=torch.int32).view(batch, per_sequence)
        sequence = torch.arange(batch, device="cuda", dtype=torch.int32)
        position = torch.full_like(sequence, length - 1)
        q = torch.randn(batch, heads, head_dim, device="cuda", dtype=torch.bfloat16)
        attend = partial(paged_attention, q, k, v, None, None, tables, sequence, position, scale=head_dim**-0.5)
        one = (tables, sequence[:1], position[:1])
        y, wanted = attend()[:1].float(), reference.paged_attention(q[:1].float(), k.float(), v.float(), None, None, *one, scale=head_dim**-0.5)
        error = float((y - wanted).norm() / wanted.norm())
        assert error < 1e-2, f"attention of {batch} x {length} is off by {error}"
        seconds, read = medians({"quantkit": [attend] * 4})["quantkit"], 4 * k.numel()
        rates = {"microseconds": 1e6 * seconds, "of_bandwidth": read / seconds / bandwidth}
        found.append({"batch": batch, "length": length, "error": error} | rates)
        speed = f"{read / seconds / 1e9:6.0f} GB/s {rates['of_bandwidth']:5.0%}"
        print(f"decode {batch:>4} x {length:<6} {1e6 * seconds:8.1f} us {speed}", flush=True)
    return found


def read_bandwidth() -> float:
    """Bytes a second of a sum over memory."""
    memory = torch.ones(1 << 30, dtype=torch.int32, device="cuda")
    return memory.numel() * 4 / medians({"sum": [lambda: memory.sum()]})["sum"]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", choices=("int4", "int8", "fp8", "nf4", "fp4"), default=["int4", "fp8", "nf4"])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="of activations")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxK")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use here")
    import triton

    started, bandwidth = time.monotonic(), read_bandwidth()
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__, "read_gb_per_second": bandwidth / 1e9,
             "date": time.strftime("%Y-%m-%d"), "group": GROUP}  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    attention, products, left_out = decoding(bandwidth), [], []
    for weights in args.weights:
        for shape in args.shapes:
            if time.monotonic() - started > SECONDS:
                left_out.append(f"{weights} {shape}")
                continue
            products += linears(weights, *map(int, shape.split("x")), args.rows, bandwidth)
    for weights in args.weights:
        for count in args.rows:
            rates = [each["times"]["bf16 F.linear"] for each in products if (each["weights"], each["rows"]) == (weights, count)]
            if rates:
                print(f"{weights} x {count}: {statistics.geometric_mean(rates):.2f} times as fast as bf16 F.linear, over {len(rates)} shapes")
    print(f"left out for time: {', '.join(left_out) or 'nothing'}")
    if args.json:
        args.json.write_text(json.dumps({"about": about, "linears": products, "attention": attention, "left_out": left_out}, indent=1) + "\n")


if __name__ == "__main__":
    main()
