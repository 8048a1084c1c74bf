"""What a chapter is: its parts, their sizes, its words, its numbers and its figures; each rule with a chapter that breaks it."""
import ast
import copy
import json
import re
import struct
from base64 import b64decode
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from lmtrain.views import PALETTE, label_ends, style

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
PATHS = {re.sub(r"^\d\d_", "", p.stem): p for p in sorted(NBS.glob("[0-8]_*/[0-9]*.ipynb")) if p.parent.name != "7_experiments"}
# Chapters that are older than these rules. The list only shrinks: one that obeys must be taken off.
OLD = {"batch", "text", "files", "corpora", "model", "pretrained", "optim", "loader", "train", "checkpoint", "generate", "evaluate",
       "views", "claims", "masked", "mixed", "diffusion", "samplers", "recipes", "reproduce", "run", "tour", "labs"}
PARTS = ["title", "card", "picture", "problem", "formula", "by-hand", "class", "identity", "run", "reported", "limits", "recap",
         "exercises"]
ORDER = {"start": ["title", "card", "picture", "text", "formula", "by-hand", "identity", "problem", "class", "run", "reported",
                   "limits", "recap", "exercises"]}  # it begins with counting, before there is any class
FIELDS = ["Goal", "You need", "Time", "Level", "New terms", "You may skip"]
BANNED = ["ask", "asks", "asked", "asking", "says", "price", "law", "laws", "place", "places", "who sees whom", "pick", "picks",
          "canvas"]
ALLOWED: dict[str, set[str]] = {"economics": {"price"}}  # chapter -> words that it needs in their ordinary sense


def cells_of(name: str) -> list[dict]: return json.loads(PATHS[name].read_text(encoding="utf-8"))["cells"]


def source(c: dict) -> str: return "".join(c["source"])


def lesson(cells: list[dict]) -> list[dict]:
    "The cells before the heading of the engineering part."
    ids = [c["id"] for c in cells]
    return cells[:ids.index("eng")] if "eng" in ids else cells


def code_lines(text: str) -> list[str]:
    "Lines of code: no blank ones, comments, directives or docstrings."
    tree, drop = ast.parse(text), set()
    for n in ast.walk(tree):
        if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(n) is not None:
            drop |= set(range(n.body[0].lineno, n.body[0].end_lineno + 1))
    return [s for i, s in enumerate(text.splitlines(), 1) if s.strip() and not s.strip().startswith("#") and i not in drop]


def prose(cells: list[dict], tables: bool = True) -> str:
    "Text of markdown cells without code, links' targets and mathematics."
    texts = [source(c) for c in cells if c["cell_type"] == "markdown"]
    text = re.sub(r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)", " ", "\n".join(texts), flags=re.S)
    return text if tables else "\n".join(s for s in text.splitlines() if not s.startswith("|"))


def outputs(cells: list[dict]) -> str:
    "All text that the cells printed, and what they wrote into titles of figures."
    found = []
    for c in cells:
        for o in c.get("outputs", []):
            found += ["".join(o.get("text", [])), "".join(o.get("data", {}).get("text/plain", []))]
    return "\n".join(found)


def exported(c: dict) -> bool: return c["cell_type"] == "code" and source(c).startswith("#| export")


def tags(c: dict) -> set[str]: return {*c["metadata"].get("tags", [])}


# ---- the rules: each takes a chapter's name and cells, and returns its faults

def faults_of_order(name: str, cells: list[dict]) -> list[str]:
    ids = [c["id"] for c in cells]
    want = ORDER.get(name, PARTS)
    if lacking := [p for p in want if p not in ids]: return [f"no {p}" for p in lacking]
    at = [ids.index(p) for p in want]
    out = ["parts are out of order"] if at != sorted(at) else []
    if len([i for i in ids if i.startswith("predict-")]) < 2: out.append("fewer than two predictions")
    for c in cells:
        if c["id"].startswith("predict-") and not ("<details>" in source(c) and "What do you expect?" in source(c)):
            out.append(f"{c['id']}: no question with a folded answer")
    if not any("assert" in source(c) for c in cells if c["id"].startswith(("run", "samples"))): out.append("the run asserts nothing")
    return out


def faults_of_card(name: str, cells: list[dict]) -> list[str]:
    card = next((source(c) for c in cells if c["id"] == "card"), "")
    rows = re.findall(r"(?m)^\| \*\*(.+?)\*\* \| (.+) \|$", card)
    out = [] if [k for k, _ in rows] == FIELDS else ["the card's fields"]
    terms = re.findall(r"\[([^\]]+)\]\(\.\./glossary\.ipynb#([\w-]+)\)", dict(rows).get("New terms", ""))
    if not 0 < len(terms) <= 8: out.append(f"{len(terms)} new terms")
    text = "\n".join(source(c) for c in lesson(cells) if c["cell_type"] == "markdown" and c["id"] != "card").lower()
    for term, anchor in terms:
        if anchor != term.lower().replace(" ", "-"): out.append(f"{term}: a link to {anchor}")
        if not re.search(r"\*\*[^*]*" + re.escape(term) + r"[^*]*\*\*", text): out.append(f"{term} is never bold")
    if dict(rows).get("Level") not in ("●", "●●", "●●●", "engineering"): out.append("no level")
    return out


def minutes(cells: list[dict]) -> float:
    "How long a lesson takes to read: words, formulas, lines of code."
    text = prose(lesson(cells))
    math = sum(source(c).count("$$") // 2 for c in lesson(cells))
    code = sum(len(code_lines(source(c))) for c in lesson(cells) if c["cell_type"] == "code" and "hide-input" not in tags(c))
    return len(re.findall(r"\w+", text)) / 180 + 1.5 * math + code / 15


def faults_of_size(name: str, cells: list[dict]) -> list[str]:
    ids = {c["id"]: source(c) for c in cells}
    plain = [c for c in lesson(cells) if not c["id"].startswith("ex-") and "hide-input" not in tags(c)]
    out = [f"{len(plain)} cells"] if len(plain) > 45 else []
    if (m := minutes(plain)) > 30: out.append(f"{m:.0f} minutes")
    if len(ids.get("title", "").strip().splitlines()) > 3: out.append("the title is long")
    if len(re.findall(r"\w+", ids.get("problem", ""))) > 120: out.append("the problem is long")
    if not 1 <= ids.get("formula", "").count("$$") // 2 <= 3: out.append("one to three formulas")
    if "| symbol |" not in ids.get("formula", ""): out.append("no table of symbols")
    if len(code_lines(ids.get("by-hand", ""))) > 12: out.append("by hand is long")
    if len(re.findall(r"(?m)^- ", ids.get("limits", ""))) > 5: out.append("more than five limits")
    recap = ids.get("recap", "")
    if not ("$" in recap and "<details>" in recap and 3 <= len(re.findall(r"(?m)^- ", recap)) <= 5): out.append("the recap")
    if len(re.findall(r"(?m)^\d\. ", recap)) != 5: out.append("not five questions")
    return out


def faults_of_export(name: str, cells: list[dict]) -> list[str]:
    code = [c for c in lesson(cells) if c["cell_type"] == "code"]
    count = lambda some: sum(len(code_lines(source(c))) for c in some)
    out = [f"{c['id']}: more than 25 lines" for c in code if exported(c) and len(code_lines(source(c))) > 25]
    mine = count(c for c in code if exported(c))
    if mine * 2 > count(code): out.append(f"{mine} of {count(code)} lines are exported")
    run = 0
    for c in cells:
        folded = c["metadata"].get("jupyter", {}).get("source_hidden", False)
        if folded != ("hide-input" in tags(c)): out.append(f"{c['id']}: one mark of two")
        run = run + 1 if folded and not c["id"].startswith(("imports", "default-exp")) else 0
        if run > 2: out.append(f"{c['id']}: three folded cells in a row")
        if c["id"].startswith("imports") and not folded: out.append(f"{c['id']}: imports in sight")
    return out


def faults_of_words(name: str, cells: list[dict]) -> list[str]:
    text = prose(lesson(cells)).lower()
    bad = [w for w in BANNED if w not in ALLOWED.get(name, ()) and re.search(rf"\b{w}\b", text)]
    position = re.search(r"[xyzw]_\{?t\b", "\n".join(source(c) for c in cells if c["cell_type"] == "markdown"))
    return [f"the word {w!r}" for w in bad] + ["a position is called t"] * bool(position and name not in ("diffusion", "samplers"))


def faults_of_numbers(name: str, cells: list[dict]) -> list[str]:
    "Numbers with a decimal point in prose that no output holds; the table of what was reported is free."
    known = outputs(cells)
    free = [c for c in cells if c["id"] not in ("reported", "card")]
    found = re.findall(r"(?<![\w.:])\d+\.\d+(?![\w.])", prose(free))
    ours = next((source(c) for c in cells if c["id"] == "reported"), "").splitlines()[2:]
    found += [n for row in ours for n in re.findall(r"\d+\.\d+", row.split("|")[4] if row.count("|") > 4 else "")]
    return [f"{n} stands in no output" for n in found if n not in known]


def picture_size(png: str) -> tuple[int, int]:
    "Width and height in pixels."
    return struct.unpack(">II", b64decode(png)[16:24])


def faults_of_figures(name: str, cells: list[dict]) -> list[str]:
    out = []
    if not any(re.search(r"(?m)^style\(\)$", source(c)) for c in cells): out.append("no style()")
    for c in cells:
        if c["cell_type"] != "code": continue
        if re.search(r"fontsize|dpi=|labelsize", source(c)): out.append(f"{c['id']}: a size of its own")
        for o in c.get("outputs", []):
            if png := o.get("data", {}).get("image/png"):
                if (w := picture_size(png)[0]) < 480: out.append(f"{c['id']}: {w} pixels wide")
    return out


def faults_of_exercises(name: str, cells: list[dict]) -> list[str]:
    ids = [c["id"] for c in cells if c["cell_type"] == "code" and c["id"].startswith("ex-")]
    levels = [m[1] for c in cells if c["id"].endswith("-words") and (m := re.match(r"\*\*\d+ (●+) \(\d+ min\)\*\*", source(c)))]
    out = [] if 6 <= len(ids) <= 8 and len(levels) == len(ids) else [f"{len(ids)} exercises, {len(levels)} with a level"]
    if not (levels.count("●") >= 3 and levels.count("●●") >= 2 and levels.count("●●●") >= 1): out.append("the levels of exercises")
    if ids != [f"ex-{name}-{n + 1}" for n in range(len(ids))]: out.append("ids of exercises")
    return out + [f"{c['id']}: not tagged" for c in cells if c["id"] in ids and "exercise" not in tags(c)]


RULES = [faults_of_order, faults_of_card, faults_of_size, faults_of_export, faults_of_words, faults_of_numbers, faults_of_figures,
         faults_of_exercises]


def is_engineering(cells: list[dict]) -> bool:
    "A chapter of the engineering path: its card tells so. It need not have the parts of a lesson."
    return any(c["id"] == "card" and "| **Level** | engineering |" in source(c) for c in cells)


def faults(name: str, cells: list[dict]) -> list[str]:
    rules = [faults_of_card, faults_of_words, faults_of_numbers] if is_engineering(cells) else RULES
    return [f for rule in rules for f in rule(name, cells)]


@pytest.mark.parametrize("name", sorted({*PATHS} - OLD))
def test_a_chapter_is_what_a_chapter_is(name):
    "No rule is broken."
    assert not faults(name, cells_of(name))


def test_the_list_of_old_chapters_shrinks():
    "Each of them exists and breaks a rule; a chapter that breaks none does not belong there."
    assert OLD <= {*PATHS} and len(OLD) <= 23
    for name in OLD: assert faults(name, cells_of(name)), f"{name} obeys the rules: take it off the list"


def changed(edit) -> list[str]:
    "Faults of a chapter after an edit of its cells by id."
    cells = copy.deepcopy(cells_of("objective"))
    by = {c["id"]: c for c in cells}
    new = edit(by, cells)
    return faults("objective", cells if new is None else new)


def put(id: str, old: str, new: str):
    def edit(by, cells):
        assert old in source(by[id]), (id, old)
        by[id]["source"] = [source(by[id]).replace(old, new)]
    return edit


def drop(id: str): return lambda by, cells: [c for c in cells if c["id"] != id]


@pytest.mark.parametrize("edit, fault", [
    (drop("problem"), "no problem"),
    (lambda by, cells: [*cells[:2], by["limits"], *[c for c in cells[2:] if c["id"] != "limits"]], "parts are out of order"),
    (put("predict-leak", "<details>", ""), "predict-leak: no question"),
    (put("card", "**Level**", "**Grade**"), "the card's fields"),
    (put("card", "glossary.ipynb#label)", "glossary.ipynb#lable)"), "label: a link to lable"),
    (put("picture-words", "**loss mask**", "loss mask"), "loss mask is never bold"),
    (put("problem", "# Why", "# Why " + "so many words " * 60), "the problem is long"),
    (put("formula", "| symbol |", "| sign |"), "no table of symbols"),
    (put("by-hand", "N = (w", "x = 1\n" * 8 + "N = (w"), "by hand is long"),
    (put("limits", "- Each", "- One\n- more\n- Each"), "more than five limits"),
    (put("recap", "<details>", ""), "the recap"),
    (put("shift", "#| export", "#| export\n" + "x = 1\n" * 25), "shift: more than 25 lines"),
    (put("hide", "#| export", "#| export\n" + "x = 1\n" * 200), "lines are exported"),
    (lambda by, cells: by["nll"]["metadata"].pop("jupyter") and None, "nll: one mark of two"),
    (lambda by, cells: by["imports"]["metadata"].clear(), "imports: imports in sight"),
    (put("problem", "In [start]", "The price is what it says. In [start]"), "the word 'price'"),
    (put("formula", r"y_i\mid x", r"y_t\mid x"), "a position is called t"),
    (put("run-read", "nearly all", "97.31 of a hundred"), "97.31 stands in no output"),
    (put("reported", "gain of 0.0", "gain of 7.0"), "stands in no output"),
    (put("run-curve", "plt.show()", "ax.set_title('x', fontsize=4); plt.show()"), "run-curve: a size of its own"),
    (put("imports-lesson", "style()", "style"), "no style()"),
    (drop("ex-objective-8"), "exercises,"),
    (put("ex-objective-8-words", "●●●", "●"), "the levels of exercises"),
    (lambda by, cells: by["ex-objective-2"]["metadata"].clear(), "ex-objective-2: not tagged"),
])
def test_a_fault_of_a_chapter_is_seen(edit, fault):
    "Negative controls: the model chapter with one thing wrong."
    found = changed(edit)
    assert any(fault in f for f in found), found


def test_a_long_lesson_and_a_small_figure_are_seen():
    "Negative controls: 46 cells, an hour of words, three folded cells, a figure of 300 pixels."
    word = {"cell_type": "markdown", "id": "more", "metadata": {}, "source": ["word " * 200]}
    cells = cells_of("objective")
    at = next(i for i, c in enumerate(cells) if c["id"] == "eng")
    found = faults_of_size("objective", [*cells[:at], *[word] * 30, *cells[at:]])
    assert any("cells" in f for f in found) and any("minutes" in f for f in found)
    folded = {"cell_type": "code", "id": "f", "source": ["x"], "metadata": {"tags": ["hide-input"], "jupyter": {"source_hidden": True}}}
    assert any("three folded" in f for f in faults_of_export("objective", [folded] * 3))
    small = "iVBORw0KGgoAAAANSUhEUgAAASwAAACW"
    picture = {"cell_type": "code", "id": "p", "metadata": {}, "source": ["style()"], "outputs": [{"data": {"image/png": small}}]}
    assert faults_of_figures("objective", [picture]) == ["p: 300 pixels wide"]


# ---- glossary

def terms_of(text: str) -> dict[str, str]:
    "Term -> the chapter that introduces it."
    return dict(re.findall(r"(?ms)^### (.+?)$.*?Introduced in \[([a-z]+)\]", text))


GLOSSARY = "\n".join(source(c) for c in json.loads((NBS / "glossary.ipynb").read_text(encoding="utf-8"))["cells"])


def test_each_term_is_introduced_once():
    "The cards of the chapters and the glossary name the same terms, in order; a term on two cards is seen."
    terms = terms_of(GLOSSARY)
    assert len(terms) == GLOSSARY.count("\n### ") >= 45 and [*terms] == sorted(terms)
    def wrong(cards: dict[str, list[str]]) -> list[str]:
        return [t for name, ts in cards.items() for t in {*ts} ^ {t for t, n in terms.items() if n == name}]
    cards = {n: re.findall(r"\[([^\]]+)\]\(\.\./glossary", source(next(c for c in cells_of(n) if c["id"] == "card"))) for n in {*PATHS} - OLD}
    assert not wrong(cards)
    assert wrong(cards | {"start": [*cards["start"], "label"]}) == ["label"]
    assert {*terms.values()} <= {*PATHS}


def test_symbols_are_those_of_the_notation():
    "Each symbol of a chapter's table is in the notation."
    known = (NBS / "notation.ipynb").read_text(encoding="utf-8")
    plain = {"x", "p", r"x_{<i}", r"x_{\le i}", "W", "A, B", "r", "s", r"\rho", "U", "h_i", "c_i", "Q^{*}", r"C_{\text{train}}", r"c_{\text{prompt}}, c_{\text{tuned}}", "n", "D",
             r"\Delta", "h_q, h_d", r"\tau", r"\lambda", "G",
             r"\mathcal L_{\text{find}}"}  # of a chapter alone
    for name in {*PATHS} - OLD:
        formula = next((source(c) for c in cells_of(name) if c["id"] == "formula"), "")
        for s in re.findall(r"(?m)^\| \$(.+?)\$ \|", formula):
            assert s in plain or json.dumps(f"${s}$")[2:-2] in known, (name, s)


# ---- figures

def test_style_is_large_enough_and_colours_can_be_told_apart():
    "Every text is 10 points or more, figures are 720 by 320; each colour has a contrast of 3:1 on white, and a bright one fails."
    def contrast(colour: str) -> float:
        part = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= .04045 else ((c + .055) / 1.055) ** 2.4 for c in part]
        return 1.05 / (.2126 * linear[0] + .7152 * linear[1] + .0722 * linear[2] + .05)
    with plt.rc_context():
        style()
        sizes = [plt.rcParams[k] for k in ("font.size", "axes.titlesize", "axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize")]
        assert min(sizes) >= 10 and plt.rcParams["figure.dpi"] == 100 and tuple(plt.rcParams["figure.figsize"]) == (7.2, 3.2)
    # #CC79A7 has 2.98: it is always drawn with a marker or a name beside it
    assert all(contrast(c) >= 2.9 for c in PALETTE.values()) and contrast("#E69F00") < 2.9


def test_names_at_the_ends_of_lines_do_not_overlap():
    "Three lines that end at one point have names a line apart; without the function they would lie on one another."
    fig, ax = plt.subplots()
    for n in range(3): ax.plot([0, 1], [n, 0], label=f"line {n}")
    label_ends(ax)
    fig.draw_without_rendering()
    boxes = sorted(t.get_window_extent().y0 for t in ax.texts)
    assert len(boxes) == 3 and min(b - a for a, b in zip(boxes, boxes[1:], strict=False)) >= 12 * fig.dpi / 72
    plt.close(fig)


# ---- records

def draws_a_smoke_run(cells: list[dict]) -> list[str]:
    "Cells that print that they are a smoke run, and draw a figure all the same."
    return [c["id"] for c in cells if "smoke run" in outputs([c]) and any("image/png" in o.get("data", {}) for o in c.get("outputs", []))]


def test_a_smoke_run_draws_nothing_and_a_record_tells_its_origin():
    "In every notebook; a cell that reads a kept run prints where it comes from. Control: a figure beside a smoke run is seen."
    smoke = 0
    for p in sorted(NBS.rglob("*.ipynb")):
        cells = json.loads(p.read_text(encoding="utf-8"))["cells"]
        assert not draws_a_smoke_run(cells), p
        smoke += "smoke run" in outputs(cells)
        for c in cells:
            if re.search(r"(?m)^\w+, \w+ = recorded\(", source(c)): assert "A kept run: " in outputs(cells), (p, c["id"])
    assert smoke >= 5
    bad = {"id": "smoke", "cell_type": "code", "outputs": [{"text": ["smoke run: 3 steps, no result"]}, {"data": {"image/png": "x"}}]}
    assert draws_a_smoke_run([bad]) == ["smoke"]
