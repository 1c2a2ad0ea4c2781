"""Conversations: the forms they are stored in, and how the model's own template renders them.

A form is a function from a record to messages, [{"role", "content", ...}]. Rendering goes through `apply_chat_template`, so the tokens
are those the model will be served with, tool calls and control tokens included.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
Record = dict[str, Any]
ROLES = {
    "human": "user", "user": "user", "prompter": "user", "customer": "user",
    "gpt": "assistant", "assistant": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "system": "system", "developer": "developer",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool",
    "function_call": "assistant",
}  # fmt: skip


class NotAConversation(ValueError):
    """The record is not of the form it looked like; the message is the reason it is dropped for."""


def from_messages(messages: list[Any]) -> list[Message]:
    """OpenAI's form, {"role", "content"}, or ShareGPT's, {"from", "value"}; other keys (tool_calls, ...) stay."""
    result = []
    for message in messages:
        if not isinstance(message, dict):
            raise NotAConversation("a message is not an object")
        message = {key: value for key, value in message.items() if value is not None}
        role = message.pop("role", None) or message.pop("from", None)
        content = message.pop("content", None)
        content = message.pop("value", None) if content is None else content
        if not isinstance(role, str):
            raise NotAConversation("a message has no role")
        if content is None and "tool_calls" not in message:
            raise NotAConversation("a message has no content")
        message.pop("weight", None)
        if isinstance(message.get("tool_calls"), list):
            message["tool_calls"] = [_with_parsed_arguments(call) for call in message["tool_calls"]]
        result.append({"role": ROLES.get(role.lower(), role), "content": _plain(content), **message})
    if not result:
        raise NotAConversation("no messages")
    return result


def _with_parsed_arguments(call: Any) -> Any:
    """OpenAI sends a call's arguments as a JSON string; chat templates expect the object."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except json.JSONDecodeError:
        return call


def _plain(content: Any) -> str:
    """Text of a message whose content may be OpenAI's list of parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    if all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        return "".join(part["text"] for part in parts)
    raise NotAConversation("a message is not text")


def from_alpaca(record: Record) -> list[Message]:
    """instruction, input and output; an optional system, and an optional history of pairs."""
    instruction, extra = record.get("instruction") or "", record.get("input") or ""
    user = "\n\n".join(part for part in (instruction, extra) if part)
    answer = next((record[key] for key in ALPACA_ANSWERS if isinstance(record.get(key), str)), "")
    return from_turns(user, answer, system=record.get("system"), history=record.get("history") or ())


ALPACA_ANSWERS = ("output", "response", "completion", "answer")


def from_turns(prompt: Any, response: Any, *, system: Any = None, history: Iterable[Any] = ()) -> list[Message]:
    """One exchange. A prompt or a response may itself be a list of messages, as preference sets store them."""
    messages: list[Message] = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
    for pair in history:
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    for role, part in (("user", prompt), ("assistant", response)):
        if isinstance(part, list):
            messages += from_messages(part)
        elif isinstance(part, str) and part.strip():
            messages.append({"role": role, "content": part})
        else:
            raise NotAConversation("an empty prompt or response")
    return messages


def threads(rows: Iterable[Record]) -> Iterator[list[Message]]:
    """oasst1's flat rows -> one thread a tree: from each root always to the best ranked reply, ending with an assistant's.

    Rows whose parent is not among them are left out: a thread without its beginning is not a conversation.
    """
    children: dict[str, list[Record]] = {}
    roots = []
    for row in rows:
        if row.get("deleted"):
            continue
        parent = row.get("parent_id")
        if parent is None:
            roots.append(row)
        else:
            children.setdefault(parent, []).append(row)
    for root in roots:
        path, node = [], root
        while True:
            path.append(node)
            replies = children.get(node["message_id"])
            if not replies:
                break
            node = min(replies, key=lambda row: row["rank"] if isinstance(row.get("rank"), int | float) else len(replies))
        messages = from_messages([{"role": row["role"], "content": row["text"]} for row in path])
        if messages[-1]["role"] == "user":
            messages.pop()
        if messages:
            yield messages


@dataclass(frozen=True, slots=True)
class Rendered:
    """`plain` is why the model's own template did not render it, None when it did."""

    text: str
    plain: str | None = None


def render(tokenizer: Any, messages: list[Message], tools: Any = None) -> Rendered:
    """Through the tokenizer's chat template; plain "Role: text" paragraphs only when it has none.

    Raises NotAConversation when the template refuses the conversation, also after merging what many templates refuse: a system message,
    and two messages of one role in a row.
    """
    if not getattr(tokenizer, "chat_template", None):
        return Rendered(plain_text(messages), plain="the tokenizer has no chat template")
    import jinja2

    arguments: Record = {"tokenize": False, "add_generation_prompt": False}
    tools = _tools(tools)
    if tools:
        arguments["tools"] = tools
    error: Exception | None = None
    for attempt in (_same, merged):
        try:
            return Rendered(tokenizer.apply_chat_template(attempt(messages), **arguments))
        except (jinja2.TemplateError, TypeError, ValueError) as refused:
            error = refused
    raise NotAConversation("the chat template refuses the conversation") from error


def _tools(tools: Any) -> Any:
    """A list of schemas, which some sets store as a JSON string."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise NotAConversation("its tools are not JSON") from error
    return tools or None


def _same(messages: list[Message]) -> list[Message]:
    return messages


def merged(messages: list[Message]) -> list[Message]:
    """The system message in front of the first user message, and neighbours of one role as one."""
    result: list[Message] = []
    for message in messages:
        role = "user" if message["role"] in ("system", "developer") else message["role"]
        if result and result[-1]["role"] == role and role in ("user", "assistant"):
            result[-1] = {**result[-1], "content": result[-1]["content"] + "\n\n" + message["content"]}
        else:
            result.append({**message, "role": role})
    return result


def plain_text(messages: list[Message]) -> str:
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)
