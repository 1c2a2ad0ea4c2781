"""Scores of a model on held-out items: exact match, letter accuracy, perplexity. Pure functions of a model and items."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .generator import Question, WordProblem, format_problem, format_question
from .generator.questions import LETTERS, header


def _padded(rows: list[list[int]], pad: int, device: torch.device) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)


@torch.no_grad()
def question_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: list[Question], *, examples: list[Question], shots: int, batch: int = 16
) -> tuple[float, dict[str, float]]:
    """Share of items whose right letter is the likeliest of four after `Answer:`, overall and by subject; examples are of the item's subject."""
    letters = [tokenizer.encode(f" {letter}", add_special_tokens=False)[0] for letter in LETTERS]
    hits: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        prompts = [_question_prompt(item, examples, shots) for item in part]
        rows = tokenizer(prompts)["input_ids"]
        hidden = model.model(_padded(rows, tokenizer.pad_token_id, model.device), use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])]
        best = model.lm_head(last)[:, letters].argmax(-1).tolist()
        for item, choice in zip(part, best, strict=True):
            hits[item.subject].append(choice == item.answer)
    every = [hit for group in hits.values() for hit in group]
    return sum(every) / len(every), {subject: sum(group) / len(group) for subject, group in sorted(hits.items())}


def _question_prompt(item: Question, examples: list[Question], shots: int) -> str:
    shown = [format_question(e) for e in examples if e.subject == item.subject][:shots]
    return header(item.subject) + "\n\n".join([*shown, format_question(item, with_answer=False)])


@torch.no_grad()
def problem_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: list[WordProblem], *, examples: list[WordProblem], shots: int, batch: int = 16
) -> float:
    """Share of items whose number after `####` is right, by greedy decoding behind `shots` worked examples."""
    right = 0
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        prompts = ["\n\n".join([*(format_problem(e) for e in examples[:shots]), format_problem(i, with_answer=False)]) for i in part]
        encoded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False).to(model.device)
        out = model.generate(**encoded, max_new_tokens=128, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        for item, text in zip(part, tokenizer.batch_decode(out[:, encoded.input_ids.shape[1] :], skip_special_tokens=True), strict=True):
            right += stated_result(text) == item.result
    return right / len(items)


def stated_result(text: str) -> int | None:
    """The number after the first `####` of the first answer, if there is one."""
    answer = text.split("Question:")[0]
    number = answer.partition("#### ")[2].split("\n")[0].strip()
    return int(number) if number.isdigit() else None


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: list[str], *, context: int = 1024) -> tuple[float, float]:
    """Perplexity per token and bits per byte over documents joined with the end token, in windows that do not overlap."""
    ids = [i for text in documents for i in [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]]
    total = count = 0
    for start in range(0, len(ids), context):
        row = torch.tensor([[tokenizer.bos_token_id, *ids[start : start + context - 1]]], device=model.device)
        logits = model(row, use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum").item()
        count += row.shape[1] - 1
    return math.exp(total / count), total / math.log(2) / sum(len(text.encode()) for text in documents)
