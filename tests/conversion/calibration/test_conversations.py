"""Every form of conversation gives the tokens the model's own chat template gives."""

from __future__ import annotations

import json
from typing import Any

import pytest

from quantkit.conversion.calibration import CHAT_FALLBACK, CalibrationOptions, load_calibration
from quantkit.conversion.calibration.chat import from_messages, threads

USER, ANSWER, USER_2, ANSWER_2 = "Where is the key?", "Under the mat.", "And the mat?", "It is gone."
EXPECTED = [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]
EXPECTED_2 = [*EXPECTED, {"role": "user", "content": USER_2}, {"role": "assistant", "content": ANSWER_2}]


def thread_row(name: str, parent: str | None, role: str, text: str, rank: int | None = None) -> dict[str, Any]:
    return {"message_id": name, "parent_id": parent, "role": role, "text": text, "rank": rank, "lang": "en", "deleted": False}


THREAD = [
    thread_row("d", "c", "assistant", ANSWER_2, 0),
    thread_row("a", None, "prompter", USER),
    thread_row("x", "a", "assistant", "Nobody knows.", 1),
    thread_row("b", "a", "assistant", ANSWER, 0),
    thread_row("c", "b", "prompter", USER_2),
    thread_row("lost", "not here", "assistant", "Without its beginning."),
]
FORMS = {
    "messages": ([{"messages": EXPECTED_2}], EXPECTED_2),
    "messages-with-parts": ([{"messages": [{"role": "user", "content": [{"type": "text", "text": USER}]}, EXPECTED[1]]}], EXPECTED),
    "sharegpt": ([{"id": 7, "conversations": [{"from": "human", "value": USER}, {"from": "gpt", "value": ANSWER}]}], EXPECTED),
    "alpaca": ([{"instruction": USER, "input": "", "output": ANSWER}], EXPECTED),
    "alpaca-with-input": (
        [{"instruction": "Translate.", "input": "Guten Tag", "output": "Good day"}],
        [{"role": "user", "content": "Translate.\n\nGuten Tag"}, {"role": "assistant", "content": "Good day"}],
    ),
    "oasst1": (THREAD, EXPECTED_2),
    "prompt-response": ([{"prompt": USER, "response": ANSWER, "score": 3}], EXPECTED),
    "question-answer": ([{"question": USER, "answer": ANSWER}], EXPECTED),
    "preference": ([{"prompt": USER, "chosen": EXPECTED, "rejected": EXPECTED}], EXPECTED),
}


def first_document(calibration: Any) -> list[int]:
    return calibration.input_ids[0][calibration.valid[0]].tolist()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", ["byte_tokenizer", "reference_tokenizer"])
def test_every_form_equals_the_chat_template_on_the_messages(form, model, write, request):
    tokenizer = request.getfixturevalue(model)
    rows, messages = FORMS[form]
    expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    calibration = load_calibration(CalibrationOptions(write("chat.jsonl", rows), layout="pad", num_samples=1), tokenizer, context=512)
    assert first_document(calibration) == list(expected)


def test_named_columns_make_a_turn_each(write, byte_tokenizer):
    path = write("pairs.jsonl", [{"ask": USER, "reply": ANSWER, "text": "not this"}])
    options = CalibrationOptions(path, prompt_column="ask", response_column="reply", layout="pad", num_samples=1)
    expected = byte_tokenizer.apply_chat_template(EXPECTED, tokenize=True, return_dict=False)
    assert first_document(load_calibration(options, byte_tokenizer, context=512)) == list(expected)


def test_a_named_text_column_may_hold_messages(write, byte_tokenizer):
    path = write("chat.jsonl", [{"talk": EXPECTED, "text": "not this"}])
    options = CalibrationOptions(path, text_column="talk", layout="pad", num_samples=1)
    expected = byte_tokenizer.apply_chat_template(EXPECTED, tokenize=True, return_dict=False)
    assert first_document(load_calibration(options, byte_tokenizer, context=512)) == list(expected)


def test_a_system_message_the_template_refuses_goes_before_the_first_user_message(write, byte_tokenizer):
    path = write("chat.jsonl", [{"messages": [{"role": "system", "content": "Be brief."}, *EXPECTED]}])
    calibration = load_calibration(CalibrationOptions(path, layout="pad", num_samples=1), byte_tokenizer, context=512)
    assert byte_tokenizer.decode(first_document(calibration)) == f"<s><|user|>Be brief.\n\n{USER}<|end|><|assistant|>{ANSWER}<|end|>"


def test_tools_and_calls_reach_the_template(write, tokenizer_factory):
    template = (
        "{% for t in tools or [] %}[{{ t['function']['name'] }}]{% endfor %}{% for m in messages %}{% for c in m['tool_calls'] or [] %}"
        "({{ c['function']['arguments']['place'] }}){% endfor %}{{ m['content'] }}{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "weather", "arguments": json.dumps({"place": "Oslo"})}}
    messages = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    tokenizer = tokenizer_factory(template=template, bos=False)
    path = write("tools.jsonl", [{"messages": messages, "tools": [{"type": "function", "function": {"name": "weather"}}]}])
    calibration = load_calibration(CalibrationOptions(path, layout="pad", num_samples=1), tokenizer, context=512)
    assert tokenizer.decode(first_document(calibration)) == "[weather]Rain?(Oslo)"


def test_without_a_template_the_plain_form_is_used_and_said(write, tokenizer_factory):
    path = write("chat.jsonl", [{"messages": EXPECTED}])
    calibration = load_calibration(CalibrationOptions(path, layout="pad", num_samples=1), tokenizer_factory(template=None), context=512)
    assert tokenizer_factory().decode(first_document(calibration)) == f"<s>User: {USER}\n\nAssistant: {ANSWER}"
    assert CHAT_FALLBACK in calibration.report.summary()


def test_a_conversation_the_template_refuses_is_dropped_and_counted(write, tokenizer_factory):
    template = "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('no') }}{% endif %}{{ messages[0]['content'] }}"
    path = write("chat.jsonl", [{"messages": [{"role": "user", "content": word}]} for word in ("good", "bad")])
    calibration = load_calibration(CalibrationOptions(path, layout="pad", num_samples=2), tokenizer_factory(template=template), context=512)
    assert calibration.report.rows == 1
    assert calibration.report.dropped == {"the chat template refuses the conversation": 1}


def test_a_thread_that_ends_with_a_question_loses_it():
    rows = [thread_row("a", None, "prompter", USER), thread_row("b", "a", "assistant", ANSWER), thread_row("c", "b", "prompter", USER_2)]
    assert list(threads(rows)) == [EXPECTED]


def test_keys_beside_role_and_content_survive():
    assert from_messages([{"role": "assistant", "content": "x", "reasoning_content": "because", "weight": None}])[0]["reasoning_content"] == "because"
