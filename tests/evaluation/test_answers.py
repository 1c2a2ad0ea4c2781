"""Answers outlive a run: what was answered is not asked again, and a damaged file costs only its damaged lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from quantkit.evaluation.answers import AnswerFile, RememberingLM

IDENTITY = {"model": "abc", "mode": "fast"}


class Scripted:
    """Answers every request by the length of its text, and may stop on the way."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.cut_texts = {"too long"}
        self.stop_after = stop_after

    def set_cache_hook(self, hook: Any) -> None:
        self.hook = hook

    def _each(self, kind: str, requests: list[Instance], answer: Any) -> list[Any]:
        for request in requests:
            if self.stop_after is not None and len(self.asked) == self.stop_after:
                raise KeyboardInterrupt
            self.asked.append(request.args)
            self.hook.add_partial(kind, request.args, answer(request.args[0]))
        return [answer(request.args[0]) for request in requests]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return self._each("loglikelihood", requests, lambda text: (-float(len(text)), len(text) > 1))

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return self._each("loglikelihood_rolling", requests, lambda text: -float(len(text)))

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self._each("generate_until", requests, lambda text: text.upper())


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=n) for n, each in enumerate(arguments)]


PAIRS = requests("loglikelihood", [("a", " b"), ("too long", " b"), ("abc", " b"), ("a", " b")])


OPENED: list[AnswerFile] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().close()


def remembering(folder: Path, lm: Scripted, **settings: Any) -> RememberingLM:
    OPENED.append(AnswerFile(folder, settings.pop("identity", IDENTITY), **settings))
    return RememberingLM(lambda: lm, OPENED[-1])


def test_a_repeated_run_asks_nothing_and_opens_no_model(tmp_path: Path) -> None:
    first = remembering(tmp_path, lm := Scripted())
    answers = first.loglikelihood(PAIRS)
    rolling = first.loglikelihood_rolling(requests("loglikelihood_rolling", [("text",)]))
    text = first.generate_until(requests("generate_until", [("ü", {"until": ["\n"]})]))

    second = RememberingLM(lambda: pytest.fail("opened"), AnswerFile(tmp_path, IDENTITY))

    assert len(lm.asked) == 5  # equal requests are asked once
    assert second.loglikelihood(PAIRS) == answers == [(-1.0, False), (-8.0, True), (-3.0, True), (-1.0, False)]
    assert second.loglikelihood_rolling(requests("loglikelihood_rolling", [("text",)])) == rolling == [-4.0]
    assert second.generate_until(requests("generate_until", [("ü", {"until": ["\n"]})])) == text == ["Ü"]
    assert (second.num_asked, second.num_known, second.num_cut) == (6, 6, 1)


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        remembering(tmp_path, Scripted(stop_after=1)).loglikelihood(PAIRS)
    lm = Scripted()

    answers = remembering(tmp_path, lm).loglikelihood(PAIRS)

    assert [args[0] for args in lm.asked] == ["too long", "abc"]
    assert answers == remembering(tmp_path / "other", Scripted()).loglikelihood(PAIRS)


def test_a_line_that_was_cut_short_is_asked_again(tmp_path: Path) -> None:
    remembering(tmp_path, Scripted()).loglikelihood(PAIRS)
    path = next(tmp_path.glob("*.jsonl"))
    path.write_bytes(path.read_bytes()[:-20])

    for asked in (["abc"], []):
        lm = Scripted()
        assert remembering(tmp_path, lm).loglikelihood(PAIRS)[2] == (-3.0, True)
        assert [args[0] for args in lm.asked] == asked


def test_another_model_mode_or_setting_has_its_own_answers(tmp_path: Path) -> None:
    remembering(tmp_path, Scripted()).loglikelihood(PAIRS)

    for identity in ({"model": "abd", "mode": "fast"}, {"model": "abc", "mode": "exact"}):
        remembering(tmp_path, lm := Scripted(), identity=identity).loglikelihood(PAIRS)
        assert len(lm.asked) == 3
    remembering(tmp_path, lm := Scripted(), is_fresh=True).loglikelihood(PAIRS)
    assert len(lm.asked) == 3


def test_sampled_text_is_drawn_anew(tmp_path: Path) -> None:
    greedy, drawn = ("a", {"do_sample": False, "temperature": 0.7}), ("b", {"temperature": 0.7})
    for asked in ([drawn, drawn, greedy], [drawn, drawn]):
        lm = Scripted()
        texts = remembering(tmp_path, lm).generate_until(requests("generate_until", [greedy, drawn, drawn]))
        assert texts == ["A", "B", "B"] and lm.asked == asked


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    from quantkit.errors import OutputError

    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="--cache-dir"):
        AnswerFile(tmp_path / "file", IDENTITY)
