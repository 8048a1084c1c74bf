"""The decoder against the model, token by token and column by column; models of transformers against the same; what a step costs."""
import itertools

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3ForCausalLM

from lmtrain.batch import Example, Noise, collate
from lmtrain.generation import Decoder, draw, distribution, fill, generate, left_to_right, uniforms
from lmtrain.model import Cache, Size, Transformer, evaluating, to_transformers
from lmtrain.objective import logp, shift
from lmtrain.pretrained import Pretrained

SIZE = dict(vocab=90, dim=48, heads=4, layers=3, length=64)


def made(kv: int = 2, seed: int = 0) -> Transformer:
    "A model with opinions, and norms that are not 1."
    torch.manual_seed(seed)
    model = Transformer(Size(kv_heads=kv, **SIZE)).eval()
    for p in model.parameters(): p.data = p.data * 5 if p.ndim > 1 else p.data + .3 * torch.randn_like(p)
    return model


def columns(kind: str):
    "Prompts whose columns are of some kind, five rows of twelve tokens."
    b = collate([Example([1, *range(5 + 9 * i, 16 + 9 * i)]) for i in range(5)])
    if kind == "padded": b = collate([Example([1, *range(5, 9 + i)]) for i in range(5)])
    if kind == "prefix": b = b.set(order=(b.doc_pos - 6).clamp(min=0))
    if kind == "both ways, padded":
        b = collate([Example([1, *range(5, 9 + i)]) for i in range(5)]); b = b.set(order=torch.zeros_like(b.order))
    if kind == "two documents": b = b.set(doc=1 + (b.doc_pos > 4).long())
    if kind == "private": b = b.with_extra(private=(b.doc_pos > 2) & (b.doc_pos < 6))
    return b.with_extra(pos=b.doc_pos + (3 if kind == "shifted" else 0))


@pytest.mark.parametrize("kind", ["causal", "padded", "prefix", "both ways, padded", "two documents", "private", "shifted"])
@pytest.mark.parametrize("kv", [4, 2, 1])
def test_it_is_the_model(kind, kv):
    """Six tokens behind prompts with columns of any kind, rows repeated and dropped: the logits of one forward of the whole.
    Control: a decoder that sees all of the prompt is wrong where the columns hide some of it."""
    model, b = made(kv), columns(kind)
    rows, news = torch.tensor([0, 1, 1, 2, 3, 4]), torch.randint(5, 90, (6, 6), generator=torch.Generator().manual_seed(1))
    def decoded(blind: bool) -> torch.Tensor:
        with evaluating(model), torch.inference_mode():
            cache = Cache(); model(b, cache)
            decode = Decoder(model); decode.begin(cache, rows, 6)
            if blind: decode.mask = None
            out = [decode(news[:, k]) for k in range(3)]
            decode.keep(torch.tensor([0, 2, 5]))
            out = [o[[0, 2, 5]] for o in out] + [decode(news[[0, 2, 5], k]) for k in range(3, 6)]
            return torch.stack(out, 1).clone()                                         # (3,6,V)
    def whole(r: int) -> torch.Tensor:
        "One forward of a row's prompt and tokens, the tokens behind its last one and in its document."
        c, n = b[rows[r:r + 1]], int((b.doc[rows[r]] > 0).sum())
        long = lambda x, y: torch.cat([x[:, :n], y], 1)
        last, k = n - 1, torch.arange(1, 7)[None]
        both = c.each(lambda x: x[:, :n] if x.ndim > 1 else x)
        both = both.set(ids=long(c.ids, news[r:r + 1]), clean=long(c.clean, news[r:r + 1]), doc=long(c.doc, c.doc[:, last:last + 1].expand(1, 6)),
                        order=long(c.order, c.order[:, :n].amax() + k), **{x: long(getattr(c, x), getattr(c, x)[:, :1].expand(1, 6) * 0) for x in ("answer", "targets", "weights", "index")})
        extra = {"pos": long(c.extra["pos"], c.extra["pos"][:, last:last + 1] + k)}
        if "private" in c.extra: extra["private"] = long(c.extra["private"], torch.zeros(1, 6, dtype=torch.bool))
        with evaluating(model): return model.head(model(both.with_extra(**extra)))[0, n:]  # (6,V)
    want = torch.stack([whole(r) for r in (0, 2, 5)])                                  # (3,6,V)
    assert torch.allclose(decoded(False), want, atol=2e-4 * want.abs().max())
    hides = kind in ("padded", "both ways, padded", "two documents", "private")
    assert torch.allclose(decoded(True), want, atol=2e-4 * want.abs().max()) != hides


@pytest.mark.parametrize("how", ["bf16", "autocast"])
def test_in_16_bits(how):
    "In bf16 weights, and under autocast, the decoder is as near to the float32 model as the model itself is in 16 bits."
    model = made()
    for p in model.parameters(): p.data = p.data / 2 if p.ndim > 1 else p.data
    ids = torch.randint(5, 90, (4, 12), generator=torch.Generator().manual_seed(2))
    b = collate([Example(r.tolist()) for r in ids])
    b = b.with_extra(pos=b.doc_pos)
    with evaluating(model): want = model.head(model(b))[:, 8:]                         # (4,4,V)
    low = model.bfloat16() if how == "bf16" else model
    with evaluating(low), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        own = low.head(low(b))[:, 8:].float()
        head = b.each(lambda c: c[:, :8] if c.ndim > 1 else c)
        cache = Cache(); low(head, cache)
        decode = Decoder(low); decode.begin(cache, torch.arange(4), 4)
        got = torch.stack([decode(ids[:, k]) for k in range(8, 12)], 1).float()
    far = lambda x: float((x - want).norm() / want.norm())
    assert far(got) < 1.5 * far(own) + 1e-3 and far(own) < .05


def test_stale_weights_are_never_kept():
    "After a step of an optimizer the same call writes with the new weights."
    model = made()
    before = generate(model, [[1, 5, 6]], 8, temperature=0).ids
    for p in model.parameters(): p.data = p.data + torch.randn_like(p) * p.data.abs().mean()
    after = generate(model, [[1, 5, 6]], 8, temperature=0).ids
    slow = fill(model, torch.tensor([[1, 5, 6, *[0] * 8]]), torch.tensor([[False] * 3 + [True] * 8]), 3, left_to_right, shifted=True).ids
    assert torch.equal(after, slow) and not torch.equal(before, after)


def test_what_is_written_can_be_learnt_from():
    "A trace's tensors take part in a backward pass, as rollouts need; its odds are the model's own."
    model = made()
    t = generate(model, [[1, 5, 6], [1, 7]], 6, seed=2)
    b = shift(collate([Example(r[w >= 0].tolist()) for r, w in zip(t.ids, t.when, strict=True)], T=t.ids.shape[1]))
    q = logp(model, b)
    (q * t.p).sum().backward()
    written = t.when[:, 1:] > 0
    assert torch.allclose(q[:, :-1].exp()[written], t.p[:, 1:][written], atol=1e-5) and model.norm.weight.grad.abs().sum() > 0


# ---- the same text, however it is made

PROMPTS = {"equal": [[1, 5, 6]] * 7, "unequal": [[1, *range(3, 3 + k)] for k in range(1, 9)], "groups": [[1, 5, 6]] * 5 + [[1, 9]] * 4 + [[1, 8, 8, 8]]}
KNOBS = [(0, 1.), (1, 1.), (.7, .9)]
ENDS = {"no end": {}, "eos": {"eos": 5}, "stop": {"eos": 5, "stop": lambda ids: len(ids) > 3 and ids[-1] % 7 == 0}}


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_all_ways_write_the_same(prompts, knobs, ends):
    "Many rows or few, one at a time by the canvas, or transformers' own cached Qwen3 with our numbers: tokens, steps and odds. Control: another seed."
    model, asked, how = made(), PROMPTS[prompts], {**ENDS[ends], "temperature": knobs[0], "top_p": knobs[1], "seed": 4}
    want = generate(model, asked, 16, **how)
    theirs = Pretrained(to_transformers(model))
    for other in (generate(model, asked, 16, rows=3, **how), generate(theirs, asked, 16, **how), generate(theirs, asked, 16, rows=2, **how)):
        assert torch.equal(other.ids, want.ids) and torch.equal(other.when, want.when)
        far = (other.p - want.p).abs() > 1e-4              # rounding may move a token over the edge of top-p, and with it all shares
        assert far.sum() <= (2 if knobs[1] < 1 else 0) and (other.p - want.p).abs().max() < .01
    if knobs[0]: assert not torch.equal(generate(model, asked, 16, **{**how, "seed": 5}).ids, want.ids)
    for r, prompt in enumerate(asked):
        text = want.ids[r][want.when[r] > 0].tolist()
        assert want.ids[r][:len(prompt)].tolist() == prompt and 0 < len(text) <= 16
        stops = [k for k in range(1, len(text) + 1) if ends != "no end" and (text[k - 1] == 5 or ends == "stop" and ENDS["stop"]["stop"](text[:k]))]
        assert stops in ([], [len(text)]) and (len(text) == 16 or stops)


@pytest.mark.parametrize("net", [GPT2LMHeadModel(GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=2, n_positions=48)),
                                 LlamaForCausalLM(LlamaConfig(vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                                              num_key_value_heads=2, max_position_embeddings=48))], ids=["gpt2", "llama"])
def test_models_of_others_write(net):
    "Greedy text is transformers' own; drawn text has the odds of its own forward, under the stated temperature; its settings stay as they were."
    net.eval()
    for p in net.parameters(): p.data *= 4 if p.ndim > 1 else 1
    net.generation_config.repetition_penalty = 1.7         # which is not the model's own probability
    model, settings = Pretrained(net), net.generation_config
    ids = torch.tensor([[1, 5, 6, 7]])
    plain = net.generate(ids, max_new_tokens=12, do_sample=False, repetition_penalty=1.0, pad_token_id=0, eos_token_id=None)
    assert torch.equal(generate(model, ids.tolist(), 12, temperature=0).ids, plain)
    t = generate(model, [[1, 5, 6, 7], [1, 9]], 12, temperature=.6, seed=1)
    for r, P in enumerate((4, 2)):
        row = t.ids[r][t.when[r] >= 0]
        with torch.no_grad(): q = (net(row[None]).logits[0, P - 1:-1].double() / .6).softmax(1).gather(1, row[P:, None])[:, 0]
        assert torch.allclose(t.p[r, P:len(row)].double(), q, atol=1e-5)
    assert net.generation_config is settings and settings.repetition_penalty == 1.7
    with pytest.raises(ValueError, match="made for 48"): generate(model, [[1]], 48)


def test_draws_follow_the_odds():
    "20,000 numbers through `draw`, with and without top-p: chi-squared within five standard deviations; of another temperature, the control, far outside."
    logits = torch.tensor([[3., 2.5, 2, 1, .5, 0, -1, -2]]).expand(20000, -1)
    u = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for knobs in ((1., 1.), (.5, 1.), (1., .8)):
        new, p = draw(logits, *knobs, u)
        q = distribution(logits[:1], *knobs)[0]
        count = new.bincount(minlength=8).double()
        chi = lambda q, count=count: float(((count - 20000 * q) ** 2 / (20000 * q))[q > 0].sum())
        k = int((q > 0).sum()) - 1
        assert chi(q) < k + 5 * (2 * k) ** .5 and not count[q == 0].any() and torch.allclose(p, q[new], atol=1e-6)
        if knobs[1] == 1: assert chi(distribution(logits[:1], knobs[0] * 1.2)[0]) > 100


def test_tiny_temperatures_do_not_overflow():
    "At a temperature of 1e-38 the likeliest wins, where logits / temperature alone would be infinite."
    logits = torch.tensor([[3., 2., 1.], [-5., 1., 9.]])
    new, p = draw(logits, 1e-38, 1., torch.tensor([.3, .9], dtype=torch.float64))
    assert new.tolist() == [0, 2] and p.tolist() == [1., 1.]


def test_a_token_costs_no_bookkeeping(monkeypatch):
    "Behind the prompt neither a batch is made nor the model's forward called, equal prompts are read once, and a stop is asked once a token."
    model, calls, asked = made(), [], []
    forward = Transformer.forward
    monkeypatch.setattr(Transformer, "forward", lambda self, b, cache=None: calls.append(len(b)) or forward(self, b, cache))
    generate(model, [[1, 5, 6]] * 9 + [[1, 7, 8]] * 3, 10, stop=lambda ids: asked.append(len(ids)) or len(ids) == 6)
    assert calls == [2] and sorted(asked) == sorted([*range(1, 7)] * 12)


def test_uniforms_are_those_of_each_step():
    "All numbers at once are those that a step at a time would give, by row, place and step."
    from lmtrain.generation import uniform
    prompts, names = [[1, 2, 3], [4]], [7, 2]
    u = uniforms(prompts, names, 5, Noise(3))
    for (r, p), n in itertools.product(enumerate(prompts), range(5)):
        assert u[r, n] == uniform(Noise(3), torch.tensor([names[r]]), torch.tensor([len(p) + n]), n + 1)[0]


def test_refused():
    model = made()
    for what, error, words in (([], ValueError, "every prompt needs a token"), ([[]], ValueError, "every prompt"), (["x"], ValueError, "list of tokens"), ([[1] * 60], ValueError, "made for 64")):
        with pytest.raises(error, match=words): generate(model, what, 5)
    with pytest.raises(ValueError, match="1 or more"): generate(model, [[1]], 0)
    blind = Pretrained(Qwen3ForCausalLM(to_transformers(model).config)); blind.causal = False
    with pytest.raises(ValueError, match="both sides in view"): generate(blind, [[1]], 5)
