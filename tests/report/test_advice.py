"""What is recommended comes true: sizes to the byte, engines, and an order that follows from what was asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.conversion.convert import convert
from quantkit.conversion.options import ConvertOptions
from quantkit.conversion.recipe import list_recipes
from quantkit.formats.summary import summarize
from quantkit.paths import packaged
from quantkit.report.advice import NEAR, Advice, Needs, advise
from quantkit.report.describe import bytes_per_token
from quantkit.report.schema import Report
from tests.cli.test_generate import run
from tests.conversion.conftest import save_tiny

ROOT = Path(__file__).parents[2]
PATH = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))


def needs(memory: int = 1 << 30, batch: str = "1", context: int = 128, engine: str | None = None) -> Needs:
    return Needs(memory=memory, bandwidth=1e9, batch=batch, context=context, engine=engine)  # type: ignore[arg-type]


def of(found: list[Advice], recipe: str | None, container: str | None) -> Advice:
    (advice,) = [each for each in found if (each.recipe, each.container) == (recipe, container)]
    return advice


@pytest.mark.parametrize(("recipe", "container"), [("w4a16-rtn", "gptq"), ("w8a16", "compressed-tensors"), ("w4a16-mse", "compressed-tensors")])
def test_predictions_are_what_a_conversion_writes(recipe: str, container: str, tmp_path: Path) -> None:
    predicted = of(advise("reference", needs()), recipe, container)

    convert("reference", tmp_path / "out", ConvertOptions(recipe=recipe, format=container, measure=False))

    summary = summarize(tmp_path / "out")
    assert predicted.file_bytes == summary.file_bytes
    assert predicted.engines == tuple(each.engine for each in summary.verdicts if each.loads)
    assert 1e9 / predicted.limit == pytest.approx(bytes_per_token(str(tmp_path / "out")), abs=0.5)


def test_the_model_as_it_is_stands_among_the_choices() -> None:
    advice = of(advise("reference", needs()), None, None)

    assert advice.file_bytes == summarize(Path(str(packaged("evals") / "reference" / "model"))).file_bytes
    assert advice.command("reference") is None and advice.loss == 0


def test_of_what_loses_little_the_smallest_comes_first_and_what_does_not_fit_last() -> None:
    found = advise("reference", needs())
    small = [each for each in found if each.loss is not None and each.loss <= NEAR]

    assert found[: len(small)] == sorted(small, key=lambda each: (-each.limit, each.loss))
    assert found[0].recipe is not None and "w4a16" in found[0].recipe and found[0].why_not is None

    tight = advise("reference", needs(memory=found[0].file_bytes - 1))
    assert [each.why_not for each in tight if each.file_bytes >= found[0].file_bytes] == ["does not fit"] * (len(tight) - sum(
        each.file_bytes < found[0].file_bytes for each in tight))  # fmt: skip
    assert tight[0].why_not is None and tight[0].loss is not None and tight[0].loss > NEAR


def test_many_requests_ask_for_room_and_for_integers() -> None:
    found = advise("reference", needs(batch="many", context=1000))

    assert found[0].recipe == "w8a8-int8"
    room = of(advise("reference", needs(memory=8_000_000, batch="many", context=1000)), "w8a8-int8", "compressed-tensors")
    assert room.why_not is not None and "tokens of 8,000" in room.why_not


def test_an_engine_that_does_not_load_a_choice_speaks_against_it() -> None:
    found = advise("reference", needs(engine="vllm"))

    assert found[0].why_not is None and "vLLM" in found[0].engines
    refused = of(found, "w3a16-gptq", "gptq")
    assert refused.why_not is not None and refused.why_not.startswith("vLLM: reads 4 and 8 bits")
    assert found.index(refused) > max(place for place, each in enumerate(found) if each.why_not is None)


def test_a_token_reads_the_experts_it_is_routed_to_and_one_row_of_an_embedding_of_its_own(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", family="mixtral", num_local_experts=4, num_experts_per_tok=1)
    parts = summarize(folder).unquantized
    experts = sum(part.num_bytes for part in parts if ".experts." in part.name)
    embedding = next(part.num_bytes for part in parts if "embed_tokens" in part.name)

    assert experts > 0
    assert bytes_per_token(str(folder)) == sum(part.num_bytes for part in parts) - embedding - experts * 3 // 4


NOT_ON_REFERENCE = {"w4a16-mixed-moe"}
"""Recipes that ask for experts, which the reference model has none of."""


def test_losses_of_all_recipes_are_committed() -> None:
    report = Report.read(packaged("evals") / "baselines" / "recipes.json")
    measured = {each.conversion.recipe for each in report.checkpoints if each.conversion is not None}

    assert measured | NOT_ON_REFERENCE == {recipe.name for recipe in list_recipes()}
    assert all(each.text is not None and each.text.result.num_tokens > 20_000 for each in report.checkpoints)


def test_the_command_to_copy_is_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "recommend", "reference", "--engine", "vllm", "--memory", "1GB")

    assert code == 0 and out.strip().splitlines()[-1].startswith("quantkit convert reference -o out -r w4a16")
    assert "GB/s" in err
    code, out, _ = run(capsys, "recommend", "reference", "--json", "--memory", "1GB")
    assert json.loads(out)["choices"][0]["command"].startswith("quantkit convert reference")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--engine", "vlm"), "vLLM"), (("--memory", "lots"), "lots"), (("--context", "100000"), "1024"), (("--device", "cuda:9"), "cuda:9")],
)
def test_what_cannot_be_meant_is_named(arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "recommend", "reference", *arguments)

    assert code == 2 and words in err and not out


@pytest.mark.parametrize("command", [["recommend", "reference", "--memory", "1GB"], ["ci", "init", "org/name"], ["report", "reference"]])
def test_what_needs_no_extra_works_without_it_and_what_does_names_it(command: list[str], tmp_path: Path) -> None:
    """In a process of its own, as this one has the libraries already."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys(("lm_eval", "scipy", "matplotlib", "tensorboard", "wandb")))
from quantkit.cli import main
main({command!r})
"""
    environment = os.environ | {"PYTHONPATH": PATH}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    if command[0] == "report":
        assert done.returncode == 2 and "quantkit[report]" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
