"""lm-eval's view of the engine: log-likelihoods, rolling log-likelihoods and generation, batched by the engine itself.

Texts are cut into tokens as lm-eval's own Hugging Face class cuts them: with the tokenizer's own BOS unless the text begins with it, and spaces at a
context's end go to the continuation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from itertools import count
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from quantkit.errors import EngineError
from quantkit.runtime.llm import LLM
from quantkit.runtime.outputs import RequestOutput
from quantkit.runtime.sampling_params import SamplingParams

_GENERATED = 256
_LIKELY = 64


class EngineLM(TemplateLM):
    """An LLM as lm-eval's model.

    Args:
        max_length: tokens of context and continuation; the engine's context by default. Longer ones lose their beginning.

    Attributes:
        num_cut: requests so far that lost it.
        cut_texts: the texts they began with.
    """

    def __init__(self, llm: LLM, *, max_length: int | None = None) -> None:
        super().__init__()
        self.llm, self.tokenizer = llm, llm.engine.tokenizer
        self.max_length = min(max_length or llm.engine.context, llm.engine.scheduler.max_length)
        self.num_cut, self.cut_texts = 0, set[str]()
        self._runs = count()
        self._encode = lru_cache(maxsize=64)(self._encode_anew)  # a question's context comes with each of its choices

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return self.llm.engine.loaded.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return list(self._encode(string, add_special_tokens))

    def _encode_anew(self, string: str, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, add_generation_prompt=add_generation_prompt))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm), strict=True):
            sums[owner] += value
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        asked = []
        for request in requests:
            context, settings = request.args
            params = _sampling(settings)
            asked.append((self._cut(self.tok_encode(context), self.max_length - (params.max_tokens or 0), context), params))
        keep = partial(self.cache_hook.add_partial, "generate_until")
        outputs = self._run(asked, "generated", disable_tqdm, lambda number, output: keep(requests[number].args, output.text))
        return [output.text for output in outputs]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """One request of each context goes first, and answers the context's others of one token that are among its likely ones.

        What contexts share is computed before them, and found in the prefix cache.
        """
        wholes = [self._cut(before + after, self.max_length + 1, texts[0] if texts else None) for texts, before, after in requests]
        starts = [len(whole) - len(after) for whole, (_, _, after) in zip(wholes, requests, strict=True)]
        found: dict[int, tuple[float, bool]] = {}

        def keep(number: int, value: float, is_greedy: bool) -> None:
            found[number] = value, is_greedy
            if requests[number][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[number][0], found[number])

        leaders: dict[tuple[int, ...], int] = {}
        followers: dict[int, list[int]] = {}
        for number in sorted(range(len(requests)), key=wholes.__getitem__):
            leader = leaders.setdefault(tuple(requests[number][1]), number)
            followers.setdefault(leader, []).extend([number] if number != leader else [])

        def of_one_token(leader: int) -> list[int]:
            context = wholes[leader][: starts[leader]]
            return [each for each in followers.get(leader, ()) if len(requests[each][2]) == 1 and wholes[each][:-1] == context]

        def done(number: int, output: RequestOutput) -> None:
            scored = [each for each in output.prompt_logprobs or [] if each is not None]
            keep(number, sum(each.logprob for each in scored), all(each.rank == 1 for each in scored))
            likely = dict(scored[0].top) if scored else {}
            for each in of_one_token(number) if likely else ():
                value = likely.get(wholes[each][-1])
                if value is not None:
                    keep(each, value, value == scored[0].top[0][1])

        def ask(wave: list[int]) -> None:
            asked = [
                (wholes[number], SamplingParams(
                    max_tokens=0, prompt_logprobs=_LIKELY if of_one_token(number) else 0, prompt_logprobs_from=max(1, starts[number])
                )) for number in wave
            ]  # fmt: skip
            if asked:
                self._run(asked, "scored", disable_tqdm, lambda at, output: done(wave[at], output))

        for wave in _beginnings_first(list(leaders.values()), wholes):
            ask(wave)
        ask([each for group in followers.values() for each in group if each not in found])
        return [found[number] for number in range(len(requests))]

    def _cut(self, tokens: list[int], room: int, text: str | None) -> list[int]:
        """The last tokens that fit, as lm-eval cuts; counted."""
        if len(tokens) > room:
            self.num_cut += 1
            if text is not None:
                self.cut_texts.add(text)
        return tokens[-room:]

    def _run(
        self, asked: list[tuple[list[int], SamplingParams]], what: str, is_quiet: bool, done: Callable[[int, RequestOutput], None]
    ) -> list[RequestOutput]:
        """Answer every request, handing on each as it is done."""
        engine, name = self.llm.engine, f"lm-eval-{next(self._runs)}"
        outputs = [engine.add(prompt, params, request_id=f"{name}-{number}") for number, (prompt, params) in enumerate(asked)]
        numbers = {output.id: number for number, output in enumerate(outputs)}
        with tqdm(total=len(asked), desc=what, unit="request", disable=is_quiet or None) as bar:
            while engine.has_work:
                for output in engine.step():
                    if output.is_finished:
                        _require_sound(output)
                        done(numbers[output.id], output)
                        bar.update()
        return outputs


def _beginnings_first(numbers: list[int], prompts: list[list[int]]) -> tuple[list[int], list[int]]:
    """Sorted prompts in two waves: those that share less than half with the one before them, then the others."""
    waves: tuple[list[int], list[int]] = [], []
    before: list[int] = []
    for number in numbers:
        prompt = prompts[number]
        half = len(prompt) // 2
        waves[prompt[:half] == before[:half]].append(number)
        before = prompt
    return waves


def _require_sound(output: RequestOutput) -> None:
    error = output.completions[0].error
    if error is not None:
        raise EngineError(f"a request could not be answered: {error}") from error


def _sampling(settings: dict[str, Any]) -> SamplingParams:
    """lm-eval's generation settings; greedy unless do_sample or a temperature says otherwise."""
    until = settings.get("until") or []
    stop = (until,) if isinstance(until, str) else tuple(until)
    temperature = float(settings.get("temperature", 0.0)) if settings.get("do_sample", "temperature" in settings) else 0.0
    return SamplingParams(
        max_tokens=int(settings.get("max_gen_toks", _GENERATED)), temperature=temperature, top_p=float(settings.get("top_p", 1.0)),
        stop=tuple(text for text in stop if text),
    )  # fmt: skip
