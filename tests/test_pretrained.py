"""Models of transformers under a batch's columns: accepted if they obey, refused by name if not."""
import pytest
import torch
import transformers
from transformers import (BertConfig, BertForMaskedLM, Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel,
                          GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig,
                          MistralForCausalLM, ModernBertConfig, ModernBertForMaskedLM, OPTConfig, OPTForCausalLM,
                          Qwen3Config, Qwen3ForCausalLM, RobertaConfig, RobertaForMaskedLM)

from lmtrain import pretrained as module
from lmtrain.batch import Example, collate
from lmtrain.model import Size, Transformer
from lmtrain.pretrained import Pretrained, obeys_mask
from lmtrain.objective import CLM, nll, shift
from lmtrain.train import Trainer

S = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
     "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
KV = {**S, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
MODERN = {**S, "cls_token_id": 1, "sep_token_id": 2}

GOOD = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**KV)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**KV, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**S)),
    "mistral without a window": lambda: MistralForCausalLM(MistralConfig(**KV, sliding_window=None)),
    "gemma3, some layers with a window": lambda: Gemma3ForCausalLM(Gemma3TextConfig(
        **KV, head_dim=8, sliding_window=6, layer_types=["sliding_attention", "full_attention"])),
    "bert": lambda: BertForMaskedLM(BertConfig(**S)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**{**S, "pad_token_id": 1, "bos_token_id": 0})),
    "modernbert": lambda: ModernBertForMaskedLM(ModernBertConfig(**MODERN)),
    "modernbert with a narrow window": lambda: ModernBertForMaskedLM(ModernBertConfig(
        **MODERN, local_attention=8, global_attn_every_n_layers=2)),
}


def made(build):
    "A random model whose weights are large enough for every token to matter."
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    net = build().eval()
    for p in net.parameters(): p.data.mul_(3 if p.ndim > 1 else 1)
    return net


@pytest.mark.parametrize("name", GOOD)
def test_accepted(name):
    "Obeys; the head gives the library's own logits, at batch 1 and 2, padded and not; packed is alone."
    net = made(GOOD[name])
    model = Pretrained(net)
    assert obeys_mask(model)
    model.eval()
    masked = "MaskedLM" in type(net).__name__
    for lengths in ([12], [12, 12], [12, 7]):
        rows = [Example(torch.arange(5, 5 + n).tolist()) for n in lengths]
        b = collate(rows)
        if masked: b = b.set(order=torch.zeros_like(b.order))
        with torch.no_grad():
            ours = model.head(model(b))                                                # (B,T,V)
            theirs = net(input_ids=b.ids, attention_mask=(b.doc > 0).long()).logits    # (B,T,V)
        assert (ours - theirs)[b.doc > 0].abs().max() < 1e-3 * theirs.abs().max()


@pytest.mark.parametrize("name", ["MistralForCausalLM", "Qwen2ForCausalLM"])
def test_a_window_in_every_layer(name, monkeypatch):
    """On rows of five windows every position is the model's own, and packed documents are alone. Control: without the
    window in the mask only the first window's positions are right, and the model is refused."""
    more = {"use_sliding_window": True, "max_window_layers": 0} if "Qwen" in name else {}
    config = getattr(transformers, name.replace("ForCausalLM", "Config"))(**KV, sliding_window=8, **more)
    net = made(lambda: getattr(transformers, name)(config))
    model = Pretrained(net).eval()
    b = collate([Example(torch.randint(5, 64, (40,)).tolist())])
    with torch.no_grad():
        theirs = net(input_ids=b.ids).logits                                           # (1,40,V)
        assert (model.head(model(b)) - theirs).abs().max() < 1e-4 * theirs.abs().max()
        monkeypatch.setattr(module.Inputs, "mask", lambda self, b: torch.where(b.sees, 0., -1e38)[:, None])
        far = (model.head(model(b)) - theirs).abs().amax(-1)[0]                        # (40,)
    assert far[:8].max() < 1e-4 * theirs.abs().max() < .01 * far[8:].max()
    assert "hides" in module.disobeys(model) or "own pattern" in module.disobeys(model)


def test_opt_as_measured():
    "OPT takes the mask and the positions in this version of transformers, and is accepted for what it does."
    net = made(lambda: OPTForCausalLM(OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2,
                                                num_attention_heads=4, word_embed_proj_dim=32)))
    assert obeys_mask(Pretrained(net))


@pytest.mark.parametrize("fault", ["the mask is ignored", "positions are ignored", "everything is seen", "it raises"])
def test_each_question_is_needed(fault, monkeypatch):
    "Negative control: models broken in four ways are each found out."
    model = Pretrained(made(GOOD["gpt2"]))
    whole, base = module.Inputs.mask, model.net.base_model.forward
    def forward(input_ids, attention_mask=None, position_ids=None, **more):
        if fault == "it raises" and attention_mask is not None: raise TypeError("a mask of 4 dimensions")
        if fault == "positions are ignored": position_ids = None
        return base(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **more)
    monkeypatch.setattr(model.net.base_model, "forward", forward)
    if fault == "everything is seen": monkeypatch.setattr(module.Inputs, "mask", lambda self, b: whole(self, b) * 0)
    if fault == "the mask is ignored": monkeypatch.setattr(module.Inputs, "mask", lambda self, b: None)
    assert module.disobeys(model) and not obeys_mask(model)


def test_it_trains_under_our_objectives():
    "A few steps lower the loss, packed rows and all; the mode it was in is kept; no cache."
    model = Pretrained(made(GOOD["llama"]))
    b = CLM().corrupt(collate([Example([1, *range(10, 30), 2])] * 4, T=44, pack=True), None)
    h = Trainer(model, CLM(), [b], lr=1e-2, steps=20).fit()
    assert h["loss"][-1] < .5 * h["loss"][0] and model.training
    with pytest.raises(ValueError, match="leave cache out"): model(b, module.Cache())
    assert obeys_mask(Transformer(Size(9, 8, 2, layers=1))) and len(nll(model, shift(b))) % 128 == 0


def test_a_qwen3_directory_trains_here_and_goes_back(tmp_path):
    "Made by transformers, opened here, trained, saved, opened there: the same logits, and the same text in a pipeline."
    from lmtrain.generation import generate
    from lmtrain.model import load, save
    from lmtrain.text import train_bpe
    tok = train_bpe(["the sea was calm and the ship was old "] * 30, 290)
    net = Qwen3ForCausalLM(Qwen3Config(**{**KV, "vocab_size": len(tok)}, head_dim=8, tie_word_embeddings=True,
                                       max_position_embeddings=32))
    net.save_pretrained(tmp_path / "theirs"); tok.save_pretrained(tmp_path / "theirs")
    model, tok = load(tmp_path / "theirs")
    ids = tok("the sea was calm")["input_ids"]
    with torch.no_grad(): ours, theirs = model.head(model(collate([Example(ids)]))), net(torch.tensor([ids])).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    b = CLM().corrupt(collate([Example(ids + [tok.eos_token_id])]), None)
    h = Trainer(model.train(), CLM(), [b], lr=1e-2, steps=30).fit()
    assert h["loss"][-1] < .5 * h["loss"][0]
    save(model.eval(), tok, tmp_path / "ours")
    pipe = transformers.pipeline("text-generation", model=str(tmp_path / "ours"))
    said = pipe("the sea", max_new_tokens=6, do_sample=False)[0]["generated_text"]
    t = generate(model, [tok("the sea")["input_ids"]], 6, temperature=0, eos=tok.eos_token_id)
    assert said == tok.decode(t.ids[0][t.when[0] >= 0], skip_special_tokens=True)


# ---- what models do outside their modules, and where they come from

def own_loss(net, b):
    return net(input_ids=b.ids, labels=b.ids).loss


@pytest.mark.parametrize("name", ["granite", "cohere", "gemma2", "bert", "distilbert"])
def test_the_head_is_the_models_own(name):
    """Scaled, squeezed and layered heads: our loss is the model's own to 1e-5. Control: its last matrix alone is not."""
    build = {"granite": lambda: transformers.GraniteForCausalLM(transformers.GraniteConfig(**KV, logits_scaling=8.)),
             "cohere": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**KV, logit_scale=.25)),
             "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**KV, head_dim=8, final_logit_softcapping=.5, sliding_window=64)),
             "bert": lambda: BertForMaskedLM(BertConfig(**S)),
             "distilbert": lambda: transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=48))}
    net = made(build[name])
    model = Pretrained(net).eval()
    b = collate([Example(torch.randint(5, 64, (12,)).tolist())])
    if model.causal: q, matrix = shift(b), net.get_output_embeddings()
    else: q, matrix = b.set(order=torch.zeros_like(b.order), targets=b.ids, weights=torch.ones(b.ids.shape)), net.get_output_embeddings()
    with torch.no_grad():
        ours, n = nll(model, q).sum(), int((q.weights > 0).sum())
        assert abs(ours / n - own_loss(net, b)) < 1e-5 * own_loss(net, b)
        bare = torch.nn.functional.cross_entropy(matrix(model(q))[q.weights > 0], q.targets[q.weights > 0])
        assert abs(bare - own_loss(net, b)) > 1e-3
    names = {n for n, _ in model.head.named_parameters()}
    assert names and len(model.state_dict()) == len({k for k in model.state_dict() if k.startswith("net.")})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_checkpoints_in_16_bits_open_in_32(dtype, tmp_path):
    "Most checkpoints are in bf16: they open, are float32, and train. A module in 16 bits opens as it is, for a reference."
    net = made(GOOD["llama"]).to(dtype)
    net.save_pretrained(tmp_path)
    model = Pretrained(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    b = CLM().corrupt(collate([Example([1, *range(10, 30), 2])]), None)
    assert Trainer(model, CLM(), [b], lr=1e-2, steps=20).fit()["loss"][-1] < 2
    kinds = {n: t.dtype for n, t in [*net.named_parameters(), *net.named_buffers()]}
    frozen = Pretrained(net)
    assert {n: t.dtype for n, t in [*net.named_parameters(), *net.named_buffers()]} == kinds
    with torch.no_grad(): assert nll(frozen.eval(), b).isfinite().all()
    with pytest.raises(ValueError, match="in 16 bits"): Trainer(frozen, CLM(), [b])


def test_room_of_a_table_with_reserved_positions():
    "RoBERTa's 64 positions begin behind its padding token: 62 tokens fit, as its own forward says, and the 63rd does not."
    net = made(lambda: RobertaForMaskedLM(RobertaConfig(**{**S, "pad_token_id": 1, "bos_token_id": 0}, max_position_embeddings=64)))
    model = Pretrained(net)
    assert model.room == 62
    fit = lambda n: collate([Example([5] * n)])
    assert model(fit(62)).isfinite().all()
    with pytest.raises((IndexError, RuntimeError)): model(fit(63))


def test_models_without_attention_are_refused_in_one_line():
    for build in (lambda: transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)),
                  lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4))):
        with pytest.raises(ValueError, match="cannot run under a batch's mask") as e: Pretrained(made(build))
        assert "\n" not in str(e.value) and len(str(e.value)) < 250
