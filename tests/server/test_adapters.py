"""LoRA adapters by the names of models: listed with their parent, chosen by `model`, several in one batch."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit.checkpoint.source import resolve
from quantkit.errors import UsageError
from quantkit.runtime.llm import LLM
from quantkit.server.served import require_distinct
from tests.runtime.test_lora import TARGETS, write_adapter
from tests.server.conftest import SMALL, Running, running

MESSAGES = [{"role": "user", "content": "Tom had 3 apples and ate one. How many are left?"}]
PROMPTS = ["Once upon a time", "The little girl", "Tom had 3"]
NAMES = [None, "first", "second"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    model = AutoModelForCausalLM.from_pretrained(resolve("reference").folder, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("adapters")
    return {name: str(write_adapter(folder / name, model, targets)) for name, targets in TARGETS.items()}


@pytest.fixture(scope="module")
def adapted(adapters: dict[str, str]) -> Iterator[Running]:
    with running(lora=adapters) as it:
        yield it


def test_adapters_are_listed_with_what_they_are_put_on(adapted: Running, adapters: dict[str, str]) -> None:
    cards = adapted.http.get("/v1/models").json()["data"]

    assert [(card["id"], card["root"], card["parent"]) for card in cards] == [
        ("reference", "reference", None), ("other/name", "reference", None),
        *((name, folder, "reference") for name, folder in adapters.items()),
    ]  # fmt: skip
    assert adapted.openai.models.retrieve("second").parent == "reference"


def test_each_request_gets_the_adapter_it_names_whatever_runs_beside_it(adapted: Running, adapters: dict[str, str]) -> None:
    asked = [(prompt, name) for prompt in PROMPTS for name in NAMES]
    expected = LLM("reference", **SMALL, lora=adapters).generate(
        [prompt for prompt, _ in asked], max_tokens=10, temperature=0, lora=[name for _, name in asked]
    )

    def ask(prompt: str, name: str | None) -> tuple[str, str]:
        out = adapted.openai.completions.create(model=name or "reference", prompt=prompt, max_tokens=10, temperature=0)
        return out.model, out.choices[0].text

    with ThreadPoolExecutor(9) as pool:
        found = list(pool.map(lambda each: ask(*each), asked))

    assert found == [(name or "reference", out.text) for (_, name), out in zip(asked, expected, strict=True)]
    assert all(len({text for _, text in found[i : i + 3]}) == 3 for i in (0, 3, 6))


def test_a_chat_takes_an_adapter_whole_and_in_a_stream(adapted: Running, adapters: dict[str, str]) -> None:
    expected = LLM("reference", **SMALL, lora=adapters).chat(MESSAGES, max_tokens=10, temperature=0, lora="second").text
    settings = {"model": "second", "messages": MESSAGES, "max_tokens": 10, "temperature": 0}

    whole = adapted.openai.chat.completions.create(**settings)
    chunks = list(adapted.openai.chat.completions.create(stream=True, **settings))

    assert whole.model == chunks[0].model == "second" and whole.choices[0].message.content == expected
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_an_adapter_answers_in_the_form_that_is_asked_for(adapted: Running) -> None:
    extra = {"structured_outputs": {"choice": ["red", "green"]}}

    out = adapted.openai.completions.create(model="first", prompt="The sky is", temperature=0, extra_body=extra)

    assert out.choices[0].text in ("red", "green")


def test_an_unknown_adapter_is_answered_with_near_names(adapted: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'frist'; did you mean 'first'"):
        adapted.openai.completions.create(model="frist", prompt="a")


def test_an_adapter_cannot_have_the_models_name(adapters: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="'first' is a name of the model and of an adapter"):
        require_distinct(["first", "a"], adapters)
