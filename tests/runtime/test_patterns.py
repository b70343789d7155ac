"""Patterns of others: the answers of `re`, or a refusal within a bound."""

import re
import time

import pytest

from jax_sft.runtime import patterns

NAMES = [f"model.layers.{n}.{part}_proj.weight" for n in (0, 1, 10) for part in "qk"] + ["lm_head"]


@pytest.mark.parametrize("method", ["search", "match", "fullmatch"])
def test_answers_are_those_of_re(method):
    asked = [
        *("layers.1", r"layers\.[0-1]\.", "", "^lm_head$", "[qk]_proj", "Q_PROJ"),  # plain
        *(r"(?!.*layers\.0).*q_proj.*", "(?i)MODEL.*", r"model\.layers\.(0|10)\..+", "a{0,3}", "|"),
    ]
    for pattern, answer in zip(asked, patterns.matches("k", asked, NAMES, method), strict=True):
        assert answer == [bool(getattr(re.compile(pattern), method)(name)) for name in NAMES]


def test_an_ending_is_the_whole_name_or_what_follows_a_dot():
    asked = ["weight", "q_proj.weight", "proj.weight", ".*weight", "(?i)LM_(head|body)", "^q_.*"]
    (weight, q_proj, proj, every, head, anchored) = patterns.matches("k", asked, NAMES, "ending")
    assert sum(weight) == sum(every) == 6 and sum(q_proj) == 3
    assert not any(proj) and not any(anchored) and head == [name == "lm_head" for name in NAMES]


@pytest.mark.parametrize(
    "pattern",
    [
        *("(.+)+Z", "(?:a?){40}a{40}", "(?:.*){9}(?:.*){9}Z"),  # matching takes forever
        *("a{1,65535}{1,65535}", "(" * 4000 + ")" * 4000, "a{4294967296}", "x" * 20_000),
        *("(", "[", "*", r"(?P<a>.)\2", "(?<=a*)b"),
        *(5, None, b"q_proj"),  # no text
    ],
    ids=lambda pattern: f"{pattern!r:.30}",
)
def test_every_other_pattern_is_refused_in_time_by_key_and_pattern(pattern, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 1)
    started = time.monotonic()
    with pytest.raises(ValueError) as error:
        patterns.matches(
            "train.freeze", ["q_proj", ".*q_proj", pattern], [*NAMES, "a" * 40], "search"
        )
    assert time.monotonic() - started < 20
    message = str(error.value)
    assert (
        message.startswith(f"train.freeze: {pattern!r:.30}"[:40].rstrip("'"))
        and "\n" not in message
    )
