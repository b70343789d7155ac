"""What becomes of every example: hand-made arrays, counts by hand, the report on screen."""

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from jax_sft import config, tiny
from jax_sft.data.chat import encoding
from jax_sft.data.tokens import cache, losses
from jax_sft.data.tokens.prepare import (
    describe,
    fingerprint,
    fit_length,
    percentiles,
    prepare,
    table,
)
from tests import inputs

# The byte tokenizer makes one token per byte and one of each <|im_start|> and <|im_end|>.
FRAME = len("^user\n" + "$\n" + "^assistant\n" + "$\n")  # of a question and an answer


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.write_tokenizer(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    found = config.default().data
    found.cache_dir = str(tmp_path / "cache")
    found.num_workers = 1
    found.max_lost = 1.0  # these data are made to be left out
    return found


def cfg_data(seq_len: int, overlong: str):
    found = config.default().data
    found.seq_len, found.overlong = seq_len, overlong
    return found


def source(file: Path, rows: list, **changes):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return inputs.source(file, **changes)


def pair(prompt: int, response: int) -> dict:
    """A row of a question and an answer of so many letters."""
    return {"prompt": "p" * prompt, "response": "r" * response}


def make_store(
    tmp_path: Path,
    weights: Sequence[Sequence[float]],
    format: str = "messages",
    num_cut=None,
    rows=None,
) -> cache.Store:
    """A store of examples with these weights; the ids count through them all."""
    (tmp_path / "errors.jsonl").write_text("")
    lengths = [len(one) for one in weights]
    bounds = np.cumsum([0, *lengths])
    files = [{"name": "a.jsonl", "first_row": 0, "unit": "line"}]
    rows = np.array(range(len(weights)) if rows is None else rows, np.int64)
    num_rows = int(rows.max(initial=-1)) + 1
    return cache.Store(
        folder=tmp_path,
        root=Path("root"),
        meta={
            **{"key": "k", "format": format, "format_reason": "", "refused": {}},
            **{"files": files, "rows": num_rows, "highest_id": int(bounds[-1]) - 1},
            **{"turn_ends": {"1": len(weights)}},
        },
        cached=True,
        ids=np.arange(bounds[-1], dtype=np.int32),
        weights=np.array(list(itertools.chain(*weights)), np.float32),
        starts=bounds[:-1],
        stops=bounds[1:],
        rows=rows,
        places=rows + 1,
        num_cut=np.array(num_cut or [0] * len(weights), np.int32),
        trained=np.array([np.count_nonzero(one[1:]) for one in weights], np.int32),
    )


# ---- lengths ------------------------------------------------------------------------------------


def test_seq_len_counts_inputs_which_are_one_less_than_tokens(tmp_path):
    store = make_store(tmp_path, [[0, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1, 1]])
    for overlong in ("drop", "truncate", "truncate_history"):
        fit = fit_length(store, 3, overlong)
        assert (fit.kept.tolist(), fit.stops.tolist()) == ([0, 1], [3, 7])
        assert (fit.num_overlong, fit.num_untrained, fit.num_cut) == (1, 0, 0)
    assert fit_length(store, 4, "raise").kept.tolist() == [0, 1, 2]


def test_raise_names_the_first_example_that_is_too_long(tmp_path):
    store = make_store(tmp_path, [[0, 1], [0, 1, 1, 1], [0, 1, 1, 1, 1]])
    with pytest.raises(ValueError) as raised:
        fit_length(store, 2, "raise", "main")
    message = str(raised.value)
    assert message.startswith("root/a.jsonl, line 2 (source 'main'): 3 tokens do not fit")
    assert "data.seq_len = 2 (the first of 2 examples)" in message and "data.overlong" in message


def test_an_example_trains_only_if_a_target_does(tmp_path):
    store = make_store(tmp_path, [[1, 0, 0], [0, 0, 1], [0, 0, 0], [1], [], [0, 0.5, 0]])
    fit = fit_length(store, 8, "drop")
    assert (fit.kept.tolist(), fit.trained.tolist()) == ([1, 5], [1, 1])
    assert (fit.num_untrained, fit.num_overlong) == (4, 0)


@pytest.mark.parametrize(
    "weights,seq_len,kept",
    [
        ([0, 0, 1, 1, 0, 0, 1, 1], 5, 4),  # the second run does not fit
        ([0, 0, 1, 1, 0, 0, 1, 1], 6, 4),  # its end does not
        ([0, 0, 1, 1, 0, 0, 1, 1, 0], 7, 8),  # it does: only what is behind it is cut
        ([0, 0, 1, 1, 0, 0, 0, 0, 0], 3, 4),  # the first run ends with the last token that fits
        ([0, 0, 1, 1, 0, 0, 0, 0, 0], 2, None),  # and here one before its end
        ([0, 0, 0.5, 0.25, 0, 1, 1, 1], 4, 4),  # weights may differ within a run
        ([1, 0, 0, 0, 1, 1, 1, 1], 4, None),  # a first token alone is no target
        ([1, 1, 0, 0, 1, 1, 1, 1], 4, 2),
        ([1, 1, 1, 1, 1, 1, 1, 1], 6, None),
        ([0, 0, 0, 0, 0, 0, 0, 1], 6, None),
    ],
)
def test_truncation_ends_with_the_last_whole_run_that_fits(tmp_path, weights, seq_len, kept):
    store = make_store(tmp_path, [[0, 1], weights, [0, 1]])
    fit = fit_length(store, seq_len, "truncate")
    if kept is None:
        assert (fit.kept.tolist(), fit.num_overlong, fit.num_cut) == ([0, 2], 1, 0)
    else:
        assert fit.kept.tolist() == [0, 1, 2]
        assert (fit.num_overlong, fit.num_cut) == (0, 1)
        assert fit.stops[1] == 2 + kept
        assert fit.trained[1] == np.count_nonzero(weights[1:kept])


def whole_runs(weights: tuple[int, ...]) -> list[tuple[int, int]]:
    """Where the runs of ones start and stop, by their text."""
    text = "".join(map(str, weights)) + "0"
    starts = [i for i in range(len(weights)) if text[i] == "1" and text[:i][-1:] != "1"]
    return [(start, text.index("0", start)) for start in starts]


def test_truncation_equals_its_definition_on_every_short_example(tmp_path):
    examples = [one for n in range(2, 10) for one in itertools.product((0, 1), repeat=n)]
    store = make_store(tmp_path, [list(one) for one in examples])
    for seq_len in range(1, 9):
        expected = {}
        for number, one in enumerate(examples):
            if len(one) <= seq_len + 1:
                stop = len(one)
            else:
                stop = max((b for _, b in whole_runs(one) if b <= seq_len + 1), default=0)
            if any(one[1:stop]):
                expected[number] = (int(store.starts[number]) + stop, sum(one[1:stop]))
        fit = fit_length(store, seq_len, "truncate")
        found = zip(fit.kept.tolist(), fit.stops.tolist(), fit.trained.tolist(), strict=True)
        assert {number: rest for number, *rest in found} == {
            number: list(rest) for number, rest in expected.items()
        }
        assert len(fit.kept) + fit.num_overlong + fit.num_untrained == len(examples)


def test_text_is_cut_at_seq_len(tmp_path):
    store = make_store(tmp_path, [[1] * 9, [1] * 4, [1, 0, 0, 0, 1, 1]], format="text")
    fit = fit_length(store, 3, "truncate")
    assert (fit.kept.tolist(), fit.stops.tolist(), fit.trained.tolist()) == (
        [0, 1],
        [4, 13],
        [3, 3],
    )
    assert (fit.num_cut, fit.num_untrained, fit.num_overlong) == (1, 1, 0)


# ---- report -------------------------------------------------------------------------------------


def test_percentiles_are_lengths_that_occur():
    lengths = np.arange(1, 201)[::-1]
    assert percentiles(lengths) == {"p5": 10, "p50": 100, "p95": 190, "p99": 198, "max": 200}
    assert percentiles(np.array([7])) == {"p5": 7, "p50": 7, "p95": 7, "p99": 7, "max": 7}
    few = percentiles(np.array([30, 10, 20]))
    assert few == {"p5": 10, "p50": 20, "p95": 30, "p99": 30, "max": 30}
    assert percentiles(np.array([], np.int64)) == {}


def test_the_report_counts_rows_examples_and_tokens_by_hand(tmp_path):
    weights = [
        *([0, 1, 1], [0, 0, 1]),  # row 0 became two examples
        [0, 0, 0],  # row 1 has nothing that trains
        [0, 1, 0, 1, 1, 1],  # row 3 is cut after 2 tokens, and loses 3 that train
        [0, 1, 1, 1, 1, 1, 1],  # row 4 does not fit, and loses 6
        [0, 1, 1, 1],  # row 5 was cut by its history
    ]
    rows, num_cut = [0, 0, 1, 3, 4, 5], [0, 0, 0, 0, 0, 2]
    store = make_store(tmp_path, weights, rows=rows, num_cut=num_cut)
    store.meta["refused"]["no answer"] = 1
    error = {"row": 2, "file": "a.jsonl", "place": "line 3", "error": "no answer"}
    (tmp_path / "errors.jsonl").write_text(json.dumps(error) + "\n")
    report = describe(store, fit_length(store, 3, "truncate"), cfg_data(3, "truncate"))
    assert report == {
        **{"files": ["a.jsonl"], "format": "messages", "format_reason": ""},
        **{"rows": 6, "kept": 4, "rows_kept": 3, "split": 1},
        "dropped": {"overlong": 1, "no_trained_token": 1, "bad_row": 1},
        "truncated": 2,
        "turns_left_out": 2,
        "tokens": 2 + 2 + 1 + 3,
        "trained_tokens": 2 + 1 + 1 + 3,
        "lost_trained_tokens": 3 + 6,
        "highest_id": 25,
        "turn_ends": {"1": 6},
        "left_out": {"rows": 0.5, "trained_tokens": 9 / 16, "turns": 2 / 8},
        "cures": [
            "data.seq_len = 64 would keep all that is too long",
            "1 rows cannot be used as they are: inspect lists them",
            "1 examples have no token that trains: see data.turns, and train and weight of their "
            "messages",
        ],
        "lengths": {"p5": 2, "p50": 2, "p95": 6, "p99": 6, "max": 6},
        "longest": [
            {"row": 4, "where": "root/a.jsonl, line 5", "tokens": 6},
            {"row": 3, "where": "root/a.jsonl, line 4", "tokens": 5},
            {"row": 5, "where": "root/a.jsonl, line 6", "tokens": 3},
            {"row": 0, "where": "root/a.jsonl, line 1", "tokens": 2},
            {"row": 0, "where": "root/a.jsonl, line 1", "tokens": 2},
        ],
        "bad_row_reasons": {"no answer": 1},
        "bad_rows": [{"row": 2, "where": "root/a.jsonl, line 3", "error": "no answer"}],
    }


def test_the_report_of_real_files_is_that_counted_by_hand(data, model, tmp_path):
    data.seq_len, data.on_bad_row = FRAME + 10, "skip"
    rows = [pair(5, 5), pair(5, 6), {"prompt": "x"}, pair(6, 6)]
    sources = {
        "b": source(tmp_path / "b.jsonl", rows),
        "a": source(tmp_path / "a.jsonl", [{"text": "abc"}]),
    }
    examples = prepare(sources, model, data, progress=False)
    report = examples.report
    assert list(report) == list(examples.sources) == ["a", "b"]
    assert json.loads(json.dumps(report)) == report
    b = report["b"]
    assert (b["rows"], b["kept"], b["rows_kept"], b["split"], b["truncated"]) == (4, 2, 2, 0, 0)
    assert b["dropped"] == {"overlong": 1, "no_trained_token": 0, "bad_row": 1}
    # Inputs: all tokens but the last. What trains: the answer and its <|im_end|>.
    assert (b["tokens"], b["trained_tokens"]) == (2 * FRAME + 10 + 11 - 2, 5 + 1 + 6 + 1)
    assert b["lost_trained_tokens"] == 6 + 1
    assert b["lengths"]["max"] == FRAME + 12 - 1
    assert b["longest"][0] == {
        **{"row": 3, "where": f"{tmp_path / 'b.jsonl'}, line 4", "tokens": FRAME + 11},
    }
    assert b["bad_rows"][0]["where"] == f"{tmp_path / 'b.jsonl'}, line 3"
    assert (b["path"], b["files"]) == (str(tmp_path / "b.jsonl"), ["b.jsonl"])
    assert (b["format"], report["a"]["format"]) == ("prompt_response", "text")
    assert b["cached"] is False and b["seconds"] >= 0
    assert prepare(sources, model, data, progress=False).report["b"]["cached"] is True


def test_examples_hold_what_is_kept_in_order_of_source_and_row(data, model, tmp_path):
    data.seq_len = FRAME + 10
    sources = {
        "b": source(tmp_path / "b.jsonl", [pair(5, 5), pair(50, 5), pair(5, 6)]),
        "a": source(tmp_path / "a.jsonl", [pair(n, 1) for n in (3, 4, 2)]),
    }
    examples = prepare(sources, model, data, progress=False)
    assert examples.sources == {"a": range(0, 3), "b": range(3, 5)}
    assert examples.source_of.tolist() == [0, 0, 0, 1, 1]
    assert examples.rows.tolist() == [0, 1, 2, 0, 2]
    assert examples.lengths.tolist() == [FRAME + n for n in (3, 4, 2, 9, 10)]
    tokenizer = encoding.load_tokenizer(model)
    shown = [tokenizer.decode(examples[n].tokens) for n in range(5)]
    assert [text.count("p") for text in shown] == [3, 4, 2, 5, 5]
    for n in range(5):
        one = examples[n]
        trained = tokenizer.decode(one.targets[one.weights > 0])
        assert trained == "r" * (1, 1, 1, 5, 6)[n] + "<|im_end|>"


def test_a_truncated_conversation_ends_with_a_whole_answer(data, model, tmp_path):
    turns = [
        {"role": role, "content": text}
        for role, text in (("user", "a"), ("assistant", "bb"), ("user", "c"), ("assistant", "dddd"))
    ]
    data.overlong = "truncate"
    for seq_len in range(1, 2 * FRAME + 10):
        data.seq_len = seq_len
        sources = {"main": source(tmp_path / "a.jsonl", [{"messages": turns}])}
        one_turn, two_turns = FRAME + 3 - 1, 2 * FRAME + 8  # without and with the last newline
        if seq_len < one_turn - 1:
            with pytest.raises(ValueError, match="(?s)no example is left.*1 overlong"):
                prepare(sources, model, data, progress=False)
            continue
        examples = prepare(sources, model, data, progress=False)
        tokens = examples.encoded(0).ids
        text = encoding.load_tokenizer(model).decode(tokens)
        expected = one_turn if seq_len < two_turns - 2 else two_turns - (seq_len < two_turns - 1)
        assert len(tokens) == expected and text.rstrip("\n").endswith("<|im_end|>")
        assert examples.report["main"]["truncated"] == (expected < two_turns)


def test_truncate_history_leaves_out_the_oldest_turns(data, model, tmp_path):
    turns = [
        {"role": role, "content": text}
        for role, text in (("user", "a"), ("assistant", "bb"), ("user", "c"), ("assistant", "dddd"))
    ]
    sources = {"main": source(tmp_path / "a.jsonl", [{"messages": turns}])}
    data.overlong, data.seq_len = "truncate_history", FRAME + 5 - 1
    examples = prepare(sources, model, data, progress=False)
    text = encoding.load_tokenizer(model).decode(examples.encoded(0).ids)
    assert text == "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\ndddd<|im_end|>\n"
    assert examples.report["main"]["truncated"] == 1
    data.seq_len = 2 * FRAME + 8 - 1
    assert prepare(sources, model, data, progress=False).report["main"]["truncated"] == 0
    data.seq_len = FRAME + 5 - 2
    with pytest.raises(ValueError, match="1 overlong"):
        prepare(sources, model, data, progress=False)


def test_a_bad_row_raises_or_is_counted_as_the_config_says(data, model, tmp_path):
    sources = {"main": source(tmp_path / "a.jsonl", [pair(1, 1), {"prompt": "x"}])}
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2 \(source 'main'\)"):
        prepare(sources, model, data, progress=False)
    examples = prepare(sources, model, data, progress=False, stop_at_bad_row=False)
    assert examples.report["main"]["dropped"]["bad_row"] == 1
    data.on_bad_row = "skip"
    assert len(prepare(sources, model, data, progress=False)) == 1
    with pytest.raises(ValueError, match="line 2"):
        prepare(sources, model, data, progress=False, stop_at_bad_row=True)


def test_an_empty_source_beside_a_full_one_is_no_error(data, model, tmp_path):
    data.seq_len = FRAME + 10
    sources = {
        "long": source(tmp_path / "b.jsonl", [pair(50, 50)]),
        "short": source(tmp_path / "a.jsonl", [pair(1, 1)]),
    }
    examples = prepare(sources, model, data, progress=False)
    assert examples.sources == {"long": range(0, 0), "short": range(0, 1)}
    assert examples.source_of.tolist() == [1]


def test_nothing_left_shows_where_it_went(data, model, tmp_path):
    data.seq_len = 8
    sources = {"main": source(tmp_path / "a.jsonl", [pair(50, 50)] * 3)}
    with pytest.raises(ValueError) as raised:
        prepare(sources, model, data, progress=False)
    assert "no example is left to use (data.seq_len = 8)" in str(raised.value)
    assert "main: dropped 3 overlong" in str(raised.value)


def test_a_fingerprint_differs_exactly_with_the_examples(data, model, tmp_path):
    def of(rows, folder="here", **changes) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        sources = {"main": source(tmp_path / folder / "a.jsonl", rows, **changes)}
        return fingerprint(prepare(sources, model, data, progress=False))

    rows = [pair(1, 1), pair(2, 2)]
    first = of(rows)
    data.num_workers, data.cache_dir = 2, str(tmp_path / "other host")
    assert of(rows, folder="there") == first
    assert len({first, of(rows[::-1]), of(rows, limit=1)}) == 3
    data.turns = "last"  # of one turn: all of it
    assert of(rows) == first
    examples = prepare({"main": source(tmp_path / "a.jsonl", rows)}, model, data, progress=False)
    longest = max(len(example.tokens) for example in examples)
    data.seq_len, data.overlong = longest, "drop"
    assert of(rows) == first
    data.seq_len -= 1
    assert of(rows) != first  # one is dropped


def test_the_table_fits_a_screen_and_its_columns_line_up(tmp_path):
    store = make_store(tmp_path, [[0, 1, 1, 1], [0, 1]], format="prompt_completion")
    report = describe(store, fit_length(store, 2, "drop"), cfg_data(2, "drop"))
    report["format_reason"] = "columns 'prompt' and 'completion' " * 5
    huge = report | {"rows": 10**9, "tokens": 123_456_789_012, "trained_tokens": 999_999}
    huge["bad_row_reasons"] = {"field ... must be a string " * 9: 7}
    huge["bad_rows"] = [{"row": 1, "where": "/a/long/path" * 9, "error": "no\nanswer " * 30}]
    lines = table({"a": report, "a very long name of a source": huge}).splitlines()
    assert max(map(len, lines)) <= 100
    head, *data_lines = lines[:3]
    assert head.split()[:4] == ["source", "format", "rows", "examples"]
    assert {len(line) for line in data_lines} == {len(head)}
    assert data_lines[0].split() == ["a", "prompt_completion", *"2 1 1 1 0 1 3 3".split()]
    assert "1.00B 1 123.46B 999,999" in " ".join(data_lines[1].split())
    assert "a: dropped 1 overlong" in lines
    assert "a: 3 trained tokens cut off or dropped" in lines


# ---- data that vanish -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_long", "outcome"), [(0, ""), (1, ""), (3, "warned"), (120, "refused")]
)
def test_above_one_percent_left_out_is_a_warning_and_above_half_an_error(
    data, model, tmp_path, num_long, outcome
):
    data.seq_len, data.max_lost = FRAME + 10, 0.5
    rows = [pair(1, 1)] * (200 - num_long) + [pair(1, 1 + 60)] * num_long
    sources = {"main": source(tmp_path / "a.jsonl", rows)}
    if outcome == "refused":
        with pytest.raises(ValueError, match=r"main leaves out 60.0% of its rows \(120 of 200\)"):
            prepare(sources, model, data, progress=False)
        data.max_lost = 1.0
    report = prepare(sources, model, data, progress=False).report
    share = report["main"]["left_out"]
    assert share["rows"] == num_long / 200 and share["trained_tokens"] >= share["rows"]
    data.max_lost = 0.5
    lines = losses.warnings(report)
    # One row in 200, but of many trained tokens: 14% of them.
    assert bool(lines) == (num_long > 0)
    if num_long:
        # The cure is one that works.
        (seq_len,) = map(int, re.findall(r"data.seq_len = (\d+) would keep all", lines[0]))
        data.seq_len = seq_len
        report = prepare(sources, model, data, progress=False).report
        assert losses.warnings(report) == [] and report["main"]["rows_kept"] == 200


def test_bad_rows_cut_texts_and_left_out_turns_count_as_lost(data, model, tmp_path):
    data.on_bad_row, data.seq_len = "skip", FRAME + 10
    bad = source(tmp_path / "bad.jsonl", [pair(1, 1)] * 8 + [{"prompt": 1, "response": ""}] * 2)
    good = source(tmp_path / "good.jsonl", [pair(1, 1)] * 10)
    report = prepare({"bad": bad, "good": good}, model, data, progress=False).report
    assert report["bad"]["left_out"]["rows"] == 0.2 and not any(report["good"]["left_out"].values())
    first, last = losses.warnings(report)
    assert first.startswith("bad leaves out 20.0% of its rows (2 of 10): 2 rows cannot be used")
    assert last == "in all, 10.0% of the rows and 0.0% of the trained tokens are left out"
    data.overlong, data.seq_len = "truncate", 10
    text = source(tmp_path / "text.jsonl", [{"text": "a" * 40}], format="text")
    report = prepare({"text": text}, model, data, progress=False).report
    assert 0.7 < report["text"]["left_out"]["trained_tokens"] < 0.8
    assert "data.seq_len = 64 would keep all" in losses.warnings(report)[0]
    data.overlong, data.seq_len = "truncate_history", 2 * FRAME
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    long = source(tmp_path / "long.jsonl", [{"messages": turn * 8}])
    report = prepare({"long": long}, model, data, progress=False).report
    assert report["long"]["left_out"]["turns"] > 0.5 and report["long"]["left_out"]["rows"] == 0
    assert "of its turns: a larger data.seq_len" in losses.warnings(report)[0]
    data.max_lost = 0.5
    with pytest.raises(ValueError, match="long leaves out .* of its turns.*data.max_lost = 0.5"):
        prepare({"long": long}, model, data, progress=False)
