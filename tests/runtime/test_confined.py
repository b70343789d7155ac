"""Programs that come with a model end within bounds of time and memory, without a traceback."""

import json
import mmap
import multiprocessing
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from transformers.utils import chat_template_utils

from jax_sft import tiny
from jax_sft.data.chat import encoding, template
from jax_sft.data.sources import formats, read
from jax_sft.data.tokens import cache, worker
from jax_sft.runtime import confined
from tests import inputs

SORTS = (
    "{% set a = range(100000)|list %}{% for i in range(100000) %}"
    "{% set y = (a|sort(reverse=True))[0] %}{% endfor %}"
)
GROWS = (
    "{% set ns = namespace(a=['x' * 1000]) %}{% for i in range(24) %}"
    "{% set ns.a = [ns.a[0] ~ ns.a[0]] %}{% endfor %}{{ ns.a|length }}"
)


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    tiny.write_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    return folder


@pytest.fixture
def build(model, tmp_path):
    """Tokenize rows with the model's files as they are now."""

    def make(*prompts: str) -> cache.Store:
        rows = [{"prompt": prompt, "response": "b"} for prompt in prompts]
        file = tmp_path / "a.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = inputs.source(str(file))
        return cache.open_or_build(
            source,
            model,
            encoding.Options(),
            tmp_path / "cache",
            2,
            stop_at_bad_row=False,
            progress=False,
        )

    return make


@pytest.fixture
def one_second(monkeypatch):
    """Processes that are started within the test compute for a second, and what they need more."""
    confined._end_kept()
    child = confined.CHILD.replace("confined.serve", "confined.BOUND_S = 1; confined.serve")
    monkeypatch.setattr(confined, "CHILD", child)
    yield
    confined._end_kept()


def edit(folder: Path, **changes) -> None:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ---- its end ------------------------------------------------------------------------------------


def test_it_ends_with_its_parent_in_the_middle_of_a_request():
    code = (
        "import os, time\nfrom jax_sft.runtime import confined\n"
        "process = confined.Process()\n"
        "print(process.call(os.getpid), flush=True)\n"
        "process.send(time.sleep, 60)\n"
        "os._exit(0)"
    )
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


# ---- bounds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("code, bound", [(SORTS, "2 s of computing"), (GROWS, "GB of memory")])
def test_a_template_out_of_bounds_is_refused_by_name_on_whichever_row(
    build, model, code, bound, request
):
    if code is SORTS:  # GROWS needs seconds to fill the memory
        request.getfixturevalue("one_second")
    file = model / "chat_template.jinja"
    late = "{% if messages[0].content == 'late' %}CODE{% endif %}" + tiny.CHAT_TEMPLATE
    file.write_text(late.replace("CODE", code))
    with pytest.raises(confined.OutOfBounds) as raised:
        build("a", "b", "late", "c")
    assert str(file) in str(raised.value) and bound in str(raised.value)
    assert "a.jsonl, line 3" in str(raised.value) and "\n" not in str(raised.value)
    assert len(build("a", "b").rows) == 2  # the next process is as good as new


def test_no_row_has_more_than_the_bound_however_many_messages_it_has(
    model, tmp_path, one_second, monkeypatch
):
    child = confined.CHILD.replace("confined.serve", "confined.MOST_MORE_S = 1; confined.serve")
    monkeypatch.setattr(confined, "CHILD", child)
    turn = [{"role": role, "content": "ab"} for role in ("user", "assistant")]
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"messages": turn * 5000}))  # 5000 texts of 10,000 messages
    with pytest.raises(confined.OutOfBounds, match=r"within 2 s.*line 1\): .*leave out the row"):
        cache.open_or_build(
            inputs.source(str(file)),
            model,
            encoding.Options(),
            tmp_path / "cache",
            1,
            stop_at_bad_row=False,
            progress=False,
        )


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="needs Linux's /proc")
def test_the_bounds_of_time_and_memory_have_a_bound():
    """The 2 GB of memory and 30 s, whatever the files and the rows are."""
    with confined.borrowed() as process:
        process.call(confined.allow, 1e9, 10**12)
        limits = Path(f"/proc/{process.popen.pid}/limits").read_text().splitlines()
        size = int(Path(f"/proc/{process.popen.pid}/statm").read_text().split()[0]) * mmap.PAGESIZE
        most = {line[:26].strip(): line[26:].split()[0] for line in limits}
        assert int(most["Max address space"]) <= size + 2_000_000_000
        assert int(most["Max cpu time"]) <= process.cpu_s() + 26


def test_one_process_alone_has_the_first_chunk(model, tmp_path, monkeypatch):
    rows = [{"prompt": "a" * 70, "response": "b"}] * 40
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(worker, "FEW_CHUNKS", 1)
    monkeypatch.setattr(read, "BLOCK", 1000)
    sent = []
    send = confined.Process.send

    def note(process, function, *args):
        sent.append((process, function.__name__, process.pending))
        send(process, function, *args)

    monkeypatch.setattr(confined.Process, "send", note)
    source = inputs.source(str(tmp_path / "a.jsonl"))
    job = worker.Job(model, encoding.Options(), source, "prompt_response")
    chunks = list(read.chunks(source, [tmp_path / "a.jsonl"]))
    found = [len(result.rows) for _, result in worker.tokenize(job, iter(chunks), 2)]
    assert found == [len(chunk) for chunk in chunks] and len(chunks) > 2
    first = sent[0][0]
    assert [(one is first, name) for one, name, _ in sent[:2]] == [
        (True, "_begin"),
        (True, "_encode"),
    ]
    assert {one for one, *_ in sent} > {first}  # the other one came in behind it
    assert sent[2][1] == "_begin" and sent[2][0] is not first


def test_an_end_within_an_answer_is_explained():
    process = confined.Process()
    process.connection.close()
    process.connection, theirs = multiprocessing.Pipe()
    theirs._send((1000).to_bytes(4, "big") + b"half an answer")  # pyright: ignore
    theirs.close()
    process.popen.kill()
    with pytest.raises(confined.Ended):
        process.receive()
    process.close()


def test_a_process_of_its_own_loads_templates_that_crash_the_parser(build, model):
    for code in ("{{ " + "not " * 100_000 + "1 }}", "{% for i in [1] %}{% endfor %}{% break %}"):
        (model / "chat_template.jinja").write_text(code)
        with pytest.raises(ValueError, match=r"model: the chat template cannot be compiled"):
            build("a")
    (model / "chat_template.jinja").write_text(" " * 1_100_000)
    with pytest.raises(ValueError, match=r"chat_template\.jinja has 1,100,000 bytes"):
        build("a")


def test_a_row_on_which_the_tokenizer_panics_is_one_bad_row(model):
    class PanicException(BaseException):
        """As pyo3's: no Exception, and of no module that can be imported."""

    class Panics:
        def __init__(self, backend):
            self._backend = backend

        def __getattr__(self, name):
            return getattr(self._backend, name)

        def encode(self, text, **options):
            if "blanks" in text:
                raise PanicException("Onig: Regex search error: retry-limit-in-match over")
            return self._backend.encode(text, **options)

    encoder = encoding.Encoder(encoding.load_tokenizer(model), encoding.Options())
    encoder._backend = Panics(encoder._backend)
    items = [formats.Text(text, "b") for text in ("a", "blanks", "c")]
    first, second, third = encoder.encode(items)
    assert second == (
        "the tokenizer fails on the text: Onig: Regex search error: retry-limit-in-match over"
    )
    assert isinstance(first, list) and isinstance(third, list)


# ---- files that cannot be loaded ----------------------------------------------------------------


def remove(file: Path) -> None:
    file.unlink()


def nest(file: Path) -> None:
    file.write_text("[" * 100_000 + "]" * 100_000)


def scramble(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00")


def fold(file: Path) -> None:
    file.unlink()
    file.mkdir()


def renew(file: Path) -> None:
    edit(file.parent, model={"type": "BPE2"})


def match_badly(file: Path) -> None:
    pattern = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
    edit(file.parent, pre_tokenizer=pattern)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        *(("tokenizer.json", spoil) for spoil in (remove, nest, scramble, fold)),
        *(("tokenizer.json", spoil) for spoil in (renew, match_badly)),
        *((name, nest) for name in ("tokenizer_config.json", "config.json")),
        *((name, nest) for name in ("special_tokens_map.json", "added_tokens.json")),
        *((name, scramble) for name in ("tokenizer_config.json", "chat_template.jinja")),
    ],
)
def test_a_file_that_cannot_be_loaded_is_one_line_that_names_the_folder(model, build, name, spoil):
    spoil(model / name)
    with pytest.raises(ValueError) as raised:
        build("a")
    assert str(raised.value).startswith(str(model)) and "\n" not in str(raised.value)


# ---- tokenizer.json is what tokenizes -----------------------------------------------------------


def test_the_file_tokenizes_where_the_class_of_the_model_type_has_other_rules(model):
    edit(model, normalizer={"type": "Lowercase"})
    tokenizer = encoding.load_tokenizer(model)
    ids = tokenizer("ABC", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "b", "c"]


def test_a_tokenizer_with_several_answers_for_one_text_is_refused(model):
    described = json.loads((model / "tokenizer.json").read_text())
    edit(model, model=described["model"] | {"dropout": 0.1})
    with pytest.raises(ValueError, match=r"tokenizer\.json: one text has several answers"):
        encoding.load_tokenizer(model)


def test_official_tokenizers_do_what_their_files_say(tmp_path):
    official = Path(__file__).resolve().parents[3] / "shared" / "tokenizers" / "smollm2"
    if not official.is_dir():
        pytest.skip("../shared/tokenizers is not there")
    shutil.copytree(official, tmp_path / "model")
    tokenizer = encoding.load_tokenizer(tmp_path / "model")
    (example,) = encoding.Encoder(tokenizer, encoding.Options()).encode([formats.Text("", "1234")])
    assert isinstance(example, list) and np.all(example[0].weights == 1)


def test_a_transformers_without_the_private_functions_is_one_line(model, monkeypatch):
    tokenizer = encoding.load_tokenizer(model)
    monkeypatch.delattr(chat_template_utils, "_compile_jinja_template")
    with pytest.raises(ValueError, match="cannot be compiled: cannot import name '_compile_jinja"):
        template.ChatTemplate(tokenizer, {}, "2024-07-26")
