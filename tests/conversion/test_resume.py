"""A conversion that is killed, stopped or starved goes on where it was, and ends with the bytes of one that was left in peace."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from quantkit.conversion.convert import Silent, convert
from quantkit.conversion.options import ConvertOptions
from quantkit.conversion.report import LayerResult
from quantkit.errors import Interrupted, OutputError, QuantkitError
from quantkit.formats.opened import OpenedCheckpoint
from tests.conversion.conftest import Launcher, contents, edit_tensors

NUM_KILLS = int(os.environ.get("QUANTKIT_KILLS", "3"))
Options = Callable[..., ConvertOptions]


class Stopping(Silent):
    """Ctrl-C once a block is done; remembers which blocks were not done again."""

    def __init__(self, after: int | None = None) -> None:
        self.after, self.resumed = after, []

    def block(self, index: int, results: list[LayerResult], *, resumed: bool) -> None:
        self.resumed += [index] if resumed else []
        if index == self.after:
            raise KeyboardInterrupt


def arguments(source: Path, out: Path, tokens: Path, recipe: str) -> list[str | Path]:
    return ["convert", source, "-o", out, "-r", recipe, "--calib", tokens, "--num-samples", "4", "--max-shard-size", "100KB"]


def stopped(source: Path, out: Path, options: ConvertOptions, after: int = 0) -> Path:
    with pytest.raises(Interrupted, match="same command goes on"):
        convert(str(source), out, options, Stopping(after))
    return out.with_name(out.name + ".partial")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w4a16-gptq", "w4a16-mse", "w4a16-awq"])
def test_a_run_killed_at_any_instant_ends_with_the_same_bytes(recipe: str, stories: Path, tokens: Path, tmp_path: Path, launch: Launcher) -> None:
    whole = launch(*arguments(stories, tmp_path / "whole", tokens, recipe))
    assert whole.code == 0, whole.stderr
    expected = contents(tmp_path / "whole")
    dice = random.Random(recipe)

    for i in range(NUM_KILLS):
        out, partial = tmp_path / "out", tmp_path / "out.partial"
        instant = whole.seconds * (i + dice.random()) / NUM_KILLS
        killed = launch(*arguments(stories, out, tokens, recipe), after=instant)

        assert killed.code in (-9, 0), killed.stderr
        is_whole = out.exists()
        assert not is_whole or contents(out) == expected, f"killed after {instant:.2f} s"
        if partial.exists() and not (partial / "config.json").exists():
            with pytest.raises(QuantkitError):
                OpenedCheckpoint(partial)
        again = launch(*arguments(stories, out, tokens, recipe))
        assert again.code == (1 if is_whole else 0), again.stderr
        assert contents(out) == expected and not partial.exists(), f"killed after {instant:.2f} s"
        shutil.rmtree(out)


@pytest.mark.parametrize("recipe", ["w4a16-gptq", "w4a16-rtn"])
def test_ctrl_c_stops_cleanly_says_how_to_go_on_and_the_same_command_does(
    recipe: str, stories: Path, tokens: Path, tmp_path: Path, launch: Launcher
) -> None:
    command = arguments(stories, tmp_path / "out", tokens, recipe)

    for _ in range(10):  # on a busy machine the signal may come too late
        ended = launch(*command, once=tmp_path / "out.partial" / "ledger.json", send="SIGINT")
        if ended.code:
            break
        shutil.rmtree(tmp_path / "out")

    assert ended.code == 130
    assert "Error: stopped" in ended.stderr and "same command goes on" in ended.stderr and "Traceback" not in ended.stderr
    assert ended.stdout == "" and not (tmp_path / "out").exists()
    assert launch(*command).code == 0
    OpenedCheckpoint(tmp_path / "out")


@pytest.mark.parametrize("recipe", ["w4a16-gptq", "w4a16-rtn", "w4a16-awq", "w4a16-awq-gptq"])
def test_finished_blocks_are_not_done_again(recipe: str, stories: Path, tmp_path: Path, options: Options) -> None:
    stopped(stories, tmp_path / "out", options(recipe), after=2)
    listener = Stopping()

    convert(str(stories), tmp_path / "out", options(recipe), listener)

    assert listener.resumed == [0, 1, 2]
    convert(str(stories), tmp_path / "whole", options(recipe))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_finished_block_without_layers_of_its_own_is_resumed_like_any_other(stories: Path, tmp_path: Path, options: Options) -> None:
    ignoring = options("w4a16-rtn", ignore=(r"layers\.0\.",))
    stopped(stories, tmp_path / "out", ignoring, after=1)

    report = convert(str(stories), tmp_path / "out", ignoring)

    whole = convert(str(stories), tmp_path / "whole", ignoring)
    assert report.layers == whole.layers
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_run_stopped_at_every_block_in_turn_ends_with_the_same_report(stories: Path, tmp_path: Path, options: Options) -> None:
    for after in range(5):
        stopped(stories, tmp_path / "out", options(), after=after)

    report = convert(str(stories), tmp_path / "out", options())

    whole = convert(str(stories), tmp_path / "whole", options())
    assert report.layers == whole.layers and report.divergence == whole.divergence


def test_an_unfinished_folder_opens_nowhere(stories: Path, tmp_path: Path, options: Options) -> None:
    partial = stopped(stories, tmp_path / "out", options())

    with pytest.raises(QuantkitError, match="unfinished conversion"):
        OpenedCheckpoint(partial)
    with pytest.raises(QuantkitError, match="unfinished conversion"):
        convert(str(partial), tmp_path / "other", options())
    with pytest.raises((OSError, ValueError)):
        AutoConfig.from_pretrained(partial)


CHANGES = {
    "recipe": ({"recipe": "w3a16-gptq"}, r"recipe was \"w4a16-gptq\" and is now \"w3a16-gptq\""),
    "override": ({"overrides": ("down_proj=w8a16-channel",)}, r"rule 1 was \"\.\*: w4a16 by gptq\" and is now \"down_proj: w8a16-channel by gptq\""),
    "format": ({"format": "gptq"}, r"format was \"compressed-tensors\" and is now \"gptq\""),
    "num_samples": ({"num_samples": 3}, r"num_samples was 4 and is now 3"),
    "dtype": ({"dtype": "bfloat16"}, r"dtype was \"auto\" and is now \"bfloat16\""),
    "shards": ({"max_shard_size": 10**6}, r"max_shard_size was 5000000000 and is now 1000000"),
    "measure": ({"measure": False}, r"measure was true and is now false"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_options_are_refused_by_name_and_lose_nothing(change: str, stories: Path, tmp_path: Path, options: Options) -> None:
    partial = stopped(stories, tmp_path / "out", options())
    before = contents(partial)
    settings, message = CHANGES[change]

    with pytest.raises(OutputError, match=message) as caught:
        convert(str(stories), tmp_path / "out", options(**settings))

    assert "--fresh" in str(caught.value)
    assert contents(partial) == before


def test_another_machine_is_refused(stories: Path, tmp_path: Path, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(stories, tmp_path / "out", options())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "VSX")

    with pytest.raises(OutputError, match=r"device was \"cpu .*\" and is now \"cpu VSX, "):
        convert(str(stories), tmp_path / "out", options())


def test_another_transformers_is_refused(stories: Path, tmp_path: Path, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(stories, tmp_path / "out", options())
    monkeypatch.setattr("quantkit.conversion.convert.version", lambda name: "99.0" if name == "transformers" else version(name))

    with pytest.raises(OutputError, match=r"transformers was .* and is now \"99\.0\""):
        convert(str(stories), tmp_path / "out", options())


def test_another_source_is_refused(copied: Path, tmp_path: Path, options: Options) -> None:
    stopped(copied, tmp_path / "out", options())
    edit_tensors(copied, lambda tensors: tensors["model.norm.weight"].mul_(2))

    with pytest.raises(OutputError, match="source fingerprint was"):
        convert(str(copied), tmp_path / "out", options())


def test_fresh_starts_over_with_other_options(stories: Path, tmp_path: Path, options: Options) -> None:
    stopped(stories, tmp_path / "out", options())
    listener = Stopping()

    convert(str(stories), tmp_path / "out", options("w3a16-gptq", fresh=True), listener)

    assert listener.resumed == []
    assert {s.name for s in OpenedCheckpoint(tmp_path / "out").schemes.values()} == {"w3a16-g64", "w8a16-channel"}


@pytest.mark.parametrize("recipe", ["w4a16-gptq", "w4a16-rtn"])
def test_a_disk_that_fills_up_keeps_the_work_and_the_same_command_goes_on(
    recipe: str, stories: Path, tmp_path: Path, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, left = os.pwrite, [90]

    def full(descriptor: int, content: bytes, offset: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, content, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OutputError, match=r"No space left.*the same command goes on"):
            convert(str(stories), tmp_path / "out", options(recipe))
    listener = Stopping()
    convert(str(stories), tmp_path / "out", options(recipe), listener)

    assert listener.resumed
    convert(str(stories), tmp_path / "whole", options(recipe))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_shards_that_vanished_are_noticed(stories: Path, tmp_path: Path, options: Options) -> None:
    partial = stopped(stories, tmp_path / "out", options())
    (partial / "model.safetensors").unlink()

    with pytest.raises(OutputError, match="--fresh"):
        convert(str(stories), tmp_path / "out", options())


def test_hidden_states_in_a_file_give_the_same_bytes(stories: Path, tmp_path: Path, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(str(stories), tmp_path / "whole", options())
    sizes: list[int] = []
    reserve = os.posix_fallocate
    monkeypatch.setattr("quantkit.conversion.hidden_states.IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(os, "posix_fallocate", lambda file, start, size: sizes.append(size) or reserve(file, start, size))

    convert(str(stories), tmp_path / "out", options())

    width = AutoConfig.from_pretrained(stories).hidden_size
    assert sizes == [rows * 64 * width * 4 for rows in (4, 1, 1)]
    assert not list(tmp_path.rglob("*.states"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert torch.equal(*(OpenedCheckpoint(tmp_path / name).get("model.norm.weight") for name in ("out", "whole")))


def test_hidden_states_that_find_no_room_are_an_error_in_words(
    stories: Path, tmp_path: Path, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("quantkit.conversion.hidden_states.IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(os, "posix_fallocate", full)

    with pytest.raises(OutputError, match=r"calibration\.states: No space left on device; free some space"):
        convert(str(stories), tmp_path / "out", options())

    assert not list(tmp_path.rglob("*.states"))


def test_hidden_states_count_as_space_that_is_needed(stories: Path, tmp_path: Path, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    needed: list[int] = []
    monkeypatch.setattr("quantkit.conversion.convert.require_space", lambda folder, size: needed.append(size))
    monkeypatch.setattr("quantkit.conversion.hidden_states.IN_MEMORY_BYTES", 0)

    convert(str(stories), tmp_path / "out", options())

    assert needed[-1] - needed[0] == 6 * 64 * AutoConfig.from_pretrained(stories).hidden_size * 4
