"""lm-eval's own client for OpenAI's API, against our server, gives what its Hugging Face class gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("tenacity", reason="lm-eval's HTTP client needs lm-eval[api]")

from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI

from quantkit.checkpoint.source import resolve
from quantkit.evaluation.suite import SuiteTask
from tests.evaluation.documents import results_by_document
from tests.server.conftest import running

pytestmark = pytest.mark.filterwarnings("ignore")

TASKS = {
    "log-likelihoods": SuiteTask(task="reference_mmlu", num_fewshot=2, limit=1),
    "texts": SuiteTask(task="reference_gsm8k", num_fewshot=1, limit=6),
}


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve("reference").folder


@pytest.fixture(scope="module")
def over_http(folder: Path) -> Iterator[Any]:
    with running() as server:
        yield LocalCompletionsAPI(
            model="reference", base_url=f"{server.url}/v1/completions", tokenizer=str(folder), tokenizer_backend="huggingface", add_bos_token=True,
            tokenized_requests=True, num_concurrent=1, max_length=1024, batch_size=4,
        )  # fmt: skip


@pytest.mark.parametrize("kind", TASKS)
def test_every_document_has_the_same_result_over_http(kind: str, over_http: Any, folder: Path) -> None:
    expected = results_by_document(HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4), TASKS[kind])

    found = results_by_document(over_http, TASKS[kind])

    assert found.keys() == expected.keys() and len(found) >= 6
    for document, values in expected.items():
        assert found[document] == pytest.approx(values, abs=1e-3) if kind == "log-likelihoods" else found[document] == values
