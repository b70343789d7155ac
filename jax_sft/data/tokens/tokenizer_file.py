"""Compare a tokenizer with its tokenizer.json, which is what inference engines read.

transformers builds its own normalizer and pre-tokenizer for some model types and ignores those of
the file. A model would then be trained on tokens that it is never served. Called by
`encoding.load_tokenizer`.
"""

import os
from pathlib import Path
from typing import Any

import tokenizers

from jax_sft.runtime import confined

# Texts on which pre-tokenizers and normalizers differ.
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
    """Describe where a tokenizer differs from the tokenizer.json of its folder; "" = nowhere.

    Raises:
        ValueError: the file cannot be loaded, or tokenizes one text in several ways.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return ""
    with confined.library_errors(f"{file} cannot be loaded"):
        file_tokenizer = tokenizers.Tokenizer.from_file(str(file))
        dropout = getattr(file_tokenizer.model, "dropout", None)
        added = list(file_tokenizer.get_added_tokens_decoder().values())[:MOST_ADDED]
        texts = (*PROBES, "".join(f"a{token.content} b" for token in added))
        file_pieces = [_pieces(file_tokenizer, text) for text in texts]
        again = [_pieces(file_tokenizer, text) for text in texts]
        loaded_pieces = [_pieces(tokenizer.backend_tokenizer, text) for text in texts]
    if dropout or again != file_pieces:
        raise ValueError(
            f"{file}: one text has several answers (model.dropout = {dropout}), which differ at "
            "every start: set it to null"
        )
    for text, loaded, expected in zip(texts, loaded_pieces, file_pieces, strict=True):
        if loaded != expected:
            place = len(os.path.commonprefix([loaded, expected]))
            return (
                f"of {text[:60]!r} transformers' {type(tokenizer).__name__} makes "
                f"{_shown(loaded, place)}, {file} makes {_shown(expected, place)}"
            )
    return ""


def _pieces(backend: tokenizers.Tokenizer, text: str) -> list[tuple[int, str]]:
    encoding = backend.encode(text, add_special_tokens=False)
    return list(zip(encoding.ids, encoding.tokens, strict=True))


def _shown(pieces: list[tuple[int, str]], place: int) -> str:
    return " ".join(repr(token) for _, token in pieces[place : place + 3]) or "nothing"
