"`lmtrain lab`: a lab as a page, as an app, or the notebooks in JupyterLab; on this machine only, behind a token."
import json
import os
import secrets
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CLASSES = {"masking": "MaskingLab", "noise": "NoiseLab", "loss": "LossLab"}
TITLES = {"masking": "The masking lab", "noise": "The noise lab", "loss": "The loss lab"}
QUIET = ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url=None"]  # asks nobody
HERE = Path(__file__).parent.parent


def known(name: str) -> str:
    "The name of a lab. Raises ValueError if there is none."
    if name not in CLASSES: raise ValueError(f"no lab {name!r}: choose from {', '.join(CLASSES)}")
    return name


def lab(name: str) -> Any:
    "A lab with what it brings along: no model, no kernel needed."
    from importlib import import_module
    return getattr(import_module(f"lmtrain.labs.{known(name)}"), CLASSES[name])()


def write_page(name: str, path: Path) -> Path:
    "A lab as one self-contained HTML file. Raises OSError if it cannot be written."
    from .shared import page
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(lab(name), TITLES[known(name)]), encoding="utf-8")
    return path


def notebook(name: str) -> str:
    "A notebook with one lab in it, as JSON."
    code = f"from lmtrain.labs.{known(name)} import {CLASSES[name]}\n{CLASSES[name]}()"
    cells = [{"cell_type": "markdown", "id": "title", "metadata": {}, "source": f"# {TITLES[name]}"},
             {"cell_type": "code", "id": "lab", "metadata": {}, "source": code, "outputs": [], "execution_count": None}]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    whole = {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernel}, "cells": cells}
    return json.dumps(whole, indent=1)


def notebooks() -> Path:
    "Where the chapters are: inside an installed package, or in a checkout. Raises FileNotFoundError."
    for path in (HERE / "_data" / "nbs", HERE.parent / "nbs"):
        if path.is_dir(): return path
    raise FileNotFoundError("the notebooks are missing from this installation of lmtrain: install it again")


def copied(folder: Path) -> int:
    "Copy the chapters and a notebook a lab into `folder`; what is there is left as it is. How many are new."
    source, new = notebooks(), 0
    for path in sorted(source.rglob("*.ipynb")):
        to = folder / path.relative_to(source)
        if to.exists() or ".ipynb_checkpoints" in path.parts: continue
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, to)
        new += 1
    for name in CLASSES:
        if not (to := folder / f"{name}.ipynb").exists():
            to.write_text(notebook(name), encoding="utf-8")
            new += 1
    return new


def command(folder: Path, name: str | None, voila: bool, port: int, token: str, browser: bool) -> list[str]:
    "The server's command line. Raises ValueError if the server is not installed, or an app has no name."
    module = "voila" if voila else "jupyterlab"
    if find_spec(module) is None: raise ValueError(f'{module} is not installed: pip install "lmtrain[lab]"')
    if voila and name is None: raise ValueError(f"an app needs a name: lmtrain lab {' or '.join(CLASSES)} --voila")
    shut = [] if browser else ["--no-browser"]
    if voila:
        return [sys.executable, "-m", "voila", str(folder / f"{name}.ipynb"), "--Voila.ip=127.0.0.1",
                f"--token={token}", *([f"--port={port}"] if port else []), *shut]
    where = f"--LabApp.default_url=/lab/tree/{name}.ipynb" if name else "--LabApp.default_url=/lab"
    root = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    return [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={folder}", "--ServerApp.ip=127.0.0.1",
            f"--IdentityProvider.token={token}", *QUIET, where, *([f"--ServerApp.port={port}"] if port else []), *shut, *root]


def serve(name: str | None, folder: Path, voila: bool = False, port: int = 0, browser: bool = True) -> int:
    "Copy what is missing, start the server, and stay until it ends; its exit code."
    if name is not None: known(name)
    line = command(folder.resolve(), name, voila, port, secrets.token_urlsafe(24), browser)
    print(f"{copied(folder)} notebooks copied to {folder}; what was there is as it was. Ctrl-C ends the server.",
          flush=True)
    server = subprocess.Popen(line)
    try: return server.wait()
    except KeyboardInterrupt:
        server.terminate()
        return 130 if server.wait(20) else 0
