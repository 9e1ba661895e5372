"""Small things that tests are made of: a transformer in a folder, pictures in folders, a recipe over both."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load
from torch import Tensor

from perpetune.seeding import numpy_generator, own_global_state
from perpetune.state.committed import entries_of, find_tasks
from perpetune.state.journal import Chain

SIZE = 16
_MADE = tempfile.TemporaryDirectory(prefix="tiny")
_Maker = TypeVar("_Maker", bound=Callable[..., Path])


def _once(make: _Maker) -> _Maker:
    """A function that fills a folder, run once for the same arguments after the folder; later calls copy."""
    made: dict[str, Path] = {}

    @functools.wraps(make)
    def copied(folder: Path, *args: Any, **options: Any) -> Path:
        key = json.dumps([args, options], sort_keys=True)
        if key not in made:
            made[key] = make(Path(tempfile.mkdtemp(dir=_MADE.name)) / "made", *args, **options)
        return Path(shutil.copytree(made[key], folder, dirs_exist_ok=True))

    return copied  # type: ignore[return-value]


@_once
def vit_folder(path: Path, seed: int = 0, blocks: int = 1) -> Path:
    """A transformer of one block (or so many) and width 16 in transformers' layout, its weights drawn by `seed`."""
    from transformers import ViTConfig, ViTModel
    from transformers.utils import logging

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=SIZE,
        patch_size=8,
    )
    logging.disable_progress_bar()
    with own_global_state("tiny", seed):
        ViTModel(config, add_pooling_layer=False).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": SIZE, "width": SIZE}}))
    return path


def picture(label: str, number: int, domain: str = "") -> Image.Image:
    """A noisy picture whose pattern its label decides, and whose brightness its domain."""
    pattern = numpy_generator("pattern", label).integers(0, 200, (4, 4, 3)).repeat(4, 0).repeat(4, 1)
    shift = numpy_generator("domain", domain).integers(0, 40) if domain else 0
    noise = numpy_generator("noise", label, domain, number).integers(-15, 16, pattern.shape)
    return Image.fromarray((pattern + shift + noise).clip(0, 255).astype(np.uint8))


@functools.cache
def _png(label: str, number: int, domain: str) -> bytes:
    file = io.BytesIO()
    picture(label, number, domain).save(file, "png")
    return file.getvalue()


def picture_folder(
    path: Path, classes: Sequence[str], each: int | Sequence[int], domain: str = "", first: int = 0
) -> Path:
    """`path/CLASS/N.png`, `each` (of each class, if it is a list) pictures numbered from `first`."""
    counts = [each] * len(classes) if isinstance(each, int) else each
    for label, count in zip(classes, counts, strict=True):
        (path / label).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + count):
            (path / label / f"{number}.png").write_bytes(_png(label, number, domain))
    return path


def split_folder(path: Path, classes: Sequence[str], train: int | Sequence[int], test: int) -> Path:
    """`path/train/CLASS/N.png` and `path/test/CLASS/N.png`."""
    picture_folder(path / "train", classes, train)
    picture_folder(path / "test", classes, test, first=1000)
    return path


def every(values: Iterable[Any], step: int) -> list[Any]:
    """Parameters of a test: the first of each `step` values; the others differ little, and run when slow tests do."""
    return [v if i % step == 0 else pytest.param(*_row(v), marks=pytest.mark.slow) for i, v in enumerate(values)]


def chiefly(values: Iterable[Any], kept: Iterable[Any]) -> list[Any]:
    """Parameters of a test: those in `kept` always; the others tell little more, and run when slow tests do."""
    kept, values = list(kept), list(values)
    assert all(one in values for one in kept), "nothing is kept that is not there"
    return [v if v in kept else pytest.param(*_row(v), marks=pytest.mark.slow) for v in values]


def paired(one: Iterable[Any], other: Iterable[Any]) -> list[Any]:
    """Rows of two parameters, each with each; but only those in which every value of both is seen are not slow."""
    one, other = list(one), list(other)
    most = max(len(one), len(other))
    kept = {(i % len(one), i % len(other)) for i in range(most)}
    return [
        (a, b) if (i, j) in kept else pytest.param(a, b, marks=pytest.mark.slow)
        for i, a in enumerate(one)
        for j, b in enumerate(other)
    ]


def _row(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def recipe(vit: Path, data: Path | None = None, **changes: Any) -> dict[str, Any]:
    """Two classes a task in the order of their names, two epochs; `changes` replace whole sections."""
    content: dict[str, Any] = {
        "name": "tiny",
        "backbone": f"folder:{vit}",
        "pet": {"name": "lora", "rank": 2},
        "train": {"epochs": 2, "batch_size": 8, "lr": 0.01},
        "stream": {"classes_per_task": 2, "class_order": "sorted"},
        "run": {"device": "cpu"},
    }
    if data is not None:
        content["data"] = {"name": "folder", "path": str(data)}
    return {**content, **changes}


LINES = (
    "What is the capital of France? Paris is the capital of France.",
    "Is this review good or bad? Options: good, bad. Answer: good",
    "the quick brown fox jumps over the lazy dog 0123456789",
)

CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

# What differs between the kinds; each is small and drops nothing.
_LANGUAGE: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8},
    "gemma": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 12},
    "gemma3_text": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8},
    "phi3": {"intermediate_size": 48, "num_key_value_heads": 2},
    "lfm2": {"intermediate_size": 48, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {"intermediate_size": 64},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
}


@_once
def tiny_language_model(folder: Path, kind: str = "llama", chat: bool = True, seed: int = 0, **config: Any) -> Path:
    """A causal language model of width 32 with its tokenizer, in transformers' layout; the folder.

    Two blocks, four heads of which two have keys and values (where the kind allows), at most 128 tokens, a vocabulary
    of 300. The tokenizer is byte-level BPE: it takes any text, gives offsets, and has `<pad>`, `<bos>` and `<eos>`;
    it puts none of them in by itself.

    Args:
        folder: written into; made where it is not there.
        kind: a `model_type` of transformers: llama, qwen3, gemma, gemma3_text, phi3, lfm2, gpt2, gpt_neox or opt.
        chat: whether the tokenizer has a chat template.
        seed: draws the weights.
        config: further entries of the model's config, or other values.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    tokenizer = tiny_tokenizer(chat)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    own = {**({} if kind == "gpt2" else sizes), "vocab_size": 300, **ids, **_LANGUAGE[kind], **config}
    logging.disable_progress_bar()
    with own_global_state("tiny", kind, seed):
        net = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **own))
    net.save_pretrained(folder)
    return folder


VLMS = ("llava-clip", "llava-vit", "idefics3", "smolvlm", "qwen2_5_vl", "paligemma")
"""The kinds of `tiny_vision_language`."""

_VLM_CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}MARK{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@_once
def tiny_vision_language(folder: Path, kind: str, seed: int = 0) -> Path:
    """A vision-language model of width 32 with its tokenizer, in transformers' layout; the folder.

    Pictures have 16 pixels. They become 4 tokens (Idefics3 and SmolVLM: 4 and 3 marks around them). PaliGemma has no
    chat form; Qwen2.5-VL takes any size.

    Args:
        kind: one of `VLMS`.
    """
    import transformers as t
    from tokenizers import AddedToken
    from transformers.utils import logging

    tokenizer = tiny_tokenizer(chat=False)
    mark = "<|image_pad|>" if kind == "qwen2_5_vl" else "<image>"
    marks = [mark, "<fake_token_around_image>", "<global-img>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
    tokenizer.add_tokens([AddedToken(m, special=True, normalized=False) for m in marks], special_tokens=True)
    if kind != "paligemma":
        whole = f"<|vision_start|>{mark}<|vision_end|>" if kind == "qwen2_5_vl" else mark
        tokenizer.chat_template = _VLM_CHAT.replace("MARK", whole)
    tokenizer.save_pretrained(folder)
    token = {m: tokenizer.convert_tokens_to_ids(m) for m in marks}
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 160,
        "vocab_size": 320,
        **ids,
    }
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    square = {**vision, "image_size": SIZE, "patch_size": 8}
    given: dict[str, Any] = {"image_token_id": token[mark]}
    if kind.startswith("llava"):
        tower = t.CLIPVisionConfig(**square) if kind == "llava-clip" else t.ViTConfig(**square)
        config: Any = t.LlavaConfig(vision_config=tower, text_config=t.LlamaConfig(**text), **given)
    elif kind == "paligemma":
        own = {**square, "projection_dim": 32}
        config = t.PaliGemmaConfig(
            vision_config=t.SiglipVisionConfig(**square).to_dict() | own,
            text_config=t.GemmaConfig(**text, head_dim=8).to_dict(),
            projection_dim=32,
            hidden_size=32,
            **given,
        )
    elif kind == "qwen2_5_vl":
        own = {
            "depth": 2,
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        }
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        config = t.Qwen2_5_VLConfig(
            vision_config=own,
            text_config={**text, "rope_parameters": rope},
            vision_start_token_id=token["<|vision_start|>"],
            vision_end_token_id=token["<|vision_end|>"],
            video_token_id=token["<|video_pad|>"],
            **given,
        )
    else:
        name = "Idefics3" if kind == "idefics3" else "SmolVLM"
        config = getattr(t, f"{name}Config")(
            vision_config={**vision, "image_size": SIZE, "patch_size": 4},
            text_config={"model_type": "llama", **text},
            scale_factor=2,
            pad_token_id=0,
            **given,
        )
    logging.disable_progress_bar()
    with own_global_state("tiny", kind, seed):
        net = t.AutoModelForImageTextToText.from_config(config)
        for parameter in net.parameters():  # as initialised, small nets hardly look at their inputs
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    net.save_pretrained(folder)
    size = {"height": SIZE, "width": SIZE}
    view = {"size": size, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(view))
    return folder


def load_tiny_vlm(folder: Path, kind: str, **options: Any) -> Any:
    """The backbone in a folder of `tiny_vision_language`, for pictures of 16 pixels."""
    from perpetune.build import load_backbone

    if kind == "qwen2_5_vl":
        options = {"image_size": SIZE, **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*squeezed to a square")
        return load_backbone(f"hf:{folder}", **options)


def tiny_tokenizer(chat: bool = True) -> Any:
    """A fast tokenizer of transformers: byte-level BPE trained on three lines, 300 tokens at most."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(LINES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=128
    )
    if chat:
        tokenizer.chat_template = CHAT
    return tokenizer


DUAL = ("CLIP", "Siglip", "Siglip2", "ViT and BERT")
"""The kinds of dual encoders of transformers."""
_TOWER: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
_PICTURES = {**_TOWER, "patch_size": 8}


@_once
def dual_folder(path: Path, kind: str = "CLIP", seed: int = 0, blocks: int = 3, **text: Any) -> Path:
    """A dual encoder of transformers with random weights and its tokenizer; the folder.

    Three blocks (or so many) for pictures of 16 pixels, two for texts of at most 40 tokens (SigLIP: 24). The features
    have 8 numbers, SigLIP's 16.

    Args:
        kind: one of `DUAL`.
        blocks: how many the tower for pictures has.
        text: further entries of the text tower's config, or other values.
    """
    import transformers as t
    from transformers.utils import logging

    tokenizer = dual_tokenizer(kind)
    tokenizer.save_pretrained(path)
    ends = {"bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    length = 24 if kind.startswith("Siglip") else 40
    text = {**_TOWER, "num_hidden_layers": 2, "vocab_size": 300, "max_position_embeddings": length, **ends, **text}
    size = {"num_patches": 4} if kind == "Siglip2" else {"image_size": SIZE}
    size["num_hidden_layers"] = blocks
    logging.disable_progress_bar()
    with own_global_state("dual", kind, seed):
        if kind == "ViT and BERT":
            towers = t.ViTConfig(**_PICTURES, **size), t.BertConfig(**text)
            config = t.VisionTextDualEncoderConfig.from_vision_text_configs(*towers, projection_dim=8)
            net: Any = t.VisionTextDualEncoderModel(config)
        else:
            more = {"projection_dim": 8} if kind == "CLIP" else {}
            config = getattr(t, f"{kind}Config")(text_config=text, vision_config={**_PICTURES, **size}, **more)
            net = getattr(t, f"{kind}Model")(config)
        for name, parameter in net.named_parameters():  # as initialised, small nets hardly look at their inputs
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
            elif "logit" in name:
                parameter.data.fill_(-1.5 if "bias" in name else 2.0)
    net.save_pretrained(path)
    view = {"size": {"height": SIZE, "width": SIZE}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (path / "preprocessor_config.json").write_text(json.dumps(view))
    return path


def dual_tokenizer(kind: str = "CLIP") -> Any:
    """Byte-level BPE of at most 300 tokens that lowers its texts. It ends them as the family does; SigLIP's makes no
    mask."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<bos>", "<unk>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(LINES, trainer)
    form = "$A <eos>" if kind.startswith("Siglip") else "<bos> $A <eos>"
    bpe.post_processor = processors.TemplateProcessing(single=form, special_tokens=[("<bos>", 1), ("<eos>", 3)])
    names = ["input_ids"] if kind.startswith("Siglip") else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_input_names=names
    )


def package(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: str) -> None:
    """Another package of one module, importable until the test ends."""
    (folder / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, name, raising=False)


def task_files(folder: Path) -> dict[str, bytes]:
    """The files of a committed task, by name, as if its folder held all of them; nothing is checked by the journal."""
    return next(
        task
        for task in find_tasks(folder.parent.parent, entries_of(folder.parent.parent), Chain())
        if task.folder == folder
    ).read()


def task_tensors(state: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of each safetensors file of each task, by `FOLDER/FILE`."""
    return {
        f"{task.folder.name}/{name}": load(content)
        for task in find_tasks(state, entries_of(state), Chain())
        for name, content in sorted(task.read().items())
        if name.endswith(".safetensors")
    }


def seal(state: Path) -> None:
    """Make the journal name the manifests of a state as they are: whoever changed a folder changed the chain too."""
    path = state / "journal.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    for event in events:
        if event["event"] == "task committed":
            manifest = state / "tasks" / f"{event['task']:04d}-{event['name']}" / "manifest.json"
            if manifest.is_file():
                event["manifest"] = hashlib.sha256(manifest.read_bytes()).hexdigest()
    path.write_text("".join(f"{json.dumps(event)}\n" for event in events))


def written(output: str, *kinds: str) -> list[dict[str, Any]]:
    """The lines that a verb wrote with `--json`, or those of some kinds. All have the form of the schema, and the last
    one is `done`, or `failed` if that is asked for."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in output.splitlines()]
    for line in lines:
        fits_schema(line)
    assert lines[-1]["event"] == ("failed" if "failed" in kinds else "done")
    return [line for line in lines if line["event"] in kinds or not kinds]


def fits_schema(line: dict[str, Any], verb: str | None = None) -> None:
    """A `pydantic.ValidationError` if a line of `--json` does not have the form of its event.

    Args:
        verb: whose `done` it is; None takes that of any verb.
    """
    from pydantic import TypeAdapter

    from perpetune.cli.events import DONE, EVENTS

    facts = {key: value for key, value in line.items() if key != "event"}
    kinds = [EVENTS[line["event"]]] if line["event"] != "done" else DONE[verb] if verb else {*sum(DONE.values(), ())}
    TypeAdapter(Union[tuple(kinds)]).validate_python(facts, strict=True)  # noqa: UP007  made while it runs


def commented(text: str, sections: Sequence[str], number: str) -> Iterator[tuple[str, str]]:
    """The lines of a recipe's text whose value matches `number`, in some sections, each with its comment."""
    section = ""
    for line in text.splitlines():
        if re.match(r"\w+:", line):
            section = line.partition(":")[0]
        value, _, comment = line.strip().partition(": ")[2].partition("  # ")
        if section in sections and re.match(number, value):
            yield line, comment
