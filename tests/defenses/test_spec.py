"""The expression language. Oracle: what was generated is what is read back (hypothesis)."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feint.core import spec
from feint.core.errors import ConfigError
from feint.core.spec import Call, Repeat, Sum, calls, parse, parse_list

NAMES = st.sampled_from(["fd", "rand", "pixel_shift", "eot", "λ", "_x1"])
LITERALS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.floats(allow_nan=False),
    st.integers(-255, 255).map(lambda n: n / 255),
    st.text(max_size=8).filter(lambda s: not re.search(r"[\ud800-\udfff\x00]", s)),
)


def call(values: st.SearchStrategy[object]) -> st.SearchStrategy[Call]:
    return st.builds(
        lambda name, kwargs, args: Call(name, tuple(sorted(kwargs.items())), tuple(args)),
        NAMES,
        st.dictionaries(NAMES, values, max_size=3),
        st.lists(values, max_size=2),
    )


VALUES = st.recursive(LITERALS, lambda v: st.one_of(call(v), st.lists(v, max_size=3).map(tuple)))
CALLS = st.builds(
    lambda name, kwargs: Call(name, tuple(sorted(kwargs.items()))),
    NAMES,
    st.dictionaries(NAMES, VALUES.filter(lambda v: len(spec.format_value(v)) < 200), max_size=2),
)


@given(terms=st.lists(st.tuples(CALLS, st.integers(1, 4)), min_size=1, max_size=4))
def test_the_string_is_read_back_as_the_same_tree(terms: list[tuple[Call, int]]) -> None:
    text = " + ".join(str(c) if n == 1 else f"({c})*{n}" for c, n in terms)
    tree = parse(text)
    assert calls(tree) == tuple(c for c, n in terms for _ in range(n))
    assert parse(str(tree)) == tree
    assert str(parse(str(tree))) == str(tree)
    assert hash(parse(text)) == hash(tree)


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("fd", Call("fd")),
        (" fd ( ) ", Call("fd")),
        ("fd*2", Repeat(Call("fd"), 2)),
        ("fd*1", Call("fd")),
        ("fd + fd", Repeat(Call("fd"), 2)),
        ("(fd*2)*3", Repeat(Call("fd"), 6)),
        ("fd + (rdg + fd)", Sum((Call("fd"), Call("rdg"), Call("fd")))),
        ("(fd+rdg)*2", Sum((Call("fd"), Call("rdg")) * 2)),
        ("fd\n  + rdg", Sum((Call("fd"), Call("rdg")))),
        ("f(b=1, a=-2)", Call("f", (("a", -2), ("b", 1)))),
        ("f(e=8/255)", Call("f", (("e", 8 / 255),))),
        ("f(e=-1/2)", Call("f", (("e", -0.5),))),
        ("f(e=+1e-3)", Call("f", (("e", 1e-3),))),
        ("f(e=inf)", Call("f", (("e", math.inf),))),
        ("f(e=-inf)", Call("f", (("e", -math.inf),))),
        ("f(a=true, b=None, c='x y')", Call("f", (("a", True), ("b", None), ("c", "x y")))),
        ("f(q=[20, 40])", Call("f", (("q", (20, 40)),))),
        (
            "f(g=eot(30, base=spsa))",
            Call("f", (("g", Call("eot", (("base", Call("spsa")),), (30,))),)),
        ),
    ],
)
def test_meaning(text: str, tree: spec.Expression) -> None:
    assert parse(text) == tree


def test_floats_print_as_people_write_them() -> None:
    assert str(parse("f(eps=0.03137254901960784)")) == "f(eps=8/255)"
    assert str(parse("f(eps=0.15, b=0.5)")) == "f(b=0.5, eps=0.15)"
    assert spec.format_value(float("nan")) == "nan"


def test_what_cannot_be_typed_is_shown_in_brackets() -> None:
    import torch

    assert spec.format_value(torch.zeros(2, 3)) == "<Tensor 2×3>"
    assert spec.format_value(parse) == "<parse>"


def test_lists() -> None:
    assert [str(e) for e in parse_list("pgd(steps=40), cw,")] == ["pgd(steps=40)", "cw"]
    assert parse_list("(pgd, cw)") == parse_list("pgd, cw")
    assert parse_list("pgd") == (Call("pgd"),)
    assert parse_list("f(q=[1, 2]), g") == (Call("f", (("q", (1, 2)),)), Call("g"))


@pytest.mark.parametrize(
    ("text", "column", "what"),
    [
        ("fd**2", 1, "not '**'"),
        ("fd - rdg", 1, "not '-'"),
        ("2*fd", 3, "whole number of repeats"),
        ("fd*0", 4, "1 to 64"),
        ("fd*2.0", 4, "1 to 64"),
        ("fd*True", 4, "1 to 64"),
        ("fd*65", 4, "1 to 64"),
        ("fd*64 + fd", 1, "more than 64 parts"),
        ("(fd*64)*64", 1, "more than 64 parts"),
        ("fd + 3", 6, "expected a name"),
        ("fd, rdg", 1, "expected a name"),
        ("λ + fd(1)", 8, "expected fd(key=value)"),
        ("fd(**x)", 6, "'**' is not allowed"),
        ("fd(*x)", 4, "expected fd(key=value)"),
        ("a.b(c=1)", 1, "plain name"),
        ("fd(a=b.c)", 6, "expected a number"),
        ("fd(a=1+1)", 6, "expected a number"),
        ("fd(a=lambda: 1)", 6, "expected a number"),
        ("fd(a=[x for x in y])", 6, "expected a number"),
        ("fd(a={1: 2})", 6, "expected a number"),
        ("fd(a=f'{x}')", 6, "expected a number"),
        ("fd(a=b'x')", 6, "expected a number"),
        ("fd(a=1j)", 6, "expected a number"),
        ("fd(a=...)", 6, "expected a number"),
        ("fd(a=-'x')", 7, "expected a number"),
        ("fd(a=1/'x')", 8, "expected a number"),
        ("fd(a=1/0)", 8, "division by zero"),
        ("fd(a=" + "9" * 400 + "/1)", 6, "too large"),
        ("fd(a=1, a=2)", 11, "a is given twice"),
        ("fd(a=1", 3, "never closed"),
        ("fd # and more", 4, "unexpected text"),
        ("fd) + (rdg", 3, "unmatched"),
        ("   fd + + ", None, "invalid syntax"),
        ("fd; rdg", 3, "invalid syntax"),
        ("x := fd", None, "invalid syntax"),
        ("fd\0", None, ""),
    ],
)
def test_what_cannot_be_read_is_pointed_at(text: str, column: int | None, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    message = str(caught.value)
    assert what in message
    if column is not None:
        assert f"column {column}:" in message
        assert message.splitlines()[-1].index("^") == column + 1  # two spaces of indent


def test_columns_count_leading_blanks_and_characters_not_bytes() -> None:
    with pytest.raises(ConfigError, match="column 8:"):
        parse("  λλ(é=1-1)")
    tree = parse("  λ + fd")
    assert [c.column for c in calls(tree)] == [3, 7]


@pytest.mark.parametrize("bad", ["", "   ", "\n"])
def test_nothing(bad: str) -> None:
    with pytest.raises(ConfigError, match="empty"):
        parse(bad)


def test_no_text() -> None:
    with pytest.raises(ConfigError, match="got a int"):
        parse(3)  # type: ignore[arg-type]


def test_limits() -> None:
    with pytest.raises(ConfigError, match="2001 characters; expected at most 2000"):
        parse("f" * 2001)
    deep = "1"
    for _ in range(20):
        deep = f"[{deep}]"
    with pytest.raises(ConfigError, match="nested more than 12 deep"):
        parse(f"f(a={deep})")
    with pytest.raises(ConfigError, match="cannot read"):
        parse("(" * 900 + "f" + ")" * 900)
    with pytest.raises(ConfigError, match="cannot read"):
        parse("f(a=" + "-" * 1900 + "1)")
    assert len(calls(parse(" + ".join(["fd", "rdg"] * 32)))) == 64


@given(text=st.text(alphabet="fd +*()=,[]'/-.0123λ#\\\n\"{}:", max_size=30))
def test_any_text_gives_a_tree_or_a_config_error(text: str) -> None:
    try:
        tree = parse(text)
    except ConfigError:
        return
    assert parse(str(tree)) == tree
