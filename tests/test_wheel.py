"""The wheel, installed into an empty environment and used from another folder."""
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
USE = """
import lmtrain, sys
from pathlib import Path
assert "site-packages" in Path(lmtrain.__file__).parts, lmtrain.__file__
from lmtrain import CLM, Example, Noise, catalogue, collate
from lmtrain.settings import scale
import lmtrain.tour
assert "shakespeare" in catalogue().index and scale("laptop").dim
print(CLM().corrupt(collate([Example([1, 2, 3])]), Noise()))
"""


def missing(wheel: Path) -> set[str]:
    "Modules and data files of the project that a wheel lacks."
    want = {p.relative_to(ROOT).as_posix() for p in (ROOT / "lmtrain").rglob("*") if p.suffix in (".py", ".js", ".css", ".json")}
    want |= {f"lmtrain/_data/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "nbs").rglob("[!.]*.ipynb")
             if ".ipynb_checkpoints" not in p.parts}
    want |= {f"lmtrain/_data/{p.name}" for p in [ROOT / "settings.ini", *(ROOT / "data").glob("*.json")]}
    return want - set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "Built from a copy, so that nothing is left in the source tree."
    copy, out = tmp_path_factory.mktemp("copy") / "lmtrain", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv*", ".git", "build", "*.egg-info", "tour", "__pycache__"))
    done = subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", f"--outdir={out}", str(copy)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return next(out.glob("*.whl"))


def test_wheel_is_complete(wheel, tmp_path):
    "All modules and data are inside; wheels without the data and without a module, the negative controls, are noticed."
    assert not missing(wheel)
    data = {"lmtrain/_data/settings.ini", "lmtrain/_data/catalogue.json"}
    for i, lost in enumerate((data, {"lmtrain/batch.py"})):
        poor = tmp_path / f"{i}.whl"
        with zipfile.ZipFile(wheel) as full, zipfile.ZipFile(poor, "w") as z:
            for name in set(full.namelist()) - lost: z.writestr(name, full.read(name))
        assert missing(poor) == lost


def test_wheel_in_an_empty_environment(wheel, tmp_path):
    "A new environment, the wheel with its run-time dependencies, another folder: imports, data files and commands work."
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    def run(*words, why="") -> str:
        done = subprocess.run(list(map(str, words)), cwd=tmp_path, capture_output=True, text=True, env=clean)
        assert done.returncode == 0, f"{why}{words}: {done.stderr[-2000:]}"
        return done.stdout
    run(sys.executable, "-m", "venv", tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    assert subprocess.run([python, "-c", "import lmtrain"], cwd=tmp_path, capture_output=True, env=clean).returncode
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    run(*pip, "torch", why="pip could not fetch packages: this test needs a connection. ")
    run(*pip, wheel, why="pip could not fetch packages: this test needs a connection. ")
    assert "Batch(1 rows of 3 tokens, 2 in the loss)" in run(python, "-c", USE)
    command = tmp_path / "env" / "bin" / "lmtrain"
    assert run(command, "--version").startswith("lmtrain ")
    assert "shakespeare" in run(command, "data", "list") and "everything is here" in run(command, "doctor")
