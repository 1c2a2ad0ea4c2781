"""What `quantkit ci init` writes is a check file and a workflow that runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from quantkit.errors import UsageError
from quantkit.paths import packaged
from quantkit.report.check import CheckFile
from tests.cli.test_generate import run


def test_the_workflow_runs_the_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("ci", "init", "org/name", "-r", "w4a16-gptq", "-r", "w8a16", "-f", "gptq", "-f", "compressed-tensors", "-o", str(tmp_path))
    code, out, _ = run(capsys, *arguments)

    file = CheckFile.read(tmp_path / "quantkit-check.json")
    workflow = yaml.safe_load((tmp_path / ".github" / "workflows" / "quantkit.yml").read_text())
    commands = [step.get("run", "") for step in workflow["jobs"]["check"]["steps"]]
    assert code == 0 and "quantkit report --check" in out
    assert file.source == "org/name" and [each.name for each in file.checkpoints] == [
        "w4a16-gptq", "w4a16-gptq-compressed-tensors", "w8a16", "w8a16-compressed-tensors",
    ]  # fmt: skip
    assert any("report --check quantkit-check.json" in command for command in commands)
    assert any("GITHUB_STEP_SUMMARY" in command for command in commands)


def test_a_recipe_of_ones_own_names_its_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "my own.yaml"
    recipe.write_text((packaged("recipes") / "w4a16-rtn.yaml").read_text())

    code, _, _ = run(capsys, "ci", "init", "org/name", "-r", str(recipe), "-r", str(recipe), "-o", str(tmp_path))

    (checkpoint,) = CheckFile.read(tmp_path / "quantkit-check.json").checkpoints
    assert code == 0 and (checkpoint.name, checkpoint.recipe) == ("my-own", str(recipe))


@pytest.mark.parametrize("names", [["../out"], ["a/b"], [""], ["same", "same"]])
def test_names_that_are_no_folder_of_their_own_are_refused(names: list[str], tmp_path: Path) -> None:
    checkpoints = [{"name": name, "recipe": "w4a16-rtn", "format": "gptq"} for name in names]
    (tmp_path / "check.json").write_text(json.dumps({"kind": "quantkit-check", "schema_version": 1, "source": "x", "checkpoints": checkpoints}))

    with pytest.raises(UsageError, match=r"check\.json: "):
        CheckFile.read(tmp_path / "check.json")


def test_nothing_that_is_there_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "quantkit-check.json").write_text("mine")

    code, _, err = run(capsys, "ci", "init", "org/name", "-o", str(tmp_path))

    assert code == 1 and "is there already" in err
    assert (tmp_path / "quantkit-check.json").read_text() == "mine" and not (tmp_path / ".github").exists()
    assert run(capsys, "ci", "init", "org/name", "-o", str(tmp_path), "--overwrite")[0] == 0


@pytest.mark.parametrize(("option", "value"), [("-r", "w4a16-gtpq"), ("-f", "gtpq"), ("--suite", "quik")])
def test_what_is_not_known_is_named(option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "ci", "init", "org/name", option, value, "-o", str(tmp_path))

    assert code in (1, 2) and value in err and not list(tmp_path.iterdir())


def test_this_repository_runs_what_lands_its_changes() -> None:
    workflow = yaml.safe_load((Path(__file__).parents[2] / ".github" / "workflows" / "ci.yml").read_text())

    commands = [step.get("run", "") for step in workflow["jobs"]["run"]["steps"]]
    assert "bash .ci/run" in commands and any("report.md" in command for command in commands)
    assert workflow["jobs"]["run"]["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
