"""The token cache: the same tokens whatever happens, made once, and again when anything changes."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import xxhash

import jax_sft
from jax_sft import cache as cache_command
from jax_sft import tiny
from jax_sft.data.chat import encoding
from jax_sft.data.tokens import cache, cache_room, file_hashes, store_lock, worker
from jax_sft.data.tokens import store as store_module
from jax_sft.files import regular
from jax_sft.runtime import confined
from tests import inputs, tiers

REPO = Path(jax_sft.__file__).parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.write_tokenizer(folder)
    return folder


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def rows(number: int, first: int = 0) -> list[dict]:
    return [
        {"prompt": f"say {n}", "response": f"{n} " * (n % 7 + 1)}
        for n in range(first, first + number)
    ]


def write(file: Path, data: list) -> Path:
    """Write JSON lines; what is a string already stays as it is."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in data)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return file


@pytest.fixture
def build(model, tmp_path):
    """Open or build a store; keywords change the source."""

    def make(
        file: Path,
        *,
        options=None,
        tokenizer_folder=model,
        cache_dir=tmp_path / "cache",
        num_workers=1,
        stop_at_bad_row=True,
        cache_gb=0,
        **changes,
    ) -> cache.Store:
        return cache.open_or_build(
            inputs.source(file, **changes),
            tokenizer_folder,
            options or encoding.Options(),
            cache_dir,
            num_workers,
            stop_at_bad_row=stop_at_bad_row,
            progress=False,
            name="main",
            cache_gb=cache_gb,
        )

    return make


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def stores(folder: Path) -> list[Path]:
    return [found for found in sorted(folder.iterdir()) if found.is_dir()]


def run_script(
    text: str, *arguments: object, cwd: Path | None = None, timeout_s: int = 120
) -> subprocess.CompletedProcess:
    """Run a program of its own, which finds the package by sys.path and nothing else."""
    head = f"import sys\nsys.path.insert(0, {str(REPO)!r})\n"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(text), *map(str, arguments)],
        cwd=cwd,
        env=env | {"TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def forbid(*_args, **_kwargs):
    raise AssertionError("tokenized again")


# ---- what is stored -----------------------------------------------------------------------------


def test_stored_tokens_are_those_of_the_encoder(build, model, tmp_path):
    data = rows(30)
    store = build(write(tmp_path / "a.jsonl", data), options=encoding.Options(turns="last"))
    tokenizer = encoding.load_tokenizer(model)
    for n, row in enumerate(data):
        part = slice(store.starts[n], store.stops[n])
        text = (
            f"<|im_start|>user\n{row['prompt']}<|im_end|>\n"
            f"<|im_start|>assistant\n{row['response']}<|im_end|>\n"
        )
        assert tokenizer.decode(store.ids[part]) == text
        trained = store.ids[part][store.weights[part] > 0]
        assert tokenizer.decode(trained) == row["response"] + "<|im_end|>"
        assert store.trained[n] == len(trained)
    assert store.rows.tolist() == list(range(30)) and store.stops[-1] == len(store.ids)
    assert store.num_cut.tolist() == [0] * 30
    assert (store.meta["rows"], store.meta["format"]) == (30, "prompt_response")
    assert store.meta["turn_ends"] == {str(tokenizer.convert_tokens_to_ids("<|im_end|>")): 30}
    assert store.weights.dtype == np.uint8 and store.ids.dtype == np.int32


def test_a_second_start_tokenizes_nothing_and_finds_the_same(build, tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl", rows(30))
    first = build(file)
    monkeypatch.setattr(worker, "tokenize", forbid)
    second = build(file)
    assert (first.cached, second.cached) == (False, True)
    assert second.meta == first.meta
    for name in ("ids", "weights", "starts", "stops", "rows", "places", "num_cut", "trained"):
        assert np.array_equal(getattr(first, name), getattr(second, name))
        assert type(getattr(second, name)) is np.ndarray


def test_an_empty_cache_dir_means_the_users_cache(build, tmp_path):
    store = build(write(tmp_path / "a.jsonl", rows(3)), cache_dir="")
    assert store.folder.parent == tmp_path / "home" / "jax_sft"


def test_places_name_file_and_line_past_blank_lines_and_bad_rows(build, tmp_path):
    folder = tmp_path / "data"
    a, b, c = rows(3)
    write(folder / "one.jsonl", ["", a, "", "", b])
    write(folder / "sub" / "two.jsonl", ["{", "", c])
    store = build(folder, stop_at_bad_row=False)
    one, two = folder / "one.jsonl", folder / "sub" / "two.jsonl"
    assert [store.where(n) for n in range(3)] == [
        f"{one}, line 2",
        f"{one}, line 5",
        f"{two}, line 3",
    ]
    assert store.rows.tolist() == [0, 1, 3]
    assert [(e["row"], e["where"]) for e in store.errors()] == [(2, f"{two}, line 1")]


def test_limit_counts_rows_from_the_start(build, tmp_path):
    file = write(tmp_path / "a.jsonl", rows(30))
    assert build(file, limit=7).rows.tolist() == list(range(7))


def test_fractional_weights_survive_exactly_even_after_thousands_of_whole_ones(build, tmp_path):
    data: list[dict] = [{"ids": [1, 2, 3], "mask": [0, 1, 1]} for _ in range(2500)]
    odd = [0.1, 1 / 3, 1e-30, 3.0, 0.0]
    data[2400] = {"ids": [5, 6, 7, 8, 9], "mask": odd}
    file = write(tmp_path / "a.jsonl", data)
    store = build(file)
    assert store.weights.dtype == np.float32
    expected = [[0, 1, 1]] * 2400 + [odd] + [[0, 1, 1]] * 99
    assert np.array_equal(store.weights, np.concatenate(expected).astype(np.float32))
    assert (store.trained[2400], store.meta["highest_id"]) == (3, 9)
    assert "narrow" not in contents(store.folder)
    assert np.array_equal(build(file).weights, store.weights)
    data[2400]["mask"] = [0, 1, 1, 1, 0]
    assert build(write(file, data)).weights.dtype == np.uint8


def test_a_source_whose_every_row_is_refused_gives_an_empty_store(build, tmp_path):
    file = write(tmp_path / "a.jsonl", [{"prompt": "a", "response": 1}] * 3)
    for cached in (False, True):
        store = build(file, stop_at_bad_row=False, format="prompt_response")
        assert store.cached is cached
        assert [len(a) for a in (store.ids, store.weights, store.starts, store.rows)] == [0] * 4
        assert [error["row"] for error in store.errors()] == [0, 1, 2]
        assert (store.meta["rows"], store.meta["highest_id"]) == (3, -1)
        assert list(store.meta["refused"].values()) == [3]


# ---- the key ------------------------------------------------------------------------------------


def write_model(folder: Path, **changes: str) -> Path:
    folder.mkdir()
    tiny.write_tokenizer(folder)
    for name, text in changes.items():
        (folder / name.replace("_jinja", ".jinja").replace("_json", ".json")).write_text(text)
    return folder


def test_every_ingredient_changes_the_key_and_no_two_alike(build, tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl", rows(3))
    found = [build(file).meta["key"]]
    for changes in (
        *({"format": "prompt_response"}, {"limit": 2}, {"tools_key": ""}),
        *({"options": encoding.Options(turns="last")}, {"options": encoding.Options(max_tokens=9)}),
        *(
            {"options": encoding.Options(date="2020-01-01")},
            {"options": encoding.Options(turns="from:1")},
        ),
        {"options": encoding.Options(train_empty_think=True)},
    ):
        found.append(build(file, **changes).meta["key"])
    reader = write_model(
        tmp_path / "reader", chat_template_jinja=tiny.CHAT_TEMPLATE + "{% if x %}{% endif %}"
    )
    for value in (1, True, "1", 1.5):
        options = encoding.Options(template_args={"x": value})
        found.append(build(file, tokenizer_folder=reader, options=options).meta["key"])
    template = tiny.CHAT_TEMPLATE + "{# changed #}"
    other = write_model(tmp_path / "other", chat_template_jinja=template)
    found.append(build(file, tokenizer_folder=other).meta["key"])
    tokenizer_config = json.loads((other / "tokenizer_config.json").read_text())
    tokenizer_config["eos_token"] = "<|endoftext|>"
    (other / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    found.append(build(file, tokenizer_folder=other).meta["key"])
    with open(other / "tokenizer.json", "a") as stream:
        stream.write("\n")
    found.append(build(file, tokenizer_folder=other).meta["key"])
    renamed = write(tmp_path / "b.jsonl", rows(3))
    found.append(build(renamed).meta["key"])
    found.append(build(write(file, rows(3, first=1))).meta["key"])
    for name in worker.VERSIONS:
        with monkeypatch.context() as patch:
            patch.setattr(cache, "VERSIONS", worker.VERSIONS | {name: "other"})
            found.append(build(file).meta["key"])
    assert len(set(found)) == len(found) == 25


def test_the_content_changes_with_the_examples_and_with_nothing_else(build, tmp_path, monkeypatch):
    first = build(write(tmp_path / "a.jsonl", rows(3))).meta
    moved = write(tmp_path / "elsewhere/b.jsonl", rows(3))
    with monkeypatch.context() as patch:
        patch.setattr(cache, "VERSIONS", worker.VERSIONS | {"tokens": "later"})
        later = build(moved, num_workers=2).meta
    assert later["content"] == first["content"] and later["key"] != first["key"]
    said = {"role": "assistant", "content": "yes"}
    whole, less = (
        [{"messages": [{"role": "user", "content": "q"}, said | weight]}]
        for weight in ({}, {"weight": 0.5})
    )
    found = [
        build(write(tmp_path / f"{number}.jsonl", changed)).meta["content"]
        for number, changed in enumerate((rows(2), rows(3)[::-1], rows(3, first=1), whole, less))
    ]
    assert len({*found, first["content"]}) == 6


def test_weights_beside_the_tokenizer_do_not_change_the_key(build, tmp_path):
    file, folder = write(tmp_path / "a.jsonl", rows(3)), write_model(tmp_path / "model")
    build(file, tokenizer_folder=folder)
    (folder / "model.safetensors").write_text("x")
    (folder / "original").mkdir()
    assert build(file, tokenizer_folder=folder).cached


def test_the_order_of_files_is_in_the_key(build, tmp_path):
    a, b = rows(3), rows(4, first=3)
    one = tmp_path / "one"
    two = tmp_path / "two"
    for folder, parts in ((one, (a, b)), (two, (b, a))):
        for number, part in enumerate(parts):
            write(folder / f"{number}.jsonl", part)
    keys = {build(folder).meta["key"] for folder in (one, two)}
    assert len(keys) == 2


def test_the_key_holds_versions_and_no_text_of_ours():
    assert worker.VERSIONS["tokens"] == str(worker.TOKENS_VERSION)
    libraries = {"tokenizers", "transformers", "jinja2", "datasets", "pyarrow"}
    assert worker.VERSIONS.keys() == {"tokens", "python", *libraries}


def test_edited_docstrings_tokenize_nothing_again_and_a_raised_version_does(tmp_path):
    model, data = write_model(tmp_path / "model"), write(tmp_path / "a.jsonl", rows(3))
    package = Path(jax_sft.__file__).parent
    copy = shutil.copytree(package, tmp_path / "copy" / "jax_sft")
    code = (
        "import sys\nfrom jax_sft.settings import Source\nfrom jax_sft.data.tokens import cache\n"
        "from jax_sft.data.chat import encoding\n"
        "store = cache.open_or_build(Source(sys.argv[2]), sys.argv[1], encoding.Options(), "
        "sys.argv[3], 1, stop_at_bad_row=True, progress=False)\nprint(cache.__file__, store.cached)"
    )

    def is_cached() -> bool:
        ran = subprocess.run(
            [sys.executable, "-c", code, str(model), str(data), str(tmp_path / "cache")],
            cwd=copy.parent,
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr
        assert str(copy) in ran.stdout
        return ran.stdout.split()[-1] == "True"

    assert not is_cached()
    for file in copy.rglob("*.py"):
        file.write_text(file.read_text().replace('"""', '"""Edited. ', 1))
    assert is_cached()
    file = copy / Path(worker.__file__).relative_to(package)
    version = f"TOKENS_VERSION = {worker.TOKENS_VERSION}"
    assert version in file.read_text()
    file.write_text(file.read_text().replace(version, version + "0"))
    assert not is_cached()
    assert len(stores(tmp_path / "cache")) == 2


def test_a_moved_file_is_found_again_and_its_errors_name_the_new_place(build, tmp_path):
    bad = [*rows(3), {"prompt": "a", "response": 1}]
    file = write(tmp_path / "old" / "a.jsonl", bad)
    assert not build(file, stop_at_bad_row=False).cached
    new = tmp_path / "new" / "a.jsonl"
    new.parent.mkdir()
    file.rename(new)
    store = build(new, stop_at_bad_row=False, weight=2.0, epochs=3.0, num_workers=2)
    assert store.cached
    assert [error["where"] for error in store.errors()] == [f"{new}, line 4"]
    assert store.where(2) == f"{new}, line 3"


def test_an_edit_that_keeps_size_and_time_is_noticed(build, tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl", [{"prompt": "a", "response": "b"}])
    monkeypatch.setattr(file_hashes, "RACY_NS", -(10**18))  # hashes are kept at once
    before = file.stat()
    assert not build(file).cached
    file.write_text(file.read_text().replace('"b"', '"c"'))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    store = build(file)
    assert not store.cached and store.ids[-3] == build(file).ids[-3] != 1


def test_an_unchanged_file_is_not_read_again_and_a_young_one_is(build, tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl", rows(3))
    hashes = tmp_path / "cache" / "hashes.jsonl"
    opened = []

    open_regular = regular.open_regular

    def open_and_note(name, **kwargs):
        opened.append(str(name))
        return open_regular(name, **kwargs)

    def times_read() -> int:
        opened.clear()
        build(file)
        return opened.count(str(file))

    build(file)
    os.utime(file)  # changed just now, however long the build took
    hashes.unlink(missing_ok=True)
    monkeypatch.setattr(regular, "open_regular", open_and_note)
    assert times_read() == 1  # within 2 s of the last change: an edit may carry the same time
    assert str(file) not in hashes.read_text() if hashes.exists() else True
    later = time.time_ns() + 3 * 10**9
    monkeypatch.setattr(file_hashes.time, "time_ns", lambda: later)
    assert times_read() == 1
    assert str(file) in hashes.read_text()
    assert times_read() == 0
    # The process was killed while it wrote the line of the file.
    whole = next(line for line in hashes.read_text().splitlines() if str(file) in line)
    hashes.write_text(hashes.read_text().replace(whole, whole[:-5]))
    assert times_read() == 1
    assert times_read() == 0


def test_a_file_that_changes_while_it_is_read_leaves_no_store(build, tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl", rows(3))
    tokenize = worker.tokenize

    def edit_meanwhile(*args):
        yield from tokenize(*args)
        write(file, rows(3, first=1))

    monkeypatch.setattr(worker, "tokenize", edit_meanwhile)
    with pytest.raises(ValueError, match=r"a\.jsonl \(source 'main'\).*changed while"):
        build(file)
    assert stores(tmp_path / "cache") == []


# ---- bad rows -----------------------------------------------------------------------------------


def test_the_first_bad_row_raises_with_its_place_and_leaves_no_store(build, tmp_path):
    data = [*rows(5), {"prompt": "a", "response": None}, "not json", *rows(5)]
    file = write(tmp_path / "a.jsonl", data)
    with pytest.raises(ValueError) as raised:
        build(file)
    assert str(raised.value).startswith(f"{file}, line 6 (source 'main'): ")
    assert 'data.on_bad_row = "skip"' in str(raised.value)
    assert stores(tmp_path / "cache") == []
    store = build(file, stop_at_bad_row=False)
    assert [error["row"] for error in store.errors()] == [5, 6]
    assert store.rows.tolist() == [*range(5), *range(7, 12)]
    with pytest.raises(ValueError) as again:  # now from the cache
        build(file)
    assert str(again.value) == str(raised.value)


def test_an_error_that_quotes_half_a_character_or_a_huge_text_can_be_shown(build, tmp_path):
    half = r'{"prompt": "a", "response": "b", "tools": "\ud800"}'
    huge = {"prompt": "a", "response": "b", "tools": "x" * 100_000}
    file = write(tmp_path / "a.jsonl", [*rows(1), half, huge])
    errors = list(build(file, stop_at_bad_row=False).errors())
    assert [error["row"] for error in errors] == [1, 2]
    for error in errors:
        assert len(error["error"].encode("utf-8")) < 1100


def test_a_file_without_one_readable_row_raises_its_first_error(build, tmp_path):
    file = write(tmp_path / "a.jsonl", ["{"] * 3)
    for stop in (True, False):
        with pytest.raises(ValueError, match=r"a\.jsonl, line 1 \(source 'main'\): .*first 3 rows"):
            build(file, stop_at_bad_row=stop)
    assert stores(tmp_path / "cache") == []


def test_plain_text_needs_no_chat_template_and_messages_do(build, tmp_path, model):
    bare = write_model(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    text = write(tmp_path / "text.jsonl", [{"text": "abc"}])
    store = build(text, tokenizer_folder=bare)
    assert store.weights.tolist() == [1, 1, 1, 1]  # and the end of the text
    with pytest.raises(ValueError, match="no chat template"):
        build(write(tmp_path / "a.jsonl", rows(2)), tokenizer_folder=bare)


# ---- damage, disks, other processes -------------------------------------------------------------


def test_a_damaged_store_is_made_again_with_a_notice(build, tmp_path, capfd):
    file = write(tmp_path / "a.jsonl", [*rows(50), "{"])
    store = build(file, stop_at_bad_row=False)
    whole = contents(store.folder)
    assert set(whole) == {*store_module.DTYPES, "errors.jsonl", "meta.json"}
    capfd.readouterr()
    num_damages = 0
    for name, data in whole.items():
        for damage in (None, data[:-1], data + b"\0", b""):
            damaged = store.folder / name
            damaged.unlink() if damage is None else damaged.write_bytes(damage)
            assert not build(file, stop_at_bad_row=False).cached, (name, damage)
            assert contents(store.folder) == whole
            assert f"{store.folder} is damaged" in capfd.readouterr().err
            num_damages += 1
    assert num_damages == 36
    assert build(file, stop_at_bad_row=False).cached
    assert len(stores(tmp_path / "cache")) == 1


def test_every_flipped_bit_of_a_store_is_found_and_named(build, tmp_path, capfd):
    file = write(tmp_path / "a.jsonl", [*rows(50), "{"])
    store = build(file, stop_at_bad_row=False)
    for name, data in contents(store.folder).items():
        for place in (0, len(data) // 2, len(data) - 1):
            changed = bytearray(data)
            changed[place] ^= 1
            (store.folder / name).write_bytes(changed)
            with pytest.raises(store_module.Damaged, match=name):
                store_module.open_store(store.folder, tmp_path)
        (store.folder / name).write_bytes(data)
    ids = store.ids.copy()
    (store.folder / "ids").write_bytes(bytes(ids.nbytes))
    capfd.readouterr()
    again = build(file, stop_at_bad_row=False)
    assert not again.cached and np.array_equal(again.ids, ids)
    expected = f"{store.folder} is damaged (ids does not match its checksum): tokenizing again"
    assert expected in capfd.readouterr().err


def test_a_store_that_agrees_with_its_checksums_and_not_with_itself_is_damaged(build, tmp_path):
    store = build(write(tmp_path / "a.jsonl", [*rows(5), "{"]), stop_at_bad_row=False)

    def change(name: str, change_array) -> str:
        """Change an array, and make all checksums right again."""
        folder = tmp_path / "copy" / store.folder.name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(store.folder, folder)
        meta = json.loads((folder / "meta.json").read_text())
        if name in store_module.DTYPES:
            array = np.fromfile(folder / name, store_module.DTYPES[name])
            changed = change_array(array)
            (array if changed is None else changed).tofile(folder / name)
            data = (folder / name).read_bytes()
            meta["sizes"][name] = len(data)
            meta["digests"][name] = xxhash.xxh3_128_hexdigest(data)
        else:
            meta[name] = change_array
        meta["checksum"] = store_module._checksum(meta)
        (folder / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(store_module.Damaged) as raised:
            store_module.open_store(folder, tmp_path)
        return str(raised.value)

    def put(place: int, value: int):
        return lambda array: array.__setitem__(place, value)

    assert "highest_id" in change("ids", put(3, 100_000))
    assert "ids" in change("ids", put(3, -1))
    assert "weights" in change("weights", put(3, 2))
    assert "trained" in change("weights", lambda array: array.fill(1))
    assert "trained" in change("trained", put(0, 1_000))
    assert "starts" in change("starts", put(-1, 7))
    assert "lengths" in change("starts", put(2, 0))
    assert "rows" in change("rows", put(0, 4)) and "rows" in change("rows", put(-1, 6))
    assert "places" in change("places", put(0, 0))
    assert "num_cut" in change("num_cut", put(0, -1))
    assert "examples" in change("num_cut", lambda array: array[:1])
    assert "highest_id" in change("highest_id", 5)
    assert "refused" in change("refused", {})
    assert "files" in change("files", []) and "files" in change("files", [{"name": "a"}])
    assert "weights" in change("weights", lambda array: array.astype("<i8"))
    assert "key is not of type str" in change("key", 1)
    meta = json.loads((store.folder / "meta.json").read_text())
    meta["weights"] = "O"  # which would take what the file holds for pointers
    meta["checksum"] = store_module._checksum(meta)
    (store.folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(store_module.Damaged, match="weights is not one of"):
        store_module.open_store(store.folder, tmp_path)


def test_a_store_of_links_and_special_files_is_not_followed(build, tmp_path):
    file = write(tmp_path / "a.jsonl", rows(5))
    folder = build(file).folder
    elsewhere = tmp_path / "elsewhere"
    for name in ("ids", "meta.json"):
        (folder / name).rename(elsewhere)
        (folder / name).symlink_to(elsewhere)
        assert not build(file).cached and elsewhere.exists(), name
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert not build(file).cached, name
    folder.rename(elsewhere := tmp_path / "all")
    folder.symlink_to(elsewhere)
    assert not build(file).cached and not folder.is_symlink() and elsewhere.exists()
    shutil.rmtree(folder)
    folder.write_text("")
    assert not build(file).cached and build(file).cached


def test_the_cache_is_bounded_and_what_is_in_use_stays(build, tmp_path):
    first, second = (build(write(tmp_path / f"{n}.jsonl", rows(5, first=n))) for n in range(2))
    for age, store in enumerate((second, first), start=1):
        os.utime(store.folder, (time.time() - age, time.time() - age))
    found = cache_room.entries(tmp_path / "cache")
    assert [entry.folder for entry in found] == [first.folder, second.folder]
    assert [entry.names for entry in found] == [["0.jsonl"], ["1.jsonl"]]
    assert found[0].num_tokens == len(first.ids)
    part = first.ids[3:7]  # all that is left of the store
    folders = [first.folder, second.folder]
    (tmp_path / "cache/not-ours").mkdir()
    del first, second, store
    assert not cache_room.remove(found[0]) and len(part) == 4
    last = build(write(tmp_path / "c.jsonl", rows(6)), cache_gb=1e-6)
    assert [folder.exists() for folder in folders] == [True, False] and last.folder.exists()
    del part
    assert cache_room.remove(found[0]) and (tmp_path / "cache/not-ours").exists()


def test_the_command_clears_old_sources_and_programs_and_nothing_else(
    build, tmp_path, monkeypatch, capsys
):
    old, new = (build(write(tmp_path / f"{n}.jsonl", rows(5, first=n))).folder for n in range(2))
    programs = tmp_path / "cache/compiled/jaxlib-1"
    programs.mkdir(parents=True)
    for name, age in (("old-cache", 3), ("new-cache", 0), ("notes.txt", 3)):
        (programs / name).write_bytes(bytes(1000))
        os.utime(programs / name, (time.time() - age * 86400,) * 2)
    os.utime(old, (time.time() - 3 * 86400,) * 2)

    def run(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["cache", f"--dir={tmp_path / 'cache'}", *options])
        assert cache_command.main() == 0
        return capsys.readouterr().out

    assert all(text in run() for text in ("0.jsonl", "1.jsonl", "2 compiled programs"))
    assert old.exists() and new.exists()
    said = run("--clear", "--older-than=2")
    assert "0.jsonl" in said and "1.jsonl" not in said and "1 compiled programs" in said
    assert not old.exists() and new.exists()
    assert {file.name for file in programs.iterdir()} == {"new-cache", "notes.txt"}
    run("--clear")
    assert not new.exists() and [file.name for file in programs.iterdir()] == ["notes.txt"]
    with pytest.raises(SystemExit):
        run("--clear", "--older-than=nan")


def test_a_holder_of_the_lock_that_hangs_is_named(build, tmp_path, monkeypatch, capfd):
    file = write(tmp_path / "a.jsonl", rows(3))
    key = build(file).folder.name
    shutil.rmtree(tmp_path / "cache" / key)
    monkeypatch.setattr(store_lock, "HUNG_S", 0.3)
    monkeypatch.setattr(store_lock, "SAY_AGAIN_S", 0.1)
    with open(tmp_path / "cache" / f"{key}.lock", "r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=rf"process {os.getpid()} on .* written nothing"):
            build(file)
    assert capfd.readouterr().err.count("waiting for another process") > 1
    assert not build(file).cached
    with open(tmp_path / "cache" / f"{key}.lock", "r+b", buffering=0) as lock:
        assert lock.read()  # as who waits does
        store_lock._sign(lock)
    assert (tmp_path / "cache" / f"{key}.lock").read_bytes().startswith(b"process")


def test_a_damaged_store_where_nothing_can_be_written_is_named(build, tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl", rows(5))
    folder = build(file).folder
    (folder / "ids").write_bytes(bytes((folder / "ids").stat().st_size))

    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(store_lock, "unfinished", refuse)
    with pytest.raises(ValueError, match=r"store .* damaged: ids .*checksum.*data\.cache_dir"):
        build(file)


@pytest.mark.parametrize("number", tiers.fast([1, 20], [1, 4, 9, 20]))
def test_a_full_disk_is_told_and_leaves_nothing(build, tmp_path, monkeypatch, number):
    file = write(tmp_path / "a.jsonl", rows(2500))
    write_all, calls = store_module.write_all, []

    def write_until_full(stream, data):
        calls.append(len(data))
        if len(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_all(stream, data)

    monkeypatch.setattr(store_module, "write_all", write_until_full)
    with pytest.raises(ValueError, match="No space left on device: .* data.cache_dir"):
        build(file)
    assert len(calls) == number and stores(tmp_path / "cache") == []
    monkeypatch.setattr(store_module, "write_all", write_all)
    assert not build(file).cached


def test_a_write_that_the_system_cuts_short_leaves_nothing(build, tmp_path):
    """The kernel's own refusal, half-way through a file: RLIMIT_FSIZE in place of a full disk."""
    program = """
        import resource
        from jax_sft.settings import Source
        from jax_sft.data.tokens import cache
        from jax_sft.data.chat import encoding
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_001, 100_001))
        try:
            file, model, folder = sys.argv[1:]
            cache.open_or_build(Source(file), model, encoding.Options(), folder, 1,
                                stop_at_bad_row=True, progress=False)
        except ValueError as error:
            print(error)
    """
    file = write(tmp_path / "a.jsonl", rows(2500))
    model = write_model(tmp_path / "model")
    ran = run_script(program, file, model, tmp_path / "cache")
    assert "File too large" in ran.stdout and "data.cache_dir" in ran.stdout, ran.stderr
    assert stores(tmp_path / "cache") == []


def test_a_data_file_that_goes_while_it_is_tokenized_is_named(build, tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl", rows(3))
    tokenize = worker.tokenize

    def remove_meanwhile(*args):
        yield from tokenize(*args)
        file.unlink()

    monkeypatch.setattr(worker, "tokenize", remove_meanwhile)
    with pytest.raises(ValueError, match=r"a\.jsonl cannot be read: .*No such file"):
        build(file)
    assert stores(tmp_path / "cache") == []


@pytest.mark.parametrize(
    "damage", ["[" * 100_000, "{}", "[1]", '["a", 1, 1, 1, 1, 1, 1]', '[["a"], 1, 1, 1, 1, 1, "a"]']
)
def test_hashes_that_are_none_are_passed_over(build, tmp_path, damage):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/hashes.jsonl").write_text(damage + "\n\xff\n")
    assert len(build(write(tmp_path / "a.jsonl", rows(3))).starts) == 3


def test_a_data_file_that_cannot_be_read_is_told(build, tmp_path, monkeypatch):
    open_regular = regular.open_regular

    def refuse(name, **kwargs):
        if Path(name).suffix == ".jsonl":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return open_regular(name, **kwargs)

    monkeypatch.setattr(regular, "open_regular", refuse)
    with pytest.raises(ValueError, match=r"a\.jsonl cannot be read: .*Input/output error"):
        build(write(tmp_path / "a.jsonl", rows(3)))


def test_a_cache_folder_that_cannot_be_made_is_told(build, tmp_path):
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with pytest.raises(ValueError, match="cache folder .* data.cache_dir"):
        build(write(tmp_path / "a.jsonl", rows(3)), cache_dir=in_the_way / "cache")


FORKS = """
    import os, signal, time
    from jax_sft.settings import Source
    from jax_sft.data.tokens import cache, worker
    from jax_sft.data.chat import encoding

    def build(file, model, folder, num_workers=1):
        return cache.open_or_build(Source(file), model, encoding.Options(), folder,
                                   num_workers,
                                   stop_at_bad_row=True, progress=False)

    def fork(function):
        child = os.fork()
        if not child:
            os._exit(function() or 0)
        return child

    def tokenize_here(job, chunks, _):  # a process for each fork would take seconds to start
        encoder = worker.Encoder(job)
        for chunk in chunks:
            yield chunk, encoder.encode(chunk)

    worker.tokenize = tokenize_here
"""


def test_a_build_killed_at_any_moment_leaves_nothing_half_valid(tmp_path, model):
    """SIGKILL before, and in the middle of, all that changes something on the disk."""
    data = [{"ids": [n, n + 1], "mask": [0, 1]} for n in range(1200)] + [
        {"ids": [7], "mask": [0.5]}
    ]
    program = (
        FORKS
        + """
    import itertools, json, pathlib, shutil
    from jax_sft.data.tokens import store as store_module
    file, model, folder, whole = sys.argv[1:]
    expected = build(file, model, whole).folder

    def contents(folder):
        return {found.name: found.read_bytes() for found in folder.iterdir()}

    def build_until(last):
        moments = itertools.count(1)
        def moment():
            if next(moments) == last:
                os.kill(os.getpid(), signal.SIGKILL)
        def around(place, name):
            function = getattr(place, name)
            def watched(*args, **kwargs):
                moment()
                if name == "write_all":
                    stream, data = args
                    function(stream, data[: len(data) // 2])
                    moment()
                    args = stream, data[len(data) // 2 :]
                return function(*args, **kwargs)
            setattr(place, name, watched)
        around(store_module, "write_all"), around(os, "fsync"), around(json, "dump")
        around(pathlib.Path, "rename"), around(pathlib.Path, "mkdir"), around(shutil, "rmtree")
        build(file, model, folder)

    for last in itertools.count(1):
        child = fork(lambda: build_until(last))
        killed = os.waitpid(child, 0)[1] == signal.SIGKILL
        store = pathlib.Path(folder) / expected.name
        found = pathlib.Path(folder).glob("*.unfinished-*")
        assert len(list(found)) <= killed, "each build clears up after the one before"
        if store.exists():
            assert contents(store) == contents(expected), last
            assert build(file, model, folder).cached
            shutil.rmtree(store)
        if not killed:
            break
    print(last)
    """
    )
    ran = run_script(
        program, write(tmp_path / "a.jsonl", data), model, *(tmp_path / x for x in "cw")
    )
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) > 40, "moments to be killed at"


def test_processes_that_start_together_build_once(tmp_path, model):
    file = write(tmp_path / "a.jsonl", rows(3000))
    program = (
        FORKS
        + """
    file, model, folder = sys.argv[1:]
    children = [fork(lambda: 2 if build(file, model, folder).cached else 1) for _ in range(4)]
    print(sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
    """
    )
    ran = run_script(program, file, model, tmp_path / "cache")
    assert ran.stdout == "[1, 2, 2, 2]\n", ran.stderr
    assert ran.stderr.count("waiting for another process") == 3


def test_without_locks_the_rename_keeps_a_store_right(build, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    file = write(tmp_path / "a.jsonl", rows(10))
    whole = contents(build(file, cache_dir=tmp_path / "whole").folder)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    tokenize, nested = worker.tokenize, []

    def another_is_first(*args):
        if not nested:
            nested.append(True)
            nested.append(build(file))
        yield from tokenize(*args)

    monkeypatch.setattr(worker, "tokenize", another_is_first)
    store = build(file)
    assert not nested[1].cached and contents(store.folder) == whole
    assert stores(tmp_path / "cache") == [store.folder]


def test_leftovers_are_removed_when_dead_and_only_then(build, tmp_path):
    folder = tmp_path / "cache"
    host = os.uname().nodename
    day = 24 * 3600

    def leave(key: str, host: str, age_s: float = 0) -> Path:
        left = folder / f"{key}.unfinished-{host}-0123abcd"
        write(left / "ids", ["x"])
        for path in (left / "ids", left):
            os.utime(path, (time.time() - age_s, time.time() - age_s))
        return left

    dead, alive = leave("a" * 64, host), leave("b" * 64, host, age_s=9 * day)
    elsewhere, forgotten = leave("a" * 64, "elsewhere"), leave("a" * 64, "gone", age_s=2 * day)
    with open(folder / f"{'b' * 64}.lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        store = build(write(tmp_path / "a.jsonl", rows(3)))
        assert stores(folder) == sorted([store.folder, alive, elsewhere])
    assert not dead.exists() and not forgotten.exists()
    build(write(tmp_path / "a.jsonl", rows(4)))
    assert not alive.exists()


# ---- processes that tokenize --------------------------------------------------------------------


@pytest.fixture
def taken(monkeypatch) -> list[confined.Process]:
    """The processes that were taken, several for little data too."""
    monkeypatch.setattr(worker, "FEW_CHUNKS", 1)
    found, take = [], confined.take

    def take_and_note():
        found.append(take())
        return found[-1]

    monkeypatch.setattr(confined, "take", take_and_note)
    return found


def running(processes: list[confined.Process]) -> set[confined.Process]:
    return {process for process in processes if process.popen.poll() is None}


def test_any_number_of_processes_gives_bitwise_the_same_store(build, tmp_path, taken):
    data = [*rows(3500), {"prompt": "a", "response": None}, *rows(900)]
    file = write(tmp_path / "a.jsonl", data)
    made = []
    for num_workers in (1, 2, 3):
        folder = tmp_path / str(num_workers)
        store = build(file, num_workers=num_workers, cache_dir=folder, stop_at_bad_row=False)
        made.append(contents(store.folder))
        assert store.meta["rows"] == 4401
        assert store.rows.tolist() == [*range(3500), *range(3501, 4401)]
        assert len(running(taken)) == 1
    assert len(taken) == 1 + 2 + 3
    assert made[0] == made[1] == made[2]


def test_one_process_tokenizes_little_data_and_is_used_again(build, tmp_path, taken, monkeypatch):
    monkeypatch.setattr(worker, "FEW_CHUNKS", 16)
    for number in range(3):
        file = write(tmp_path / "a.jsonl", rows(3000, first=number))
        assert len(build(file, num_workers=8).rows) == 3000
    assert len(taken) == 3 and len(set(taken)) == 1


def test_a_process_that_is_killed_is_told_with_what_to_do(build, tmp_path, taken, monkeypatch):
    file = write(tmp_path / "a.jsonl", rows(6000))
    add = store_module.Writer.add

    def kill_one(*args):
        taken[0].popen.kill()
        add(*args)

    monkeypatch.setattr(store_module.Writer, "add", kill_one)
    with pytest.raises(RuntimeError, match=r"SIGKILL.*memory.*data\.num_workers below 2"):
        build(file, num_workers=2)
    assert taken[0] not in running(taken) and len(running(taken)) <= 1
    assert stores(tmp_path / "cache") == []


def test_a_process_that_fails_to_load_the_tokenizer_says_why(build, tmp_path, taken):
    broken = write_model(tmp_path / "broken", tokenizer_json="{")
    with pytest.raises(ValueError, match="no tokenizer that can be loaded"):
        build(write(tmp_path / "a.jsonl", rows(2500)), num_workers=2, tokenizer_folder=broken)
    assert len(taken) == 2


@pytest.mark.parametrize("what", ["a library", "a module"])
def test_processes_with_other_code_than_ours_are_refused(build, tmp_path, taken, monkeypatch, what):
    if what == "a library":
        monkeypatch.setitem(worker.VERSIONS, "tokenizers", "before the update")
    else:  # edited in the same place, without another version
        time_ns, size = worker.SOURCES["jax_sft.data.chat.encoding"]
        monkeypatch.setitem(worker.SOURCES, "jax_sft.data.chat.encoding", (time_ns - 1, size))
    with pytest.raises(ValueError, match="code of the program changed"):
        build(write(tmp_path / "a.jsonl", rows(2500)), num_workers=2)
    assert stores(tmp_path / "cache") == []


def test_a_process_may_have_loaded_fewer_modules_than_ours(build, tmp_path, taken, monkeypatch):
    monkeypatch.setitem(worker.SOURCES, "jax_sft.loaded_by_the_parent_only", (1, 1))
    assert len(build(write(tmp_path / "a.jsonl", rows(3))).rows) == 3


PROGRAM = """
    import time
    from jax_sft.settings import Source
    from jax_sft.data.tokens import cache, worker
    from jax_sft.data.chat import encoding
    worker.FEW_CHUNKS = 1
    print("the program runs", flush=True)
    file, model, folder = sys.argv[1:]
    store = cache.open_or_build(Source(file), model, encoding.Options(), folder, 2,
                                stop_at_bad_row=True, progress=False)
    print(len(store.rows), "jax" in sys.modules)
"""


def test_a_program_without_a_main_guard_runs_once_and_from_any_folder(build, tmp_path, model):
    file = write(tmp_path / "a.jsonl", rows(3000))
    # Modules that would be found first, were the working folder searched.
    write(tmp_path / "elsewhere" / "numpy.py", ["raise ImportError('the wrong numpy')"])
    program = "sys.path.remove('')\n" + textwrap.dedent(PROGRAM)
    ran = run_script(program, file, model, tmp_path / "cache", cwd=tmp_path / "elsewhere")
    assert ran.stdout == "the program runs\n3000 False\n", ran.stderr
    assert build(file).cached  # another process finds what that one made


def children(process_id: int) -> set[int]:
    found = set()
    for file in Path(f"/proc/{process_id}/task").glob("*/children"):
        found |= set(map(int, file.read_text().split()))
    return found


def is_running(process_id: int) -> bool:
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_the_one_that_started_it(tmp_path, model, kind):
    file = write(tmp_path / "a.jsonl", rows(60_000))
    head = f"import sys\nsys.path.insert(0, {str(REPO)!r})\n" + textwrap.dedent(PROGRAM)
    arguments = [str(file), str(model), str(tmp_path / "cache")]
    command = [sys.executable, "-c", head, *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        written: list[Path] = []
        while not any(found.stat().st_size for found in written):
            assert process.poll() is None
            time.sleep(0.05)
            written = list((tmp_path / "cache").glob("*.unfinished-*/ids"))
        workers = children(process.pid)
        assert len(workers) == 2
        if kind == signal.SIGINT:  # which Ctrl-C sends to all processes of a group
            os.killpg(process.pid, kind)
        else:
            process.send_signal(kind)
        assert process.stderr
        shown = process.stderr.read().decode()
    assert "in serve" not in shown  # no traceback of theirs
    deadline = time.monotonic() + 20
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if kind == signal.SIGINT:
        assert stores(tmp_path / "cache") == []


@pytest.mark.slow  # six minutes of one core: 300 MB of text, a token per byte
def test_memory_stays_flat_for_much_text(tmp_path, model):
    program = """
        import resource
        from jax_sft.settings import Source
        from jax_sft.data.tokens import cache, worker
        from jax_sft.data.chat import encoding
        arguments = [Source(sys.argv[1]), sys.argv[2], encoding.Options(), sys.argv[3], 2]
        few = Source(sys.argv[1], limit=60_000)
        peaks = []
        for source in (few, arguments[0]):
            store = cache.open_or_build(
                source, *arguments[1:], stop_at_bad_row=True, progress=False
            )
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        print(len(store.ids), *peaks)
    """
    file = tmp_path / "a.jsonl"
    with open(file, "w") as stream:
        for n in range(300_000):
            stream.write(json.dumps({"text": f"{n} " + "some text " * 100}) + "\n")
    assert file.stat().st_size > 300_000_000
    ran = run_script(program, file, model, tmp_path / "cache", timeout_s=1800)
    num_tokens, few, all_of_it = map(int, ran.stdout.split())
    assert num_tokens > 300_000_000 and all_of_it < few + 50, ran.stderr  # MB
