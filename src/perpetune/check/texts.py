"""Small texts, and a small language model that reads them."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from perpetune.build import load_backbone
from perpetune.check.kind import TinyKind
from perpetune.data.texts.tables import Row, Text, TextTable
from perpetune.models.backbone import Backbone
from perpetune.seeding import own_global_state
from perpetune.tasks import Examples, Inputs, Item

WORDS = {"a": "red", "b": "blue", "c": "one", "d": "two", "e": "north", "f": "south"}
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 :"


class TinyTexts(TinyKind):
    """Questions with a few possible answers, for a language model's own output layer."""

    name = "texts"

    def __init__(self) -> None:
        self._view = self.backbone().preprocess  # one for all examples

    def backbone(self) -> Backbone:
        return copy.deepcopy(_made())

    def examples(self, classes: Sequence[str], each: int, seed: int) -> Examples:
        options = tuple(WORDS[c] for c in classes)
        texts = [Text(f"{WORDS[c][0]} {c} {n % each} {seed}:", WORDS[c], options) for c in classes for n in range(each)]
        rows = [Row(f"row {i}", f"{seed}-{i}", text) for i, text in enumerate(texts)]
        table = TextTable(rows, ["task"] * len(rows), {"task": options})
        return self._view.examples(table, range(len(rows)), options, "training")

    def asked(self, classes: Sequence[str]) -> Inputs:
        questions = self.examples(classes, 3, seed=99).questions()
        items: list[Item] = [(questions.load(i, None), 0, i) for i in range(len(questions))]
        return questions.collate(items).inputs


@cache
def _made() -> Backbone:
    """A Llama of two blocks and width 32 whose tokens are letters, its weights random but always the same."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    words = {token: i for i, token in enumerate(["<pad>", "<eos>", *ALPHABET])}
    letters = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>", model_max_length=128
    )
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with tempfile.TemporaryDirectory() as folder:
            with own_global_state("tiny language model"):
                LlamaForCausalLM(config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            return load_backbone(f"hf:{Path(folder)}")
    finally:
        if shown:
            logging.enable_progress_bar()
