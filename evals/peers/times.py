"""Time two methods in turn on one model, whole processes with their imports, and quote the ratio: noise of the machine hits both.

    python times.py --llmcompressor ENV/bin/python --quantkit 'gptq=quantkit convert ...' [--pairs 5] [--against llmcompressor-gptq-imatrix]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

from run import Case, convert, make_methods, make_targets, write_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llmcompressor", type=Path)
    parser.add_argument("--gptqmodel", type=Path)
    parser.add_argument("--quantkit", action="append", required=True, metavar="NAME=COMMAND")
    parser.add_argument("--against", default="llmcompressor-gptq-imatrix", help="the method to compare with, as evals/peers/README.md names it")
    parser.add_argument("--target", default="stories3m")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "compare-times")
    args = parser.parse_args()
    (target,) = (t for t in make_targets() if t.name == args.target)
    methods = {m.name: m for m in make_methods(args)}
    wanted = [methods[args.against], next(m for name, m in methods.items() if name.startswith("quantkit-"))]
    write_tokens(target, args.work.resolve() / target.name, [0])
    tokens = args.work.resolve() / target.name / "calibration-0.safetensors"
    tools = {"llmcompressor": str(args.llmcompressor), "gptqmodel": str(args.gptqmodel)}
    ratios: dict[str, list[float]] = {"wall_seconds": [], "cpu_seconds": []}
    for number in range(args.pairs):
        costs = []
        for method in wanted:
            case = Case(target, method, args.bits, 0)
            cost = convert(case, args.work.resolve() / target.name / case.name, tokens, tools=tools, threads=args.threads)
            if "error" in cost:
                raise SystemExit(f"{method.name} failed: {cost['error']}")
            costs.append(cost)
        for name, found in ratios.items():
            found.append(costs[1][name] / costs[0][name])
        shown = ", ".join(f"{m.name} {c['wall_seconds']:.2f} s ({c['cpu_seconds']:.2f} s of CPU)" for m, c in zip(wanted, costs, strict=True))
        print(f"pair {number + 1}: {shown}, load {os.getloadavg()[0]:.1f}", flush=True)
    for name, found in ratios.items():
        print(f"{name}: {wanted[1].name} takes {statistics.median(found):.2f} of {wanted[0].name}'s ({min(found):.2f} to {max(found):.2f})")


if __name__ == "__main__":
    main()
