"""`quantkit generate` and `chat`: forms and adapters on the command line, and what is wrong with them said before a model is loaded."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import jsonschema
import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit.checkpoint.source import resolve
from quantkit.cli.main import main
from quantkit.runtime.llm import LLM
from tests.runtime.test_lora import TARGETS, write_adapter

SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["age"], "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 120}},
}  # fmt: skip
NOWHERE = "/no/such/model"
"""A source that would be complained about, were it looked at."""


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    shown = capsys.readouterr()
    return int(ended.value.code or 0), shown.out, shown.err


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    model = AutoModelForCausalLM.from_pretrained(resolve("reference").folder, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(folder / name, model, targets) for name, targets in TARGETS.items()}


@pytest.mark.parametrize("as_file", [False, True], ids=["text", "file"])
def test_an_answer_is_of_its_schema(as_file: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = json.dumps(SCHEMA)
    (tmp_path / "schema.json").write_text(text)

    code, out, err = run(capsys, "generate", "reference", "-p", "Tell me", "--json-schema", str(tmp_path / "schema.json") if as_file else text)

    assert (code, err) == (0, "")
    jsonschema.validate(json.loads(out), SCHEMA)


def test_an_answer_is_of_its_regex_grammar_or_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sum.lark").write_text('start: NUMBER "+" NUMBER\nNUMBER: /[1-9][0-9]{0,3}/')
    forms = {
        r"\d{4}-\d{2}": ["--regex", r"\d{4}-\d{2}"],
        r"[1-9]\d{0,3}\+[1-9]\d{0,3}": ["--grammar", str(tmp_path / "sum.lark")],
        "red|green": ["--choice", "red", "--choice", "green"],
        r"(?s)\{.*": ["--json-object", "--max-tokens", "30", "--chat"],
    }
    for pattern, options in forms.items():
        code, out, err = run(capsys, "generate", "reference", "-p", "Tell me", *options)

        assert (code, err) == (0, "") and re.fullmatch(pattern, out.removesuffix("\n"))


BAD: dict[str, tuple[list[str], str]] = {
    "two forms": (["--regex", "a", "--choice", "b"], "--regex and --choice are given, and an answer has one form"),
    "no file": (["--json-schema", "nowhere.json"], "--json-schema 'nowhere.json': No such file or directory; give a file, or a schema that starts"),
    "no grammar file": (["--grammar", "nowhere.lark"], "--grammar 'nowhere.lark': No such file or directory"),
    "a folder": (["--grammar", "/"], "--grammar '/': Is a directory"),
    "no JSON": (["--json-schema", "{age: 3}"], "json_schema is not JSON"),
    "no schema": (["--json-schema", '{"type": "nope"}'], "the json_schema does not compile: Invalid type: nope"),
    "no regex": (["--regex", "a(b"], "the regex does not compile"),
    "empty regex": (["--regex", ""], "regex is empty"),
    "long regex": (["--regex", "a" * 70000], "give at most 65,536"),
    "empty choice": (["--choice", ""], "strings that are not empty"),
    "adapter without a name": (["--lora", "folder"], "--lora is 'folder'; give NAME=FOLDER"),
    "adapter without a folder": (["--lora", "a="], "--lora is 'a='; give NAME=FOLDER"),
    "adapter that is nowhere": (["--lora", "a=/nowhere"], "--lora a=/nowhere: there is no folder /nowhere"),
    "one name twice": (["--lora", "a=/", "--lora", "a=/tmp"], "--lora names 'a' twice"),
    "none of several": (["--lora", "a=/", "--lora", "b=/"], "--lora gives 2 adapters; choose one with --adapter: a, b"),
    "an unknown one": (["--lora", "tales=/", "--adapter", "tale"], "no adapter 'tale' is given; did you mean 'tales'?"),
    "one that was not given": (["--adapter", "tales"], "--adapter is 'tales', and no adapter is given; give it with --lora tales=FOLDER"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_meant_is_said_before_the_model_is_looked_for(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    options, message = BAD[case]

    code, out, err = run(capsys, "generate", NOWHERE, "-p", "a", *options)

    assert (code, out) == (2, "") and err.startswith("Error: ") and err.count("\n") == 1 and message in err


def test_a_folder_that_is_no_adapter_is_said_before_the_model_is_looked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["generate", "-p", "a"], ["chat"], ["serve", "--port", "0"]):
        code, _, err = run(capsys, *command, NOWHERE, "--lora", f"mine={tmp_path}")

        assert code == 1 and f"so {tmp_path} is no PEFT adapter" in err


def test_a_served_adapter_cannot_have_the_models_name(adapters: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "serve", NOWHERE, "--port", "0", "--served-model-name", "a", "--lora", f"a={adapters['first']}")

    assert code == 2 and "'a' is a name of the model and of an adapter" in err


def test_the_only_adapter_answers_and_one_of_several_is_chosen(adapters: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["-p", "Once upon a time", "--max-tokens", "10", "--temperature", "0", "--mode", "exact"]
    llm = LLM("reference", mode="exact", kv_cache_memory=8 << 20, lora={name: str(folder) for name, folder in adapters.items()})
    expected = {name: llm.generate("Once upon a time", max_tokens=10, temperature=0, lora=name)[0].text for name in adapters}
    given = {name: ["--lora", f"{name}={folder}"] for name, folder in adapters.items()}

    alone = run(capsys, "generate", "reference", *settings, *given["first"])
    chosen = run(capsys, "generate", "reference", *settings, *given["first"], *given["second"], "--adapter", "second")

    assert alone == (0, expected["first"] + "\n", "") and chosen == (0, expected["second"] + "\n", "")
    assert expected["first"] != expected["second"]


def test_a_conversation_is_with_the_adapter(adapters: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(adapters["first"])
    llm = LLM("reference", mode="exact", kv_cache_memory=8 << 20, lora={"tales": folder})
    expected = llm.chat([{"role": "user", "content": "Tom had 3 apples."}], max_tokens=8, temperature=0, lora="tales").text
    monkeypatch.setattr("sys.stdin", io.StringIO("Tom had 3 apples.\n/exit\n"))

    code, out, err = run(capsys, "chat", "reference", "--mode", "exact", "--max-tokens", "8", "--temperature", "0", "--lora", f"tales={folder}")

    assert (code, out) == (0, expected + "\n") and err.startswith("reference with tales; KV cache")


def test_input_that_is_no_text_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Tom \xff")))

    code, out, err = run(capsys, "generate", NOWHERE, "--prompt", "-")

    assert (code, out) == (2, "") and "byte 4 is 0xff" in err
