"""Time two methods in turn on one model, whole processes with their imports, and quote the ratios: noise of the machine hits both.

    python times.py --environments ENVS [--ours quantkit-gptq] [--against llmcompressor-gptq-imatrix] [--pairs 5]
    python times.py --environments ENVS --ours quantkit-awq --against llmcompressor-awq
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

from environments import DEFAULT_FOLDER
from rows import Case, make_families, make_methods, make_targets
from run import convert, runnable, write_tokens

MEASURED = {"wall_seconds": "time", "cpu_seconds": "processor time", "max_rss_mib": "peak memory"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--quantkit", action="append", default=[], metavar="[FAMILY/]NAME=COMMAND")
    parser.add_argument("--ours", default="quantkit-gptq", help="a method of rows.toml, or of --quantkit")
    parser.add_argument("--against", default="llmcompressor-gptq-imatrix", help="a method of rows.toml")
    parser.add_argument("--target", default="stories3m")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, help="default: the target's first")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "peers-times")
    args = parser.parse_args()
    work, methods = args.work.resolve(), {m.name: m for m in make_methods(args.quantkit)}
    if unknown := {args.ours, args.against} - methods.keys():
        parser.error(f"no such method: {', '.join(sorted(unknown))}; there are {', '.join(methods)}")
    target = next(t for t in make_targets() if t.name == args.target)
    family = make_families()[methods[args.against].families[0]]
    group = args.group or (family.groups or target.groups)[0]
    cases = [Case(target, family, methods[name], args.bits, group, 0) for name in (args.against, args.ours)]
    if runnable(cases, args.environments) != cases:
        raise SystemExit("one of the two cannot run here")
    write_tokens(target, work / target.name, [0])
    ratios: dict[str, list[float]] = {name: [] for name in MEASURED}
    for number in range(args.pairs):
        costs = []
        for case in cases:
            tokens = work / target.name / "calibration-0.safetensors"
            costs.append(convert(case, work / target.name / case.name, tokens, environments=args.environments, threads=args.threads))
            if "error" in costs[-1]:
                raise SystemExit(f"{case.method.name} failed: {costs[-1]['error']}")
        for name, found in ratios.items():
            found.append(costs[1][name] / costs[0][name])
        shown = ", ".join(
            f"{c.method.name} {cost['wall_seconds']:.2f} s ({cost['cpu_seconds']:.2f} s of CPU, {cost['max_rss_mib']} MiB)"
            for c, cost in zip(cases, costs, strict=True)
        )
        print(f"pair {number + 1}: {shown}, load {os.getloadavg()[0]:.1f}", flush=True)
    for name, found in ratios.items():
        print(f"{MEASURED[name]}: {args.ours} takes {statistics.median(found):.2f} of {args.against}'s ({min(found):.2f} to {max(found):.2f})")


if __name__ == "__main__":
    main()
