"The scale of the lessons, read from settings.ini, the data files that come with the package, and where things are kept."
from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from configparser import ConfigParser
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from uuid import uuid4

_HERE = Path(__file__).parent


def data_file(name: str) -> Path:
    "A file that comes with the project: inside an installed package, or in a checkout. Raises FileNotFoundError."
    for path in (_HERE / "_data" / name, _HERE.parent / "data" / name, _HERE.parent / name):
        if path.is_file(): return path
    raise FileNotFoundError(f"{name} is missing from this installation of lmtrain: install it again")


def usable(path: Path) -> bool:
    "May this user write to `path`, or make it?"
    while not os.path.exists(path) and path != path.parent: path = path.parent
    return os.access(path, os.R_OK | os.W_OK | os.X_OK)


def private_dir() -> Path:
    "A folder among the temporary files that is this user's alone. Raises PermissionError if somebody else has it."
    path = Path(tempfile.gettempdir(), f"lmtrain-{os.geteuid()}" if hasattr(os, "geteuid") else "lmtrain")
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if hasattr(os, "geteuid") and (path.is_symlink() or found.st_uid != os.geteuid() or found.st_mode & 0o022):
        raise PermissionError(f"{path} belongs to somebody else: set LMTRAIN_CACHE to a folder of your own")
    return path


def at_home(name: str = "") -> Path | None:
    "`name` in ~/.cache, if there is a home and this user may write there."
    try: path = Path.home() / ".cache" / name
    except RuntimeError: return None
    return path if usable(path) else None


def cache_dir() -> Path:
    """Where downloads are kept: $LMTRAIN_CACHE, else $XDG_CACHE_HOME/lmtrain, else ~/.cache/lmtrain.

    Where there is no home, or none that may be used (containers), a private folder among the temporary files.
    """
    if own := os.environ.get("LMTRAIN_CACHE"): return Path(own).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"): return Path(base) / "lmtrain"
    return at_home("lmtrain") or private_dir()


def check_readable(path: Path) -> None:
    "Raises PermissionError that names the first file at `path`, a file or a folder, that this user may not read."
    need = os.R_OK | os.X_OK if path.is_dir() else os.R_OK
    if os.path.exists(path) and not os.access(path, need):
        raise PermissionError(errno.EACCES, "may not be read", str(path))
    for part in sorted(path.iterdir()) if path.is_dir() else ():
        if not part.name.startswith("."): check_readable(part)


def follow_umask(folder: Path) -> None:
    "Give all files in a new folder the mode that new files have there: some libraries write for their owner alone."
    probe = folder / ".mode"
    probe.touch(); mode = probe.stat().st_mode & 0o777; probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file(): path.chmod(mode)


PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8) if os.name == "nt" else ()  # seconds between tries: a virus scanner may be looking


def rename(source: Path, target: Path) -> None:
    "Rename a file over another, or a folder to a new name. Raises OSError if it cannot be done."
    for pause in PAUSES:
        try: os.replace(source, target); return
        except PermissionError: time.sleep(pause)
    os.replace(source, target)


@dataclass(frozen=True)
class Scale:
    "How large the lessons and the tour are."
    vocab: int      # tokens in the vocabulary
    dim: int        # width of the model
    heads: int      # attention heads
    layers: int     # layers
    length: int     # tokens in a row
    rows: int       # rows in a step
    lr: float       # learning rate
    minutes: float  # of training in the tour
    seed: int       # the first seed
    seeds: int      # how many seeds an experiment takes


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    "A new folder to write in, which takes the place of `path` in one step. Raises OSError if it cannot; the old one stays."
    path.parent.mkdir(parents=True, exist_ok=True)
    beside, old = (path.with_name(f".{path.name}-{word}-{uuid4().hex[:8]}") for word in ("new", "old"))
    try:
        beside.mkdir()
        yield beside
        follow_umask(beside)
        if path.exists(): rename(path, old)
        try: rename(beside, path)
        except OSError:
            if old.exists(): rename(old, path)
            raise
    finally:
        for left in (beside, old): shutil.rmtree(left, ignore_errors=True)


def settings_ini() -> tuple[Path, ConfigParser]:
    "The file settings.ini, and what is in it."
    path, ini = data_file("settings.ini"), ConfigParser(interpolation=None)
    ini.read(path, encoding="utf-8")
    return path, ini


def scales() -> list[str]:
    "The names of the scales in settings.ini."
    return settings_ini()[1].sections()


def scale(name: str | None = None) -> Scale:
    """The scale `name` of settings.ini; by default $LMTRAIN_SCALE, or "laptop".

    Raises ValueError, naming the file, for an unknown name, a missing key, or a value that is not a number.
    """
    path, ini = settings_ini()
    name = name or os.environ.get("LMTRAIN_SCALE") or "laptop"
    if name not in ini: raise ValueError(f"no scale {name!r} in {path}: choose one of {', '.join(ini.sections())}")
    values: dict[str, float] = {}
    for f in fields(Scale):
        kind, text = {"int": int, "float": float}[str(f.type)], ini[name].get(f.name)
        if text is None: raise ValueError(f"{path}: [{name}] has no {f.name}")
        try: values[f.name] = kind(text)
        except ValueError: raise ValueError(f"{path}: [{name}] {f.name} = {text} is not a number") from None
    return Scale(**values)  # type: ignore[arg-type]
