"""`quantkit eval` from the command line, against whole transformers models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit.cli import main
from quantkit.core.divergence import Perplexity
from quantkit.errors import SourceError, UsageError
from quantkit.evaluation.evaluate import EvaluationOptions, evaluate
from quantkit.evaluation.rows import rows_of_text
from quantkit.models.tokenizer import load_tokenizer


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text("Once upon a time, there was a little girl named Lily. She loved to play outside in the park. " * 12)
    return path


def test_perplexity_is_that_of_the_whole_model(test_data: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = test_data / "data" / "stories260k-hf"
    rows = rows_of_text(text, load_tokenizer(folder), context=512, seq_len=128)
    collected = Perplexity()
    with torch.no_grad():
        collected.add(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(rows.input_ids).logits, rows.targets, rows.counted)

    code, out, _ = run(capsys, "eval", str(folder), "--text", str(text), "--seq-len", "128", "--json")

    report = json.loads(out)
    assert code == 0
    assert report["result"]["num_tokens"] == rows.num_counted == collected.result().num_tokens
    assert report["result"]["ppl"] == pytest.approx(collected.result().ppl, rel=1e-5)


def test_report_has_llama_perplexitys_words(peers: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = (str(peers / "gptq_b4_g128"), "--baseline", str(peers / "tiny"))

    _, out, _ = run(capsys, "eval", *folders, "--text", str(text), "--metrics", "ppl,kl")

    for words in ("Mean PPL(Q)  ", "Mean PPL(Q)/PPL(base)", "Cor(ln(PPL(Q)), ln(PPL(base)))", "Mean    KLD:", "99.9%   KLD:", "Maximum KLD:"):
        assert words in out
    assert "Same top p:" not in out


def test_divergence_without_a_baseline_is_refused(test_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "eval", str(test_data / "data" / "stories260k-hf"), "--metrics", "ppl,kl")

    assert code == 2
    assert "--baseline" in err
    code, _, err = run(capsys, "eval", "anything", "--metrics", "kld")
    assert code == 2
    assert "did you mean 'kl'" in err


def test_models_of_unlike_vocabularies_are_not_compared(test_data: Path, text: Path) -> None:
    with pytest.raises(SourceError, match=r"4096 tokens and the model 512"):
        evaluate(test_data / "data" / "stories260k-hf", baseline=test_data / "data" / "stories3m-hf", options=EvaluationOptions(text=text))


CONTRADICTIONS = [{"text": Path("a"), "tokens": Path("b")}, {"tokens": Path("b"), "seq_len": 3}, {"batch_size": 0}, {"dtype": "int8"}]


@pytest.mark.parametrize("settings", CONTRADICTIONS)
def test_options_that_cannot_be_meant_are_refused(settings: dict) -> None:
    with pytest.raises(UsageError):
        EvaluationOptions(**settings)
