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


@pytest.mark.parametrize("name, build, why", [
    ("MistralForCausalLM", lambda: MistralForCausalLM(MistralConfig(**KV, sliding_window=8)), "sliding window"),
])
def test_refused_by_name(name, build, why):
    "What cannot be run under the columns says so with its name."
    with pytest.raises(ValueError, match=f"{name} cannot run.*{why}"): Pretrained(made(build))


def test_opt_as_measured():
    "OPT takes the mask and the positions in this version of transformers, and is accepted for what it does."
    net = made(lambda: OPTForCausalLM(OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2,
                                                num_attention_heads=4, word_embed_proj_dim=32)))
    assert obeys_mask(Pretrained(net))


@pytest.mark.parametrize("fault", ["the mask is ignored", "positions are ignored", "everything is seen", "it raises"])
def test_each_question_is_needed(fault, monkeypatch):
    "Negative control: models broken in four ways are each found out."
    model = Pretrained(made(GOOD["gpt2"]))
    whole, base = Pretrained.added, model.net.base_model.forward
    def forward(input_ids, attention_mask=None, position_ids=None, **more):
        if fault == "it raises" and attention_mask is not None: raise TypeError("a mask of 4 dimensions")
        if fault == "positions are ignored": position_ids = None
        return base(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **more)
    monkeypatch.setattr(model.net.base_model, "forward", forward)
    if fault == "everything is seen": monkeypatch.setattr(Pretrained, "added", lambda self, b: whole(self, b) * 0)
    if fault == "the mask is ignored": monkeypatch.setattr(Pretrained, "added", lambda self, b: None)
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
