"""A model card says where an output comes from, what it cost and how to load it, and keeps the licence."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from quantkit.conversion.card import kept_front_matter, model_card
from quantkit.conversion.convert import convert
from quantkit.conversion.options import ConvertOptions
from quantkit.conversion.report import AS_IT_WAS, DECODED, ConversionReport, LayerResult
from quantkit.formats.engine_loading import how_to_load
from quantkit.formats.engines import ENGINES, Verdict
from quantkit.formats.summary import summarize

Options = Callable[..., ConvertOptions]
LICENCE = {"license": "other", "license_name": "llama3", "license_link": "LICENSE"}
OURS = {"library_name": "transformers", "tags": ["quantkit", "gptq", "4-bit"]}
VERDICTS = [
    Verdict("vLLM", "1", True, "", ("scales are cast",)), Verdict("TGI", "3", False, "reads no | of these"),
    Verdict("llama.cpp", "9", None, "no one tried"),
]  # fmt: skip


def report(**changes: Any) -> ConversionReport:
    layer = LayerResult("model.layers.0.mlp.up_proj", "w4a16", "GPTQ", 0.01)
    values = {"source": "m", "output": "some/out", "recipe": "w4a16-gptq", "format": "gptq", "layers": [layer], "left_alone": {}}
    sizes = {"bytes_before": 100, "bytes_after": 30, "linear_bpw": 4.1, "file_bpw": 5.0, "seconds": 1.0, "peak_memory_bytes": 1}
    return ConversionReport(**values | sizes | changes)


def front(card: str) -> dict[str, Any]:
    """As yaml reads it, and the hub's own library the same."""
    _, text, _ = card.split("---\n", 2)
    assert ModelCard(card).data.to_dict() == yaml.safe_load(text)
    return yaml.safe_load(text)


def section(card: str, title: str) -> str:
    return re.split(r"\n#+ ", card.split(f"# {title}\n", 1)[1])[0]


def test_licence_language_and_lineage_are_kept_and_the_rest_is_not(tmp_path: Path) -> None:
    given = LICENCE | {"language": ["en", "de"], "base_model": "org/older", "tags": ["x"], "model-index": [{"name": "m"}]}
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(given)}---\n# Model\n---\nrest")

    kept = kept_front_matter(tmp_path / "README.md")

    assert kept == LICENCE | {"language": ["en", "de"], "base_model": "org/older"}
    assert front(model_card(report(), "m", kept, [])) == kept | OURS | {"pipeline_tag": "text-generation", "base_model_relation": "quantized"}


@pytest.mark.parametrize(
    ("source", "name", "base", "link"),
    [("org/name", "org/name", "org/name", "https://huggingface.co/org/name"), ("modelscope:org/name", "org/name", None, "https://modelscope.cn/models/org/name"),
     ("models/name", "name", None, None), ("reference", "reference", None, None)],
)  # fmt: skip
def test_the_original_is_linked_where_it_has_an_address(source: str, name: str, base: str | None, link: str | None) -> None:
    card = model_card(report(source=source), name, {"pipeline_tag": "image-text-to-text"}, [])

    found = front(card)
    assert (found.get("base_model"), found.get("base_model_relation")) == (base, base and "quantized")
    assert found["pipeline_tag"] == "image-text-to-text" and (f"({link})" in card if link else "](" not in card)


def test_a_folders_own_card_that_is_not_kept_is_mentioned() -> None:
    assert "README.md says what it is and is not part of this one" in model_card(report(left_behind=["README.md"]), "m", {}, [])
    assert "not part of this one" not in model_card(report(), "m", {}, [])


@pytest.mark.parametrize("text", [None, "", "# Model\n---\nlicense: mit\n---\n", "---\n: {\n---\n", "---\n- a\n---\n", "---\nlicense: mit"])
def test_a_card_without_front_matter_keeps_nothing(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)

    assert kept_front_matter(tmp_path / "README.md") == {}


def test_losses_stand_with_their_errors_and_what_was_not_measured_is_said() -> None:
    found = {"ppl_baseline": 10.0, "ppl_baseline_se": 0.5, "ppl_quantized": 10.25, "ppl_quantized_se": 0.75, "ppl_ratio": 1.025,
             "ppl_ratio_se": 0.0125, "kl_mean": 0.0625, "kl_se": None, "top1": 0.875, "top1_se": 0.0125, "num_tokens": 1234}  # fmt: skip

    card = model_card(report(divergence=found), "m", {}, [])

    assert "0.06250 ± not finite nats over 1,234 held-out tokens" in card
    assert "10.0000 ± 0.5000 -> 10.2500 ± 0.7500, ratio 1.0250 ± 0.0125" in card and "87.50% ± 1.25%" in card
    assert "not measured; `quantkit eval some/out --baseline m` does" in model_card(report(), "m", {}, [])


def test_layers_that_are_not_as_asked_are_named_with_the_reason() -> None:
    fallen = [LayerResult(f"l.{n}.up", "w8a16-channel", "SearchedScales", 0.1, note="no group | divides") for n in range(6)]

    card = model_card(report(layers=fallen, left_alone={"lm_head": "outside the decoder blocks"}), "m", {}, [])

    assert "- outside the decoder blocks: `lm_head`" in section(card, "Left as they were")
    assert "- no group \\| divides: `l.0.up`, `l.1.up`, `l.2.up`, `l.3.up` and 2 more" in section(card, "Otherwise than the recipe says")
    assert "Left as they were" not in model_card(report(), "m", {}, []) and front(card)["tags"][-1] == "8-bit"


def test_a_quantized_original_in_another_container_or_decoded_is_called_that() -> None:
    moved = [LayerResult("l.0.up", "w4a16", AS_IT_WAS, 0.0, lossless=True, max_error=0.0)]
    decoded = [LayerResult("l.0.up", "bfloat16", DECODED, 0.0, lossless=True, max_error=0.0)]

    card = model_card(report(recipe=None, layers=moved), "m", {}, [])
    assert "1 w4a16 as it was" in card and "1 of 1 layers lossless" in card and "| recipe |" not in card and "recipe.yaml" not in card
    assert front(card)["tags"] == OURS["tags"]
    card = model_card(report(recipe=None, format="bf16", layers=decoded, source="org/m"), "org/m", {}, [])
    assert "| quantized layers |" not in card and front(card)["tags"] == ["quantkit", "bf16"] and "base_model_relation" not in front(card)


def test_engines_that_load_it_have_a_command_and_the_others_a_reason() -> None:
    card = model_card(report(), "m", {}, VERDICTS)

    assert "```bash\nvllm serve out\n```\n\n- scales are cast" in section(card, "vLLM 1")
    assert section(card, "Other engines").split("\n- ")[1:] == ["TGI 3: cannot; reads no | of these", "llama.cpp 9: not known; no one tried\n"]


@pytest.mark.parametrize("engine", [engine.name for engine in ENGINES])
def test_every_engine_of_the_table_is_told_how_whatever_the_models_name(engine: str) -> None:
    language, text = how_to_load(engine, "org/it's \"a\" model")

    if language == "python":
        compile(text, engine, "exec")
        assert '"org/it\'s \\"a\\" model"' in text
    else:
        assert """'org/it'"'"'s "a" model'""" in text


@pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="the package compressed-tensors is not installed")
@pytest.mark.filterwarnings("ignore")
def test_a_written_card_is_true_of_its_folder(copied: Path, tmp_path: Path, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    (copied / "README.md").write_text("---\nlicense: mit\n---\n# Stories")

    convert(str(copied), tmp_path / "my out", options(ignore=("o_proj",)))

    card = (tmp_path / "my out" / "README.md").read_text()
    assert front(card)["license"] == "mit" and "is not part of this one" in card
    assert "o_proj` and 1 more" in section(card, "Left as they were") and "groups of 128 do not divide" in card
    for verdict in summarize(tmp_path / "my out").verdicts:
        command = how_to_load(verdict.engine, "my out")[1]
        assert (command in card) == bool(verdict.loads) and verdict.reason in card, verdict.engine
    monkeypatch.chdir(tmp_path)
    snippet = re.search(r"```python\n(.*?)\n```", card.split("### transformers")[1], re.DOTALL)
    assert snippet is not None
    names: dict[str, Any] = {}
    exec(snippet[1], names)
    ids = names["tokenizer"]("Once upon a time", return_tensors="pt").input_ids
    with torch.no_grad():
        assert bool(torch.isfinite(names["model"](ids).logits).all())
