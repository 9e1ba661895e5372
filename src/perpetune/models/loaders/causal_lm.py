"""The loader of causal language models by transformers: an id on the hub, a local folder, or a GGUF file."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from perpetune.data.texts.templates import render
from perpetune.data.texts.view import TextView, tokenized
from perpetune.errors import DataError, MissingExtra, PerpetuneError, UsageError, closest
from perpetune.models.backbone import Backbone
from perpetune.models.loaders.checkpoint import check_report, check_weights, config_of, quiet, unbuilt
from perpetune.models.loaders.hub import hub_file, one_line
from perpetune.models.loaders.options import in_4bit
from perpetune.models.loaders.unpacked import copy_of, keep_copy
from perpetune.pets.base import Active, Slot, slots
from perpetune.plain import read_object

Dtype = Literal["float32", "bfloat16", "float16"]
"""The type of the frozen weights."""
Length = Annotated[int, Field(ge=2)]
"""The most tokens of a text, question and answer together; None is as many as the model and its tokenizer take."""

GGUF = ".gguf"
ROTATION = "rope_freqs.weight"  # in a GGUF file the tensor by which the frequencies of rotary positions are divided

CAUSAL = "AutoModelForCausalLM"

# The length of texts if neither the model nor its tokenizer gives one.
SOME_LENGTH = 2048


@dataclass(frozen=True)
class Source:
    """The place from which a model is loaded.

    Attributes:
        place: a folder or an id on the hub.
        file: the GGUF file in it; None for transformers' layout.
        copy: a folder that holds what the file holds, unpacked; it is read in the file's place.
    """

    place: str
    file: str | None = None
    copy: str | None = None

    @property
    def read(self) -> str:
        """The folder or id that transformers is given."""
        return self.copy or self.place

    @property
    def where(self) -> dict[str, str]:
        """The keyword by which transformers is given the file that it is to unpack."""
        return {} if self.copy else self.origin

    @property
    def origin(self) -> dict[str, str]:
        """The keyword by which another program opens the same file."""
        return {} if self.file is None else {"gguf_file": self.file}

    def unpacked(self, dtype: str | None) -> Source:
        """The source with its unpacked copy, if there is one of this type (None: float32)."""
        if self.file is None:
            return self
        return replace(self, copy=copy_of(self.place, self.file, dtype or "float32"))


def is_gguf(rest: str) -> bool:
    """Whether the text after the colon in a recipe names a GGUF file."""
    return rest.lower().endswith(GGUF)


def gguf_source(spec: str, rest: str, *, hub: bool) -> Source:
    """The GGUF file at a local path or, with `hub`, as `OWNER/NAME/FILE` on the hub.

    Raises:
        UsageError: there is no such file.
        MissingExtra: the package that reads such files is not installed.
    """
    if find_spec("gguf") is None:
        raise MissingExtra(spec, "lm")
    path = Path(rest).expanduser()
    if path.is_file():
        return Source(str(path.parent), path.name)
    owner, _, rest_of_it = rest.partition("/")
    name, _, file = rest_of_it.partition("/")
    if hub and owner and name and file and not path.parent.is_dir():
        return Source(f"{owner}/{name}", file)
    beside = [p.name for p in path.parent.glob(f"*{GGUF}")] if path.parent.is_dir() else []
    near = f"in {path.parent}: {closest(path.name, beside)}" if beside else f"{path.parent} has no GGUF file"
    also = "; on the hub it is OWNER/NAME/FILE.gguf" if hub and not path.is_absolute() else ""
    raise UsageError(f"{spec}: there is no such file; {near}{also}")


def gguf_origin(file: str) -> str | None:
    """The id on the hub of the model that a local GGUF file was made from; None if the file does not say it.

    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: `general.source.huggingface.repository`, the URL of the
    source or of the repository, or the one base model.
    """
    from gguf import GGUFReader

    path = Path(file).expanduser()
    if not path.is_file():
        return None
    fields = GGUFReader(path).fields
    keys = ["general.source.huggingface.repository", "general.source.repo_url", "general.source.url"]
    keys += ["general.repo_url", "general.url"]
    many = fields.get("general.base_model.count")
    if many is not None and int(many.contents()) == 1:
        keys.append("general.base_model.0.repo_url")
    for key in keys:
        value = str(fields[key].contents()) if key in fields else ""
        found = re.fullmatch(r"(?:https?://huggingface\.co/)?([\w.-]+/[\w.-]+?)/?", value)
        if found and not found[1].lower().endswith("gguf"):
            return found[1]
    return None


def is_causal(config: Any) -> bool:
    """Whether the model of `config` is a causal language model.

    Transformers also offers a causal head for models such as BERT. Their tokens look both ways unless the config says
    that the model is a decoder, so only then they count.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or getattr(config, "is_encoder_decoder", False):
        return False
    return config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or bool(getattr(config, "is_decoder", False))


def load(
    spec: str,
    source: Source,
    config: Any = None,
    *,
    pretrained: bool = True,
    load_in_4bit: bool = False,
    dtype: Dtype = "float32",
    max_length: Length | None = None,
    chat: bool = False,
    gradient_checkpointing: bool = False,
) -> Backbone:
    """The language model at `source` with its tokenizer, without dropout; safetensors or GGUF only.

    Its features are the hidden states `(B, N, dim)` behind the last norm; its logits are those of `backbone.net`.

    Args:
        config: the result of `config_of`, if the caller has it already.
        pretrained: False gives random weights.
        load_in_4bit: hold the linear layers of the blocks in 4 bits (NF4), by bitsandbytes; a checkpoint that is
            quantised already is not changed.
        dtype: the type of the frozen weights.
        max_length: the most tokens of a text; None is as many as the model and its tokenizer take.
        chat: put plain prompts into the form of a chat too.
        gradient_checkpointing: while PETs are trained, keep only the input of each block and compute the rest again.

    Raises:
        UsageError: there is no such model or tokenizer, or an option does not fit the model.
        PerpetuneError: the tensors in the checkpoint are not those of the model; the message names them.
    """
    config = config or config_of(spec, source.read, **source.where)
    if not is_causal(config):
        raise UsageError(f"{spec}: a {config.model_type!r} model is not a causal language model")
    if source.file is not None and source.copy is None:
        _check_positions(spec, source.place, source.file, config)
    quantised = getattr(config, "quantization_config", None) is not None
    tokenizer = tokenizer_of(spec, source, chat=chat)
    net = net_of(spec, source, config, CAUSAL, pretrained, dtype, gradient_checkpointing)
    if source.file is not None and source.copy is None and pretrained:
        keep_copy(spec, source.place, source.file, dtype, net, tokenizer)
    rows = check_tokenizer(spec, tokenizer, net)
    backbone = Backbone(
        net,
        spec=spec,
        dim=config.get_text_config().hidden_size,
        preprocess=TextView(
            tokenizer, max_length=longest_text(spec, config, tokenizer, max_length), chat=chat, rows=rows
        ),
        forward=hidden_states,
    )
    backbone.opens = {"library": "transformers", "base": source.place, "options": {"dtype": dtype, **source.origin}}
    return in_4bit(backbone) if load_in_4bit and not quantised else backbone


def net_of(
    spec: str, source: Source, config: Any, auto: str, pretrained: bool, dtype: Dtype, gradient_checkpointing: bool
) -> nn.Module:
    """The net that a class of transformers, called `auto`, makes of `config`, without dropout.

    Raises:
        PerpetuneError: it cannot be built, or the tensors in the checkpoint are not those of the model.
        UsageError: it has no gradient checkpointing.
    """
    import transformers

    _without_dropout(config)
    kind: Any = getattr(transformers, auto)
    try:
        with _silent() if source.file else quiet():
            net: nn.Module = (
                _pretrained(spec, source, config, kind, dtype) if pretrained else _random(config, kind, dtype)
            )
    except PerpetuneError:
        raise
    except Exception as error:  # a config of strangers makes transformers fail in any way
        raise unbuilt(spec, error) from error
    if gradient_checkpointing:
        _checkpointing(spec, net)
    return net


def check_tokenizer(spec: str, tokenizer: Any, net: nn.Module) -> int:
    """Refuse a tokenizer that does not fit the net, and give it a token for padding. Returns the number of tokens that
    the net knows."""
    rows = _rows(net)
    _check_vocabulary(spec, tokenizer, rows)
    _padding(spec, tokenizer, rows)
    return rows


def hidden_states(net: nn.Module, tokens: Tensor | None, **options: Any) -> Tensor:
    """Hidden states `(B, N, D)` after the last norm, of tokens `(B, N)`, or of the embeddings in `options`."""
    outer: Any = net
    inner = outer.base_model if outer.base_model is not outer else outer.model  # `base_model` of Llama 4 is itself
    states: Tensor = inner(input_ids=tokens, use_cache=False, **options).last_hidden_state
    return states


def _check_positions(spec: str, place: str, file: str, config: Any) -> None:
    """Refuse a GGUF file whose rotary positions are scaled by a tensor, as in Llama 3.1 and later.

    Transformers ignores that tensor without a warning, so the loaded model would differ from the trained one.
    """
    from gguf import GGUFReader

    path = Path(place, file) if Path(place).is_dir() else hub_file(spec, place, file)
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if path is not None and kind == "default" and any(t.name == ROTATION for t in GGUFReader(path).tensors):
        raise UsageError(
            f"{spec}: a tensor ({ROTATION}) scales its rotary positions, and transformers does not read that tensor "
            "from a GGUF file; load the model's safetensors instead"
        )


def _without_dropout(config: Any) -> None:
    """Set every dropout probability in the config to 0. Only the PETs are tuned, and they have their own dropout."""
    parts = (config, config.get_text_config(), getattr(config, "vision_config", None))
    for part in {id(c): c for c in parts if hasattr(c, "__dict__")}.values():
        for name, value in vars(part).items():
            if "drop" in name and isinstance(value, float | int) and not isinstance(value, bool):
                setattr(part, name, 0.0)


def _attention(config: Any, auto: Any) -> str:
    """`sdpa` if the model supports it, because PETs inside attention work in that function; else `eager`."""
    model = auto._model_mapping[type(config)]
    return "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"


def _random(config: Any, auto: Any, dtype: Dtype) -> Any:
    return auto.from_config(config, dtype=getattr(torch, dtype), attn_implementation=_attention(config, auto))


def _pretrained(spec: str, source: Source, config: Any, auto: Any, dtype: Dtype) -> Any:
    from safetensors import SafetensorError

    if not source.where:
        check_weights(spec, source.read, config)
    how: dict[str, Any] = {**source.where, **_unpacked()} if source.where else {"use_safetensors": True}
    try:
        net, report = auto.from_pretrained(
            source.read,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation=_attention(config, auto),
            ignore_mismatched_sizes=True,  # so that the report names them
            output_loading_info=True,
            **how,
        )
    except SafetensorError as error:
        raise PerpetuneError(f"{spec}: its safetensors file cannot be read: {one_line(error)}") from error
    check_report(spec, report)
    if source.file is not None:
        _plain(net)
    return net


def _unpacked() -> dict[str, Any]:
    """The keyword that makes transformers unpack the tensors of a GGUF file, because no gradient passes through packed
    ones.

    Older versions of transformers always unpack and have no such keyword.
    """
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _plain(net: Any) -> None:
    """Remove transformers' mark of a quantised model. An unpacked GGUF file is not quantised, and with the mark other
    libraries would refuse it."""
    net.is_quantized = False
    for owner, name in ((net, "hf_quantizer"), (net.config, "quantization_config")):
        if name in vars(owner):
            delattr(owner, name)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """As `quiet`, and it redirects stderr, because the reader of GGUF files shows a progress bar that cannot be
    switched off."""
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        yield


def tokenizer_of(spec: str, source: Source, *, chat: bool) -> Any:
    """The model's tokenizer. It has to be a fast one, because only a fast one gives the characters of each token.

    Args:
        chat: whether it needs a chat template.
    """
    from transformers import AutoTokenizer

    try:
        with _silent() if source.file else quiet():
            tokenizer = AutoTokenizer.from_pretrained(source.read, **source.where)
    except Exception as error:  # a file of strangers makes transformers fail in any way
        raise UsageError(
            f"{spec}: its tokenizer cannot be loaded: {one_line(error) or type(error).__name__}"
        ) from error
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int | float):
        raise UsageError(f"{spec}: model_max_length in its tokenizer_config.json is {longest!r}; a number is expected")
    if not len(tokenizer):
        raise UsageError(f"{spec}: it has no tokenizer: tokenizer.json is expected beside config.json")
    if not tokenizer.is_fast:
        raise UsageError(f"{spec}: its tokenizer has no fast version (tokenizer.json), and only that gives offsets")
    if not tokenizer.chat_template:
        tokenizer.chat_template = _processors_template(source)
    if chat and not tokenizer.chat_template:
        raise UsageError(f"{spec}: its tokenizer has no chat template; leave chat out, or name a model made for chats")
    return tokenizer


def _processors_template(source: Source) -> str | None:
    """The chat template that older vision-language models have in a file of their processor; None without one."""
    file = Path(source.read) / "chat_template.json"
    if not file.is_file():
        return None
    found = read_object(file, str(file)).get("chat_template")
    return found if isinstance(found, str) else None


def _rows(net: Any) -> int:
    """The number of tokens that the net can read and say."""
    layers = (net.get_input_embeddings(), net.get_output_embeddings())
    return min(len(layer.weight) for layer in layers if layer is not None)


def _check_vocabulary(spec: str, tokenizer: Any, rows: int) -> None:
    """Refuse a tokenizer that makes tokens of ordinary texts for which the model has no row.

    A published tokenizer may have special tokens beyond the last row, such as that of pictures in Gemma 3. They are
    refused only if every text or every chat gets them; a text that spells one of them is refused when it is read.

    Args:
        rows: the number of rows of the model's embedding.

    Raises:
        UsageError: there are such tokens; the message names some.
    """
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= rows}
    special = {number for number, added in tokenizer.added_tokens_decoder.items() if added.special}
    used = {tokenizer.eos_token_id, *tokenized(tokenizer, "a")["input_ids"]}
    if tokenizer.chat_template:
        with contextlib.suppress(DataError):  # a template that refuses is named when it is given messages
            messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
            text = render(tokenizer, messages, asking=False)[:100_000]
            used |= set(tokenized(tokenizer, text, add_special_tokens=False)["input_ids"])
    lost = [token for number, token in sorted(beyond.items()) if number not in special or number in used]
    if lost:
        raise UsageError(
            f"{spec}: its tokenizer does not fit its model: the model's embedding has {rows} rows, and the tokenizer "
            f"has {len(tokenizer)} tokens, among them {', '.join(map(repr, lost[:3]))} beyond the last row. Take the "
            "tokenizer of this model, or save the model after `model.resize_token_embeddings(len(tokenizer))`"
        )
    if tokenizer.eos_token_id is None:
        warnings.warn(
            f"{spec}: its tokenizer has no end token (eos_token): a generated answer goes on for `max_new_tokens`",
            stacklevel=2,
        )


def _padding(spec: str, tokenizer: Any, rows: int) -> None:
    """Give the tokenizer a pad token if it has none, or one without a row in the model's embedding.

    Args:
        rows: the number of rows of the model's embedding.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id < rows:
        return
    for token in (tokenizer.eos_token, tokenizer.unk_token):
        if token is not None and tokenizer.convert_tokens_to_ids(token) < rows:
            tokenizer.pad_token = token  # which one does not matter: padding is masked
            return
    raise UsageError(f"{spec}: its tokenizer has no pad, eos or unk token among the {rows} that the model knows")


def longest_text(spec: str, config: Any, tokenizer: Any, asked: int | None) -> int:
    """The most tokens of a text: `asked`, or as many as the model and its tokenizer take."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if asked is None:
        # A tokenizer without a length gives a number of 30 digits.
        known = [n for n in (positions, tokenizer.model_max_length) if isinstance(n, int) and 1 < n < 10**9]
        return min(known, default=SOME_LENGTH)
    if isinstance(positions, int) and asked > positions:
        raise UsageError(f"{spec}: max_length is {asked}, and the model has {positions} positions")
    return asked


def _checkpointing(spec: str, net: nn.Module) -> None:
    """Make each block compute its inside again in the backward pass; `Backbone.train` switches this on and off.

    Transformers has a method for this, but its name has changed between versions. It also does not know PETs: the
    backward pass runs after `using` has ended, and the block needs the PETs again that were in force in the forward
    pass. So each block gets a checkpoint function here that puts them in force.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks: list[Any] = [module for module in net.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise UsageError(
            f"{spec}: {type(net).__name__} has no gradient checkpointing; leave gradient_checkpointing out"
        )
    for block in blocks:
        block._gradient_checkpointing_func = partial(
            checkpoint, use_reentrant=False, context_fn=partial(_same_pets, block)
        )
        block.gradient_checkpointing = True


def _same_pets(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts for a block's first and second computation. The second puts the PETs in force that are so now."""
    return nullcontext(), _in_force([(slot, slot.active) for _, slot in slots(block)])


@contextlib.contextmanager
def _in_force(active: list[tuple[Slot, Active]]) -> Iterator[None]:
    """Inside this context each slot has the PETs in force that `active` lists for it."""
    before = [(slot, slot.active) for slot, _ in active]
    try:
        for slot, name in active:
            slot.active = name
        yield
    finally:
        for slot, name in before:
            slot.active = name
