"""lm-eval through the engine says what lm-eval's own Hugging Face class says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import lm_eval.models.huggingface
from lm_eval.api.instance import Instance

from quantkit.checkpoint.source import resolve
from quantkit.evaluation import lm
from quantkit.evaluation.lm import EngineLM
from quantkit.evaluation.suite import SuiteTask
from quantkit.evaluation.task_data import TaskData
from quantkit.runtime.llm import LLM
from tests.evaluation.documents import results_by_document

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve("reference").folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> EngineLM:
    return EngineLM(LLM(str(folder), mode="exact", kv_cache_memory=16 << 20))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return lm_eval.models.huggingface.HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4)


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


def questions(folder: Path) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in (folder.parent / "splits" / "questions.jsonl").read_text(encoding="utf-8").splitlines()[:8]]
    pairs = [(f"{row['question']}\nAnswer:", f" {choice}") for row in rows for choice in row["choices"]]
    return [*pairs, ("", "Once upon a time"), ("A space at the end ", "word"), ("word " * 1500, "and more")]


def test_log_likelihoods_are_within_a_thousandth_a_token(folder: Path, ours: EngineLM, theirs: Any) -> None:
    pairs = questions(folder)

    found, expected = (each.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True) for each in (ours, theirs))

    for (_, continuation), (a, greedy_a), (b, greedy_b) in zip(pairs, found, expected, strict=True):
        assert abs(a - b) <= 1e-3 * len(ours.tok_encode(continuation)) and greedy_a == greedy_b
    assert ours.num_cut == 1


def test_choices_of_one_token_have_the_same_likelihood_alone_and_beside_others(ours: EngineLM, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = instances("loglikelihood", [(f"Question {n}?\nAnswer:", f" {word}") for n in range(3) for word in ("A", "B", "the", "was", "C")])
    together = ours.loglikelihood(pairs, disable_tqdm=True)

    alone = [ours.loglikelihood([each], disable_tqdm=True)[0] for each in pairs]
    monkeypatch.setattr(lm, "_LIKELY", 1)
    apart = ours.loglikelihood(pairs, disable_tqdm=True)

    for other in (alone, apart):
        assert [value for value, _ in other] == pytest.approx([value for value, _ in together], abs=1e-4)
        assert [is_greedy for _, is_greedy in other] == [is_greedy for _, is_greedy in together]


def test_rolling_log_likelihoods_are_too(ours: EngineLM, theirs: Any) -> None:
    texts = [("Once upon a time there was a girl.",), ("The number of apples is three. " * 20,)]

    found, expected = (each.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True) for each in (ours, theirs))

    assert found == pytest.approx(expected, abs=0.05)


def test_generated_text_is_the_same(ours: EngineLM, theirs: Any) -> None:
    asked = [("Question: Tom has 3 apples and buys 2 more. How many apples?\nAnswer:", {"until": ["\n\n"], "max_gen_toks": 24}),
             ("Once upon a time", {"until": [".", "!"], "max_gen_toks": 30, "do_sample": False})]  # fmt: skip

    found, expected = (each.generate_until(instances("generate_until", asked), disable_tqdm=True) for each in (ours, theirs))

    assert [text.strip() for text in found] == [text.strip() for text in expected]


@pytest.mark.parametrize("task", [SuiteTask(task="mmlu_anatomy", num_fewshot=5, limit=6), SuiteTask(task="gsm8k", num_fewshot=5, limit=3)])
def test_official_tasks_of_another_model_have_the_same_results_document_by_document(task: SuiteTask, test_data: Path) -> None:
    """With prompts that are longer than its context, which lose their beginnings."""
    folder, data = test_data / "data" / "stories3m-hf", TaskData(test_data / "data")
    own = EngineLM(LLM(str(folder), mode="exact", kv_cache_memory=16 << 20))
    other = lm_eval.models.huggingface.HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=1)

    found, expected = (results_by_document(each, task, data) for each in (own, other))

    assert own.num_cut > 0 and found.keys() == expected.keys() and len(found) == task.limit
    for document, values in expected.items():
        assert found[document] == (pytest.approx(values, abs=1e-3) if isinstance(values[0], float) else values)


def test_questions_put_as_a_conversation_are_answered_as_by_lm_evals_own_class(ours: EngineLM, theirs: Any) -> None:
    task = SuiteTask(task="reference_mmlu", num_fewshot=1, limit=1)

    found, expected = (results_by_document(each, task, chat=True) for each in (ours, theirs))

    assert {document: pytest.approx(values, abs=1e-3) for document, values in expected.items()} == found and len(found) == 12
    plain = results_by_document(ours, task)
    assert any(abs(a - b) > 0.1 for document, values in found.items() for a, b in zip(values, plain[document], strict=True))
