"""Tokenizers the tests calibrate with: one made here, one of the reference model, one of a real model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(*, template: str | None = TEMPLATE, bos: bool = True, eos: bool = False, pad: bool = True) -> PreTrainedTokenizerFast:
    """Bytes as tokens; BOS and EOS around a text when asked for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*special, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos or eos:
        single = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>" if pad else None,
        additional_special_tokens=special[3:],
    )
    fast.chat_template = template
    return fast


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tokenizer_factory() -> Callable[..., PreTrainedTokenizerFast]:
    return make_tokenizer


@pytest.fixture(scope="session")
def reference_tokenizer() -> Any:
    folder = Path(__file__).parents[3] / "evals" / "reference" / "model"
    if not (folder / "tokenizer.json").exists():
        pytest.skip("the reference model is not in this checkout")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def stories_tokenizer(test_data: Path) -> Any:
    return AutoTokenizer.from_pretrained(test_data / "data" / "stories3m-hf")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes a file of text, bytes, or objects one JSON line each, and returns its path."""

    def write_file(name: str, content: str | bytes | list[Any]) -> str:
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write_file
