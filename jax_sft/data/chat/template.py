"""Chat templates: messages to text, in a sandbox, the same on every day.

What a template does to messages is found out by asking it, never by reading or changing it.
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

# Ways in which templates want the tool calls of a message: is `arguments` an object or its JSON
# text, and what stands for "no content".
# What a template is given by us and cannot be set.
GIVEN = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now")
PROBE = "qxj7zk"  # nobody's text
_CALL_STYLES = tuple(itertools.product((False, True), ("", None)))


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        args: further variables that the template sees.
        date: ISO date that a template sees as today.

    Raises:
        ValueError: the template is malformed.
    """

    def __init__(self, tokenizer, args: Mapping[str, Any], date: str):
        self._tokenizer = tokenizer
        self._today = datetime.datetime.fromisoformat(date)
        # The date pins strftime_now: transformers' own reads the clock.
        self._variables = {
            **tokenizer.special_tokens_map,
            "strftime_now": self._today.strftime,
            **args,
        }
        added = (str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)
        texts = {*tokenizer.all_special_tokens, *added} - {""}
        self.special = sorted(texts, key=len, reverse=True)  # the longest first
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
        """Refuse variables that the template does not read, or that are not the user's to set."""
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
        """The template and all that it sees but the messages.

        A tokenizer may have one template for tools and one for all else. The environment is like
        transformers', which must not see the source: jinja2 computes constants when it compiles.
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
            # As Template.render, without merging the globals anew each time: 2x as fast.
            context = new_context(
                compiled.environment, None, compiled.blocks, {**seen, **asked}, shared=True
            )
            return "".join(compiled.root_render_func(context))

    @functools.cached_property
    def has_tags(self) -> bool:
        """Whether the template marks what the assistant says with {% generation %}."""
        sources = self._tokenizer.chat_template
        sources = sources.values() if isinstance(sources, dict) else [sources]
        return any(re.search(r"\{%-?\s*generation\s*-?%\}", source) for source in sources)

    def tagged(self, messages: Sequence[dict], tools: Sequence[dict] | None) -> list[Span]:
        """Return the {% generation %} spans of the rendered messages."""
        confined.at(Stage.RENDERING)
        with library_errors("the chat template refuses the conversation"):
            # Not public: where a version of transformers has it no more, this says so.
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
        """Whether the template puts an empty think block before an answer that has none."""
        answered = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
        try:
            return "<think>" in self.render(answered, None)
        except ValueError:
            return False

    @functools.cached_property
    def ends_turns(self) -> bool:
        """Whether a special token ends an answer; True where the template refuses to be asked."""
        answered = [{"role": "user", "content": "u"}, {"role": "assistant", "content": PROBE}]
        try:
            end = self.render(answered, None).rpartition(PROBE)[2]
        except ValueError:
            return True
        return end.removesuffix(self.final_text).rstrip().endswith(tuple(self.special))

    @functools.cached_property
    def final_text(self) -> str:
        """What the template puts behind the last turn only, and not where a user goes on.

        Phi-3's ends every conversation with its end-of-text token; no turn is ended by it.
        """
        answered = [{"role": "user", "content": "u"}, {"role": "assistant", "content": PROBE}]
        try:
            end = self.render(answered, None).rpartition(PROBE)[2]
            goes_on = self.render([*answered, answered[0]], None).rpartition(PROBE)[2]
        except ValueError:
            return ""
        cut = len(os.path.commonprefix([end, goes_on]))
        for token in self.special:  # none is cut in two
            start = end.find(token, max(0, cut - len(token) + 1))
            cut = start if 0 <= start < cut else cut
        ends_turn = any(token in end[:cut] for token in self.special)
        return end[cut:] if ends_turn else ""

    def prints(
        self, messages: Sequence[dict], tools: Sequence[dict] | None, number: int, *parts: str
    ) -> bool:
        """Whether the template prints parts of a message ("content", "reasoning_content",
        "tool_calls"), told by marking them: a text that is found may be another's.
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
        """Return the messages as the template wants them, tool calls in the way that it prints."""
        messages = [_for_template(message) for message in messages]
        if not any(message.get("tool_calls") for message in messages):
            return messages
        as_text, no_content = self._call_style
        return [_with_calls(message, as_text, no_content) for message in messages]

    @functools.cached_property
    def _call_style(self) -> tuple[bool, str | None]:
        """The first style in which a call is printed as JSON, neither as Python nor twice escaped.

        The first one where none is: the check of each conversation then tells what is missing.
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
    """A message as transformers hands it to templates: no nulls, reasoning under both names."""
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
