"""Show a data set's report and examples on a terminal or as an HTML page, with trained text marked.

Called by `inspect`. Text of the data cannot imitate a mark: control characters and the mark
characters themselves are shown as code points.
"""

import dataclasses
import html
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

LEFT, RIGHT = "⟦", "⟧"  # around trained text, without colors
BETWEEN = "▏"  # between tokens, if `boundaries` is set
NEWLINE = "⏎"
RESET = "\x1b[0m"
# ANSI styles of (trains, special). Setting foreground and background is readable on any theme.
STYLES = {
    (True, False): "\x1b[30;42m",  # black on green
    (True, True): "\x1b[1;4;30;42m",  # the same, bold and underlined
    (False, True): "\x1b[2;35m",  # dim magenta
    (False, False): "",
}
BOUNDARY_STYLE = "\x1b[2m"
LEFT_OUT_ON_SCREEN = 10  # rows per list; the HTML page shows all rows of the overview
# Shown as ⟨U+...⟩, as they move the cursor, hide text or reorder it. Newline and tab are kept.
_HIDDEN = (
    *(code for code in range(0xA0) if (code < 0x20 or code >= 0x7F) and chr(code) not in "\n\t"),
    *(0x061C, 0x200B, 0x200E, 0x200F, 0x2060, 0xFEFF),
    *range(0x2028, 0x202F),
    *range(0x2066, 0x206A),
    *range(0xD800, 0xE000),  # surrogates, which cannot be encoded
)
_VISIBLE = {code: f"⟨U+{code:04X}⟩" for code in _HIDDEN}
_VISIBLE_AMONG_MARKS = _VISIBLE | {ord(mark): f"⟨U+{ord(mark):04X}⟩" for mark in LEFT + RIGHT}


@dataclasses.dataclass(frozen=True)
class Piece:
    """The shortest run of tokens of one weight that decodes to whole characters.

    Attributes:
        weight: weight of the tokens in the loss; 0 = not trained.
        special: whether this is a single token that is not text, such as <|im_end|>.
    """

    text: str
    weight: float
    special: bool = False


@dataclasses.dataclass(frozen=True)
class Segment:
    """One example, with a line that describes it."""

    label: str
    pieces: Sequence[Piece]


@dataclasses.dataclass(frozen=True)
class Block:
    """One example, or the examples of one packed row."""

    title: str
    segments: Sequence[Segment]


@dataclasses.dataclass(frozen=True)
class Overview:
    """The content of the report on a config's data.

    Attributes:
        title: one line.
        table: the sources, as lines of columns.
        packing: lines about the packed rows.
        charts: (title, values, unit) of each histogram.
        examples: examples shown one by one.
        rows: packed rows, as the model gets them.
        left_out: (heading, number of rows, first rows with the reason) of each list of rows that
            are not trained.
        verdict: the last lines.
        is_refused: whether training would refuse to start.
        is_lossy: whether training would leave out more than a user expects, see `losses`.
    """

    title: str
    table: str
    packing: Sequence[str]
    charts: Sequence[tuple[str, np.ndarray, str]]
    examples: Sequence[Block]
    rows: Sequence[Block]
    left_out: Sequence[tuple[str, int, Sequence[str]]]
    verdict: Sequence[str]
    is_refused: bool
    is_lossy: bool = False


def pieces(tokenizer, ids: Sequence[int], weights: Sequence[float]) -> list[Piece]:
    """Decode an example token by token; tokens that share a character form one piece.

    U+FFFD appears only if the text contains it, if the tokens are not UTF-8, or if the tokens of a
    character differ in weight.

    Args:
        tokenizer: a fast tokenizer.
        ids, weights: token ids and loss weights of one example, not shifted.
    """
    backend = tokenizer.backend_tokenizer
    added = set(tokenizer.added_tokens_decoder)

    def is_alone(token: int) -> bool:
        return token in added or backend.id_to_token(token) is None

    def decode(part: Sequence[int]) -> str:
        return backend.decode(list(part), skip_special_tokens=False)

    decoded: list[Piece] = []
    weighted = zip(ids, weights, strict=True)
    context: list[int] = []  # previous tokens: decoders drop the space of a first word
    for (special, weight), run in itertools.groupby(
        weighted, key=lambda pair: (is_alone(int(pair[0])), float(pair[1]))
    ):
        left = [int(token) for token, _ in run]
        while left:
            take, text = _whole_characters(decode, context, left, 1 if special else len(left))
            if backend.id_to_token(left[0]) is None:  # decoding would silently drop it
                text = f"⟨token {left[0]}⟩"
            decoded.append(Piece(text, weight, special))
            context, left = left[:take], left[take:]
    return decoded


def _whole_characters(
    decode: Callable[[Sequence[int]], str], context: list[int], left: list[int], most: int
) -> tuple[int, str]:
    """Return the number of tokens of `left` to take, at most `most`, and their text."""
    before = decode(context) if context else ""
    take = 1
    while True:
        take = min(take, most)
        text = decode(context + left[:take])
        # A character split between context and `left` would change the text of the context.
        text = text.removeprefix(before) if text.startswith(before) else decode(left[:take])
        if take == most or not text.endswith("\ufffd"):
            return take, text
        # Add tokens one by one as long as a character may need them. Then double, so that a long
        # text of U+FFFD does not take quadratic time.
        take = take + 1 if take < 8 else 2 * take


def visible(text: str, among_marks: bool = False) -> str:
    """Replace the characters that would move, hide or reorder others with ⟨U+...⟩.

    Args:
        among_marks: whether to replace the mark characters LEFT and RIGHT too.
    """
    return text.translate(_VISIBLE_AMONG_MARKS if among_marks else _VISIBLE)


# ---- terminal --------------------------------------------------------------------------------


def screen(overview: Overview, color: bool, boundaries: bool) -> Iterator[str]:
    """Yield the parts of the overview as text for a terminal, the verdict last."""
    yield visible(overview.table) + "\n"
    if overview.packing:
        yield "\n".join(overview.packing) + "\n"
    blocks = [*overview.examples, *overview.rows]
    if blocks:
        yield legend(color, boundaries) + "\n"
    for block in blocks:
        yield to_text(block, color, boundaries)
    for heading, count, lines in overview.left_out:
        shown = [visible(line, among_marks=not color) for line in lines[:LEFT_OUT_ON_SCREEN]]
        more = [f"... and {count - len(shown):,} more"] if count > len(shown) else []
        yield "\n".join([heading, *shown, *more]) + "\n"
    yield "\n".join(visible(line) for line in overview.verdict)


def legend(color: bool, boundaries: bool) -> str:
    """Return one line that explains the marks of `to_text`."""
    trained = _styled("trains", (True, False), color) if color else f"{LEFT}trains{RIGHT}"
    special = _styled("special token", (False, True), color)
    parts = [trained, *([special] if color else []), f"{NEWLINE} newline"]
    return "legend: " + "  ".join(parts + [f"{BETWEEN} token boundary"] * boundaries)


def to_text(block: Block, color: bool, boundaries: bool) -> str:
    """Return a block for a terminal: its title, then the label and text of each segment."""
    lines = [_heading(block.title, "━", color)]
    for segment in block.segments:
        if segment.label:
            lines.append(_heading(segment.label, "─", color))
        # Newlines at the end already appear as NEWLINE marks.
        lines.append(segment_text(segment.pieces, color, boundaries).rstrip("\n"))
    return "\n".join(lines) + "\n"


def segment_text(pieces: Sequence[Piece], color: bool, boundaries: bool) -> str:
    """Return the text of the pieces, with trained text colored or between marks."""
    parts = []
    for weight, run in itertools.groupby(pieces, key=lambda piece: piece.weight):
        trains = weight != 0
        inner = []
        for special, same in itertools.groupby(run, key=lambda piece: piece.special):
            texts = [visible(piece.text, among_marks=not color) for piece in same]
            joined = (BETWEEN if boundaries else "").join(texts)
            inner.append(_styled(joined, (trains, special), color))
        text = (BETWEEN if boundaries else "").join(inner)
        if trains and not color:
            text = f"{LEFT}{text}{RIGHT}"
        parts.append(text + (f"×{weight:g}" if weight not in (0, 1) else ""))
    return (BETWEEN if boundaries else "").join(parts)


def _styled(text: str, style: tuple[bool, bool], color: bool) -> str:
    """Style each line separately, so that no color runs to the margin; newlines are visible."""
    lines = text.split("\n")
    lines = [line + NEWLINE for line in lines[:-1]] + lines[-1:]
    if color and STYLES[style]:
        lines = [STYLES[style] + line + RESET if line else "" for line in lines]
    return "\n".join(lines)


def _heading(text: str, rule: str, color: bool) -> str:
    line = f"{rule * 3} {visible(text, among_marks=not color)} "
    line += rule * max(3, 78 - len(line))
    return f"{BOUNDARY_STYLE}{line}{RESET}" if color else line


# ---- HTML ------------------------------------------------------------------------------------

CSS = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1f2328;--soft:#656d76;--card:#f6f8fa;--line:#d0d7de;
--mark:#aceebb;--part:#fae17d;--special:#8250df;--bar:#2da44e;--bad:#cf222e;--amber:#bf8700}
@media(prefers-color-scheme:dark){:root{--bg:#0d1117;--fg:#e6edf3;--soft:#8b949e;--card:#161b22;
--line:#30363d;--mark:#1a5c2c;--part:#6b5300;--special:#d2a8ff;--bar:#3fb950;--bad:#ff7b72;--amber:#d29922}}
body{margin:2rem auto;padding:0 1rem;max-width:72rem;background:var(--bg);color:var(--fg);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem}h3{font-size:1rem;margin:1.2rem 0 .3rem}
p,small,.label{color:var(--soft)}
.verdict{color:inherit;border-left:4px solid var(--bar);padding:.3rem .9rem;background:var(--card)}
.bad{border-color:var(--bad)}.amber{border-color:var(--amber)}
.text,.table{white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.55 ui-monospace,monospace;
background:var(--card);border:1px solid var(--line);border-radius:6px;padding:.7rem .9rem;margin:0}
.table{white-space:pre;overflow-x:auto}
.label{margin:.5rem 0 .2rem;font-size:13px}
mark{background:var(--mark);color:inherit;border-radius:2px}mark.part{background:var(--part)}
.text b,.legend b{color:var(--special);font-weight:600}
.nl::before{content:"⏎";color:var(--soft)}i{border-left:1px solid var(--soft);margin-right:1px}
.charts{display:flex;flex-wrap:wrap;gap:1.5rem}figure{margin:0}svg{display:block}
svg rect{fill:var(--bar)}figcaption,small{font-size:12px;color:var(--soft)}
"""


def segment_html(pieces: Sequence[Piece], boundaries: bool) -> str:
    """Return the text of the pieces, with trained text in <mark> and special tokens in <b>."""
    between = "<i></i>" if boundaries else ""
    parts = []
    for weight, run in itertools.groupby(pieces, key=lambda piece: piece.weight):
        inner = []
        for special, same in itertools.groupby(run, key=lambda piece: piece.special):
            text = between.join(_escaped(piece.text) for piece in same)
            inner.append(f"<b>{text}</b>" if special else text)
        text = between.join(inner)
        if weight == 1:
            text = f"<mark>{text}</mark>"
        elif weight:
            text = f'<mark class="part" title="weight {weight:g}">{text}</mark>'
        parts.append(text)
    return between.join(parts)


def block_html(block: Block, boundaries: bool) -> str:
    """Return a block with its heading and the labels of its segments."""
    parts = [f"<h3>{_escaped(block.title)}</h3>"]
    for segment in block.segments:
        if segment.label:
            parts.append(f'<div class="label">{_escaped(segment.label)}</div>')
        parts.append(f'<div class="text">{segment_html(segment.pieces, boundaries)}</div>')
    return "\n".join(parts)


def chart_html(title: str, values: np.ndarray, unit: str, bins: int = 32) -> str:
    """Return a histogram as inline SVG; the tooltip of each bar has its range and count."""
    if not len(values):
        return ""
    counts, edges = np.histogram(values, bins=bins, range=(0, max(float(values.max()), 1e-9)))
    width, height, unit = 320, 80, _plain(unit)
    step = width / len(counts)
    bars = []
    for number, count in enumerate(counts.tolist()):
        if not count:
            continue
        tall = max(height * count / counts.max(), 1.0)  # a count of 1 in a million stays visible
        low, high = (f"{edge:.4g}" for edge in edges[number : number + 2])
        bars.append(
            f'<rect x="{number * step:.1f}" y="{height - tall:.1f}" width="{step - 1:.1f}" '
            f'height="{tall:.1f}"><title>{low} to {high}{unit}: {count:,}</title></rect>'
        )
    return (
        f"<figure><figcaption>{_escaped(title)}</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">'
        f"{''.join(bars)}</svg><small>0 to {edges[-1]:.4g}{unit}; highest bar "
        f"{counts.max():,}</small></figure>"
    )


def page(overview: Overview, boundaries: bool) -> str:
    """Return the overview as a self-contained HTML page."""
    kind = "bad" if overview.is_refused else "amber" if overview.is_lossy else "good"
    verdict = "".join(f"<div>{_plain(line)}</div>" for line in overview.verdict)
    parts = [f'<div class="verdict {kind}">{verdict}</div>']
    parts += ["<h2>Sources</h2>", f'<div class="table">{_plain(overview.table)}</div>']
    if overview.packing:
        parts += ["<h2>Packing</h2>"]
        parts += [f'<div class="table">{_plain(chr(10).join(overview.packing))}</div>']
    charts = [chart_html(*chart) for chart in overview.charts]
    parts.append(f'<div class="charts">{"".join(charts)}</div>')
    for heading, blocks in (("Examples", overview.examples), ("Packed rows", overview.rows)):
        if blocks:
            parts += [f"<h2>{heading}</h2>", legend_html(boundaries)]
            parts += [block_html(block, boundaries) for block in blocks]
    for heading, count, lines in overview.left_out:
        parts.append(f"<h2>{_plain(heading)}</h2>")
        parts.append(f'<div class="table">{_plain(chr(10).join(lines))}</div>')
        if count > len(lines):
            parts.append(f"<p>... and {count - len(lines):,} more</p>")
    title, body = _plain(overview.title), "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="generator" content="jax_sft">'  # `outputs` recognizes our pages by this
        f"<title>{title}</title><style>{CSS}</style></head>\n"
        f"<body><h1>{title}</h1>\n{body}\n</body></html>\n"
    )


def legend_html(boundaries: bool) -> str:
    """Return one line that explains the marks of the page."""
    shown = '<p class="legend"><mark>trains</mark> &nbsp; <mark class="part">trains with another '
    shown += "weight than 1</mark> &nbsp; <b>special token</b> &nbsp; ⏎ newline"
    return shown + (" &nbsp; <i></i>token boundary</p>" if boundaries else "</p>")


def _plain(text: str) -> str:
    """Escape our own text for HTML; newlines are kept."""
    return html.escape(visible(text))


def _escaped(text: str) -> str:
    """Escape text of the data for HTML; newlines are kept and made visible."""
    return _plain(text).replace("\n", '<span class="nl">\n</span>')
