"""The tests with the lowest versions that pyproject.toml allows, and with the newest: python -m benchmarks.bounds, or make bounds

Each in an environment of its own, beside .venv; about an hour. PyTorch is the one version that its lower bound and
constraints.txt agree on, for another costs gigabytes: `--torch` gives the newest job another one.
"""
import argparse
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
VERSIONS = "from importlib.metadata import version; import sys; print(*(version(n) for n in sys.argv[1:]))"


def wanted() -> dict[str, str]:
    "The run-time dependencies, and their lower bounds."
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    return {m[1]: m[2] for m in (re.fullmatch(r"([\w-]+)>=([\w.]+)", d) for d in lines) if m}


def environment(name: str, pins: list[str], packages: list[str]) -> Path:
    "A new environment with `packages` under `pins`, and this project in it; its Python."
    home = ROOT / f".venv-{name}"
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
    python = next(p for p in (home / "bin" / "python", home / "Scripts" / "python.exe") if p.exists())
    (home / "pins.txt").write_text("\n".join(pins) + "\n", encoding="utf-8")
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", str(home / "pins.txt")]
    for words in ([*packages, "setuptools", "wheel"], ["--no-build-isolation", "-e", f"{ROOT}[dev]"]): subprocess.run([*pip, *words], check=True)
    return python


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--torch", help="the newest PyTorch to take; by default the pinned one")
    p.add_argument("--only", choices=("lowest", "newest"))
    p.add_argument("tests", nargs="*", default=["tests"], help="which tests; by default all but those of the browser")
    a = p.parse_args()
    low, pinned = wanted(), (ROOT / "constraints.txt").read_text(encoding="utf-8")
    torch = re.search(r"(?m)^torch==([\w.]+)", pinned)[1]
    assert torch.startswith(low["torch"]), f"torch's lower bound {low['torch']} was never run: constraints.txt has {torch}"
    jobs = {"lowest": [f"{n}=={v}" for n, v in low.items() if n != "torch"] + [f"torch=={torch}"], "newest": [f"torch=={a.torch or torch}"]}
    table, bad = {}, 0
    for name, pins in jobs.items():
        if a.only not in (None, name): continue
        python = environment(name, pins, [*low])
        table[name] = subprocess.run([python, "-c", VERSIONS, *low], capture_output=True, text=True, check=True).stdout.split()
        skip = ["--deselect", "tests/test_house.py::test_export_and_clean_leave_no_diff", "--ignore", "tests/test_lint.py", "--ignore", "tests/test_wheel.py"]  # of the tools, not the package
        done = subprocess.run([python, "-m", "pytest", "-p", "no:cacheprovider", *skip, *a.tests], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
        print(f"{name}: {'all passed' if not done.returncode else 'FAILED'}", flush=True)
        bad += bool(done.returncode)
    print("\n| package | bound | " + " | ".join(table) + " |\n" + "|---" * (2 + len(table)) + "|")
    for i, (name, bound) in enumerate(low.items()): print(f"| {name} | {bound} | " + " | ".join(v[i] for v in table.values()) + " |")
    sys.exit(bad)


if __name__ == "__main__": main()
