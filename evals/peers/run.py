"""Compare quantkit with its peers: same model, same calibration tokens, same held-out tokens, same evaluator.

    python run.py --llmcompressor ENV/bin/python --gptqmodel ENV/bin/python \\
        --quantkit 'gptq=quantkit convert {model} -o {out} --recipe w{bits}a16-gptq --group-size {group} --calib {tokens}'

Every conversion is kept under --work and made again only if the model, the tokens or the command changed, so the script may be stopped
and started at will. Results go to results/. A conversion that fails is reported as such and the rest goes on.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kl import evaluate
from report import markdown
from safetensors.torch import load_file, save_file
from tokens import load_tokens, make_tokens, save_tokens

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
DATA = Path(os.environ.get("QUANTKIT_TEST_DATA", REPOSITORY.parent / "shared")).resolve()


@dataclass(frozen=True)
class Target:
    """A model with the texts it is calibrated and judged on."""

    name: str
    model: Path
    group: int
    calibration: list[Path]
    heldout: list[Path]
    rows: int
    seq_len: int
    heldout_rows: int


@dataclass(frozen=True)
class Method:
    """A way to quantize: a command with {model} {out} {tokens} {bits} {group} to fill in."""

    name: str
    command: str
    uses_tokens: bool = True


@dataclass(frozen=True)
class Case:
    """One conversion to make and judge."""

    target: Target
    method: Method
    bits: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method.name}-b{self.bits}-g{self.target.group}" + (f"-s{self.seed}" if self.method.uses_tokens else "")


def make_targets() -> list[Target]:
    texts = DATA / "data"
    stories, wiki = texts / "tinystories", texts / "wikitext2"
    reference = REPOSITORY / "evals/reference/model"
    prose = REPOSITORY / "evals/reference/splits/prose.jsonl"
    return [
        Target("stories3m", texts / "stories3m-hf", 64, [stories / "sample_b.txt"], [stories / "valid_sample_a.txt"], 128, 256, 208),
        Target(
            "reference", reference if reference.exists() else DATA / "reference/model", 128,
            [wiki / "train_sample_paragraphs.txt", stories / "sample_b.txt"],
            [wiki / "wiki.test.raw", stories / "valid_sample_a.txt", *([prose] if prose.exists() else [])], 128, 512, 105,
        ),
    ]


def make_methods(args: argparse.Namespace) -> list[Method]:
    common = "{model} {out} --tokens {tokens} --bits {bits} --group {group}"
    methods = []
    if args.llmcompressor:
        peer = f"{{llmcompressor}} {{here}}/peer_llmcompressor.py {common}"
        methods += [
            Method("llmcompressor-rtn", f"{peer} --method rtn", uses_tokens=False),
            Method("llmcompressor-gptq", f"{peer} --method gptq"),
            Method("llmcompressor-gptq-mse", f"{peer} --method gptq --observer memoryless_mse"),
            Method("llmcompressor-gptq-imatrix", f"{peer} --method gptq --observer imatrix_mse"),
        ]
    if args.gptqmodel:
        peer = f"{{gptqmodel}} {{here}}/peer_gptqmodel.py {common}"
        methods += [Method("gptqmodel", peer), Method("gptqmodel-mse", f"{peer} --mse 2.4")]
    for given in args.quantkit:
        name, _, command = given.partition("=")
        methods.append(Method(f"quantkit-{name}", command))
    return methods


def digest(*files: Path) -> str:
    total = hashlib.sha256()
    for file in files:
        total.update(file.read_bytes())
    return total.hexdigest()[:16]


def convert(case: Case, folder: Path, tokens: Path, *, tools: dict[str, str], threads: int) -> dict[str, Any]:
    """Run the method's command in a process of its own; what it cost, and what its last line of JSON says."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    values = {"model": case.target.model, "out": folder / "model", "tokens": tokens, "bits": case.bits, "group": case.target.group, "here": HERE}
    command = shlex.split(case.method.command.format(**values, **tools))
    if shutil.which(command[0]) is None:
        raise SystemExit(f"{case.method.name}: no such program: {command[0]}")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (folder / "log.txt").open("wb") as log, (folder / "stdout.txt").open("wb") as stdout:
        subprocess.run([sys.executable, "-I", HERE / "measure.py", "cost.json", *command], stdout=stdout, stderr=log, env=environment, cwd=folder)
    cost = json.loads((folder / "cost.json").read_text())
    lines = (folder / "stdout.txt").read_text(errors="replace").strip().splitlines()
    return cost | {"reported": json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}}


def settle(case: Case, work: Path, *, tools: dict[str, str], threads: int, redo: str) -> dict[str, Any]:
    """The case's result: from the last run if nothing changed, else made now."""
    folder, model = work / case.target.name / case.name, case.target.model
    calibration = work / case.target.name / f"calibration-{case.seed}.safetensors"
    heldout = work / case.target.name / "heldout.safetensors"
    key = [case.method.command, threads, digest(*sorted(model.glob("*.safetensors")), model / "config.json", calibration, heldout)]
    stored = folder / "result.json"
    if stored.exists() and not (redo and fnmatch.fnmatch(case.method.name, redo)):
        result = json.loads(stored.read_text())
        if result["key"] == key and "error" not in result["conversion"]:
            return result
    result = {
        "key": key, "target": case.target.name, "method": case.method.name, "bits": case.bits, "group": case.target.group, "seed": case.seed,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "threads": threads,
        "conversion": convert(case, folder, calibration, tools=tools, threads=threads),
    }
    if "error" not in result["conversion"]:
        evaluation = evaluate(model, folder / "model", load_tokens(heldout))
        save_file({"kl": evaluation.kl}, folder / "kl.safetensors")
        result["evaluation"] = evaluation.summary()
    stored.write_text(json.dumps(result, indent=1))
    return result


def write_tokens(target: Target, work: Path, seeds: list[int]) -> None:
    """The calibration rows of each seed, and the held-out rows, which never change."""
    save_tokens(make_tokens(target.model, target.heldout, rows=target.heldout_rows, seq_len=target.seq_len, seed=1234), work / "heldout.safetensors")
    for seed in seeds:
        rows = make_tokens(target.model, target.calibration, rows=target.rows, seq_len=target.seq_len, seed=seed)
        save_tokens(rows, work / f"calibration-{seed}.safetensors")


def run_target(target: Target, methods: list[Method], args: argparse.Namespace) -> None:
    write_tokens(target, args.work / target.name, args.seeds)
    tools = {"llmcompressor": str(args.llmcompressor), "gptqmodel": str(args.gptqmodel)}
    results, kls = [], {}
    cases = [Case(target, m, bits, seed) for seed in args.seeds for bits in args.bits for m in methods if m.uses_tokens or seed == args.seeds[0]]
    for case in cases:
        result = settle(case, args.work, tools=tools, threads=args.threads, redo=args.redo)
        results.append({name: value for name, value in result.items() if name != "key"} | {"command": case.method.command})
        if "evaluation" in result:
            kls[case.method.name, case.bits, case.seed] = load_file(args.work / target.name / case.name / "kl.safetensors")["kl"]
        print(target.name, case.name, summary_line(result), file=sys.stderr, flush=True)
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    about = {"model": target.model.name, "rows": target.rows, "seq_len": target.seq_len, "heldout_rows": target.heldout_rows,
             "calibration": [t.name for t in target.calibration], "heldout": [t.name for t in target.heldout], "machine": machine}
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / f"{target.name}.json").write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")
    text = markdown(target.name, about, results, kls)
    (args.results / f"{target.name}.md").write_text(text)
    print(text)


def summary_line(result: dict[str, Any]) -> str:
    if "evaluation" not in result:
        return f"FAILED: {result['conversion']['error']}"
    found = result["evaluation"]
    return f"KL {found['kl']:.5f} ± {found['kl_se_rows']:.5f}  ppl {found['ppl']:.3f}  {result['conversion']['wall_seconds']:.0f} s"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llmcompressor", type=Path, help="python of an environment with llm-compressor")
    parser.add_argument("--gptqmodel", type=Path, help="python of an environment with GPTQModel")
    parser.add_argument("--quantkit", action="append", default=[], metavar="NAME=COMMAND", help="may be repeated, for several recipes")
    parser.add_argument("--targets", nargs="+", default=["stories3m", "reference"])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "compare", help="where conversions are kept")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--redo", default="", metavar="PATTERN", help="methods to run again although nothing changed, as 'quantkit-*'")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work = args.work.resolve()
    for target in make_targets():
        if target.name in args.targets:
            run_target(target, make_methods(args), args)


if __name__ == "__main__":
    main()
