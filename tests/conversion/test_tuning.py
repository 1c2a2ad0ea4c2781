"""Tuned conversions: nearer to the original block than GPTQ's, the same bytes every time, and only where calibration saw enough."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit.conversion.convert import Silent, convert
from quantkit.conversion.options import ConvertOptions
from quantkit.conversion.report import LayerResult
from quantkit.errors import Interrupted, RecipeError
from quantkit.formats.opened import OpenedCheckpoint
from tests.conversion.conftest import contents, save_tiny

Options = Callable[..., ConvertOptions]


class Hearing(Silent):
    """Remembers what it was told; Ctrl-C once a block is done."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after, self.stages, self.resumed = stop_after, [], []

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def block(self, index: int, results: list[LayerResult], *, resumed: bool) -> None:
        self.resumed += [index] if resumed else []
        if index == self.stop_after:
            raise KeyboardInterrupt


def recipe(folder: Path, scheme: str, settings: str = "steps: 6, tokens: 128", *, more: str = "") -> str:
    path = folder / f"{scheme}.yaml"
    path.write_text(f"name: own\nrules:\n{more}  - pattern: .*\n    scheme: {scheme}\n    rounding: {{name: tuned, {settings}}}\n")
    return str(path)


def block_errors(source: Path, out: Path, tokens: Tensor) -> list[float]:
    """What transformers finds after each block but the last: ||difference||^2 / ||original||^2 of a token, averaged."""
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    quantized = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    opened = OpenedCheckpoint(out)
    quantized.load_state_dict({name: opened.get(name).float() for name in quantized.state_dict() if name in opened}, strict=False)
    with torch.no_grad():
        wanted, got = (model(tokens, output_hidden_states=True).hidden_states[1:-1] for model in (original, quantized))
    return [float(((g - w).square().sum(-1) / w.square().sum(-1)).mean()) for g, w in zip(got, wanted, strict=True)]


@pytest.mark.parametrize("scheme", ["w2a16-g32", "w3a16-asym-g32", "w4a16-channel"])
def test_blocks_end_nearer_to_the_original_than_by_gptq(scheme: str, stories: Path, tokens: Path, tmp_path: Path, options: Options) -> None:
    ids = load_file(tokens)["input_ids"][:4]
    own = recipe(tmp_path, scheme, "steps: 30, tokens: 256, rate: 0.015, scale_rate: 0.003")
    untuned = Path(own).with_name("gptq.yaml")
    untuned.write_text(Path(own).read_text().replace("{name: tuned, steps: 30, tokens: 256, rate: 0.015, scale_rate: 0.003}", "gptq"))

    convert(str(stories), tmp_path / "tuned", options(own, measure=False))
    convert(str(stories), tmp_path / "gptq", options(str(untuned), measure=False))

    tuned, plain = (block_errors(stories, tmp_path / name, ids) for name in ("tuned", "gptq"))
    assert len(tuned) == 4 and tuned[0] < 0.9 * plain[0] and sum(tuned) < 0.9 * sum(plain)


def test_steps_that_lead_astray_are_not_taken_over(stories: Path, tmp_path: Path, options: Options) -> None:
    wild = recipe(tmp_path, "w4a16-g32", "steps: 2, tokens: 64, rate: 1.0, scale_rate: 1.0")
    plain = tmp_path / "gptq.yaml"
    plain.write_text(Path(wild).read_text().replace("{name: tuned, steps: 2, tokens: 64, rate: 1.0, scale_rate: 1.0}", "gptq"))

    convert(str(stories), tmp_path / "wild", options(wild))
    convert(str(stories), tmp_path / "gptq", options(str(plain)))

    assert (tmp_path / "wild" / "model.safetensors").read_bytes() == (tmp_path / "gptq" / "model.safetensors").read_bytes()


def test_two_runs_and_one_that_was_stopped_give_the_same_bytes(stories: Path, tmp_path: Path, options: Options) -> None:
    own, listener = options(recipe(tmp_path, "w3a16-g32")), Hearing()
    convert(str(stories), tmp_path / "whole", own, listener)
    with pytest.raises(Interrupted):
        convert(str(stories), tmp_path / "out", own, Hearing(stop_after=1))
    again = Hearing()

    convert(str(stories), tmp_path / "out", own, again)

    assert again.resumed == [0, 1]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert any("tuning block 4: step 6 of 6" in stage for stage in listener.stages)


def test_another_seed_takes_the_rows_in_another_order(stories: Path, tmp_path: Path, options: Options) -> None:
    for seed in (0, 1):
        convert(str(stories), tmp_path / str(seed), options(recipe(tmp_path, "w3a16-g32", f"steps: 4, tokens: 64, seed: {seed}")))

    assert contents(tmp_path / "0") != contents(tmp_path / "1")


def test_rules_that_tune_differently_are_refused(stories: Path, tmp_path: Path, options: Options) -> None:
    other = "  - pattern: down_proj\n    scheme: w8a16-channel\n    rounding: {name: tuned, steps: 7}\n"

    with pytest.raises(RecipeError, match="rules tune with different settings"):
        convert(str(stories), tmp_path / "out", options(recipe(tmp_path, "w4a16-g32", more=other)))

    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_layers_of_other_rules_are_rounded_as_those_say(stories: Path, tmp_path: Path, options: Options) -> None:
    other = "  - pattern: down_proj\n    scheme: w8a16-channel\n    rounding: mse\n"

    report = convert(str(stories), tmp_path / "out", options(recipe(tmp_path, "w4a16-g32", more=other)))

    rounded = {layer.name.rpartition(".")[2]: layer.rounding for layer in report.layers}
    assert rounded["down_proj"] == "SearchedScales" and {v for k, v in rounded.items() if k != "down_proj"} == {"Tuned"}


def test_an_expert_that_hardly_a_token_reached_is_left_to_searched_scales(tmp_path: Path, options: Options) -> None:
    save_tiny(tmp_path / "m", family="mixtral", num_local_experts=8, num_experts_per_tok=1)

    report = convert(str(tmp_path / "m"), tmp_path / "out", options(recipe(tmp_path, "w3a16-g32"), measure=False))

    experts = [layer for layer in report.layers if ".experts." in layer.name]
    few = [layer for layer in experts if (layer.seen_tokens or 0) < 32]
    assert few and len(few) < len(experts)
    assert all(layer.rounding == "SearchedScales" for layer in few)
    assert {layer.rounding for layer in report.layers if "self_attn" in layer.name} == {"Tuned"}


def test_matrices_that_lie_the_other_way_round_are_tuned_too(tmp_path: Path, options: Options) -> None:
    config = AutoConfig.for_model("gpt2", vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().save_pretrained(tmp_path / "m")

    report = convert(str(tmp_path / "m"), tmp_path / "out", options(recipe(tmp_path, "w4a16-g32"), format="gptq"))

    assert {layer.rounding for layer in report.layers} == {"Tuned"} and max(layer.error for layer in report.layers) < 0.1


def test_padding_and_several_texts_in_a_row_are_no_obstacle(stories: Path, tmp_path: Path, options: Options) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = {"input_ids": torch.randint(3, 96, (6, 64), generator=generator), "attention_mask": torch.ones(6, 64, dtype=torch.long)}
    rows["attention_mask"][:, 50:] = 0
    save_file(rows, tmp_path / "rows.safetensors")

    report = convert(str(stories), tmp_path / "out", options(recipe(tmp_path, "w3a16-g32"), source=str(tmp_path / "rows.safetensors")))

    assert {layer.rounding for layer in report.layers if layer.seen_tokens} == {"Tuned"}


def test_the_original_states_count_as_space_that_is_needed(stories: Path, tmp_path: Path, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    needed: list[int] = []
    monkeypatch.setattr("quantkit.conversion.convert.require_space", lambda folder, size: needed.append(size))
    monkeypatch.setattr("quantkit.conversion.hidden_states.IN_MEMORY_BYTES", 0)

    convert(str(stories), tmp_path / "out", options(recipe(tmp_path, "w3a16-g32")))

    assert needed[-1] - needed[0] == (4 + 4 + 1 + 1) * 64 * AutoConfig.from_pretrained(stories).hidden_size * 4


def test_what_a_transform_moved_is_in_the_block_while_it_is_tuned(stories: Path, tokens: Path, tmp_path: Path, options: Options) -> None:
    ids = load_file(tokens)["input_ids"][:4]
    tuned, plain = tmp_path / "tuned.yaml", tmp_path / "plain.yaml"
    for path, rounding in ((tuned, "{name: tuned, steps: 30, tokens: 256, rate: 0.015, scale_rate: 0.003}"), (plain, "gptq")):
        path.write_text(f"name: own\nrules:\n  - pattern: .*\n    scheme: w2a16-g32\n    rounding: {rounding}\n    transforms: [awq]\n")
        convert(str(stories), tmp_path / path.stem, options(str(path), measure=False))

    errors = [block_errors(stories, tmp_path / name, ids) for name in ("tuned", "plain")]
    assert errors[0][0] < 0.9 * errors[1][0] and sum(errors[0]) < 0.9 * sum(errors[1])


def test_the_last_block_ends_nearer_in_what_the_head_says(stories: Path, tokens: Path, tmp_path: Path, options: Options) -> None:
    ids = load_file(tokens)["input_ids"][:4]
    others = "  - pattern: layers\\.[0-3]\\.\n    scheme: none\n"
    path = recipe(tmp_path, "w2a16-g32", "steps: 30, tokens: 256, rate: 0.015, scale_rate: 0.003", more=others)
    plain = tmp_path / "gptq.yaml"
    plain.write_text(Path(path).read_text().replace("{name: tuned, steps: 30, tokens: 256, rate: 0.015, scale_rate: 0.003}", "gptq"))

    found = []
    for name, own in (("tuned", path), ("plain", str(plain))):
        convert(str(stories), tmp_path / name, options(own, measure=False))
        original, quantized = (AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32) for _ in range(2))
        opened = OpenedCheckpoint(tmp_path / name)
        quantized.load_state_dict({key: opened.get(key).float() for key in quantized.state_dict() if key in opened}, strict=False)
        with torch.no_grad():
            p, q = (model(ids).logits.double().log_softmax(-1) for model in (original, quantized))
        found.append(float((p.exp() * (p - q)).sum(-1).mean()))

    assert found[0] < 0.9 * found[1]
