"""Text that is tokenised once: the same rows as document by document, found again, written by one, and whole or not there."""
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmtrain import text as module
from lmtrain.text import Rows, cut, cuts, encode, examples, train_bpe

WORDS = "the sea was calm and the sailors sang of old ships".split()


def texts(n: int, size: int = 2000) -> list[str]:
    dice = np.random.default_rng(0)
    return [" ".join(dice.choice(WORDS, size)) + f" day {i}" for i in range(n)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LMTRAIN_CACHE", str(tmp_path)); monkeypatch.setattr(module, "SMALL", 10_000)
    return tmp_path / "tokens"


@pytest.fixture(scope="module")
def small_tok(): return train_bpe(texts(2), 300)


def by_hand(some, tok, T, overlap):
    "Tokens, cuts, sizes and documents, one document after another."
    tokens, rows, sizes, docs, at = [], [], [], [], 0
    for n, (t, ids) in enumerate(encode(some, tok)):
        own = cut(len(ids), T, overlap)
        tokens += ids; rows += [(at + a, at + z, s) for a, z, s in own]; docs += [n] * len(own)
        sizes += [len(t.encode()) * (z - a - s) / (len(ids) - 1) for a, z, s in own]
        at += len(ids)
    return tokens, rows, sizes, docs


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(2, 20), st.data())
def test_cuts_are_cut(lengths, T, data):
    "All documents at once are cut as each alone."
    overlap = data.draw(st.integers(1, T - 1))
    ends = np.cumsum(lengths)
    rows, docs = cuts(ends, T, overlap)
    want = [(e - n + a, e - n + z, s) for e, n in zip(ends, lengths, strict=True) for a, z, s in cut(n, T, overlap)]
    assert rows.tolist() == [list(w) for w in want] and docs.tolist() == [d for d, n in enumerate(lengths) for _ in cut(n, T, overlap)]


@pytest.mark.parametrize("T, overlap", [(16, 1), (64, 7), (5000, 1)])
def test_rows_are_those_of_each_document(cache, small_tok, T, overlap):
    "In memory, in the cache, from a list, a generator, and opened again: tokens, cuts, sizes and documents to the bit."
    some = [*texts(7), "short", "naïve Ω"]
    want = by_hand(some, small_tok, T, overlap)
    small = examples(some[-2:], small_tok, T, overlap)
    assert not isinstance(small.tokens, np.memmap) and not cache.exists()
    for rows in (examples(some, small_tok, T, overlap), examples(iter(some), small_tok, T, overlap), examples(tuple(some), small_tok, T, overlap)):
        assert isinstance(rows.tokens, np.memmap) and len([p for p in cache.iterdir() if p.is_dir()]) == 1
        for got, w in zip((rows.tokens, rows.cuts, rows.sizes, rows.docs), want, strict=True): assert np.array_equal(got, np.array(w))
        assert rows.nbytes == sum(len(t.encode()) for t in some) and rows.lossy == ""
    again = pickle.loads(pickle.dumps(rows))
    assert len(pickle.dumps(rows)) < 2000 and again[3] == rows[3] and isinstance(again.tokens, np.memmap)
    assert len(pickle.dumps(rows.only(np.arange(3)))) < 5000


def test_found_again(cache, small_tok, monkeypatch):
    "A second time nothing is encoded; another text, tokenizer or order, the controls, is; another T makes new rows of the same tokens."
    some, calls = texts(7), []
    real = module.encode
    monkeypatch.setattr(module, "encode", lambda *a, **k: calls.append(1) or real(*a, **k))
    examples(some, small_tok, 64); examples(list(some), small_tok, 64); examples(some, small_tok, 32)
    assert len(calls) == 1
    other = train_bpe(texts(2), 290)
    for args in ((some[::-1], small_tok), (some[:-1] + [some[-1] + "!"], small_tok), (some, other), ([some[0] + some[1], *some[2:]], small_tok)): examples(*args, 64)
    assert len(calls) == 5


def started(folder, some, tok, out):
    module.SMALL = 10_000
    os.environ["LMTRAIN_CACHE"] = str(folder)
    real = module.encode
    def counted(*args, **kwargs): out.put("encoded"); time.sleep(.3); return real(*args, **kwargs)
    module.encode = counted
    out.put(int(examples(some, tok, 64).tokens.sum()))


def test_four_at_once_tokenise_once(tmp_path, small_tok):
    "Four processes that start together: one encodes, all have the same tokens."
    context = multiprocessing.get_context("fork")
    out, some = context.Queue(), texts(7)
    four = [context.Process(target=started, args=(tmp_path, some, small_tok, out)) for _ in range(4)]
    for p in four: p.start()
    got = [out.get(timeout=60) for _ in range(5)]
    for p in four: p.join(30)
    assert got.count("encoded") == 1 and len({g for g in got if g != "encoded"}) == 1 and out.empty()


KILLED = """
import os, sys
from lmtrain import text as module
module.SMALL = 100
real = module.encode
def slow(*args, **kwargs):
    for n, pair in enumerate(real(*args, **kwargs)):
        if n == 3: print("half", flush=True); import time; time.sleep(60)
        yield pair
module.encode = slow
from lmtrain import train_bpe
module.examples([f"the sea was calm on day {i} " * 20 for i in range(200)], train_bpe(["the sea"], 270), 64)
"""


def test_a_writer_that_is_killed(tmp_path, monkeypatch):
    "`kill -9` half-way: no folder with the text's name, the lock is free, and the next one writes all of it."
    p = subprocess.Popen([sys.executable, "-c", KILLED], env={**os.environ, "LMTRAIN_CACHE": str(tmp_path)}, stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == "half\n"
    p.send_signal(signal.SIGKILL); p.wait()
    left = [q for q in (tmp_path / "tokens").iterdir() if q.is_dir()]
    assert len(left) == 1 and left[0].name.startswith(".making-")
    monkeypatch.setenv("LMTRAIN_CACHE", str(tmp_path)); monkeypatch.setattr(module, "SMALL", 100)
    rows = examples([f"the sea was calm on day {i} " * 20 for i in range(200)], train_bpe(["the sea"], 270), 64)
    assert rows.docs.max() == 199 and not [*(tmp_path / "tokens").glob(".making-*")]


def test_what_another_left_is_swept(cache, small_tok):
    "A writer of one text removes what a killed writer of another left, and leaves alone what is being written (the control)."
    from filelock import FileLock
    for name in ("dead", "alive"): (cache / f".making-{name}").mkdir(parents=True); (cache / f".making-{name}" / "tokens").write_bytes(b"half")
    with FileLock(cache / "alive.lock"): examples(texts(7), small_tok, 64)
    assert {p.name for p in cache.glob(".making-*")} == {".making-alive"}


def test_a_writer_that_breaks_leaves_nothing(cache, small_tok, monkeypatch):
    "An error while encoding: nothing is left, and it is the error that arrives."
    def breaks(*_, **__): raise OSError("no space left")
    monkeypatch.setattr(module, "encode", breaks)
    with pytest.raises(OSError, match="no space"): examples(texts(7), small_tok, 64)
    assert not [p for p in cache.iterdir() if p.is_dir()]
    with pytest.raises(ValueError, match="no text"): monkeypatch.undo() or examples([], small_tok, 64)
    with pytest.raises(ValueError, match="no text"): examples(iter([]), small_tok, 64)


def test_large_texts_are_not_held(cache, small_tok, monkeypatch):
    "Rows of a text in the cache hold a few bytes each in memory, not the tokens: lengths, and nothing else that grows."
    rows = examples(texts(40, 4000), small_tok, 32)
    private = sum(v.nbytes for v in vars(rows).values() if isinstance(v, np.ndarray) and v.base is None and not isinstance(v, np.memmap))
    assert private <= 4 * len(rows) + 2000 and isinstance(rows, Rows)
