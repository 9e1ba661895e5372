"""A causal language model: texts to texts, by the pretrained model's own output layer."""

from __future__ import annotations

import copy
import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from perpetune.data.sources import Kind
from perpetune.data.texts.view import TextView
from perpetune.errors import UsageError
from perpetune.models.backbone import Backbone
from perpetune.models.base import Model
from perpetune.tasks import IGNORED, Batch, Inputs, Task

AT_ONCE = 256  # most options that are scored in one pass
SHORT = 256  # tokens of a text up to which torch's plain attention is faster in 16 bits on a CPU (`_attending`)
SPACE = 2 << 30  # most bytes for one pass: each option needs a copy of its question's keys and values


class CausalLM(Model):
    """The language model's own output layer: answers are generated, or chosen among a question's options.

    The loss is computed on the tokens of the answer and its end token; the tokens of the prompt are not learned. The
    probability of an option is that of its tokens and the end token. Without the end token, an option would always be
    at least as likely as a longer one that begins with it.

    Args:
        backbone: a language model.
        eval: `generate` writes the answer greedily; `options` scores the options of a question that has some.
        max_new_tokens: the most tokens of a generated answer.

    Raises:
        UsageError: an answer of `max_new_tokens` leaves no room for a question.
    """

    reads: ClassVar[tuple[Kind, ...]] = ("texts",)
    statistics: ClassVar[bool] = False
    view: TextView  # see `reads`

    def __init__(
        self,
        backbone: Backbone,
        *,
        eval: Literal["options", "generate"] = "options",  # noqa: A002  # what the key in a recipe is called
        max_new_tokens: Annotated[int, Field(ge=1)] = 64,
    ):
        super().__init__(backbone)
        self.max_new_tokens, self.nothing = max_new_tokens, self.view.pad
        if max_new_tokens >= self.view.max_length:
            raise UsageError(
                f"head.max_new_tokens is {max_new_tokens}, and {backbone.spec} takes {self.view.max_length} tokens, "
                "prompt and answer together: lower it, or raise backbone.max_length"
            )
        self.view.room, self.view.chooses = max_new_tokens, eval != "generate"
        known = inspect.signature(backbone.net.forward).parameters
        self._keeps = "logits_to_keep" in known
        self._memory = "cache" if "cache" in known else "past_key_values"
        # transformers fills every setting that a call leaves open from the net's generation config (sampling,
        # penalties), so that config is replaced as a whole.
        net: Any = backbone.net
        output = net.get_output_embeddings()
        if output is None:
            raise UsageError(f"{backbone.spec} has no output layer, so it cannot answer: use another model")
        output.register_forward_pre_hook(_whole)
        net.generation_config = self._greedy(getattr(net.generation_config, "eos_token_id", None))

    @property
    def classes(self) -> list[str]:
        return []

    @property
    def chooses(self) -> bool:
        return False

    def grow(self, task: Task) -> None:
        """Does nothing: the output layer can write any text already."""

    def summarise(self, task: Task, batch_size: int) -> None:
        """Does nothing: this model learns nothing from statistics."""

    def loss(self, task: Task, batch: Batch) -> Tensor:
        length, labels = batch.inputs.said, batch.inputs["labels"]
        with self._attending(batch.inputs):
            logits = self._logits(batch.inputs, keep=length + 1)[:, :-1]  # the logits at token i predict token i + 1
        targets = labels[:, -length:].flatten()
        loss: Tensor = F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=IGNORED)
        return loss

    def features(self, inputs: Inputs) -> Tensor:
        """Features `(B, D)` of the questions, as the backbone reads them."""
        return self.backbone.features(inputs)

    def observe(self, inputs: Inputs) -> None:
        self.features(inputs)

    @torch.no_grad()
    def predict(self, inputs: Inputs) -> Tensor:
        if inputs.options is not None:
            return self._scored(inputs, inputs.options)
        return self._generated(inputs)

    def read(self, answer: Tensor) -> str:
        return self.view.decode(answer)

    def _attending(self, inputs: Inputs) -> AbstractContextManager[None]:
        """The context of a pass that a backward pass follows: the kernel of attention that is fastest in both.

        On a CPU the backward pass of torch's fused attention takes ten times as long in 16 bits as in 32 for short
        texts. Blocks that are computed again need the same kernel again, and they compute outside this context.
        """
        net = self.backbone.net
        short = inputs.ids.device.type == "cpu" and inputs.ids.shape[1] <= SHORT
        if not short or next(net.parameters()).dtype not in (torch.bfloat16, torch.float16):
            return nullcontext()
        if any(getattr(block, "gradient_checkpointing", False) for block in net.modules()):
            return nullcontext()
        plain: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
        return plain

    def _logits(self, inputs: Inputs, *, keep: int) -> Tensor:
        """Logits `(B, keep, V)` at the last `keep` tokens only, because the output layer is wide and costly."""
        more = {"logits_to_keep": keep} if self._keeps else {}
        logits: Tensor = self.backbone.net(**self.backbone.asked(inputs), **more, use_cache=False).logits
        return logits[:, -keep:]

    def _generated(self, inputs: Inputs) -> Tensor:
        """Greedy answers: tokens `(B, M)`, padded after the end of each answer."""
        net: Any = self.backbone.net
        whole: Tensor = net.generate(input_ids=inputs.ids, attention_mask=inputs.mask.long())
        return whole[:, inputs.ids.shape[1] :]

    def _greedy(self, ends: int | list[int] | None) -> Any:
        """The config of transformers for greedy answers.

        Args:
            ends: tokens with which the model ends an answer, beside those of the tokenizer.
        """
        from transformers import GenerationConfig

        self.view.ends = self.view.ends | set([ends] if isinstance(ends, int) else ends or [])
        return GenerationConfig(
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self.view.pad,
            eos_token_id=sorted(self.view.ends) or None,
            bos_token_id=self.view.tokenizer.bos_token_id,
        )

    def _scored(self, inputs: Inputs, options: Tensor) -> Tensor:
        """Log-probabilities `(B, K)` of the options, -inf where a question has fewer options."""
        net: Any = self.backbone.net
        more = {"logits_to_keep": 1} if self._keeps else {}
        output = net(**self.backbone.asked(inputs), **more, use_cache=True)
        memory = _repeatable(getattr(output, self._memory, None))
        scores = torch.full(options.shape[:2], -torch.inf, device=options.device)
        given = (options != IGNORED).any(-1)
        logs = output.logits[:, -1].float().log_softmax(-1)  # (B, V)
        first_scores = logs.gather(1, options[..., 0].clamp(min=0))  # (B, K)
        size = _at_a_time(options, memory, logs.shape[-1])
        for start in range(0, options.shape[1], size):
            part = options[:, start : start + size]
            rest = self._continued(inputs, part, memory) if part.shape[-1] > 1 else 0
            scores[:, start : start + size] = first_scores[:, start : start + size] + rest
        return scores.masked_fill(~given, -torch.inf)

    def _continued(self, inputs: Inputs, options: Tensor, memory: Any) -> Tensor:
        """Log-probabilities `(B, K)` of all tokens of the options except the first.

        Args:
            memory: keys and values of the questions; they are not changed. None computes the questions once more.
        """
        count, k, _ = options.shape
        flat = options.flatten(0, 1)  # (B K, M)
        given, wanted = flat[:, :-1], flat[:, 1:]
        mask = torch.cat([inputs.mask.repeat_interleave(k, 0), given != IGNORED], 1)
        added, length = given.clamp(min=0), given.shape[1]
        ids = torch.cat([inputs.ids.repeat_interleave(k, 0), added], 1)
        if memory is None:
            # `labels` say where the answer begins, for nets whose questions are read both ways
            labels = torch.cat([torch.full_like(ids[:, :-length], IGNORED), added], 1)
            pixels, shown = (
                inputs[name].repeat_interleave(k, 0) if name in inputs else None for name in ("pixels", "shown")
            )
            arguments = self.backbone.asked(Inputs(ids=ids, mask=mask, labels=labels, pixels=pixels, shown=shown))
        else:
            arguments = {"input_ids": added, "attention_mask": mask.long(), self._memory: copy.deepcopy(memory)}
            arguments[self._memory].batch_repeat_interleave(k)
            if self.backbone.places:
                arguments["position_ids"] = self.backbone.positions(ids, mask)[..., -length:]
        if self._keeps:
            arguments["logits_to_keep"] = length
        logits = self.backbone.net(**arguments, use_cache=memory is not None).logits[:, -length:].float()
        scores = -F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none")
        return scores.view(count, k, -1).sum(-1)


def _whole(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Make the output layer's input contiguous.

    The states of the last tokens are a slice of all states. For a slice torch computes one product for each text, with
    a copy of the layer for each, which is several times slower than the rest of the net.
    """
    return tuple(arg.contiguous() for arg in args)


def _repeatable(memory: Any) -> Any:
    """The net's memory of questions (`past_key_values`), if it can be repeated for several options; else None.

    The states of recurrent layers and convolutions cannot be repeated: transformers repeats only keys and values, and
    some layers have both kinds of state.
    """
    layers = getattr(memory, "layers", None) or ()
    known = all(hasattr(layer, "batch_repeat_interleave") and not hasattr(layer, "conv_states") for layer in layers)
    return memory if layers and known else None


def _at_a_time(options: Tensor, memory: Any, words: int) -> int:
    """How many options of each question are scored in one pass.

    Args:
        options: their tokens `(B, K, M)`.
        memory: keys and values of the questions; None if the questions are computed once more for each option.
        words: the size of the vocabulary.
    """
    if memory is None:
        return 1
    kept: list[Tensor | None] = [t for layer in memory.layers for t in (layer.keys, layer.values)]
    held = sum(t.nbytes for t in kept if t is not None)
    logits = 12 * len(options) * options.shape[-1] * words  # logits, and their logarithms, in float32
    return max(1, min(AT_ONCE // len(options), SPACE // max(1, held + logits)))
