"""Tokenize items. Only this module decides which tokens are trained.

A text is tokenized whole and its turns are found by characters, never by token ids, so that text
which imitates the template cannot make a user token train. The trained tokens are decoded again and
compared with the text.
"""

import bisect
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from jax_sft.data.batches.examples import Encoded
from jax_sft.data.chat import assistant_turns, chat_templates
from jax_sft.data.chat.assistant_turns import Rendered, Turn
from jax_sft.data.chat.template import ChatTemplate
from jax_sft.data.sources.formats import Conversation, Item, Text, Tokens
from jax_sft.data.tokens import tokenizer_file
from jax_sft.runtime import confined
from jax_sft.runtime.confined import Stage

_Spans = list[tuple[int, int]]
LEADS = ("\n", "|", "0", "a")
MOST_TEMPLATE = 1_000_000  # bytes
SENTENCEPIECE_SPACE = "\u2581"


@dataclasses.dataclass(frozen=True)
class Options:
    """The keys of the data settings, of the same names, that decide which tokens are trained.

    Attributes:
        max_tokens: leave out the oldest turns of a conversation of more tokens; 0 = never.
        chat_template: its text, see `chat_templates`; "" = the tokenizer's own.
    """

    turns: str = "all"
    train_empty_think: bool = False
    template_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    date: str = "2024-07-26"
    max_tokens: int = 0
    chat_template: str = ""


def load_tokenizer(folder: Path, needs_template: bool = True, chat_template: str = ""):
    """Load the tokenizer of a model folder, without running any code from it.

    Args:
        chat_template: text that replaces the tokenizer's own template; "" = keep its own.

    Raises:
        ValueError: no usable fast tokenizer, no chat template where one is needed, or a shipped
            template with special tokens that the tokenizer does not have.
    """
    # Imported late: `command_line` first decides whether transformers may import PyTorch.
    import transformers

    template = template_file(folder)
    if template.suffix == ".jinja" and (size := template.stat().st_size) > MOST_TEMPLATE:
        raise ValueError(f"{template} has {size:,} bytes; chat templates have a few thousand")
    with confined.library_errors(f"{folder} has no tokenizer that can be loaded"):
        options: Any = {"local_files_only": True, "trust_remote_code": False}
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        if tokenizer.is_fast and tokenizer_file.difference(tokenizer, folder):
            # The model type's class has rules of its own; the generic class follows the file.
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder, **options)
            if different := tokenizer_file.difference(tokenizer, folder):
                raise ValueError(f"it is not what its file says, and what is served: {different}")
    if not tokenizer.is_fast:
        raise ValueError(f"{folder} has no tokenizer.json: character offsets need a fast tokenizer")
    if chat_template:
        tokenizer.chat_template = chat_template
        if missing := _missing(chat_template, tokenizer):
            raise ValueError(
                f"{chat_templates.KEY}: the template uses {', '.join(sorted(missing))}, which are "
                f"no special tokens of the tokenizer of {folder}: {_template_remedy(tokenizer)}"
            )
    if needs_template and not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {folder} has no chat template: set {chat_templates.KEY} to a .jinja "
            "file, for instance that of the instruction-tuned version of the model, or to one of "
            f"{list(chat_templates.SHIPPED)}"
        )
    return tokenizer


def _missing(chat_template: str, tokenizer) -> set[str]:
    """Return the special tokens that a shipped template needs and the tokenizer lacks."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    present = {*tokenizer.all_special_tokens, *added, *tokenizer.special_tokens_map}
    return {*chat_templates.NEEDED.get(chat_template, ())} - present


def _template_remedy(tokenizer) -> str:
    """Return advice that names shipped templates whose special tokens the tokenizer has."""
    shipped = chat_templates.SHIPPED.items()
    fits = [f'"{name}"' for name, text in shipped if not _missing(text, tokenizer)]
    eos = f", such as {tokenizer.eos_token!r}" if tokenizer.eos_token else ""
    advice = f" ({' or '.join(fits)} does)" if fits else ""
    return f"use a template that ends turns with a token it has{eos}{advice}"


def template_file(folder: Path) -> Path:
    """Return the file of a model folder that holds its chat template."""
    file = folder / "chat_template.jinja"
    return file if file.exists() else folder / "tokenizer_config.json"


class Encoder:
    """Encodes items as tokens and loss weights.

    Args:
        tokenizer: from `load_tokenizer`.
        options: which turns are trained, and the variables of the chat template.
    """

    def __init__(self, tokenizer, options: Options):
        with confined.library_errors("the tokenizer cannot be used"):
            self._load(tokenizer)
        confined.at(Stage.COMPILING)
        self._options = options
        self._template = (
            ChatTemplate(tokenizer, options.template_args, options.date)
            if tokenizer.chat_template
            else None
        )
        if options.chat_template and self._template and not self._template.ends_turns:
            raise ValueError(
                f"{chat_templates.KEY}: the template ends the turns of the assistant without a "
                f"special token of the tokenizer, so that a model trained on it would never stop: "
                f"{_template_remedy(tokenizer)}"
            )

    def _load(self, tokenizer) -> None:
        # The truncation and padding of tokenizer.json are not for whole texts, and offsets must
        # include white space.
        self._backend = tokenizer.backend_tokenizer
        described = self._backend.to_str()
        untrimmed = described.replace('"trim_offsets":true', '"trim_offsets":false')
        if untrimmed != described:
            self._backend = tokenizers.Tokenizer.from_str(untrimmed)
        self._backend.no_truncation()
        self._backend.no_padding()
        added = tokenizer.added_tokens_decoder
        special = {i for i, token in added.items() if token.special} | {*tokenizer.all_special_ids}
        self._special_ids = frozenset(special)
        # SentencePiece tokenizers put a space before a text.
        first = self._backend.encode("a", add_special_tokens=False).tokens[:1]
        if not first:
            raise ValueError("it makes no token of a text: is its tokenizer.json missing or empty?")
        self._adds_space = first != ["a"]
        self._eos: int | None = tokenizer.eos_token_id
        self._blank: dict[int, bool] = {}
        self._before, self._after = self._added_around()

    def _added_around(self) -> tuple[list[int], list[int]]:
        """Return the ids that the tokenizer adds before and after plain text (BOS, usually)."""
        plain = self._backend.encode("a", add_special_tokens=False).ids
        full = self._backend.encode("a", add_special_tokens=True).ids
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return full[:start], full[start + len(plain) :]
        return [], []

    def encode(
        self, items: Sequence[Item], rows: Sequence[int] | None = None
    ) -> list[list[Encoded] | str]:
        """Encode items.

        Args:
            rows: row numbers of the items, for the message if encoding one of them does not end.

        Returns:
            per item its examples (one, or several where the template rewrites history), or the
            reason why the trained text is not what inference would emit.
        """
        results: list[list[Encoded] | str] = []
        for item, row in zip(items, rows or range(len(items)), strict=True):
            confined.at_row(row)
            try:
                results.append(self._encode_item(item))
            except ValueError as error:
                results.append(str(error))
        return results

    def _encode_item(self, item: Item) -> list[Encoded]:
        if isinstance(item, Tokens):
            ids, weights = np.array(item.ids, np.int32), np.array(item.weights, np.float32)
            return [Encoded(ids, weights, turn_ends=self._run_ends(ids, weights))]
        examples = []
        for rendered in self.render(item):
            for marked in self._mark(rendered, self._tokenize(rendered.text)):
                self._check_decoding(marked)
                examples.append(self._finish(marked))
        return examples

    def _tokenize(self, text: str) -> tokenizers.Encoding:
        """Tokenize a text; refuse it if the library panics."""
        confined.at(Stage.TOKENIZING)
        with confined.library_errors("the tokenizer fails on the text"):
            return self._backend.encode(text, add_special_tokens=False)

    def render(self, item: Conversation | Text) -> list[Rendered]:
        """Return the texts that are tokenized for an item.

        Raises:
            ValueError: see `assistant_turns.render`; or the text has a lone surrogate.
        """
        if isinstance(item, Text):
            if self._eos is None and not self._after:
                raise ValueError("the tokenizer has no EOS token to end a text with")
            text = item.prompt + item.completion
            rendered = [Rendered(text, (Turn(len(item.prompt), None, len(text), 1.0),))]
        elif self._template is None:
            raise ValueError("the tokenizer has no chat template, which a conversation needs")
        else:
            rendered = self._render_conversation(item, self._options.turns)
        for part in rendered:
            try:
                part.text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"the text holds half a character (a lone surrogate): {error}"
                ) from error
        return rendered

    def _render_conversation(self, item: Conversation, which: str) -> list[Rendered]:
        assert self._template
        empty_think = self._options.train_empty_think
        return assistant_turns.render(
            self._template, item, turns=which, train_empty_think=empty_think
        )

    def _mark(self, rendered: Rendered, encoding: tokenizers.Encoding) -> list["_Marked"]:
        """Find the tokens of each turn; leave out the oldest turns if there are too many tokens.

        Returns:
            one text, or several where the turns do not follow the same tokens.

        Raises:
            ValueError: a turn does not end with a special token.
        """
        results = []
        for placed in self._tokens(rendered, encoding):
            if self._options.max_tokens and len(placed.ids) > self._options.max_tokens:
                placed = self._shorten(placed)
            part, ids = placed.rendered, placed.ids
            marked = _Marked(ids, [], part.conversation is None, part.num_cut)
            for turn, (first, stop) in zip(part.turns, placed.spans, strict=True):
                if turn.end_token is not None and ids[stop - 1] not in self._special_ids:
                    raise ValueError("an end-of-turn token is merged with the text before it")
                text = part.text[turn.start : turn.stop]
                marked.spans.append((first, stop, turn.weight, text))
            results.append(marked)
        return results

    def _tokens(self, rendered: Rendered, encoding: tokenizers.Encoding) -> list["_Placed"]:
        """Tokenize a text so that each turn follows the tokens that inference gives.

        Inference tokenizes a prompt whole, and the model continues from its edge. Where a token of
        the whole text crosses the start of a turn, the text is cut there, but only for that turn:
        to later turns it is ordinary history. So each such turn gets a text of its own, which ends
        with it. The last of these texts also carries the earlier turns that need no cut.

        Raises:
            ValueError: an edge at which the text cannot be cut.
        """
        spans = [_token_span(rendered.text, encoding, turn) for turn in rendered.turns]
        if None not in spans:
            return [_Placed(rendered, encoding.ids, [span for span in spans if span])]
        text, ids, offsets = rendered.text, encoding.ids, _offsets(encoding)
        starts = [turn.start for turn in rendered.turns]
        edges = [
            number
            for number, start in enumerate(starts)
            if _crosses(offsets, start)
            or (_is_between_blanks(text, start) and self._is_other(text, ids, offsets, start))
        ]
        if not edges:
            return [_placed(rendered, ids, offsets)]
        last = len(starts) - 1
        if edges == [last]:
            return [self._cut(rendered)]
        *others, final = edges
        carried = [number for number in range(final + 1) if number not in others]
        groups = [*([number] for number in others), carried]
        results = [
            self._cut(assistant_turns.only(rendered, group, group[-1] == last)) for group in groups
        ]
        if final < last:
            rest = assistant_turns.only(rendered, range(final + 1, last + 1), True)
            results.append(_placed(rest, ids, offsets))
        return results

    def _is_other(self, text: str, ids: list[int], offsets: np.ndarray, start: int) -> bool:
        """Whether the tokens before a start differ from those of the text up to it alone."""
        first = int(np.count_nonzero(offsets[:, 1] <= start))
        return ids[:first] != self._tokenize(text[:start]).ids

    def _shorten(self, placed: "_Placed") -> "_Placed":
        """Leave out as few of the oldest turns as needed to fit; all but one if nothing fits.

        The system text and the tools stay. The remaining messages start with a user's message.
        """
        rendered = placed.rendered
        if rendered.conversation is None or not rendered.turns:
            return placed
        messages, tools = rendered.conversation.messages, rendered.conversation.tools
        last = max(assistant_turns.turn_weights(messages, "all"))
        users = [n for n, m in enumerate(messages[:last]) if m["role"] == "user"]
        system = [m for m in messages[: users[0]] if m["role"] == "system"] if users else []

        @functools.cache
        def without(num_cut: int) -> _Placed:
            kept = Conversation([*system, *messages[users[num_cut] :]], tools)
            shorter = [
                candidate
                for part in self._render_conversation(kept, "all")
                for candidate in self._tokens(
                    dataclasses.replace(part, num_cut=num_cut),
                    self._tokenize(part.text),
                )
            ]
            if len(shorter) != 1:
                raise ValueError("the chat template does not let the oldest turns be left out")
            return shorter[0]

        def fits(num_cut: int) -> bool:
            return len(without(num_cut).ids) <= self._options.max_tokens

        cuts = range(1, len(users))
        if not cuts:
            return placed
        return without(cuts[min(bisect.bisect_left(cuts, True, key=fits), len(cuts) - 1)])

    def _cut(self, rendered: Rendered) -> "_Placed":
        """Tokenize a text in two parts, cut at the start of its last turn.

        A model continues a prompt from exactly that edge, so it can never emit a token across it.
        """
        text, edge = rendered.text, rendered.turns[-1].start
        before, before_offsets = self._piece(text[:edge], at_start=True)
        behind, behind_offsets = self._piece(text[edge:], at_start=edge == 0)
        offsets = np.concatenate([before_offsets, behind_offsets + edge])
        return _placed(rendered, before + behind, offsets)

    def _piece(self, piece: str, at_start: bool) -> tuple[list[int], np.ndarray]:
        """Tokenize part of a text.

        SentencePiece adds a space where a text starts, and only there. A piece from within a text
        is therefore tokenized after a lead character, which is removed again.
        """
        for lead in LEADS if self._adds_space and not at_start else [""]:
            encoding = self._tokenize(lead + piece)
            offsets = _offsets(encoding)
            if not _crosses(offsets, len(lead)):
                first = int(np.count_nonzero(offsets[:, 1] <= len(lead))) if lead else 0
                return encoding.ids[first:], offsets[first:] - len(lead)
        raise ValueError("the tokenizer merges the prompt with the start of an answer")

    def _check_decoding(self, marked: "_Marked") -> None:
        """Refuse a text whose trained tokens do not decode to the text that they stand for."""
        for first, stop, _, text in marked.spans:
            confined.at(Stage.DECODING)
            with confined.library_errors("the tokenizer fails to decode"):
                decoded = self._backend.decode(marked.ids[first:stop], skip_special_tokens=False)
            if decoded != text and not self._same(decoded, text):
                raise ValueError(f"the tokenizer turns {text!r:.80} into {decoded!r:.80}")

    def _same(self, decoded: str, text: str) -> bool:
        """Whether two texts differ only in the normal form, or in SentencePiece's space."""
        normalizer = self._backend.normalizer
        normal = normalizer.normalize_str(text) if normalizer else text
        if not self._adds_space:
            return decoded == normal
        forms = {text, normal, normal.replace(SENTENCEPIECE_SPACE, " ")}
        return any(form in (decoded, " " + decoded) or decoded == " " + form for form in forms)

    def _finish(self, marked: "_Marked") -> Encoded:
        ids, shift = marked.ids, 0
        if marked.is_text:  # add BOS and EOS once each; a chat template writes its own
            before = [] if ids[: len(self._before)] == self._before else self._before
            after = self._after or ([] if self._eos is None else [self._eos])
            after = [] if ids[-len(after) :] == after else after
            ids, shift = [*before, *ids, *after], len(before)
        weights = np.zeros(len(ids), np.float32)
        for first, stop, weight, _ in marked.spans:
            weights[first + shift : stop + shift] = weight
        if marked.is_text:
            first, stop, *_ = marked.spans[0]
            weights[stop + shift :] = 1.0
            weights[: first + shift] = first == 0  # without a prompt, BOS is trained as text
            ends = ids[-1:]
        else:
            ends = [ids[stop - 1] for _, stop, *_ in marked.spans]
        turn_ends = tuple(end for end in ends if end in self._special_ids)
        return Encoded(np.array(ids, np.int32), weights, marked.num_cut, turn_ends)

    def _run_ends(self, ids: np.ndarray, weights: np.ndarray) -> tuple[int, ...]:
        """Return the special token that ends each run of trained tokens, white space aside.

        A run without such a token teaches no end: long texts are often cut at a fixed length.
        """
        ends = []
        trains = np.append(weights > 0, False)
        for stop in (np.flatnonzero(trains[:-1] & ~trains[1:]) + 1).tolist():
            last = next(n for n in range(stop - 1, -2, -1) if n < 0 or not self._is_blank(ids[n]))
            if last >= 0 and trains[last] and int(ids[last]) in self._special_ids:
                ends.append(int(ids[last]))
        return tuple(ends)

    def _is_blank(self, token: np.int32) -> bool:
        """Whether a token is nothing but white space."""
        if (known := self._blank.get(int(token))) is None:
            with confined.library_errors("the tokenizer fails to decode"):
                text = self._backend.decode([int(token)], skip_special_tokens=False)
            known = self._blank[int(token)] = bool(text) and text.isspace()
        return known


@dataclasses.dataclass(frozen=True)
class _Placed:
    """A text, its tokens, and the tokens [first, stop) of each of its turns."""

    rendered: Rendered
    ids: list[int]
    spans: _Spans


@dataclasses.dataclass
class _Marked:
    """A tokenized text and its trained spans: (first token, token after the last, weight, text)."""

    ids: list[int]
    spans: list[tuple[int, int, float, str]]
    is_text: bool
    num_cut: int


def _token_span(text: str, encoding: tokenizers.Encoding, turn: Turn) -> tuple[int, int] | None:
    """Return the tokens of a turn by a few look-ups; None if these do not suffice."""
    if turn.end_token is None or _is_between_blanks(text, turn.start):
        return None
    first = encoding.char_to_token(turn.start)
    last = encoding.char_to_token(turn.end_token)
    if not first or last is None:
        return None
    before, at, end = (encoding.token_to_chars(i) for i in (first - 1, first, last))
    clean = before and at and end and before[1] == turn.start == at[0] and end[0] == turn.end_token
    return (first, last + 1) if clean else None


def _placed(rendered: Rendered, ids: list[int], offsets: np.ndarray) -> _Placed:
    """Find the tokens of the turns from the offsets of all tokens."""
    return _Placed(rendered, ids, [_span_by_offsets(offsets, turn) for turn in rendered.turns])


def _span_by_offsets(offsets: np.ndarray, turn: Turn) -> tuple[int, int]:
    """Return the tokens of a turn, whose start no token crosses, from the offsets of all."""
    first = int(np.argmax(np.append(offsets[:, 1] > turn.start, True)))
    if turn.end_token is None:
        return first, len(offsets)
    return first, int(np.argmax(np.append(offsets[:, 1] > turn.end_token, True))) + 1


def _crosses(offsets: np.ndarray, edge: int) -> bool:
    """Whether a token has characters on both sides of an edge."""
    return bool(((offsets[:, 0] < edge) & (offsets[:, 1] > edge)).any())


def _is_between_blanks(text: str, edge: int) -> bool:
    """Whether a prompt ends in several blanks, which a tokenizer groups by what follows."""
    end = text[max(0, edge - 2) : edge]
    return len(end) == 2 and end.isspace() and "\n" not in end


def _offsets(encoding: tokenizers.Encoding) -> np.ndarray:
    return np.array(encoding.offsets, np.int64).reshape(-1, 2)
