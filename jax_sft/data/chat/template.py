"""Render messages as text with a chat template, in a sandbox, independently of today's date.

The effects of a template on messages are found by rendering probes, never by reading or changing
its source.
"""

import copy
import datetime
import functools
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.meta
from jinja2.runtime import new_context

from jax_sft.data.chat import sandbox
from jax_sft.runtime import confined
from jax_sft.runtime.confined import Stage, library_errors

Span = tuple[int, int]  # characters [start, end)

# Variables that `render` sets; data.template_args cannot set them.
GIVEN = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now")
PROBE = "qxj7zk"  # occurs in no real text
# Styles in which templates expect the tool calls of a message: (whether `arguments` is JSON text
# rather than an object, the value for "no content").
_CALL_STYLES = tuple(itertools.product((False, True), ("", None)))


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        args: further variables for the template.
        date: ISO date that the template sees as today.

    Raises:
        ValueError: the template is malformed, or does not read a variable of `args`.
    """

    def __init__(self, tokenizer, args: Mapping[str, Any], date: str):
        self._tokenizer = tokenizer
        self._today = datetime.datetime.fromisoformat(date)
        # Replaces transformers' strftime_now, which reads the clock.
        self._variables = {
            **tokenizer.special_tokens_map,
            "strftime_now": self._today.strftime,
            **args,
        }
        added = (str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)
        texts = {*tokenizer.all_special_tokens, *added} - {""}
        self.special = sorted(texts, key=len, reverse=True)  # longest first
        self._compiled = functools.cache(self._compile)
        with library_errors("the chat template cannot be compiled"):
            read = self._variables_read()
        self._check_args(args, read)

    def _variables_read(self) -> set[str]:
        sources = self._tokenizer.chat_template
        parse = self._compiled(False)[0].environment.parse
        read = set()
        for source in sources.values() if isinstance(sources, dict) else [sources]:
            read |= jinja2.meta.find_undeclared_variables(parse(source))
        return read

    def _check_args(self, args: Mapping[str, Any], read: set[str]) -> None:
        """Refuse variables that the template does not read or that the user cannot set."""
        for name in args:
            if name not in read - {*GIVEN, *self._tokenizer.special_tokens_map}:
                own = sorted(
                    read
                    - {
                        *GIVEN,
                        *self._compiled(False)[0].globals,
                        *self._tokenizer.special_tokens_map,
                    }
                )
                raise ValueError(
                    f"data.template_args.{name}: the chat template does not read it; what it reads "
                    f"and can be set: {own}"
                )

    def _compile(self, with_tools: bool) -> tuple[jinja2.Template, dict[str, Any]]:
        """Return the template and all its variables except the messages.

        A tokenizer may have one template for tools and another for everything else. The environment
        copies that of transformers, which must not see the source: jinja2 computes constants when
        it compiles.
        """
        source = self._tokenizer.get_chat_template(tools=[{}] if with_tools else None)
        # Imported with the tokenizer: see `encoding.load_tokenizer`.
        from transformers.utils.chat_template_utils import _compile_jinja_template

        hardened = _compile_jinja_template("").environment
        compiled = sandbox.Sandbox(hardened).from_string(source)
        return compiled, {**compiled.globals, **self._variables}

    def render(
        self, messages: Sequence[dict], tools: Sequence[dict] | None, prompt: bool = False
    ) -> str:
        """Render messages; `prompt` adds the start of an assistant turn.

        Raises:
            ValueError: the template refuses the messages.
        """
        asked = dict(messages=messages, tools=tools, documents=None, add_generation_prompt=prompt)
        confined.at(Stage.RENDERING)
        with library_errors("the chat template refuses the conversation"):
            compiled, seen = self._compiled(bool(tools))
            sandbox.begin(compiled)
            # As Template.render, without merging the globals each time: 2x as fast.
            context = new_context(
                compiled.environment, None, compiled.blocks, {**seen, **asked}, shared=True
            )
            return "".join(compiled.root_render_func(context))

    @functools.cached_property
    def has_tags(self) -> bool:
        """Whether the template marks the assistant's text with {% generation %}."""
        sources = self._tokenizer.chat_template
        sources = sources.values() if isinstance(sources, dict) else [sources]
        return any(re.search(r"\{%-?\s*generation\s*-?%\}", source) for source in sources)

    def tagged(self, messages: Sequence[dict], tools: Sequence[dict] | None) -> list[Span]:
        """Return the {% generation %} spans of the rendered messages."""
        confined.at(Stage.RENDERING)
        with library_errors("the chat template refuses the conversation"):
            # Not public: if a version of transformers lacks it, library_errors reports that.
            from transformers.utils.chat_template_utils import _render_with_assistant_indices

            compiled = self._compiled(bool(tools))[0]
            sandbox.begin(compiled)
            _, spans = _render_with_assistant_indices(
                compiled_template=compiled,
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=False,
                **self._variables,
            )
        return spans

    @functools.cached_property
    def writes_empty_think(self) -> bool:
        """Whether the template puts an empty think block before an answer without one."""
        answered = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
        try:
            return "<think>" in self.render(answered, None)
        except ValueError:
            return False

    @functools.cached_property
    def ends_turns(self) -> bool:
        """Whether a special token ends an answer; True where the template refuses the probe."""
        answered = [{"role": "user", "content": "u"}, {"role": "assistant", "content": PROBE}]
        try:
            end = self.render(answered, None).rpartition(PROBE)[2]
        except ValueError:
            return True
        return end.removesuffix(self.final_text).rstrip().endswith(tuple(self.special))

    @functools.cached_property
    def final_text(self) -> str:
        """The text that the template puts after the last turn only, not before a further user turn.

        Phi-3's template ends every conversation with its end-of-text token, which ends no turn.
        """
        answered = [{"role": "user", "content": "u"}, {"role": "assistant", "content": PROBE}]
        try:
            end = self.render(answered, None).rpartition(PROBE)[2]
            goes_on = self.render([*answered, answered[0]], None).rpartition(PROBE)[2]
        except ValueError:
            return ""
        cut = len(os.path.commonprefix([end, goes_on]))
        for token in self.special:  # do not split a token
            start = end.find(token, max(0, cut - len(token) + 1))
            cut = start if 0 <= start < cut else cut
        ends_turn = any(token in end[:cut] for token in self.special)
        return end[cut:] if ends_turn else ""

    def prints(
        self, messages: Sequence[dict], tools: Sequence[dict] | None, number: int, *parts: str
    ) -> bool:
        """Whether the template prints parts of a message.

        Parts are "content", "reasoning_content" and "tool_calls". They are marked before rendering,
        since the same text may also occur in another message.
        """
        marked = copy.deepcopy(messages[number])
        for part in parts:
            if part == "tool_calls":
                for call in marked[part]:
                    call.get("function", call)["name"] += PROBE
            else:
                marked[part] += PROBE
        count = sum(len(marked[part]) if part == "tool_calls" else 1 for part in parts)
        if "reasoning_content" in parts:
            marked["thinking"] = marked["reasoning_content"]
        changed = [*messages[:number], marked, *messages[number + 1 :]]
        return self.render(changed, tools).count(PROBE) >= count

    def styled(self, messages: Sequence[dict]) -> list[dict]:
        """Return the messages as the template expects them, with tool calls in its style."""
        messages = [_for_template(message) for message in messages]
        if not any(message.get("tool_calls") for message in messages):
            return messages
        as_text, no_content = self._call_style
        return [_with_calls(message, as_text, no_content) for message in messages]

    @functools.cached_property
    def _call_style(self) -> tuple[bool, str | None]:
        """The first style in which a call is printed as JSON, neither as Python nor escaped twice.

        If there is none, the first style: the check of each conversation then reports what is
        missing.
        """
        function = {"name": "probe_name", "arguments": {"probe_key": "probe value"}}
        call = {"id": "call12345", "type": "function", "function": function}
        asked = [
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        for as_text, no_content in _CALL_STYLES:
            try:
                text = self.render(
                    [_with_calls(message, as_text, no_content) for message in asked], None
                )
            except ValueError:
                continue
            if "probe_name" in text and '"probe_key"' in text:
                return as_text, no_content
        return _CALL_STYLES[0]


def _for_template(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message as transformers passes it: without nulls, reasoning under both names."""
    kept = {k: v for k, v in message.items() if v is not None and k not in ("train", "weight")}
    if "reasoning_content" in kept:
        kept["thinking"] = kept["reasoning_content"]
    return kept


def _with_calls(message: dict, as_text: bool, no_content: str | None) -> dict:
    if not message.get("tool_calls"):
        return message
    message = copy.deepcopy(message)
    message["content"] = message.get("content") or no_content
    for call in message["tool_calls"]:
        function = call.get("function", call)
        if as_text:
            function["arguments"] = json.dumps(function.get("arguments", {}), ensure_ascii=False)
    return message
