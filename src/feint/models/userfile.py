"""A model from a function in a user's own Python file."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from torch import nn

from feint.core.errors import ConfigError, DataError, ModelError, UnknownNameError

__all__ = ["load_function"]


def load_function(spec: str) -> nn.Module:
    """Import `path/to/file.py` and call its function without arguments.

    This runs the file, which is what its user asks for. While it runs, its folder is first on the
    import path, as under `python file.py`.

    Raises:
        ConfigError: The spec names no function.
        DataError: There is no such file.
        UnknownNameError: The file has no such function.
        ModelError: The file or the function raises, or gives something else than a module.
    """
    text, colon, function = spec.rpartition(":")
    if not colon or function.endswith(".py") or not function.isidentifier():
        raise ConfigError(f"model {spec!r} names no function; expected path/to/file.py:function")
    path = Path(text)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; expected a Python file with {function}()")
    with _imports_from(path.parent):
        module = _imported(path)
        maker = getattr(module, function, None)
        if not callable(maker):
            own = [
                name
                for name, value in vars(module).items()
                if callable(value)
                and not name.startswith("_")
                and getattr(value, "__module__", None) == module.__name__
            ]
            raise UnknownNameError(f"function in {path}", function, own)
        try:
            model = maker()
        except (Exception, SystemExit) as error:
            raise ModelError(f"{function}() {_says(error, path)}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{function}() in {path} gives a {type(model).__name__}; expected a torch.nn.Module "
            "that maps images in [0, 1] to logits"
        )
    return model


@contextmanager
def _imports_from(folder: Path) -> Iterator[None]:
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


def _imported(path: Path) -> ModuleType:
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    name = f"feint_user_{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise DataError(f"{path} is no Python file; expected path/to/file.py:function")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and copies look their classes up here
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ModelError(f"importing {path.name} {_says(error, path)}") from error
    return module


def _says(error: BaseException, path: Path) -> str:
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename) == path
    ]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    place = f"{path} line {line}" if line else str(path)
    return f"raised {type(error).__name__}: {error} ({place})"
