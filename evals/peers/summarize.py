"""Gather results/*.json into evals/baselines/peers.json and print the README's table: KL of every method in every row, lost rows included.

    python summarize.py [--results results] [--out ../baselines/peers.json] [--command 'the command that made them']
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

HERE = Path(__file__).resolve().parent
COMMAND = "python evals/peers/run.py --environments ENVS --work WORK --threads 1"


def gather(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each target, row and method: means over seeds, or the error where every seed failed."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for result in results:
        found.setdefault(tuple(result[name] for name in ("target", "family", "bits", "group", "method")), []).append(result)
    return [
        dict(zip(("target", "family", "bits", "group", "method"), key, strict=True)) | means(group) for key, group in found.items()
    ]


def means(group: list[dict[str, Any]]) -> dict[str, Any]:
    good = [r for r in group if "evaluation" in r]
    if not good:
        return {"error": group[0]["error"]}
    averages = {name: round(fmean(r["evaluation"][name] for r in good), 6) for name in ("kl", "kl_se_rows", "ppl", "top1_agreement", "linear_bpw")}
    cost = {name: round(fmean(r["conversion"][name] for r in good), 1) for name in ("cpu_seconds", "max_rss_mib")}
    return averages | cost | {"seeds": [r["seed"] for r in good], "failed": len(group) - len(good)}


def versions_of(results: list[dict[str, Any]]) -> dict[str, str]:
    """The peers' own versions; torch and transformers differ from one environment to another and stay with each result."""
    versions: dict[str, str] = {}
    for result in results:
        versions |= result["conversion"].get("reported", {}).get("versions", {})
    return {name: number for name, number in sorted(versions.items()) if name not in ("torch", "transformers")}


def table(entries: list[dict[str, Any]]) -> str:
    """Methods down, rows across, one table a target and family; the lowest KL of a row in bold."""
    lines: list[str] = []
    for target, family in dict.fromkeys((e["target"], e["family"]) for e in entries):
        mine = [e for e in entries if (e["target"], e["family"]) == (target, family)]
        rows = sorted({(e["bits"], e["group"]) for e in mine}, key=lambda row: (-row[0], row[1] == -1, row[1]))
        cells = {(e["method"], e["bits"], e["group"]): e for e in mine}
        best = {row: min((e["kl"] for e in mine if (e["bits"], e["group"]) == row and "kl" in e), default=None) for row in rows}
        heads = [f"{bits} bits, " + ("channel" if group == -1 else "tensor" if group == 0 else f"g{group}") for bits, group in rows]
        lines += [f"### {target}, {family}", "", f"| method | {' | '.join(heads)} |", "|---" * (len(rows) + 1) + "|"]
        for method in dict.fromkeys(e["method"] for e in mine):
            lines.append(f"| {method} | " + " | ".join(shown(cells.get((method, *row)), best[row]) for row in rows) + " |")
        lines.append("")
    return "\n".join(lines)


def shown(entry: dict[str, Any] | None, best: float | None) -> str:
    if entry is None:
        return "–"
    if "kl" not in entry:
        return "failed"
    text = f"{entry['kl']:.4f}"
    return f"{f'**{text}**' if entry['kl'] == best else text} ({entry['linear_bpw']:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=HERE.parent / "baselines/peers.json")
    parser.add_argument("--command", default=COMMAND)
    args = parser.parse_args()
    read = [json.loads(file.read_text()) for file in sorted(args.results.glob("*.json"))]
    results = [result for document in read for result in document["results"]]
    entries = gather(results)
    date, machine = max(r["date"] for r in results), read[0]["about"]["machine"]
    made = {"date": date, "command": args.command, "versions": versions_of(results), "machine": machine}
    args.out.write_text(json.dumps({"kind": "quantkit-peers", "schema_version": 1, "made": made, "rows": entries}, indent=1) + "\n")
    print(table(entries))


if __name__ == "__main__":
    main()
