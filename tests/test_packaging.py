"""Everything that is part of the product ships, and nothing imports torch before it must."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import quantkit

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_ships() -> None:
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    folders = {p.parent.relative_to(ROOT).as_posix().replace("/", ".") for p in (ROOT / "quantkit").rglob("__init__.py")}
    folders |= {p.parent.relative_to(ROOT / "kernels").as_posix().replace("/", ".") for p in (ROOT / "kernels").rglob("__init__.py")}
    assert folders | {"quantkit.recipes", "quantkit.evals"} == listed


def test_version_is_stated_once() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"] and "version" not in PROJECT["project"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "quantkit.__version__"}
    stated = subprocess.run(["git", "grep", "-lF", f'{quantkit.__version__}"', "--", "quantkit", "pyproject.toml"], cwd=ROOT, capture_output=True)
    assert stated.stdout.decode().split() == ["quantkit/__init__.py"]


def test_public_names_exist() -> None:
    assert set(quantkit.__all__) == {"LLM", "SamplingParams", "Structure", "__version__", "convert", "inspect"}
    assert all(hasattr(quantkit, name) for name in quantkit.__all__)


def test_importing_and_asking_for_help_loads_no_torch() -> None:
    code = (
        "import sys, quantkit\n"
        "from quantkit.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'pydantic', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)


def test_tracked_files_are_small() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    large = [name for name in tracked if name and (ROOT / name).is_file() and (ROOT / name).stat().st_size > 16_500_000]
    assert not large
