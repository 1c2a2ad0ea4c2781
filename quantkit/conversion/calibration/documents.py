"""Records -> documents: which columns hold the text or the turns, by the user's word or by the names data sets really use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from quantkit.conversion.calibration.chat import ALPACA_ANSWERS, Message, NotAConversation, from_alpaca, from_messages, from_turns, threads
from quantkit.conversion.calibration.options import CalibrationOptions
from quantkit.errors import CalibrationError, did_you_mean

Record = dict[str, Any]
MESSAGE_COLUMNS = ("messages", "conversations", "conversation", "chosen", "dialog", "dialogue")
TEXT_COLUMNS = ("text", "content", "document", "article", "passage", "body", "code", "story", "markdown", "raw_content")
TURN_COLUMNS = (
    ("prompt", "response"), ("prompt", "completion"), ("prompt", "chosen"), ("prompt", "answer"), ("question", "answer"),
    ("question", "response"), ("query", "response"), ("query", "answer"), ("input", "output"), ("problem", "solution"), ("inputs", "targets"),
)  # fmt: skip
THREAD_COLUMNS = {"message_id", "parent_id", "role", "text"}


@dataclass(frozen=True, slots=True)
class Document:
    """Either text, or messages with the tools that were offered."""

    text: str | None = None
    messages: list[Message] | None = None
    tools: Any = None


@dataclass(slots=True)
class Documents:
    """Turns records into documents, and counts those that are none by reason."""

    options: CalibrationOptions
    source: str
    dropped: Counter[str] = field(default_factory=Counter)

    def read(self, records: Iterable[Record]) -> Iterator[Document]:
        """Raises CalibrationError when the columns hold nothing usable; a single empty or odd record is only dropped."""
        rows: list[Record] = []
        names_columns = self.options.text_column is not None or self.options.prompt_column is not None
        for number, record in enumerate(records):
            if number == 0:
                self._check_columns(record)
            if not names_columns and record.keys() >= THREAD_COLUMNS:
                rows.append(record)
                continue
            try:
                document = self._document(record)
            except NotAConversation as reason:
                self.dropped[str(reason)] += 1
                continue
            if document.messages is None and not (document.text or "").strip():
                self.dropped["empty"] += 1
                continue
            yield document
        try:
            yield from (Document(messages=thread) for thread in threads(rows))
        except NotAConversation as reason:
            raise CalibrationError(f"{self.source}: cannot rebuild the threads of message_id and parent_id: {reason}") from reason

    def _check_columns(self, record: Record) -> None:
        options = self.options
        for option in ("text_column", "prompt_column", "response_column"):
            column = getattr(options, option)
            if column is not None and column not in record:
                raise CalibrationError(f"{self.source} has no column {column!r} ({option}); {did_you_mean(column, map(str, record))}")

    def _document(self, record: Record) -> Document:
        options = self.options
        if options.text_column is not None:
            return self._by_value(_value(record, options.text_column), options.text_column, record)
        if options.prompt_column is not None and options.response_column is not None:
            prompt, response = _value(record, options.prompt_column), _value(record, options.response_column)
            return Document(messages=from_turns(prompt, response, system=record.get("system")))
        filled = {name: value for name, value in record.items() if value not in (None, "", [])}
        for column in MESSAGE_COLUMNS:
            if isinstance(filled.get(column), list) and isinstance(filled[column][0], dict):
                return self._by_value(filled[column], column, record)
        if "instruction" in filled and any(name in record for name in ALPACA_ANSWERS):
            return Document(messages=from_alpaca(record))
        for prompt, response in TURN_COLUMNS:
            if prompt in record and response in record and prompt in filled:
                return Document(messages=from_turns(record[prompt], record[response], system=record.get("system")))
        for column in TEXT_COLUMNS:
            if isinstance(record.get(column), str):
                return Document(text=record[column])
        texts = [name for name, value in record.items() if isinstance(value, str)]
        if len(texts) == 1:
            return Document(text=record[texts[0]])
        if not filled or any(column in record for column in (*TEXT_COLUMNS, *MESSAGE_COLUMNS)):
            raise NotAConversation("empty")
        raise CalibrationError(
            f"{self.source}: no column that is surely the text; columns: {', '.join(map(str, record))}. "
            "Name one with text_column, or two with prompt_column and response_column"
        )

    def _by_value(self, value: Any, column: str, record: Record) -> Document:
        if isinstance(value, str):
            return Document(text=value)
        if value is None or value == []:
            raise NotAConversation("empty")
        if isinstance(value, list) and isinstance(value[0], dict):
            messages = from_messages(value)
            system = record.get("system")
            if isinstance(system, str) and system and messages[0]["role"] not in ("system", "developer"):
                messages.insert(0, {"role": "system", "content": system})
            return Document(messages=messages, tools=record.get("tools"))
        raise CalibrationError(
            f"{self.source}: column {column!r} holds {type(value).__name__}, which is neither text nor a list of messages; "
            f"columns: {', '.join(map(str, record))}"
        )


def _value(record: Record, column: str) -> Any:
    """A named column, which the first record has but a later one may lack."""
    if column not in record:
        raise NotAConversation(f"no column {column!r}")
    return record[column]
