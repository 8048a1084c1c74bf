"""The transformer against transformers, its directory against crashes, and its attention against `sees`."""
import errno
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import lmtrain.model
from lmtrain.batch import Example, Noise, collate
from lmtrain.model import attend, LM, Size, Transformer, load, moved, rotate, rotations, save, to_transformers
from lmtrain.objective import PrefixLM

SIZES = {
    "heads": Size(60, dim=32, heads=4, layers=2),
    "grouped": Size(60, dim=32, heads=4, kv_heads=2, layers=3, hidden=40),
    "one kv head": Size(60, dim=48, heads=4, kv_heads=1, layers=2, theta=1e6, length=32),
}


def lively(size):
    "A model whose weights, gains too, are far from where they begin, so that every one of them matters."
    model = Transformer(size).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * (.1 if p.ndim > 1 else .5))
    return model


def rows(B, T, vocab=60): return collate([Example(r) for r in torch.randint(vocab, (B, T)).tolist()])


def logits(model, b): return model.head(model(b))


def close(have, want): torch.testing.assert_close(have, want, atol=1e-5, rtol=0)


# ---- transformers

@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_logits(size):
    "Equal to Qwen3ForCausalLM on the same weights, with grouped heads and longer rows than `length` too."
    model, b = lively(size), rows(3, 40)
    with torch.no_grad(): close(logits(model, b), to_transformers(model)(b.ids).logits)


def test_logits_with_mask():
    "Equal under every pattern below, given to transformers as an additive mask and positions."
    model = lively(SIZES["grouped"])
    net = to_transformers(model)
    net.set_attn_implementation("eager")
    for b in PATTERNS.values():
        mask = torch.where(b.sees, 0., torch.finfo(torch.float).min)[:, None]          # (B,1,T,T)
        with torch.no_grad():
            want = net(b.ids, attention_mask=mask, position_ids=b.pos, use_cache=False).logits
            real = b.doc > 0                                                           # (B,T)
            close(logits(model, b)[real], want[real])


@pytest.mark.parametrize("broken", ["q_norm", "k_norm", "input_layernorm", "up_proj"])
def test_control_logits(broken):
    "One kind of weight a hundredth larger is far outside 1e-5."
    model, b = lively(SIZES["grouped"]), rows(2, 20)
    net = to_transformers(model)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if broken in name: p.mul_(1.01)
        assert (logits(model, b) - net(b.ids).logits).abs().max() > 1e-3


def test_rotation():
    "A score depends on the distance of its positions, and on it only; a wrong base would be noticed."
    q, k = torch.randn(1, 1, 1, 16).double(), torch.randn(1, 1, 1, 16).double()
    def score(i, j, theta=1e4):
        cos, sin = (r.double() for r in rotations(torch.tensor([[i, j]]), 16, theta))
        return (rotate(q, cos[:, :, :1], sin[:, :, :1]) * rotate(k, cos[:, :, 1:], sin[:, :, 1:])).sum()
    assert abs(score(3, 1) - score(12, 10)) < 1e-6 < abs(score(3, 1) - score(3, 2))
    assert abs(score(5, 5) - (q * k).sum()) < 1e-6 < abs(score(3, 1) - score(3, 1, 5e3))


@pytest.mark.parametrize("wrong", [{"dim": 30}, {"dim": 36, "heads": 12}, {"heads": 4, "kv_heads": 3}])
def test_sizes_refused(wrong):
    "Sizes that do not fit one another raise, and name themselves."
    with pytest.raises(ValueError, match="heads="): Size(60, **wrong)


def test_head_is_the_embedding(model):
    "One matrix reads and writes, and is counted once."
    assert model.head.weight is model.embed_tokens.weight
    assert sum(p is model.head.weight for p in model.parameters()) == 1


def test_lm_has_no_forward():
    "An LM without a forward says what it should map."
    with pytest.raises(TypeError, match="LM maps a Batch to hidden states"): LM()(rows(1, 2))


def test_no_rows(model):
    "A batch of no rows gives hidden states of no rows, with a gradient: a rank without data can take part."
    h = model(rows(2, 5)[:0])                                                          # (0,T,D)
    assert h.shape == (0, 5, 32) and h.requires_grad


# ---- save and load

def test_round_trip(model, tok, tmp_path):
    "Saved and opened again every weight is bit-equal, and so are the tokenizer's ids."
    again, tok2 = load(save(model, tok, tmp_path / "m"))
    assert again.size == replace(model.size, kv_heads=2, hidden=model.size.ff) and not again.training
    assert {*again.state_dict()} == {*model.state_dict()}
    assert all(torch.equal(p, again.state_dict()[n]) for n, p in model.state_dict().items())
    assert tok2("A text.")["input_ids"] == tok("A text.")["input_ids"]
    assert again.head.weight is again.embed_tokens.weight


def test_opens_in_transformers(model, tok, tmp_path):
    "AutoModelForCausalLM and AutoTokenizer open it; logits agree to 1e-5, and special tokens are known."
    path, b = save(model, tok, tmp_path / "m"), rows(2, 30)
    net, tok2 = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    with torch.no_grad(): close(net(b.ids).logits, logits(model, b))
    for config in net.config, net.generation_config:
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    assert tok2("A text.")["input_ids"] == tok("A text.")["input_ids"]
    assert tok2.chat_template == tok.chat_template


QWEN = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}


@pytest.mark.parametrize("more", [
    {}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.}}, {"rms_norm_eps": 1e-2},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.}},
    {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}, {"hidden_act": "gelu"}, {"head_dim": 24},
], ids=str)
def test_foreign_qwen(more, tok, tmp_path):
    "A tied Qwen3 directory made elsewhere gives the same logits, or is refused: never others in silence."
    net = Qwen3ForCausalLM(Qwen3Config(**{**QWEN, **more})).eval()
    net.save_pretrained(tmp_path); tok.save_pretrained(tmp_path)
    try: model, _ = load(tmp_path)
    except ValueError: assert more and "head_dim" not in more, "such a Qwen3 must open"; return
    b = rows(2, 20)
    with torch.no_grad(): close(logits(model, b), net(b.ids).logits)


def test_load_refuses(tmp_path):
    "Another shape, another architecture and an empty directory are refused by name."
    with pytest.raises(OSError, match="no model at .*it has no config.json"): load(tmp_path)
    Qwen3Config(**{**QWEN, "tie_word_embeddings": False}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a head of its own"): load(tmp_path)
    from transformers import GPT2Config
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gpt2"): load(tmp_path)


def files(path): return {f.name: f.read_bytes() for f in path.iterdir()}


def fault(*_, **__): raise OSError(errno.ENOSPC, "no space left on device")


def test_interrupted_save(model, tok, tmp_path, monkeypatch):
    "A disk that fills up during a save leaves the old directory, byte for byte, and nothing beside it."
    path = save(model, tok, tmp_path / "m")
    before = files(path)
    monkeypatch.setattr(lmtrain.model, "save_file", fault)
    with pytest.raises(OSError, match="no space"): save(lively(model.size), tok, path)
    assert files(path) == before and [*tmp_path.iterdir()] == [path]
    with pytest.raises(OSError, match="no space"): save(model, tok, tmp_path / "new")
    assert [*tmp_path.iterdir()] == [path]
    assert load(path)


def test_control_interrupted_save(model, tok, tmp_path):
    "A save that writes in place leaves half a directory at the same fault: what the test above would see."
    path = save(model, tok, tmp_path / "m")
    before = files(path)
    with pytest.raises(OSError, match="no space"):
        to_transformers(lively(Size(60))).config.save_pretrained(path); fault()
    assert files(path) != before


@pytest.mark.parametrize("n", [1, 2])
def test_interrupted_rename(n, model, tok, tmp_path, monkeypatch):
    "A failure at either rename, too, leaves the old directory where it was."
    path, calls, rename = save(model, tok, tmp_path / "m"), [], os.replace
    before = files(path)
    def fails(*names):
        calls.append(names)
        return fault() if len(calls) == n else rename(*names)
    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no space"): save(lively(model.size), tok, path)
    assert path.exists() and files(path) == before and [*tmp_path.iterdir()] == [path]


def test_save_replaces(model, tok, tmp_path):
    "A second save replaces the whole directory: nothing of the first is left in it or beside it."
    path = save(model, tok, tmp_path / "deep" / "m")
    (path / "note.txt").write_text("old")
    new = lively(model.size)
    save(new, tok, path)
    assert not (path / "note.txt").exists() and [*path.parent.iterdir()] == [path]
    assert torch.equal(load(path)[0].embed_tokens.weight, new.embed_tokens.weight)


def test_saved_mode(model, tok, tmp_path):
    "A saved directory is as open to others as any that is made here: not for its maker's eyes only."
    (tmp_path / "plain").mkdir()
    path = save(model, tok, tmp_path / "m")
    assert oct(path.stat().st_mode) == oct((tmp_path / "plain").stat().st_mode)


def test_saved_tensors(model, tok, tmp_path):
    "The file holds each weight once, the shared matrix under one name, and no optimizer or pickle."
    path = save(model, tok, tmp_path / "m")
    saved = load_file(path / "model.safetensors")
    assert sum(v.numel() for v in saved.values()) == sum(p.numel() for p in model.parameters())
    assert {f.suffix for f in path.iterdir()} == {".json", ".jinja", ".safetensors"}


def test_damaged_weights(model, tok, tmp_path):
    "A weight missing from the file is an error, not a random weight."
    path = save(model, tok, tmp_path / "m")
    saved = load_file(path / "model.safetensors")
    del saved["model.layers.1.mlp.up_proj.weight"]
    save_file(saved, path / "model.safetensors")
    with pytest.raises(RuntimeError, match="up_proj"): load(path)


# ---- what each token sees

TURNS = [False] * 3 + [True] * 2 + [False] * 2 + [True] * 2  # two questions, two answers


def one(n=9, **options): return collate([Example(list(range(1, n + 1)), **options)])


def left(b, n):
    "The batch with its last n tokens moved, as padding, to the front."
    return b.each(lambda c: c.roll(n, 1) if c.ndim > 1 else c).set(order=b.order)


ZERO = torch.zeros(1, 9, dtype=torch.long)                                             # (B,T)
PATTERNS = {
    "causal": one(),
    "packed": collate([Example([1, 2, 3, 4]), Example([5, 6, 7]), Example([8, 9])], 9, pack=True),
    "prefix": PrefixLM().corrupt(one(answer=[False] * 4 + [True] * 5), Noise()),
    "two turns": PrefixLM().corrupt(one(answer=TURNS), Noise()),
    "two prefixes": PrefixLM().corrupt(collate([
        Example([1, 2, 3, 4], [False] * 2 + [True] * 2), Example([5, 6, 7, 8, 9], [False] * 3 + [True] * 2)],
        9, pack=True), Noise()),
    "bidirectional": one().set(order=ZERO),
    "blocks": one().set(order=torch.arange(9)[None] // 3),
    "padded": collate([Example([1, 2, 3, 4, 5]), Example(list(range(1, 10)))]),
    "left padded": left(collate([Example([1, 2, 3, 4, 5])], 9), 4),
    "left padded, bidirectional": left(collate([Example([1, 2, 3])], 9), 6).set(order=ZERO),
    "permuted": one().set(order=torch.tensor([[4, 2, 0, 8, 6, 1, 3, 5, 7]])),
    "private": one().set(order=torch.tensor([[0, 2, 4, 1, 1, 3, 3, 5, 5]])).with_extra(
        private=torch.tensor([[True] * 3 + [False] * 6])),
}


def reach(b):
    "Which tokens may tell each token something, over any number of layers: the transitive closure of `sees`."
    r = b.sees                                                                         # (B,T,T)
    for _ in range(b.ids.shape[1]): r = r | ((r.double() @ r.double()) > 0)            # (B,T,T)
    return r


def leaks(model, b, should):
    "Where a real token's state moves, or not, other than `should` (B,T,T) says: (token changed, row, token)."
    real = b.doc > 0                                                                   # (B,T)
    return [(j, *at) for j in range(b.ids.shape[1])
            for at in ((moved(model, b, j) != should[:, :, j]) & real).nonzero().tolist()]


@pytest.fixture(scope="module")
def deep():
    "In double precision, so that no influence is lost to rounding."
    torch.manual_seed(1)
    return lively(Size(60, dim=32, heads=4, kv_heads=2, layers=3)).double()


@pytest.mark.parametrize("b", PATTERNS.values(), ids=PATTERNS)
def test_moves_where_it_sees(deep, b):
    "Changing a token moves exactly the hidden states that may hear of it, its own among them."
    should = reach(b)
    assert should.diagonal(dim1=1, dim2=2).all() and leaks(deep, b, should) == []


def leaky_prefix(b):
    "Broken on purpose: all unanswered tokens share an order, so the first question sees the second."
    return b.set(order=torch.where(b.answer, b.doc_pos + 1, 0))


def test_control_turns_leak(deep):
    "With that prefix the first question hears the second one, and the test above would say so."
    b, right = leaky_prefix(one(answer=TURNS)), PATTERNS["two turns"]
    found = leaks(deep, b, reach(right))
    assert {(j, t) for j, _, t in found} >= {(5, 0), (5, 2), (6, 4)}
    assert leaks(deep, right, reach(right)) == []


def test_control_mask_off_by_one(deep):
    "A mask by which each token also sees the next is caught at every token but the last."
    b = one()
    off = b.set(order=(b.order + 1) // 2 * 2)
    assert {(j, t) for j, _, t in leaks(deep, off, reach(b))} == {(2, 1), (4, 3), (6, 5), (8, 7)}


def test_control_forgotten_documents(deep):
    "Packing that forgets where documents end is caught, and so is a batch wrongly said to be causal."
    b = PATTERNS["packed"]
    assert leaks(deep, b.set(doc=torch.ones_like(b.doc)), reach(b))
    assert leaks(deep, replace(b, _causal=True), reach(b))


def test_moved_keeps_the_mode():
    "`moved` puts the model back into the mode it found."
    m = lively(SIZES["heads"])
    for mode in True, False:
        m.train(mode); moved(m, one(), 0)
        assert m.training == mode


# ---- 16 bits on a CPU

@pytest.mark.parametrize("kv", [1, 2])
def test_attention_written_out(kv):
    "Under autocast a CPU uses the formula: near the library's function for causal and masked rows, and as deaf to what is hidden."
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 2, 6, 8), torch.randn(2, kv, 6, 8), torch.randn(2, kv, 6, 8)  # (B,H,T,hd)
    b = rows(2, 6)
    mask = b.set(order=(b.order - 3).clamp(min=0)).sees[:, None]                       # (B,1,T,T)
    for m in (None, mask):
        exact = attend(q, k, v, m)                                                     # (B,H,T,hd)
        with torch.autocast("cpu", torch.bfloat16): near = attend(q, k, v, m)          # (B,H,T,hd)
        assert near.dtype == torch.bfloat16 and 0 < (near - exact).abs().max() < .05
    model = Transformer(Size(60, 32, 2, kv_heads=kv, layers=2)).eval()
    c = b.set(order=(b.order - 3).clamp(min=0))
    with torch.autocast("cpu", torch.bfloat16):
        for j in range(6): assert not (moved(model, c, j) & ~c.sees[:, :, j]).any()


def test_attention_written_out_leaks_without_its_mask():
    "Negative control of the test above: with the mask left out, a hidden token is felt."
    b = rows(2, 6)
    model = Transformer(Size(60, 32, 2, layers=2)).eval()
    wide = b.set(order=torch.zeros_like(b.order))
    with torch.autocast("cpu", torch.bfloat16): assert (moved(model, wide, 5) & ~b.sees[:, :, 5]).any()
