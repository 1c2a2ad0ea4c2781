"""Results as JSON files: of a kind and a schema version, written whole or not at all, and read with every mistake named."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from quantkit.errors import OutputError, UsageError


class Part(BaseModel):
    """Of a document. What is not known in it is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Document(Part):
    """A file of its own; `kind` and `schema_version` have one value in each class.

    Attributes:
        WHAT: in words, with the command that writes it.
        AGAIN: what to do about a file of another version.
    """

    WHAT: ClassVar[str]
    AGAIN: ClassVar[str]

    kind: str
    schema_version: int

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"

    def write(self, path: Path) -> None:
        """Raises OutputError where it cannot be written."""
        write_text(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises UsageError: it cannot be read, or is not of this kind and schema version."""
        return read_any(path, cls)

    @classmethod
    def is_of(cls, content: Any) -> bool:
        """Whether the content of a file says that it is of this kind."""
        return isinstance(content, dict) and content.get("kind") == cls.model_fields["kind"].default

    @classmethod
    def parse(cls, content: dict[str, Any], path: Path) -> Self:
        """Raises UsageError: the content of the file is of another schema version, or not what the schema says."""
        version = cls.model_fields["schema_version"].default
        if content.get("schema_version") != version:
            raise UsageError(f"{path} has schema version {content.get('schema_version')}, this quantkit reads {version}; {cls.AGAIN}")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            problem = error.errors()[0]
            raise UsageError(f"{path}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from error

    @classmethod
    def schema(cls) -> str:
        return json.dumps(cls.model_json_schema(), indent=1) + "\n"


AnyDocument = TypeVar("AnyDocument", bound=Document)


def read_any(path: Path, *kinds: type[AnyDocument]) -> AnyDocument:
    """A file of one of some kinds.

    Raises:
        UsageError: it cannot be read, is of none of them, or of another schema version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"results file {path} cannot be read: {error}") from error
    for kind in kinds:
        if kind.is_of(content):
            return kind.parse(content, path)
    raise UsageError(f"{path} is not {' or '.join(kind.WHAT for kind in kinds)}")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all.

    Raises:
        OutputError: it cannot be written there.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise OutputError(f"results cannot be written to {path}: {error.strerror}") from error
