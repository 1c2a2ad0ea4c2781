"""The reference model: its generator makes true and balanced text, its splits are what the generator makes, and the model does what is said."""

from __future__ import annotations

import collections
import json
import random
import re

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.reference import evaluate, generator, hints, scoring, shrink, splits
from evals.reference.corpus import Mixture, Stream
from evals.reference.generator import facts
from evals.reference.generator.documents import FETCHED, RECALLED, WRONG
from evals.reference.generator.questions import SUBJECTS

MODEL = splits.FOLDER.parent / "model"
STEP = re.compile(r"(\d+)([+*-])(\d+)=<<(\d+)\2(\d+)=(\d+)>>(\d+)")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.mark.parametrize("make", [generator.word_problem, generator.question, generator.story, generator.expository, generator.question_document])
def test_one_seed_makes_one_text(make):
    first, second = ([make(rng) for _ in range(50)] for rng in (random.Random(5), random.Random(5)))
    assert first == second


def test_every_step_of_a_worked_answer_is_right_and_the_last_is_the_result():
    rng = random.Random(6)
    for item in (generator.word_problem(rng) for _ in range(500)):
        steps = STEP.findall(item.answer)
        assert 1 <= len(steps) <= 3
        for a, operator, b, a_again, b_again, value, stated in steps:
            assert (a, b, value) == (a_again, b_again, stated)
            assert int(value) == {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[operator]
        assert item.result == int(steps[-1][-1])
        assert item.answer.splitlines()[-1] == f"#### {item.result}"


@pytest.mark.parametrize("subject", SUBJECTS)
def test_choices_are_distinct_and_letters_are_balanced(subject):
    rng = random.Random(7)
    items = [generator.question(rng, subject) for _ in range(800)]
    assert all(len(set(item.choices)) == 4 for item in items)
    counts = collections.Counter(item.letter for item in items)
    assert all(150 <= counts[letter] <= 250 for letter in "ABCD")


def test_answers_about_capitals_sums_and_order_are_true():
    rng = random.Random(8)
    for item in (generator.question(rng, "geography") for _ in range(200)):
        right = item.choices[item.answer]
        assert any((key in item.question and value == right) or (value in item.question and key == right) for key, value in facts.CAPITALS.items())
    for item in (generator.question(rng, "arithmetic") for _ in range(200)):
        right, numbers = int(item.choices[item.answer]), [int(choice) for choice in item.choices]
        if sum_asked := re.match(r"What is (\d+) ([+-]) (\d+)\?", item.question):
            a, operator, b = sum_asked.groups()
            assert right == (int(a) + int(b) if operator == "+" else int(a) - int(b))
        else:
            assert right == (max(numbers) if "largest" in item.question else min(numbers))


def test_no_relation_offers_a_second_right_choice():
    rng = random.Random(9)
    for item in (generator.question(rng, "jobs") for _ in range(300)):
        verb = item.question.removeprefix("Who ").removesuffix("?")
        if verb in facts.JOBS:
            assert [choice for choice in item.choices if choice == facts.JOBS[verb]] == [item.choices[item.answer]]


def test_shipped_splits_are_what_the_generator_makes():
    for stem, rows in splits.make_splits().items():
        assert (splits.FOLDER / f"{stem}.jsonl").read_text(encoding="utf-8") == splits.dump(rows), stem


def test_splits_have_the_promised_forms_and_sizes():
    assert all(row.keys() == {"question", "answer"} and "#### " in row["answer"] for row in splits.load("word_problems"))
    assert all(row.keys() == {"subject", "question", "choices", "answer"} and len(row["choices"]) == 4 for row in splits.load("questions"))
    assert len(splits.load("word_problems")) == 500
    assert len(splits.load("questions")) >= 1000
    assert sum(len(row["text"]) for row in splits.load("prose")) >= 100_000


@pytest.mark.parametrize("stem", ["word_problems", "questions"])
def test_examples_are_not_among_the_held_out_items(stem):
    items, examples = ({json.dumps(row) for row in splits.load(name)} for name in (stem, f"{stem}_fewshot"))
    assert not items & examples
    assert len(items) == len(splits.load(stem))


def test_training_documents_hold_no_held_out_item():
    rng = random.Random(10)
    problems = "".join(piece.text for _ in range(300) for piece in generator.problem_document(rng))
    asked = re.findall(r"Question: (.*)\nAnswer:", problems)
    assert asked and not any(generator.is_held_out(question) for question in asked)
    assert all(generator.is_held_out(row["question"]) for row in splits.load("word_problems"))


def test_config_has_the_promised_dimensions():
    config = json.loads((MODEL / "config.json").read_text())
    promised = {
        "hidden_size": 256,
        "intermediate_size": 768,
        "head_dim": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "vocab_size": 4096,
        "model_type": "llama",
    }
    assert {name: config[name] for name in promised} == promised
    assert 6 <= config["num_hidden_layers"] <= 8


def test_weights_are_bf16_safetensors_of_at_most_16_mb():
    weights = MODEL / "model.safetensors"
    assert weights.stat().st_size <= 16_000_000
    with safe_open(weights, "pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118


def test_tokenizer_splits_digits_and_keeps_bytes_and_answer_letters(tokenizer):
    assert [tokenizer.decode([i]) for i in tokenizer.encode("2048", add_special_tokens=False)] == list("2048")
    assert tokenizer.decode(tokenizer.encode("naïve → 東京\n", add_special_tokens=False)) == "naïve → 東京\n"
    assert all(len(tokenizer.encode(f" {letter}", add_special_tokens=False)) == 1 for letter in "ABCD")


def test_chat_template_marks_turns_with_special_tokens(tokenizer):
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|user|>Hi<|end|><|assistant|>"


def test_sampled_scores_reach_their_floor(model, tokenizer):
    problems, problem_examples = evaluate.problems("word_problems")[:24], evaluate.problems("word_problems_fewshot")
    assert scoring.problem_accuracy(model, tokenizer, problems, examples=problem_examples, shots=1) >= 0.9
    questions, question_examples = evaluate.questions("questions")[:48], evaluate.questions("questions_fewshot")
    assert scoring.question_accuracy(model, tokenizer, questions, examples=question_examples, shots=0)[0] >= 0.85
    texts = [row["text"] for row in splits.load("prose")][:20]
    assert scoring.perplexity(model, tokenizer, texts)[1] < 0.4


def test_stated_result_reads_the_first_answer_only():
    assert scoring.stated_result(" so 1+1=<<1+1=2>>2.\n#### 2\n\nQuestion: more\nAnswer: #### 3") == 2
    assert scoring.stated_result(" no number\n\nQuestion: more\nAnswer: #### 3") is None


@pytest.fixture(scope="module")
def batch(tokenizer):
    mixture = Mixture(questions=0.5, problems=0.5, chat_problems=0, texts=0, stories=0, chats=0)
    return Stream(tokenizer, None, mixture, context=200, seed=3, aids=0.2).batch(8)


def test_rows_begin_with_a_document_and_hints_stay_inside_them(tokenizer, batch):
    assert batch.ids.shape == batch.weights.shape == (8, 201)
    assert (batch.ids[:, 0] == tokenizer.bos_token_id).all()
    assert len(batch.says) and len(batch.looks)
    assert batch.says[:, 1].max() < 200
    assert (batch.looks[:, 3] < batch.looks[:, 1]).all()


def test_hints_tell_right_choices_from_wrong_ones(tokenizer, batch):
    line_ends = [(row, place, tokenizer.decode([token])) for row, place, depth, token in batch.says.tolist() if depth == FETCHED]
    assert {verdict for _, _, verdict in line_ends} == {WRONG, " A", " B", " C", " D"}
    for row, place, verdict in line_ends:
        line = tokenizer.decode(batch.ids[row, : place + 1]).splitlines()[-1]
        assert verdict in (WRONG, f" {line[0]}")


def test_answers_look_at_the_end_of_the_right_line(tokenizer, batch):
    looks = [(row, place, seen) for row, place, layer, seen in batch.looks.tolist() if layer == FETCHED]
    stated = 0
    for row, place, seen in looks:
        assert tokenizer.decode(batch.ids[row, : place + 1]).endswith("Answer:")
        answer = tokenizer.decode([batch.ids[row, place + 1]])
        if answer in (" A", " B", " C", " D"):
            stated += 1
            assert tokenizer.decode(batch.ids[row, : seen + 1]).splitlines()[-1][0] == answer.strip()
    assert stated > 5


def test_residual_stream_ends_where_the_model_does(model, batch):
    ids = batch.ids[:2, :-1]
    with torch.no_grad():
        depths = hints.residual_stream(model, ids)
        assert len(depths) == model.config.num_hidden_layers + 1
        torch.testing.assert_close(model.model.norm(depths[-1]), model.model(ids, use_cache=False).last_hidden_state)


def test_looks_losses_are_the_models_own_attention(model, batch):
    telling = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager").eval()
    ids = batch.ids[:, :-1]
    with torch.no_grad():
        losses = hints.looks_losses(model, hints.residual_stream(model, ids), batch.looks)
        attention = telling(ids, output_attentions=True).attentions
    for layer in (RECALLED, FETCHED):
        row, place, _, seen = batch.looks[batch.looks[:, 2] == layer].T
        torch.testing.assert_close((-losses[f"looks_{layer}"]).exp(), attention[layer][row, hints.HEAD, place, seen], rtol=1e-3, atol=1e-4)


def test_shrinking_what_is_written_keeps_directions():
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    before = model.model.layers[0].mlp.down_proj.weight.clone()

    shrink.shrink_writes(model, 0.5)

    torch.testing.assert_close(model.model.layers[0].mlp.down_proj.weight, before * 0.5)
