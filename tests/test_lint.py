"""Style and types, with a fault of each kind shown caught."""
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)


def test_ruff(tmp_path):
    "No fault of style in what is written by hand or exported; an unused import, the negative control, is seen."
    done = run("ruff", "check", "lmtrain", "tests", "docs", "benchmarks", "setup.py")
    assert done.returncode == 0, done.stdout
    (tmp_path / "bad.py").write_text("import os\n")
    assert "F401" in run("ruff", "check", "--config", "pyproject.toml", str(tmp_path)).stdout


def test_mypy(tmp_path):
    "No fault of types in the package; a text where a number is declared, the negative control, is seen."
    done = run("mypy")
    assert done.returncode == 0, done.stdout
    (tmp_path / "bad.py").write_text("x: int = 'text'\n")
    assert "Incompatible types" in run("mypy", "--config-file", "", str(tmp_path / "bad.py")).stdout
