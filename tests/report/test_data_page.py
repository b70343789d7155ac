"""What is shown as trained is what trains, on a terminal and in HTML; hostile text stays text."""

import html.parser
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_sft import tiny
from jax_sft.report import data_page

SHARED = Path(__file__).resolve().parents[3] / "shared" / "tokenizers"
REPLACEMENT = "\ufffd"


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    """One token per byte: every character beyond ASCII is several tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def word_tokenizer():
    """Like Llama 2: a space begins each word, unknown characters fall back to bytes."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{n:02X}>": 3 + n for n in range(256)}
    vocab |= {word: 300 + n for n, word in enumerate(["▁", "▁hello", "▁world", "hello", "▁▁"])}
    # Any: the setters are typed as if they took their base classes.
    backend: Any = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def pieces_of(tokenizer, *parts: tuple[str, float]) -> list[data_page.Piece]:
    """Pieces of a text given as (text, weight) parts, each tokenized by itself."""
    ids, weights = [], []
    for text, weight in parts:
        new = ids_of(tokenizer, text)
        ids += new
        weights += [weight] * len(new)
    return data_page.pieces(tokenizer, ids, weights)


class Reader(html.parser.HTMLParser):
    """Collects the elements, the marked texts and the texts of the examples; checks nesting."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict]] = []
        self.elements: list[tuple[str, dict]] = []
        self.marked: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append((tag, dict(attrs)))
        if tag == "mark":
            self.marked.append("")
        if dict(attrs).get("class") == "text":
            self.texts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if any(tag == "mark" for tag, _ in self.open):
            self.marked[-1] += data
        if any(attrs.get("class") == "text" for _, attrs in self.open):
            self.texts[-1] += data


def test_halves_of_a_character_are_shown_together_with_the_right_weight(byte_tokenizer):
    found = pieces_of(byte_tokenizer, ("é✓", 0), ("👩‍🚀a", 1), ("<|im_end|>", 1), ("\n", 0))
    assert found == [
        *(data_page.Piece("é", 0.0), data_page.Piece("✓", 0.0)),
        *(data_page.Piece("👩", 1.0), data_page.Piece("\u200d", 1.0), data_page.Piece("🚀", 1.0)),
        *(
            data_page.Piece("a", 1.0),
            data_page.Piece("<|im_end|>", 1.0, special=True),
            data_page.Piece("\n", 0.0),
        ),
    ]


def test_a_replacement_character_of_the_text_is_kept_and_none_is_added(byte_tokenizer):
    text = f"a{REPLACEMENT}{REPLACEMENT}b {REPLACEMENT}"
    found = pieces_of(byte_tokenizer, (text, 1), ("<|im_end|>", 1))
    assert "".join(piece.text for piece in found) == text + "<|im_end|>"
    assert found[-1] == data_page.Piece("<|im_end|>", 1.0, special=True)


def test_a_long_text_of_replacement_characters_takes_no_quadratic_time(byte_tokenizer):
    calls = []

    def decode(part):
        calls.append(len(part))
        return REPLACEMENT * -(-len(part) // 3)

    assert data_page._whole_characters(decode, [], [7] * 30_000, 30_000) == (
        30_000,
        REPLACEMENT * 10_000,
    )
    assert sum(calls) < 100_000


def test_a_character_cut_by_a_change_of_weight_is_shown_on_both_sides(byte_tokenizer):
    ids = ids_of(byte_tokenizer, "xéy")
    assert len(ids) == 4
    found = data_page.pieces(byte_tokenizer, ids, [0, 0, 1, 1])
    assert found == [
        *(
            data_page.Piece("x", 0.0),
            data_page.Piece(REPLACEMENT, 0.0),
            data_page.Piece(REPLACEMENT + "y", 1.0),
        )
    ]


def test_a_token_that_the_tokenizer_does_not_know_is_shown_by_its_number(byte_tokenizer):
    found = data_page.pieces(byte_tokenizer, [64, 5000, 65, 5001], [0, 1, 1, 1])
    assert found == [
        *(data_page.Piece("a", 0.0), data_page.Piece("⟨token 5000⟩", 1.0, special=True)),
        *(data_page.Piece("b", 1.0), data_page.Piece("⟨token 5001⟩", 1.0, special=True)),
    ]


def test_words_keep_the_space_that_a_decoder_drops_at_the_start(word_tokenizer):
    ids = [1, 301, 302, *(3 + byte for byte in "✓".encode()), 304, 301, 2]
    found = data_page.pieces(word_tokenizer, ids, [0, 0, 1, 1, 1, 1, 1, 1, 1])
    assert [(piece.text, piece.weight, piece.special) for piece in found] == [
        *(("<s>", 0.0, True), (" hello", 0.0, False), (" world", 1.0, False)),
        *(("✓", 1.0, False), ("  ", 1.0, False), (" hello", 1.0, False), ("</s>", 1.0, True)),
    ]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=12), st.sampled_from([0, 1])), max_size=5))
def test_pieces_join_to_the_text_and_marks_to_what_trains(byte_tokenizer, parts):
    parts = [(text.replace("<", "").encode("utf-8", "replace").decode(), w) for text, w in parts]
    found = pieces_of(byte_tokenizer, *parts)
    assert "".join(piece.text for piece in found) == "".join(text for text, _ in parts)
    trained = "".join(piece.text for piece in found if piece.weight)
    assert trained == "".join(text for text, weight in parts if weight)
    reader = Reader(data_page.segment_html(found, boundaries=False))
    assert "".join(reader.marked) == data_page.visible(trained)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "smollm2"])
@pytest.mark.parametrize(
    "text", ["naïve 你好, 👩‍🚀! 𝒳 \t x\r\n", "ﷺ\u202eabc" * 3, "日本語のテキスト"]
)
def test_pieces_of_real_tokenizers_join_to_the_text(name, text):
    if not (SHARED / name).is_dir():
        pytest.skip(f"the tokenizer {SHARED / name} is not on this machine")
    tokenizer = transformers.AutoTokenizer.from_pretrained(SHARED / name)
    text = tokenizer.decode(ids_of(tokenizer, text))  # as the tokenizer normalizes it
    found = pieces_of(tokenizer, (text, 1))
    assert "".join(piece.text for piece in found) == text
    assert all(REPLACEMENT not in piece.text for piece in found)
    assert len(found) > 3


def test_plain_text_marks_what_trains_and_shows_newlines(byte_tokenizer):
    found = pieces_of(
        byte_tokenizer, ("ask\n", 0), ("one\ntwo", 1), ("<|im_end|>", 1), ("\n", 0), ("c", 0.5)
    )
    plain = data_page.segment_text(found, color=False, boundaries=False)
    assert plain == "ask⏎\n⟦one⏎\ntwo<|im_end|>⟧⏎\n⟦c⟧×0.5"
    plain = data_page.segment_text(found[-4:], color=False, boundaries=True)
    assert plain == "⟦o▏<|im_end|>⟧▏⏎\n▏⟦c⟧×0.5"


def test_text_with_our_own_marks_or_terminal_codes_cannot_look_trained(byte_tokenizer):
    found = pieces_of(byte_tokenizer, ("\x1b[42mx⟦y⟧\x9b\u202ez\r\x00", 0))
    plain = data_page.segment_text(found, color=False, boundaries=False)
    assert plain == ("⟨U+001B⟩[42mx⟨U+27E6⟩y⟨U+27E7⟩⟨U+009B⟩⟨U+202E⟩z⟨U+000D⟩⟨U+0000⟩")
    colored = data_page.segment_text(found, color=True, boundaries=False)
    assert "\x1b" not in colored and "⟦y⟧" in colored
    title = data_page.to_text(data_page.Block("a\x1b[42m⟦", []), color=False, boundaries=False)
    assert "\x1b" not in title and "⟦" not in title


def test_colours_begin_and_end_on_each_line(byte_tokenizer):
    found = pieces_of(byte_tokenizer, ("a\n", 0), ("b\nc", 1), ("<|im_end|>", 1), ("d", 0))
    colored = data_page.segment_text(found, color=True, boundaries=False)
    green, strong = data_page.STYLES[True, False], data_page.STYLES[True, True]
    assert colored == (
        f"a⏎\n{green}b⏎{data_page.RESET}\n{green}c{data_page.RESET}{strong}<|im_end|>{data_page.RESET}d"
    )
    for line in colored.split("\n"):
        assert len(re.findall(r"\x1b\[0m", line)) * 2 == len(re.findall(r"\x1b\[", line))


def test_html_marks_exactly_what_trains_and_keeps_hostile_text_as_text(byte_tokenizer):
    hostile = "</mark></div><script>alert('x')</script><img src=http://a.b onerror=x>&lt;"
    found = pieces_of(byte_tokenizer, (hostile, 0), ("yes" + hostile, 1), ("<|im_end|>", 1))
    segment = data_page.Segment(hostile, found)
    overview = data_page.Overview(
        **{"title": hostile, "table": hostile, "packing": [hostile], "verdict": [hostile]},
        charts=[(hostile, np.arange(3), hostile)],
        examples=[data_page.Block(hostile, [segment])],
        rows=[data_page.Block(hostile, [segment])],
        left_out=[(hostile, 2, [hostile])],
        is_refused=True,
    )
    reader = Reader(data_page.page(overview, boundaries=False))
    assert [text for text in reader.marked if "yes" in text] == ["yes" + hostile + "<|im_end|>"] * 2
    assert reader.texts == [hostile + "yes" + hostile + "<|im_end|>"] * 2
    names = {name for name, _ in reader.elements}
    assert not names & {"script", "img", "link", "iframe", "object"}
    attributes = {key for _, attrs in reader.elements for key in attrs}
    assert not attributes & {"src", "href", "onerror", "onclick"}


def test_html_shows_weights_boundaries_and_every_newline(byte_tokenizer):
    found = pieces_of(byte_tokenizer, ("\n\na", 0), ("b", 0.5))
    page = data_page.segment_html(found, boundaries=True)
    newline = '<span class="nl">\n</span>'
    assert page == (
        f'{newline}<i></i>{newline}<i></i>a<i></i><mark class="part" title="weight 0.5">b</mark>'
    )
    assert Reader(f'<div class="text">{page}</div>').texts == ["\n\nab"]


def test_a_histogram_counts_every_value():
    values = np.array([0, 1, 1, 5, 100])
    chart = data_page.chart_html("lengths <b>", values, " tokens", bins=10)
    reader = Reader(chart)
    assert [tag for tag, _ in reader.elements].count("rect") == 2
    assert re.findall(r"<title>([^<]*)<", chart) == ["0 to 10 tokens: 4", "90 to 100 tokens: 1"]
    assert "lengths &lt;b&gt;" in chart
    assert data_page.chart_html("none", np.array([]), "") == ""
    assert "nan" not in data_page.chart_html("zeros", np.zeros(3), "").lower()
