"What this machine has, and what is missing: `lmtrain doctor`."
from __future__ import annotations

import importlib.util
import math
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, metadata, requires, version
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
    extras = metadata("lmtrain").get_all("Provides-Extra") or []
    for text in asked:
        r = Requirement(text)
        extra = next((e for e in extras if r.marker and not r.marker.evaluate({"extra": ""})
                      and r.marker.evaluate({"extra": e})), None)
        try: found = version(r.name)
        except PackageNotFoundError:
            if extra is None: lines.append((r.name, f"missing: pip install '{r.name}{r.specifier}'", False))
            elif extra == "dev": lines.append((r.name, "missing, optional: pip install 'lmtrain[dev]'", True))
            continue
        fine = r.specifier.contains(found, prereleases=True)
        if extra is None:
            lines.append((r.name, found if fine else f"{found}: lmtrain needs {r.specifier}; pip install -U {r.name}", fine))
        elif not fine: lines.append((r.name, f"{found}, optional: lmtrain[{extra}] would need {r.specifier}", True))
    return lines


MEASURED = {"classroom": 1.1, "laptop": 1.3}  # GiB that a tour took at its highest: python -m benchmarks.memory
OWN_GROUPS, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")  # Linux's control groups


def control(kind: str, name: str, old: str) -> list[str]:
    """What the control groups around this process say of `kind`, the innermost first.

    `name` is the file of version 2, `old` that of version 1. In a container only the outermost can be seen.
    """
    try: lines = OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError: return []                              # no Linux
    out = []
    for _, kinds, inside in (line.split(":", 2) for line in lines):
        if kinds and kind not in kinds.split(","): continue
        root = GROUPS / kind if kinds else GROUPS
        inner = root / inside.lstrip("/")
        for folder in (p for p in (inner, *inner.parents) if p.is_relative_to(root)):
            path = folder / (old if kinds else name)
            if path.is_file(): out.append(path.read_text(encoding="utf-8").strip())
    return out


def memory() -> float:
    "GiB of memory that this process may use: of the machine, of the container around it, or as `ulimit -v` says."
    found = [math.inf, *map(int, filter(str.isdigit, control("memory", "memory.max", "memory.limit_in_bytes")))]
    if importlib.util.find_spec("psutil"):
        import psutil
        found.append(psutil.virtual_memory().total)
    if importlib.util.find_spec("resource"):
        import resource
        if (most := resource.getrlimit(resource.RLIMIT_AS)[0]) > 0: found.append(most)
    return min(found) / 2**30


def cores() -> int:
    "Cores that this process may use; a container's share of the time counts as so many cores."
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = [q.split() for q in control("cpu", "cpu.max", "-")]
    old = zip(control("cpu", "-", "cpu.cfs_quota_us"), control("cpu", "-", "cpu.cfs_period_us"), strict=False)
    share = [int(q) / int(p) for q, p in [*[q for q in quota if len(q) == 2], *old] if q.isdigit()]
    return max(1, min([here, *(math.ceil(s) for s in share)]))


def too_little(scale: str | None = None) -> str:
    "A sentence if the memory is less than a tour of this scale was measured to take; else empty."
    name = scale or os.environ.get("LMTRAIN_SCALE") or "laptop"
    here, needs = memory(), MEASURED.get(name, 0.0)
    less = f", or --scale classroom ({MEASURED['classroom']} GiB)" if name == "laptop" and here > MEASURED["classroom"] else ""
    return f"{here:.1f} GiB of memory are allowed here, and a tour of the scale {name} took {needs} GiB: allow more{less}" \
        if here < needs else ""


def machine() -> list[Line]:
    "Cores, memory and accelerator."
    lines, little = [("cores", str(cores()), True)], too_little()
    lines.append(("memory", little or f"{memory():.1f} GiB", not little))
    try: import torch
    except (ImportError, OSError) as e:  # missing, or a library that it needs is
        return [*lines, ("GPU", f"cannot say, for torch does not load: {' '.join(str(e).split())}", False)]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if gpus: gpus.append("with bf16" if torch.cuda.is_bf16_supported() else "without bf16")
    if torch.backends.mps.is_available(): gpus.append("Apple's")
    if torch.cuda.device_count() > 1: gpus.append("several: torchrun -m lmtrain train uses all of them")
    return [*lines, ("torch threads", str(torch.get_num_threads()), True),
            ("GPU", ", ".join(gpus) or "none: everything runs on the CPU", True)]


def free(path: Path) -> float:
    "Free space in GiB where `path` is, or would be."
    while not os.path.exists(path): path = path.parent
    return shutil.disk_usage(path).free / 2**30


def places() -> list[Line]:
    "The folders that lmtrain writes to, the scale it would train at, and pip, which fetches corpora."
    from .settings import cache_dir, scale
    lines = []
    for what, path in {"this folder": Path.cwd(), "downloads": cache_dir()}.items():
        near = next(p for p in [path, *path.parents] if os.path.exists(p))
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
