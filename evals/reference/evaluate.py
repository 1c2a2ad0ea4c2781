"""Score a model on the shipped splits. Run from the repository's root:

python -m evals.reference.evaluate evals/reference/model [--problems 500] [--questions 1000] [--write scores.json]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from . import scoring, splits
from .generator import Question, WordProblem


def problems(stem: str) -> list[WordProblem]:
    return [WordProblem(**row) for row in splits.load(stem)]


def questions(stem: str) -> list[Question]:
    return [Question(**{**row, "choices": tuple(row["choices"])}) for row in splits.load(stem)]


def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, num_problems: int, num_questions: int, texts: dict[str, str]
) -> dict[str, object]:
    """Every score of the README, on the first items of each split; texts: name to further text whose perplexity is wanted."""
    scores: dict[str, object] = {}
    asked, examples = problems("word_problems")[:num_problems], problems("word_problems_fewshot")
    for shots in (1, 5):
        scores[f"word_problems_{shots}shot"] = scoring.problem_accuracy(model, tokenizer, asked, examples=examples, shots=shots)
        print(f"word problems, {shots} shots: {scores[f'word_problems_{shots}shot']:.3f}", file=sys.stderr)
    asked, examples = questions("questions")[:num_questions], questions("questions_fewshot")
    for shots in (0, 5):
        accuracy, by_subject = scoring.question_accuracy(model, tokenizer, asked, examples=examples, shots=shots)
        scores |= {f"questions_{shots}shot": accuracy, f"questions_{shots}shot_by_subject": by_subject}
        print(f"questions, {shots} shots: {accuracy:.3f}", file=sys.stderr)
    documents = {"prose": [row["text"] for row in splits.load("prose")], **{name: [text] for name, text in texts.items()}}
    for name, found in documents.items():
        scores[f"{name}_perplexity"], scores[f"{name}_bits_per_byte"] = scoring.perplexity(model, tokenizer, found)
    return scores


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--problems", type=int, default=splits.NUM_PROBLEMS)
    parser.add_argument("--questions", type=int, default=2 * splits.NUM_QUESTIONS, help="as many as there are, unless fewer are wanted")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="further texts, of which the first 60,000 characters are scored")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", type=Path, help="also write the scores to this file")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(args.device).eval()
    texts = {path.stem: path.read_text(encoding="utf-8")[:60_000] for path in args.text}
    scores = _rounded(score(model, tokenizer, num_problems=args.problems, num_questions=args.questions, texts=texts))
    text = json.dumps(scores, indent=2)
    print(text)
    if args.write:
        args.write.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
