"""Write `feint/attacks/__init__.py` and `feint/defenses/__init__.py` from the files beside them.

A file that defines a function or class decorated with `@attack(...)` or `@defense("name")` exports
it. The source is scanned with `ast` and not imported, so a file that does not import yet is seen.

    python tools/sync_exports.py           rewrite both
    python tools/sync_exports.py --check   exit 1 if one is out of date
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path

ROOMS = {
    "attacks": (
        "attack",
        '"""Attacks: flat functions `attack(model, x, y, *, …) -> x_adv`, one family per file."""',
        {},
    ),
    "defenses": (
        "defense",
        '"""Defenses: one `Defense` per file, chains of them, and the expressions that people '
        'type."""',
        {"base": ["Defense", "Params", "View"], "chain": ["Chain", "parse"]},
    ),
}


def decorated(path: Path, decorator: str) -> list[str]:
    """Names of the module-level functions and classes that carry the decorator."""
    found = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            for mark in node.decorator_list:
                target = mark.func if isinstance(mark, ast.Call) else mark
                if isinstance(target, ast.Name) and target.id == decorator:
                    found.append(node.name)
    return found


def render(folder: Path, room: str) -> str:
    """What the room's `__init__.py` should hold."""
    decorator, docstring, extra = ROOMS[room]
    exports = {module: list(names) for module, names in extra.items()}
    for path in sorted(folder.glob("[!_]*.py")):
        names = decorated(path, decorator)
        if names:
            exports.setdefault(path.stem, []).extend(names)
    lines = [docstring, ""]
    for module in sorted(exports):
        names = sorted(exports[module], key=_order)
        line = f"from feint.{room}.{module} import {', '.join(names)}"
        if len(line) > 100:
            line = f"from feint.{room}.{module} import (\n    " + ",\n    ".join(names) + ",\n)"
        lines.append(line)
    every = sorted((name for names in exports.values() for name in names), key=_order)
    lines += ["", "__all__ = [", *(f'    "{name}",' for name in every), "]", ""]
    return "\n".join(lines)


def _order(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions, as ruff sorts them."""
    rank = 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2
    return rank, name


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a file is out of date")
    options = parser.parse_args(arguments)
    source = Path(__file__).resolve().parent.parent / "src" / "feint"
    stale = 0
    for room in ROOMS:
        path = source / room / "__init__.py"
        text = render(source / room, room)
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        if options.check:
            print(f"feint/{room}/__init__.py is out of date: run python tools/sync_exports.py")
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote feint/{room}/__init__.py")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
