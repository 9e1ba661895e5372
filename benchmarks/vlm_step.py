"""Training a vision-language model by `finetune` x `lora` beside bare loops, in one process, in turns.

    OMP_NUM_THREADS=1 python benchmarks/vlm_step.py --text hf:FOLDER_OR_FILE.gguf --dtype bfloat16

The model is a LLaVA of transformers with the given language model, a CLIP tower of the size of ViT-S at 56 pixels, and
a projector; the last two have random weights, which changes no time. The bare loops are what one would write by hand
with transformers and peft: the same LoRA at the same places of the language model, the same rows cut into tokens once,
batches drawn at random, AdamW; no checks, no progress, no checkpoints. Bare training is there three times: `plain`
gives the net pixels and labels, as most scripts do; `lean` asks the output layer for the tokens of answers alone;
`kept` does so too, and has computed what the frozen tower and projector give before the epochs begin. An epoch counts
whole, with reading and tokenising. Prints JSON. `ratio` is perpetune's rows per second over the bare loop's,
the median over the turns; `cpu_ratio` is of seconds of this process's CPU, which others on the machine disturb less.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from language_step import IGNORED, in_turns
from perpetune.build import build_method, load_backbone
from perpetune.data.pictured.table import PicturedTable
from perpetune.data.texts.tables import Row, Text
from perpetune.recipe import make_recipe
from perpetune.runtime import Runtime, pick_device
from perpetune.tasks import Task

MARK = "<image>"
SIDE, PATCH = 56, 14
NAMES = ("dolphin", "palm tree", "clock", "rabbit")


def llava(text: str, folder: Path) -> None:
    """Write the LLaVA with its tokenizer into a folder, in transformers' layout."""
    import transformers as t
    from tokenizers import AddedToken

    language: Any = load_backbone(text, dtype="float32")
    tokenizer = language.preprocess.tokenizer
    tokenizer.add_tokens([AddedToken(MARK, special=True, normalized=False)], special_tokens=True)
    tower = t.CLIPVisionConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, image_size=SIDE,
        patch_size=PATCH,
    )  # fmt: skip
    own = copy.deepcopy(language.net.config)
    config = t.LlavaConfig(
        vision_config=tower, text_config=own, image_token_id=tokenizer.convert_tokens_to_ids(MARK),
        tie_word_embeddings=own.tie_word_embeddings,
    )  # fmt: skip
    net: Any = t.LlavaForConditionalGeneration(config)
    net.model.language_model.load_state_dict(language.net.model.state_dict())
    if not own.tie_word_embeddings:
        net.lm_head.load_state_dict(language.net.lm_head.state_dict())
    net.resize_token_embeddings(max(len(tokenizer), own.vocab_size), mean_resizing=False)
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    about = {"image_processor_type": "CLIPImageProcessor", "size": {"height": SIDE, "width": SIDE}}
    about |= {"do_center_crop": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))


def made_up(count: int, folder: Path) -> list[Row]:
    """Random pictures, each with a question and an answer."""
    from PIL import Image

    rng = random.Random(0)
    rows = []
    for i in range(count):
        file = folder / f"{i}.png"
        Image.frombytes("RGB", (32, 32), rng.randbytes(32 * 32 * 3)).save(file)
        rows.append(
            Row(f"row {i}", str(i), Text(f"{MARK}\nWhat is it?", rng.choice(NAMES), pictures=1), "", (str(file),))
        )
    return rows


class Bare:
    """What one would write by hand."""

    def __init__(self, folder: Path, rows: list[Row], given: argparse.Namespace, device: torch.device):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForImageTextToText, AutoTokenizer, CLIPImageProcessor

        net = AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, given.dtype))
        config = LoraConfig(r=8, lora_alpha=16, target_modules=r".*language_model.*\.(q_proj|v_proj)")
        self.net = get_peft_model(net, config).to(device).eval()
        self.tokenizer, self.processor = (
            AutoTokenizer.from_pretrained(folder),
            CLIPImageProcessor.from_pretrained(folder),
        )
        self.rows, self.given, self.device = rows, given, device
        self.trained = [p for p in self.net.parameters() if p.requires_grad]
        for p in self.trained:
            p.data = p.data.float()

    def examples(self) -> list[tuple[list[int], int, Any]]:
        """Tokens, how many of them are learned, and the picture as the processor makes it."""
        from PIL import Image

        found = []
        count = (SIDE // PATCH) ** 2
        for row in self.rows:
            assert row.text is not None
            prompt = self.tokenizer(str(row.text.prompt).replace(MARK, MARK * count))["input_ids"]
            answer = [*self.tokenizer(f" {row.text.answer}", add_special_tokens=False)["input_ids"]]
            answer.append(self.tokenizer.eos_token_id)
            picture = Image.open(row.pictures[0]).convert("RGB")
            pixels = self.processor(picture, return_tensors="pt")["pixel_values"][0]
            found.append((prompt + answer, len(answer), pixels))
        return found

    def train(self, *, lean: bool, kept: bool = False) -> None:
        dtype = getattr(torch, self.given.dtype)
        optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0.0)
        rows, pad = self.examples(), self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        if kept:
            with torch.no_grad():
                size = self.given.batch_size
                parts = [
                    torch.stack([p for _, _, p in rows[s : s + size]]).to(dtype) for s in range(0, len(rows), size)
                ]
                found = [self.net.base_model.model.get_image_features(part).pooler_output for part in parts]
            states = [state for part in found for state in part]
            rows = [(ids, said, state) for (ids, said, _), state in zip(rows, states, strict=True)]
        for epoch in range(self.given.epochs):
            random.Random(epoch).shuffle(rows)
            for start in range(0, len(rows), self.given.batch_size):
                part = rows[start : start + self.given.batch_size]
                width = max(len(ids) for ids, _, _ in part)
                ids = torch.tensor([[pad] * (width - len(i)) + i for i, _, _ in part])
                mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i, _, _ in part])
                labels = torch.full_like(ids, IGNORED)
                for row, (_, said, _) in enumerate(part):
                    labels[row, -said:] = ids[row, -said:]
                said = max(said for _, said, _ in part)
                seen = torch.stack([p for _, _, p in part]).to(dtype)
                asked: dict[str, Any] = {"input_ids": ids, "pixel_values": seen}
                if kept:
                    embedded = self.net.get_input_embeddings()(ids)
                    there = (ids == self.tokenizer.convert_tokens_to_ids(MARK)).unsqueeze(-1).expand_as(embedded)
                    asked = {"inputs_embeds": embedded.masked_scatter(there, seen)}
                if lean:
                    inner = self.net.base_model.model
                    states = inner.model(**asked, attention_mask=mask, use_cache=False).last_hidden_state
                    logits = inner.lm_head(states[:, -said - 1 : -1].flatten(0, 1))  # in one piece, or it is slow
                    loss = F.cross_entropy(logits.float(), labels[:, -said:].flatten(), ignore_index=IGNORED)
                else:
                    loss = self.net(**asked, attention_mask=mask, labels=labels, use_cache=False).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--text", required=True, help="hf:FOLDER or hf:FILE.gguf")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--texts", type=int, default=64, help="rows")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    device = pick_device(given.device)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        folder.mkdir()
        llava(given.text, folder)
        rows = made_up(given.texts, Path(place))
        content = {
            "backbone": {"name": f"hf:{folder}", "dtype": given.dtype, "max_length": 128},
            "pet": {"name": "lora", "rank": 8, "alpha": 16, "at": ["q", "v"]},
            "head": {"name": "vlm", "max_new_tokens": 4},
            "method": "finetune",
            "train": {"epochs": given.epochs, "batch_size": given.batch_size, "lr": 1e-4, "schedule": "constant"},
        }
        backbone = load_backbone(f"hf:{folder}", dtype=given.dtype, max_length=128)
        method = build_method(make_recipe(content), backbone).to(device)
        bare = Bare(folder, rows, given, device)
        table = PicturedTable(rows, ["task"] * len(rows))

        def ours() -> None:
            """On rows that are not tokens yet, and without what the tower has computed before."""
            assert backbone.pictures is not None
            backbone.pictures._kept.clear()
            backbone.pictures._bytes = 0
            view: Any = method.model.view
            examples = view.examples(table, range(len(rows)), (), "training")
            method.learn(Task(0, "task", (), examples, runtime=Runtime(device=device)))

        calls = {
            "ours": ours,
            "plain": lambda: bare.train(lean=False),
            "lean": lambda: bare.train(lean=True),
            "kept": lambda: bare.train(lean=True, kept=True),
        }
        train = in_turns(calls, given, device)
    out = {**vars(given), "device": str(device), "torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps({**out, "train": train}, indent=2))


if __name__ == "__main__":
    main()
