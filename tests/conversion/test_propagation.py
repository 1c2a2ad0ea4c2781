"""Conversions whose layers make up for those before them: nearer to the original further on, the same bytes every time, in every kind of model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from quantkit.conversion.convert import convert
from quantkit.conversion.options import ConvertOptions
from quantkit.errors import Interrupted
from quantkit.formats.opened import OpenedCheckpoint
from tests.conversion.conftest import contents, save_tiny
from tests.conversion.test_tuning import Hearing, block_errors

Options = Callable[..., ConvertOptions]


def recipe(folder: Path, share: float, *, scheme: str = "w3a16-g32", transforms: str = "") -> str:
    path = folder / f"{scheme}-{share}.yaml"
    rounding = f"{{name: gptq, propagate: {share}}}"
    path.write_text(f"name: own\nrules:\n  - pattern: .*\n    scheme: {scheme}\n    rounding: {rounding}\n    transforms: [{transforms}]\n")
    return str(path)


def both(source: Path, tmp_path: Path, options: Options, **given: str) -> list[Path]:
    """The model with errors made up for, and without."""
    folders = [tmp_path / "with", tmp_path / "without"]
    for folder, share in zip(folders, (0.5, 0.0), strict=True):
        convert(str(source), folder, options(recipe(tmp_path, share, **given), measure=False))
    return folders


@pytest.mark.parametrize("transforms", ["", "awq"], ids=["alone", "after-awq"])
def test_states_behind_later_blocks_are_nearer_to_the_original_on_text_not_seen(
    transforms: str, stories: Path, test_data: Path, tmp_path: Path, options: Options
) -> None:
    text = (test_data / "data" / "tinystories" / "sample_b.txt").read_text(encoding="utf-8")[:160_000]
    seen, new = torch.tensor(AutoTokenizer.from_pretrained(stories)(text)["input_ids"])[: 2 * 64 * 128].view(2, 64, 128)
    save_file({"input_ids": seen.contiguous()}, tmp_path / "seen.safetensors")
    calibration = {"source": str(tmp_path / "seen.safetensors"), "num_samples": 64}

    folders = both(stories, tmp_path, partial(options, **calibration), transforms=transforms)

    with_it, without = (block_errors(stories, folder, new) for folder in folders)
    assert sum(with_it[1:]) < 0.95 * sum(without[1:])


def test_the_first_block_has_nothing_to_make_up_for(stories: Path, tmp_path: Path, options: Options) -> None:
    with_it, without = (OpenedCheckpoint(folder) for folder in both(stories, tmp_path, options))

    same = {name: torch.equal(with_it.get(name), without.get(name)) for name in with_it.names if name.endswith("_proj.weight")}
    assert all(equal for name, equal in same.items() if ".layers.0." in name)
    assert not any(equal for name, equal in same.items() if ".layers.1." in name)


def test_a_run_that_was_stopped_gives_the_same_bytes(stories: Path, tmp_path: Path, options: Options) -> None:
    chosen = options(recipe(tmp_path, 0.5))
    convert(str(stories), tmp_path / "whole", chosen)
    with pytest.raises(Interrupted):
        convert(str(stories), tmp_path / "out", chosen, Hearing(stop_after=2))

    listener = Hearing()
    convert(str(stories), tmp_path / "out", chosen, listener)

    assert listener.resumed == [0, 1, 2]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_experts_are_rounded_plainly_and_attention_is_not(tmp_path: Path, options: Options) -> None:
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1, "mlp_only_layers": []}
    source = save_tiny(tmp_path / "m", family="qwen3_moe", **moe)

    with_it, without = (OpenedCheckpoint(folder) for folder in both(source, tmp_path, options))

    changed = {name for name in with_it.names if ".layers.1." in name and not torch.equal(with_it.get(name), without.get(name))}
    assert "model.layers.1.self_attn.q_proj.weight" in changed
    assert all(bool(torch.isfinite(with_it.get(name)).all()) for name in changed)
