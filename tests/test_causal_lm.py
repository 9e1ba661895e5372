"""A language model's loss, features and answers against plain computations, whatever stands beside an example."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_language_model
from torch import Tensor
from torch.nn import functional as F

from perpetune.build import load_backbone
from perpetune.data.texts.tables import Text
from perpetune.data.texts.view import TextView
from perpetune.errors import UsageError
from perpetune.heads.linear import Linear
from perpetune.models import causal_lm
from perpetune.models.backbone import Backbone
from perpetune.models.causal_lm import CausalLM
from perpetune.models.classifier import Classifier
from perpetune.tasks import Batch, Examples, Inputs, Task

KINDS = ("llama", "gpt2", "gpt_neox", "opt", "lfm2")
TEXTS = (
    Text("What is it?", "a cat"),
    Text("hi", "no"),
    Text((("user", "one"), ("assistant", "two"), ("user", "and a much longer question")), "four"),
)
OPTIONS = ("a cat", "no", "a much longer answer than the others", "yes")


@pytest.fixture(scope="module", params=KINDS)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = tiny_language_model(tmp_path_factory.mktemp(request.param), request.param)
    return load_backbone(f"hf:{folder}")


def view_of(of: Backbone | CausalLM) -> TextView:
    view = of.preprocess if isinstance(of, Backbone) else of.view
    assert isinstance(view, TextView)
    return view


def sequences(backbone: Backbone, *texts: Text) -> Batch:
    view = view_of(backbone)
    return view.collate([(view.sequence(t), 0, i) for i, t in enumerate(texts)])


def questions(of: Backbone | CausalLM, *texts: Text) -> Inputs:
    view = view_of(of)
    return view.collate([(view.question(t), 0, i) for i, t in enumerate(texts)]).inputs


def plain(backbone: Backbone, ids: Tensor) -> Any:
    """The net on one text, without padding, mask or memory."""
    return backbone.net(input_ids=ids.unsqueeze(0), use_cache=False, output_hidden_states=True)


def task() -> Task:
    return Task(0, "t", (), train=[])  # type: ignore[arg-type]


@torch.no_grad()
def test_the_loss_is_the_mean_over_the_tokens_of_the_answers(backbone: Backbone) -> None:
    batch = sequences(backbone, *TEXTS)
    losses = []
    for text in TEXTS:
        encoded = view_of(backbone).sequence(text)
        assert encoded.answer is not None
        logits = plain(backbone, encoded.ids).logits[0]
        each = F.cross_entropy(logits[:-1], encoded.ids[1:], reduction="none")
        losses.append(each[encoded.answer[1:]])
    wanted = torch.cat(losses).mean()
    torch.testing.assert_close(CausalLM(backbone).loss(task(), batch), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_micro_batches_by_their_weights_are_the_batch(backbone: Backbone) -> None:
    encoded = [view_of(backbone).sequence(t) for t in TEXTS]
    examples: Any = SimpleNamespace(weights=[int(e.answer.sum()) for e in encoded if e.answer is not None])
    model = CausalLM(backbone)
    whole = Examples.weight(examples, [0, 1, 2])
    parts = [
        model.loss(task(), sequences(backbone, TEXTS[i])) * Examples.weight(examples, [i]) / whole for i in range(3)
    ]
    torch.testing.assert_close(sum(parts), model.loss(task(), sequences(backbone, *TEXTS)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_features_are_the_mean_state_of_the_tokens_alone(backbone: Backbone) -> None:
    model = CausalLM(backbone)
    found = model.features(questions(backbone, *TEXTS))
    for row, text in zip(found, TEXTS, strict=True):
        ids = view_of(backbone).question(text).ids
        states = backbone.net.base_model(input_ids=ids.unsqueeze(0)).last_hidden_state[0]  # type: ignore[union-attr,operator]
        torch.testing.assert_close(row, states.mean(0), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_option_scores_what_its_tokens_and_the_end_are_likely(backbone: Backbone) -> None:
    texts = [Text(t.prompt, t.answer, OPTIONS[: 4 - i]) for i, t in enumerate(TEXTS)]
    scores = CausalLM(backbone).predict(questions(backbone, *texts))
    assert scores.shape == (3, 4)
    for row, text in zip(scores, texts, strict=True):
        question = view_of(backbone).question(text)
        for k, option in enumerate(question.options):
            ids = torch.cat([question.ids, option])
            said = plain(backbone, ids).logits[0].log_softmax(-1)[len(question) - 1 : -1]
            torch.testing.assert_close(row[k], said.gather(1, option.unsqueeze(1)).sum(), atol=1e-4, rtol=1e-4)
        assert bool((row[len(text.options) :] == -torch.inf).all())


@pytest.mark.parametrize("limit", ["AT_ONCE", "SPACE"])
@torch.no_grad()
def test_many_options_are_scored_in_parts(limit: str, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = questions(backbone, *(Text(t.prompt, options=OPTIONS) for t in TEXTS))
    at_once = CausalLM(backbone).predict(inputs)
    monkeypatch.setattr(f"perpetune.models.causal_lm.{limit}", 3)
    torch.testing.assert_close(CausalLM(backbone).predict(inputs), at_once)


def test_what_recurrent_layers_remember_is_not_repeated() -> None:
    """Of layers that have keys beside such a state transformers would repeat the keys alone."""

    def layer(**states: Any) -> Any:
        return SimpleNamespace(batch_repeat_interleave=lambda repeats: None, **states)

    memory = SimpleNamespace(layers=[layer(), layer()])
    assert causal_lm._repeatable(memory) is memory
    assert causal_lm._repeatable(None) is None
    for layers in ([], [SimpleNamespace()], [layer(), layer(conv_states={})]):
        assert causal_lm._repeatable(SimpleNamespace(layers=layers)) is None


@torch.no_grad()
def test_answers_are_the_likeliest_token_after_each_other(backbone: Backbone) -> None:
    model = CausalLM(backbone, max_new_tokens=6)
    found = model.predict(questions(backbone, *TEXTS))
    for row, text in zip(found, TEXTS, strict=True):
        ids, start = view_of(backbone).question(text).ids, len(view_of(backbone).question(text))
        for _ in range(6):
            ids = torch.cat([ids, plain(backbone, ids).logits[0, -1].argmax().view(1)])
        assert model.read(row) == view_of(backbone).decode(ids[start:])


@torch.no_grad()
def test_options_are_not_looked_at_when_answers_are_generated(backbone: Backbone) -> None:
    model = CausalLM(backbone, eval="generate", max_new_tokens=3)
    texts = [Text(t.prompt, options=OPTIONS) for t in TEXTS]
    assert not model.predict(questions(model, *texts)).is_floating_point()


def test_the_gradient_does_not_feel_the_padding(backbone: Backbone) -> None:
    weights = [p.requires_grad_(True) for p in backbone.net.parameters()]
    try:
        alone = torch.autograd.grad(CausalLM(backbone).loss(task(), sequences(backbone, TEXTS[1])), weights)
        batch = sequences(backbone, TEXTS[1], TEXTS[2])
        assert batch.inputs.labels is not None
        batch.inputs.labels[1] = -100
        beside = torch.autograd.grad(CausalLM(backbone).loss(task(), batch), weights)
    finally:
        backbone.net.requires_grad_(False)
    for a, b in zip(alone, beside, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_a_head_of_classes_reads_the_features_of_questions(backbone: Backbone) -> None:
    """It asks nothing of the output layer, and the answers that a language model would keep room for are none."""
    lm = CausalLM(backbone, max_new_tokens=7)
    model = Classifier(backbone, Linear(backbone.dim))
    assert isinstance(model.view, TextView)
    shared = view_of(backbone)
    assert [(v.chooses, v.room) for v in (model.view, lm.view, shared)] == [(False, 0), (True, 7), (True, 0)]
    text = Text(TEXTS[0].prompt, options=OPTIONS)
    assert (len(lm.view.question(text).options), model.view.question(text).options) == (4, ())
    asked = questions(backbone, *TEXTS)
    model.head.grow("abc", torch.Generator())
    assert model.predict(asked).shape == (3, 3)
    torch.testing.assert_close(model.predict(asked), model.head(lm.features(asked)))


def test_the_output_layer_does_not_go_with_pictures() -> None:
    with pytest.raises(UsageError, match="takes pictures, and this head is for texts: use `head: ridge`"):
        CausalLM(load_backbone("perpetune:micro"))


@torch.no_grad()
def test_any_number_of_options(backbone: Backbone) -> None:
    model = CausalLM(backbone)
    options = (*OPTIONS, *(f"option {n}" for n in range(200)))
    many = model.predict(questions(backbone, Text("which", options=options), TEXTS[1]))
    assert many.shape == (2, 204)
    few = model.predict(questions(backbone, Text("which", options=options[:3])))
    one = model.predict(questions(backbone, Text("which", options=options[:1])))
    torch.testing.assert_close(many[0, :3], few[0], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(many[0, :1], one[0], atol=1e-4, rtol=1e-5)
    assert bool(torch.isfinite(many[0]).all())


@torch.no_grad()
def test_an_option_that_begins_another_is_less_than_its_beginning(backbone: Backbone) -> None:
    """The end counts: `no` is not as likely as all that begins with it."""
    (row,) = CausalLM(backbone).predict(questions(backbone, Text("which", options=("no", "no cat", "no cat at all"))))
    assert float(row.exp().sum()) < 1
    assert len(set(row.tolist())) == 3


@torch.no_grad()
def test_an_answer_ends_at_each_end_that_the_checkpoint_names(backbone: Backbone) -> None:
    """As instruction-tuned models have them: the end of a turn beside that of a text."""
    free = CausalLM(backbone, max_new_tokens=6)
    asked = questions(backbone, *TEXTS)
    first = free.predict(asked)[:, 0].tolist()
    net: Any = backbone.net
    kept = net.generation_config
    try:
        net.generation_config.eos_token_id = [*free.view.ends, first[0]]
        model = CausalLM(backbone, max_new_tokens=6)
        assert model.view.ends == {*free.view.ends, first[0]}
        assert view_of(backbone).ends == {view_of(backbone).end}
        found = model.predict(asked)
        for row, token in zip(found, first, strict=True):
            assert int(row[0]) == token
            assert (model.read(row) == "") == (token == first[0] or free.read(row) == "")
    finally:
        net.generation_config = kept


def test_the_longest_answer_has_to_fit(backbone: Backbone) -> None:
    with pytest.raises(UsageError, match=r"head\.max_new_tokens is 128, and hf:.* takes 128 tokens, prompt and answer"):
        CausalLM(backbone, max_new_tokens=128)


def test_attention_in_16_bits_on_a_cpu_gives_the_same_gradients_sooner(tmp_path: Any) -> None:
    """Short texts take torch's plain attention; long ones, other types and blocks computed again take the fused one."""
    from perpetune.pets import inject, using
    from perpetune.pets.lora import LoRA

    folder, found = tiny_language_model(tmp_path), {}
    for dtype, again in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
        backbone = load_backbone(f"hf:{folder}", dtype=dtype, gradient_checkpointing=again)
        inject(backbone.net, backbone.pet_places(["q", "v"]), lambda place: LoRA(place, torch.Generator()), "x")
        pets = [p for p in backbone.net.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(0)
        for p in pets:
            p.data.normal_(std=0.1, generator=generator)
        model, batch = CausalLM(backbone).train(), sequences(backbone, *TEXTS)
        with model._attending(batch.inputs):
            assert torch.backends.cuda.flash_sdp_enabled() == (dtype == "float32" or again)
        long = Inputs(ids=torch.zeros(1, causal_lm.SHORT + 1, dtype=torch.int64))
        with model._attending(long):
            assert torch.backends.cuda.flash_sdp_enabled()
        with using(model, "x"):
            found[dtype, again] = torch.autograd.grad(model.loss(task(), batch), pets)
    whole = torch.cat([g.flatten() for g in found["float32", False]])
    for key in (("bfloat16", False), ("bfloat16", True)):
        other = torch.cat([g.flatten() for g in found[key]])
        assert float((other - whole).norm() / whole.norm()) < 0.05
