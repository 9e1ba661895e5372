"""Texts to tokens: where the answer begins, what is cut, and how batches are made."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import tiny_tokenizer

from perpetune.errors import DataError
from perpetune.models.texts import Encoded, Text, TextView
from perpetune.tasks import IGNORED, Tokens

VIEW = TextView(tiny_tokenizer(), max_length=128)
words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=30)


def said(encoded: Encoded, view: TextView = VIEW) -> str:
    assert encoded.answer is not None
    return view.tokenizer.decode(encoded.ids[encoded.answer])


def test_the_answer_and_its_end_are_learned_and_nothing_else() -> None:
    encoded = VIEW.sequence(Text("What is it?", "a cat"))
    assert said(encoded) == " a cat<eos>"
    assert VIEW.tokenizer.decode(encoded.ids).endswith("What is it? a cat<eos>")


def test_no_space_stands_after_a_line_break() -> None:
    assert said(VIEW.sequence(Text("Answer:\n", "yes"))) == "yes<eos>"


def test_spaces_before_and_after_do_not_matter() -> None:
    plain, spaced = VIEW.sequence(Text("Answer:", "yes")), VIEW.sequence(Text("Answer:  ", " yes "))
    assert torch.equal(plain.ids, spaced.ids)


@settings(max_examples=60, deadline=None)
@given(words, words.filter(str.strip))
def test_the_boundary_is_right_for_any_text(prompt: str, answer: str) -> None:
    encoded = TextView(VIEW.tokenizer, max_length=1000).sequence(Text(prompt, answer))
    text = said(encoded)
    assert text.endswith("<eos>")
    if prompt.strip():  # else the first token of all, which nothing can say, belongs to the answer
        assert answer.strip(" ") in text or text.removesuffix("<eos>") in answer


def test_a_long_prompt_loses_its_start_and_keeps_the_answer() -> None:
    view = TextView(VIEW.tokenizer, max_length=20)
    encoded = view.sequence(Text("x" * 50, "yes"))
    whole = VIEW.sequence(Text("x" * 50, "yes"))
    assert len(encoded) == 20
    assert encoded.cut == len(whole) - 20
    assert said(encoded, view) == " yes<eos>"


def test_an_answer_that_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match=r"the answer alone has .* tokens"):
        TextView(VIEW.tokenizer, max_length=8).sequence(Text("hi", "y" * 40))


def test_a_question_leaves_room_for_its_answer() -> None:
    view = TextView(VIEW.tokenizer, max_length=30)
    view.room = 10
    encoded = view.question(Text("x" * 80))
    assert len(encoded) == 20
    assert encoded.cut == len(VIEW.question(Text("x" * 80))) - 20


def test_a_question_with_options_leaves_room_for_the_longest() -> None:
    view = TextView(VIEW.tokenizer, max_length=30)
    view.room, text = 25, Text("x" * 80, options=("y", "yyyy"))
    asked = view.question(text)
    assert len(asked) == 30 - max(len(option) for option in asked.options)
    view.chooses = False
    assert len(view.question(text)) == 5
    assert view.question(text).options == ()


def test_the_question_is_what_stands_before_the_answer() -> None:
    for prompt in ("What is it?", (("user", "What is it?"),)):
        sequence, question = VIEW.sequence(Text(prompt, "a cat")), VIEW.question(Text(prompt, options=("a cat", "no")))
        assert torch.equal(sequence.ids[: len(question)], question.ids)
        assert torch.equal(sequence.ids[len(question) :], question.options[0])


def test_messages_take_the_chat_template_and_every_turn_of_the_assistant_is_learned() -> None:
    text = Text((("user", "one"), ("assistant", "two"), ("user", "three")), "four")
    encoded = VIEW.sequence(text)
    whole, learned = VIEW.tokenizer.decode(encoded.ids), said(encoded)
    assert "one" in whole
    assert "three" in whole
    assert "two" in learned
    assert "four" in learned
    assert "one" not in learned
    assert "three" not in learned


def test_chat_puts_plain_prompts_into_messages() -> None:
    view = TextView(VIEW.tokenizer, max_length=128, chat=True)
    assert torch.equal(view.sequence(Text("hi", "yes")).ids, VIEW.sequence(Text((("user", "hi"),), "yes")).ids)


def test_a_template_that_drops_earlier_answers_still_finds_the_last() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}[a]-[/a]{% else %}"
        "[{{ m.role[0] }}]{{ m.content }}[/{{ m.role[0] }}]{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[a]{% endif %}"
    )
    view = TextView(tokenizer, max_length=128)
    learned = said(view.sequence(Text((("user", "one"), ("assistant", "two"), ("user", "three")), "four")), view)
    assert "four" in learned
    assert "three" not in learned


def test_messages_without_a_template_are_refused_in_one_line() -> None:
    view = TextView(tiny_tokenizer(chat=False), max_length=128)
    with pytest.raises(DataError, match=r"no chat template.*prompt and answer"):
        view.sequence(Text((("user", "hi"),), "yes"))


def test_what_the_template_refuses_is_told() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="roles must alternate"):
        TextView(tokenizer, max_length=128).sequence(Text((("user", "hi"),), "yes"))


def test_without_pad_token_the_end_stands_there_and_is_masked() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    view = TextView(tokenizer, max_length=128)
    assert view.pad == tokenizer.eos_token_id
    batch = view.collate([(view.sequence(Text("a", "b")), 0, 0), (view.sequence(Text("a long one", "b")), 0, 1)])
    assert isinstance(batch.inputs, Tokens)
    assert not batch.inputs.mask[0, 0]


def test_batches_end_together_and_hold_what_was_put_in() -> None:
    items = [VIEW.sequence(Text("a", "b")), VIEW.sequence(Text("a longer one", "yes"))]
    batch = VIEW.collate([(item, k, 7 + k) for k, item in enumerate(items)])
    inputs = batch.inputs
    assert isinstance(inputs, Tokens)
    assert inputs.labels is not None
    assert inputs.options is None
    for row, item in enumerate(items):
        assert torch.equal(inputs.ids[row][inputs.mask[row]], item.ids)
        assert inputs.mask[row].sum() == len(item)
        assert bool(inputs.mask[row, -1])
        assert torch.equal(inputs.labels[row][inputs.labels[row] != IGNORED], item.ids[item.answer])
    assert batch.targets.tolist() == [0, 1]
    assert batch.numbers is not None
    assert batch.numbers.tolist() == [7, 8]


def test_options_are_padded_over_the_batch() -> None:
    items = [VIEW.question(Text("a", options=("x", "much longer"))), VIEW.question(Text("b", options=("y",)))]
    inputs = VIEW.collate([(item, 0, 0) for item in items]).inputs
    assert isinstance(inputs, Tokens)
    assert inputs.options is not None
    assert inputs.options.shape[:2] == (2, 2)
    assert bool((inputs.options[1, 1] == IGNORED).all())


def test_decoding_stops_at_the_first_end() -> None:
    ids = VIEW.tokenizer(" yes")["input_ids"]
    assert VIEW.decode(torch.tensor([*ids, VIEW.end, *ids, VIEW.pad])) == "yes"
