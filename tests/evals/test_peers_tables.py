"""The comparison's table of rows is whole, and what it prints says who won, by how much, and what failed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from evals.peers import environments, rows, summarize
from evals.peers.report import as_json, joined, markdown, paired_row

ROW = ("integer", 4, 64)


def kls(gap: float, seeds: int) -> dict:
    """Peer and quantkit on 40 rows of 8 tokens, quantkit's KL lower by `gap`, rows and seeds differing at random."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for seed in range(seeds):
        shared = torch.rand(40, 8, generator=generator, dtype=torch.float64)
        made["peer", ROW, seed] = (shared + 0.01 * torch.randn(40, 8, generator=generator, dtype=torch.float64)).mean(1)
        made["quantkit-x", ROW, seed] = (shared - gap).mean(1)
    return made


@pytest.mark.parametrize(("gap", "seeds", "verdict"), [(0.1, 3, "better"), (-0.1, 3, "worse"), (0.0, 3, "within error"), (0.1, 2, "too few seeds")])
def test_verdict_needs_three_seeds_and_two_standard_errors(gap, seeds, verdict):
    assert paired_row("quantkit-x", "peer", ROW, kls(gap, seeds), set()).endswith(f"| {verdict} |")


def test_two_methods_without_data_are_judged_over_rows_alone():
    assert paired_row("quantkit-x", "peer", ROW, kls(0.1, 1), {"quantkit-x", "peer"}).endswith("| better |")


def test_a_method_without_data_stands_against_every_seed_of_the_other():
    found = kls(0.1, 3)
    found = {key: kl for key, kl in found.items() if key[0] == "quantkit-x" or key[2] == 0}
    assert " of 3 |" in paired_row("quantkit-x", "peer", ROW, found, {"peer"})


def result(method: str, seed: int, kl: float | None, **about) -> dict:
    evaluation = {"kl": kl, "kl_se_rows": 0.1, "ppl": 9.0, "ppl_base": 8.0, "top1_agreement": 0.9, "linear_bpw": 4.5}
    conversion = {"wall_seconds": 1.0, "cpu_seconds": 1.0, "max_rss_mib": 100, "load_average": [1.0, 1.0], "reported": {"versions": {"p": "1"}}}
    made = {"target": "t", "family": "integer", "bits": 4, "group": 64, "method": method, "seed": seed, "data_free": False, "threads": 1}
    made |= {"date": "2026-11-25", "conversion": conversion} | about
    return made | ({"evaluation": evaluation} if kl is not None else {"error": "exit status 1: no such thing"})


def test_summary_is_the_mean_over_seeds_and_keeps_failures():
    entries = summarize.gather([result("a", 0, 0.1), result("a", 1, 0.3), result("b", 0, None), result("c", 0, 0.5), result("c", 1, None)])
    by_method = {e["method"]: e for e in entries}
    assert by_method["a"]["kl"] == pytest.approx(0.2) and by_method["a"]["seeds"] == [0, 1]
    assert by_method["b"]["error"] == "exit status 1: no such thing"
    assert by_method["c"]["failed"] == 1
    table = summarize.table(entries)
    assert "| a | **0.2000** (4.50) |" in table and "| b | failed |" in table and "| c | 0.5000 (4.50) |" in table


def test_every_row_and_every_failure_is_printed():
    results = [
        result("peer", 0, 0.2, row_kl=[0.1, 0.3]), result("quantkit-x", 0, 0.1, row_kl=[0.05, 0.15]), result("broken", 0, None),
        result("peer", 0, 0.4, family="nf4", group=64),
    ]
    about = {"model": "m", "rows": 1, "seq_len": 2, "heldout_rows": 1, "calibration": ["c"], "heldout": ["h"], "machine": {"cpu": "c", "cores": 2}}
    text = markdown("t", about, results)
    assert "## 4 bits, group 64" in text and "## nf4" in text
    assert "| broken | failed: exit status 1: no such thing" in text
    assert "| quantkit-x | peer | -0.10000 |" in text


def test_a_narrowed_run_replaces_what_it_covers_and_keeps_the_rest():
    before = [result("quantkit-gptq", 0, 0.3), result("quantkit-gptq", 1, 0.3), result("hqq", 0, 0.5)]
    made = [result("quantkit-gptq", 1, 0.2), result("quantkit-gptq", 0, 0.4, group=-1)]
    found, others = joined(before, made, ["integer"], ["hqq", "quantkit-gptq"])
    assert not others
    assert [(r["method"], r["group"], r["seed"], r["evaluation"]["kl"]) for r in found] == [
        ("hqq", 64, 0, 0.5), ("quantkit-gptq", 64, 0, 0.3), ("quantkit-gptq", 64, 1, 0.2), ("quantkit-gptq", -1, 0, 0.4),
    ]
    assert json.loads(as_json({"model": "m"}, found)) == {"about": {"model": "m"}, "results": found}


def test_results_on_other_tokens_are_not_joined_and_unknown_names_come_last():
    before = [result("hqq", 0, 0.5), result("gone", 0, 0.6, heldout="this"), result("other", 0, 0.7, heldout="that", family="lost")]
    fewer = result("fewer", 0, 0.8)
    fewer["evaluation"]["tokens"] = 5

    found, others = joined([*before, fewer], [result("quantkit-gptq", 0, 0.2, heldout="this")], ["integer"], ["hqq", "quantkit-gptq"])

    assert [r["method"] for r in found] == ["hqq", "quantkit-gptq", "gone"] and [r["method"] for r in others] == ["other", "fewer"]
    assert [r["family"] for r in joined(before[2:], [], ["integer"], [])[0]] == ["lost"]


def test_every_machine_and_number_of_threads_is_named():
    about = {"model": "m", "rows": 1, "seq_len": 2, "heldout_rows": 1, "calibration": ["c"], "heldout": ["h"], "machine": {"cpu": "new", "cores": 2}}
    text = markdown("t", about, [result("a", 0, 0.2, machine={"cpu": "old"}), result("b", 0, 0.1, threads=2)])
    assert "new and old, 1 or 2 threads of 2 cores" in text


def test_every_method_has_its_script_and_environment_and_a_known_family():
    _, peers = environments.read_table()
    families = rows.make_families()
    for method in rows.make_methods([]):
        assert set(method.families) <= families.keys(), method.name
        if method.environment:
            assert method.environment in peers
            assert (rows.HERE / f"peer_{method.environment.replace('-', '')}.py").exists()
    used = {method.environment for method in rows.make_methods([])} - {None}
    assert used == set(peers)


def test_data_free_methods_run_for_one_seed_and_groups_are_the_targets_own():
    target = next(t for t in rows.make_targets() if t.name == "stories3m")
    cases = rows.cases_of(target, list(rows.make_families().values()), rows.make_methods([]), [0, 1, 2])
    assert {c.seed for c in cases if c.method.name == "hqq"} == {0}
    assert {c.seed for c in cases if c.method.name == "autoround"} == {0, 1, 2}
    assert {c.group for c in cases if c.family.name == "integer"} == {64, 32}
    assert {c.group for c in cases if c.family.name == "nvfp4"} == {16}
    assert len({c.name for c in cases}) == len(cases)


def test_a_recipe_that_is_not_here_is_known_to_be_missing():
    methods = {m.name: m for m in rows.make_methods(["mine=command {model}", "nf4/other=command"])}
    assert rows.has_recipe(methods["quantkit-gptq"], 4) and not rows.has_recipe(methods["quantkit-gptq"], 17)
    assert rows.has_recipe(methods["quantkit-mine"], 4) and methods["quantkit-mine"].families == ["integer"]
    assert methods["quantkit-other"].families == ["nf4"]


def test_committed_results_can_be_summarized(tmp_path: Path):
    found = [r for file in (rows.HERE / "results").glob("*.json") for r in json.loads(file.read_text())["results"]]
    entries = summarize.gather(found)
    assert {e["target"] for e in entries} == {"stories3m", "reference"}
    assert all("kl" in e or "error" in e for e in entries)
