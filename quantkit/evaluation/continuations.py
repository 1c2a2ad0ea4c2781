"""Greedy continuations of a quantized model beside its baseline's: errors add up as text grows, so losses of few bits show there first."""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass
from typing import Any

from quantkit.errors import UsageError
from quantkit.models.compare import TokenRows
from quantkit.ops import Mode
from quantkit.runtime.llm import LLM
from quantkit.runtime.sampling_params import SamplingParams

NUM_PROMPTS = 64
PROMPT_TOKENS = 32
LENGTH = 128


@dataclass(frozen=True, slots=True)
class ContinuationResult:
    """Prompts continued by both models, taking the most likely token each time.

    Attributes:
        agreement: by a number of tokens, the share of prompts whose first so many tokens are the same.
        mean_same: tokens until the two part, `length` where they do not.
    """

    num_prompts: int
    length: int
    agreement: dict[int, float]
    mean_same: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_continuations(
    model: str, baseline: str, rows: TokenRows, *, mode: Mode = "exact", device: str = "auto", trust_remote_code: bool = False
) -> ContinuationResult:
    """Let one model after the other continue the beginnings of rows, as many as there are up to NUM_PROMPTS.

    Raises:
        UsageError: the rows are too short to begin anything.
    """
    width = min(PROMPT_TOKENS, rows.input_ids.shape[1] // 2)
    if width < 1:
        raise UsageError("rows of one token cannot be continued; give a longer text")
    prompts = rows.input_ids[:NUM_PROMPTS, :width].tolist()
    found = []
    for source in (baseline, model):
        llm = LLM(source, mode=mode, device=device, trust_remote_code=trust_remote_code)
        length = min(LENGTH, llm.engine.context - width)
        params = SamplingParams(max_tokens=length, temperature=0, ignore_eos=True)
        found.append([output.completions[0].token_ids for output in llm.generate(prompts, params)])
        del llm
        gc.collect()
    return agreement_of(*found)


def agreement_of(baseline: list[list[int]], model: list[list[int]]) -> ContinuationResult:
    """Two models' continuations of the same prompts, all of one length.

    Raises:
        UsageError: there are none, or a model ended early.
    """
    lengths = {len(tokens) for tokens in (*baseline, *model)}
    if len(lengths) != 1 or len(baseline) != len(model):
        raise UsageError(f"continuations must be of one length on both sides; these have {sorted(lengths)} tokens")
    (length,) = lengths
    same = [_num_same(one, other) for one, other in zip(baseline, model, strict=True)]
    steps = sorted({*(1 << power for power in range(length.bit_length())), length})
    agreement = {step: sum(count >= step for count in same) / len(same) for step in steps}
    return ContinuationResult(len(same), length, agreement, sum(same) / len(same))


def _num_same(one: list[int], other: list[int]) -> int:
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))
