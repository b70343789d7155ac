"""Whether a tokenizer does what its tokenizer.json says, which is what inference engines read.

transformers builds its own normalizer and pre-tokenizer for some model types, whatever the file
has: a model would be trained on tokens that it is never served. Called by
`encoding.load_tokenizer`.
"""

import os
from pathlib import Path
from typing import Any

import tokenizers

from jax_sft.runtime import confined

# What pre-tokenizers and normalizers differ in.
PROBES = (
    "I'll we're DON'T it's o'clock, isn't it?",
    "in 1234567 of 3.14159, 2024-07-26 and 0x1F",
    "你好，世界。日本語のテキスト 한국어 ไทย עברית",
    "  two   blanks \t\ttabs\r\n\n\nnewlines \n  x",
    "Café naïve Ångström ﬁ ½",
    "Cafe\u0301 nai\u0308ve A\u030angstro\u0308m",
    "👍🏽 👩‍👩‍👧 🇩🇪 ✨",
    "def f(x):\n    return {'a': [1, 2]}  # (...)!? https://a.b/c?d=e&f",
    "CamelCase snake_case UPPER lower ÉÀ éà _x_ --- ___",
)
MOST_ADDED = 2000  # added tokens that are tried


def difference(tokenizer: Any, folder: Path) -> str:
    """Return where a tokenizer differs from the tokenizer.json of its folder; "" = nowhere.

    Raises:
        ValueError: the file cannot be loaded, or has several answers for one text.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return ""
    with confined.library_errors(f"{file} cannot be loaded"):
        of_file = tokenizers.Tokenizer.from_file(str(file))
        dropout = getattr(of_file.model, "dropout", None)
        added = list(of_file.get_added_tokens_decoder().values())[:MOST_ADDED]
        texts = (*PROBES, "".join(f"a{token.content} b" for token in added))
        wanted = [_pieces(of_file, text) for text in texts]
        again = [_pieces(of_file, text) for text in texts]
        found = [_pieces(tokenizer.backend_tokenizer, text) for text in texts]
    if dropout or again != wanted:
        raise ValueError(
            f"{file}: one text has several answers (model.dropout = {dropout}), which differ at "
            "every start: set it to null"
        )
    for text, ours, theirs in zip(texts, found, wanted, strict=True):
        if ours != theirs:
            place = len(os.path.commonprefix([ours, theirs]))
            return (
                f"of {text[:60]!r} transformers' {type(tokenizer).__name__} makes "
                f"{_shown(ours, place)}, {file} makes {_shown(theirs, place)}"
            )
    return ""


def _pieces(backend: tokenizers.Tokenizer, text: str) -> list[tuple[int, str]]:
    encoding = backend.encode(text, add_special_tokens=False)
    return list(zip(encoding.ids, encoding.tokens, strict=True))


def _shown(pieces: list[tuple[int, str]], place: int) -> str:
    return " ".join(repr(token) for _, token in pieces[place : place + 3]) or "nothing"
