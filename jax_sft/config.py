"""The config as config files see it, and the comparison of two configs on resume.

A config file calls `default()`, changes the keys that differ and returns the config. The keys and
their defaults are in `settings.py`.
"""

import dataclasses
import difflib
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from jax_sft import settings
from jax_sft.runtime.text import numbered
from jax_sft.settings import Settings, Source

# A ConfigDict. Its keys are checked on access at run time, as type checkers cannot see them.
Config = Any

_OPEN = ("data.train", "data.eval", "data.template_args")  # the user names what is below these


def default() -> Config:
    """Return a locked config with every key at its default; data and model.path are empty."""
    cfg = _to_config(Settings()).lock()
    cfg.data.train.unlock()
    cfg.data.eval.unlock()
    cfg.data.template_args.unlock()
    return cfg


def source(path: str | os.PathLike, **changes) -> Config:
    """Return a data source; keyword arguments replace the defaults of `settings.Source`.

    Args:
        path: a file, a glob or a folder, relative to the working folder, or a hub data set.

    Raises:
        KeyError: a keyword is not a key of a source.
    """
    fields = _to_config(Source(os.fspath(path)))
    for key, value in changes.items():
        if key not in fields:
            raise KeyError(f"a data source has no key {key!r}: use one of {sorted(fields)}")
        fields[key] = value
    return fields.lock()


def _to_config(values: Any) -> Config:
    """Return the fields of a dataclass as a ConfigDict."""
    config: Config = ConfigDict()
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        if dataclasses.is_dataclass(value):
            value = _to_config(value)
        config[field.name] = ConfigDict() if isinstance(value, Mapping) else value
    return config


def to_settings(cfg: Config | Settings) -> Settings:
    """Return a config as frozen settings, whose values are not checked yet.

    Args:
        cfg: a config; a key that it lacks has its default. Settings are returned as they are.

    Raises:
        ValueError: a key is unknown or a value has the wrong type; the message lists all.
    """
    if isinstance(cfg, Settings):
        return cfg
    problems: list[str] = []
    values = _read(Settings(), cfg, "", problems)
    if problems:
        raise ValueError(numbered("the config has {} problem(s)", problems))
    return values


def _read(defaults: Any, cfg: Any, prefix: str, problems: list[str]) -> Any:
    """Return `defaults`, a dataclass, with the values of a ConfigDict; append its problems."""
    fields = {field.name: getattr(defaults, field.name) for field in dataclasses.fields(defaults)}
    for name in sorted(set(cfg) - set(fields)):
        nearest = difflib.get_close_matches(name, fields, 1)
        advice = f"did you mean {prefix}{nearest[0]}?" if nearest else f"use one of {[*fields]}"
        problems.append(f"{prefix}{name} is no key of the config: {advice}")
    values = {
        name: _read_value(prefix + name, default, cfg[name], problems)
        for name, default in fields.items()
        if name in cfg
    }
    return dataclasses.replace(defaults, **values)


def _read_value(name: str, default: Any, value: Any, problems: list[str]) -> Any:
    """Return the value of a key as the type of its default; append its problems."""
    if name in ("data.train", "data.eval") and isinstance(value, ConfigDict | Mapping):
        if set(value) == {field.name for field in dataclasses.fields(Source)}:
            problems.append(f"{name} has no name: write {name}.NAME = config.source(path)")
            return {}
        return {key: _read_source(f"{name}.{key}", value[key], problems) for key in value}
    if dataclasses.is_dataclass(default) and isinstance(value, ConfigDict | Mapping):
        return _read(default, value, name + ".", problems)
    if isinstance(default, Mapping) and isinstance(value, ConfigDict | Mapping):
        return value.to_dict() if isinstance(value, ConfigDict) else dict(value)
    if isinstance(default, tuple) and isinstance(value, list | tuple):
        if not all(isinstance(item, str) for item in value):
            problems.append(f"{name} = {value!r}: use text only")
            return default
        return tuple(value)
    if value is None and default == "":
        return ""
    if isinstance(default, str) and isinstance(value, str):
        return str.__str__(value)  # of an enum or of NumPy's str_, too
    if isinstance(default, float) and isinstance(value, float):
        return float(value)  # of NumPy's float64, too
    if isinstance(default, float) and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if type(value) is not type(default):
        problems.append(f"{name} = {value!r}: use a value of type {type(default).__name__}")
    return value


def _read_source(name: str, value: Any, problems: list[str]) -> Source:
    """Return a data source; append its problems."""
    if isinstance(value, ConfigDict | Mapping):
        return _read(Source(), value, name + ".", problems)
    problems.append(f"{name} is not a source: write {name} = config.source(path)")
    return Source()


def to_dict(cfg: Config | Settings) -> dict[str, Any]:
    """Return a config as plain nested dicts and lists, as stored in config.json: keys are sorted.

    Raises:
        ValueError: see `to_settings`.
    """
    values = to_settings(cfg)
    return {name: _plain(getattr(values, name)) for name in _NAMES}


_NAMES = sorted(field.name for field in dataclasses.fields(Settings))  # without a subclass's


def _plain(value: Any) -> Any:
    """Return dataclasses and mappings as dicts, and tuples as lists."""
    if dataclasses.is_dataclass(value):
        names = sorted(field.name for field in dataclasses.fields(value))
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple | list) else value


def differences(old: dict, new: dict, prefix: str = "") -> dict[str, str]:
    """Return {key: "key: old -> new"} for every leaf that differs between two `to_dict` results."""
    lines = {}
    for key in sorted(old.keys() | new.keys()):
        name, before, after = prefix + key, old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines |= differences(before, after, name + ".")
        elif before != after:
            lines[name] = f"{name}: {before!r} -> {after!r}"
    return lines


def drift(stored: dict, new: dict, bound: Iterable[str] = ()) -> dict[str, str]:
    """Return the differences between a stored and a new config that change the training.

    Keys that are free (`settings.Key`) are left out unless they are in `bound`. A key that the
    stored config lacks counts as its default. A key that the program no longer has is ignored.
    """
    known, free = to_dict(Settings()), settings.free_keys()
    old, new = _with_defaults(stored, known), _with_defaults(new, known)
    for batch in (old["batch"], new["batch"]):
        batch["micro_rows"] = batch["micro_rows"] or batch["rows"]
    for sources in ("train", "eval"):
        for name, fields in old["data"][sources].items():
            old["data"][sources][name] = _plain(Source()) | fields
    return {
        key: line
        for key, line in differences(old, new).items()
        if (key not in free or key in bound)
        and (_value(known, key) is not None or covered(key, _OPEN))
    }


def covered(key: str, keys: Iterable[str]) -> bool:
    """Return whether a dotted key is one of `keys` or below one of them."""
    return any(key == other or key.startswith(other + ".") for other in keys)


def unknown(keys: Iterable[str]) -> list[str]:
    """Return the `keys` that are no config key, no prefix of one, and not below an open key."""
    known = to_dict(Settings())
    return [key for key in keys if _value(known, key) is None and not covered(key, _OPEN)]


def _with_defaults(stored: dict, defaults: dict) -> dict:
    """Return the stored config with the default of every key that it lacks."""
    filled = dict(stored)
    for key, value in defaults.items():
        if isinstance(value, dict):
            filled[key] = _with_defaults(dict(filled.get(key, {})), value)
        else:
            filled.setdefault(key, value)
    return filled


def _value(as_dict: Any, key: str) -> Any:
    """Return the value of a dotted key, or None if the key does not exist."""
    for part in key.split("."):
        as_dict = as_dict.get(part) if isinstance(as_dict, dict) else None
    return as_dict
