"""The face in Python takes what its users have at hand, and names what it cannot take."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from quantkit.errors import BusyError, RequestError, UsageError
from quantkit.runtime.llm import LLM
from quantkit.runtime.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("reference", mode="exact", kv_cache_memory=8 << 20)


def ids(llm: LLM, prompts: Any, **settings: Any) -> list[list[int]]:
    return [output.completions[0].token_ids for output in llm.generate(prompts, max_tokens=3, temperature=0, **settings)]


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor, lambda tokens: (token for token in tokens)])
def test_token_ids_come_in_any_collection(make: Callable[[list[int]], Any], llm: LLM) -> None:
    assert ids(llm, make([5, 6])) == ids(llm, [[5, 6]])


def test_rows_of_token_ids_are_prompts(llm: LLM) -> None:
    assert ids(llm, torch.tensor([[5], [7]])) == ids(llm, np.array([[5], [7]])) == [*ids(llm, [5]), *ids(llm, [7])]


NO_PROMPTS = [
    np.array(5), torch.tensor(5), {"prompt": "Tom"}, 5, None, [None], [1.5], b"text", [b"text"], [True], [[True]], [[5, "a"]], [["a"]], "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("prompts", NO_PROMPTS)
def test_what_is_no_prompt_is_named(prompts: Any, llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"the prompt is|character 0 of the text"):
        ids(llm, prompts)
    assert not llm.engine.has_work


@pytest.mark.parametrize(
    "settings",
    [
        {"stop": 5}, {"stop": b"x"}, {"stop": ["a", 5]}, {"stop": ""}, {"structure": "x"}, {"logit_bias": [1]}, {"logit_bias": {"a": 1}},
        {"logit_bias": {5: None}}, {"stop_token_ids": 5}, {"stop_token_ids": [[1]]}, {"bad_words": "ab"}, {"bad_words": [5]}, {"bad_words": ["ab"]},
        {"bad_words": [[]]}, {"ignore_eos": "no"}, {"n": "2"}, {"seed": True}, {"lora": 5}, {"lora": ["a", "b"]},
    ],
)  # fmt: skip
def test_settings_of_the_wrong_kind_are_named(settings: dict[str, Any], llm: LLM) -> None:
    (name,) = settings
    with pytest.raises(RequestError, match=f"{name}|token id"):
        ids(llm, "Tom", **settings)


@pytest.mark.parametrize("settings", [{"width": 2.5}, {"width": True}, {"width": 0}, {"max_tokens": "a"}, {"length_penalty": float("nan")}])
def test_settings_of_a_beam_search_are_named(settings: dict[str, Any], llm: LLM) -> None:
    (name,) = settings
    with pytest.raises(RequestError, match=name):
        llm.beam_search("Tom", **settings)


def test_parameters_of_another_kind_are_named(llm: LLM) -> None:
    with pytest.raises(UsageError, match="SamplingParams"):
        llm.generate("Tom", {"max_tokens": 2})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="lora"):
        list(llm.stream("Tom", lora=["a"]))  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers(llm: LLM) -> None:
    settings = {"max_tokens": np.int64(3), "temperature": np.float32(0), "stop_token_ids": np.array([5]), "seed": np.int64(1)}

    assert [output.completions[0].token_ids for output in llm.generate("Tom", **settings)] == ids(llm, "Tom", stop_token_ids=[5])


def test_more_prompts_than_may_wait_are_refused_for_good() -> None:
    with pytest.raises(RequestError, match="3 prompts at once are more than the 2 that may wait") as refused:
        LLM("reference", max_waiting=2, kv_cache_memory=8 << 20).generate(["a"] * 3)
    assert not isinstance(refused.value, BusyError)


def test_one_string_is_one_stop() -> None:
    assert SamplingParams(stop="time", bad_words=[[5, 6]], stop_token_ids=[7]) == SamplingParams(
        stop=("time",), bad_words=((5, 6),), stop_token_ids=frozenset({7})
    )


def test_a_prompt_that_is_too_long_is_said_once(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        with pytest.raises(RequestError, match="tokens"):
            ids(llm, "Once upon a time " * 400)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not caplog.records
