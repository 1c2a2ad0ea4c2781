"""The `quantkit` command and how it ends: results on stdout, one clear message on stderr, a meaningful exit code."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import click

from quantkit import __version__
from quantkit.errors import QuantkitError

COMMANDS = {
    "convert": "quantkit.cli.convert:convert",
    "inspect": "quantkit.cli.inspect:inspect",
    "verify": "quantkit.cli.verify:verify",
    "generate": "quantkit.cli.generate:generate",
    "chat": "quantkit.cli.chat:chat",
    "serve": "quantkit.cli.serve:serve",
    "eval": "quantkit.cli.eval:evaluate",
    "lm-eval": "quantkit.cli.lm_eval:lm_eval",
    "report": "quantkit.cli.report:report",
    "recommend": "quantkit.cli.recommend:recommend",
    "ci": "quantkit.cli.ci:ci",
    "recipes": "quantkit.cli.recipes:recipes",
    "bench": "quantkit.cli.bench:bench",
}


class LazyGroup(click.Group):
    """Imports a command's module when the command is named. The modules import their stories when they run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            from quantkit.errors import did_you_mean

            raise click.UsageError(f"no command {args[0]!r}; {did_you_mean(args[0], COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="quantkit")
def cli() -> None:
    """Make a Hugging Face language model small, and prove what that cost.

    \b
    quantkit convert reference -o out            # 4 bits by GPTQ, on the model that ships with quantkit
    quantkit convert org/name -o out -r w4a16-gptq -f gptq
    quantkit eval out --baseline org/name
    quantkit generate out --prompt "Once upon a time"
    quantkit serve out                           # OpenAI's API on http://127.0.0.1:8000/v1

    Add --debug to any command for a full traceback on errors.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 an error, 2 wrong usage, 130 stopped by Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments or bool(os.environ.get("QUANTKIT_DEBUG"))
    arguments = [a for a in arguments if a != "--debug"]
    try:
        result = cli.main(arguments, prog_name="quantkit", standalone_mode=False, obj=list(arguments))
        sys.exit(result if isinstance(result, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _fail("stopped", debug, 130)
    except QuantkitError as error:
        _fail(str(error), debug, error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except Exception as error:
        _fail(f"{type(error).__name__}: {error}\nThis is a fault in quantkit or in a library it uses; --debug shows where.", debug, 1)


def _fail(message: str, debug: bool, code: int) -> None:
    if debug:
        import traceback

        traceback.print_exc()
    click.echo(f"Error: {message}", err=True)
    sys.exit(code)
