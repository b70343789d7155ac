"""Sources to tokenized examples, with a report of what was read, kept and dropped.

Called by `train` before any weight is read; the result stays in memory as flat arrays.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from tqdm import tqdm

from jax_sft.data import chat, formats


@dataclasses.dataclass(frozen=True)
class Examples:
    """All examples of a data set, end to end.

    Attributes:
        tokens, targets: int32 [total tokens].
        weights: float32 [total tokens].
        starts: int64 [examples + 1]; example i is [starts[i] : starts[i + 1]].
        report: {source name: counts}, as written to data_report.json.
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    starts: np.ndarray
    report: dict[str, dict]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per example, int64 [examples]."""
        return np.diff(self.starts)

    def __getitem__(self, index: int) -> chat.Example:
        part = slice(self.starts[index], self.starts[index + 1])
        return chat.Example(self.tokens[part], self.targets[part], self.weights[part])


def prepare(
    sources: Mapping, tokenizer, *, seq_len: int, overlong: str, progress: bool = True
) -> Examples:
    """Read, format and tokenize every row of every source, in order of name and row.

    Args:
        sources: {name: config.source}.
        overlong: what to do with an example of more than `seq_len` tokens: "drop" or "raise".

    Raises:
        ValueError: a row that cannot be used (naming source and row), an over-long one under
            "raise", or nothing left to use.
    """
    kept: list[chat.Example] = []
    report = {}
    for name in sorted(sources):
        source = sources[name]
        rows = formats.read_rows(source)
        format_name = formats.choose(source, rows.column_names)
        to_messages = formats.FORMATS[format_name]
        counts = {
            **{"path": source.path, "format": format_name, "rows": len(rows), "kept": 0},
            "dropped": {"overlong": 0, "no_trained_token": 0},
            **{"tokens": 0, "trained_tokens": 0, "longest": 0},
        }
        for number, row in enumerate(
            tqdm(rows, desc=f"tokenizing {name}", unit="row", disable=not progress)
        ):
            where = f"{source.path} (source {name!r}), row {number + 1}"
            try:
                example = chat.encode(tokenizer, *to_messages(dict(row), source))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            counts["longest"] = max(counts["longest"], len(example))
            if len(example) > seq_len:
                if overlong == "raise":
                    raise ValueError(
                        f"{where}: {len(example)} tokens do not fit data.seq_len = {seq_len}: "
                        'raise it, or set data.overlong = "drop"'
                    )
                counts["dropped"]["overlong"] += 1
            elif not example.weights.any():
                counts["dropped"]["no_trained_token"] += 1
            else:
                kept.append(example)
                counts["kept"] += 1
                counts["tokens"] += len(example)
                counts["trained_tokens"] += int(np.count_nonzero(example.weights))
        report[name] = counts
    if not kept:
        raise ValueError(f"no example is left to use (data.seq_len = {seq_len}): {report}")
    return Examples(
        tokens=np.concatenate([example.tokens for example in kept]),
        targets=np.concatenate([example.targets for example in kept]),
        weights=np.concatenate([example.weights for example in kept]),
        starts=np.concatenate([[0], np.cumsum([len(example) for example in kept])]),
        report=report,
    )
