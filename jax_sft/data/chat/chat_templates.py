"""Chat templates for `data.chat_template`: read a file or a shipped one, write it to a folder.

`prepare` replaces the key by the template's text, which is part of `encoding.Options` and so of all
that depends on the data. `model_files` writes the text into the folder that exports are made of.
"""

import json
import shutil
from pathlib import Path

from jax_sft.files import paths, regular

KEY = "data.chat_template"
FILE = "chat_template.jinja"
CONFIG = "tokenizer_config.json"
# Other files of a model folder that hold chat templates.
OTHERS = ("chat_template.json", "additional_chat_templates")
FILES = (FILE, CONFIG, *OTHERS)  # changed by `put`
MOST_BYTES = 1_000_000

CHATML = """\
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
{%- if system or tools -%}
    {{- '<|im_start|>system\\n' + system -}}
    {%- if tools -%}
        {{- ('\\n\\n' if system else '') + 'You may call these functions:\\n<tools>' -}}
        {%- for tool in tools -%}
            {{- '\\n' + (tool | tojson) -}}
        {%- endfor -%}
        {{- '\\n</tools>\\nTo call one, write its name and arguments:\\n<tool_call>\\n' -}}
        {{- '{"name": NAME, "arguments": {...}}\\n</tool_call>' -}}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'tool' -%}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content -}}
        {{- '\\n</tool_response><|im_end|>\\n' -}}
    {%- elif not (loop.first and message.role == 'system') -%}
        {{- '<|im_start|>' + message.role + '\\n' -}}
        {%- if message.reasoning_content -%}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' -}}
        {%- endif -%}
        {{- message.content or '' -}}
        {%- for call in message.tool_calls or [] -%}
            {%- set function = call.function or call -%}
            {{- '\\n' if message.content or not loop.first -}}
            {{- '<tool_call>\\n{"name": ' + (function.name | tojson) + ', "arguments": ' -}}
            {{- function.arguments if function.arguments is string
                else (function.arguments | tojson) -}}
            {{- '}\\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' -}}
    {{- message.content + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""
GEMMA = """\
{{- bos_token -}}
{%- set has_system = messages[0].role == 'system' -%}
{%- set system = messages[0].content if has_system else '' -%}
{%- set turns = messages[1:] if has_system else messages -%}
{%- for message in turns -%}
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' -}}
    {{- system + '\\n\\n' if system and loop.first -}}
    {{- message.content + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\\n' -}}
{%- endif -%}
"""
ZEPHYR = """\
{%- for message in messages -%}
    {{- '<|' + message.role + '|>\\n' + message.content + eos_token + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>\\n' -}}
{%- endif -%}
"""
# The texts, and the special tokens that each needs. Zephyr's role markers are plain text.
SHIPPED = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "zephyr": ZEPHYR}
NEEDED = {
    CHATML: ("<|im_start|>", "<|im_end|>"),
    LLAMA3: ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    GEMMA: ("<start_of_turn>", "<end_of_turn>"),
    ZEPHYR: ("eos_token",),
}


def read(given: str) -> str:
    """Return the text of the template that `data.chat_template` names; "" = the model's own.

    Raises:
        ValueError: the key names neither a shipped template nor a template file.
    """
    if not given:
        return ""
    if given in SHIPPED:
        return SHIPPED[given]
    file, named = paths.local(given, KEY), f"{KEY} = {given!r}"
    try:
        if not file.exists():
            raise ValueError(f"{named} is neither a file nor one of {list(SHIPPED)}")
        regular.check_mode(named, file.stat().st_mode)
        home = file.parent.resolve()
        home = home.parent.parent if home.parent.name == "snapshots" else home  # the hub's cache
        if not file.resolve().is_relative_to(home):
            raise ValueError(f"{named} is a link out of its folder: name the file itself")
        with regular.open_regular(file) as stream:
            content = stream.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"{named} has more than {MOST_BYTES:,} bytes: too many for a template")
        text = content.decode()
    except OSError as error:
        raise ValueError(f"{named} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{named} is not UTF-8: {error}") from error
    if not text.strip():
        raise ValueError(f"{named} is empty: it must render messages")
    return text


def put(text: str, folder: Path) -> None:
    """Make a template the only one in a folder with a tokenizer's files."""
    (folder / FILE).write_bytes(text.encode())
    for name in OTHERS:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        (folder / name).unlink(missing_ok=True)
    if (config := folder / CONFIG).is_file():
        content = json.loads(config.read_text(encoding="utf-8"))
        if content.pop("chat_template", None) is not None:
            config.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
