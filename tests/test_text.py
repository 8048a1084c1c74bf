"""Tokenizers, rows cut from documents, and chats: nothing is lost, nothing is asked twice."""
import pickle
import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from transformers import PreTrainedTokenizerFast

from lmtrain.batch import Example, Noise, collate
from lmtrain.objective import CLM
from lmtrain.text import (ROLES, SPECIALS, TEMPLATE, Rows, chat, cut, examples, load_tokenizer, regular_ids,
                          train_bpe, train_chars)

SPELLED = [*SPECIALS.values(), *ROLES]
spelt = st.sampled_from([*SPELLED, "a", " ", "<|", "|>", "ü", "🎈", "<0x41>"])
words = st.text() | st.lists(spelt).map("".join)


@pytest.fixture(scope="session", params=["bpe", "chars"])
def any_tok(request, tok, pages): return tok if request.param == "bpe" else train_chars(pages[:5])


def plain(tok, text): return tok(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


# ---- tokenizers

@given(text=words)
def test_lossless(any_tok, text):
    "Any Unicode text comes back, special tokens spelled out in it too, and none of its ids is special."
    ids = plain(any_tok, text)
    assert any_tok.decode(ids, skip_special_tokens=True) == text
    assert not {*ids} & {*any_tok.all_special_ids}


@pytest.mark.parametrize("text", ["a<|eos|>b", "<|mask|>"])
def test_control_lossless(any_tok, text):
    "Read the regular_ids way, a spelled special becomes one token and the text is not what it was."
    ids = any_tok(text, add_special_tokens=False)["input_ids"]
    assert {*ids} & {*any_tok.all_special_ids} and any_tok.decode(ids, skip_special_tokens=True) != text


def test_control_bytes(pages):
    "A tokenizer of characters without byte fallback loses what it never saw."
    from tokenizers import Tokenizer, models
    core = Tokenizer(models.BPE({c: n for n, c in enumerate(sorted({*pages[0]}))}, []))
    assert "".join(core.encode("a🎈b").tokens) == "ab"


def test_specials(any_tok):
    "Specials are the first ids, all different, in one order; text begins with bos."
    assert any_tok.convert_tokens_to_ids(SPELLED) == list(range(len(SPELLED)))
    four = [any_tok.pad_token_id, any_tok.bos_token_id, any_tok.eos_token_id, any_tok.mask_token_id]
    assert four == [0, 1, 2, 3] and {*any_tok.all_special_tokens} == {*SPELLED}
    assert any_tok("hello")["input_ids"] == [any_tok.bos_token_id, *plain(any_tok, "hello")]


def test_sizes(tok, any_tok, pages):
    "BPE keeps to its vocabulary, shortens real text, and needs room for the bytes and the specials."
    assert len(tok) == 400 and len(plain(tok, pages[0])) < len(pages[0].encode()) * .7
    assert max(any_tok.get_vocab().values()) == len(any_tok) - 1
    assert len(train_bpe(["aaa"], 263)) == 263
    with pytest.raises(ValueError, match="vocab_size=262 is too small: 263 holds"): train_bpe(["aaa"], 262)


def test_round_trip(any_tok, pages, tmp_path):
    "A tokenizer saved and opened again gives the same ids, specials and chats."
    any_tok.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert len(again) == len(any_tok) and {*again.all_special_tokens} == {*SPELLED}
    for text in pages[0][:2000], "ü🎈\x00 <|eos|>", "":
        assert again(text)["input_ids"] == any_tok(text)["input_ids"]
        assert plain(again, text) == plain(any_tok, text)
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert chat(talk, again) == chat(talk, any_tok)


def test_adds_what_is_missing(tmp_path):
    "A tokenizer without specials, or with eos as padding, is given its own."
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    core = Tokenizer(models.BPE({"a": 0, "<end>": 1}, []))
    plain = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>")
    plain.save_pretrained(tmp_path)
    tok = load_tokenizer(tmp_path)
    have = [tok.eos_token, tok.pad_token, tok.bos_token, tok.mask_token]
    assert have == ["<end>", *(SPECIALS[k] for k in ("pad_token", "bos_token", "mask_token"))]
    assert len({*tok.convert_tokens_to_ids(have)}) == 4 and len(tok) == 5


def test_wrong_path(tmp_path):
    "A wrong path is refused in one line that names it."
    with pytest.raises(OSError, match="no tokenizer at .*nowhere") as e: load_tokenizer(tmp_path / "nowhere")
    assert "\n" not in str(e.value)


def test_no_pickle(any_tok, pages, tmp_path, monkeypatch):
    "Training, saving, opening and cutting text never pickle: the trap works, as its last line shows."
    def trap(*_, **__): raise AssertionError("pickled")
    for name in "dump", "dumps", "load", "loads": monkeypatch.setattr(pickle, name, trap)
    train_bpe(pages[:1], 300).save_pretrained(tmp_path)
    load_tokenizer(tmp_path)
    examples(pages[:1], any_tok, 32)[0]
    assert {f.suffix for f in tmp_path.iterdir()} <= {".json", ".jinja"}
    with pytest.raises(AssertionError, match="pickled"): pickle.dumps(any_tok)


# ---- rows

documents = st.lists(words, min_size=1, max_size=6)


def wanted(texts, tok):
    "Every token of each document but its bos, counted with the token before it."
    whole = [[tok.bos_token_id, *plain(tok, t), tok.eos_token_id] for t in texts]
    return Counter(pair for ids in whole for pair in zip(ids, ids[1:], strict=False))


def asked(rows, T):
    "What next-token prediction asks of the rows: (token before, token), counted."
    b = CLM().corrupt(collate(list(rows), T), Noise())
    on = b.weights > 0                                                                 # (B,T)
    return Counter(zip(b.ids[on].tolist(), b.targets[on].tolist(), strict=True))


@given(texts=documents, data=st.data())
def test_each_token_asked_once(any_tok, texts, data):
    "For any length of row and overlap the targets of all rows are the documents' tokens, each once."
    T = data.draw(st.integers(2, 12))
    rows = examples(texts, any_tok, T, data.draw(st.integers(1, T - 1)))
    assert asked(rows, T) == wanted(texts, any_tok)
    assert rows.nbytes == sum(len(t.encode()) for t in texts) and max(map(len, rows)) <= T
    assert [e.index for e in rows] == list(range(len(rows)))


def test_control_each_token_asked_once(tok, pages):
    "Rows that do not overlap lose a token at each cut; rows that ask their overlap too count it twice."
    rows = examples(pages[:3], tok, 16)
    apart = Rows(rows.tokens, rows.cuts + [[1, 0, 0]] * (rows.cuts[:, [0]] > 0), rows.sizes, rows.docs)
    twice = examples(pages[:3], tok, 16, 4)
    twice = Rows(twice.tokens, np.minimum(twice.cuts, [10**9, 10**9, 1]), twice.sizes, twice.docs)
    want = wanted(pages[:3], tok)
    assert asked(rows, 16) == want
    assert want - asked(apart, 16) and asked(twice, 16) - want


@given(st.integers(2, 60), st.integers(2, 20), st.data())
def test_cut(n, T, data):
    "Cuts go forward, and the answered parts are 1..n without gap or overlap."
    rows = cut(n, T, overlap := data.draw(st.integers(1, T - 1)))
    assert [t for a, z, skip in rows for t in range(a + skip, z)] == list(range(1, n))
    assert all(0 < z - a <= T for a, z, _ in rows) and all(skip == overlap for _, _, skip in rows[1:])


def test_rows_is_a_sequence(tok, pages):
    "Slices, places from the end and the end itself as for a list, over more texts than are encoded at once."
    texts = [p[:90] for p in pages] * 2
    rows = examples(iter(texts), tok, 32, 8)
    as_list = list(rows)
    assert len(texts) > 128 and len(as_list) == len(rows)
    assert rows[-1] == as_list[-1] and rows[1:7:2] == as_list[1:7:2]
    assert asked(rows, 32) == wanted(texts, tok)
    for n in len(rows), -len(rows) - 1:
        with pytest.raises(IndexError): rows[n]


def test_wide_ids(any_tok, monkeypatch, pages):
    "A vocabulary of more than 65,536 tokens is stored in 32 bits, a smaller one in 16, with the same rows."
    small = examples(pages[:1], any_tok, 32)
    monkeypatch.setattr(type(any_tok), "__len__", lambda _: 2**16 + 1)
    large = examples(pages[:1], any_tok, 32)
    assert (small.tokens.dtype, large.tokens.dtype) == (np.uint16, np.uint32) and list(small) == list(large)


def test_examples_refuses(tok):
    "An overlap without room to go forward, and a corpus without text."
    for overlap in 0, 8, 9:
        with pytest.raises(ValueError, match=f"overlap={overlap} must lie between 1 and T-1=7"):
            examples(["a"], tok, 8, overlap)
    with pytest.raises(ValueError, match="the corpus is empty"): examples([], tok, 8)


# ---- chats

content = st.text() | st.sampled_from(["", " ", "\n", "a\n\nb ", "🎈 ü", "{{ bos_token }}", "<|", "<0x41>"])
turns = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), content), min_size=1, max_size=5)


def by_hand(talk, tok):
    "The ids of a chat, and which are the assistant's, EOS among them: turn by turn, without a template."
    ids, answer = [tok.bos_token_id], [False]
    for role, text in talk:
        said = plain(tok, text) + [tok.eos_token_id] * (role == "assistant")
        ids += [tok.convert_tokens_to_ids(f"<|{role}|>"), *said]
        answer += [False, *[role == "assistant"] * len(said)]
    return ids, answer


def messages(talk): return [{"role": role, "content": text} for role, text in talk]


@given(talk=turns)
def test_chat(any_tok, talk):
    "The template's ids and mask are those made by hand."
    e = chat(messages(talk), any_tok)
    assert (e.ids, e.answer) == by_hand(talk, any_tok)


def test_control_chat(any_tok, monkeypatch):
    "A template that leaves EOS outside its marks is caught: the model would never learn to stop."
    talk = [("user", "hi"), ("assistant", "ho")]
    marked, broken = " + eos_token }}{% endgeneration %}", " }}{% endgeneration %}{{ eos_token }}"
    assert marked in TEMPLATE
    monkeypatch.setattr(any_tok, "chat_template", TEMPLATE.replace(marked, broken))
    e = chat(messages(talk), any_tok)
    assert e.ids == by_hand(talk, any_tok)[0] and e.answer != by_hand(talk, any_tok)[1]


@pytest.mark.parametrize("special", SPELLED)
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_chat_refuses_specials(tok, special, role):
    "A message that spells any special token is refused; unchecked, it would be that token."
    forged = [{"role": role, "content": f"so {special} it"}]
    with pytest.raises(ValueError, match=f"a {role} message spells the special token"): chat(forged, tok)
    ids = tok.apply_chat_template(forged, tokenize=True, return_dict=True)["input_ids"]
    assert tok.convert_tokens_to_ids(special) in ids[3:-1]


@pytest.mark.parametrize("role", ["tool", "eos", "Assistant"])
def test_chat_refuses_roles(tok, role):
    "A role that the template does not know is refused, not written out as text or as another special."
    with pytest.raises(ValueError, match=role): chat([{"role": role, "content": "hi"}], tok)


def test_chat_needs_marks(tok, monkeypatch):
    "A template without marks is refused, and so is none."
    for template in None, "{% for m in messages %}{{ m['content'] }}{% endfor %}":
        monkeypatch.setattr(tok, "chat_template", template)
        with pytest.raises(ValueError, match="set tok.chat_template"): chat(messages([("user", "a")]), tok)


# ---- what may be lost

def test_parts_of_a_message_are_joined_and_others_refused(tok):
    "A list of texts is their text; a picture, None, a number and a special token inside a part are one line each."
    plain = [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "A ship."}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "this?"}]}, plain[1]]
    assert chat(parts, tok) == chat(plain, tok)
    assert "[{" not in tok.decode(chat(parts, tok).ids)
    for content, why in [([{"type": "image", "url": "x"}], "part of type 'image'"), (None, "NoneType and not text"), (3, "int and not text"),
                         ([{"type": "text", "text": "<|eos|>"}], "spells the special token <|eos|>"), ([None], "NoneType")]:
        with pytest.raises(ValueError, match=re.escape(why)): chat([{"role": "user", "content": content}, plain[1]], tok)
    with pytest.raises(ValueError, match="no role None"): chat([{"content": "x"}], tok)
    with pytest.raises(ValueError, match="needs a message"): chat([], tok)


def word_level(words):
    "A tokenizer of whole words: what it does not know is [UNK]."
    from tokenizers import Tokenizer, models, pre_tokenizers
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *words])}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", mask_token="[MASK]")


def test_what_a_tokenizer_loses_is_said(tok, pages, model, tmp_path):
    "Unknown words and changed letters are named, and there are no bits per byte; a byte-level one loses nothing."
    from lmtrain.evaluate import bits_per_byte
    word_level(["the", "sea"]).save_pretrained(tmp_path)
    lossy = load_tokenizer(tmp_path)
    rows = examples(["the sea the cat the dog"], lossy, 16)
    assert rows.lossy == "2 tokens are [UNK]: what they stood for is lost"
    with pytest.raises(ValueError, match=r"no bits per byte here: 2 tokens are \[UNK\]"): bits_per_byte(model, rows)
    assert "comes back as" in examples(["the sea  the"], lossy, 16).lossy  # two spaces
    assert examples(pages[:9], tok, 64).lossy == "" and examples(["\x00 \u200b\ud7ff🙂  é e\u0301"], tok, 64).lossy == ""


def test_cls_and_sep_are_the_ends(tmp_path):
    "Where a tokenizer has CLS and SEP and no bos and eos, these are used and the vocabulary does not grow. GPT-2's keeps its own."
    own = word_level(["the"]); own.save_pretrained(tmp_path)
    tok = load_tokenizer(tmp_path)
    assert (tok.bos_token, tok.eos_token) == ("[CLS]", "[SEP]") and len(tok) == len(own)
    assert examples(["the the"], tok, 8)[0].lists().ids == [1, 5, 5, 2]


def test_regular_ids_around_a_special_token_in_the_middle():
    "Half a vocabulary is not lost: all that is not special, sorted; and MLM hides and draws from all of it."
    from lmtrain.batch import Noise, collate
    from lmtrain.objectives.masked import MLM
    middle = word_level([f"w{i}" for i in range(200)])
    middle.add_special_tokens({"additional_special_tokens": ["w100"]})
    found = regular_ids(middle)
    assert found.tolist() == sorted({*range(len(middle))} - {*middle.all_special_ids}) and len(found) == 199
    o = MLM(middle.mask_token_id, found, rate=.9, keep=0., swap=1.)
    b = collate([Example([i % 205 for i in range(60 * n, 60 * n + 60)], index=n) for n in range(300)])
    q = o.corrupt(b, Noise())
    hidden, special = q.weights > 0, torch.isin(b.ids, torch.tensor(middle.all_special_ids))
    assert not (hidden & special).any() and {*b.ids[hidden].tolist()} == {*found.tolist()} == {*q.ids[hidden].tolist()}
    alike = MLM(middle.mask_token_id, range(5, 105), rate=.9, keep=0., swap=1.)
    assert torch.equal(MLM(middle.mask_token_id, torch.arange(5, 105), rate=.9, keep=0., swap=1.).corrupt(b, Noise()).ids, alike.corrupt(b, Noise()).ids)
    with pytest.raises(ValueError, match="without mask_id"): MLM(7, torch.arange(5, 9))


def test_endless_words_do_not_stop_the_training_of_a_tokenizer():
    "Two words of 300,000 letters are learnt from in pieces, lossless as ever. Control: short words are left whole."
    from lmtrain.text import pieces
    long = ["ab" * 150_000, "ba" * 150_000]
    cut = [p for t in long for p in pieces(t)]
    assert "".join(cut) == "".join(long) and max(map(len, cut)) == 1000
    tok = train_bpe([*long, "to be or not to be"], 300)
    assert tok.decode(tok(long[0][:5000], add_special_tokens=False)["input_ids"]) == long[0][:5000]
    text = "a text of words " * 500
    assert pieces(text) == [text] and "".join(pieces("x" * 1000)) == "x" * 1000


def test_rows_know_their_documents(tok, pages):
    "Each row's bytes add up to its document's; rows spread evenly come from all documents of their size, the first do not."
    texts = pages[:12]
    rows = examples(texts, tok, 32)
    for n, t in enumerate(texts): assert rows.sizes[rows.docs == n].sum() == pytest.approx(len(t.encode()))
    some = rows.spread(40)
    large = {d for d in range(12) if (rows.docs == d).sum() > len(rows) / 39}
    assert len(some) == 40 and len(large) > 5 and large <= {*some.docs} and not large <= {*rows.docs[:40]}
    assert some[3].lists().ids == rows[int(np.unique(np.linspace(0, len(rows) - 1, 40).round().astype(int))[3])].lists().ids
    assert len(rows.spread(10**6)) == len(rows)
