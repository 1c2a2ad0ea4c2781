"""The thread around the engine: what callers in event loops are told, and that nobody is left waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from quantkit.errors import BusyError, EngineError, RequestError
from quantkit.runtime.engine import Engine
from quantkit.runtime.engine_thread import EngineThread
from quantkit.runtime.options import EngineOptions
from quantkit.runtime.sampling_params import SamplingParams
from quantkit.runtime.stream import Delta

LONG = SamplingParams(max_tokens=500, ignore_eos=True)


def new_engine(**options: Any) -> Engine:
    return Engine("reference", EngineOptions(mode="exact", kv_cache_memory=8 << 20, **options))


@pytest.fixture
def thread() -> Iterator[EngineThread]:
    thread = EngineThread(new_engine(max_sequences=4))
    yield thread
    thread.stop()


async def read(thread: EngineThread, prompts: list[list[int]], params: SamplingParams) -> tuple[list[Delta], list[Any]]:
    stream = await thread.submit(prompts, params)
    return [delta async for delta in stream], stream.outputs


def is_clean(thread: EngineThread) -> bool:
    engine = thread.engine
    return not (engine._requests or engine._request_of or thread._open or thread._stream_of or engine.has_work or engine.scheduler.pool.num_used)


def test_deltas_add_up_to_the_outputs(thread: EngineThread) -> None:
    params = SamplingParams(max_tokens=9, n=2, seed=1, logprobs=1, stop=("zzz",))

    deltas, outputs = asyncio.run(read(thread, [[5, 6], [7, 8, 9]], params))

    for prompt, output in enumerate(outputs):
        for completion in output.completions:
            mine = [d for d in deltas if (d.prompt, d.index) == (prompt, completion.index)]
            assert "".join(d.text for d in mine) == completion.text
            assert [token for d in mine for token in d.token_ids] == completion.token_ids
            assert [each for d in mine for each in d.logprobs or []] == completion.logprobs
            assert [d.finish_reason for d in mine] == [None] * (len(mine) - 1) + [completion.finish_reason]
    assert is_clean(thread)


def test_who_does_not_read_text_as_it_comes_has_it_in_the_end(thread: EngineThread) -> None:
    async def both() -> list[list[Delta]]:
        params = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True)
        streams = [await thread.submit([[5, 6]], params, is_live=is_live) for is_live in (True, False)]
        return [[delta async for delta in stream] for stream in streams]

    live, late = asyncio.run(both())

    assert sum(bool(delta.text) for delta in live) > 1
    assert [delta.text for delta in late] == [""] * (len(late) - 1) + ["".join(delta.text for delta in live)]
    assert [token for delta in late for token in delta.token_ids] == [token for delta in live for token in delta.token_ids]


def test_continuations_that_end_at_different_times_keep_their_last_characters(thread: EngineThread) -> None:
    params = SamplingParams(max_tokens=40, n=4, seed=17, stop=(".zzz", "s zzz", "e zzz"))

    deltas, (output,) = asyncio.run(read(thread, [[5, 6]], params))

    assert len({len(each.token_ids) for each in output.completions}) > 1
    for each in output.completions:
        streamed = "".join(delta.text for delta in deltas if delta.index == each.index)
        text = thread.engine.tokenizer.decode([5, 6, *each.token_ids], skip_special_tokens=True)
        assert streamed == each.text and text.endswith(each.text)


def test_more_prompts_than_may_wait_are_not_asked_to_come_again() -> None:
    thread = EngineThread(new_engine(max_waiting=2))
    try:
        with pytest.raises(RequestError, match="3 prompts at once are more than the 2 that may wait") as refused:
            asyncio.run(read(thread, [[5]] * 3, LONG))
        assert not isinstance(refused.value, BusyError) and is_clean(thread)
        assert len(asyncio.run(read(thread, [[5]] * 2, SamplingParams(max_tokens=2)))[1]) == 2
    finally:
        thread.stop()


def test_callers_of_several_loops_are_served_together(thread: EngineThread) -> None:
    alone = [asyncio.run(read(thread, [[token]], SamplingParams(max_tokens=6, temperature=0)))[1][0].text for token in (50, 60)]

    async def both() -> list[str]:
        reads = (asyncio.to_thread(asyncio.run, read(thread, [[t]], SamplingParams(max_tokens=6, temperature=0))) for t in (50, 60))
        return [outputs[0].text for _, outputs in await asyncio.gather(*reads)]

    assert asyncio.run(both()) == alone


def test_a_refusal_reaches_its_caller_alone(thread: EngineThread) -> None:
    async def one_of_two() -> Any:
        good = asyncio.ensure_future(read(thread, [[5]], SamplingParams(max_tokens=3, ignore_eos=True)))
        with pytest.raises(RequestError, match="ids go from 0 to 4095"):
            await thread.submit([[5], [9999]], LONG)
        return await good

    _, outputs = asyncio.run(one_of_two())

    assert len(outputs[0].completions[0].token_ids) == 3 and thread.is_alive
    assert is_clean(thread)


@pytest.mark.parametrize("n", [1, 3])
def test_who_closes_a_stream_or_is_cancelled_frees_everything(n: int, thread: EngineThread) -> None:
    params = SamplingParams(max_tokens=500, ignore_eos=True, n=n)

    async def leave() -> None:
        running, waiting = await thread.submit([[5]], params), await thread.submit([[6], [7]], params)
        await anext(running)
        submitting = asyncio.ensure_future(thread.submit([[8]], params))
        await asyncio.sleep(0)
        submitting.cancel()
        running.close()
        waiting.close()
        waiting.close()

    asyncio.run(leave())

    assert thread.drain(20) and is_clean(thread)


def test_a_caller_whose_loop_is_closed_is_forgotten(thread: EngineThread) -> None:
    asyncio.run(thread.submit([[5]], LONG))

    assert thread.drain(20) and is_clean(thread)


def test_a_step_that_fails_ends_every_stream_with_its_reason(thread: EngineThread, monkeypatch: pytest.MonkeyPatch) -> None:
    async def caught() -> list[BaseException]:
        streams = [await thread.submit([[5 + i]], LONG) for i in range(6)]
        monkeypatch.setattr(thread.engine.runner, "forward", lambda batch: 1 / 0)

        async def end(stream: Any) -> None:
            async for _ in stream:
                pass

        return await asyncio.gather(*map(end, streams), return_exceptions=True)

    errors = asyncio.run(caught())

    assert [type(error) for error in errors] == [EngineError] * 6 and all("ZeroDivisionError" in str(error) for error in errors)
    assert not thread.is_alive
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        asyncio.run(thread.submit([[5]], LONG))


def test_draining_lets_what_runs_finish_and_takes_nothing_more(thread: EngineThread) -> None:
    async def drain() -> int:
        stream = await thread.submit([[5]], SamplingParams(max_tokens=20, ignore_eos=True))
        assert not thread.drain(0)
        with pytest.raises(BusyError, match="shutting down"):
            await thread.submit([[6]], LONG)
        return sum([len(delta.token_ids) async for delta in stream])

    assert asyncio.run(drain()) == 20
    assert thread.drain(20)


def test_stopping_tells_who_still_waits(thread: EngineThread) -> None:
    async def stop() -> None:
        stream = await thread.submit([[5]], LONG)
        await asyncio.to_thread(thread.stop)
        with pytest.raises(BusyError, match="shut down before"):
            async for _ in stream:
                pass

    asyncio.run(stop())

    assert not thread.is_alive


def test_a_waiting_request_with_siblings_is_cancelled_whole() -> None:
    engine = new_engine()
    engine.add([5], SamplingParams(n=3), request_id="a")

    engine.cancel("a")

    assert not engine._requests and not engine._request_of and not engine.has_work
