"""The wheel, installed into an empty environment and used from another folder."""
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OTHERS = ("torch", "transformers", "accelerate", "datasets", "numpy", "pandas", "pyarrow", "matplotlib", "ipywidgets", "anywidget", "tqdm", "safetensors", "tokenizers", "filelock")
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
    want = {p.relative_to(ROOT).as_posix() for p in (ROOT / "lmtrain").rglob("*") if p.suffix in (".py", ".pyi", ".typed", ".js", ".css", ".json")
            or p.name == "py.typed"}
    want |= {f"lmtrain/_data/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "nbs").rglob("[!.]*.ipynb")
             if not {".ipynb_checkpoints", "9_solutions"} & {*p.parts}}
    want |= {f"lmtrain/_data/{p.name}" for p in [ROOT / "settings.ini", *(ROOT / "data").glob("*.json")]}
    return want - set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and an sdist, built from a copy in which things lie about: a module that is no more in `build`, a notebook of somebody's own."""
    copy, out = tmp_path_factory.mktemp("copy") / "lmtrain", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv*", ".git", "build", "*.egg-info", "tour", "__pycache__"))
    for name in ("build/lib/lmtrain/gone.py", "build/lib/lmtrain/_data/nbs/old.ipynb", "nbs/Untitled.ipynb", "nbs/0_core/Untitled1.ipynb", "nbs/0_core/.ipynb_checkpoints/01_batch.ipynb"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True); (copy / name).write_text("{}")
    done = subprocess.run([sys.executable, "-m", "build", "--wheel", "--sdist", "--no-isolation", f"--outdir={out}", str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def wheel(built): return next(built.glob("*.whl"))


def test_nothing_stray_is_inside(wheel, built):
    "Neither a module of an earlier build nor a notebook of somebody's own lands in the wheel, nor the notebook in the sdist."
    names = [*zipfile.ZipFile(wheel).namelist(), *tarfile.open(next(built.glob("*.tar.gz"))).getnames()]
    assert not [n for n in names if "gone.py" in n or "old.ipynb" in n or "Untitled" in n or "checkpoints" in n]
    assert any(n.endswith("04_labs.ipynb") for n in names) and any(n.endswith("mlm_writes.ipynb") for n in names)


def test_the_page_of_the_index(wheel):
    "The description has no link to a file that is not there; with a home, as in a published fork, links lead to it. Control: README has such links."
    z = zipfile.ZipFile(wheel)
    facts = email.message_from_bytes(z.read(next(n for n in z.namelist() if n.endswith("METADATA"))))
    links = lambda text: [u for u in re.findall(r"\]\(([^)]+)\)", text) if not u.startswith(("http", "#"))]
    page = facts.get_payload(decode=True).decode()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(page) > 5000 and not links(page) and links(readme) and "# lmtrain" in page
    code = "import runpy, sys, setuptools; setuptools.setup = lambda **_: None; print(runpy.run_path('setup.py')['described'](open('README.md', encoding='utf-8').read(), sys.argv[1]))"
    there = subprocess.run([sys.executable, "-c", code, "https://example.org/me/lmtrain/"], cwd=ROOT, capture_output=True, text=True).stdout
    assert len(there) > 5000 and not links(there) and "https://example.org/me/lmtrain/blob/HEAD/nbs/0_core/01_batch.ipynb" in there and "/raw/HEAD/docs/labs.gif" in there
    for c in ("Python :: 3.11", "Python :: 3.12", "Python :: 3.13", "Windows", "Typed"): assert any(c in v for v in facts.get_all("Classifier"))


def test_the_sdist_tests_itself(built, tmp_path):
    "Unpacked elsewhere, its own tests run: a module's, the house's and the labs'."
    with tarfile.open(next(built.glob("*.tar.gz"))) as t: t.extractall(tmp_path, filter="data")
    root = next(tmp_path.iterdir())
    env = {**os.environ, "PYTHONPATH": str(root)}
    for file in ("tests", "benchmarks", "docs", ".ci/run", "constraints.txt", "nbs/0_core/01_batch.ipynb"): assert (root / file).exists(), file
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_batch.py", "tests/test_house.py", "tests/test_labs_serve.py"], cwd=root, env=env,
                          capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:]


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
    (tmp_path / "mypy.ini").write_text(f"[mypy]\n[mypy-{'.*,'.join(OTHERS)}.*]\nfollow_imports = skip\nignore_missing_imports = True\n")
    def types(code: str) -> str:
        (tmp_path / "use.py").write_text(code)
        return subprocess.run([sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--python-executable", python, "use.py"], cwd=tmp_path, capture_output=True, text=True, env=clean).stdout
    seen = types("from lmtrain import Trainer\nreveal_type(Trainer)\nTrainer(1)\n")
    assert "def (model: lmtrain.model.LM, objective: lmtrain.objective.Objective" in seen and 'Missing positional arguments "objective", "batches"' in seen
    next((tmp_path / "env").rglob("lmtrain/py.typed")).unlink()                        # the control: without it mypy sees nothing
    assert "def (model" not in types("from lmtrain import Trainer\nreveal_type(Trainer)\n")
