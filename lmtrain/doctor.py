"What this machine has, and what is missing: `lmtrain doctor`."
from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from . import __version__

Line = tuple[str, str, bool]  # what, what was found, whether that is fine


def packages() -> list[Line]:
    "Each package that lmtrain asks for, against its lower bound; extras may be missing."
    try: from packaging.requirements import Requirement
    except ImportError: return [("packaging", "missing: pip install packaging", False)]
    try: asked = requires("lmtrain") or []
    except PackageNotFoundError: return [("packages", "lmtrain is not installed: pip install lmtrain", False)]
    lines: list[Line] = []
    for text in asked:
        r = Requirement(text)
        extra = next((e for e in ("dev", "lab", "docs", "browser") if r.marker and not r.marker.evaluate({"extra": ""})
                      and r.marker.evaluate({"extra": e})), None)
        try: found = version(r.name)
        except PackageNotFoundError:
            if extra is None: lines.append((r.name, f"missing: pip install '{r.name}{r.specifier}'", False))
            elif extra == "dev": lines.append((r.name, "missing, optional: pip install 'lmtrain[dev]'", True))
            continue
        fine = r.specifier.contains(found, prereleases=True)
        if extra is None or not fine:
            wrong = f"{found}: lmtrain needs {r.specifier}; pip install -U {r.name}"
            lines.append((r.name, found if fine else wrong, fine))
    return lines


def machine() -> list[Line]:
    "Cores, memory and accelerator."
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    lines = [("cores", str(cores), True)]
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        lines.append(("memory", f"{memory:.0f} GiB" + ("" if memory > 3 else ": the tour needs about 3"), memory > 3))
    try: import torch
    except (ImportError, OSError) as e:  # missing, or a library that it needs is
        return [*lines, ("GPU", f"cannot say, for torch does not load: {' '.join(str(e).split())}", False)]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if gpus: gpus.append("with bf16" if torch.cuda.is_bf16_supported() else "without bf16")
    return [*lines, ("torch threads", str(torch.get_num_threads()), True),
            ("GPU", ", ".join(gpus) or "none: everything runs on the CPU", True)]


def free(path: Path) -> float:
    "Free space in GiB where `path` is, or would be."
    while not path.exists(): path = path.parent
    return shutil.disk_usage(path).free / 2**30


def places() -> list[Line]:
    "The folders that lmtrain writes to, the scale it would train at, and pip, which fetches corpora."
    from .settings import cache_dir, scale
    lines = []
    for what, path in {"this folder": Path.cwd(), "downloads": cache_dir()}.items():
        near = next(p for p in [path, *path.parents] if p.exists())
        room, allowed = free(path), os.access(near, os.W_OK)
        trouble = ", may not be written to" if not allowed else ", nearly full" if room < 2 else ""
        lines.append((what, f"{path}, {room:.0f} GiB free{trouble}", not trouble))
    name = os.environ.get("LMTRAIN_SCALE") or "laptop"
    try: scale(name); lines.append(("scale", name, True))
    except (ValueError, OSError) as e: lines.append(("scale", str(e), False))
    pip = importlib.util.find_spec("pip") is not None
    lines.append(("pip", version("pip") if pip else "missing: corpora cannot be fetched; python -m ensurepip", pip))
    return lines


def report() -> list[Line]:
    "All of it."
    python = platform.python_version()
    fine = sys.version_info >= (3, 11)
    return [("python", python if fine else f"{python}: lmtrain needs 3.11 or later", fine), ("lmtrain", __version__, True),
            *packages(), *machine(), *places()]


def doctor() -> bool:
    "Print the report; True if nothing is missing."
    lines = report()
    for what, found, fine in lines: print(f"{' ' if fine else '!'} {what:<14} {found}")
    bad = sum(not fine for _, _, fine in lines)
    print("everything is here" if not bad else f"{bad} {'thing' if bad == 1 else 'things'} to mend, marked !")
    return not bad
