"""Run chat templates so that they reach nothing but the messages, and end.

A template comes with a model and may be written by anyone. jinja2's sandbox denies the attributes
that lead out of it. This module also limits a template's work and the size of its values. The
limits are counts, not times, so that a template refused on one machine is refused on all.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_TURNS = 2_000_000  # iterations of all loops and macros in one rendering: takes seconds
MOST_SIZE = 10_000_000  # characters, or items, of one value
MOST_WIDTH = 1_000_000  # requested from `center`, `indent`, `%9d` and the like
MOST_BITS = 10_000  # of an integer
_DICT_ATTRIBUTES = frozenset(dir(dict))
_SIZED = (str, bytes, list, tuple)
_FORMATS = ("format", "format_map")  # names of methods and of a filter
_WIDE_FORMAT = re.compile(r"\d{7}|%[-+ #0]*\*|\.\*")


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment for untrusted templates.

    Endless loops and values that grow without bound raise SecurityError, a jinja2.TemplateError.
    """

    intercepted_binops = frozenset(["*", "**", "%"])

    def __init__(self, like: jinja2.Environment):
        """Copy the options, filters and globals of another environment."""
        super().__init__(
            trim_blocks=like.trim_blocks,
            lstrip_blocks=like.lstrip_blocks,
            extensions=[type(extension) for extension in like.extensions.values()],
        )
        for name, function in {**self.filters, **like.filters}.items():
            self.filters[name] = _limited(name, function)
        self.filters |= {"count_turn": _count_turn, "sized": _sized}
        self.globals |= like.globals
        del self.globals["lipsum"]  # makes any amount of random text
        self.turns = 0

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Look up `message.role` in a dict directly, not after failing to find an attribute."""
        if type(obj) is dict and attribute in obj and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute]
        return super().getattr(obj, attribute)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function for a template; named as in jinja2, so that no keyword can clash."""
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | bytes):
            _check(__obj.__name__, owner, *args, *kwargs.values())
        return _sized(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Refuse an operation with a huge result before it is computed."""
        if operator == "%" and isinstance(left, str | bytes):
            _check("format", left)
        elif isinstance(left, int) and isinstance(right, int):
            times = abs(right) if operator == "**" else 1
            bits = abs(left).bit_length() * times + abs(right).bit_length()
            _refuse_if(bits > MOST_BITS and operator != "%", "a number is too large")
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, _SIZED) and isinstance(times, int):
                    _refuse_if(len(value) * times > MOST_SIZE, "a text or list is too long")
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Make loops and macros count their turns, and assignments check the size of their values.

        A value without a name cannot be doubled again and again.
        """
        tree = super()._parse(source, name, filename)
        for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            node.body.insert(0, nodes.ExprStmt(_filter("count_turn", nodes.Const(None))))
        for node in tree.find_all(nodes.Assign):
            node.node = _filter("sized", node.node)
        for node in tree.find_all(nodes.With):
            node.values = [_filter("sized", value) for value in node.values]
        for node in tree.find_all(nodes.AssignBlock):
            node.filter = _filter("sized", node.filter)
        return tree


def begin(template: jinja2.Template) -> None:
    """Reset the count of turns before a rendering of a template of a Sandbox."""
    sandbox: Any = template.environment
    sandbox.turns = 0


def _filter(name: str, value: Any) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=1)


def _limited(name: str, function: Callable) -> Callable:
    # The value is the first argument, unless jinja2 passes a context or environment before it.
    first = int(hasattr(function, "jinja_pass_arg"))

    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        _check(name, *args[first:], *kwargs.values())
        return _sized(function(*args, **kwargs))

    return limited


@jinja2.pass_context
def _count_turn(context: Context, _: None) -> None:
    sandbox: Any = context.environment
    sandbox.turns += 1
    _refuse_if(sandbox.turns > MOST_TURNS, f"its loops take more than {MOST_TURNS:,} turns")


def _check(name: str, value: Any, *args: Any) -> None:
    """Refuse a call of a filter or method whose result would be huge."""
    for arg in args:
        if type(arg) is int:
            _refuse_if(abs(arg) > MOST_WIDTH, f"{name} is asked for {arg}")
        elif type(arg) is str and name in ("replace", "join"):
            _refuse_if(len(arg) * len(value) > MOST_SIZE, f"{name} would make a text too long")
    if name in _FORMATS and isinstance(value, str | bytes):
        text = value if isinstance(value, str) else value.decode("latin-1")
        _refuse_if(bool(_WIDE_FORMAT.search(text)), f"{name} is called with too large a width")


def _sized(value: Any) -> Any:
    _refuse_if(isinstance(value, _SIZED) and len(value) > MOST_SIZE, "a value is too long")
    return value


def _refuse_if(condition: bool, why: str) -> None:
    if condition:
        raise SecurityError(why)
