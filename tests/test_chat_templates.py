"""Chat templates of strangers: ordinary ones give what transformers gives, hostile ones end in one line."""

from __future__ import annotations

import datetime
import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tiny import CHAT, chiefly, tiny_language_model, tiny_tokenizer

from perpetune.cli import call
from perpetune.data.texts import templates
from perpetune.data.texts.tables import Text
from perpetune.data.texts.templates import render
from perpetune.data.texts.view import TextView
from perpetune.errors import DataError, UsageError

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'The weather <now> & "here".',
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}
CALLS = [{"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"town": "Köln"}}}]
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Hi"}],
    "system": [{"role": "system", "content": " Be kind. "}, {"role": "user", "content": "Hi\n 你好 🙂"}],
    "turns": [
        {"role": "user", "content": "  What?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n  That."},
        {"role": "user", "content": "Half a \ud83d and {{ braces }}"},
        {"role": "assistant", "content": "Yes.\n"},
    ],
    "tools": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": CALLS},
        {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "12.50"},
        {"role": "assistant", "content": "Twelve.", "reasoning_content": "It said so."},
    ],
}  # fmt: skip

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{#- This block extracts the system message, so we can slot it into the right place. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length != 0 %}
        {%- set first_user_message = messages[0]['content']|trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("Cannot put tools in the first user message when there's no first user message!") }}
    {%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\n' -}}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
    {{- first_user_message + "<|eot_id|>"}}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""  # noqa: E501
QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- "# Tools\n\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\n<tool_response>\n' + content + '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""  # noqa: E501
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
            {%- endfor %}
            {{- "][/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
        {%- endfor %}
        {{- "]" + eos_token }}
    {%- elif message["role"] == "assistant" %}
        {%- generation %}{{- " " + message["content"]|trim + eos_token }}{%- endgeneration %}
    {%- elif message["role"] == "tool_results" or message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial optional system message!") }}
    {%- endif %}
{%- endfor %}
"""  # noqa: E501
ORDINARY = {"plain": CHAT, "smollm2": SMOLLM2, "llama3": LLAMA3, "qwen3": QWEN3, "mistral": MISTRAL}


def tokenizer_of(template: Any) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["", "tools"])
@pytest.mark.parametrize("asking", [False, True])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("kind", ORDINARY)
def test_an_ordinary_template_gives_what_transformers_gives(kind: str, chat: str, asking: bool, tools: Any) -> None:
    tokenizer, messages = tokenizer_of(ORDINARY[kind]), CHATS[chat]

    expected = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=asking, tokenize=False)
    assert render(tokenizer, messages, tools=tools, asking=asking) == expected


def test_several_templates_of_one_tokenizer() -> None:
    tokenizer = tokenizer_of({"default": "d{{ messages[0].content }}", "tool_use": "t{{ tools|length }}"})
    assert render(tokenizer, CHATS["one"], asking=False) == "dHi"
    assert render(tokenizer, CHATS["one"], tools=[TOOL], asking=False) == "t1"
    with pytest.raises(DataError, match="refuses the messages: This model has multiple chat templates"):
        render(tokenizer_of({"rag": "r"}), CHATS["one"], asking=False)


# -- hostile ones -------------------------------------------------------------------------------------------

MEMORY, TIME = "takes more than 512 MiB of memory", "takes more than 1 seconds"
HOSTILE = {
    "a product": ("{{ 'x' * 10**10 }}", MEMORY),
    "a product of a list": ("{{ ([messages] * 10**10)|length }}", MEMORY),
    "a concatenation": (
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x|length }}",
        MEMORY,
    ),
    "a sum": (
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x|length }}",
        MEMORY,
    ),
    "a join": ("{{ ([0] * 100000)|join('y' * 100000)|length }}", MEMORY),
    "a replacement": ("{{ ('a' * 100000)|replace('a', 'b' * 100000)|length }}", MEMORY),
    "center": ("{{ 'x'|center(10**10)|length }}", MEMORY),
    "ljust": ("{{ 'x'.ljust(10**10)|length }}", MEMORY),
    "a width of %": ("{{ ('%1000000000d' % 1)|length }}", MEMORY),
    "a width of % from outside": ("{{ ('%*d' % (1000000000, 1))|length }}", MEMORY),
    "a width of format": ("{{ '{:1000000000}'.format(1)|length }}", MEMORY),
    "a width of the filter format": ("{{ '%1000000000d'|format(1) }}", MEMORY),
    "an indent": ("{{ [1, 2]|tojson(indent=1000000000) }}", MEMORY),
    "bytes": ("{{ (1).to_bytes(1000000000, 'big')|length }}", MEMORY),
    "lists in lists": (
        "{% set a = ['x' * 100] * 100 %}{% set b = [a] * 100 %}{% set c = [b] * 100 %}{% set d = [c] * 100 %}{{ d }}",
        MEMORY,
    ),
    "a power": ("{{ 9 ** (9 ** 9) % 7 }}", TIME),
    "loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", TIME),
    "macros": ("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}", TIME),
    "words": ("{{ lipsum(n=1000000000)|length }}", TIME),
    "rounding": ("{{ 1.5|round(100000000, 'ceil') }}", TIME),
}
SIMILAR = {  # one bound of memory, and one of time, stops them all
    "a product of a list",
    "a sum",
    "ljust",
    "center",
    "a width of % from outside",
    "a width of the filter format",
    "bytes",
    "a replacement",
    "words",
    "loops",
    "rounding",
}
FAILING = {
    "{{ 1 / 0 }}": "division by zero",
    "{{ raise_exception('no\nthank you') }}": "no thank you",
    "{% for i in range(10**9) %}a{% endfor %}": "Range too big",
    "{% if %}": "Expected an expression",
    "{% include 'x' %}": "no loader",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "recursion",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{% for i in [1] %}" * 30 + "{% endfor %}" * 30: "too many statically nested blocks",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ 'x' * 10**7 }}y": "",
}


@pytest.mark.skipif(not os.path.exists("/proc"), reason="memory is bounded on Linux alone")
@pytest.mark.parametrize("what", chiefly(HOSTILE, set(HOSTILE) - SIMILAR))
def test_a_template_that_goes_on_for_ever(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 1 if HOSTILE[what][1] == TIME else 10)
    tokenizer, began = tokenizer_of(HOSTILE[what][0]), time.monotonic()
    tokenizer.name_or_path = "/models/hostile"
    with pytest.raises(UsageError) as ended:
        render(tokenizer, CHATS["one"], asking=False)
    assert time.monotonic() - began < 20
    assert str(ended.value) == (
        f"the model's chat template (of /models/hostile) {HOSTILE[what][1]} for one chat: put another "
        "chat_template.jinja beside the tokenizer"
    )
    assert render(tokenizer_of(SMOLLM2), CHATS["one"], asking=False).endswith("Hi<|im_end|>\n")


@pytest.mark.parametrize("template", FAILING)
def test_a_template_that_fails(template: str) -> None:
    with pytest.raises(DataError) as refused:
        render(tokenizer_of(template), CHATS["one"], asking=False)
    (line,) = str(refused.value).splitlines()
    says = f"refuses the messages: .*{FAILING[template]}" if FAILING[template] else "makes 10000001 characters of"
    assert re.search(f"the model's chat template {says}", line)


def test_init_names_a_template_that_goes_on_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(templates, "SECONDS", 1)
    folder = tiny_language_model(tmp_path / "lm")
    (folder / "chat_template.jinja").write_text(HOSTILE["loops"][0])
    assert call(["init", str(tmp_path / "s"), "--model", f"folder:{folder}"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert f"the model's chat template (of {folder}) takes more than 1 seconds for one chat" in line
    assert not (tmp_path / "s").exists()


def test_a_template_that_goes_on_for_ever_with_some_chats_ends_an_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its rows are not bad rows: each would take as long."""
    monkeypatch.setattr(templates, "SECONDS", 1)
    folder = tiny_language_model(tmp_path / "lm")
    (folder / "chat_template.jinja").write_text(
        "{% if messages[0].content == 'bomb' %}" + HOSTILE["loops"][0] + "{% endif %}" + CHAT
    )
    answer = {"role": "assistant", "content": "a"}
    rows = [{"messages": [{"role": "user", "content": asked}, answer]} for asked in ("a", "b", "bomb", "d")]
    (tmp_path / "chats.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert call(["init", str(tmp_path / "s"), "--model", f"folder:{folder}", "--recipe", "update-lm"]) == 0
    capsys.readouterr()
    assert call(["update", str(tmp_path / "s"), "--data", str(tmp_path / "chats.jsonl"), "-q"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "takes more than 1 seconds for one chat" in line


# -- the process that they run in ---------------------------------------------------------------------------


def hi(asking: bool = False) -> str:
    return render(tokenizer_of("{{ messages[0].content }}"), CHATS["one"], asking=asking)


def test_a_process_that_was_killed_is_started_again() -> None:
    assert hi() == "Hi"
    process = templates._renderer._process
    assert process is not None
    process.kill()
    process.wait()
    assert hi() == "Hi"


def test_a_process_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    templates._renderer.end()
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(UsageError, match=r"a process of their own, and it does not start: .*No such file"):
        hi()


def test_a_forked_process_has_one_of_its_own() -> None:
    assert hi() == "Hi"
    process = templates._renderer._process
    child = os.fork()
    if child == 0:
        fine = hi() == "Hi" and templates._renderer._process is not process
        templates._renderer.end()
        os._exit(0 if fine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert hi() == "Hi"
    assert templates._renderer._process is process


def test_several_threads_get_their_own_answers() -> None:
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        tokenizer = tokenizer_of(f"{number} {{{{ messages[0].content }}}}")
        for _ in range(20):
            found[number] = render(tokenizer, CHATS["one"], asking=False)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: f"{number} Hi" for number in range(8)}


def test_an_answer_that_nobody_waits_for_is_not_the_next_ones() -> None:
    assert hi() == "Hi"
    # A job that a shell started in the background ignores this signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            render(tokenizer_of(HOSTILE["loops"][0]), CHATS["one"], asking=False)
    finally:
        signal.signal(signal.SIGINT, before)
    assert hi() == "Hi"


# -- the day ------------------------------------------------------------------------------------------------

WAYS = {
    "a constant": "{{ strftime_now('%d %b %Y') }}",
    "by name": "{{ strftime_now(format='%d %b %Y') }}",
    "a variable": "{% set f = '%d %b ' ~ '%Y' %}{{ strftime_now(f) }}",
    "in a macro": "{% macro day(f) %}{{ strftime_now(f) }}{% endmacro %}{{ day('%d %b %Y') }}",
    "under another name": "{% set now = strftime_now %}{{ now('%d %b %Y') }}",
    "as an argument": "{% macro call_(f) %}{{ f('%d %b %Y') }}{% endmacro %}{{ call_(strftime_now) }}",
    "in a loop": "{% for f in ['%d', ' %b ', '%Y'] %}{{ strftime_now(f) }}{% endfor %}",
    "in a block": "{% block day %}{{ strftime_now('%d %b %Y') }}{% endblock %}",
    "in a namespace": "{% set n = namespace(f=strftime_now) %}{{ n.f('%d %b %Y') }}",
    "in a call block": "{% macro m() %}{{ caller() }}{% endmacro %}{% call m() %}{{ strftime_now('%d %b %Y') }}"
    "{% endcall %}",
    "if it is defined": "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}26 Jul 2024"
    "{% endif %}",
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_asking_gives_the_stored_day(way: str) -> None:
    view = TextView(tokenizer_of(f"{WAYS[way]}.\n{CHAT}"), max_length=500)
    assert view.dated
    for day, told in ((datetime.date(2020, 1, 31), "31 Jan 2020"), (datetime.date(1999, 12, 1), "01 Dec 1999")):
        view.today = day
        assert view.tokenizer.decode(view.question(Text((("user", "hi"),))).ids).startswith(f"{told}.\n<|user|>")
    view.today = None
    now = datetime.date.today().strftime("%d %b %Y")
    assert view.tokenizer.decode(view.question(Text((("user", "hi"),))).ids).startswith(f"{now}.\n<|user|>")


def test_a_stored_day_has_no_time_of_day() -> None:
    tokenizer = tokenizer_of("{{ strftime_now('%H:%M:%S.%f') }}")
    assert render(tokenizer, CHATS["one"], asking=False, today=datetime.date(2020, 1, 31)) == "00:00:00.000000"


# -- patterns of a tokenizer --------------------------------------------------------------------------------


def test_a_pattern_that_backtracks(tmp_path: Path) -> None:
    """The library of patterns counts steps; that it gives up is an error of one row, and no panic."""
    from tokenizers import Regex, pre_tokenizers

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"(.*a){20}z"), "isolated")
    view = TextView(tokenizer, max_length=500)
    assert len(view.question(Text("bbb")).ids)
    with pytest.raises(
        DataError, match=r"the model's tokenizer fails \(a pattern in its tokenizer.json\?\): .*retry-limit"
    ):
        view.question(Text("a" * 40))
