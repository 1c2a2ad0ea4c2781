"""`quantkit eval` from the command line, against whole transformers models."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit.cli import main
from quantkit.core.divergence import Perplexity
from quantkit.errors import SourceError, UsageError
from quantkit.evaluation import kept_states
from quantkit.evaluation.continuations import agreement_of
from quantkit.evaluation.evaluate import EvaluationOptions, evaluate
from quantkit.evaluation.rows import rows_of_text
from quantkit.models.compare import TokenRows
from quantkit.models.tokenizer import load_tokenizer
from tests.runtime.conftest import dequantized_model


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


def test_models_of_unlike_tokenizers_are_not_compared(test_data: Path, text: Path) -> None:
    with pytest.raises(SourceError, match="has another tokenizer than"):
        evaluate(test_data / "data" / "stories260k-hf", baseline=test_data / "data" / "stories3m-hf", options=EvaluationOptions(text=text))


def test_models_whose_ids_mean_other_tokens_are_not_compared(peers: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(peers / "tiny", other)
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    one, two = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(content))

    with pytest.raises(SourceError, match=r"2 ids mean other tokens"):
        evaluate(other, baseline=peers / "tiny", options=EvaluationOptions(text=text))


CONTRADICTIONS = [{"text": Path("a"), "tokens": Path("b")}, {"tokens": Path("b"), "seq_len": 3}, {"batch_size": 0}, {"dtype": "int8"}]


@pytest.mark.parametrize("settings", CONTRADICTIONS)
def test_options_that_cannot_be_meant_are_refused(settings: dict) -> None:
    with pytest.raises(UsageError):
        EvaluationOptions(**settings)


def test_a_baselines_states_are_kept_and_give_the_same_numbers(peers: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = EvaluationOptions(text=text, seq_len=64, cache_dir=tmp_path / "kept")
    told: list[str] = []

    def watch(label: str, done: int, total: int) -> None:
        told.append(label)

    first = evaluate(peers / "gptq_b4_g128", baseline=peers / "tiny", options=options, progress=watch)
    (kept,) = (tmp_path / "kept").iterdir()
    assert "the baseline model" in told
    told.clear()

    again = evaluate(peers / "gptq_b4_g128", baseline=peers / "tiny", options=options, progress=watch)
    assert again.divergence == first.divergence and set(told) == {"the quantized model"}

    kept.write_bytes(kept.read_bytes()[:100])
    assert evaluate(peers / "gptq_b4_g128", baseline=peers / "tiny", options=options).divergence == first.divergence
    told.clear()
    evaluate(peers / "gptq_b4_g128", baseline=peers / "tiny", options=replace(options, is_fresh=True), progress=watch)
    assert "the baseline model" in told
    evaluate(peers / "gptq_b4_g128", baseline=peers / "tiny", options=replace(options, seq_len=32))
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_a_cache_that_cannot_be_written_costs_no_result(peers: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    options = EvaluationOptions(text=text, seq_len=64, cache_dir=tmp_path / "file")

    found = evaluate(peers / "gptq_b4_g128", baseline=peers / "tiny", options=options)

    assert found.divergence is not None and "cannot be kept" in caplog.text


def test_what_is_kept_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_states, "MAX_BYTES", 250)
    rows = TokenRows.of_texts(torch.zeros(1, 4, dtype=torch.int64))
    for age, name in enumerate("abc"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"x" * 100)
        os.utime(tmp_path / f"{name}.safetensors", (1000 - age, 1000 - age))

    kept_states.states_file(tmp_path, "model", rows, torch.float32)

    assert {path.stem for path in tmp_path.iterdir()} == {"a", "b"}


def test_continuations_part_where_transformers_part(peers: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (str(peers / "gptq_b3_g128"), "--baseline", str(peers / "tiny"), "--text", str(text), "--seq-len", "40", "--metrics", "greedy")
    code, out, _ = run(capsys, "eval", *arguments, "--json")
    found = json.loads(out)["continuations"]
    rows = rows_of_text(text, load_tokenizer(peers / "tiny"), context=512, seq_len=40).input_ids
    settings = {"max_new_tokens": found["length"], "do_sample": False, "eos_token_id": None}
    models = [dequantized_model(peers / name) for name in ("tiny", "gptq_b3_g128")]
    texts = [[model.generate(row[None, :20], **settings)[0, 20:].tolist() for row in rows] for model in models]
    same = [next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), found["length"]) for pair in zip(*texts, strict=True)]

    assert code == 0 and found["num_prompts"] == len(rows)
    assert found["mean_same"] == pytest.approx(sum(same) / len(same), abs=found["length"] / len(rows))
    assert found["agreement"]["1"] >= found["agreement"]["4"] >= found["agreement"][str(found["length"])]


def test_agreement_counts_equal_beginnings() -> None:
    found = agreement_of([[1, 2, 3], [1, 2, 3], [4, 4, 4]], [[1, 2, 3], [1, 9, 3], [5, 4, 4]])

    assert (found.num_prompts, found.length, found.mean_same) == (3, 3, (3 + 1 + 0) / 3)
    assert found.agreement == {1: 2 / 3, 2: 1 / 3, 3: 1 / 3}
    with pytest.raises(UsageError, match="one length"):
        agreement_of([[1, 2]], [[1]])
