"""Structures at work: compiled to grammars in threads of their own with a limit of time, and masks of the tokens that may come next.

llguidance does it; its own limits bound the memory and time of a grammar and of each mask, and what exceeds them fails one request.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as TookTooLong
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import BusyError, RequestError
from quantkit.runtime.structure import Structure

COMPILE_SECONDS = 10.0
NUM_THREADS = 2
NUM_KEPT = 128
NUM_PENDING = 64
MAX_MESSAGE = 300
STACK_BYTES = 256 << 20
"""Of the threads that compile: the library follows rules into rules, and thousands of them would break through the usual stack."""
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,16}"
"""Between the parts of JSON: bounded, lest a model never come back from it."""
_BUSY = "too many structures are being compiled already; try again later"


class Matcher:
    """One text on its way through its structure."""

    def __init__(self, inner: Any, vocabulary: int, eos: frozenset[int]) -> None:
        self._inner, self._vocabulary, self._eos = inner, vocabulary, sorted(eos)
        self._allowed: Tensor | None = None

    def copy(self) -> Matcher:
        twin = Matcher(self._inner.deep_copy(), self._vocabulary, frozenset(self._eos))
        twin._allowed = self._allowed
        return twin

    def allowed(self) -> Tensor:
        """bool [V], the tokens that may come next; none of them after an error. Kept until a token is taken."""
        if self._allowed is None:
            bits = torch.frombuffer(bytearray(self._inner.compute_bitmask()), dtype=torch.uint8)
            mask = (bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten()[: self._vocabulary].bool()
            mask = torch.nn.functional.pad(mask, (0, self._vocabulary - len(mask)))
            self._allowed = mask & (self.error is None)
        return self._allowed

    def take(self, token: int) -> None:
        """One more token of the text; an end of text changes nothing."""
        self._allowed = None
        if token not in self._eos:
            self._inner.consume_token(token)

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow but the end."""
        return self._inner.is_stopped() and self.error is None

    @property
    def error(self) -> str | None:
        return _first_line(self._inner.get_error()) if self._inner.is_error() else None


class Compiler:
    """Compiles structures for one tokenizer, each once; safe to ask from any thread, so that a server can do it before its engine is concerned.

    Args:
        vocabulary: the number of the model's logits.
        eos: its ends of text, each of which may end a structure that is complete.
        seconds: how long a structure may take.

    Raises:
        RequestError: llguidance is not installed, or the tokenizer is not one it reads.
    """

    def __init__(self, tokenizer: Any, *, vocabulary: int, eos: frozenset[int], seconds: float = COMPILE_SECONDS) -> None:
        self._library, self._vocabulary, self._eos, self._seconds = _llguidance(), vocabulary, eos, seconds
        from llguidance.hf import from_tokenizer

        if not eos:
            raise RequestError("structured output needs an end of text, and the model names none")
        try:
            self._tokenizer = from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=sorted(eos))
        except ValueError as error:
            raise RequestError(f"structured output cannot read the model's tokenizer: {error}") from error
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="quantkit-structure")
        self._found: OrderedDict[Structure, Future[Matcher]] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, structure: Structure) -> Matcher:
        """A matcher at its beginning.

        Raises:
            RequestError: the structure cannot be compiled, nothing fits it, or it takes too long; BusyError: too many others are being compiled.
        """
        return self._result(structure, self._task(structure), self._seconds)

    async def compile_beside(self, structure: Structure) -> Matcher:
        """The same for callers in event loops, which go on meanwhile."""
        task, loop, is_done = self._task(structure), asyncio.get_running_loop(), asyncio.Event()

        def tell(_: Future[Matcher]) -> None:
            with suppress(RuntimeError):  # the caller's loop is closed, so nobody waits any more
                loop.call_soon_threadsafe(is_done.set)

        task.add_done_callback(tell)
        with suppress(TimeoutError):
            await asyncio.wait_for(is_done.wait(), self._seconds)
        return self._result(structure, task, 0)

    def _result(self, structure: Structure, task: Future[Matcher], seconds: float) -> Matcher:
        try:
            return task.result(seconds).copy()
        except (TookTooLong, CancelledError) as error:
            if task.cancel():  # it never began
                raise BusyError(_BUSY) from error
            raise RequestError(_too_slow(structure, self._seconds)) from error

    def _task(self, structure: Structure) -> Future[Matcher]:
        with self._lock:
            task = self._found.get(structure)
            if task is None or _has_failed(task):
                if sum(not each.done() for each in self._found.values()) >= NUM_PENDING:
                    raise BusyError(_BUSY)
                with _deep_stacks():
                    task = self._found[structure] = self._threads.submit(self._compiled, structure)
            self._found.move_to_end(structure)
            done = [each for each in self._found if self._found[each].done()]
            for old in done[: max(0, len(self._found) - NUM_KEPT)]:
                del self._found[old]
            return task

    def _compiled(self, structure: Structure) -> Matcher:
        matcher_of = self._library.LLMatcher
        try:
            inner = matcher_of(self._tokenizer, _grammar(matcher_of, structure), log_level=0)
        except ValueError as error:
            raise RequestError(f"the {structure.kind} does not compile: {_first_line(str(error))}") from error
        matcher = Matcher(inner, self._vocabulary, self._eos)
        if matcher.error is not None:
            raise RequestError(f"the {structure.kind} does not compile: {matcher.error}")
        if not matcher.allowed().any():
            raise RequestError(f"nothing fits the {structure.kind}: {matcher.error or 'it allows no first token'}")
        return matcher


def require_compilable(structure: Structure) -> None:
    """Refuse what compiles for no model, before one is loaded.

    Raises:
        RequestError: it does not compile, or llguidance is not installed.
    """
    matcher_of = _llguidance().LLMatcher
    with _deep_stacks():
        task = ThreadPoolExecutor(1).submit(lambda: matcher_of.validate_grammar(_grammar(matcher_of, structure)))
    try:
        complaint = task.result(COMPILE_SECONDS)
    except TookTooLong as error:
        raise RequestError(_too_slow(structure, COMPILE_SECONDS)) from error
    except ValueError as error:
        complaint = str(error)
    if complaint:
        raise RequestError(f"the {structure.kind} does not compile: {_first_line(complaint)}")


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise RequestError("structured output needs llguidance; install quantkit[structured]") from error
    return llguidance


@contextmanager
def _deep_stacks() -> Iterator[None]:
    """Of threads that are started within the body."""
    usual = threading.stack_size(STACK_BYTES)
    try:
        yield
    finally:
        threading.stack_size(usual)


def _too_slow(structure: Structure, seconds: float) -> str:
    return f"the {structure.kind} takes more than {seconds:g} seconds to compile; give a simpler one"


def _has_failed(task: Future[Matcher]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


def _grammar(matcher_of: Any, structure: Structure) -> str:
    """In llguidance's own form."""
    kind, text = structure.kind, structure.text
    if kind == "json_schema":
        return matcher_of.grammar_from_json_schema(text, {"whitespace_pattern": WHITESPACE})
    if kind == "json_object":
        return matcher_of.grammar_from_json_schema('{"type": "object"}', {"whitespace_pattern": WHITESPACE})
    if kind == "regex":
        return matcher_of.grammar_from_regex(text)
    if kind == "grammar":
        return matcher_of.grammar_from_lark(text)
    return matcher_of.grammar_from_lark("start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(text)))


def _first_line(message: str) -> str:
    """llguidance adds the state of its parser behind it."""
    return " ".join(message.split("<state>")[0].split())[:MAX_MESSAGE]
