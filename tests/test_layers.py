"""Imports point down, heavy libraries stay in their rooms, and no file hides two subjects."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "quantkit"
MAY_IMPORT = {
    "core": set(),
    "checkpoint": {"core"},
    "models": {"core", "checkpoint"},
    "formats": {"checkpoint", "models", "core"},
    "methods": {"core"},
    "conversion": {"methods", "formats", "checkpoint", "models", "core"},
    "evaluation": {"runtime", "formats", "checkpoint", "models", "core"},
    "runtime": {"formats", "checkpoint", "models", "core"},
    "server": {"runtime"},
    "bench": {"checkpoint", "core", "runtime", "evaluation"},
    "report": {"bench", "evaluation", "conversion", "runtime", "formats", "checkpoint", "models", "core"},
    "cli": {"report", "server", "bench", "runtime", "conversion", "evaluation", "formats", "checkpoint", "models", "methods", "core"},
}
FILES = sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    parts = path.relative_to(ROOT).parts
    if len(parts) == 1:
        return
    own = parts[0]
    others = {name.split(".")[1] for name in imports(path) if name.startswith("quantkit.") and name.count(".") >= 1}
    rooms = {other for other in others if (ROOT / other).is_dir()} - {own}
    assert rooms <= MAY_IMPORT[own], f"{own} must not import {sorted(rooms - MAY_IMPORT[own])}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_libraries_stay_in_their_rooms(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    used = {name.split(".")[0] for name in imports(path)}
    assert "triton" not in used
    assert room == "cli" or not used & {"click", "rich"}
    assert room == "evaluation" or "lm_eval" not in used
    assert room == "server" or not used & {"fastapi", "starlette", "uvicorn", "prometheus_client"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_every_room_has_its_row() -> None:
    assert {p.name for p in ROOT.iterdir() if (p / "__init__.py").exists()} == set(MAY_IMPORT)
