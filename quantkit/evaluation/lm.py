"""lm-eval's view of the engine: log-likelihoods, rolling log-likelihoods and generation, batched by the engine itself.

Texts are cut into tokens as lm-eval's own Hugging Face class cuts them: with the tokenizer's own BOS unless the text begins with it, and spaces at a
context's end go to the continuation.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from quantkit.runtime.llm import LLM
from quantkit.runtime.sampling_params import SamplingParams

_GENERATED = 256


class EngineLM(TemplateLM):
    """An LLM as lm-eval's model.

    Args:
        max_length: tokens of context and continuation; the engine's context by default. Longer ones lose their beginning.
    """

    def __init__(self, llm: LLM, *, max_length: int | None = None) -> None:
        super().__init__()
        self.llm, self.tokenizer = llm, llm.engine.tokenizer
        self.max_length = min(max_length or llm.engine.context, llm.engine.scheduler.max_length)

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
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, add_generation_prompt=add_generation_prompt))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length - 2, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += value
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        outputs = []
        for number, request in enumerate(requests):
            context, settings = request.args
            params = _sampling(settings)
            prompt = self.tok_encode(context)[-(self.max_length - (params.max_tokens or 0)) :]
            outputs.append(self.llm.engine.add(prompt, params, request_id=f"lm-eval-{id(requests)}-{number}"))
        self._run()
        return [output.text for output in outputs]

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any) -> list[tuple[float, bool]]:
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, ignore_eos=True)
        outputs = [
            self.llm.engine.add((context + continuation)[-(self.max_length - 1) :], params, request_id=f"lm-eval-{id(requests)}-{number}")
            for number, (_, context, continuation) in enumerate(requests)
        ]
        self._run()
        found = []
        for (_, _, continuation), output in zip(requests, outputs, strict=True):
            scored = [each for each in (output.prompt_logprobs or [])[-len(continuation) :] if each is not None]
            found.append((sum(each.logprob for each in scored), all(each.rank == 1 for each in scored)))
        return found

    def _run(self) -> None:
        while self.llm.engine.has_work:
            self.llm.engine.step()


def _sampling(settings: dict[str, Any]) -> SamplingParams:
    """lm-eval's generation settings; greedy unless do_sample or a temperature says otherwise."""
    until = settings.get("until") or []
    stop = (until,) if isinstance(until, str) else tuple(until)
    temperature = float(settings.get("temperature", 0.0)) if settings.get("do_sample", "temperature" in settings) else 0.0
    return SamplingParams(
        max_tokens=int(settings.get("max_gen_toks", _GENERATED)), temperature=temperature, top_p=float(settings.get("top_p", 1.0)),
        stop=tuple(text for text in stop if text),
    )  # fmt: skip
