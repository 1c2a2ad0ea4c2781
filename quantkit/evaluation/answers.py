"""Answers kept between runs: an interrupted run goes on where it was, a repeated one needs no model.

A JSON-lines file for each model, appended to as requests are done. A line that a kill cut short is passed over, and its request asked again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from quantkit.errors import OutputError
from quantkit.evaluation.lm import EngineLM

Answer = tuple[float, bool] | float | str


class AnswerFile:
    """The answers of one model in one setting.

    Args:
        identity: whatever decides an answer beside the request: weights, tokenizer, mode, versions.
        is_fresh: begin anew; what was there is gone.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], *, is_fresh: bool = False) -> None:
        self._identity = json.dumps(identity, sort_keys=True)
        self.path = folder / f"{_digest(self._identity)[:24]}.jsonl"
        self._answers: dict[str, tuple[Answer, bool]] = {}
        self._file: TextIO | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if is_fresh:
                self.path.unlink(missing_ok=True)
            if self.path.is_file():
                self._read()
        except OSError as error:
            raise OutputError(f"answers cannot be kept in {folder}: {error.strerror}; name another folder with --cache-dir") from error

    def key(self, kind: str, arguments: Iterable[Any]) -> str:
        return _digest(json.dumps([self._identity, kind, *arguments], sort_keys=True, ensure_ascii=False))

    def get(self, key: str) -> tuple[Answer, bool] | None:
        """An answer, and whether its request was cut; None if there is none yet."""
        return self._answers.get(key)

    def add(self, key: str, answer: Answer, *, is_cut: bool) -> None:
        self._answers[key] = answer, is_cut
        if self._file is None:
            self._file = self._open()
        self._file.write(json.dumps({"key": key, "answer": answer, "cut": is_cut}, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> TextIO:
        is_new = not self.path.exists()
        file = self.path.open("a", encoding="utf-8")
        file.write(json.dumps({"identity": json.loads(self._identity)}) + "\n" if is_new else "\n")  # ends a line that was cut short
        return file

    def _read(self) -> None:
        for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                row = json.loads(line)
                answer = row["answer"]
                self._answers[row["key"]] = (answer[0], answer[1]) if isinstance(answer, list) else answer, bool(row["cut"])
            except (ValueError, KeyError, TypeError, IndexError):
                continue


class RememberingLM(LM):
    """An EngineLM that is opened for the requests that have no answer yet, and asked each of them once.

    Attributes:
        num_asked, num_known, num_cut: requests so far; of those, answered before; and longer than the context.
    """

    def __init__(self, open_lm: Callable[[], EngineLM], answers: AnswerFile) -> None:
        super().__init__()
        self._open_lm, self._answers = open_lm, answers
        self._lm: EngineLM | None = None
        self.num_asked = self.num_known = self.num_cut = 0

    @property
    def lm(self) -> EngineLM:
        if self._lm is None:
            self._lm = self._open_lm()
            self._lm.set_cache_hook(self)  # it calls add_partial as each request is done
        return self._lm

    @property
    def tokenizer_name(self) -> str:
        return self.lm.tokenizer_name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.lm.apply_chat_template(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.lm.chat_template(chat_template)

    def loglikelihood(self, requests: list[Instance]) -> list[Answer]:
        return self._answer("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[Answer]:
        return self._answer("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance]) -> list[Answer]:
        """Sampled text is new every time it is asked for."""
        sampled = [number for number, request in enumerate(requests) if is_sampled(request.args[1])]
        texts = dict(zip(sampled, self.lm.generate_until([requests[n] for n in sampled]) if sampled else [], strict=True))
        others = [number for number in range(len(requests)) if number not in texts]
        self.num_asked += len(sampled)
        texts |= zip(others, self._answer("generate_until", [requests[n] for n in others]), strict=True)
        return [texts[number] for number in range(len(requests))]

    def add_partial(self, kind: str, arguments: tuple[Any, ...], answer: Answer) -> None:
        if kind != "generate_until" or not is_sampled(arguments[1]):
            self._answers.add(self._answers.key(kind, arguments), answer, is_cut=arguments[0] in self.lm.cut_texts)

    def _answer(self, kind: str, requests: list[Instance]) -> list[Answer]:
        keys = [self._answers.key(kind, request.args) for request in requests]
        unknown = {key: request for key, request in zip(keys, requests, strict=True) if self._answers.get(key) is None}
        self.num_asked += len(requests)
        self.num_known += sum(key not in unknown for key in keys)
        if unknown:
            getattr(self.lm, kind)(list(unknown.values()))
        found = [self._answers.get(key) for key in keys]
        assert all(each is not None for each in found)
        self.num_cut += sum(each[1] for each in found)
        return [each[0] for each in found]


def is_sampled(settings: dict[str, Any]) -> bool:
    return bool(settings.get("temperature")) and bool(settings.get("do_sample", True))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
