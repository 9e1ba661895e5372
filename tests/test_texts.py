"""Texts to tokens: where the answer begins, what is cut, and how batches are made."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHAT, tiny_tokenizer

from perpetune.data.texts.examples import Encoded
from perpetune.data.texts.tables import Text
from perpetune.data.texts.view import TextView
from perpetune.errors import DataError
from perpetune.tasks import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VIEW = TextView(tiny_tokenizer(), max_length=128)
words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=30)


DROPS = (
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}[a]-[/a]{% else %}"
    "[{{ m.role[0] }}]{{ m.content }}[/{{ m.role[0] }}]{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)


def said(encoded: Encoded, view: TextView = VIEW) -> str:
    assert encoded.answer is not None
    return view.tokenizer.decode(encoded.ids[encoded.answer])


def test_the_answer_and_its_end_are_learned_and_nothing_else() -> None:
    encoded = VIEW.sequence(Text("What is it?", "a cat"))
    assert said(encoded) == " a cat<eos>"
    assert VIEW.tokenizer.decode(encoded.ids).endswith("What is it? a cat<eos>")


def test_no_space_stands_after_a_line_break() -> None:
    assert said(VIEW.sequence(Text("Answer:\n", "yes"))) == "yes<eos>"


@pytest.mark.parametrize(
    ("prompt", "answer", "whole", "learned"),
    [
        ("Answer:", "yes", "Answer: yes", " yes"),
        ("Answer: ", "yes", "Answer: yes", " yes"),  # the space of the prompt is the one that is put there else
        ("Answer:", " yes", "Answer: yes", " yes"),  # and so is that of the answer
        ("Answer:   ", "yes", "Answer:   yes", " yes"),
        ("Answer:", "yes  ", "Answer: yes  ", " yes  "),
        ("Answer:", "yes\n\n", "Answer: yes\n\n", " yes\n\n"),
        ("Answer:", "\tyes", "Answer:\tyes", "\tyes"),
        ("Answer:", "\nyes", "Answer:\nyes", "\nyes"),
        ("Answer:\t", "yes", "Answer:\tyes", "yes"),
        ("def f(x):\n", "    return x\n    # done", "def f(x):\n    return x\n    # done", "    return x\n    # done"),
        ("def f(x):\n    ", "return x", "def f(x):\n    return x", " return x"),
        ("def f(x):", "    return x", "def f(x):     return x", "     return x"),
    ],
)
def test_prompts_and_answers_are_learned_as_they_are(prompt: str, answer: str, whole: str, learned: str) -> None:
    encoded = VIEW.sequence(Text(prompt, answer))
    assert VIEW.tokenizer.decode(encoded.ids) == f"{whole}<eos>"
    assert said(encoded) == f"{learned}<eos>"


ENDLESS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} "
    "{{ eos_token }}{% endif %}{% endfor %}"
)
LINES_AFTER = (
    "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


@pytest.mark.parametrize("template", [CHAT, ENDLESS, LLAMA2, LINES_AFTER])
@pytest.mark.parametrize("kind", ["bytes", "pieces", "no end"])
def test_answers_in_chats_keep_their_white_space(template: str, kind: str) -> None:
    """What the chat form puts around an answer is no part of it when it is generated."""
    tokenizer = KINDS[kind]()
    tokenizer.chat_template = template
    view = TextView(tokenizer, max_length=1000)
    for answer in ("yes", "    return x", "\n\tyes", "yes\n", "  a\n  b  \n"):
        earlier = (("user", "one"), ("assistant", answer), ("user", "two"))
        for prompt in (earlier[:1], earlier):
            whole, asked = view.sequence(Text(prompt, answer)), view.question(Text(prompt))
            assert whole.answer is not None
            assert torch.equal(whole.ids[: len(asked)], asked.ids)
            assert asked.own(view.decode(whole.ids[len(asked) :])) == answer
            assert tokenizer.decode(whole.ids).count(answer) == (2 if prompt is earlier else 1)


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


def test_what_opens_a_chat_is_no_answer() -> None:
    told = (("assistant", "hello there"), ("user", "one"), ("assistant", "two"), ("user", "three"))
    learned = said(VIEW.sequence(Text(told, "four")))
    assert "two" in learned
    assert "four" in learned
    assert "hello" not in learned


def test_chat_puts_plain_prompts_into_messages() -> None:
    view = TextView(VIEW.tokenizer, max_length=128, chat=True)
    assert torch.equal(view.sequence(Text("hi", "yes")).ids, VIEW.sequence(Text((("user", "hi"),), "yes")).ids)


def test_a_template_that_drops_earlier_answers_still_finds_the_last() -> None:
    """And how many it drops is told; the words that open a chat are no answer."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = DROPS
    view = TextView(tokenizer, max_length=128)
    chat = (("user", "one"), ("assistant", "two"), ("user", "three"))
    encoded = view.sequence(Text(chat, "four"))
    learned = said(encoded, view)
    assert "four" in learned
    assert "three" not in learned
    assert encoded.dropped == 1
    assert view.sequence(Text((("assistant", "hello"), *chat), "four")).dropped == 1
    assert view.sequence(Text(chat[:1], "four")).dropped == 0
    assert VIEW.sequence(Text(chat, "four")).dropped == 0


def test_messages_without_a_template_are_refused_in_one_line() -> None:
    view = TextView(tiny_tokenizer(chat=False), max_length=128)
    with pytest.raises(DataError, match=r"no chat template.*prompt and answer"):
        view.sequence(Text((("user", "hi"),), "yes"))


@pytest.mark.parametrize(
    ("template", "told"),
    [("{{ raise_exception('roles must alternate') }}", "roles must alternate"), ("{{ bos_token + 1 }}", "concatenate")],
)
def test_what_the_template_refuses_is_told(template: str, told: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=told):
        TextView(tokenizer, max_length=128).sequence(Text((("user", "hi"),), "yes"))


def test_without_pad_token_the_end_stands_there_and_is_masked() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    view = TextView(tokenizer, max_length=128)
    assert view.pad == tokenizer.eos_token_id
    batch = view.collate([(view.sequence(Text("a", "b")), 0, 0), (view.sequence(Text("a long one", "b")), 0, 1)])
    assert not batch.inputs.mask[0, 0]


def test_batches_end_together_and_hold_what_was_put_in() -> None:
    items = [VIEW.sequence(Text("a", "b")), VIEW.sequence(Text("a longer one", "yes"))]
    batch = VIEW.collate([(item, k, 7 + k) for k, item in enumerate(items)])
    inputs = batch.inputs
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
    assert inputs.options is not None
    assert inputs.options.shape[:2] == (2, 2)
    assert bool((inputs.options[1, 1] == IGNORED).all())


def test_decoding_stops_at_the_first_end() -> None:
    ids = VIEW.tokenizer(" yes")["input_ids"]
    assert VIEW.decode(torch.tensor([*ids, VIEW.end, *ids, VIEW.pad])) == " yes"


# -- other tokenizers -------------------------------------------------------------------------------------


def pieces(split: bool, ends: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of the kind that sentencepiece makes: spaces are `▁`, what is unknown falls to bytes, and it puts
    `<s>`, and with `ends` also `</s>`, around every text.

    Args:
        split: whether a token holds no space but at its start; else `:▁` is one.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    space = pre_tokenizers.Metaspace(prepend_scheme="first", split=split)
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = space
    trained = trainers.BpeTrainer(
        vocab_size=100, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=list("(),.'"), show_progress=False
    )
    learner.train_from_iterator(["What is it? Answer: yes no", "Answer: yes it is a cat"] * 5, trained)
    model = json.loads(learner.to_str())["model"]
    vocabulary = model["vocab"] | {f"<0x{byte:02X}>": len(model["vocab"]) + byte for byte in range(256)}
    merges = [tuple(pair) for pair in model["merges"]]
    bpe = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    bpe.pre_tokenizer = space
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bpe.decoder = decoders.Sequence(back)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if ends else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=True
    )


def trimmed() -> PreTrainedTokenizerFast:
    """Byte-level BPE that says of a space that it goes from a place to the same place."""
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bytes": tiny_tokenizer,
    "trimmed": trimmed,
    "pieces": lambda: pieces(split=True),
    "pieces across spaces": lambda: pieces(split=False),
    "no end": lambda: pieces(split=True, ends=False),
}
PROMPTS = (
    "Answer:",
    "Answer:\n",
    "Answer:\n\n",
    "Answer:\n\n\n\n",
    "Answer:\r\n",
    "Answer:\t",
    "Answer:      ",
    "Answer:\n   ",
    "سؤال: ما هذا؟",  # right to left
    "问题：这是什么？",
    "Is it 😀",
    "e\u0301 and ü",
    "x" * 300,
    "a <eos> in it",
)
ANSWERS = ("yes", "5", "😀", "👩‍👩‍👧 family", "\nyes", "نعم", "(A)", "- a\n- b", "yes\r\nno", "ü", "  yes  ", "x" * 100)


@pytest.mark.parametrize(
    ("kind", "chat", "step"),
    [pytest.param(k, c, s, marks=[pytest.mark.slow] * (s == 1)) for k in KINDS for c in (False, True) for s in (1, 4)],
)
def test_whatever_the_tokenizer_the_answer_is_learned_and_the_question_is_what_is_before_it(
    kind: str, chat: bool, step: int
) -> None:
    """Every prompt and every answer is there; with step 1 each with each."""
    tokenizer = KINDS[kind]()
    tokenizer.chat_template = CHAT
    view = TextView(tokenizer, max_length=10_000, chat=chat)
    assert view.end is not None
    for number, prompt in enumerate(PROMPTS):
        for answer in ANSWERS[number % step :: step]:
            whole = view.sequence(Text(prompt, answer))
            assert whole.answer is not None
            learned = whole.ids[whole.answer]
            assert int((learned == view.end).sum()) >= 1
            assert learned[-1] == view.end
            assert whole.cut == 0
            asked = view.question(Text(prompt))
            assert asked.own(view.decode(learned)) == answer, (prompt, answer)
            chosen = view.question(Text(prompt, options=(answer.strip(), "no", "yes it is")))
            alone = view.question(Text(prompt, options=(answer.strip(),)))
            assert asked.answer is None
            assert int(asked.ids[-1]) not in view.ends or chat
            # A line break may be one token with the one before it, and a word with what is before the space.
            if not answer[0].isspace() and kind != "pieces across spaces":
                assert torch.equal(whole.ids[: len(asked)], asked.ids), (prompt, answer)
                assert torch.equal(chosen.ids, asked.ids)
                assert torch.equal(torch.cat([alone.ids, alone.options[0]]), whole.ids)
            for option, text in zip(chosen.options, (answer.strip(), "no", "yes it is"), strict=True):
                assert torch.equal(torch.cat([chosen.ids, option]), view.sequence(Text(prompt, text)).ids)


def test_two_openings_leave_the_answer_whole() -> None:
    """As GLM's `[gMASK]<sop>`."""
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> <pad> $A", special_tokens=[("<pad>", 0), ("<bos>", 1)]
    )
    text, refused = Text("a long question", "yes no maybe"), 0
    for length in range(4, 30):
        view = TextView(tokenizer, max_length=length)
        try:
            encoded = view.sequence(text)
        except DataError:
            refused += 1
            continue
        assert said(encoded, view) == " yes no maybe<eos>"
    assert 0 < refused < 26


@pytest.mark.parametrize("kind", KINDS)
def test_one_opening_and_one_end_stand_in_a_text(kind: str) -> None:
    tokenizer = KINDS[kind]()
    view = TextView(tokenizer, max_length=1000)
    whole, asked = view.sequence(Text("What is it?", "yes")), view.question(Text("What is it?"))
    opens = int("pieces" in kind or kind == "no end")
    for encoded in (whole, asked):
        assert int((encoded.ids == tokenizer.bos_token_id).sum()) == opens
    assert int((whole.ids == view.end).sum()) == 1
    assert int((asked.ids == view.end).sum()) == 0
    short = TextView(tokenizer, max_length=12)
    for encoded in (short.sequence(Text("x" * 50, "yes")), short.question(Text("x" * 50))):
        assert (int(encoded.ids[0]) == tokenizer.bos_token_id) == bool(opens)
        assert len(encoded) == 12
        assert encoded.cut > 0


def test_a_cut_chat_keeps_the_last_answer_and_learns_nothing_that_nothing_precedes() -> None:
    turns = [("user", "one two"), ("assistant", "y" * 60)] * 3
    text = Text((*turns, ("user", "three")), "four")
    whole = TextView(VIEW.tokenizer, max_length=1000).sequence(text)
    assert whole.answer is not None
    assert int(whole.answer.sum()) > 180  # more than is left below
    for length in range(20, 60):
        view = TextView(VIEW.tokenizer, max_length=length)
        encoded = view.sequence(text)
        assert encoded.answer is not None
        assert len(encoded) == length
        assert not encoded.answer[0]
        assert said(encoded, view).endswith("four<eos>")
    with pytest.raises(DataError, match="the answer alone has"):
        TextView(VIEW.tokenizer, max_length=5).sequence(text)


def test_options_of_a_chat_with_several_turns_follow_its_last_question() -> None:
    prompt = (("user", "one"), ("assistant", "two"), ("user", "three"))
    asked = VIEW.question(Text(prompt, options=("four", "five")))
    assert torch.equal(asked.ids, VIEW.question(Text(prompt)).ids)
    assert [VIEW.tokenizer.decode(option) for option in asked.options] == ["four<eos>", "five<eos>"]


def test_options_that_begin_alike_one_and_many() -> None:
    options = ("a", "a b", "a b c")
    asked = VIEW.question(Text("choose", options=options))
    assert [VIEW.tokenizer.decode(o) for o in asked.options] == [" a<eos>", " a b<eos>", " a b c<eos>"]
    (only,) = VIEW.question(Text("choose", options=("a b",))).options
    assert VIEW.tokenizer.decode(only) == " a b<eos>"
    many = VIEW.question(Text("choose", options=tuple(f"option {n}" for n in range(200))))
    assert len(many.options) == 200
    assert torch.equal(many.ids, asked.ids)


def test_an_empty_prompt_asks_nothing() -> None:
    for prompt in ("", "   "):
        with pytest.raises(DataError, match="the prompt is empty"):
            VIEW.question(Text(prompt))


def test_a_template_that_asks_in_other_words_than_it_tells() -> None:
    """Where the answer stands is then found by what changes with it, not by what it says: `e` is in `end`, too."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
        "{% if add_generation_prompt %}<think>{% endif %}"
    )
    view = TextView(tokenizer, max_length=128)
    for answer in ("e", "d]", "0", "01", "yes"):
        assert said(view.sequence(Text((("user", "hi"),), answer)), view) == f"{answer}[end]<eos>"


def test_decoding_ends_at_any_end_and_leaves_spaces_as_they_are() -> None:
    view = TextView(pieces(split=True), max_length=100)
    ids = view.tokenizer("f ( a , b ) . n't", add_special_tokens=False)["input_ids"]
    assert view.decode(torch.tensor(ids)) == " f ( a , b ) . n't"  # the first space, too, which this kind drops else
    view.ends |= {ids[-1]}
    assert view.decode(torch.tensor([*ids, *ids])) == " f ( a , b ) . n'"
