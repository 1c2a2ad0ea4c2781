"""lm-eval's own command line with quantkit's runtime as one of its models, named `quantkit`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string

from quantkit.errors import UsageError, did_you_mean
from quantkit.evaluation.lm import EngineLM
from quantkit.runtime.llm import LLM
from quantkit.runtime.options import EngineOptions

NAME = "quantkit"
_COMMANDS = frozenset({"run", "ls", "validate"})


class HarnessLM(EngineLM):
    """An EngineLM that lm-eval makes from `--model_args pretrained=...,mode=...,max_length=...`."""

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> HarnessLM:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: Mapping[str, Any], additional_config: dict[str, Any] | None = None) -> HarnessLM:
        """
        Args:
            arg_dict: `pretrained`, `max_length`, and fields of EngineOptions.
            additional_config: lm-eval's own --batch_size and --device (cuda:0 unless it is given) are not taken: batches are the engine's, and
                `device` is among the arguments.

        Raises:
            UsageError: an argument is not known.
        """
        settings = dict(arg_dict)
        source, max_length = settings.pop("pretrained", None), settings.pop("max_length", None)
        if not source:
            raise UsageError("name the model: --model_args pretrained=FOLDER")
        known = {field.name for field in fields(EngineOptions)}
        for name in settings:
            if name not in known:
                raise UsageError(f"unknown model argument {name!r}; {did_you_mean(name, {*known, 'pretrained', 'max_length'})}")
        return cls(LLM(str(source), **settings), max_length=max_length)


def register() -> None:
    """Make the model known to lm-eval in this process; doing so again changes nothing."""
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        register_model(NAME)(HarnessLM)


def run(arguments: list[str]) -> None:
    """lm-eval's command line; where no model is named, it is quantkit's."""
    register()
    is_run = bool(arguments) and arguments[0] not in _COMMANDS - {"run"} and not {"-h", "--help"} & set(arguments)
    names_model = any(each.partition("=")[0] in ("--model", "-M", "--config", "-C") for each in arguments)
    words = [*arguments, "--model", NAME] if is_run and not names_model else list(arguments)
    before, sys.argv = sys.argv, ["lm-eval", *words]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
