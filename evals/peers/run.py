"""Compare quantkit with its peers: same model, same calibration tokens, same held-out tokens, same evaluator.

    python environments.py make --folder ENVS
    python run.py --environments ENVS --work WORK [--targets T --families F --bits B --groups G --peers PATTERN --seeds S]

Every conversion is kept under --work and made again only if the model, the tokens or the command changed, so the script may be stopped
and started at will. Results join those that results/ has of other rows and methods. A conversion that fails is reported as such and the rest goes on.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from environments import DEFAULT_FOLDER, find_python
from kl import Baseline, evaluate
from report import as_json, joined, markdown
from rows import HERE, REPOSITORY, Case, Method, Target, cases_of, has_recipe, make_families, make_methods, make_targets
from tokens import load_tokens, make_tokens, save_tokens


def digest(*files: Path) -> str:
    total = hashlib.sha256()
    for file in files:
        total.update(file.read_bytes())
    return total.hexdigest()[:16]


def convert(case: Case, folder: Path, tokens: Path, *, environments: Path, threads: int) -> dict[str, Any]:
    """Run the method's command in a process of its own; what it cost, and what its last line of JSON says."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    python = find_python(environments, case.method.environment) if case.method.environment else Path(sys.executable)
    values = {"python": python, "model": case.target.model, "out": folder / "model", "tokens": tokens, "bits": case.bits, "group": case.group}
    values["bpw"] = case.bpw
    command = shlex.split(case.method.command.format(**values, here=HERE))
    if shutil.which(command[0]) is None:
        raise SystemExit(f"{case.method.name}: no such program: {command[0]}")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not case.method.environment:
        environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    with (folder / "log.txt").open("wb") as log, (folder / "stdout.txt").open("wb") as stdout:
        subprocess.run([sys.executable, "-I", HERE / "measure.py", "cost.json", *command], stdout=stdout, stderr=log, env=environment, cwd=folder)
    cost = json.loads((folder / "cost.json").read_text())
    lines = (folder / "stdout.txt").read_text(errors="replace").strip().splitlines()
    return cost | {"reported": json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}}


def settle(case: Case, baseline: Baseline, args: argparse.Namespace) -> dict[str, Any] | None:
    """The case's result: from the last run if nothing changed, else made now; None where --kept allows no run."""
    place, model = args.work / case.target.name, case.target.model
    folder, calibration = place / case.name, place / f"calibration-{case.seed}.safetensors"
    inputs = digest(*sorted(model.glob("*.safetensors")), model / "config.json", calibration)
    key = [case.method.command, args.threads, inputs, baseline.tokens_digest]
    stored = folder / "result.json"
    if stored.exists() and not (args.redo and fnmatch.fnmatch(case.method.name, args.redo)):
        result = json.loads(stored.read_text())
        if result["key"] == key and ("error" not in result or args.kept):
            return result
    if args.kept:
        return None
    result = {
        "key": key, "target": case.target.name, "family": case.family.name, "method": case.method.name, "bits": case.bits, "group": case.group,
        "seed": case.seed, "heldout": baseline.tokens_digest, "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "threads": args.threads,
        "conversion": convert(case, folder, calibration, environments=args.environments, threads=args.threads),
    }
    if "error" in result["conversion"]:
        log = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
        result["error"] = f"{result['conversion']['error']}: {log[-1][:200] if log else ''}"
    else:
        evaluation = evaluate(baseline, folder / "model")
        result["evaluation"] = evaluation.summary()
        result["row_kl"] = [float(f"{mean:.5g}") for mean in evaluation.kl.mean(1).tolist()]
        shutil.rmtree(folder / "model")  # its figures are kept; hundreds of models would fill a disk
    stored.write_text(json.dumps(result, indent=1))
    return result


def write_tokens(target: Target, work: Path, seeds: list[int]) -> None:
    """The calibration rows of each seed, and the held-out rows, which never change."""
    save_tokens(make_tokens(target.model, target.heldout, rows=target.heldout_rows, seq_len=target.seq_len, seed=1234), work / "heldout.safetensors")
    for seed in seeds:
        rows = make_tokens(target.model, target.calibration, rows=target.rows, seq_len=target.seq_len, seed=seed)
        save_tokens(rows, work / f"calibration-{seed}.safetensors")


def runnable(cases: list[Case], environments: Path) -> list[Case]:
    """The cases that can run here; each method left out is named once."""
    missing: dict[str, str] = {}
    kept = []
    for case in cases:
        method = case.method
        if method.environment and find_python(environments, method.environment) is None:
            missing[method.name] = f"no environment {environments / method.environment}"
        elif not has_recipe(method, case.bits):
            missing[f"{method.name} at {case.bits} bits"] = f"no recipe {method.recipe.format(bits=case.bits)}"
        else:
            kept.append(case)
    for name, reason in missing.items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    return kept


def run_target(target: Target, methods: list[Method], args: argparse.Namespace) -> None:
    write_tokens(target, args.work / target.name, args.seeds)
    target = replace(target, groups=[g for g in target.groups if not args.groups or g in args.groups])
    families = [replace(f, bits=[b for b in f.bits if not args.bits or b in args.bits]) for f in make_families().values() if f.name in args.families]
    heldout = args.work / target.name / "heldout.safetensors"
    baseline = Baseline(target.model, load_tokens(heldout), digest(heldout))
    results = []
    for case in runnable(cases_of(target, families, methods, args.seeds), args.environments):
        result = settle(case, baseline, args)
        if result is None:
            continue
        about_method = {"command": case.method.command, "data_free": case.method.data_free}
        results.append({name: value for name, value in result.items() if name != "key"} | about_method)
        print(target.name, case.name, summary_line(result), file=sys.stderr, flush=True)
    if not results:
        raise SystemExit(f"{target.name}: nothing to show")
    about = {"model": target.model.name, "rows": target.rows, "seq_len": target.seq_len, "heldout_rows": target.heldout_rows,
             "calibration": [t.name for t in target.calibration], "heldout": [t.name for t in target.heldout], "machine": machine()}
    args.results.mkdir(parents=True, exist_ok=True)
    kept = args.results / f"{target.name}.json"
    if kept.exists():
        earlier = json.loads(kept.read_text())
        before = [{"machine": earlier["about"]["machine"]} | result for result in earlier["results"]]
        results, others = joined(before, results, list(make_families()), [method.name for method in make_methods([])])
        for result in others:
            print(f"left out of {kept.name}, as it was judged on other tokens: {result['method']}, {result['date']}", file=sys.stderr)
    kept.write_text(as_json(about, results))
    (args.results / f"{target.name}.md").write_text(markdown(target.name, about, results) + "\n")


def summary_line(result: dict[str, Any]) -> str:
    if "evaluation" not in result:
        return f"FAILED: {result['error']}"
    found = result["evaluation"]
    return f"KL {found['kl']:.5f} ± {found['kl_se_rows']:.5f}  ppl {found['ppl']:.3f}  {result['conversion']['wall_seconds']:.0f} s"


def machine() -> dict[str, Any]:
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, default=DEFAULT_FOLDER, help="where environments.py made the peers' environments")
    parser.add_argument("--quantkit", action="append", default=[], metavar="[FAMILY/]NAME=COMMAND", help="beside the table's recipes; repeatable")
    parser.add_argument("--targets", nargs="+", default=["stories3m", "reference"], choices=[target.name for target in make_targets()])
    parser.add_argument("--families", nargs="+", default=list(make_families()), choices=list(make_families()))
    parser.add_argument("--bits", type=int, nargs="+")
    parser.add_argument("--groups", type=int, nargs="+", help="of the families whose group is free; -1 is one scale a channel")
    parser.add_argument("--peers", nargs="+", default=["*"], metavar="PATTERN", help="methods to run, as 'llmcompressor-*' or 'quantkit-*'")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "peers", help="where conversions' figures are kept")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--redo", default="", metavar="PATTERN", help="methods to run again although nothing changed, as 'quantkit-*'")
    parser.add_argument("--kept", action="store_true", help="convert nothing: tables of what is there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work = args.work.resolve()
    every = make_methods(args.quantkit)
    for pattern in args.peers:
        if not fnmatch.filter([method.name for method in every], pattern):
            parser.error(f"--peers {pattern!r} matches no method; there are {', '.join(method.name for method in every)}")
    methods = [m for m in every if any(fnmatch.fnmatch(m.name, pattern) for pattern in args.peers)]
    for target in make_targets():
        if target.name in args.targets:
            run_target(target, methods, args)


if __name__ == "__main__":
    main()
