"""What to score: tasks with their shots and limits, named one by one or as a suite in YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quantkit.errors import UsageError, did_you_mean
from quantkit.paths import packaged


class SuiteTask(BaseModel):
    """One task or group of lm-eval's.

    Attributes:
        num_fewshot: examples before each question; None for what the task's definition says.
        limit: documents of each task, the first ones; None for all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str = Field(min_length=1)
    num_fewshot: int | None = Field(default=None, ge=0)
    limit: int | None = Field(default=None, ge=1)

    def changed(self, *, num_fewshot: int | None, limit: int | None) -> SuiteTask:
        """This task with the user's own numbers where there are any."""
        given = {"num_fewshot": num_fewshot, "limit": limit}
        return self.model_copy(update={name: value for name, value in given.items() if value is not None})


class Suite(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str = ""
    tasks: tuple[SuiteTask, ...] = Field(min_length=1)

    @classmethod
    def load(cls, name: str) -> Suite:
        """A shipped suite by name, or a YAML file by path.

        Raises:
            UsageError: there is no such suite, or it is not valid; the message names the key.
        """
        shipped = {path.stem: path for path in (packaged("evals") / "suites").glob("*.yaml")}
        path = shipped.get(name, Path(name))
        if name not in shipped and path.suffix not in (".yaml", ".yml"):
            raise UsageError(f"unknown suite {name!r}; {did_you_mean(name, shipped)}")
        try:
            return cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"suite file {name} cannot be read: {error}") from error
        except yaml.YAMLError as error:
            raise UsageError(f"suite {name} is not YAML: {error}") from error
        except ValidationError as error:
            raise UsageError(f"suite {name}: {_first_problem(error.errors()[0])}") from error


def _first_problem(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        return f"{where or 'the file'}: {problem['msg']}"
    known = SuiteTask.model_fields if "tasks" in problem["loc"] else Suite.model_fields
    return f"unknown key {where!r}; {did_you_mean(str(problem['loc'][-1]), known)}"
