"""Files to rows: a row is exactly what the file says, and what is wrong is named, never skipped."""

import csv
import gzip
import io
import json
import os
import pickle
import random
import socket
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jax_sft.data.sources import json_rows, read, tables
from tests import inputs

ROWS = [{"prompt": f"ask {n}", "response": f"answer {n}"} for n in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture
def write(tmp_path):
    """Write a file and describe it as a source; rows are written one per line."""

    def write(content, name: str = "data.jsonl", **options):
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        if isinstance(content, str):
            content = content.encode()
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return inputs.source(file, **options)

    return write


def chunks(source) -> list[read.Chunk]:
    return list(read.chunks(source, read.files(source)))


def records(source) -> list[read.Record]:
    return [record for chunk in chunks(source) for record in read.parse(chunk)]


def rows(source) -> list:
    """The rows of a source without a bad one."""
    found = records(source)
    assert [record.error for record in found] == [""] * len(found)
    return [record.row for record in found]


def errors(source) -> list[str]:
    """What is wrong with a source's rows, after the name of the file."""
    return [
        record.where.rpartition(", ")[2] + " " + record.error
        for record in records(source)
        if record.error
    ]


# ---- which files ---------------------------------------------------------------------------------


def names(source, folder: Path) -> list[str]:
    return [str(file.relative_to(folder)) for file in read.files(source)]


def test_a_folder_gives_its_data_files_sorted_and_nothing_else(write, tmp_path):
    for name in ("b.jsonl", "a.json", "B.PARQUET", "sub/deep/c.csv.gz", "d.ndjson.zst", "e.tsv"):
        write("x", f"data/{name}")
    for name in ("README.md", "README", "LICENSE.txt", "_SUCCESS", "notes.md", ".hidden.jsonl"):
        write("x", f"data/{name}")
    write("x", "data/.git/index.jsonl")
    write("x", "data/dataset_infos.json")
    found = ["B.PARQUET", "a.json", "b.jsonl", "d.ndjson.zst", "e.tsv", "sub/deep/c.csv.gz"]
    folder = tmp_path / "data"
    assert names(inputs.source(folder), folder) == found
    assert names(inputs.source(f"{folder}/"), folder) == found
    assert names(inputs.source(f"{folder}/**"), folder) == found
    assert names(inputs.source(f"{folder}/*.js*"), folder) == ["a.json", "b.jsonl"]
    assert names(inputs.source(f"{folder}/**/*.csv.gz"), folder) == ["sub/deep/c.csv.gz"]


def test_a_data_file_may_be_called_readme_or_state(write, tmp_path):
    for name in ("README.jsonl", "state.json"):
        write("x", f"data/{name}")
    folder = tmp_path / "data"
    assert names(inputs.source(folder), folder) == ["README.jsonl", "state.json"]


def test_a_file_with_the_signs_of_a_glob_in_its_name_is_that_file(write, tmp_path):
    write(ROWS, "a1.jsonl")
    write(ROWS[:1], "a[1].jsonl")
    assert rows(inputs.source(tmp_path / "a[1].jsonl")) == ROWS[:1]
    write(ROWS[1:], "x[1]/a.jsonl")
    assert rows(inputs.source(tmp_path / "x[1]")) == ROWS[1:]


def test_a_path_may_start_at_home_and_lead_through_links(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(ROWS, "real/a.jsonl")
    (tmp_path / "folder").symlink_to(tmp_path / "real")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "real/a.jsonl")
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer/inner").symlink_to(tmp_path / "real")
    for path in ("~/real/a.jsonl", "~/folder", "~/b.jsonl", "~/*.jsonl", "~/outer"):
        assert rows(inputs.source(path)) == ROWS


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.jsonl", "does not exist"),
        ("missing", "does not exist"),
        ("missing/*.jsonl", "has no data file"),
        ("none", "has no data file"),
        ("one/a.txt", r"1 files are of no known kind, such as '.*a.txt': use .jsonl, .ndjson, "),
        ("mixed", r"2 files are of no known kind, such as '.*b.parquet.gz'"),
        ("mixed/*", r"2 files are of no known kind"),
        ("empty", r"'.*b.jsonl' is empty"),
        ("dangling", r"'.*a.jsonl' is a broken link"),
        ("twice", r"'.*a.jsonl' and '.*b.jsonl' are the same file"),
        ("loop", "are the same folder"),
        ("splits", "holds several splits: name one"),
    ],
)
def test_a_path_without_usable_files_is_named(write, tmp_path, path, message):
    for name in ("one/a.txt", "mixed/a.jsonl", "mixed/b.parquet.gz", "mixed/c.txt", "loop/a.jsonl"):
        write("x", name)
    write("x", "none/.a.jsonl")
    write("x", "empty/a.jsonl")
    write("", "empty/b.jsonl")
    write("x", "twice/a.jsonl")
    write("x", "splits/dataset_dict.json")
    (tmp_path / "twice/b.jsonl").symlink_to(tmp_path / "twice/a.jsonl")
    (tmp_path / "loop/again").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling/a.jsonl").symlink_to("nowhere")
    given = str(tmp_path / path)
    with pytest.raises(ValueError, match=f"source.path = {given!r}".replace("*", r"\*")) as raised:
        read.files(inputs.source(given))
    assert raised.match(message)


def test_an_empty_path_is_not_the_working_folder(write, tmp_path, monkeypatch):
    write(ROWS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="source.path is empty"):
        read.files(inputs.source(""))
    assert rows(inputs.source(".")) == ROWS


@pytest.mark.parametrize("option", [{"split": "test"}, {"subset": "main"}, {"revision": "v1"}])
def test_options_of_the_hub_are_not_ignored_for_a_local_path(write, option):
    with pytest.raises(ValueError, match="is a local path, and source.subset, split and revision"):
        read.files(write(ROWS, **option))


# ---- hub -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["owner/name", "owner/name.with-dots_2"])
def test_a_hub_data_set_that_cannot_be_had_is_named(path):
    message = f"source.path = '{path}' is no local path, and no such data set .*Couldn't reach"
    with pytest.raises(ValueError, match=message):
        read.files(inputs.source(path))


@pytest.mark.parametrize("split", ["train[:10%]", "train+test", ""])
def test_a_split_of_the_hub_is_one_whole_split(split):
    with pytest.raises(ValueError, match="must name one split"):
        read.files(inputs.source("owner/name", split=split))


def test_a_hub_data_set_is_read_from_its_cached_files(write, tmp_path, monkeypatch):
    # Objects with other fields in each row: `datasets` stores them as JSON within Arrow.
    calls = [
        {"tools": [{"name": "f", "parameters": {"a": {"b": None}}}], "text": "2024-01-01 x"},
        {"tools": [{"name": "g", "parameters": {"c": [1, "d"]}}], "text": "\u2028"},
    ] * 2
    local = write(calls)
    load_dataset, seen = datasets.load_dataset, []

    def fake(path, **options):
        seen.append((path, options))
        folder = str(tmp_path / "cache")
        return load_dataset("json", data_files=local.path, split="train", cache_dir=folder)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    source = inputs.source("owner/name", subset="main", split="test", revision="v1")
    found = records(source)
    assert [record.row for record in found] == calls
    assert found[1].where.endswith(".arrow, row 2")
    (file,) = read.files(source)
    assert list(datasets.Dataset.from_file(str(file))) == calls  # the way of `datasets` itself
    assert seen[0] == ("owner/name", {"name": "main", "split": "test", "revision": "v1"})
    read.files(inputs.source("owner/name"))
    assert seen[-1] == ("owner/name", {"name": None, "split": "train", "revision": None})


def test_importing_the_reader_does_not_load_datasets():
    code = "import sys, jax_sft.data.sources.read; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- json and jsonl ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.ndjson", LINES.rstrip("\n")),
        ("a.JSONL", LINES.replace("\n", "\r\n")),
        ("a.jsonl", "\ufeff" + LINES.replace("\n", "\n \t\r\n")),
        ("a.json", LINES),
        ("a.json", "\n\n" + LINES),
        ("a.json", "\ufeff" + LINES),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.json", "\ufeff \r\n\t" + json.dumps(ROWS, indent=2) + "\n \r\n"),
    ],
)
def test_json_and_jsonl_give_the_same_rows(write, name, content):
    assert rows(write(content, name)) == ROWS


def test_lines_are_numbered_as_an_editor_does(write):
    found = records(write("\n\n" + LINES.replace("\n", "\n\r\n") + "x\n"))
    assert [record.where.rpartition(", ")[2] for record in found] == [
        *("line 3", "line 5", "line 7"),
        "line 9",
    ]


SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_only_a_newline_ends_a_line(write, name):
    row = {"text": "a".join(SEPARATORS[:3])}  # the others are escaped in JSON
    line = json.dumps(row, ensure_ascii=False)
    assert line.count("\u2028") == 1 and len(line.splitlines()) > 1
    assert rows(write(f"{line}\n{line}\n", name)) == [row, row]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"hello", "is not JSON: Expecting value at character 1"),
        (b'{"prompt": "cut', "is not JSON: Unterminated string starting at character 12"),
        (b'{"a": 1} {"b": 2}', "is not JSON: Extra data at character 10"),
        (b'{"a": 1,}', "is not JSON: "),
        (b"{'a': 1}", "is not JSON: "),
        (b'{"a": "\x01"}', "is not JSON: Invalid control character at character 8"),
        (b'{"a": "\xe9"}', "is not UTF-8: invalid continuation byte at byte 8"),
        (b'{"a": "\xed\xa0\x80"}', "is not UTF-8: "),  # a surrogate
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8: "),
        (b"[1, 2]", "must be an object, not a list"),
        (b'"text"', "must be an object, not a string"),
        (b"null", "must be an object, not null"),
        (b"true", "must be an object, not a boolean"),
        (b"1e5", "must be an object, not a number"),
        (b'{"a": 1, "b": {}, "a": 2}', "cannot be read: key 'a' occurs twice"),
        (b'{"m": [{"c": "x", "c": "y"}]}', "cannot be read: key 'c' occurs twice"),
        pytest.param(b"[" * 20_000 + b"]" * 20_000, "is nested too deeply", id="lists"),
        pytest.param(b'{"a":' * 9999 + b"1" + b"}" * 9999, "is nested too deeply", id="objects"),
        pytest.param(b'{"a": ' + b"1" * 5000 + b"}", "cannot be read: Exceeds the limit", id="int"),
        (b"\xef\xbb\xbf{}", "is not JSON: "),  # a byte order mark within a file
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_bad_line_is_an_error_of_that_row_alone(write, name, line, error):
    good = json.dumps(ROWS[0]).encode()
    found = records(write(good + b"\n\n" + line + b"\n" + good, name))
    assert [record.row for record in found] == [ROWS[0], None, ROWS[0]]
    assert found[1].where.endswith(f"{name}, line 3")
    assert found[1].error.startswith(error)


@pytest.mark.parametrize(
    ("element", "error"),
    [
        (b"hello", "is not JSON: "),
        (b'{"a": 1 "b"}', "is not JSON: "),
        (b"{[}]", "is not JSON: "),
        (b'{"a": "\xe9"}', "is not UTF-8: "),
        (b"[1, [2]]", "must be an object, not a list"),
        (b'"te\\"x]t"', "must be an object, not a string"),
        (b"-1.5", "must be an object, not a number"),
        (b'{"a": 1, "a": 2}', "cannot be read: key 'a' occurs twice"),
        pytest.param(b"[" * 20_000 + b"]" * 20_000, "is nested too deeply", id="lists"),
        pytest.param(b"1" * 5000, "cannot be read: Exceeds the limit", id="int"),
    ],
)
def test_a_bad_element_of_a_list_is_an_error_of_that_row_alone(write, element, error):
    good = json.dumps(ROWS[0]).encode()
    found = records(write(b"[" + good + b",\n" + element + b"," + good + b"]", "a.json"))
    assert [record.row for record in found] == [ROWS[0], None, ROWS[0]]
    assert found[1].where.endswith("a.json, row 2")
    assert found[1].error.startswith(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1},\n{"a": "cut', "line 2: the file ends within the list"),
        ('[{"a": 1},\n{"a": [1, 2}', "line 2: the file ends within the list"),
        ('[\n{"a": 1}\n', "line 3: the file ends within the list"),
        ('[{"a": 1},', "line 1: the file ends within the list"),
        ("[12", "line 1: the file ends within the list"),
        ('[{"a": 1}\n\n{"a": 2}]', "line 3: , or ] is needed where '{' stands"),
        ('[{"a": "\n\n"} or {}]', "line 3: , or ] is needed where 'o' stands"),
        ('[{"a": 1},\n]', "line 2: a value is needed where ']' stands"),
        ("[,]", "line 1: a value or ] is needed where ',' stands"),
        ("[}]", "line 1: a value or ] is needed where '}' stands"),
        ('[{"a": 1}]\n[{"a": 2}]', "line 2: the list has ended where '[' stands"),
        ('[{"a": 1}]}', "line 1: the list has ended where '}' stands"),
    ],
)
def test_a_malformed_list_is_fatal_from_that_place_on(write, content, message):
    source = write(content, "a.json")
    with pytest.raises(ValueError) as raised:
        rows(source)
    assert str(raised.value) == f"source.path = {source.path!r}: {source.path}: {message}"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *[("a.jsonl", "\n \r\n"), ("a.json", "[]"), ("a.json", " [ ]\n"), ("a.json", "  ")],
        *[("a.jsonl", "\ufeff"), ("a.csv", "prompt,response\n"), ("a.csv", "\n\n")],
        *[
            ("a.jsonl.gz", gzip.compress(b"", mtime=0)),
            ("a.tsv.zst", pa.compress(b"", "zstd", asbytes=True)),
        ],
    ],
)
def test_a_file_without_rows_is_named(write, name, content):
    source = write(content, name)
    with pytest.raises(ValueError) as raised:
        rows(source)
    assert str(raised.value) == f"source.path = {source.path!r}: {source.path} has no rows"


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.sampled_from(['"', "\\", '\\"', "]}", "[{", '","', SEPARATORS, "2024-01-01T10:00:00Z"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.lists(st.dictionaries(st.text(), JSON_VALUES, max_size=4), min_size=1, max_size=8)


@settings(max_examples=50, deadline=None)
@given(
    objects=OBJECTS,
    ascii_only=st.booleans(),
    indent=st.none() | st.just(1),
    block=st.integers(1, 200),
)
@example(objects=[{}], ascii_only=True, indent=None, block=1)
def test_any_objects_come_back_as_written(tmp_path_factory, objects, ascii_only, indent, block):
    folder = tmp_path_factory.mktemp("any")
    lines = "\n".join(json.dumps(one, ensure_ascii=ascii_only) for one in objects)
    (folder / "a.jsonl").write_bytes(lines.encode())
    whole = json.dumps(objects, ensure_ascii=ascii_only, indent=indent)
    (folder / "a.json").write_bytes(whole.encode())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(read, "BLOCK", block)  # elements of many blocks, blocks of many elements
        for name in ("a.jsonl", "a.json"):
            assert repr(rows(inputs.source(folder / name))) == repr(objects)


@settings(max_examples=300, deadline=None)
@given(
    content=st.text(st.sampled_from('[]{},:"\\ \n1ae\u00e9'), max_size=40),
    block=st.integers(1, 50),
)
@example(content='{"a":"\\"}', block=1)
@example(content="11, -1.5e3,true , null", block=1)
def test_a_list_is_accepted_exactly_when_json_accepts_it(tmp_path_factory, content, block):
    file = tmp_path_factory.mktemp("any") / "a.json"
    file.write_bytes(f"[{content}]".encode())
    try:
        expected = json.loads(f"[{content}]")
    except json.JSONDecodeError:
        expected = None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(read, "BLOCK", block)
        try:
            found = records(inputs.source(file))
        except ValueError as error:
            assert not expected, error
            return
    if expected is None:
        assert any(record.error for record in found)
    else:
        assert len(found) == len(expected)
        assert [r.row for r in found] == [e if isinstance(e, dict) else None for e in expected]


def test_an_element_of_many_blocks_is_not_scanned_once_per_block(write, monkeypatch):
    scans, value_end = [], json_rows._value_end
    monkeypatch.setattr(read, "BLOCK", 100)
    monkeypatch.setattr(
        json_rows, "_value_end", lambda *given: scans.append(1) or value_end(*given)
    )
    row = {"a": ["x" * 10] * 10_000}
    assert rows(write(json.dumps([row]), "a.json")) == [row]
    assert len(scans) < 20


@pytest.mark.parametrize("answer", ["2024-01-01", "2024-01-01T10:00:00Z", "12:00", "NaN"])
def test_text_that_looks_like_something_else_stays_text(write, answer):
    assert rows(write([{"a": answer}] * 2)) == [{"a": answer}] * 2


# ---- chunks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_chunk_has_at_most_a_thousand_rows_or_about_a_megabyte(write, name):
    def sizes(found) -> list[tuple[int, int]]:
        content = json.dumps(found)
        if name == "a.jsonl":
            content = "\n\n".join(json.dumps(row) for row in found)  # a blank line after each
        return [(chunk.first, len(chunk)) for chunk in chunks(write(content, name))]

    if name == "a.json":
        assert sizes([{"a": n} for n in range(2500)]) == [(1, 1000), (1001, 1000), (2001, 500)]
    else:
        expected = [(1, 500), (1001, 500), (2001, 500), (3001, 500), (4001, 500)]
        assert sizes([{"a": n} for n in range(2500)]) == expected
    big = [{"a": "x" * 300_000}] * 10
    assert max(length for _, length in sizes(big)) <= 4 and sum(n for _, n in sizes(big)) == 10
    assert sum(length for _, length in sizes([{"a": "x" * 3_000_000}] * 3)) == 3


@pytest.mark.parametrize("limit", [1, 2, 999, 1000, 1001, 1500, 2500, 2501, 9999])
def test_limit_counts_rows_over_all_files(write, tmp_path, limit):
    lines = [json.dumps({"n": n}) if n % 7 else "bad" for n in range(1500)]
    write("\n\n\r\n".join(lines), "d/a.jsonl")
    write(json.dumps([{"n": n} for n in range(1500, 2500)]), "d/b.json")
    source = inputs.source(tmp_path / "d", limit=limit)
    expected = [None if n < 1500 and n % 7 == 0 else {"n": n} for n in range(2500)][:limit]
    assert [record.row for record in records(source)] == expected
    assert sum(map(len, chunks(source))) == len(expected)


def test_a_file_behind_the_limit_is_not_opened(write, tmp_path):
    write(ROWS, "d/a.jsonl")
    write("not arrow", "d/b.parquet")
    assert rows(inputs.source(tmp_path / "d", limit=3)) == ROWS
    with pytest.raises(ValueError, match="b.parquet: "):
        rows(inputs.source(tmp_path / "d", limit=4))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_chunk_is_the_same_after_a_pickle(write, name):
    deep = '{"a": ' + "[" * 900 + "]" * 900 + "}"
    content = {
        "a.jsonl": LINES + "\n" + deep,
        "a.json": f"[{deep}, {LINES.strip().replace(chr(10), ',')}]",
        "a.csv": "prompt,response\na,b\nc\n",
    }[name]
    (chunk,) = chunks(write(content, name))
    again = pickle.loads(pickle.dumps(chunk))
    assert again == chunk and len(again) == len(chunk) == len(list(read.parse(again)))
    assert list(read.parse(again)) == list(read.parse(chunk))


# ---- archives ------------------------------------------------------------------------------------

ARCHIVES = {
    "gz": gzip.compress,
    "zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


@pytest.mark.parametrize("archive", ARCHIVES)
@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "csv", "tsv"])
def test_all_parts_of_an_archive_are_read(write, archive, kind):
    table = [["prompt", "response"], *(row.values() for row in ROWS)]
    content = {
        "json": json.dumps(ROWS),
        "csv": "".join(",".join(line) + "\n" for line in table),
        "tsv": "".join("\t".join(line) + "\n" for line in table),
    }.get(kind, LINES)
    data, pack = content.encode(), ARCHIVES[archive]
    for parts in (
        [data],
        [data[:20], data[20:21], b"", data[21:], b""],
        [bytes([b]) for b in data],
    ):
        assert rows(write(b"".join(map(pack, parts)), f"a.{kind}.{archive}")) == ROWS


@pytest.mark.parametrize("archive", ARCHIVES)
def test_an_archive_cut_off_anywhere_is_named(write, archive):
    pack, good = ARCHIVES[archive], LINES.encode()
    for before in (b"", pack(good)):
        whole = pack(good + b" " * 3000)
        for size in range(1, len(whole)):
            source = write(before + whole[:size], f"a.jsonl.{archive}")
            with pytest.raises(ValueError, match=f"a.jsonl.{archive}: .*[Tt]runcated"):
                records(source)


@pytest.mark.parametrize("archive", ARCHIVES)
def test_what_is_no_archive_is_named(write, archive):
    packed = ARCHIVES[archive](LINES.encode())
    for content in (LINES.encode(), packed + b"garbage", packed[:10] + b"garbage" + packed[17:]):
        with pytest.raises(ValueError, match=f"a.jsonl.{archive}: "):
            records(write(content, f"a.jsonl.{archive}"))


# ---- csv -----------------------------------------------------------------------------------------


def test_csv_values_stay_text(write):
    content = 'prompt,response\r\nNA,007\n"a ""b"", c\nd", \n\ntrue,1e5\n'
    expected = [("NA", "007"), ('a "b", c\nd', " "), ("true", "1e5")]
    expected = [dict(zip(ROWS[0], pair, strict=True)) for pair in expected]
    assert rows(write("\ufeff" + content, "a.csv")) == expected
    assert rows(write(content.replace(", c", "\t c").replace(",", "\t"), "a.tsv")) == [
        row | {"prompt": row["prompt"].replace(", c", "\t c")} for row in expected
    ]


def test_a_csv_field_may_be_long(write):
    assert rows(write(f'a,b\n"{"x" * 3_000_000}",y\n', "a.csv")) == [
        {"a": "x" * 3_000_000, "b": "y"}
    ]


@settings(max_examples=100, deadline=None)
@given(table=st.lists(st.tuples(*[st.text(st.characters(codec="utf-8"))] * 2), min_size=1))
def test_any_csv_comes_back_as_the_csv_module_writes_it(tmp_path_factory, table):
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([("a", "b"), *table])
    file = tmp_path_factory.mktemp("any") / "a.csv"
    file.write_bytes(text.getvalue().encode())
    assert rows(inputs.source(file)) == [{"a": one, "b": two} for one, two in table]


def test_a_bad_csv_row_is_an_error_of_that_row_alone(write):
    source = write(b"a,b\n1,2\n3\n4,5,6\n\n7,\xe9\n8,9\n", "a.csv")
    assert errors(source) == [
        "row 2 has 1 values for 2 columns",
        "row 3 has 3 values for 2 columns",
        "row 4 is not UTF-8",
    ]
    assert [record.row for record in records(source) if record.row] == [
        {"a": "1", "b": "2"},
        {"a": "8", "b": "9"},
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (",b\n1,2\n", "column 1 has no name"),
        ("a,b,a\n1,2,3\n", "two columns are called 'a'"),
        ('a,b\n1,2\n"3,4\n5,6\n', "the row that starts at line 3: unexpected end of data"),
        ('a,b\n"1\n",2\n"x"y,4\n5,6\n', "the row that starts at line 4: ',' expected after '\"'"),
    ],
)
def test_a_csv_file_that_is_broken_as_a_whole_is_named(write, content, message):
    with pytest.raises(ValueError, match="a.csv: " + message):
        rows(write(content, "a.csv"))


# ---- parquet and arrow ---------------------------------------------------------------------------

CALL = {"name": "f", "arguments": {"city": "Oslo"}}
TURN = {"role": "assistant", "content": "b", "tool_calls": [CALL]}
MESSAGES = [
    {"messages": [{"role": "user", "content": "a"}, TURN], "tools": None, "n": 1},
    {"messages": [TURN | {"tool_calls": [{"name": "g", "arguments": {"day": "1"}}]}], "tools": None}
    | {"n": None},
    {"messages": [{"role": "user", "content": "c"}], "tools": [{"name": "f"}], "n": 3},
]


def write_table(table: pa.Table, file: Path, rows_per_batch: int = 2) -> None:
    if file.suffix == ".parquet":
        pq.write_table(table, file)
    else:
        make = pa.ipc.new_file if "file" in file.name else pa.ipc.new_stream
        with make(str(file), table.schema) as writer:
            writer.write_table(table, max_chunksize=rows_per_batch)


TABLES = ["a.parquet", "file.arrow", "stream.arrow"]


@pytest.mark.parametrize("name", TABLES)
def test_an_object_of_a_table_has_only_its_own_fields(tmp_path, name):
    table = pa.Table.from_pylist(MESSAGES)
    write_table(table, tmp_path / name)
    assert table.to_pylist()[0]["messages"][0]["tool_calls"] is None  # what is to be undone
    # "n" is a column that no format uses: it is named, and not read.
    assert rows(inputs.source(tmp_path / name)) == [row | {"n": None} for row in MESSAGES]


def test_a_row_that_refers_to_one_huge_value_again_and_again_is_not_decoded(tmp_path, monkeypatch):
    file = tmp_path / "a.parquet"
    turn = {"role": "user", "content": "ab " * 1_000_000}
    pq.write_table(pa.table({"messages": [[turn] * 5]}), file, compression="zstd")
    assert file.stat().st_size < 5000
    source = inputs.source(str(file))
    (chunk,) = read.chunks(source, [file])
    assert chunk.payload[0]["messages"] == [turn] * 5
    monkeypatch.setattr(tables, "BOMB", 10_000_000)
    (chunk,) = read.chunks(source, [file])
    assert "longer than data.max_row_bytes" in chunk.payload[0]


def test_json_within_parquet_is_parsed(tmp_path):
    objects = [{"a": None, "b": [1]}, {"c": {"d": "e"}}]
    texts = pa.array([json.dumps(one) for one in objects], pa.string())
    column = pa.ExtensionArray.from_storage(pa.json_(), texts)
    write_table(pa.table({"tools": column, "text": ["1", "2"]}), tmp_path / "a.parquet")
    assert rows(inputs.source(tmp_path / "a.parquet")) == [
        {"tools": one, "text": str(n + 1)} for n, one in enumerate(objects)
    ]


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_read_in_chunks_of_bounded_size(tmp_path, name):
    small = pa.table({"ids": range(2500)})
    large = pa.table({"ids": range(20), "text": ["x" * 300_000] * 20})
    for table in (small, large):
        write_table(table, tmp_path / name, rows_per_batch=100_000)
        source = inputs.source(tmp_path / name)
        found = chunks(source)
        assert [row["ids"] for row in rows(source)] == list(range(len(table)))
        firsts = [chunk.first for chunk in found]
        assert firsts == [1 + sum(map(len, found[:n])) for n in range(len(found))]
        assert max(map(len, found)) <= (1000 if table is small else 4)
        limited = inputs.source(tmp_path / name, limit=7)
        assert [row["ids"] for row in rows(limited)] == list(range(7))


def test_a_bad_value_of_parquet_is_an_error_of_that_row_alone(tmp_path):
    texts = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    found = records(inputs.source(tmp_path / "a.parquet"))
    assert [record.row for record in found] == [{"text": "a"}, None, {"text": "c"}]
    assert found[1].where.endswith("a.parquet, row 2")
    assert found[1].error.startswith("field 'text' cannot be read: 'utf-8' codec can't")


@pytest.mark.parametrize("name", TABLES[1:])
def test_arrow_is_checked_before_it_is_trusted(tmp_path, name):
    write_table(pa.table({"text": ["abc", "def", "ghi"]}), tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    offsets = np.array([0, 3, 6], np.int32).tobytes()
    assert whole.count(offsets) == 1  # where the texts of the first batch end
    for wrong in ([0, 3, 2**30], [0, 2**30, 6], [0, -5, 6]):
        content = whole.replace(offsets, np.array(wrong, np.int32).tobytes())
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"source.path = .*{name}: "):
            records(inputs.source(tmp_path / name))


@pytest.mark.parametrize("name", TABLES)
def test_a_table_cut_off_anywhere_is_named(tmp_path, name):
    write_table(pa.table({"n": range(5)}), tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for size in range(1, len(whole)):  # also right behind a batch
        (tmp_path / name).write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"source.path = .*{name}: "):
            records(inputs.source(tmp_path / name))


def test_columns_of_one_name_are_refused(tmp_path):
    table = pa.table([pa.array(["x"]), pa.array(["y"])], names=["a", "a"])
    for name in TABLES:
        write_table(table, tmp_path / name)
        with pytest.raises(ValueError, match="two columns are called 'a'"):
            records(inputs.source(tmp_path / name))


def test_a_table_without_rows_is_named(tmp_path):
    for name in TABLES:
        write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} has no rows"):
            records(inputs.source(tmp_path / name))


def test_a_folder_saved_by_datasets_gives_its_rows(tmp_path):
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    datasets.enable_progress_bars()
    assert (tmp_path / "saved/state.json").exists()
    assert rows(inputs.source(tmp_path / "saved")) == ROWS


# ---- hostile rows --------------------------------------------------------------------------------


LONG = "is longer than data.max_row_bytes = 2,000"


def bounded(source, max_row_bytes: int = 2000) -> list[str]:
    """What is wrong with each row, or "" where nothing is."""
    found = read.chunks(source, read.files(source), max_row_bytes)
    return [record.error[: len(LONG)] for chunk in found for record in read.parse(chunk)]


def a_row(size: int, filler: str = "x") -> str:
    return json.dumps({"prompt": "a", "response": filler * (size // len(filler))})


@pytest.mark.parametrize("block", [300, 1_000_000])
@pytest.mark.parametrize("filler", ["x", '"', "\\", "][}{", "a\nb,"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow"])
def test_a_row_over_the_bound_is_one_bad_row(write, tmp_path, monkeypatch, name, filler, block):
    monkeypatch.setattr(read, "BLOCK", block)
    sizes = [10, 900, 60_000, 10, 2001 * len(filler), 10]
    objects = [json.loads(a_row(size, filler)) for size in sizes]
    if name == "a.csv":
        table = io.StringIO()
        writer = csv.DictWriter(table, ["prompt", "response"])
        writer.writeheader()
        writer.writerows(objects)
        source = write(table.getvalue(), name)
    elif name in ("a.parquet", "a.arrow"):
        write_table(pa.Table.from_pylist(objects), tmp_path / name)
        source = inputs.source(tmp_path / name)
    else:
        source = write(objects if name == "a.jsonl" else json.dumps(objects), name)
    assert bounded(source) == ["", "", LONG, "", LONG, ""]
    if name == "a.jsonl":
        assert [chunk.first for chunk in chunks(source)][0] == 1


def test_a_long_row_is_passed_over_without_holding_it(write):
    names = {"a.jsonl": "%s\n%s\n%s\n", "a.json": "[%s,\n%s,\n%s]"}
    for name, layout in names.items():
        source = write(layout % (a_row(10), a_row(30_000_000), a_row(10)), name)
        tracemalloc.start()
        assert bounded(source) == ["", LONG, ""]
        assert tracemalloc.get_traced_memory()[1] < 28_000_000
        tracemalloc.stop()


def test_what_unpacks_to_far_more_than_data_can_is_refused(write, monkeypatch):
    monkeypatch.setattr(read, "BOMB", 1_000_000)
    alike = [{"prompt": "a" * 100, "response": random.randbytes(9).hex()} for _ in range(10_000)]
    lines = "".join(json.dumps(row) + "\n" for row in alike).encode()
    assert len(bounded(write(gzip.compress(lines), "a.jsonl.gz"))) == 10_000
    for content in (b"x", b"\n"):
        packed = pa.compress(content * 5_000_000, "zstd", asbytes=True)
        with pytest.raises(ValueError, match="b.jsonl.zst: unpacks to over .* 300 times its size"):
            bounded(write(packed, "b.jsonl.zst"))


def test_lines_are_numbered_past_blocks_of_blanks(write, monkeypatch):
    monkeypatch.setattr(read, "BLOCK", 10)
    source = write("{}\n" + "\n" * 95 + "1\n" + " " * 40 + "\n" * 30 + "2")
    assert [error.partition(" must")[0] for error in errors(source)] == ["line 97", "line 128"]


def test_a_row_of_many_keys_or_columns_takes_no_time_of_its_square(write):
    keys = ", ".join(f'"k{n}": 1' for n in range(100_000))
    started = time.monotonic()
    assert errors(write("{" + keys + ', "k0": 2}'))[0].endswith("key 'k0' occurs twice")
    source = write(",".join(f"c{n}" for n in range(100_000)) + "\na,b\n", "a.csv")
    assert errors(source) == ["row 1 has 2 values for 100000 columns"]
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"a":' * 100_000, '{"a": ' + "9" * 100_000 + "}", "\0", '"\\ud800"']
)
def test_hostile_json_is_an_error_of_that_row_alone(write, line):
    assert [bool(error) for error in bounded(write(line + '\n{"a": 1}\n'), 10**6)] == [True, False]


def test_quotes_that_never_close_are_named_by_the_line_of_the_row(write):
    source = write('prompt,response\na,b\na,"' + "x\n" * 5000, "a.csv")
    with pytest.raises(ValueError, match="row that starts at line 3: the file ends within quotes"):
        bounded(source)


def test_a_column_that_is_not_used_is_not_read(tmp_path):
    late = pa.array([2**62], pa.timestamp("us"))  # which Python's dates do not reach
    for name in TABLES:
        table = pa.table({"prompt": ["a"], "response": ["b"], "when": late})
        write_table(table, tmp_path / name)
        assert rows(inputs.source(tmp_path / name)) == [
            {"prompt": "a", "response": "b", "when": None}
        ]
        write_table(pa.table({"prompt": ["a"], "response": late}), tmp_path / name)
        (error,) = errors(inputs.source(tmp_path / name))
        assert error.startswith("row 1 field 'response' cannot be read: ")
        write_table(pa.table({"x": [1, 2]}), tmp_path / name)
        assert rows(inputs.source(tmp_path / name)) == [{"x": None}] * 2


def test_only_regular_files_are_read(tmp_path, write):
    write(ROWS, "data/a.jsonl")
    os.mkfifo(tmp_path / "data/b.jsonl")
    fifo = tmp_path / "data/b.jsonl"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "c.jsonl"))
        for path in (fifo, tmp_path / "data", tmp_path / "data/*.jsonl", tmp_path / "data/**"):
            with pytest.raises(ValueError, match=r"b\.jsonl is a FIFO, not a regular file"):
                read.files(inputs.source(path))
        with pytest.raises(ValueError, match="is a socket, not a regular file"):
            read.files(inputs.source(tmp_path / "c.jsonl"))
    with pytest.raises(ValueError, match="/dev/zero is a device"):
        read.files(inputs.source("/dev/zero"))
    with pytest.raises(ValueError, match="is a FIFO"):
        read._open(fifo)  # which became one after it was looked for
    fifo.unlink()
    write(ROWS, "data/b.jsonl/part.jsonl")
    assert len(read.files(inputs.source(tmp_path / "data"))) == 2
    with pytest.raises(ValueError, match="b.jsonl is a folder, not a regular file"):
        read.files(inputs.source(tmp_path / "data/*.jsonl"))


def test_links_in_a_circle_do_not_hang_a_glob(tmp_path, write):
    write(ROWS, "data/a/a.jsonl")
    for name in ("x", "y"):
        (tmp_path / "data/a" / name).symlink_to(tmp_path / "data")
    for pattern in ("data", "data/**/*.jsonl"):
        with pytest.raises(ValueError, match="are the same folder"):
            read.files(inputs.source(tmp_path / pattern))


# ---- memory --------------------------------------------------------------------------------------

# VmHWM, not ru_maxrss: that one starts at the size of the process that started this one.
MEASURE = """
import re, sys
from jax_sft.data.sources import read
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024
source = inputs.source(sys.argv[1])
before = peak()
num_rows = sum(1 for c in read.chunks(source, read.files(source)) for r in read.parse(c) if r.row)
print(num_rows, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.csv", "a.parquet", "stream.arrow"]
)
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    num_rows, rng = 100_000, random.Random(0)  # 200 MB
    rows = ({"text": f"{n} {rng.randbytes(1000).hex()}"} for n in range(num_rows))
    file = tmp_path / name
    if file.suffix in (".parquet", ".arrow"):
        table = pa.Table.from_pylist(list(rows))
        if file.suffix == ".arrow":
            write_table(table, file, rows_per_batch=1000)
        else:  # one row group, not compressed
            pq.write_table(table, file, row_group_size=num_rows, use_dictionary=False)
    else:
        start = {"a.json": "[", "a.csv": "text\n"}.get(name, "")
        with gzip.open(file, "wt", 1) if name.endswith("gz") else file.open("w") as lines:
            for row in rows:
                lines.write(start + (row["text"] if name == "a.csv" else json.dumps(row)))
                start = ",\n" if name == "a.json" else "\n"
            lines.write("]" if name == "a.json" else "\n")
    measure = [sys.executable, "-c", MEASURE, str(file)]
    found, megabytes = subprocess.run(measure, capture_output=True, check=True).stdout.split()
    assert int(found) == num_rows
    assert int(megabytes) < 60
