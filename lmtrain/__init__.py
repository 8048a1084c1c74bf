"""Notebooks that define, explain and are the code of every way to train a language model"""

import ast as _ast
from importlib import import_module as _import
from pathlib import Path as _Path

__version__ = "0.1.0"

# Nothing heavy is imported here: a name is looked up in its module at first use. The table of names is __init__.pyi, which
# editors and type checkers read as well.
_stub = _ast.parse(_Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_where = {name.name: str(line.module) for line in _stub.body if isinstance(line, _ast.ImportFrom) for name in line.names}
__all__ = ["__version__", *_where]


def __getattr__(name: str):
    if name in _where: return getattr(_import(f"lmtrain.{_where[name]}"), name)
    raise AttributeError(f"module 'lmtrain' has no attribute {name!r}")


def __dir__() -> list[str]: return sorted({*globals(), *__all__})
