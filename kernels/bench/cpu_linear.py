"""Time linear layers of low-bit weights on this CPU, ours beside torch's operators, in one run and in turn.

    python kernels/bench/cpu_linear.py [--weights int4] [--threads 1] [--group 32] [--rows 1 4 16 128] [--shapes 2048x2048 8192x2048] [--json FILE]

Weights are rotated over more memory than caches hold. A time is the fastest of many, as a busy machine only ever adds; run it again where the first
line says that the machine was busy. `GB/s` is of the bytes that our kernel reads of the weight, beside what one or all threads read of plain memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from quantkit_kernels.cpu import int4_linear, low_bit_linear
from quantkit_kernels.reference import E2M1, every_e4m3

WEIGHTS = {"int4": (4, None), "fp4": (4, torch.tensor(E2M1)), "table": (4, torch.linspace(-1, 1, 16) ** 3), "fp8": (8, every_e4m3())}
"""Bits of a code and what codes stand for: integers, the floats of MXFP4 and NVFP4, a table such as NF4's, 8-bit floats."""
SHAPES = ["2048x2048", "512x2048", "8192x2048", "2048x8192", "4096x4096", "14336x4096", "4096x14336"]
"""Outputs by inputs of the linears of Llama-3.2-1B and Llama-3-8B."""
COLD_BYTES = 96 << 20
SECONDS = 0.3
Run = Callable[[Tensor], Tensor]


def methods(weights: str, rows: int, columns: int, group: int) -> dict[str, list[Run]]:
    """What computes x W^T, each over as many weights as caches do not hold."""
    bits, levels = WEIGHTS[weights]
    copies = max(2, COLD_BYTES * 8 // (rows * columns * bits))
    names = ["int8", "exact", "torch int4", "float32", "dequantize + float32", "torch int8 dynamic"]
    made: dict[str, list[Run]] = {name: [] for name in names}
    for _ in range(copies):
        codes = torch.randint(0, 2**bits - bits // 8 * 129, (rows, columns), dtype=torch.uint8)  # of 8-bit floats those of one sign are numbers
        scale = (torch.rand(rows, columns // group) * 0.02 + 0.001).half()
        ours = low_bit_linear.pack(codes, scale, 8, bits, levels)
        made["exact"].append(lambda x, w=ours: low_bit_linear.linear(x, w, exact=True))
        if bits == 4 and low_bit_linear.why_not(columns, group, bits, exact=False) is None:
            made["int8"].append(lambda x, w=ours: low_bit_linear.linear(x, w, exact=False))
        if weights == "int4":
            theirs = int4_linear.pack(codes, scale, 8)
            made["torch int4"].append(lambda x, w=theirs: int4_linear.linear(x, *w, group))
    for _ in range(max(2, copies // 8)):  # four bytes a weight, and codes beside
        codes, weight = torch.randint(0, 16, (rows, columns), dtype=torch.uint8), torch.randn(rows, columns)
        of_code = levels if levels is not None else torch.arange(-8.0, 8)
        by_group = torch.rand(rows, columns // group, 1)
        made["float32"].append(lambda x, w=weight: functional.linear(x, w))
        made["dequantize + float32"].append(
            lambda x, c=codes, s=by_group, of_code=of_code: functional.linear(x, (of_code[c.int()].view(rows, -1, group) * s).view(rows, columns))
        )
    for _ in range(max(2, copies // 2)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dynamic = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(columns, rows, bias=False)), {nn.Linear})
        made["torch int8 dynamic"].append(dynamic)
    return {name: runs for name, runs in made.items() if runs}


def fastest(runs: list[Run], x: Tensor) -> float:
    """Seconds of the fastest call."""
    best, calls, until = float("inf"), 0, time.perf_counter() + SECONDS
    while calls < 2 * len(runs) or time.perf_counter() < until:
        start = time.perf_counter()
        runs[calls % len(runs)](x)
        best, calls = min(best, time.perf_counter() - start) if calls >= len(runs) else best, calls + 1
        if calls > len(runs) and time.perf_counter() > until + 4 * SECONDS:
            break
    return best


def read_bandwidth() -> float:
    """GB/s of a sum over memory."""
    memory = torch.ones(COLD_BYTES // 4, dtype=torch.int64)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        memory.sum()
        best = min(best, time.perf_counter() - start)
    return memory.numel() * 8 / best / 1e9


def processor() -> str:
    """Its name, or its kind where the system tells no name."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", choices=WEIGHTS, default="int4")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--group", type=int, default=32, help="columns of a scale")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 128], help="of activations")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxK")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if reason := low_bit_linear.why_not(args.group, args.group, 4):
        parser.error(f"the native kernel cannot be run: {reason}")
    torch.set_num_threads(args.threads)
    torch.backends.quantized.engine = "fbgemm"
    bandwidth = read_bandwidth()
    about = {
        "weights": args.weights, "processor": processor(), "instructions": torch.backends.cpu.get_cpu_capability(), "threads": args.threads,
        "torch": torch.__version__, "group": args.group, "read_gb_per_second": round(bandwidth, 1), "load_average": os.getloadavg()[0],
    }  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    found = []
    for shape in args.shapes:
        rows, columns = map(int, shape.split("x"))
        runs = methods(args.weights, rows, columns, args.group)
        for count in args.rows:
            x = torch.randn(count, columns)
            seconds = {name: fastest(each, x) for name, each in runs.items()}
            read = rows * columns * (WEIGHTS[args.weights][0] / 8 + 2 / args.group) / seconds.get("int8", seconds["exact"]) / 1e9
            times = {name: round(1e3 * each, 4) for name, each in seconds.items()}
            found.append({"shape": shape, "rows": count, "milliseconds": times, "gb_per_second": round(read, 2)})
            gflops = " ".join(f"{name} {2 * count * rows * columns / s / 1e9:.0f}" for name, s in seconds.items())
            print(f"{shape:>11} x {count:<4} GFLOP/s: {gflops}; {read:.1f} GB/s, {100 * read / bandwidth:.0f}%", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"about": about, "results": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
