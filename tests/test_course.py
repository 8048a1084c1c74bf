"""Exercises: the ids agree, solutions are right, empty answers are empty, wrong ones meet their diagnosis, and nothing leaks."""
import json
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from wrong_answers import WRONG

from lmtrain.course import Report, check, hint, kit
from lmtrain.course.copies import SOLUTIONS, copy, course, for_students, solutions
from lmtrain.labs.serve import copied, shipped

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
CELLS = {p: json.loads(p.read_text(encoding="utf-8"))["cells"] for p in sorted(NBS.rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts}
IDS = [i for c in kit.chapters() for i in kit.exercises(c)]


def source(c: dict) -> str: return "".join(c["source"])


def solved(id: str) -> tuple[str, str]:
    "The solutions' imports, and the cell that solves an exercise."
    cells = CELLS[NBS / SOLUTIONS / f"{id.rpartition('-')[0]}.ipynb"]
    by = {c["id"]: source(c) for c in cells}
    return by["imports"], by[f"solve-{id}"]


@pytest.fixture(autouse=True)
def afresh():
    "No hints were given, nothing was tried."
    for c in kit.chapters():
        for e in kit.exercises(c).values(): e.given, e.state = 0, kit.EMPTY


def test_ids_are_the_same_everywhere():
    "Specifications, cells, solutions and wrong answers name the same exercises; one that is missing somewhere is seen."
    def disagree(*where: set[str]) -> set[str]: return set.union(*where) - set.intersection(*where)
    cells = {c["id"][3:] for p, cs in CELLS.items() for c in cs if c["id"].startswith("ex-") and not c["id"].endswith("-words")}
    solves = {c["id"][6:] for p, cs in CELLS.items() for c in cs if c["id"].startswith("solve-")}
    called = {m for cs in CELLS.values() for c in cs if c["id"].startswith("ex-") for m in re.findall(r'check\("([\w-]+)"', source(c))}
    assert not disagree({*IDS}, cells, solves, called, {*WRONG})
    assert disagree({*IDS}, cells - {"start-1"}) == {"start-1"}


@pytest.mark.parametrize("id", IDS)
def test_a_solution_is_right_twice(id):
    "The solutions' cell holds, and so does a second check of the same answer."
    imports, code = solved(id)
    space: dict = {}
    exec(imports + "\n" + code, space)
    assert space["report"] and space["report"].state == kit.RIGHT
    again = re.search(r"check\(.*\)", code)[0]
    assert eval(again, space)


@pytest.mark.parametrize("id", IDS)
def test_an_empty_answer_is_empty(id):
    "`...`, None, an empty text and stubs that raise NotImplementedError."
    def stub(*a): raise NotImplementedError
    class Stub(torch.nn.Module):
        def __init__(self, *a): raise NotImplementedError
    for answer in (..., None, "", " \n"): assert check(id, answer).state == kit.EMPTY, answer
    for found in (check(id, stub), check(id, Stub)):
        assert not found and (found.state == kit.EMPTY or " wanted here" in found.message or "arguments" in found.message or "argument " in found.message), found
    assert kit.EMPTY in {check(id, stub).state, check(id, Stub).state} or "one number is wanted" in check(id, stub).message


@pytest.mark.parametrize("id", IDS)
def test_a_wrong_answer_meets_its_diagnosis(id):
    "At least three typical mistakes each are wrong, in words of their own, and the next hint comes with them."
    assert len(WRONG[id]) >= 3
    for n, (answer, part) in enumerate(WRONG[id]):
        found = check(id, answer)
        assert found.state == kit.WRONG and not found
        assert part in found.message, (part, found.message)
        assert f"hint {min(n + 1, 3)} of 3" in found.message


def too_much(text: str, lines: list[str], truths: list[float]) -> list[str]:
    "Lines of a solution, or a true number to three digits, in a text."
    squeezed = "".join(text.split())
    found = [s for s in lines if len(s) > 20 and "".join(s.split()) in squeezed]
    return found + [t for t in truths if abs(t) > .01 and re.search(rf"(?<![\d.]){re.escape(f'{t:.3g}')}", text) and not float(t).is_integer()]


@pytest.mark.parametrize("id", IDS)
def test_no_message_holds_the_answer(id):
    "Hints and diagnoses hold no line of a solution and no true number; a planted one is seen."
    imports, code = solved(id)
    lines = [s.strip() for s in code.splitlines() if not s.strip().startswith(("assert", "report", '"'))]
    truths = {"start-1": [np.log(27)], "objective-1": [np.log(1000)]}.get(id, [])
    said = [*kit.find(id).hints, *(check(id, answer).message for answer, _ in WRONG[id])]
    for text in said: assert not too_much(text, lines, truths), text
    assert too_much("Write " + max(lines, key=len), lines, truths) or max(map(len, lines)) <= 20
    if truths: assert too_much(f"it is {truths[0]:.3g}", lines, truths)


def test_random_numbers_stay_as_they_were():
    "All states of random numbers, the default type and the gradient's switch are those of before; without `apart` they are not."
    def states(): return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.is_grad_enabled()
    def greedy(*a):
        random.random(); np.random.rand(); torch.rand(3); torch.set_default_dtype(torch.float64); torch.set_grad_enabled(False)
        return a[0]
    before = states()
    try:
        for id in IDS: check(id, greedy)
        assert states() == before
        greedy(1)
        assert states() != before
    finally: torch.set_default_dtype(torch.float32); torch.set_grad_enabled(True)


def test_check_never_raises_on_an_answer():
    "Whatever is answered there is a report: strange values, functions that fail in every way, objects that lie about themselves."
    class Liar:
        def __eq__(self, other): raise RuntimeError("no")
        def __repr__(self): raise RuntimeError("no")
        __hash__ = None
    def leaves(*a): sys.exit(3)
    def fails(*a): return 1 / 0
    def recurses(*a): return recurses(*a)
    for id in IDS:
        for answer in (0, float("nan"), float("inf"), True, [], {}, "word", b"", torch.zeros(0), torch.ones(2, 2), object(), Liar(), int, leaves, fails,
                       recurses, lambda: 1, lambda *a, **k: torch.zeros(()), lambda *a: "text", lambda *a: Liar()):
            assert isinstance(check(id, answer), Report) and not check(id, answer)
    assert "ZeroDivisionError" in check("start-3", fails).message


def test_an_unknown_exercise_is_named():
    for id, near in ("objectiv-1", "objective"), ("objective-99", "objective-8"), ("", "start"), ("kit-1", "chapters are"):
        with pytest.raises(ValueError, match=near): check(id, 1)
        with pytest.raises(ValueError): hint(id)


def test_hints_come_one_after_another_and_states_are_listed():
    e = kit.find("objective-2")
    found = [str(hint("objective-2")) for _ in range(4)]
    assert [f"hint {n} of 3" in t for n, t in zip((1, 2, 3, 3), found, strict=True)] == [True] * 4 and e.hints[2] in found[3]
    check("objective-3", 11); check("objective-5", lambda s, n: sum(s) / sum(n))
    listing = str(check())
    assert "✗ objective-3" in listing and "✓ objective-5" in listing and "○ objective-1" in listing and "start" not in listing
    assert listing.count("\n") == 7


# ---- copies

def leaks(texts: dict[str, str]) -> set[str]:
    "Lines of solutions, longer than 20 characters, in the code of notebooks; lines that the chapters show anyway aside."
    shown = {s.strip() for p, cs in CELLS.items() if p.parent.name != SOLUTIONS for c in cs for s in source(c).splitlines()}
    every = {s.strip() for text in solutions().values() for c in json.loads(text)["cells"] if c["cell_type"] == "code" for s in source(c).splitlines()}
    wanted = {s for s in every if len(s) > 20 and s not in shown and not s.startswith(("import", "from"))}
    return {s for s in wanted for text in texts.values() if json.dumps(s, ensure_ascii=False)[1:-1] in text or s in text}


def test_the_student_has_no_solution(tmp_path):
    "Neither in a copy for students, nor in a copy of the labs, nor in a wheel; a planted line is seen. The teacher has all."
    said = course(tmp_path / "class", tmp_path / "staff")
    assert len(said) == 2
    read = lambda root: {p.relative_to(root).as_posix(): p.read_text(encoding="utf-8") for p in root.rglob("*.ipynb")}
    student, teacher = read(tmp_path / "class"), read(tmp_path / "staff")
    assert not leaks(student) and {n for n in teacher if n not in student} == {*solutions()} and leaks(teacher)
    copied(tmp_path / "lab")
    assert not leaks(read(tmp_path / "lab")) and {*read(tmp_path / "lab")} == {*shipped()}
    assert leaks(student | {"planted": solved("objective-8")[1]})
    cells = lambda text: json.loads(text)["cells"]
    chapter = "0_core/07_objective.ipynb"
    assert all(not c.get("outputs") for c in cells(student[chapter]) if "exercise" in c["metadata"].get("tags", []))
    assert any(c.get("outputs") for c in cells(student[chapter]))
    assert [source(c) for c in cells(student[chapter])] == [source(c) for c in CELLS[NBS / chapter]]


def test_what_students_do_not_get():
    "Cells with a tag are dropped, outputs of exercises are cleared, `clear` clears all."
    cell = lambda id, *tags: {"cell_type": "code", "id": id, "metadata": {"tags": [*tags]}, "source": ["1"], "outputs": [{"o": 1}], "execution_count": 1}
    nb = json.dumps({"cells": [cell("a"), cell("b", "solution"), cell("c", "teacher"), cell("d", "exercise")], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    kept = {c["id"]: c for c in json.loads(for_students(nb))["cells"]}
    assert [*kept] == ["a", "d"] and kept["a"]["outputs"] and not kept["d"]["outputs"]
    assert not any(c["outputs"] for c in json.loads(for_students(nb, clear=True))["cells"])


def test_a_copy_is_whole_or_not_there(tmp_path):
    "A folder with something in it is refused and stays; a copy that breaks off leaves nothing behind."
    (tmp_path / "mine").mkdir(); (tmp_path / "mine" / "essay.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"): course(tmp_path / "mine", None)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="not empty"): course(tmp_path / "file", None)
    with pytest.raises(ValueError, match="for whom"): course(None, None)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["essay.txt"]
    with pytest.raises(UnicodeEncodeError): copy(tmp_path / "new", {"a/b.ipynb": "fine", "a/c.ipynb": "\udc00"})
    assert not [p for p in (tmp_path / "new").rglob("*") if p.is_file()] and copy(tmp_path / "new", {"a/b.ipynb": "fine"})


def test_the_command(tmp_path):
    "`lmtrain course`, as one types it."
    run = lambda *a: subprocess.run([sys.executable, "-m", "lmtrain", "course", *a], capture_output=True, text=True, cwd=tmp_path)
    done = run("--student", "class", "--clear")
    assert done.returncode == 0 and "copied to class" in done.stdout
    assert not any(c.get("outputs") for p in (tmp_path / "class").rglob("*.ipynb") for c in json.loads(p.read_text(encoding="utf-8"))["cells"])
    again = run("--student", "class")
    assert again.returncode == 1 and again.stderr.strip().count("\n") == 0 and "not empty" in again.stderr
    assert run().returncode == 1


def test_an_installed_package_has_no_solutions(tmp_path, monkeypatch):
    "The teacher's copy is made in a clone: elsewhere one line says so."
    from lmtrain.course import copies
    (tmp_path / "nbs").mkdir()
    monkeypatch.setattr(copies, "notebooks", lambda: tmp_path / "nbs")
    with pytest.raises(FileNotFoundError, match="clone of the repository"): course(None, tmp_path / "staff")


def test_no_solution_is_in_a_wheel(tmp_path):
    "setup.py's list of chapters leaves them out; a wheel with one in it, the negative control, is seen."
    ask = ("import pathlib, runpy, setuptools; setuptools.setup = lambda **k: None; f = runpy.run_path(str(pathlib.Path('setup.py').resolve()))['is_chapter']; "
           "print(*(p for p in pathlib.Path.cwd().joinpath('nbs').rglob('*.ipynb') if f(p)), sep='\\n')")
    done = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True, check=True)
    inside = {Path(line) for line in done.stdout.splitlines()}
    assert not any(SOLUTIONS in p.parts for p in inside) and NBS / "glossary.ipynb" in inside
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as z:
        for p in inside: z.write(p, p.name)
    read = lambda: {n: zipfile.ZipFile(tmp_path / "w.whl").read(n).decode() for n in zipfile.ZipFile(tmp_path / "w.whl").namelist()}
    assert not leaks(read())
    with zipfile.ZipFile(tmp_path / "w.whl", "a") as z: z.write(NBS / SOLUTIONS / "start.ipynb", "solutions.ipynb")
    assert leaks(read())
