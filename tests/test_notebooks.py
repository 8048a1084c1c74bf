"""Every notebook runs from top to bottom with nbdev's own runner: two at a time, each in a process with half the cores.

Of a chapter with exercises it is the students' copy that runs, all exercises empty: that is the same cells.
"""
import json
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from nbdev.config import get_config
from nbdev.test import test_nb as run_nb

from lmtrain.course.copies import for_students

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not p.name.startswith(("_", ".")))


def prepare() -> None:
    "In a process that runs notebooks: its share of the cores, no windows, no worker's name."
    multiprocessing.current_process().name = "MainProcess"  # transformers' collator takes no seed in a worker
    os.environ |= {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2)), "IN_TEST": "1", "MPLBACKEND": "agg"}


def runs(path: Path) -> bool:
    "Does every cell run? The runner changes folders, so one says where it is each time."
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        if '"exercise"' in (text := path.read_text(encoding="utf-8")):
            path = Path(folder, path.name)
            path.write_text(for_students(text), encoding="utf-8")
        return run(path)


def run(path: Path) -> bool:
    return run_nb(path, skip_flags=get_config().tst_flags.split(), basepath=ROOT, cell_timeout=None)[0]


@pytest.fixture(scope="module")
def running(request):
    "The notebooks that were asked for, all under way, the largest first."
    wanted = {i.callspec.params["path"] for i in request.session.items if i.name.startswith("test_notebook[")}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), prepare) as pool:
        yield {p: pool.submit(runs, p) for p in sorted(wanted, key=lambda p: -p.stat().st_size)}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path, running):
    "Each cell runs, and so each assertion in it holds."
    assert running[path].result()


def test_a_failing_notebook_is_noticed(tmp_path, monkeypatch):
    "Negative control: a cell with a false assertion."
    monkeypatch.chdir(ROOT); monkeypatch.setenv("IN_TEST", "1"); monkeypatch.setenv("MPLBACKEND", "agg")
    for code, fine in ("assert 1 + 1 == 2", True), ("assert 1 + 1 == 3", False):
        cell = {"cell_type": "code", "id": "only", "metadata": {}, "execution_count": None, "outputs": [], "source": [code]}
        notebook = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
        (tmp_path / "nb.ipynb").write_text(json.dumps(notebook))
        assert runs(tmp_path / "nb.ipynb") == fine
