"""The comparison's results as JSON, and as markdown: one table of what each method cost and lost, one of paired differences."""

from __future__ import annotations

import json
from functools import reduce
from operator import getitem
from statistics import fmean
from typing import Any

import torch

FEWEST_SEEDS = 3
"""Fewer calibration draws allow no verdict."""
Results = list[dict[str, Any]]
Row = tuple[str, int, int]
"""Family, bits, group."""
Kls = dict[tuple[str, Row, int], torch.Tensor]
"""By method, row and seed: the mean KL of each held-out row of tokens."""


def mean_over(found: Results, *path: str) -> float:
    return fmean(reduce(getitem, path, result) for result in found)


def method_row(name: str, found: Results) -> str:
    good = [r for r in found if "evaluation" in r]
    if not good:
        return f"| {name} | failed: {found[0]['error'].replace('|', '/')} | | | | | | | |"
    per_seed = " ".join(f"{r['evaluation']['kl']:.4f}" for r in good)
    kl, error = mean_over(good, "evaluation", "kl"), mean_over(good, "evaluation", "kl_se_rows")
    failed = f" ({len(found) - len(good)} failed)" if len(good) < len(found) else ""
    return (
        f"| {name}{failed} | {mean_over(good, 'evaluation', 'linear_bpw'):.3f} | {kl:.4f} ± {error:.4f} | {per_seed} "
        f"| {mean_over(good, 'evaluation', 'ppl'):.3f} | {mean_over(good, 'evaluation', 'top1_agreement'):.4f} "
        f"| {mean_over(good, 'conversion', 'wall_seconds'):.1f} | {mean_over(good, 'conversion', 'cpu_seconds'):.1f} "
        f"| {max(r['conversion']['max_rss_mib'] for r in good)} |"
    )


def paired_row(ours: str, peer: str, row: Row, kls: Kls, data_free: set[str]) -> str | None:
    """KL(ours) - KL(peer) on the same rows of tokens: errors over rows (of the mean over seeds) and over seeds, added in quadrature."""
    mine = {seed: kl for (name, r, seed), kl in kls.items() if (name, r) == (ours, row)}
    theirs = {seed: kl for (name, r, seed), kl in kls.items() if (name, r) == (peer, row)}
    if not mine or not theirs:
        return None
    # A method without calibration has one result for all seeds; where both have none, rows alone decide.
    is_data_free = data_free >= {ours, peer}
    if peer in data_free:
        theirs = dict.fromkeys(mine, next(iter(theirs.values())))
    elif ours in data_free:
        mine = dict.fromkeys(theirs, next(iter(mine.values())))
    seeds = sorted(mine.keys() & theirs.keys())
    if not seeds:
        return None
    difference = torch.stack([mine[s] - theirs[s] for s in seeds])  # [seeds, rows]
    over_rows = difference.mean(0).std() / difference.shape[1] ** 0.5
    by_seed = difference.mean(1)
    mean, relative = by_seed.mean().item(), by_seed.mean().item() / fmean(kl.mean().item() for kl in theirs.values())
    shown, verdict = "–", "too few seeds"
    if is_data_free:
        verdict = "within error" if abs(mean) <= 2 * over_rows else "better" if mean < 0 else "worse"
    elif len(seeds) >= FEWEST_SEEDS:
        over_seeds = by_seed.std() / len(seeds) ** 0.5
        error = (over_rows**2 + over_seeds**2).sqrt().item()
        shown, verdict = f"{over_seeds:.5f}", "within error" if abs(mean) <= 2 * error else "better" if mean < 0 else "worse"
    return (
        f"| {ours} | {peer} | {mean:+.5f} | {over_rows:.5f} | {shown} | {100 * relative:+.1f} % "
        f"| {int((by_seed < 0).sum())} of {len(seeds)} | {verdict} |"
    )


def row_of(result: dict[str, Any]) -> Row:
    return result["family"], result["bits"], result["group"]


def row_title(row: Row) -> str:
    family, bits, group = row
    return f"{bits} bits, {'one scale a channel' if group == -1 else f'group {group}'}" if family == "integer" else family


def joined(before: Results, made: Results, families: list[str], methods: list[str]) -> tuple[Results, Results]:
    """The results of this run in place of, or beside, those of earlier ones, and those left out: judged on other tokens, or other numbers of them.

    Families and methods are in the order given, unknown ones last.
    """
    def place(result: dict[str, Any]) -> tuple[Any, ...]:
        family, bits, group, method, seed = (result[name] for name in ("family", "bits", "group", "method", "seed"))
        ranks = (names.index(name) if name in names else len(names) for name, names in ((family, families), (method, methods)))
        return next(ranks), family, -bits, group == -1, -group, next(ranks), method, seed

    tokens = {(r.get("heldout"), r["evaluation"].get("tokens")) for r in made if "evaluation" in r}
    others = [r for r in before if "evaluation" in r and tokens and not any(_are_same(r, *each) for each in tokens)]
    by_place = {place(r): r for r in before if r not in others} | {place(r): r for r in made}
    return [by_place[key] for key in sorted(by_place)], others


def _are_same(result: dict[str, Any], heldout: str | None, count: int | None) -> bool:
    """Whether it was judged on these tokens; results of before 2026-11-28 say only how many they were."""
    return result.get("heldout", heldout) == heldout and result["evaluation"].get("tokens") == count


def as_json(about: dict[str, Any], results: Results) -> str:
    """One line a result."""
    lines = ",\n".join(json.dumps(result) for result in results)
    return f'{{"about": {json.dumps(about)},\n"results": [\n{lines}\n]}}\n'


def markdown(target: str, about: dict[str, Any], results: Results) -> str:
    machines = sorted({r.get("machine", about["machine"])["cpu"] for r in results})
    threads = " or ".join(str(count) for count in sorted({r["threads"] for r in results}))
    kls = {(r["method"], row_of(r), r["seed"]): torch.tensor(r["row_kl"], dtype=torch.float64) for r in results if "row_kl" in r}
    days = sorted(r["date"][:10] for r in results)
    loads = [load for r in results for load in r["conversion"]["load_average"]]
    versions: dict[str, str] = {}
    for result in results:
        versions |= result["conversion"].get("reported", {}).get("versions", {})
    base = next((r["evaluation"]["ppl_base"] for r in results if "evaluation" in r), float("nan"))
    lines = [
        f"# {target}", "",
        f"Model `{about['model']}`, perplexity of the baseline {base:.3f}. Calibration: {about['rows']} x {about['seq_len']} tokens of "
        f"{', '.join(about['calibration'])}; held out: {about['heldout_rows']} x {about['seq_len']} tokens of {', '.join(about['heldout'])}.",
        f"{days[0]} to {days[-1]}, {' and '.join(machines)}, {threads} threads of {about['machine']['cores']} cores, "
        f"load average {min(loads):.1f} to {max(loads):.1f} during the conversions (above the number of threads, times are upper bounds). "
        + ", ".join(f"{name} {number}" for name, number in sorted(versions.items()) if name not in ("torch", "transformers")) + ".", "",
    ]
    for row in dict.fromkeys(row_of(r) for r in results):
        found = [r for r in results if row_of(r) == row]
        names = list(dict.fromkeys(r["method"] for r in found))
        lines += [
            f"## {row_title(row)}", "",
            "| method | linear-bpw | KL ± se (rows) | KL by seed | ppl | top-1 | wall s | CPU s | peak RSS MiB |", "|---" * 9 + "|",
            *[method_row(n, [r for r in found if r["method"] == n]) for n in names], "",
        ]
        data_free = {r["method"] for r in found if r["data_free"]}
        pairs = [paired_row(o, p, row, kls, data_free) for o in names if o.startswith("quantkit-") for p in names if not p.startswith("quantkit-")]
        if any(pairs):
            lines += ["Paired difference of KL, row by row of held-out tokens; better or worse beyond two standard errors:", "",
                      "| ours | peer | KL difference | se rows | se seeds | relative | seeds won | verdict |", "|---" * 8 + "|",
                      *[p for p in pairs if p], ""]
    return "\n".join(lines)
