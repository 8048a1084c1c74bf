"""Files, folders and sets as documents: what comes out is what went in, or one line says why not."""
import codecs
import csv
import gzip
import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain import corpora
from lmtrain.corpora import corpus, held_out, near_duplicates
from lmtrain.files import kind_of, own, split_of

TEXTS = [f"Text number {i}, which speaks of {i * i} ships and {i ** 3} sails." for i in range(30)]


def jsonl(path: Path, texts, **more) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": t, **more}) + "\n" for t in texts), encoding="utf-8")
    return path


def all_of(data) -> list[str]: return [t for split in data for t in data[split]["text"][:]]


# ---- which files

def test_a_path_is_no_pattern(tmp_path):
    "A file whose name is a pattern that fits its neighbour: it is read itself. So for folders, stars and question marks."
    jsonl(tmp_path / "my1.jsonl", ["the wrong file"])
    assert own(jsonl(tmp_path / "my[1].jsonl", TEXTS))["train"]["text"][:] == TEXTS
    jsonl(tmp_path / "a1" / "x.jsonl", ["wrong"])
    for name in ("a[1]", "a?", "a*", "{a1,b}"):
        jsonl(tmp_path / name / "x.jsonl", TEXTS)
        assert own(tmp_path / name)["train"]["text"][:] == TEXTS, name


def test_what_is_no_data_stays_outside(tmp_path):
    "Checkpoints of notebooks, what macOS leaves behind, hidden files; upper-case names are data; others are named in a warning."
    for name in "a.txt", "B.TXT", "sub/c.Md": (tmp_path / name).parent.mkdir(exist_ok=True); (tmp_path / name).write_text(f"text {name}\n")
    for name in (".ipynb_checkpoints/a-checkpoint.txt", "._a.txt", "__MACOSX/._a.txt", ".git/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True); (tmp_path / name).write_bytes(b"\0\x05\x16\x07no text")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.warns(UserWarning, match="1 files that are no text were left out, such as picture.png"): data = own(tmp_path)
    assert sorted(data["train"]["text"][:]) == ["text B.TXT\n", "text a.txt\n", "text sub/c.Md\n"]


def test_a_cloned_data_set_opens(tmp_path):
    "README, licence and description beside the tables; a second kind of *data* is refused by name."
    pd.DataFrame({"text": TEXTS}).to_parquet(tmp_path / "data.parquet")
    for name in ("README.md", "LICENSE", "dataset_infos.json", ".gitattributes", "CITATION.cff"): (tmp_path / name).write_text("{}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert own(tmp_path)["train"]["text"][:] == TEXTS
    (tmp_path / "more.csv").write_text("text\nx\n")
    with pytest.raises(ValueError, match=r"mixes kinds of files \(.*(data.parquet|more.csv), (more.csv|data.parquet)\)"): own(tmp_path)
    (tmp_path / "only").mkdir(); (tmp_path / "only" / "README.md").write_text("alone")
    assert own(tmp_path / "only")["train"]["text"][:] == ["alone\n"]


# ---- splits

@pytest.mark.parametrize("names", [("train.jsonl", "validation.jsonl", "test.jsonl"), ("data/train-00000-of-00001.jsonl", "data/dev-0.jsonl", "data/test.jsonl"),
                                   ("train/a.jsonl", "valid/a.jsonl", "test/a.jsonl"), ("my_train.jsonl", "my_val.jsonl", "my_test.jsonl")])
def test_splits_that_exist_are_kept(tmp_path, names):
    "No document of the test is trained on, and the validation is the validation."
    parts = TEXTS[:20], TEXTS[20:25], TEXTS[25:]
    for name, part in zip(names, parts, strict=True): jsonl(tmp_path / name, part)
    data = corpus(tmp_path)
    assert data["train"]["text"][:] == parts[0] and data["validation"]["text"][:] == parts[1]
    stream = corpus(tmp_path, streaming=True)
    assert [r["text"] for r in stream["train"]] == parts[0] and [r["text"] for r in stream["validation"]] == parts[1]


def test_train_and_test_alone(tmp_path):
    jsonl(tmp_path / "train.jsonl", TEXTS[:20]); jsonl(tmp_path / "test.jsonl", TEXTS[20:])
    data = corpus(tmp_path)
    assert data["train"]["text"][:] == TEXTS[:20] and data["validation"]["text"][:] == TEXTS[20:]


def test_a_story_called_test_is_no_split(tmp_path):
    "One file among others, or a name that holds the letters only: all are split by hash."
    for i, t in enumerate(TEXTS): (tmp_path / (f"story-{i}.txt" if i else "test.txt")).write_text(t)
    data = corpus(tmp_path)
    out = held_out(sorted([t for t in TEXTS], key=lambda t: t))
    assert sorted(s.strip() for s in all_of(data)) == sorted(TEXTS) and 0 < len(data["validation"]) < 15 and any(out)
    assert [split_of(n) for n in ("testament.txt", "latest.txt", "restrain.csv", "a/validity.txt")] == [None] * 4


@pytest.mark.parametrize("names", [["test"], ["validation"], ["validation", "test"]])
def test_a_set_without_a_training_part_is_split(names, tmp_path, monkeypatch):
    "Only a test part, locally or on the hub: it is split by hash, and no document is on both sides."
    each = len(TEXTS) // len(names)
    hub = DatasetDict({n: Dataset.from_dict({"text": TEXTS[i * each:(i + 1) * each]}) for i, n in enumerate(names)})
    monkeypatch.setattr(corpora, "from_hub", lambda name, streaming: hub)
    found = [corpus("owner/name")]
    if len(names) == 1: found.append(corpus(jsonl(tmp_path / "test.jsonl", TEXTS)))
    for data in found:
        train, held = (set(data[s]["text"]) for s in ("train", "validation"))
        assert train | held == set(TEXTS) and not train & held and held


# ---- letters

@pytest.mark.parametrize("ending", ["txt", "jsonl", "csv", "tsv", "json"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_mark_at_the_beginning_is_no_text(tmp_path, ending, packed):
    "A byte-order mark, as Windows writes it, in every kind of file, packed and not."
    rows = ["Übermut", "naïve", "日本"]
    body = {"txt": "\n".join(rows), "jsonl": "".join(json.dumps({"text": t}) + "\n" for t in rows), "csv": "text\n" + "\n".join(rows) + "\n",
            "tsv": "text\tn\n" + "".join(f"{t}\t1\n" for t in rows), "json": json.dumps([{"text": t} for t in rows])}[ending]
    path = tmp_path / (f"a.{ending}" + ".gz" * packed)
    data = codecs.BOM_UTF8 + body.encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    assert own(path, lines=ending == "txt")["train"]["text"][:] == rows


@pytest.mark.parametrize("encoding, says", [("utf-16", "is UTF-16: convert it, with iconv -f utf-16 -t utf-8"), ("utf-16-le", "UTF-16 without a mark"),
                                            ("utf-16-be", "UTF-16 without a mark"), ("latin1", "not UTF-8 .byte 0.")])
@pytest.mark.parametrize("ending", ["txt", "csv", "jsonl"])
def test_other_encodings_are_named(tmp_path, encoding, says, ending):
    "The advice is right: what it makes of the file opens."
    text = "Über Ähnliches"
    body = {"txt": text, "csv": f"text\n{text}\n", "jsonl": json.dumps({"text": text}, ensure_ascii=False) + "\n"}[ending]
    if encoding == "latin1": body = body.replace("text\n", "Über\n") if ending == "csv" else "Ü" + body
    path = tmp_path / f"a.{ending}"
    path.write_bytes(body.encode(encoding))
    with pytest.raises(ValueError, match=says) as e: own(path)
    assert "\n" not in str(e.value)
    path.write_text(path.read_bytes().decode(encoding), encoding="utf-8")
    if encoding != "latin1": assert text in own(path)["train"]["text"][0]


def test_a_damaged_archive_is_one_line(tmp_path):
    whole = gzip.compress(b"text " * 9999)
    for n, data in enumerate((whole[:-9], b"no gzip at all", whole[:40] + b"\0" * 20 + whole[60:])):
        path = tmp_path / f"{n}.txt.gz"; path.write_bytes(data)
        with pytest.raises(ValueError, match="cannot be unpacked: it is damaged") as e: own(path)
        assert "\n" not in str(e.value)


# ---- rows and columns

def test_cells_are_text(tmp_path):
    "NA, null, None, numbers, yes: a cell is its letters. Control: pandas, asked plainly, loses five of them."
    cells = ["NA", "null", "None", "nan", "", "1.50", "007", "True", "a,b", 'say "no"', "two\nlines", " space "]
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as f: csv.writer(f).writerows([["text"], *([c] for c in cells)])
    assert own(path)["train"]["text"][:] == [c for c in cells if c]
    assert pd.read_csv(path)["text"].isna().sum() == 5


def test_columns_by_path_and_by_name(tmp_path):
    "A dotted name is a path into the column, unless there is a column of that very name."
    path = jsonl(tmp_path / "a.jsonl", ["x"] * 5, doc={"text": "inside", "parts": ["zero", "one"]})
    assert own(path, "doc.text")["train"]["text"][:] == ["inside"] * 5 and own(path, "doc.parts.1")["train"]["text"][:] == ["one"] * 5
    assert own(jsonl(tmp_path / "b.jsonl", ["x"], **{"doc.text": "outside", "doc": {"text": "inside"}}), "doc.text")["train"]["text"][:] == ["outside"]
    pd.DataFrame({"doc": [{"text": t} for t in TEXTS]}).to_parquet(tmp_path / "c.parquet")
    assert own(tmp_path / "c.parquet", "doc.text")["train"]["text"][:] == TEXTS


COLUMNS = {"numbers": ([1, 2, 3], "holds numbers, not text"), "mixed": (["a", 2, "b"], "holds numbers, not text"), "lists": ([["a"], ["b"]], "holds lists, not text"),
           "objects": ([{"text": "a"}], "holds objects with text: name a part, such as COLUMN.text"), "yes or no": ([True], "yes or no"),
           "chats": ([[{"role": "user", "content": "hi"}]], "conversations: lmtrain.chat"), "sharegpt": ([[{"from": "human", "value": "hi"}]], "conversations"),
           "nothing": ([None, None], "has no text in 'c'"), "spaces": (["  ", "\n"], "has no text in 'c'")}


@pytest.mark.parametrize("source, name", [(s, n) for s in ("jsonl", "parquet", "hub") for n in COLUMNS if s == "jsonl" or n != "mixed"])
def test_columns_that_are_no_text(tmp_path, monkeypatch, source, name):
    "Each is one line that says what the column holds; a column of a table has one type, so only JSON has mixed ones."
    values, says = COLUMNS[name]
    path = tmp_path / f"a.{source}"
    if source == "jsonl": path.write_text("".join(json.dumps({"c": v}) + "\n" for v in values))
    elif source == "parquet": pd.DataFrame({"c": values}).to_parquet(path)
    else:
        monkeypatch.setattr(corpora, "from_hub", lambda name, streaming: DatasetDict({"train": Dataset.from_dict({"c": values})}))
        path = "owner/name"
    with pytest.raises(ValueError, match=says) as e: corpus(path, "c")
    assert "\n" not in str(e.value) and "Error" not in str(e.value)


def test_bytes_are_no_text(tmp_path):
    pd.DataFrame({"text": [b"abc"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="holds bytes, not text"): own(tmp_path / "a.parquet")


@pytest.mark.parametrize("name, data, says", [
    ("a.json", b"[1, 2]", "item 1 is no object"), ("a.jsonl", b'{"text": "a"}\n3\n', "line 2 is no object"), ("a.csv", b"text\na,b\n", "row 2 has more cells"),
    ("a.csv", b'text\n"a\n', "could not be read as csv"), ("a.parquet", b"PAR1 no", "could not be read as parquet"), ("a.json", b"[{", "could not be read as json")])
def test_files_that_cannot_be_read(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=says) as e: own(tmp_path / name)
    assert "\n" not in str(e.value) and name in str(e.value)


def test_lines_of_a_text_are_documents_if_said_so(tmp_path):
    "Line by line, whatever the line ends, and not at other signs that some call line ends; only text files have lines."
    odd = ["one\u2028still one", "two\x0bstill two", "three\x85"]
    (tmp_path / "a.txt").write_bytes("\r\n".join(odd + TEXTS).encode())
    assert own(tmp_path / "a.txt", lines=True)["train"]["text"][:] == odd + TEXTS
    assert sorted(all_of(corpus(tmp_path / "a.txt", lines=True))) == sorted(odd + TEXTS)
    with pytest.raises(ValueError, match="only a text file has lines"): own(jsonl(tmp_path / "b.jsonl", TEXTS), lines=True)


# ---- what most documents share

def test_a_template_is_no_duplication():
    """One form before 500 letters, one licence before 12 books: all are documents of their own. What two of them share
    beside it still joins them, and documents that are nearly all template, or the same, are one."""
    form = " ".join(f"formal{i}" for i in range(30))
    letters = [f"{form} letter {i} " + " ".join(f"w{i}x{k}" for k in range(30)) for i in range(500)]
    assert len({*near_duplicates(letters)}) == 500 and 10 < sum(held_out(letters)) < 100
    licence = " ".join(f"law{i}" for i in range(100))
    books = [licence + " " + " ".join(f"b{i}w{k}" for k in range(400)) for i in range(12)]
    assert len({*near_duplicates(books)}) == 12
    quote = " ".join(f"quoted{k}" for k in range(13))
    books[7] += " " + quote; books[3] += " " + quote
    assert near_duplicates(books)[7] == near_duplicates(books)[3] == 3
    assert len({*near_duplicates([letters[0]] * 9 + letters[1:5])}) == 5
    assert len({*near_duplicates([licence + f" {i}" for i in range(9)])}) == 1  # hardly anything of their own


# ---- any folder at all

NAMES = st.sampled_from(["a", "b[1]", "c*", "ü", "train", "test", "valid", "readme", "x y", "d.e"])
LETTERS = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0\r\ufeff"), min_size=1, max_size=40).filter(str.strip)


@settings(max_examples=120)
@given(st.lists(st.tuples(NAMES, st.lists(LETTERS, min_size=1, max_size=4)), min_size=1, max_size=5, unique_by=lambda f: f[0]),
       st.sampled_from(["txt", "jsonl", "json", "csv", "tsv", "parquet", "TXT", "jsonl.gz", "csv.gz"]), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin1"]),
       st.booleans(), st.sampled_from(["text", "doc.text"]))
def test_any_folder_comes_out_as_it_went_in(tmp_path_factory, files, ending, encoding, deep, column):
    "Names, kinds, encodings, folders and columns at random: the same texts come out, in order, or one line says why not."
    folder, want = tmp_path_factory.mktemp("any"), {}
    for name, texts in files:
        path = folder / ("sub" if deep else "") / f"{name}.{ending}"
        path.parent.mkdir(exist_ok=True)
        plain = ending.split(".")[0].lower()
        rows = [{"text": t} if column == "text" else {"doc": {"text": t}} for t in texts]
        if plain == "parquet": pd.DataFrame(rows).to_parquet(path)
        else:
            if plain == "txt": body, texts = texts[0], texts[:1]
            elif plain == "jsonl": body = "".join(json.dumps(r) + "\n" for r in rows)
            elif plain == "json": body = json.dumps(rows)
            else:
                import io
                out = io.StringIO(newline=""); w = csv.writer(out, delimiter="\t" if plain == "tsv" else ",")
                w.writerows([[column], *([t] for t in texts)]); body = out.getvalue()
            try: data = body.encode(encoding)
            except UnicodeEncodeError: return
            path.write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
        want[path] = texts
    try: data = own(folder, column)
    except ValueError as e:
        assert "\n" not in str(e) and str(folder) in str(e)
        assert encoding in ("utf-16", "latin1") and ending != "parquet", e
        return
    names = {n for n in want if not n.name.lower().startswith("readme")} or {*want}
    found = [t for split in data.values() for t in split["text"][:]]
    kept = [t for p in sorted(names) for t in want[p]]
    if ending.lower() == "txt" and len(kept) != len(found) or any(len(s) == 1 for s in data.values()):  # a lone text is cut into passages
        strip = lambda ts: sorted("".join("".join(ts).split()))
        assert strip(found) == strip(kept)
    else: assert sorted(found) == sorted(kept) and kind_of(next(iter(want))) is not None
    assert np.all([len(t) for t in found])


def test_large_files_are_not_held(tmp_path, monkeypatch):
    "Above the limit the documents lie on disk, the same as in memory; a changed file is read anew; a fault in the middle is the same one line."
    from lmtrain import files as module
    monkeypatch.setenv("LMTRAIN_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.jsonl"
    def write(n): path.write_text("".join(json.dumps({"text": f"number {i} of {n}", "title": f"t{i}"}) + "\n" for i in range(n)), encoding="utf-8")
    write(50)
    want = own(path)["train"]
    assert not want.cache_files
    monkeypatch.setattr(module, "LARGE", 0)
    got = own(path)["train"]
    assert got.cache_files and str(tmp_path / "cache") in got.cache_files[0]["filename"] and got["text"][:] == want["text"][:] and got["title"][:] == want["title"][:]
    write(51)
    assert len(own(path)["train"]) == 51
    path.write_text(path.read_text() + "{\n", encoding="utf-8")
    with pytest.raises(ValueError, match="a.jsonl could not be read as json") as e: own(path)
    assert "\n" not in str(e.value)
