"""Training and answering of a language model by `finetune` x `lora` beside bare loops, in one process, in turns.

    OMP_NUM_THREADS=1 python benchmarks/language_step.py --backbone hf:FOLDER --dtype bfloat16

The bare loops are what one would write by hand with transformers and peft: the same LoRA on the same net, the same
texts cut into tokens once, batches drawn at random and padded, AdamW; no checks, no progress, no checkpoints. Bare
training is there twice: `plain` gives the net its labels, as most scripts do, and `lean` asks the output layer for the
tokens of answers alone, which is what perpetune does. An epoch counts whole, with its tokenising. Answers are generated
greedily in batches. Prints JSON; `ratio` is perpetune's texts per second over the bare loop's, the median over the
turns; `cpu_ratio` is of seconds of this process's CPU, which others on the machine disturb less.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from perpetune.build import build_method, load_backbone
from perpetune.data.texts.examples import TextSet
from perpetune.data.texts.tables import Row, Text, TextTable
from perpetune.evaluate import evaluate
from perpetune.recipe import make_recipe
from perpetune.runtime import Runtime, pick_device
from perpetune.tasks import Task

ANSWERS = ("yes", "no", "perhaps", "never")
IGNORED = -100


def made_up(tokenizer: Any, count: int, shortest: int, longest: int) -> list[Text]:
    """Random words with an answer each."""
    rng = random.Random(0)
    words = [word for i in range(400, 4000) if (word := tokenizer.decode([i]).strip()).isalpha()]
    texts = []
    for _ in range(count):
        prompt = " ".join(rng.choices(words, k=rng.randint(shortest, longest)))
        texts.append(Text(f"{prompt}\nAnswer:", rng.choice(ANSWERS)))
    return texts


class Bare:
    """What one would write by hand."""

    def __init__(self, net: Any, tokenizer: Any, texts: list[Text], given: argparse.Namespace, device: torch.device):
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        self.net = get_peft_model(net, config).to(device).eval()
        self.tokenizer, self.texts, self.given, self.device = tokenizer, texts, given, device
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.trained = [p for p in self.net.parameters() if p.requires_grad]
        for p in self.trained:
            p.data = p.data.float()

    def examples(self) -> list[tuple[list[int], int]]:
        """Tokens, and how many of them are learned."""
        found = []
        for text in self.texts:
            prompt = self.tokenizer(text.prompt)["input_ids"]
            answer = [*self.tokenizer(f" {text.answer}", add_special_tokens=False)["input_ids"]]
            answer.append(self.tokenizer.eos_token_id)
            found.append((prompt + answer, len(answer)))
        return found

    def batches(self, rows: list[tuple[list[int], int]]) -> Any:
        """Padded on the left."""
        for start in range(0, len(rows), self.given.batch_size):
            part = rows[start : start + self.given.batch_size]
            width = max(len(ids) for ids, _ in part)
            ids = torch.tensor([[self.pad] * (width - len(i)) + i for i, _ in part])
            mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i, _ in part])
            labels = torch.full_like(ids, IGNORED)
            for row, (_, said) in enumerate(part):
                labels[row, -said:] = ids[row, -said:]
            yield ids.to(self.device), mask.to(self.device), labels.to(self.device), max(said for _, said in part)

    def train(self, *, lean: bool) -> None:
        optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0.0)
        rows = self.examples()
        random.Random(1).shuffle(rows)
        for ids, mask, labels, said in self.batches(rows):
            if lean:
                logits = self.net(input_ids=ids, attention_mask=mask, logits_to_keep=said + 1).logits[:, :-1]
                wanted = labels[:, -said:]
                loss = F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)
            else:
                loss = self.net(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def answer(self) -> int:
        right = 0
        for start in range(0, len(self.texts), self.given.batch_size):
            part = self.texts[start : start + self.given.batch_size]
            rows = [(self.tokenizer(text.prompt)["input_ids"], 1) for text in part]
            for ids, mask, _, _ in self.batches(rows):
                said = self.net.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    do_sample=False,
                    max_new_tokens=self.given.new_tokens,
                    pad_token_id=self.pad,
                )
                for row, text in zip(said[:, ids.shape[1] :], part, strict=True):
                    right += self.tokenizer.decode(row, skip_special_tokens=True).strip() == text.answer
        return right


def spent(call: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds of the clock and of the CPU."""
    began, cpu = time.perf_counter(), time.process_time()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, time.process_time() - cpu


def in_turns(calls: dict[str, Callable[[], Any]], given: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The first of `calls` beside each other."""
    own, *others = calls
    for call in calls.values():
        call()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(given.turns):
        for name in calls if turn % 2 == 0 else reversed(calls):
            taken[name].append(spent(calls[name], device))
    found: dict[str, Any] = {
        f"{name}_texts_per_s": round(given.texts / statistics.median(clock for clock, _ in rows), 2)
        for name, rows in taken.items()
    }
    for other in others:
        for column, kind in enumerate(("ratio", "cpu_ratio")):
            ratios = [b[column] / a[column] for a, b in zip(taken[own], taken[other], strict=True)]
            found[f"{other}_{kind}"] = {
                "median": round(statistics.median(ratios), 4),
                "least": round(min(ratios), 4),
                "most": round(max(ratios), 4),
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backbone", required=True, help="hf:FOLDER or hf:FILE.gguf")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--texts", type=int, default=48)
    parser.add_argument("--shortest", type=int, default=20, help="words of a prompt")
    parser.add_argument("--longest", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=4, help="tokens of an answer")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    device = pick_device(given.device)
    backbone = load_backbone(given.backbone, dtype=given.dtype)
    view: Any = backbone.preprocess
    texts = made_up(view.tokenizer, given.texts, given.shortest, given.longest)
    bare = Bare(copy.deepcopy(backbone.net), view.tokenizer, texts, given, device)
    content = {
        "backbone": given.backbone,
        "pet": {"name": "lora", "rank": 8, "alpha": 16, "at": ["q", "v"]},
        "head": {"name": "lm", "eval": "generate", "max_new_tokens": given.new_tokens},
        "method": "finetune",
        "train": {"epochs": 1, "batch_size": given.batch_size, "lr": 1e-4, "schedule": "constant"},
    }
    method = build_method(make_recipe(content), backbone).to(device)
    table = TextTable([Row(f"text {i}", str(i), text) for i, text in enumerate(texts)], ["task"] * len(texts))

    def task() -> Task:
        """New each time, so that its tokens are not known yet."""
        train, test = (
            TextSet(table, range(len(texts)), (), method.model.view, purpose) for purpose in ("training", "test")
        )
        return Task(0, "task", (), train, test=test, runtime=Runtime(device=device))

    out = {
        **vars(given),
        "device": str(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "train": in_turns(
            {
                "ours": lambda: method.learn(task()),
                "plain": lambda: bare.train(lean=False),
                "lean": lambda: bare.train(lean=True),
            },
            given,
            device,
        ),
        "answer": in_turns(
            {
                "ours": lambda: evaluate(method, task(), among="seen", batch_size=given.batch_size),
                "bare": bare.answer,
            },
            given,
            device,
        ),
    }
    print(json.dumps(out, indent=2))


if __name__ == "__main__":
    main()
