"""A model card says where an output comes from, and keeps the licence."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from quantkit.conversion.card import kept_front_matter, model_card
from quantkit.conversion.report import ConversionReport, LayerResult

LICENCE = {"license": "other", "license_name": "llama3", "license_link": "LICENSE"}


def report() -> ConversionReport:
    layer = LayerResult("model.layers.0.mlp.up_proj", "w4a16", "GPTQ", 0.01)
    return ConversionReport("m", "out", "w4a16-gptq", "gptq", [layer], {}, 100, 30, 4.1, 5.0, 1.0, 1)


def front(card: str) -> dict:
    _, text, _ = card.split("---\n", 2)
    return yaml.safe_load(text)


def test_licence_language_and_lineage_are_kept_and_the_rest_is_not(tmp_path: Path) -> None:
    given = LICENCE | {"language": ["en", "de"], "base_model": "org/older", "tags": ["x"], "model-index": [{"name": "m"}]}
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(given)}---\n# Model\n---\nrest")

    kept = kept_front_matter(tmp_path / "README.md")

    assert kept == LICENCE | {"language": ["en", "de"], "base_model": "org/older"}
    assert front(model_card(report(), "m", kept)) == kept | {"library_name": "transformers", "tags": ["quantkit", "gptq"]}
    assert front(model_card(report(), "org/name", kept))["base_model"] == "org/name"


@pytest.mark.parametrize("text", [None, "", "# Model\n---\nlicense: mit\n---\n", "---\n: {\n---\n", "---\n- a\n---\n", "---\nlicense: mit"])
def test_a_card_without_front_matter_keeps_nothing(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)

    assert kept_front_matter(tmp_path / "README.md") == {}
