"""What a plan says is what its numbers are, on a terminal and in HTML; hostile text stays text."""

import copy
import html.parser
import json
import re

import pytest

from jax_sft.report import plan_page, plan_tables

GIB = 2**30
HOSTILE = '<script>alert("1")</script>&amp;\x1b[31m\u202e' + "long" * 60


def a_plan(**changes) -> plan_tables.Plan:
    """32B on 8 H200 with four micro-batches."""
    memory = {
        "parameters": 15 * GIB,
        "moments": 30 * GIB,
        "gradients": 15 * GIB,
        "activations_and_temporaries": 25 * GIB,
        "arguments": 45 * GIB,
        "temporaries": 40 * GIB,
        "peak_bytes": 85 * GIB,
        "card_bytes": 140 * GIB,
        "headroom_bytes": 14 * GIB,
        "fits": True,
        "largest": [
            {"bytes": 2 * GIB, "shape": "bf16[152064,5120]", "what": "head, gathered", "count": 1},
            {"bytes": 2**20, "shape": "f32[512,512]", "what": "an accumulator", "count": 1200},
        ],
    }
    gather = {
        **{"kind": "all-gather", "axis": ["fsdp", "sequence"], "dtype": "bf16", "bytes": GIB},
        **{"count": 512, "fast_bytes": 448 * GIB, "slow_bytes": 0.0, "overlaps": True},
        **{"hidden_behind_flops": 1e15, "what": "layers.mlp.gate.kernel"},
    }
    reduce = gather | {"kind": "all-reduce", "axis": ["data"], "overlaps": False, "dtype": "f32"}
    plan = {
        "target": {"chip": "h200", "hosts": 1, "gpus_per_host": 8, "num_devices": 8},
        "versions": {"jax": "0.10.2", "jaxlib": "0.10.2"},
        "compiled_for": "cuda",
        "config": {"model": "Qwen/Qwen2.5-32B", "mesh": {"data": 1, "fsdp": 8}, "remat": "full"},
        "compile": {"lower_s": 4.0, "compile_s": 21.5, "hlo_bytes": 800_000},
        "memory": memory,
        "communication": [gather, reduce],
        "communication_total": {"fast_bytes": 896 * GIB, "slow_bytes": 0.0},
        "arithmetic": {
            "model_flops": {"embedding": 0.0, "attention_scores": 1e15, "mlp": 3e15},
            "hardware_flops": 5e15,
            "compiled_gemm_flops": 4.9e15,
        },
        "predicted": {
            **{"step_time_s": 2.0, "tokens_per_s": 131072.0, "tokens_per_s_per_device": 16384.0},
            **{"mfu": 0.512, "mfu_causal": 0.534},
            "time": {"compute_s": 1.5, "optimizer_s": 0.1, "exposed_communication_s": 0.4},
            "assumptions": ["matrix products reach 70%", "nobody waits for data"],
        },
        "warnings": ["an all-reduce of gradients over data"],
        "advice": [],
    }
    return plan | changes


class Reader(html.parser.HTMLParser):
    """Collects elements and text; checks that what opens is closed in order."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def text_and_page(plan: plan_tables.Plan) -> tuple[str, Reader]:
    return plan_page.as_text(plan), Reader(plan_page.render(plan))


# ---- what is said ------------------------------------------------------------------------------


def test_the_verdict_is_first_on_both_and_last_on_the_terminal():
    text, page = text_and_page(a_plan())
    said = (
        "FITS: predicted peak 85.00 GiB of 140.00 GiB on each of 8 x h200, 55.00 GiB free "
        "(10% must be)"
    )
    lines = text.strip().splitlines()
    assert lines[0] == lines[-1] == said
    assert page.text.index(said) < page.text.index("Memory of one device")
    assert ("div", {"class": "verdict good"}) in page.elements


def test_what_does_not_fit_says_by_how_much():
    plan = a_plan()
    plan["memory"] |= {"peak_bytes": 130 * GIB, "fits": False}
    text, page = text_and_page(plan)
    assert text.startswith("DOES NOT FIT: predicted peak 130.00 GiB of 140.00 GiB")
    assert "4.00 GiB too much (10% must stay free)" in " ".join(text.split())
    assert ("div", {"class": "verdict bad"}) in page.elements


def test_every_number_of_the_plan_is_shown_on_both():
    text, page = text_and_page(a_plan())
    for said in (
        *("15.00 GiB", "30.00 GiB", "25.00 GiB", "85.00 GiB", "55.00 GiB", "14.00 GiB"),
        *("448.00 GiB", "896.00 GiB", "1.00 MiB", "1,200", "512", "bf16[152064,5120]"),
        *("1,500.0 ms", "400.0 ms", "2,000.0 ms", "75.0%", "131,072", "16,384", "51.2%", "53.4%"),
        *("4,000.0", "5,000.0", "125.0%", "4,900.0", "25.5 s", "jaxlib 0.10.2", "fsdp+sequence"),
        *("Qwen/Qwen2.5-32B", "data:1,fsdp:8", "an all-reduce of gradients over data"),
        *("nobody waits for data", "nothing has run", "0.8 MB of HLO", "1 host x 8 x h200"),
    ):
        assert said in text and said in page.text, said


def test_whatever_was_not_measured_is_called_predicted():
    text, page = text_and_page(a_plan())
    for said in (text, page.text):
        for heading in ("Memory of one device", "Time of a step"):
            assert f"{heading}, predicted" in said
            assert f"{heading}\n" not in said
        assert "measured" not in said
    search = [{"mesh": {"fsdp": 8}, "micro_rows": 8, "remat": "full", "peak_bytes": GIB}]
    search[0] |= {"fits": True, "step_time_s": 1.0, "mfu": 0.5}
    assert "peak, step and MFU are predicted" in plan_page.as_text(a_plan(search=search))


def test_collectives_that_wait_stand_out():
    text, page = text_and_page(a_plan())
    lines = [line.split() for line in text.splitlines() if "all-" in line and "GiB" in line]
    assert lines[0][4:] == ["512", "448.00", "GiB", "0", "100%"]
    assert [(line[0], line[-1]) for line in lines] == [("all-gather", "100%"), ("all-reduce", "0%")]
    plan = a_plan()
    plan["communication"][0]["overlaps"] = None
    assert any(
        line.split()[0] == "all-gather" and line.split()[-1] == "?"
        for line in plan_page.as_text(plan).splitlines()
        if "GiB" in line and "all-gather" in line
    )


def test_collectives_of_one_part_of_the_model_are_one_line():
    up, again, head = (
        {**a_plan()["communication"][0], "what": what, "overlaps": what != "head"}
        for what in ("layers.mlp.up.kernel", "layers.mlp.gate.kernel, again", "head")
    )
    again["overlaps"] = False
    text = plan_page.as_text(a_plan(communication=[head, up, again]))
    lines = [line.split() for line in text.splitlines() if line.startswith("  all-gather")]
    assert [line[3:] for line in lines] == [
        ["layers.mlp", "1,024", "896.00", "GiB", "0", "50%"],
        ["head", "512", "448.00", "GiB", "0", "0%"],
    ]


def test_a_plan_of_the_cpu_has_no_verdict_and_says_why():
    plan = a_plan(compiled_for="cpu (partitioned table only)")
    for key in ("memory", "predicted"):
        del plan[key]
    text, page = text_and_page(plan)
    for said in (text, page.text):
        assert "NOT KNOWN whether it fits 8 x h200: compiled for cpu (partitioned table" in said
        assert "Communication of a step" in said and "Arithmetic of a step" in said
        assert "Memory of one device" not in said and "Time of a step" not in said


def test_a_search_is_shown_in_its_order():
    search = [
        {"mesh": {"data": data, "fsdp": 8, "tensor": 1}, "micro_rows": 8 * data, "remat": "attn"}
        | {"peak_bytes": data * GIB, "fits": data < 3, "step_time_s": data / 4, "mfu": 0.5 / data}
        for data in (1, 2, 4)
    ]
    text, page = text_and_page(a_plan(search=search))
    lines = [line.split() for line in text.splitlines() if "fsdp=8" in line and "attn" in line]
    assert [line[-3:] for line in lines] == [
        ["0.250", "s", "50.0%"],
        ["0.500", "s", "25.0%"],
        ["1.000", "s", "12.5%"],
    ]
    assert [line[-4] for line in lines] == ["yes", "yes", "NO"]
    assert "data=4 fsdp=8" in page.text and "tensor=1" not in page.text


# ---- how it looks ------------------------------------------------------------------------------


def test_no_line_of_text_is_over_99_columns_and_columns_align():
    text = plan_page.as_text(a_plan())
    assert max(map(len, text.splitlines())) <= 99
    rows = [line for line in text.splitlines() if line.strip().endswith("%") and "GiB" in line]
    rows = [line for line in rows if "all-" not in line]
    assert len(rows) > 5
    assert len({line.index("GiB") for line in rows}) == 1
    assert len({len(line) for line in rows}) == 1


def test_bars_show_the_parts_to_scale():
    _, page = text_and_page(a_plan())
    spans = [attrs for tag, attrs in page.elements if tag == "span"]
    widths = [float(re.findall(r"width:([\d.]+)%", attrs["style"])[0]) for attrs in spans]
    card = [100 * part / 140 for part in (15, 30, 15, 25)]
    assert widths == pytest.approx([*card, 75, 5, 20], abs=1e-3)
    assert spans[0]["title"] == "parameters 15.00 GiB"
    assert "free 55.00 GiB" in page.text and "step 2,000.0 ms" in page.text


def test_a_bar_never_overflows_and_names_what_is_over_the_card():
    plan = a_plan()
    plan["memory"] |= {"peak_bytes": 200 * GIB, "fits": False}
    _, page = text_and_page(plan)
    spans = [attrs for tag, attrs in page.elements if tag == "span"][:5]
    widths = [float(re.findall(r"width:([\d.]+)%", attrs["style"])[0]) for attrs in spans]
    assert sum(widths) == pytest.approx(100, abs=0.01)
    assert spans[4]["title"] == "other 115.00 GiB"
    assert "over the card by 60.00 GiB" in page.text


def test_the_page_is_whole_needs_nothing_and_fits_a_phone():
    page = plan_page.render(a_plan())
    assert page.startswith("<!doctype html>")
    assert not re.search(r"https?:|src=|@import|url\(|<script|<link", page)
    assert 'name="viewport"' in page and "prefers-color-scheme:dark" in page
    found = Reader(page)
    tables = [attrs for tag, attrs in found.elements if tag == "table"]
    scrolling = [attrs for tag, attrs in found.elements if attrs.get("class") == "scroll"]
    assert len(tables) == len(scrolling) == 5  # a wide table scrolls by itself


def test_hostile_names_stay_text_on_both():
    plan = copy.deepcopy(a_plan(warnings=[HOSTILE], advice=[HOSTILE], versions={HOSTILE: HOSTILE}))
    plan["config"] = {"model": HOSTILE, HOSTILE: 1}
    plan["target"]["chip"] = HOSTILE
    plan["communication"][0] |= {"what": HOSTILE, "kind": HOSTILE, "axis": [HOSTILE]}
    plan["memory"]["largest"][0] |= {"what": HOSTILE, "shape": HOSTILE}
    plan["arithmetic"]["model_flops"][HOSTILE] = 1.0
    plan["predicted"]["time"][HOSTILE] = 0.1
    plan["predicted"]["assumptions"] = [HOSTILE]
    text, page = text_and_page(plan)
    assert "script" not in {tag for tag, _ in page.elements}
    assert '<script>alert("1")</script>&amp;' in page.text
    for said in (text, page.text):
        assert "\x1b" not in said and "\u202e" not in said and "⟨U+001B⟩" in said
    assert max(map(len, text.splitlines())) <= 99


def test_a_plan_survives_its_own_json():
    plan = a_plan()
    again = json.loads(json.dumps(plan))
    assert plan_page.as_text(again) == plan_page.as_text(plan)
    assert plan_page.render(again) == plan_page.render(plan)


@pytest.mark.parametrize(
    ("size", "said"),
    [(0, "0"), (2**20, "1.00 MiB"), (GIB / 2, "0.50 GiB"), (1234 * GIB, "1,234.00 GiB")],
)
def test_sizes_have_a_unit(size, said):
    assert plan_tables.gib(size) == said
