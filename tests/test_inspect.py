"""What inspect shows and dumps is what trains; what training would refuse makes it fail."""

import html.parser
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from jax_sft import config, tiny
from jax_sft.data import row_report
from jax_sft.inspect import __main__ as inspector

ROOT = Path(__file__).resolve().parent.parent
END = "<|im_end|>"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a byte tokenizer and a ChatML template: no weights, not even a config.json."""
    folder = tmp_path_factory.mktemp("model")
    tiny.write_tokenizer(folder)
    return folder


@pytest.fixture
def make(tmp_path, model):
    """Make a config for a mesh that no machine has; each source is given as its rows or lines."""

    def make(eval_rows=None, **train_rows):
        cfg = config.default()
        cfg.model.path = str(model)
        cfg.data.seq_len = 100
        cfg.data.cache_dir = str(tmp_path / "cache")
        cfg.batch.rows = 6
        cfg.mesh.tensor = 7
        cfg.mesh.fsdp = 1000
        for name, rows in train_rows.items():
            cfg.data.train[name] = config.source(write_rows(tmp_path / f"{name}.jsonl", rows))
        for name, rows in (eval_rows or {}).items():
            cfg.data.eval[name] = config.source(write_rows(tmp_path / f"eval-{name}.jsonl", rows))
        return cfg

    return make


@pytest.fixture
def run(tmp_path, capsys):
    """Inspect in this process; returns (exit code, printed text, dumped objects)."""

    def run(cfg, color=False, **options):
        dump = tmp_path / "dump.jsonl"
        code = inspector.inspect(cfg, inspector.Options(dump=str(dump), **options), color)
        dumped = [json.loads(line) for line in dump.read_text(encoding="utf-8").splitlines()]
        return code, capsys.readouterr().out, dumped

    return run


def write_rows(file: Path, rows) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return file


def ask(prompt: str, response: str) -> dict:
    return {"prompt": prompt, "response": response}


def expected(model: Path, *parts: tuple[str, float]) -> dict:
    """Ids and mask of texts given with their weights, by the tokenizers library alone."""
    backend = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = [backend.encode(text, add_special_tokens=False).ids for text, _ in parts]
    mask = [[weight] * len(some) for some, (_, weight) in zip(ids, parts, strict=True)]
    return {"ids": sum(ids, []), "mask": sum(mask, [])}


def chatml(model: Path, prompt: str, response: str) -> dict:
    before = f"<|im_start|>user\n{prompt}{END}\n<|im_start|>assistant\n"
    return expected(model, (before, 0), (response + END, 1), ("\n", 0))


class Page(html.parser.HTMLParser):
    """Collects the elements and the marked text of each example; checks the nesting."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.names: set[str] = set()
        self.links: list[tuple[str, str]] = []
        self.marked: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.links += [(k, v) for k, v in attrs if k in ("src", "href", "style") or "http" in v]
        if tag != "meta":
            self.open.append(tag)
        if tag == "mark":
            self.marked.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "mark" in self.open:
            self.marked[-1] += data


# ---- the dump -----------------------------------------------------------------------------------


def test_the_dump_marks_exactly_the_response_and_its_end_of_turn(make, run, model):
    rows = [("hi", "hello"), ("näh ✓", "👩‍🚀 ja"), ("a" * 20, "\nx")]
    cfg = make(
        b=[ask(*row) for row in rows[:2]],
        a=[ask(*rows[2])],
        eval_rows={"held": [ask(*rows[0])], "b": [ask("q", "r")]},
    )
    code, printed, dumped = run(cfg)
    given = [("a", 0, rows[2]), ("b", 0, rows[0]), ("b", 1, rows[1])]
    given += [("eval/b", 0, ("q", "r")), ("eval/held", 0, rows[0])]
    assert dumped == [
        {"source": source, "row": row, **chatml(model, *texts)} for source, row, texts in given
    ]
    assert code == 0 and printed.rstrip().endswith("training would refuse nothing")


def test_the_mask_keeps_fractions_and_what_the_data_says_of_the_first_token(make, run, model):
    ids = list(range(8))
    cfg = make(
        t=[
            {"ids": ids, "mask": [1, 0, 0.3, 1, 2.5, 0, 0, 1]},
            {"ids": ids, "mask": [0, 0, 0, 1, 1, 1, 1, 1]},
        ],
        text=[{"text": "plain"}],
    )
    code, printed, dumped = run(cfg, num=5)
    assert [one["mask"] for one in dumped if one["source"] == "t"] == [
        *([1, 0, 0.3, 1, 2.5, 0, 0, 1], [0, 0, 0, 1, 1, 1, 1, 1])
    ]
    assert dumped[2] == {"source": "text", "row": 0, **expected(model, ("plain" + END, 1))}
    # On screen the first token is not marked: nothing comes before it that could predict it.
    assert f"p⟦lain{END}⟧" in printed and "6 tokens, 5 train" in printed
    assert code == 0


def test_a_cut_example_says_so_and_ends_with_its_last_whole_turn(make, run, model):
    turns = [{"role": "user", "content": "u" * 20}, {"role": "assistant", "content": "a" * 20}]
    cfg = make(main=[{"messages": turns * 2}, {"messages": turns}])
    whole = chatml(model, "u" * 20, "a" * 20)
    cfg.data.overlong = "truncate"
    code, printed, dumped = run(cfg)
    cut = {name: values[:-1] for name, values in whole.items()}  # without the newline behind it
    assert dumped == [
        {"source": "main", "row": 0, **cut, "truncated": True},
        {"source": "main", "row": 1, **whole},
    ]
    assert code == 0 and printed.count("truncated") == 1
    cfg.data.overlong = "truncate_history"
    code, printed, dumped = run(cfg)
    assert dumped == [
        {"source": "main", "row": 0, **whole, "truncated": True},
        {"source": "main", "row": 1, **whole},
    ]
    assert code == 0 and "truncated: 1 turns left out at the start" in printed


# ---- what would be refused ----------------------------------------------------------------------

MIXED = [ask("a", "b"), '{"prompt": "cut', ask("c" * 200, "d"), {"prompt": "e", "response": None}]


def test_every_bad_row_is_shown_and_fails_unless_it_may_be_skipped(make, run, tmp_path):
    cfg = make(main=[*MIXED, ask("e", "f")])
    code, printed, dumped = run(cfg)
    assert code == inspector.EXIT_REFUSED == 1
    assert [(one["row"], "error" in one) for one in dumped] == [
        *((0, False), (1, True), (2, True), (3, True), (4, False))
    ]
    assert "main: 2 bad row(s)" in printed and "main: 1 dropped" in printed
    for row, line in ((1, 2), (2, 3), (3, 4)):
        assert len(re.findall(rf"row {row} \(.*main.jsonl, line {line}\): \w", printed)) == 1
        assert dumped[row]["error"][:20] in printed
    assert "overlong: " in dumped[2]["error"] and "data.seq_len = 100" in dumped[2]["error"]
    last = [line for line in printed.splitlines() if line.startswith("training would")]
    assert last == [
        "training would leave out of main: 1 overlong",
        'training would refuse 2 bad row(s) of main (data.on_bad_row = "raise")',
    ]
    cfg.data.on_bad_row = "skip"
    code, printed, again = run(cfg)
    lost = "main leaves out 60.0% of its rows (3 of 5) and "
    assert code == 1 and f"training would refuse to start: {lost}" in printed
    cfg.data.max_lost = 1.0
    page = tmp_path / "page.html"
    code, printed, again = run(cfg, html=str(page))
    assert (code, again) == (0, dumped) and f"WARNING {lost}" in printed
    assert 'class="verdict amber"' in page.read_text(encoding="utf-8")
    assert "training would leave out of main: 1 overlong, 2 bad_row" in printed
    assert "training would refuse nothing" in printed


def test_every_overlong_example_is_shown_and_fails_under_raise(make, run):
    cfg = make(main=[ask("c" * 200, "d"), ask("a", "b"), ask("e", "f" * 300)])
    cfg.data.overlong = "raise"
    code, printed, dumped = run(cfg)
    assert code == 1
    assert [(one["row"], "error" in one) for one in dumped] == [(0, True), (1, False), (2, True)]
    assert "refuse 2 example(s) of main over data.seq_len = 100" in printed
    assert "training would leave out" not in printed


def test_an_example_that_just_fits_is_in_and_one_of_a_token_more_is_out(make, run, model):
    room = 101 - len(chatml(model, "", "r")["ids"])  # 100 inputs and the last target
    cfg = make(main=[ask("x" * room, "r"), ask("x" * (room + 1), "r")])
    code, _, dumped = run(cfg)
    assert code == 0
    assert len(dumped[0]["ids"]) == 101
    assert dumped[1] == {
        **{"source": "main", "row": 1},
        "error": "overlong: 101 tokens do not fit data.seq_len = 100",
    }


def test_an_example_without_a_trained_token_is_named_and_no_reason_to_fail(make, run):
    tokens = {"ids": [1, 2, 3], "mask": [1, 0, 0]}  # only the first, which is never a target
    code, printed, dumped = run(make(main=[tokens, tokens | {"mask": [0, 1, 0]}]))
    assert code == 0
    assert dumped[0]["error"].startswith("no_trained_token") and "error" not in dumped[1]
    assert "training would leave out of main: 1 no_trained_token" in printed


def test_nothing_left_to_train_or_to_evaluate_fails(make, run):
    long = [ask("c" * 200, "d")]
    code, printed, dumped = run(make(main=long, other=long, eval_rows={"e": long}))
    assert code == 1
    assert "training would refuse to start: data.train has no example left" in printed
    assert "training would refuse to start: data.eval.e has no example left" in printed
    assert [one["source"] for one in dumped] == ["main", "other", "eval/e"]
    assert all("error" in one for one in dumped)
    code, printed, _ = run(make(main=long, other=[ask("a", "b")]))
    assert code == 1 and "refuse to start: data.train.main has 0 examples" in printed


def test_a_source_that_gives_nothing_per_epoch_fails(make, run):
    cfg = make(main=[ask("a", "b")] * 3)
    cfg.data.train.main.epochs = 0.1
    code, printed, _ = run(cfg)
    assert code == 1 and "data.train.main.epochs = 0.1" in printed


def test_a_tokenizer_of_another_model_fails(make, run, model, tmp_path):
    cfg = make(main=[ask("a", "b")])
    folder = tmp_path / "small"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    cfg.model.path = str(folder)
    for vocab, expected_code in ((258, 1), (259, 0)):  # <|im_end|> is 258
        (folder / "config.json").write_text(json.dumps({"vocab_size": vocab}))
        code, printed, _ = run(cfg)
        assert code == expected_code
        assert ("token id is 258, and there are only 258" in printed) == bool(code)


def test_all_problems_of_config_and_sources_come_at_once(make, run):
    cfg = make(main=[ask("a", "b")])
    cfg.data.overlong, cfg.data.turns = "cut", "first"
    with pytest.raises(ValueError, match=r"2 problem\(s\)(.|\n)*overlong(.|\n)*turns"):
        run(cfg)
    cfg = make(one=["["], two=["{}"], three=[ask("a", "b")])
    with pytest.raises(ValueError, match=r"2 source\(s\) cannot be read:(.|\n)*one(.|\n)*two"):
        run(cfg)
    cfg = make(main=[ask("a", "b")])
    with pytest.raises(ValueError, match="--source=no is not a source: use one of .'main'"):
        run(cfg, source="no")
    with pytest.raises(ValueError, match="--row=1 is not there: main has rows 0 to 0"):
        run(cfg, row=1)
    cfg = make(main=[ask("a", "b")], other=[ask("a", "b")])
    with pytest.raises(ValueError, match="--row needs --source"):
        run(cfg, row=0)


# ---- screen -------------------------------------------------------------------------------------


def test_one_row_can_be_asked_for_also_one_that_was_refused(make, run):
    cfg = make(main=MIXED, other=[ask("x", "y")])
    _, printed, dumped = run(cfg, source="main", row=0)
    assert printed.count("━━━ ") == 1 and f"⟦b{END}⟧⏎" in printed
    for row in (1, 2):
        _, printed, _ = run(cfg, source="main", row=row)
        assert printed.count("━━━ ") == 1 and "⟦b" not in printed
        assert f"left out: {dumped[row]['error']}"[:70] in printed


def test_the_first_example_and_others_spread_over_the_source_are_shown(make, run, tmp_path):
    cfg = make(main=[ask(f"q{n}", f"r{n}") for n in range(40)], few=[ask("q", "r")] * 2)
    _, printed, _ = run(cfg, num=4)
    rows = [int(n) for n in re.findall(r"━━━ main, row (\d+) ", printed)]
    assert rows == sorted(set(rows)) and len(rows) == 4 and rows[0] == 0
    assert 1 <= rows[1] < 14 <= rows[2] < 27 <= rows[3] < 40
    assert re.findall(r"━━━ few, row (\d+) ", printed) == ["0", "1"]
    assert run(cfg, num=4)[1] == printed
    cfg.seed = 1
    assert run(cfg, num=4)[1] != printed
    assert [len(re.findall("━━━ main", run(cfg, num=num)[1])) for num in (0, 1, 2)] == [0, 1, 2]


def test_packed_rows_hold_each_example_once_and_fit(make, run):
    cfg = make(b=[ask("b", "x" * n) for n in range(1, 20)], a=[ask("a", "yy" * 9)] * 7)
    _, printed, dumped = run(cfg, num=0, rows=1000)
    blocks = printed.split("━━━ step ")[1:]
    seen, inputs = [], 0
    for block in blocks:
        head = re.match(r"(\d+), row (\d+): (\d+) segments, (\d+) of 100 inputs", block)
        assert head
        found = re.findall(r"segment (\d+): (\w), row (\d+), inputs (\d+) to (\d+);", block)
        assert [int(n) for n, *_ in found] == list(range(1, int(head[3]) + 1))
        starts = [int(start) for *_, start, _ in found]
        stops = [int(last) + 1 for *_, last in found]
        assert [0, *stops][: len(stops)] == starts and [0, *stops][-1] == int(head[4]) <= 100
        seen += [(name, int(row)) for _, name, row, *_ in found]
        inputs += int(head[4])
    assert sorted(seen) == [(one["source"], one["row"]) for one in dumped]
    assert inputs == sum(len(one["ids"]) - 1 for one in dumped)
    packed = re.search(r"packed +(\d+) rows of 100 inputs, ([\d.]+)% full; (\d+) steps", printed)
    assert packed
    rows, fill, steps = int(packed[1]), float(packed[2]), int(packed[3])
    assert len(blocks) == 6 * steps and steps == -(-rows // 6)
    assert fill == pytest.approx(inputs / rows, abs=0.01)
    assert len([block for block in blocks if ": 0 segments" not in block]) == rows


def test_the_balance_after_ordering_is_no_worse_and_none_without_shuffling(make, run):
    rng = np.random.default_rng(0)
    cfg = make(main=[ask("q", "x" * n) for n in rng.integers(1, 60, 300).tolist()])
    cfg.batch.rows, cfg.mesh.fsdp = 16, 4

    def balance():
        found = re.search(r"of 4 ranks, max/mean: ([\d.]+) as packed, ([\d.]+)", run(cfg)[1])
        assert found
        return float(found[1]), float(found[2])

    before, after = balance()
    assert 1 <= after < before < 2
    cfg.data.shuffle = False
    before, after = balance()
    assert before == after


def test_unpacked_data_is_shown_as_such(make, run):
    cfg = make(main=[ask("q", "r")] * 13)
    cfg.data.packing = "none"
    _, printed, _ = run(cfg)
    assert "unpacked  13 rows, padded to what their batch needs; 3 steps of 6 rows" in printed


def test_hostile_data_reaches_neither_terminal_nor_page_as_code(make, run, tmp_path):
    hostile = "</mark><script>alert(1)</script><img src=http://a.b/c>\x1b[42m⟦no⟧\n\n"
    cfg = make(main=[ask(hostile, "yes" + hostile), {"prompt": hostile}, {"prompt": "\ud800"}])
    cfg.data.on_bad_row, cfg.data.seq_len, cfg.data.max_lost = "skip", 500, 1.0
    page = tmp_path / "page.html"
    code, printed, dumped = run(cfg, html=str(page))
    assert code == 0 and len(dumped) == 3
    assert "\x1b" not in printed and "⟦no" not in printed and "⟨U+27E6⟩no" in printed
    found = Page(page.read_text(encoding="utf-8"))
    assert not found.names & {"script", "img", "link", "iframe", "object"}
    assert found.links == []
    shown = hostile.replace("\x1b", "⟨U+001B⟩")
    assert found.marked.count("yes" + shown + END) == 1


# ---- page ---------------------------------------------------------------------------------------


def test_the_page_marks_every_shown_response_once_and_needs_nothing_else(make, run, tmp_path):
    cfg = make(main=[ask(f"q{n}", f"response {n} é✓") for n in range(5)], other=MIXED)
    page = tmp_path / "page.html"
    code, _, _ = run(cfg, num=5, html=str(page))
    assert code == 1
    text = page.read_text(encoding="utf-8")
    found = Page(text)
    assert found.links == [] and not found.names & {"script", "img", "link", "iframe", "object"}
    for n in range(5):
        assert found.marked.count(f"response {n} é✓{END}") == 1
    assert "training would refuse 2 bad row(s) of other" in text
    assert text.count("<svg") == 4  # fill, segments, and the lengths of two sources
    assert "other: 2 bad row(s)" in text and "url(" not in text and "@import" not in text
    run(cfg, num=0, rows=100, tokens=True, html=str(page))
    assert len([m for m in Page(page.read_text(encoding="utf-8")).marked if END in m]) == 6


def test_a_file_appears_whole_or_not_at_all(make, run, tmp_path):
    cfg = make(main=[ask("a", "b"), ask("c", "d")])
    _, _, before = run(cfg)

    def stop(entry, name):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_report.Entry, "to_json", stop)
        with pytest.raises(KeyboardInterrupt):
            run(cfg)
    assert [json.loads(s) for s in (tmp_path / "dump.jsonl").read_text().splitlines()] == before
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []
    with pytest.raises(ValueError, match="no-such-folder/page.html cannot be written"):
        run(cfg, html=str(tmp_path / "no-such-folder" / "page.html"))


# ---- command ------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, model):
    """Run the command in a process of its own, in which starting a device is an error."""
    file = tmp_path / "my_config.py"
    rows = [ask("hi", "hello"), ask("ho", "é")]
    data = write_rows(tmp_path / "data.jsonl", rows)
    file.write_text(
        "from jax_sft import config\n\n\ndef get_config():\n    cfg = config.default()\n"
        f"    cfg.model.path = {str(model)!r}\n"
        f"    cfg.data.train.main = config.source({str(data)!r})\n"
        f"    cfg.data.cache_dir = {str(tmp_path / 'cache')!r}\n    cfg.data.seq_len = 100\n"
        "    cfg.mesh.fsdp = 1000\n    return cfg\n"
    )

    def command(*flags, **environ):
        env = os.environ | {"JAX_PLATFORMS": "no-such-platform"} | environ
        env.pop("JAX_SFT_TRACEBACK", None)
        line = [sys.executable, "-m", "jax_sft.inspect", f"--config={file}", *flags]
        return subprocess.run(line, cwd=ROOT, env=env, text=True, capture_output=True)

    return command


def test_the_command_starts_no_device_and_colours_only_when_asked_to(command, tmp_path):
    dump = tmp_path / "dump.jsonl"
    done = command(f"--dump={dump}", "--config.data.seq_len=60", FORCE_COLOR="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b[30;42mhello\x1b[0m" in done.stdout
    assert [json.loads(line)["row"] for line in dump.read_text().splitlines()] == [0, 1]
    done = command(FORCE_COLOR="1", NO_COLOR="1", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout and f"\\u27e6hello{END}\\u27e7" in done.stdout


def test_mistakes_of_the_user_are_one_line_and_exit_code_64(command):
    for flag, said in (
        ("--config.data.seqlen=3", "seqlen"),
        ("--config.model.path=nowhere", "model.path = 'nowhere' is not a folder"),
    ):
        done = command(flag)
        assert done.returncode == 64, done.stderr
        assert said in done.stderr and "Traceback" not in done.stderr
        assert len([s for s in done.stderr.splitlines() if s.startswith("error: ")]) == 1
