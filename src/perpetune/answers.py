"""What a learned model is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perpetune.data.texts.chats import Messages

Prompt = str | Sequence[tuple[str, ...]] | Sequence[dict[str, Any]] | Mapping[str, Any]
"""A prompt for a language model: a text, or the messages of a chat. For a vision-language model also
`{"prompt": …, "images": […]}` or `{"messages": …, "images": […]}`, whose images are paths or PIL images."""


@dataclass(frozen=True)
class Prediction:
    """A learner's prediction for one image: `classes` has names with probabilities, the likeliest first."""

    image: str
    classes: list[tuple[str, float]]

    @property
    def name(self) -> str:
        return self.classes[0][0]


@dataclass(frozen=True)
class Answer:
    """A learner's answer to one prompt.

    Attributes:
        prompt: the prompt as the caller gave it.
        text: the answer.
        options: each option with its probability among the options, the likeliest first; empty for a generated answer.
        cut: the number of tokens that were cut off from the prompt's left, because the model cannot take more.
        left_out: what the model's chat template leaves out of the messages.
    """

    prompt: str | Messages
    text: str
    options: list[tuple[str, float]]
    cut: int = 0
    left_out: tuple[str, ...] = ()
