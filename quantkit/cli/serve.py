"""`quantkit serve`: a model behind OpenAI's API."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from quantkit.cli.engine_options import engine_options, engine_settings
from quantkit.errors import UsageError

_LIBRARIES = frozenset({"fastapi", "starlette", "uvicorn", "prometheus_client"})


@click.command()
@click.argument("source")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for every one of this machine.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 for any that is free.")
@click.option("--served-model-name", "names", multiple=True, help="What clients call the model; may be repeated. SOURCE by default.")
@click.option("--max-sequences", type=click.IntRange(1), default=128, show_default=True, help="Sequences that run at once.")
@click.option("--max-waiting", type=click.IntRange(1), default=2048, show_default=True,
              help="Requests that may queue; more get a 503, and one of more prompts a 400.")
@click.option("--shutdown-timeout", type=click.FloatRange(0), default=30, show_default=True, help="Seconds that running requests have at the end.")
@engine_options
def serve(source: str, host: str, port: int, names: tuple[str, ...], shutdown_timeout: float, **options: Any) -> None:
    """Serve the model SOURCE over HTTP, as OpenAI's API has it: /v1/completions, /v1/chat/completions, /v1/models; /health and /metrics beside them.

    \b
    quantkit serve out --port 8000
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "Once upon a time", "max_tokens": 32}'

    Adapters given with --lora are served under their names, as models of their own.

    SIGTERM or Ctrl-C lets running requests finish; a second one ends at once.
    """
    try:
        from quantkit.server.listen import open_socket, url_of
        from quantkit.server.listen import serve as run

        with open_socket(host, port) as listener:
            from quantkit.server.app import create_app
            from quantkit.server.served import require_distinct

            names = names or (source,)
            require_distinct(names, options["lora"])
            thread = _start(source, options)
            ready = partial(click.echo, f"serving {source} at {url_of(listener)}/v1", err=True)
            run(create_app(thread, names), thread, listener, shutdown_timeout=shutdown_timeout, ready=ready)
    except ModuleNotFoundError as error:
        if error.name not in _LIBRARIES:
            raise
        raise UsageError(f"quantkit serve needs {error.name}: pip install 'quantkit[serve]'") from error


def _start(source: str, options: dict[str, Any]) -> Any:
    """The model in a thread of its own, its cache said on stderr."""
    from quantkit.runtime.engine import Engine
    from quantkit.runtime.engine_thread import EngineThread
    from quantkit.runtime.options import EngineOptions

    limits = {name: options[name] for name in ("max_sequences", "max_waiting")}
    engine = Engine(source, EngineOptions(**engine_settings(options), **limits))
    click.echo(f"KV cache: {engine.describe_cache()}", err=True)
    return EngineThread(engine)
