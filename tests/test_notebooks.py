"""Every notebook runs from top to bottom, in this process, with nbdev's own runner."""
import json
import os
from pathlib import Path

import pytest
from nbdev.config import get_config
from nbdev.test import test_nb as run_nb

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not p.name.startswith(("_", ".")))


@pytest.fixture(autouse=True)
def stay(monkeypatch):
    "The runner changes folders and sets IN_TEST; put both back."
    monkeypatch.chdir(ROOT); monkeypatch.setenv("IN_TEST", "1"); monkeypatch.setenv("MPLBACKEND", "agg")
    yield
    os.chdir(ROOT)


def runs(path: Path) -> bool:
    return run_nb(path, skip_flags=get_config().tst_flags.split(), basepath=ROOT, cell_timeout=None)[0]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path):
    "Each cell runs, and so each assertion in it holds."
    assert runs(path)


def test_a_failing_notebook_is_noticed(tmp_path):
    "Negative control: a cell with a false assertion."
    for code, fine in ("assert 1 + 1 == 2", True), ("assert 1 + 1 == 3", False):
        cell = {"cell_type": "code", "id": "only", "metadata": {}, "execution_count": None, "outputs": [], "source": [code]}
        notebook = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
        (tmp_path / "nb.ipynb").write_text(json.dumps(notebook))
        assert runs(tmp_path / "nb.ipynb") == fine
