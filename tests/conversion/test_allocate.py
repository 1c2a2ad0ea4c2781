"""Bits allocated by measurement: the budget is kept, engines' joint layers agree, one measurement serves all budgets, a KL asked for is reached."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from quantkit.conversion.allocation_file import CAUTION, USUAL_FACTOR, Measurement, Trial
from quantkit.conversion.convert import Silent, convert
from quantkit.conversion.options import ConvertOptions
from quantkit.conversion.prepare import plan_conversion
from quantkit.conversion.report import ConversionReport
from quantkit.conversion.verify import VerifyOptions, verify
from quantkit.errors import FormatError, Interrupted, RecipeError, UsageError
from quantkit.formats.opened import OpenedCheckpoint
from tests.conversion.conftest import contents, save_tiny
from tests.conversion.test_verify import failed

Options = Callable[..., ConvertOptions]
TRIAL = {"linear_bpw": 4.0, "predicted": 0.1, "measured": 0.1}


@pytest.fixture(scope="session")
def measurement(stories: Path, options: Options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was measured of stories with the default candidates."""
    folder = tmp_path_factory.mktemp("measured")
    convert(str(stories), folder / "out", options(target_bpw=4.4, allocation=str(folder / "kept.json")))
    return folder / "kept.json"


@pytest.fixture
def kept(measurement: Path, tmp_path: Path) -> Path:
    """A copy to be written to."""
    return Path(shutil.copy(measurement, tmp_path / "kept.json"))


class Heard(Silent):
    """A listener that notes the stages, and can stop at the first block."""

    def __init__(self, stops: bool = False) -> None:
        self.stages: list[str] = []
        self.stops = stops

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def block(self, index: int, results: object, *, resumed: bool) -> None:
        if self.stops:
            raise KeyboardInterrupt

    @property
    def measured(self) -> bool:
        return any("sensitivity" in text for text in self.stages)


def schemes(out: Path) -> dict[str, str]:
    return {name: scheme.name for name, scheme in OpenedCheckpoint(out).schemes.items()}


def outcome(report: ConversionReport) -> dict:
    assert report.allocation is not None
    return report.allocation


@pytest.mark.parametrize("target", ["3.7", 4.6, "file:9"])
def test_the_budget_is_kept_nearly_used_up_and_true_of_the_files(
    target: float | str, stories: Path, kept: Path, tmp_path: Path, options: Options
) -> None:
    report = convert(str(stories), tmp_path / "out", options(target_bpw=target, allocation=str(kept)))

    counted = report.file_bpw if str(target).startswith("file:") else report.linear_bpw
    amount = float(str(target).removeprefix("file:"))
    assert amount - 0.15 < counted <= amount and outcome(report)["kept"]
    weights = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert weights == report.bytes_after
    assert len(set(schemes(tmp_path / "out").values())) > 1
    assert not failed(verify(tmp_path / "out", against=str(stories), options=VerifyOptions(num_tokens=0)))


def test_layers_that_engines_join_take_one_scheme(stories: Path, kept: Path, options: Options) -> None:
    plan = plan_conversion(str(stories), options(target_bpw=4.6, allocation=str(kept))).plan

    found = {name: layer.scheme.name for name, layer in plan.layers.items()}
    assert len(set(found.values())) > 2
    for block in range(5):
        attention, mlp = f"model.layers.{block}.self_attn", f"model.layers.{block}.mlp"
        assert len({found[f"{attention}.{leaf}_proj"] for leaf in "qkv"}) == 1
        assert found[f"{mlp}.gate_proj"] == found[f"{mlp}.up_proj"]


def test_all_experts_of_a_block_take_one_scheme(tokens: Path, tmp_path: Path, options: Options) -> None:
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1, "mlp_only_layers": []}
    source = save_tiny(tmp_path / "m", family="qwen3_moe", **moe)

    report = convert(str(source), tmp_path / "out", options(target_bpw=4.5))

    found = schemes(tmp_path / "out")
    for block in range(2):
        assert len({scheme for name, scheme in found.items() if f"layers.{block}.mlp.experts" in name}) == 1
    assert f"model.layers.{0}.mlp.experts" in outcome(report)["units"]


def test_the_same_measurement_serves_another_budget_without_measuring(
    stories: Path, measurement: Path, kept: Path, tmp_path: Path, options: Options
) -> None:
    again = Heard()

    second = convert(str(stories), tmp_path / "second", options(target_bpw=5.0, allocation=str(kept)), again)

    assert not again.measured and 4.6 < second.linear_bpw <= 5
    for place in (kept, measurement.parent / "out"):  # a file, or the folder of an earlier conversion
        planned = plan_conversion(str(stories), options(target_bpw=5.0, allocation=str(place))).plan
        assert {name: layer.scheme.name for name, layer in planned.layers.items()} == schemes(tmp_path / "second")


def test_a_larger_budget_is_never_predicted_to_lose_more(measurement: Path) -> None:
    content = json.loads(measurement.read_text())["outcome"]
    points = [(point["linear_bpw"], point["predicted_kl"]) for point in content["pareto"]]
    assert len(points) > 10 and all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(points))
    for uniform in content["uniform"].values():
        best = min(kl for bpw, kl in points if bpw <= uniform["linear_bpw"] + 1e-9)
        assert best <= uniform["predicted_kl"] * 1.2
    assert (measurement.parent / "out" / "quantkit_allocation.png").read_bytes()[1:4] == b"PNG"


def test_a_run_that_is_stopped_measures_once_and_ends_with_the_same_bytes(stories: Path, tmp_path: Path, options: Options) -> None:
    wish = options(target_bpw=4.4)
    with pytest.raises(Interrupted):
        convert(str(stories), tmp_path / "out", wish, Heard(stops=True))
    assert (tmp_path / "out.allocation.json").is_file()
    again = Heard()

    convert(str(stories), tmp_path / "out", wish, again)
    convert(str(stories), tmp_path / "whole", wish)

    assert not again.measured  # the second time
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out.allocation.json").exists()


def test_what_a_stopped_run_measured_of_other_rows_is_not_used(stories: Path, tmp_path: Path, options: Options) -> None:
    with pytest.raises(Interrupted):
        convert(str(stories), tmp_path / "out", options(target_bpw=4.4), Heard(stops=True))
    heard = Heard()

    convert(str(stories), tmp_path / "out", options(target_bpw=4.4, num_samples=3, fresh=True), heard)

    assert heard.measured


def test_the_measured_kl_is_at_most_what_was_asked(stories: Path, kept: Path, tmp_path: Path, options: Options) -> None:
    asked = json.loads(kept.read_text())["trials"][0]["measured"] / 2

    report = convert(str(stories), tmp_path / "out", options(max_kl=asked, allocation=str(kept)))

    assert report.divergence is not None and asked / 2 < report.divergence["kl_mean"] <= asked and outcome(report)["kept"]
    assert 4.4 < report.linear_bpw < 6


def test_a_kl_that_needs_more_than_was_predicted_is_tried_again_and_reached(stories: Path, kept: Path, tmp_path: Path, options: Options) -> None:
    content = json.loads(kept.read_text())
    asked = content["trials"][0]["measured"]
    content["trials"][0]["measured"] /= 10  # as if losses had turned out far below what was predicted
    kept.write_text(json.dumps(content))

    report = convert(str(stories), tmp_path / "out", options(max_kl=asked, allocation=str(kept)))

    assert report.divergence is not None and report.divergence["kl_mean"] <= asked
    assert len(json.loads(kept.read_text())["trials"]) >= 3


def test_a_recipe_names_candidates_and_budget_and_options_change_the_budget(stories: Path, tmp_path: Path, options: Options) -> None:
    (tmp_path / "mine.yaml").write_text(
        "name: mine\nallocate: {candidates: [w3a16-g32, w4a16-g32, w8a16-g32], target_bpw: 5.5}\n"
        "rules: [{pattern: down_proj, scheme: w8a16-channel, rounding: rtn, candidates: []}, {pattern: .*, scheme: w4a16-g32, rounding: gptq}]"
    )
    convert(str(stories), tmp_path / "out", options(str(tmp_path / "mine.yaml")))
    found = schemes(tmp_path / "out")

    assert {scheme for name, scheme in found.items() if "down_proj" in name} == {"w8a16-channel"}
    assert {scheme for name, scheme in found.items() if "down_proj" not in name} <= {"w3a16-g32", "w4a16-g32", "w8a16-g32"}
    other = plan_conversion(str(stories), options(str(tmp_path / "mine.yaml"), target_bpw=6.0, allocation=str(tmp_path / "out"))).plan
    assert 5.5 < other.linear_bpw <= 6


def test_what_is_overridden_or_ignored_stays_so(stories: Path, kept: Path, options: Options) -> None:
    wish = options(target_bpw=6.0, overrides=("o_proj=w8a16-g32",), ignore=(r"layers\.0\.",), allocation=str(kept))

    found = {name: layer.scheme.name for name, layer in plan_conversion(str(stories), wish).plan.layers.items()}

    assert {scheme for name, scheme in found.items() if "o_proj" in name} == {"w8a16-g32"} and not any(".layers.0." in name for name in found)


def test_only_what_the_container_holds_is_a_candidate(stories: Path, tmp_path: Path, options: Options) -> None:
    report = convert(str(stories), tmp_path / "out", options(target_bpw=4.9, format="gptq"))

    assert (tmp_path / "out" / "quantize_config.json").is_file()
    assert not {scheme[1] for scheme in schemes(tmp_path / "out").values()} & {"5", "6"}
    assert any("gptq loaders read" in note for note in report.notes)


def test_a_recipe_without_calibration_is_measured_all_the_same(stories: Path, tmp_path: Path, options: Options) -> None:
    report = convert(str(stories), tmp_path / "out", options("w4a16-mse", target_bpw=4.5))

    assert report.linear_bpw <= 4.5 and outcome(report)["measured_kl"] is None and outcome(report)["predicted_kl"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_bpw": 1.5}, r"below what these candidates come to.*nearest that works is 3\.\d+"),
        ({"target_bpw": 12}, r"above what these candidates come to.*nearest that works is 8\.\d+"),
        ({"target_bpw": "file:3"}, r"over the file; the nearest that works is file:\d"),
        ({"target_bpw": "four"}, "give bits per weight such as 4.25"),
        ({"target_bpw": 4.0, "max_kl": 0.1}, "two budgets"),
        ({"max_kl": 0.0}, "above 0"),
        ({"max_kl": 0.1, "measure": False}, "no-measure"),
        ({"max_kl": 0.1, "recipe": "w4a16-mse"}, "take a calibrated one"),
        ({"allocation": "there.json"}, "no budget"),
        ({"target_bpw": 4.0, "recipe": "w8a8-int8"}, "name candidates"),
        ({"target_bpw": 4.0, "overrides": (".*=w4a16",)}, "nothing to allocate"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_what_cannot_be_is_refused_before_any_work(settings: dict, message: str, stories: Path, tmp_path: Path, options: Options) -> None:
    with pytest.raises((UsageError, RecipeError), match=message):
        convert(str(stories), tmp_path / "out", options(**settings))

    assert not list(tmp_path.iterdir())


def test_a_container_of_one_scheme_is_refused(tiny: Path, options: Options) -> None:
    with pytest.raises(FormatError, match="one scheme for all layers, so there is nothing to allocate; use compressed-tensors"):
        plan_conversion(str(tiny), options("w4a16-asym-gptq", target_bpw=4.5, format="awq"))


def test_the_nearest_that_is_named_works(stories: Path, options: Options) -> None:
    for amount in (1.0, 100):
        with pytest.raises(UsageError) as refused:
            plan_conversion(str(stories), options(target_bpw=amount))
        nearest = str(refused.value).partition("nearest that works is ")[2].split(",")[0]
        plan_conversion(str(stories), options(target_bpw=nearest))


def test_a_measurement_of_another_model_or_of_other_candidates_is_refused(
    stories: Path, tiny: Path, measurement: Path, tmp_path: Path, options: Options
) -> None:
    with pytest.raises(UsageError, match="measured on other weights"):
        plan_conversion(str(tiny), options(target_bpw=4.4, allocation=str(measurement)))
    with pytest.raises(UsageError, match="has not measured w2a16-asym"):
        plan_conversion(str(stories), options("w4a16-asym-gptq", target_bpw=4.6, allocation=str(measurement)))
    (tmp_path / "text.json").write_text("{}")
    with pytest.raises(UsageError, match="no allocation that quantkit wrote"):
        plan_conversion(str(stories), options(target_bpw=4.4, allocation=str(tmp_path / "text.json")))


def test_a_measurement_by_other_roundings_says_so(stories: Path, kept: Path, options: Options) -> None:
    recipes, settings = ("w4a16-gptq", "w4a16-rtn"), {"target_bpw": 4.4, "allocation": str(kept)}
    notes = {recipe: plan_conversion(str(stories), options(recipe, **settings)).plan.notes for recipe in recipes}

    told = [note for note in notes["w4a16-rtn"] if "what is predicted is of the former" in note]
    assert len(told) == 1 and "measured with GPTQ(" in told[0] and "RoundToNearest() is asked for" in told[0]
    assert not any("predicted is of" in note for note in notes["w4a16-gptq"])


def test_predictions_go_by_the_trial_on_most_tokens_of_the_same_roundings() -> None:
    empty = Measurement("m", "f", {}, "", 1, {})
    mine, other = ("GPTQ()",), ("RoundToNearest()",)
    assert empty.factor(mine) == USUAL_FACTOR

    large = empty.tried(Trial(4.0, 0.1, 0.2, 4096, mine))
    after = large.tried(Trial(4.0, 0.1, 0.9, 60, mine)).tried(Trial(4.0, 0.1, 0.7, 9000, other))

    assert large.factor(mine) == after.factor(mine) == pytest.approx(2 * CAUTION)
    assert after.factor(other) == pytest.approx(7 * CAUTION)
    assert after.tried(Trial(4.2, 0.1, 0.3, 4096, mine)).factor(mine) == pytest.approx(3 * CAUTION)


@pytest.mark.parametrize("change", [*({"trials": [TRIAL | {"measured": value}]} for value in (-1, "x", float("nan"))), {"made_by": []}])
def test_a_measurement_that_was_altered_is_refused_whatever_is_in_it(change: dict, stories: Path, kept: Path, options: Options) -> None:
    kept.write_text(json.dumps(json.loads(kept.read_text()) | change))

    with pytest.raises(UsageError, match="is no allocation that quantkit wrote"):
        plan_conversion(str(stories), options(target_bpw=4.4, allocation=str(kept)))
