"""The expressions that people type: `fd*2 + rand(preset='xie')`, `pgd(steps=40, eps=8/255), cw`.

Python's own grammar parses them (`ast`, never `eval`); what comes out is a small frozen tree whose
`str` is canonical: two texts that mean the same give the same string, and the string parses back
to the same tree. Cells of an evaluation are hashed by it.
"""

from __future__ import annotations

import ast
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Union

from feint.core.errors import ConfigError

__all__ = [
    "Call",
    "Expression",
    "Repeat",
    "Sum",
    "Value",
    "calls",
    "format_call",
    "format_value",
    "parse",
    "parse_list",
]

MAX_LENGTH = 2000
"""Longest text, in characters."""
MAX_DEPTH = 12
"""Deepest nesting of sums, calls and values."""
MAX_CALLS = 64
"""Most calls that an expression may stand for, repeats counted."""

Value = Union[None, bool, int, float, str, "Call", tuple["Value", ...]]
"""A keyword's value: a literal, a nested call such as `eot(30)`, or a tuple of values."""

_CONSTANTS: dict[str, Value] = {
    "true": True,
    "false": False,
    "inf": math.inf,
}


@dataclass(frozen=True)
class Call:
    """`name(arguments)`: a component with its configuration."""

    name: str
    kwargs: tuple[tuple[str, Value], ...] = ()
    """Keywords in alphabetical order."""
    args: tuple[Value, ...] = ()
    """Positional values; only nested calls such as `eot(30)` have them."""
    column: int = field(default=0, compare=False)
    """Where it stands in the text, from 1 (0: it was not parsed)."""

    @property
    def keywords(self) -> dict[str, Value]:
        """The keywords as a dictionary."""
        return dict(self.kwargs)

    def __str__(self) -> str:
        return format_call(self.name, self.keywords, self.args)


@dataclass(frozen=True)
class Repeat:
    """`call*count`, count ≥ 2."""

    call: Call
    count: int

    def __str__(self) -> str:
        return f"{self.call}*{self.count}"


@dataclass(frozen=True)
class Sum:
    """`term + term + …`: two or more terms, applied from left to right."""

    terms: tuple[Call | Repeat, ...]

    def __str__(self) -> str:
        return " + ".join(map(str, self.terms))


Expression = Call | Repeat | Sum


def calls(expression: Expression) -> tuple[Call, ...]:
    """Every call in order, repeats written out.

    Example:
        >>> [c.name for c in calls(parse("fd*2 + rdg"))]
        ['fd', 'fd', 'rdg']
    """
    if isinstance(expression, Call):
        return (expression,)
    if isinstance(expression, Repeat):
        return (expression.call,) * expression.count
    return tuple(call for term in expression.terms for call in calls(term))


def format_value(value: object) -> str:
    """A value as one would type it; floats that are a multiple of 1/255 as `8/255`.

    What cannot be typed (a tensor, an object) is shown in angle brackets.
    """
    if isinstance(value, bool) or value is None or isinstance(value, (int, str)):
        return repr(value)
    if isinstance(value, float):
        shortest = repr(value)
        if math.isfinite(value) and len(shortest) > 8:
            count = round(value * 255)
            if count / 255 == value:
                return f"{count}/255"
        return shortest
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(format_value(v) for v in value) + "]"
    if isinstance(value, (Call, Repeat, Sum)):
        return str(value)
    shape = getattr(value, "shape", None)
    size = "" if shape is None else " " + "×".join(map(str, shape))
    return f"<{getattr(value, '__qualname__', None) or type(value).__name__}{size}>"


def format_call(name: str, kwargs: Mapping[str, object], args: tuple[object, ...] = ()) -> str:
    """`name(args, key=value, …)` with keywords in alphabetical order; a bare name without any."""
    inner = [format_value(v) for v in args]
    inner += [f"{key}={format_value(kwargs[key])}" for key in sorted(kwargs)]
    return f"{name}({', '.join(inner)})" if inner else name


def parse(text: str) -> Expression:
    """Read one expression: `name`, `name(key=value, …)`, `a + b`, `a*3`, parentheses.

    Values are numbers (also negative, `8/255`, `inf`), quoted strings, `True`, `False`, `None`,
    lists, and nested calls (`gradient=eot(30)`).

    Args:
        text: At most 2000 characters.

    Returns:
        A canonical tree: sums are flat, repeats of a sum are written out, and equal neighbours
        are one repeat, so that `fd + fd`, `(fd)*2` and `fd*2` are the same.

    Raises:
        ConfigError: Pointing at the column that cannot be read.

    Example:
        >>> str(parse("fd + fd + (rdg(delta = .15))"))
        'fd*2 + rdg(delta=0.15)'
        >>> parse("pgd(eps=8/255)").keywords == {"eps": 8 / 255}
        True
    """
    reader = _Reader(text)
    return reader.expression(reader.tree)


def parse_list(text: str) -> tuple[Expression, ...]:
    """Read expressions separated by commas at the top level.

    Example:
        >>> [str(e) for e in parse_list("pgd(steps=40, eps=8/255), cw")]
        ['pgd(eps=8/255, steps=40)', 'cw']
    """
    reader = _Reader(text)
    tree = reader.tree
    items = tree.elts if isinstance(tree, ast.Tuple) else [tree]
    return tuple(reader.expression(item) for item in items)


class _Reader:
    """One text on its way to a tree; keeps it to point at columns."""

    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            raise ConfigError(f"got a {type(text).__name__}; expected an expression such as 'fd*2'")
        if len(text) > MAX_LENGTH:
            raise ConfigError(
                f"the expression has {len(text)} characters; expected at most {MAX_LENGTH}"
            )
        self.text = "".join(" " if c in "\n\r\t\f\v" else c for c in text)
        self.indent = len(self.text) - len(self.text.lstrip(" "))
        body = self.text.strip(" ")
        if not body:
            raise ConfigError("the expression is empty; expected something like 'fd*2 + rand'")
        self.bytes = body.encode("utf-8", "replace")
        try:
            with warnings.catch_warnings():  # about escapes and calls, which are refused anyway
                warnings.simplefilter("ignore")
                self.tree = ast.parse(body, mode="eval").body
        except SyntaxError as error:
            raise self.error((error.offset or 1) - 1, error.msg) from None
        except (ValueError, RecursionError, MemoryError) as error:
            raise self.error(0, str(error) or type(error).__name__) from None
        end = self.tree.end_col_offset or 0
        rest = self.bytes[end:].decode(errors="replace")
        if rest.strip(") ,"):  # a comment, which Python would drop in silence
            at = len(self.bytes[:end].decode(errors="replace"))
            raise self.error(at + len(rest) - len(rest.lstrip(") ,")), "unexpected text")

    def error(self, column: int, what: str) -> ConfigError:
        """`column` counts characters from 0 in the stripped text."""
        column += self.indent
        return ConfigError(
            f"cannot read {self.text.strip()!r}: column {column + 1}: {what}\n"
            f"  {self.text}\n  {' ' * column}^"
        )

    def at(self, node: ast.expr) -> int:
        """Column of a node in characters; `ast` counts bytes of UTF-8."""
        return len(self.bytes[: node.col_offset].decode(errors="replace"))

    def wrong(self, node: ast.expr, what: str) -> ConfigError:
        return self.error(self.at(node), what)

    def expression(self, node: ast.expr) -> Expression:
        found: list[Call] = []
        for call in self.flat(node, 0):
            found.append(call)
            if len(found) > MAX_CALLS:
                raise self.wrong(node, f"more than {MAX_CALLS} parts")
        terms: list[Call | Repeat] = []
        first = 0
        for i in range(1, len(found) + 1):
            if i == len(found) or found[i] != found[first]:
                count = i - first
                terms.append(found[first] if count == 1 else Repeat(found[first], count))
                first = i
        return terms[0] if len(terms) == 1 else Sum(tuple(terms))

    def flat(self, node: ast.expr, depth: int) -> list[Call]:
        """The calls that an expression stands for, in order."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            # A long sum leans to the left; unrolled, it does not count as depth.
            right: list[ast.expr] = []
            left: ast.expr = node
            while isinstance(left, ast.BinOp) and isinstance(left.op, ast.Add):
                right.append(left.right)
                left = left.left
            return [c for part in (left, *reversed(right)) for c in self.flat(part, depth + 1)]
        self.limit(node, depth)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            count = node.right.value if isinstance(node.right, ast.Constant) else None
            if type(count) is not int or not 1 <= count <= MAX_CALLS:
                raise self.wrong(
                    node.right, f"expected a whole number of repeats, 1 to {MAX_CALLS}, after '*'"
                )
            inner = self.flat(node.left, depth + 1)
            if len(inner) * count > MAX_CALLS:
                raise self.wrong(node, f"more than {MAX_CALLS} parts")
            return inner * count
        if isinstance(node, (ast.Name, ast.Call)):
            return [self.call(node, depth)]
        if isinstance(node, ast.BinOp):
            raise self.wrong(node, f"only '+' and '*' join parts, not '{_symbol(node.op)}'")
        raise self.wrong(node, "expected a name, such as 'fd' or 'rand(preset=\"xie\")'")

    def limit(self, node: ast.expr, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise self.wrong(node, f"nested more than {MAX_DEPTH} deep")

    def call(self, node: ast.Name | ast.Call, depth: int, nested: bool = False) -> Call:
        column = self.at(node) + self.indent + 1
        if isinstance(node, ast.Name):
            return Call(node.id, column=column)
        if not isinstance(node.func, ast.Name):
            raise self.wrong(node.func, "expected a plain name before '('")
        for argument in node.args:
            if not nested or isinstance(argument, ast.Starred):
                raise self.wrong(argument, f"expected {node.func.id}(key=value)")
        args = tuple(self.value(a, depth + 1) for a in node.args)
        kwargs: dict[str, Value] = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise self.wrong(keyword.value, "'**' is not allowed; write key=value")
            if keyword.arg in kwargs:
                raise self.wrong(keyword.value, f"{keyword.arg} is given twice")
            kwargs[keyword.arg] = self.value(keyword.value, depth + 1)
        return Call(node.func.id, tuple(sorted(kwargs.items(), key=_first)), args, column)

    def value(self, node: ast.expr, depth: int) -> Value:
        self.limit(node, depth)
        if isinstance(node, ast.Constant) and (
            node.value is None or isinstance(node.value, (bool, int, float, str))
        ):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            inner = self.number(node.operand, depth + 1)
            return -inner if isinstance(node.op, ast.USub) else inner
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            top, bottom = self.number(node.left, depth + 1), self.number(node.right, depth + 1)
            if bottom == 0:
                raise self.wrong(node.right, "division by zero")
            try:
                return top / bottom
            except OverflowError:
                raise self.wrong(node, "the fraction is too large for a float") from None
        if isinstance(node, (ast.List, ast.Tuple)):
            return tuple(self.value(item, depth + 1) for item in node.elts)
        if isinstance(node, ast.Name) and node.id in _CONSTANTS:
            return _CONSTANTS[node.id]
        if isinstance(node, (ast.Name, ast.Call)):
            return self.call(node, depth, nested=True)
        raise self.wrong(
            node,
            "expected a number, a fraction, a quoted string, True, False, None, a list or a "
            "nested call",
        )

    def number(self, node: ast.expr, depth: int) -> int | float:
        found = self.value(node, depth)
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            raise self.wrong(node, "expected a number")
        return found


def _first(item: tuple[str, Value]) -> str:
    return item[0]


def _symbol(operator: ast.operator) -> str:
    symbols = {"BitXor": "^", "BitOr": "|", "BitAnd": "&", "LShift": "<<", "RShift": ">>"}
    symbols |= {"Sub": "-", "Div": "/", "Pow": "**", "FloorDiv": "//", "Mod": "%", "MatMult": "@"}
    return symbols.get(type(operator).__name__, type(operator).__name__)
