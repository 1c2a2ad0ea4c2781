"""`quantkit recipes` lists and shows what convert takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.cli import main
from quantkit.conversion.recipe import Recipe, list_recipes


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["recipes", *arguments])
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


@pytest.mark.parametrize("arguments", [(), ("list",)])
def test_every_shipped_recipe_is_listed_with_its_description(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, *arguments)

    assert code == 0
    words = " ".join(out.split())
    assert all(f"{recipe.name} {recipe.description}" in words for recipe in list_recipes())


def test_a_shown_recipe_is_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "show", "w4a16-gptq")
    (tmp_path / "mine.yaml").write_text(out)

    assert Recipe.load(str(tmp_path / "mine.yaml")) == Recipe.load("w4a16-gptq")


def test_a_file_is_shown_as_it_stands_though_it_bears_a_shipped_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "# mine\nname: w4a16-gptq\nrules: [{pattern: down_proj, scheme: w8a16}]\n"
    (tmp_path / "mine.yaml").write_text(text)

    code, out, _ = run(capsys, "show", str(tmp_path / "mine.yaml"))

    assert (code, out) == (0, text)


def test_an_unknown_recipe_is_answered_with_near_ones(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "show", "w4a16-gtpq")

    assert code == 2
    assert "did you mean 'w4a16-gptq'" in err
