"""Render a plan as text for a terminal and as a self-contained HTML page.

In: the dict of plan.json, see `plan_tables.Plan`. Called by `plan`.
"""

import html
import textwrap
from collections.abc import Iterator, Sequence

from jax_sft.report import data_page
from jax_sft.report.plan_tables import Bar, Plan, Table, bars, facts, tables, verdict

WIDTH = 99  # columns of the text

# ---- terminal ------------------------------------------------------------------------------------


def as_text(plan: Plan) -> str:
    """Return the plan as lines of at most WIDTH columns, with the verdict first and last."""
    first, _ = verdict(plan)
    blocks = [_wrapped(first)]
    blocks.append("\n".join(_wrapped(text, f"{name:<9} ") for name, text in facts(plan)))
    blocks += [_laid_out(table) for table in tables(plan)]
    for heading, lines in _lists(plan):
        blocks.append("\n".join([heading, *(_wrapped(line, "  - ") for line in lines)]))
    return "\n\n".join([*blocks, _wrapped(first)]) + "\n"


def _lists(plan: Plan) -> Iterator[tuple[str, Sequence[str]]]:
    predicted = plan.get("predicted")
    lists = [
        ("WARNINGS", plan["warnings"]),
        ("What to change", plan["advice"]),
        ("Assumed in what is predicted", predicted["assumptions"] if predicted else []),
    ]
    yield from ((heading, lines) for heading, lines in lists if lines)


def _wrapped(text: str, before: str = "") -> str:
    return "\n".join(
        textwrap.wrap(
            _line(text), WIDTH, initial_indent=before, subsequent_indent=" " * len(before)
        )
    )


def _line(text: str) -> str:
    """Return external text on one line, without characters that move the cursor."""
    return data_page.visible(" ".join(text.split()))


def _laid_out(table: Table) -> str:
    cells = [[_line(cell) for cell in row] for row in (table.head, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for column in (table.flexible, *sorted(table.text, key=lambda at: -widths[at])):
        over = sum(widths) + 2 * len(widths) - WIDTH
        widths[column] = max(widths[column] - max(over, 0), min(widths[column], 8))
    lines = [table.title]
    for row in cells:
        shown = [
            _clipped(cell, width).ljust(width) if at in table.text else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(shown)).rstrip())
    return "\n".join([*lines, *([_wrapped(table.note, "  ")] if table.note else [])])


def _clipped(cell: str, width: int) -> str:
    return cell if len(cell) <= width else cell[: width - 1] + "…"


# ---- HTML ----------------------------------------------------------------------------------------

CSS = """
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:14px;margin:.3rem 0}
th,td{padding:.2rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap;
font-variant-numeric:tabular-nums}
th{color:var(--soft);font-weight:600}th.t,td.t{text-align:left}td.w{white-space:normal;min-width:9rem}
.bar{display:flex;height:1.6rem;border:1px solid var(--line);border-radius:6px;overflow:hidden;
background:var(--card)}
.bar span{min-width:1px}.keys{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;font-size:14px;
list-style:none;padding:0;margin:.4rem 0}
.keys i{display:inline-block;width:.8rem;height:.8rem;border:0;border-radius:2px;margin-right:.4rem}
.p0{background:#1f6feb}.p1{background:#8250df}.p2{background:#bf8700}.p3{background:#2da44e}
.p4{background:#cf222e}.p5{background:#6e7781}
.warn{border-left:4px solid #bf8700;padding:.1rem .9rem;background:var(--card)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem;margin:1rem 0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}li{overflow-wrap:anywhere}
"""
_NUM_COLORS = 6


def render(plan: Plan) -> str:
    """Return the plan as a whole page with the verdict on top."""
    first, fits = verdict(plan)
    head, _, rest = first.partition(":")
    kind = "good" if fits else "bad"
    title = _plain(f"Plan: {plan['target']['num_devices']} x {plan['target']['chip']}")
    parts = [
        f'<div class="verdict {kind}"><b>{_plain(head)}</b>{_plain(rest and ":" + rest)}</div>'
    ]
    named = "".join(f"<dt>{_plain(name)}</dt><dd>{_plain(text)}</dd>" for name, text in facts(plan))
    parts.append(f"<dl>{named}</dl>")
    lists = dict(_lists(plan))
    assumed = lists.pop("Assumed in what is predicted", [])
    parts += [_list_html(heading, lines, "warn") for heading, lines in lists.items()]
    parts += [_bar_html(bar) for bar in bars(plan)]
    parts += [_table_html(table) for table in tables(plan)]
    if assumed:
        parts.append(_list_html("Assumed in what is predicted", assumed, ""))
    parts.append("<p>Compiled, not run: every number of memory and time here is predicted.</p>")
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="generator" content="jax_sft">'  # `outputs` recognizes our pages by this
        f"<title>{title}</title><style>{data_page.CSS}{CSS}</style></head>\n"
        f"<body><h1>{title}</h1>\n{body}\n</body></html>\n"
    )


def _bar_html(bar: Bar) -> str:
    """Return a stacked bar with a legend of its parts below.

    If the parts exceed the whole, they are scaled down to fill the bar.
    """
    scale = max(bar.whole, sum(size for _, size, _ in bar.parts)) or 1.0
    blocks, keys = [], []
    for number, (name, size, words) in enumerate(bar.parts):
        color = f"p{number % _NUM_COLORS}"
        label = f"{_plain(name)} {_plain(words)}"
        width = f"width:{100 * size / scale:.3f}%"
        blocks.append(f'<span class="{color}" style="{width}" title="{label}"></span>')
        keys.append(f'<li><i class="{color}"></i>{label}</li>')
    keys.append(f"<li>{_plain(bar.rest)}</li>")
    return (
        f'<h2>{_plain(bar.title)}</h2><div class="bar">{"".join(blocks)}</div>'
        f'<ul class="keys">{"".join(keys)}</ul>'
    )


def _table_html(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        shown = []
        for at, cell in enumerate(cells):
            classes = ["t"] * (at in table.text) + ["w"] * (
                at == table.flexible and at in table.text
            )
            kind = f' class="{" ".join(classes)}"' if classes else ""
            shown.append(f"<{tag}{kind}>{_plain(cell)}</{tag}>")
        return f"<tr>{''.join(shown)}</tr>"

    body = "\n".join(row(cells, "td") for cells in table.rows)
    note = f"<p>{_plain(table.note)}</p>" if table.note else ""
    return (
        f'<h2>{_plain(table.title)}</h2><div class="scroll"><table>'
        f"<thead>{row(table.head, 'th')}</thead><tbody>{body}</tbody></table></div>{note}"
    )


def _list_html(heading: str, lines: Sequence[str], kind: str) -> str:
    items = "".join(f"<li>{_plain(line)}</li>" for line in lines)
    return f'<h2>{_plain(heading)}</h2><div class="{kind}"><ul>{items}</ul></div>'


def _plain(text: str) -> str:
    return html.escape(data_page.visible(text))
