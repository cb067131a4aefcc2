"""Content addresses: a digest of plain data, and one of everything that decides a module."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import textwrap

import torch
from torch import Tensor, nn

__all__ = ["digest", "fingerprint", "tensor_digest"]

_OWN = frozenset(vars(nn.Module()))
"""What every module has of its own; `training` is looked at by name."""


def digest(value: object) -> str:
    """Twenty hex digits of the SHA-256 of canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def tensor_digest(*tensors: Tensor | None) -> str:
    """Twenty hex digits of the SHA-256 of the tensors' types, shapes and bytes."""
    sha = hashlib.sha256()
    for tensor in tensors:
        _hash_tensor(sha, tensor)
    return sha.hexdigest()[:20]


def _hash_tensor(sha: hashlib._Hash, tensor: Tensor | None) -> None:
    if tensor is None:
        sha.update(b"none")
        return
    raw = tensor.detach().cpu().contiguous()
    sha.update(f"{raw.dtype}{tuple(raw.shape)}".encode())
    sha.update(raw.flatten().view(torch.uint8).numpy().data)


def fingerprint(module: nn.Module | None) -> str:
    """Digest of a module: structure, parameters, buffers, modes, settings and its classes' code.

    Settings are the plain attributes of each part (numbers, texts, tuples of them, and tensors with
    a public name). Code is the source text of each part's class without its docstrings, but for
    torch's own. What a class calls outside of itself is not seen.
    """
    if module is None:
        return ""
    sha = hashlib.sha256(repr(module).encode())
    for name, part in module.named_modules(remove_duplicate=False):
        sha.update(f"{name} {part.training} {_code(type(part))}".encode())
        for key in sorted(vars(part)):
            if key not in _OWN:
                _hash_setting(sha, key, vars(part)[key])
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name in sorted(named):
        sha.update(name.encode())
        _hash_tensor(sha, named[name])
    return sha.hexdigest()[:20]


def _hash_setting(sha: hashlib._Hash, key: str, value: object) -> None:
    if isinstance(value, Tensor):
        if not key.startswith("_"):  # private ones may be caches
            sha.update(key.encode())
            _hash_tensor(sha, value)
    elif _plain(value):
        sha.update(f"{key}={value!r}".encode())


def _plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, bytes))


_seen: dict[type, str] = {}


def _code(cls: type) -> str:
    """Digest of a class's source text, read once."""
    if cls not in _seen:
        _seen[cls] = _source(cls)
    return _seen[cls]


def _source(cls: type) -> str:
    if cls.__module__.partition(".")[0] == "torch":
        return cls.__qualname__
    try:
        return hashlib.sha256(_undocumented(inspect.getsource(cls)).encode()).hexdigest()
    except (OSError, TypeError):  # typed at a prompt, or built by code
        return f"{cls.__module__}.{cls.__qualname__}"


def _undocumented(source: str) -> str:
    """A class's text without its docstrings, which decide nothing."""
    lines = textwrap.dedent(source).splitlines()
    try:
        tree = ast.parse("\n".join(lines))
    except SyntaxError:  # a nested class with a text that starts further left
        return source
    dropped: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        first = node.body[0]
        if ast.get_docstring(node, clean=False) is None or first.end_lineno is None:
            continue
        before = lines[first.lineno - 1].encode()[: first.col_offset]
        after = lines[first.end_lineno - 1].encode()[first.end_col_offset :]
        if not before.strip() and not after.strip():  # it has its lines for itself
            dropped.update(range(first.lineno - 1, first.end_lineno))
    return "\n".join(line for k, line in enumerate(lines) if k not in dropped)
