"""Chat templates like the well-known ones, and by hand what each prints and what of it must train.

A family's `pieces` writes a conversation out in plain Python, without Jinja and without rendering
prefixes: (number of the message that emits the text, or None for context, text). Together with
`chat_tokenizers.build` it makes the model folders of test_masks.py.
"""

import dataclasses
import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

Piece = tuple[int | None, str]
Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None

DATE = "2025-02-03"  # what the templates that print the date are given


class Refused(ValueError):
    """The template refuses the conversation, or leaves a part of it out without a word."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A chat template and what goes with it.

    Attributes:
        source: the Jinja template.
        pieces: (messages, tools, whether an empty think block trains) -> what is printed.
        control: its control tokens, all of which are special tokens.
        eos: the end-of-sequence token, also one of the special tokens.
        bos: the token that it prints first; "" = none.
        has: of "system", "free" (roles in any order), "results" (of tools), "tools" (tools, and one
            call at a time), "calls" (several at a time), "mixed" (words and calls in one message),
            "think" (reasoning is taken apart).
        text_arguments: it wants the arguments of calls as JSON text.
    """

    source: str
    pieces: Callable[[Messages, Tools, bool], list[Piece]]
    control: tuple[str, ...]
    eos: str
    bos: str = ""
    has: frozenset[str] = frozenset()
    text_arguments: bool = False


def dumps(value: Any, indent: int | None = None) -> str:
    """What the `tojson` filter of transformers prints."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def calls_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    return [call["function"] for call in message.get("tool_calls") or ()]


def check_alternating(messages: Messages) -> None:
    for number, message in enumerate(messages):
        if message["role"] != ("user", "assistant")[number % 2]:
            raise Refused("roles must alternate")


def refuse_tools(messages: Messages, tools: Tools) -> None:
    """Of a template that prints neither tools nor calls."""
    if tools or any(message.get("tool_calls") for message in messages):
        raise Refused("tools are left out")


# ---- ChatML: SmolLM2, Phi-4, and with generation tags ------------------------------------------

CHATML_DEFAULT = "You are a small test assistant."
CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + CHATML_DEFAULT + "<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chatml(messages: Messages, tools: Tools, empty: bool) -> list[Piece]:
    refuse_tools(messages, tools)
    pieces: list[Piece] = []
    if messages[0]["role"] != "system":
        pieces.append((None, f"<|im_start|>system\n{CHATML_DEFAULT}<|im_end|>\n"))
    for number, message in enumerate(messages):
        speaks = number if message["role"] == "assistant" else None
        pieces.append((None, f"<|im_start|>{message['role']}\n"))
        pieces.append((speaks, message["content"] + "<|im_end|>"))
        pieces.append((None, "\n"))
    return pieces


# What is said follows two spaces in the line of the role.
COLONS = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + ':  ' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant:  ' }}{% endif %}"
)


def colons(messages: Messages, tools: Tools, empty: bool) -> list[Piece]:
    refuse_tools(messages, tools)
    pieces: list[Piece] = []
    for number, message in enumerate(messages):
        speaks = number if message["role"] == "assistant" else None
        pieces.append((None, f"<|im_start|>{message['role']}:  "))
        pieces.append((speaks, message["content"] + "<|im_end|>"))
        pieces.append((None, "\n"))
    return pieces


TAGGED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}INSIDE{% endgeneration %}OUTSIDE"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TAG_WITH_END = TAGGED.replace("INSIDE", "{{ '<|im_end|>' }}").replace("OUTSIDE", "")
TAG_WITHOUT_END = TAGGED.replace("INSIDE", "").replace("OUTSIDE", "{{ '<|im_end|>' }}")


def tagged(messages: Messages, tools: Tools, empty: bool) -> list[Piece]:
    pieces = chatml(messages, tools, empty)
    return pieces if messages[0]["role"] == "system" else pieces[1:]


PHI4 = (
    "{% for message in messages %}{% if message['role'] in ('system', 'user', 'assistant') %}"
    "{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)


def phi4(messages: Messages, tools: Tools, empty: bool) -> list[Piece]:
    refuse_tools(messages, tools)
    pieces: list[Piece] = []
    for number, message in enumerate(messages):
        if message["role"] == "tool":
            raise Refused("the result of a tool is left out")
        speaks = number if message["role"] == "assistant" else None
        pieces.append((None, f"<|im_start|>{message['role']}<|im_sep|>"))
        pieces.append((speaks, message["content"] + "<|im_end|>"))
    return pieces


# ---- Phi-3 and Zephyr: plain names of roles ----------------------------------------------------

# It ends what is not a prompt with the end of the text: behind the turn's own end.
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
    "{{ '<|system|>\n' + message['content'] + '<|end|>\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '<|end|>\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\n' + message['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def phi3(messages: Messages, tools: Tools, empty: bool) -> list[Piece]:
    refuse_tools(messages, tools)
    pieces: list[Piece] = []
    for number, message in enumerate(messages):
        if message["role"] == "tool":
            raise Refused("the result of a tool is left out")
        if message["role"] == "system" and not message["content"]:
            continue
        speaks = number if message["role"] == "assistant" else None
        pieces.append((None, f"<|{message['role']}|>\n"))
        pieces.append((speaks, message["content"] + "<|end|>"))
        pieces.append((None, "\n"))
    return [*pieces, (None, "<|endoftext|>")]


# Lines end after each expression; the generation prompt's newline comes about like that too.
ZEPHYR = (
    "{% for message in messages %}\n"
    "{% if message['role'] in ('system', 'user', 'assistant') %}\n"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}\n"
    "{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n"
    "{{ '<|assistant|>' }}\n"
    "{% endif %}\n"
    "{% endfor %}"
)


def zephyr(messages: Messages, tools: Tools, empty: bool) -> list[Piece]:
    pieces = phi4(messages, tools, empty)
    heads = [(None, f"<|{message['role']}|>\n") for message in messages]
    ends = [(speaks, text.removesuffix("<|im_end|>") + "</s>") for speaks, text in pieces[1::2]]
    newline: Piece = (None, "\n")
    return [piece for three in zip(heads, ends, strict=True) for piece in (*three, newline)]


# ---- Llama 3 and 3.1 ---------------------------------------------------------------------------

LLAMA3 = (
    "{% for message in messages %}"
    "{% set text = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.first %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def llama3_header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def llama3(messages: Messages, tools: Tools, empty: bool) -> list[Piece]:
    refuse_tools(messages, tools)
    pieces: list[Piece] = [(None, "<|begin_of_text|>")]
    for number, message in enumerate(messages):
        speaks = number if message["role"] == "assistant" else None
        pieces.append((None, llama3_header(message["role"])))
        pieces.append((speaks, message["content"].strip() + "<|eot_id|>"))
    return pieces


LLAMA31 = """{{- bos_token }}
{%- if not date_string is defined %}
  {%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}
  {%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
  {%- set system = messages[0]['content'] | trim %}{%- set rest = messages[1:] %}
{%- else %}{%- set system = '' %}{%- set rest = messages %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{%- if tools is not none %}{{- 'Environment: ipython\n' }}{%- endif %}
{{- 'Knowledge: 2023\nToday Date: ' + date_string + '\n\n' + system + '<|eot_id|>' }}
{%- if tools is not none %}
  {%- if rest | length == 0 %}{{- raise_exception('tools need a user message') }}{%- endif %}
  {%- set first = rest[0]['content'] | trim %}{%- set rest = rest[1:] %}
  {{- '<|start_header_id|>user<|end_header_id|>\n\nCall one of these:\n\n' }}
  {%- for tool in tools %}{{- tool | tojson(indent=4) + '\n\n' }}{%- endfor %}
  {{- first + '<|eot_id|>' }}
{%- endif %}
{%- for message in rest %}
  {%- if message.role == 'tool' or message.role == 'ipython' %}
    {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}
    {%- if message.content is mapping or message.content is iterable %}
      {{- message.content | tojson }}{%- else %}{{- message.content }}{%- endif %}
    {{- '<|eot_id|>' }}
  {%- elif 'tool_calls' in message %}
    {%- if message.tool_calls | length != 1 %}
      {{- raise_exception('one call at a time') }}{%- endif %}
    {%- set call = message.tool_calls[0].function %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", ' }}
    {{- '"parameters": ' }}{{- call.arguments | tojson }}{{- '}<|eot_id|>' }}
  {%- else %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
"""


def llama31(messages: Messages, tools: Tools, empty: bool) -> list[Piece]:
    system, rest = "", list(enumerate(messages))
    if messages[0]["role"] == "system":
        system, rest = messages[0]["content"].strip(), rest[1:]
    environment = "" if tools is None else "Environment: ipython\n"
    text = f"{environment}Knowledge: 2023\nToday Date: 03 Feb 2025\n\n{system}<|eot_id|>"
    pieces: list[Piece] = [(None, "<|begin_of_text|>" + llama3_header("system") + text)]
    if tools is not None:
        shown = "".join(dumps(tool, indent=4) + "\n\n" for tool in tools)
        first = rest[0][1]["content"].strip() + "<|eot_id|>"
        pieces.append((None, f"{llama3_header('user')}Call one of these:\n\n{shown}{first}"))
        rest = rest[1:]
    for number, message in rest:
        speaks = number if message["role"] == "assistant" else None
        role, content = message["role"], message["content"].strip()
        if role == "tool":  # a string is iterable to Jinja: it is printed as JSON
            role, content = "ipython", dumps(message["content"])
        elif "tool_calls" in message:
            if content or len(message["tool_calls"]) != 1:
                raise Refused("one call and nothing else")
            (call,) = calls_of(message)
            content = f'{{"name": "{call["name"]}", "parameters": {dumps(call["arguments"])}}}'
        pieces += [(None, llama3_header(role)), (speaks, content + "<|eot_id|>")]
    return pieces


# ---- Gemma 2 and 3 -----------------------------------------------------------------------------

GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('no system role') }}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def gemma2(messages: Messages, tools: Tools, empty: bool) -> list[Piece]:
    refuse_tools(messages, tools)
    check_alternating(messages)
    pieces: list[Piece] = [(None, "<bos>")]
    for number, message in enumerate(messages):
        speaks = number if message["role"] == "assistant" else None
        pieces.append((None, "<start_of_turn>" + ("user", "model")[number % 2] + "\n"))
        pieces.append((speaks, message["content"].strip() + "<end_of_turn>"))
        pieces.append((None, "\n"))
    return pieces


GEMMA3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
  {%- set opening = messages[0]['content'] + '\n\n' -%}{%- set rest = messages[1:] -%}
{%- else -%}{%- set opening = '' -%}{%- set rest = messages -%}{%- endif -%}
{%- for message in rest -%}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{ raise_exception('roles must alternate') }}{%- endif -%}
  {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
  {{ '<start_of_turn>' + role + '\n' + (opening if loop.first else '') }}
  {{- message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""


def gemma3(messages: Messages, tools: Tools, empty: bool) -> list[Piece]:
    if messages[0]["role"] != "system":
        return gemma2(messages, tools, empty)
    opening = messages[0]["content"] + "\n\n"
    pieces = [(s if s is None else s + 1, t) for s, t in gemma2(messages[1:], tools, empty)]
    return [*pieces[:2], (None, opening), *pieces[2:]]


# ---- Mistral -----------------------------------------------------------------------------------

MISTRAL1 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('users and assistants only') }}{% endif %}{% endfor %}"
)


def mistral1(messages: Messages, tools: Tools, empty: bool) -> list[Piece]:
    refuse_tools(messages, tools)
    check_alternating(messages)
    pieces: list[Piece] = [(None, "<s>")]
    for number, message in enumerate(messages):
        if number % 2:
            pieces.append((number, " " + message["content"] + "</s>"))
        else:
            pieces.append((None, f"[INST] {message['content']} [/INST]"))
    return pieces


# The system text stands in the last user message and the tools before it: when the conversation
# goes on, both move. LAST: whether the message is that one.
MISTRAL3 = """{%- if messages[0].role == 'system' %}
  {%- set system = messages[0].content %}{%- set rest = messages[1:] %}
{%- else %}{%- set rest = messages %}{%- endif %}
{%- set ns = namespace(turn=0, last=0) %}
{%- for message in rest %}
  {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
  {%- if message.role != 'tool' and not message.tool_calls %}
    {%- if (message.role == 'user') != (ns.turn % 2 == 0) %}
      {{- raise_exception('roles must alternate') }}{%- endif %}
    {%- set ns.turn = ns.turn + 1 %}
  {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in rest %}
  {%- if message.role == 'user' %}
    {%- if tools is not none and loop.index0 == ns.last %}
      {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}
    {{- '[INST] ' }}
    {%- if system is defined and LAST %}{{- system + '\n\n' }}{%- endif %}
    {{- message.content + '[/INST]' }}
  {%- elif message.tool_calls %}
    {{- '[TOOL_CALLS] [' }}
    {%- for call in message.tool_calls %}
      {%- if call.id is not defined or call.id | length != 9 %}
        {{- raise_exception('the id of a call has 9 characters') }}{%- endif %}
      {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}
      {%- if not loop.last %}{{- ', ' }}{%- endif %}
    {%- endfor %}
    {{- ']' + eos_token }}
  {%- elif message.role == 'assistant' %}{{- ' ' + message.content | trim + eos_token }}
  {%- elif message.role == 'tool' %}
    {{- '[TOOL_RESULTS] {"content": ' + message.content | tojson + '}[/TOOL_RESULTS]' }}
  {%- else %}{{- raise_exception('no such role') }}
  {%- endif %}
{%- endfor %}
"""
MISTRAL7 = MISTRAL3.replace("LAST", "loop.index0 == ns.last")
# As Mistral 7B v0.3 has it: an answer behind the user's message takes the system text away.
MISTRAL3 = MISTRAL3.replace("LAST", "loop.last")


def mistral7(messages: Messages, tools: Tools, empty: bool) -> list[Piece]:
    rest, system = list(enumerate(messages)), ""
    if messages[0]["role"] == "system":
        rest, system = rest[1:], messages[0]["content"] + "\n\n"
    check_alternating(
        [m for _, m in rest if m["role"] != "tool" and not m.get("tool_calls")],
    )
    last = max((n for n, message in rest if message["role"] == "user"), default=None)
    if last is None:
        raise Refused("system and tools have no place")
    pieces: list[Piece] = [(None, "<s>")]
    for number, message in rest:
        content, role = message["content"], message["role"]
        if role == "user":
            if number == last and tools is not None:
                pieces.append((None, f"[AVAILABLE_TOOLS] {dumps(tools)}[/AVAILABLE_TOOLS]"))
            opening = system if number == last else ""
            pieces.append((None, f"[INST] {opening}{content}[/INST]"))
        elif role == "tool":
            pieces.append((None, f'[TOOL_RESULTS] {{"content": {dumps(content)}}}[/TOOL_RESULTS]'))
        elif message.get("tool_calls"):
            if content.strip() or any(
                len(call.get("id", "")) != 9 for call in message["tool_calls"]
            ):
                raise Refused("calls with ids and nothing else")
            calls = (dumps(c["function"] | {"id": c["id"]}) for c in message["tool_calls"])
            pieces.append((number, f"[TOOL_CALLS] [{', '.join(calls)}]</s>"))
        else:
            pieces.append((number, f" {content.strip()}</s>"))
    return pieces


# ---- DeepSeek ----------------------------------------------------------------------------------

# The arguments of calls are joined as text: an object in their place is an error. OPENING is the
# end of the generation prompt, HISTORY what it does to every answer.
DEEPSEEK = """{%- set ns = namespace(tool=false, system='') %}
{%- for message in messages %}{%- if message['role'] == 'system' %}
  {%- set ns.system = ns.system + message['content'] %}{%- endif %}{%- endfor %}
{{- bos_token + ns.system }}
{%- for message in messages %}
  {%- if message['role'] == 'user' %}
    {%- set ns.tool = false %}{{- '<｜User｜>' + message['content'] }}
  {%- elif message['role'] == 'assistant' and message['tool_calls'] %}
    {{- '<｜tool▁outputs▁end｜>' if ns.tool else '<｜Assistant｜>' }}
    {{- '<｜tool▁calls▁begin｜>' }}
    {%- for call in message['tool_calls'] %}
      {{- '<｜tool▁call▁begin｜>' + call['type'] + '<｜tool▁sep｜>' + call['function']['name'] }}
      {{- '\n```json\n' + call['function']['arguments'] + '\n```<｜tool▁call▁end｜>' }}
    {%- endfor %}
    {{- '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}{%- set ns.tool = false %}
  {%- elif message['role'] == 'assistant' %}
    {%- set content = message['content'] %}HISTORY
    {{- '<｜tool▁outputs▁end｜>' if ns.tool else '<｜Assistant｜>' }}
    {{- content + '<｜end▁of▁sentence｜>' }}{%- set ns.tool = false %}
  {%- elif message['role'] == 'tool' %}
    {{- '' if ns.tool else '<｜tool▁outputs▁begin｜>' }}{%- set ns.tool = true %}
    {{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' }}
  {%- endif %}
{%- endfor %}
{%- if ns.tool %}{{- '<｜tool▁outputs▁end｜>' }}
{%- elif add_generation_prompt %}{{- '<｜Assistant｜>OPENING' }}{%- endif %}
"""
DEEPSEEK3 = DEEPSEEK.replace("HISTORY", "").replace("OPENING", "")
R1 = DEEPSEEK.replace("OPENING", "<think>\\n").replace(
    "HISTORY",
    "{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1] %}{%- endif %}",
)


def deepseek3(messages: Messages, tools: Tools, empty: bool) -> list[Piece]:
    if tools:
        raise Refused("tools are left out")
    system = "".join(m["content"] for m in messages if m["role"] == "system")
    pieces: list[Piece] = [(None, "<｜begin▁of▁sentence｜>" + system)]
    results = False
    for number, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role == "user":
            pieces.append((None, f"<｜User｜>{content}"))
            results = False
        elif role == "tool":
            opening = "" if results else "<｜tool▁outputs▁begin｜>"
            text = f"{opening}<｜tool▁output▁begin｜>{content}<｜tool▁output▁end｜>"
            pieces.append((None, text))
            results = True
        elif role == "assistant":
            pieces.append((None, "<｜tool▁outputs▁end｜>" if results else "<｜Assistant｜>"))
            if calls := calls_of(message):
                if content.strip():
                    raise Refused("words beside calls are left out")
                shown = (
                    f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{call['name']}\n"
                    f"```json\n{dumps(call['arguments'])}\n```<｜tool▁call▁end｜>"
                    for call in calls
                )
                content = f"<｜tool▁calls▁begin｜>{''.join(shown)}<｜tool▁calls▁end｜>"
            pieces.append((number, content + "<｜end▁of▁sentence｜>"))
            results = False
    return [*pieces, (None, "<｜tool▁outputs▁end｜>")] if results else pieces


def r1(messages: Messages, tools: Tools, empty: bool) -> list[Piece]:
    """What the template prints: the reasoning of every answer is gone."""
    shown = [
        message | {"content": message["content"].split("</think>")[-1]}
        if message["role"] == "assistant"
        else message
        for message in messages
    ]
    return deepseek3(shown, tools, empty)


# ---- Qwen3 -------------------------------------------------------------------------------------

# Earlier reasoning goes when the user speaks again; the last answer has a think block, empty or
# not. OPENING is the end of the generation prompt.
QWEN3 = """{%- if tools or messages[0].role == 'system' %}{{- '<|im_start|>system\n' }}
  {%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- endif %}
  {%- if tools %}
    {%- if messages[0].role == 'system' %}{{- '\n\n' }}{%- endif %}
    {{- 'Tools:<tools>' }}
    {%- for tool in tools %}{{- '\n' + tool | tojson }}{%- endfor %}{{- '\n</tools>' }}
  {%- endif %}
  {{- '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last=messages | length - 1, seek=true) %}
{%- for message in messages[::-1] %}
  {%- if ns.seek and message.role == 'user' and not (message.content.startswith('<tool_response>')
      and message.content.endswith('</tool_response>')) %}
    {%- set ns.seek = false %}{%- set ns.last = messages | length - 1 - loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
  {%- set content = message.content %}
  {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
    {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
  {%- elif message.role == 'assistant' %}
    {%- set thought = '' %}
    {%- if message.reasoning_content is string %}{%- set thought = message.reasoning_content %}
    {%- elif '</think>' in content %}
      {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1] %}
      {%- set thought = thought.lstrip('\n') %}
      {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\n' }}
    {%- if loop.index0 > ns.last and (loop.last or thought) %}
      {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
    {%- else %}{{- content }}{%- endif %}
    {%- for call in message.tool_calls or [] %}
      {%- if content or not loop.first %}{{- '\n' }}{%- endif %}
      {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
      {{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
  {%- elif message.role == 'tool' %}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
      {{- '<|im_start|>user' }}{%- endif %}
    {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
      {{- '<|im_end|>\n' }}{%- endif %}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\nOPENING' }}
  {%- if enable_thinking is defined and enable_thinking is false %}
    {{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
"""
QWEN3_THINKING = QWEN3.replace("OPENING", "<think>\\n")
QWEN3 = QWEN3.replace("OPENING", "")
EMPTY_THINK = "<think>\n\n</think>\n\n"


def qwen_calls(message: dict[str, Any], words: str) -> str:
    """The calls of a message as Qwen's templates print them, behind its words."""
    calls = (
        f'<tool_call>\n{{"name": "{call["name"]}", "arguments": {dumps(call["arguments"])}}}'
        "\n</tool_call>"
        for call in calls_of(message)
    )
    return "\n".join([words, *calls] if words else calls)


def split_thought(message: dict[str, Any]) -> tuple[str, str]:
    """(reasoning, answer) of a message, as Qwen3 takes them apart."""
    content = message["content"]
    if isinstance(thought := message.get("reasoning_content"), str):
        return thought, content
    if "</think>" not in content:
        return "", content
    thought = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
    return thought, content.split("</think>")[-1].lstrip("\n")


def loses_words(message: dict[str, Any]) -> bool:
    """Whether words stand before the reasoning or between two: Qwen3 prints none of them."""
    content = message["content"]
    if "</think>" not in content or "reasoning_content" in message:
        return False
    before, *between = content.split("</think>")
    return len(between) > 1 or bool(before.rpartition("<think>")[0].strip())


def squeeze(text: str) -> str:
    return "".join(text.split())


def is_question(message: dict[str, Any]) -> bool:
    content = message["content"]
    is_result = content.startswith("<tool_response>") and content.endswith("</tool_response>")
    return message["role"] == "user" and not is_result


def qwen_turns(messages: Messages, emit: Callable[[int, dict], list[Piece]]) -> list[Piece]:
    """The turns of a ChatML with tools: results stand in turns of the user."""
    pieces: list[Piece] = []
    roles = [message["role"] for message in messages]
    for number, (role, message) in enumerate(zip(roles, messages, strict=True)):
        if role == "assistant":
            pieces += [(None, "<|im_start|>assistant\n"), *emit(number, message), (None, "\n")]
        elif role == "tool":
            opening = "" if number and roles[number - 1] == "tool" else "<|im_start|>user"
            closing = "" if roles[number + 1 : number + 2] == ["tool"] else "<|im_end|>\n"
            text = f"\n<tool_response>\n{message['content']}\n</tool_response>"
            pieces.append((None, opening + text + closing))
        elif role == "user" or number:
            pieces.append((None, f"<|im_start|>{role}\n{message['content']}<|im_end|>\n"))
    return pieces


def qwen3_turns(messages: Messages, empty: bool, prompted: str) -> list[Piece]:
    """The turns of Qwen3; of a think block as much trains as the prompt does not end with."""
    last = len(messages) - 1
    last = max((n for n, message in enumerate(messages) if is_question(message)), default=last)
    roles = [message["role"] for message in messages[-2:]]
    if roles == ["assistant", "assistant"] and not split_thought(messages[-2])[0]:
        raise Refused("the answer before loses the empty think block that the prompt shows")
    if roles[-1] == "assistant" and loses_words(messages[-1]):
        raise Refused("words before the reasoning or between two are left out")

    def emit(number: int, message: dict) -> list[Piece]:
        thought, words = split_thought(message)
        block = ""
        if number > last and (number == len(messages) - 1 or thought):
            block = "<think>\n" + thought.strip("\n") + "\n</think>\n\n"
            block, words = block.removeprefix(prompted), words.lstrip("\n")
        # Only in the calls' newline the answer counts as it was before its newlines went.
        shown = qwen_calls(message, "") if not words else qwen_calls(message, words)
        if not words and split_thought(message)[1] and calls_of(message):
            shown = "\n" + shown
        opening: Piece = (None, prompted if block else "")
        trains = bool(thought.strip()) or empty or not block
        return [opening, (number if trains else None, block), (number, shown + "<|im_end|>")]

    return qwen_turns(messages, emit)


def qwen3(messages: Messages, tools: Tools, empty: bool, prompted: str = "") -> list[Piece]:
    """Like the template above, which in its wording of the tools alone is not the official one."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    shown = "".join("\n" + dumps(tool) for tool in tools or ())
    listed = f"Tools:<tools>{shown}\n</tools>" if tools else None
    text = "\n\n".join(part for part in (system, listed) if part is not None)
    head = "" if system is None and not tools else f"<|im_start|>system\n{text}<|im_end|>\n"
    return [(None, head), *qwen3_turns(messages, empty, prompted)]


def qwen3_thinking(messages: Messages, tools: Tools, empty: bool) -> list[Piece]:
    return qwen3(messages, tools, empty, prompted="<think>\n")


# ---- all of them -------------------------------------------------------------------------------

IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HEADERS = ("<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
INST = ("<unk>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
INST += ("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "</s>")
DEEP = ("<｜User｜>", "<｜Assistant｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>")
DEEP += ("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "<｜tool▁calls▁begin｜>")
DEEP += ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>")
DEEP += ("<｜end▁of▁sentence｜>",)
TURN = ("<pad>", "<eos>", "<start_of_turn>", "<end_of_turn>")
PHI3_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")


def _family(source, pieces, control, eos, bos="", has="") -> Family:
    return Family(source, pieces, control, eos, bos, frozenset(has.split()))


FAMILIES = {
    "chatml": _family(CHATML, chatml, IM, "<|im_end|>", has="system free results"),
    "colons": _family(COLONS, colons, IM, "<|im_end|>", has="system free results"),
    "tag with end": _family(TAG_WITH_END, tagged, IM, "<|im_end|>", has="system free results"),
    "tag without end": _family(
        TAG_WITHOUT_END, tagged, IM, "<|im_end|>", has="system free results"
    ),
    "phi3": _family(PHI3, phi3, PHI3_TOKENS, "<|endoftext|>", has="system free"),
    "phi4": _family(PHI4, phi4, (*IM, "<|im_sep|>"), "<|im_end|>", has="system free"),
    "zephyr": _family(ZEPHYR, zephyr, ("<unk>", "<s>", "</s>"), "</s>", has="system free"),
    "llama3": _family(
        LLAMA3, llama3, HEADERS, "<|eot_id|>", "<|begin_of_text|>", "system free results"
    ),
    "llama31": _family(
        LLAMA31, llama31, HEADERS, "<|eot_id|>", "<|begin_of_text|>", "system free results tools"
    ),
    "gemma2": _family(GEMMA2, gemma2, TURN, "<eos>", "<bos>"),
    "gemma3": _family(GEMMA3, gemma3, TURN, "<eos>", "<bos>", "system"),
    "mistral1": _family(MISTRAL1, mistral1, ("<unk>", "</s>"), "</s>", "<s>"),
    "mistral7": _family(MISTRAL7, mistral7, INST, "</s>", "<s>", "system results tools"),
    "deepseek3": _family(
        DEEPSEEK3,
        deepseek3,
        DEEP,
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>",
        "system free results calls",
    ),
    "qwen3": _family(
        QWEN3, qwen3, IM, "<|im_end|>", has="system free results tools calls mixed think"
    ),
    "qwen3 thinking": _family(
        QWEN3_THINKING,
        qwen3_thinking,
        IM,
        "<|im_end|>",
        has="system free results tools calls mixed think",
    ),
}
FAMILIES["deepseek3"] = dataclasses.replace(FAMILIES["deepseek3"], text_arguments=True)
# Answers without reasoning are not what this one is prompted for: it has tests of its own.
R1_FAMILY = dataclasses.replace(FAMILIES["deepseek3"], source=R1, pieces=r1)

# Templates on which nothing may train: what they print is not what the model would be asked for.
_ANSWER = "message['content'] + '<|im_end|>'"
HOSTILE = {
    "drops the last turn": CHATML.replace("in messages %}", "in messages[:-1] %}"),
    "shouts": CHATML.replace("message['content']", "message['content'] | upper"),
    "advertises": CHATML.replace(
        _ANSWER,
        "message['content'] + (' Buy now!' if message['role'] == 'assistant' else '')"
        " + '<|im_end|>'",
    ),
    "advertises behind the turn": CHATML.replace(_ANSWER, _ANSWER + " + ' Buy now!'"),
    "signs in front": CHATML.replace(
        "+ message['content']",
        "+ ('Bot: ' if message['role'] == 'assistant' else '') + message['content']",
    ),
    "has no end of turn": CHATML.replace("+ '<|im_end|>' + '\n'", "+ '\n'"),
    "ends turns with plain text": CHATML.replace("'<|im_end|>' + '\n'", "'[END]' + '\n'"),
    "skips the assistant": CHATML.replace(
        "{{ '<|im_start|>' + message['role']",
        "{% if message['role'] != 'assistant' %}{{ '<|im_start|>' + message['role']",
    ).replace("+ '\n' }}{% endfor %}", "+ '\n' }}{% endif %}{% endfor %}"),
    "skips the user": CHATML.replace(
        "message['content'] +", "('' if message['role'] == 'user' else message['content']) +"
    ),
    "answers for the assistant": CHATML.replace(
        "message['content'] +",
        "('Yes.' if message['role'] == 'assistant' else message['content']) +",
    ),
    "swaps the roles": CHATML.replace(
        "'<|im_start|>' + message['role']",
        "'<|im_start|>' + {'user': 'assistant', 'assistant': 'user'}.get(message['role'], 's')",
    ),
    "numbers the turns": CHATML.replace(
        "message['content'] +", "message['content'] + loop.revindex | string +"
    ),
    "refuses": "{{ raise_exception('no') }}" + CHATML,
    "has no end": "{% for _ in range(10 ** 9) %}x{% endfor %}" + CHATML,
    "repeats the system text at the end": CHATML.replace(
        "{% endfor %}",
        "{% endfor %}{{ '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}",
    ),
    "asks for a class": "{{ ''.__class__.__mro__[1].__subclasses__() }}" + CHATML,
    "asks for the system": "{{ cycler.__init__.__globals__.os.system('true') }}" + CHATML,
    "formats its way out": "{{ '{0.__class__.__mro__}'.format('') }}" + CHATML,
    "changes the messages": "{{ messages.pop() }}" + CHATML,
    "reads a file": "{% include '/etc/passwd' %}" + CHATML,
    "divides by zero": "{{ 1 // 0 }}" + CHATML,
    "is not Jinja": "{% for %}" + CHATML,
    "prints nothing": " ",
}


# ---- tokenizers --------------------------------------------------------------------------------

# Like Qwen's: runs of newlines stay together with the space before them, digits stand alone.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of tokenizer.

    Attributes:
        make: () -> the tokenizer without control tokens.
        changes: what of a text is different in its decoded tokens; "" = nothing.
        adds_bos: it puts BOS before a plain text by itself.
        pad_is_eos: padding is the end-of-sequence token.
        lstrip, rstrip: its control tokens swallow white space on that side.
    """

    make: Callable[[], tokenizers.Tokenizer]
    changes: str = ""
    adds_bos: bool = False
    pad_is_eos: bool = False
    lstrip: bool = False
    rstrip: bool = False


@functools.cache
def corpus() -> list[str]:
    """Lines from which merges are learned that cross the edges of turns: ": ", runs of newlines."""
    rng = random.Random(0)
    words = 'the yes user assistant model think hello is é 日本 1 12 . , ! ? {"a": [] [ ] : > x'
    gaps = (" ", " ", " ", "  ", "\n", "\n\n", "\n\n\n", ": ", ":\n", ">\n", ">\n\n", " [")
    return [
        "".join(rng.choice(words.split()) + rng.choice(gaps) for _ in range(12))
        + "\n" * rng.randint(0, 4)
        for _ in range(400)
    ]


def byte_level(split: str = SPLIT, normalizer=None, trim=False, holes=False):
    """A byte-level BPE; without `split` its merges cross words and lines.

    Args:
        holes: it has no tokens for the bytes that its corpus has not, and leaves them out.
    """
    backend: Any = tokenizers.Tokenizer(models.BPE())  # Any: the setters are typed too narrowly
    if normalizer:
        backend.normalizer = normalizer
    levels: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if split:
        levels.insert(0, pre_tokenizers.Split(tokenizers.Regex(split), "isolated"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(levels)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    alphabet = [] if holes else sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, max_token_length=6, show_progress=False
    )
    backend.train_from_iterator(corpus(), trainer)
    return backend


def sentence_piece(first: str, unigram: bool = False):
    """Like SentencePiece: "▁" for a space, and bytes for characters that are not known.

    Args:
        first: where "▁" is put although there is no space: "text" (before the text), "stretch"
            (before every stretch between control tokens, as Llama 2's first converter did) or
            "never" (Gemma).
    """
    kwargs = {"special_tokens": ["<unk>", *BYTE_TOKENS], "show_progress": False}
    if unigram:
        backend: Any = tokenizers.Tokenizer(models.Unigram())
        trainer: Any = trainers.UnigramTrainer(vocab_size=500, unk_token="<unk>", **kwargs)
    else:
        backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        trainer = trainers.BpeTrainer(vocab_size=700, max_token_length=6, **kwargs)
    strip = [decoders.Strip(" ", 1, 0)]
    if first == "text":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=unigram)
    elif first == "stretch":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        backend.normalizer, strip = normalizers.Replace(" ", "▁"), []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    backend.train_from_iterator(corpus(), trainer)
    # The bytes are for fallback only: not to be found in a text that spells them out.
    as_json = json.loads(backend.to_str())
    as_json["model"]["byte_fallback"], as_json["added_tokens"] = True, []
    return tokenizers.Tokenizer.from_str(json.dumps(as_json))


KINDS = {
    "bytes": Kind(byte_level),
    "bytes, pad is eos": Kind(byte_level, pad_is_eos=True),
    "bytes, adds BOS": Kind(byte_level, adds_bos=True),
    "lines merge": Kind(lambda: byte_level(split="")),
    "NFC": Kind(lambda: byte_level(normalizer=normalizers.NFC()), changes="normal form"),
    "trim offsets": Kind(lambda: byte_level(trim=True)),
    "lines merge, trim offsets": Kind(lambda: byte_level(split="", trim=True)),
    "rstrip": Kind(byte_level, changes="white space", rstrip=True),
    "lstrip": Kind(byte_level, changes="white space", lstrip=True),
    "strip": Kind(byte_level, changes="white space", lstrip=True, rstrip=True),
    "holes": Kind(lambda: byte_level(holes=True), changes="bytes"),
    "holes, lines merge": Kind(lambda: byte_level(split="", holes=True), changes="bytes"),
    "gemma": Kind(lambda: sentence_piece("never"), changes="sentencepiece's space"),
    "metaspace": Kind(lambda: sentence_piece("text"), changes="spaces"),
    "legacy": Kind(lambda: sentence_piece("stretch"), changes="spaces"),
    "legacy, rstrip": Kind(lambda: sentence_piece("stretch"), changes="spaces", rstrip=True),
    "unigram": Kind(lambda: sentence_piece("text", unigram=True), changes="spaces"),
}


@functools.cache
def _made(kind: str) -> str:
    return KINDS[kind].make().to_str()


def save(family: Family, kind: str, folder: Path) -> None:
    """Write the tokenizer of a model folder: a kind with a family's template and control tokens."""
    made = KINDS[kind]
    backend: Any = tokenizers.Tokenizer.from_str(_made(kind))
    control = [family.bos] if family.bos else []
    backend.add_special_tokens(
        [
            AddedToken(token, lstrip=made.lstrip, rstrip=made.rstrip, normalized=False)
            for token in (*control, *family.control)
        ]
    )
    if made.adds_bos and family.bos:
        bos = processors.TemplateProcessing(
            single=f"{family.bos} $A",
            special_tokens=[(family.bos, backend.token_to_id(family.bos))],
        )
        backend.post_processor = processors.Sequence([backend.post_processor, bos])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos or None,
        eos_token=family.eos,
        pad_token=family.eos if made.pad_is_eos else family.control[0],
    )
    tokenizer.chat_template = family.source
    tokenizer.save_pretrained(folder)
