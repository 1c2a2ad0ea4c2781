"""How the command line answers and ends: help at once, results on stdout, one message on stderr, an exit code that means something."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import click
import pytest

from quantkit import __version__
from quantkit.cli.main import COMMANDS, cli, main
from quantkit.errors import CheckpointError, Interrupted, OutputError, QuantkitError, UsageError

HEAVY = {"torch", "transformers", "numpy", "datasets", "accelerate", "pydantic", "rich"}


def ending(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Make `quantkit verify` raise what it is given."""

    def fail_with(error: BaseException) -> None:
        def callback() -> None:
            raise error

        known = cli.get_command
        monkeypatch.setattr(
            cli, "get_command", lambda ctx, name: click.Command("verify", callback=callback) if name == "verify" else known(ctx, name)
        )

    return fail_with


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_answers_at_once_and_imports_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import atexit, sys, time\n"
        f"heavy = {HEAVY!r}\n"
        "atexit.register(lambda: print(time.process_time(), *sorted(heavy & set(sys.modules)), file=sys.stderr))\n"
        f"from quantkit.cli import main\nmain({arguments!r})\n"
    )

    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    seconds, *imported = ended.stderr.split()
    assert not imported
    assert float(seconds) < 0.3  # of the processor, the interpreter's start included
    assert ended.stdout.startswith(f"quantkit, version {__version__}" if arguments == ["--version"] else "Usage: quantkit")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending("--help") == 0

    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)


def test_an_unknown_command_is_answered_with_near_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending("convret") == 2

    shown = capsys.readouterr()
    assert "no command 'convret'; did you mean 'convert'?" in shown.err and shown.out == ""


def test_an_unknown_option_is_answered_with_near_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending("convert", "model", "-o", "out", "--recpie", "w4a16-gptq") == 2

    assert "--recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [(OutputError("no space"), 1), (CheckpointError("cut"), 1), (UsageError("no such thing"), 2), (Interrupted("stopped"), 130)],
    ids=str,
)
def test_an_error_is_one_message_and_its_exit_code(
    error: QuantkitError, code: int, failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    failing(error)

    assert ending("verify") == code

    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"Error: {error}\n")


def test_debug_shows_where(failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    failing(OutputError("no space"))

    for debug in (["verify", "--debug"], ["--debug", "verify"]):
        assert ending(*debug) == 1
        shown = capsys.readouterr().err
        assert "Traceback" in shown and shown.endswith("Error: no space\n")
    monkeypatch.setenv("QUANTKIT_DEBUG", "1")
    assert ending("verify") == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), click.Abort()], ids=["Ctrl-C", "abort"])
def test_ctrl_c_ends_with_130(stop: BaseException, failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]) -> None:
    failing(stop)

    assert ending("verify") == 130

    shown = capsys.readouterr().err
    assert "Error: stopped" in shown and "Traceback" not in shown


def test_a_fault_of_ours_is_said_to_be_one(failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]) -> None:
    failing(ZeroDivisionError("division by zero"))

    assert ending("verify") == 1

    shown = capsys.readouterr().err
    assert shown.startswith("Error: ZeroDivisionError: division by zero\nThis is a fault in quantkit") and "--debug shows where" in shown
