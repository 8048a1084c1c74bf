"`lmtrain lab`: a lab as a page, as an app, or the notebooks in JupyterLab; on this machine only, behind a token."
import hashlib
import json
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
import webbrowser
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .. import __version__

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


RECORD = ".lmtrain-copied.json"  # in a reader's folder: the sum of each notebook as it came


def shipped() -> dict[str, str]:
    "The chapters, and a notebook for each lab: their text by their place in a reader's folder."
    source = notebooks()
    aside = {".ipynb_checkpoints", "9_solutions"}
    books = [p for p in sorted(source.rglob("*.ipynb")) if not aside & {*p.parts}]
    return {**{p.relative_to(source).as_posix(): p.read_text(encoding="utf-8") for p in books},
            **{f"{name}.ipynb": notebook(name) for name in CLASSES}}


def copied(folder: Path) -> list[str]:
    """Copy the chapters and a notebook a lab into `folder`, and say in lines what was done.

    What is there stays as it is: after an upgrade the new text of a chapter is laid beside the reader's own.
    """
    record, now = folder / RECORD, shipped()
    try: came = dict(json.loads(record.read_text(encoding="utf-8")))
    except (OSError, ValueError): came = {}                # none yet, or a damaged one: each file is compared
    new, beside = 0, list[str]()
    for name, text in now.items():
        to, digest = folder / name, hashlib.sha256(text.encode()).hexdigest()
        if to.exists():
            if came.get(name) == digest or to.read_text(encoding="utf-8", errors="replace") == text: came[name] = digest; continue
            to = to.with_name(f"{to.stem}-{__version__}-{digest[:6]}.ipynb")
            if to.exists(): continue
            beside.append(to.relative_to(folder).as_posix())
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(text, encoding="utf-8", newline="")
        new, came[name] = new + 1, digest
    gone = [n for n in came if n not in now and (folder / n).exists()]
    record.write_text(json.dumps(came, indent=1), encoding="utf-8")
    lines = [f"{new} notebooks copied to {folder}; what was there is as it was."]
    if beside: lines.append(f"newer in lmtrain {__version__}, laid beside yours: {', '.join(beside)}")
    if gone: lines.append(f"of an earlier lmtrain, kept: {', '.join(gone)}")
    return lines


def application(voila: bool) -> Any:
    "The server's class. Raises ValueError if it is not installed."
    module, name = ("voila.app", "Voila") if voila else ("jupyterlab.labapp", "LabApp")
    if find_spec(module.partition(".")[0]) is None:
        raise ValueError(f'{module.partition(".")[0]} is not installed: pip install "lmtrain[lab]"')
    return getattr(import_module(module), name)


def made(app: Any, voila: bool, line: list[str], token: str) -> Any:
    "The server, ready to start, with this token whatever a configuration file says."
    if voila:
        server = app.instance()
        server.initialize(line)
        server.token = token
    else:
        server = app.initialize_server(argv=line)
        server.identity_provider.token = token
        server.identity_provider.token_generated = False   # else the log has it, for whoever reads the log
        server.no_browser_open_file = True                 # whose mode is the umask's
    return server


def arguments(folder: Path, name: str | None, voila: bool, port: int) -> list[str]:
    "The server's arguments, without the token: all users of a machine may read them. Raises ValueError for an app without a name."
    if voila and name is None: raise ValueError(f"an app needs a name: lmtrain lab {' or '.join(CLASSES)} --voila")
    if voila:
        return [str(folder / f"{name}.ipynb"), "--Voila.ip=127.0.0.1", f"--Voila.port={port}",
                "--Voila.port_retries=0", "--no-browser"]
    where = f"--LabApp.default_url=/lab/tree/{name}.ipynb" if name else "--LabApp.default_url=/lab"
    root = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    return [f"--ServerApp.root_dir={folder}", "--ServerApp.ip=127.0.0.1", *QUIET, where, f"--ServerApp.port={port}",
            "--ServerApp.port_retries=0", "--ServerApp.answer_yes=True", "--no-browser", *root]


def free_port(port: int) -> int:
    "`port`, or any free one if it is 0. Raises OSError if it is taken."
    with socket.socket() as s:
        if os.name != "nt": s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try: s.bind(("127.0.0.1", port))
        except OSError as e: raise OSError(f"port {port} is taken or may not be used ({e.strerror}): give another --port") from None
        return s.getsockname()[1]


def door(url: str, token: str, private: Path) -> Path:
    "A page in the folder `private` that leads to the server; only its owner may read it, for it holds the token."
    path = private / "open.html"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as f:
        f.write(f"<!doctype html><meta charset='utf-8'><meta http-equiv='refresh' content='0;url={url}?token={token}'>"
                f"<a href='{url}?token={token}'>lmtrain lab</a>\n")
    return path


def open_when_up(port: int, page: Path) -> None:
    "Open `page` in a browser once the server answers, from a thread of its own."
    def wait() -> None:
        for _ in range(300):
            try: socket.create_connection(("127.0.0.1", port), 1).close(); break
            except OSError: time.sleep(0.2)
        webbrowser.open(page.as_uri())
    threading.Thread(target=wait, daemon=True).start()


def serve(name: str | None, folder: Path, voila: bool = False, port: int = 0, browser: bool = True) -> None:
    """Copy what is missing, and be the server until it is ended: by Ctrl-C, SIGTERM or SIGHUP.

    The token is in a file that only its owner may read, and on the screen if there is one; never in arguments or logs.
    Raises ValueError for an unknown lab or a server that is not installed, OSError if the port is taken.
    """
    if name is not None: known(name)
    port = free_port(port)
    app, line, token = application(voila), arguments(folder.resolve(), name, voila, port), secrets.token_urlsafe(24)
    for text in copied(folder): print(text)
    where = "" if voila else f"lab/tree/{name}.ipynb" if name else "lab"
    with tempfile.TemporaryDirectory(prefix="lmtrain-lab-") as private:  # mode 700
        page = door(url := f"http://127.0.0.1:{port}/{where}", token, Path(private))
        if hasattr(signal, "SIGHUP"): signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
        print(f"Open {url}?token={token}" if sys.stdout.isatty() else f"Open {page} in a browser.", "Ctrl-C ends the server.",
              flush=True)
        if browser: open_when_up(port, page)
        made(app, voila, line, token).start()
