"""Every causal and masked language model of transformers under our columns: does it agree with itself, or who refuses it?

    python -m benchmarks.models [--only llama,bert] [--out docs/models.md]

Each is built with random weights from its own configuration with the standard fields made small. Agreement means: hidden
states and logits (checked by `Pretrained`), the loss, and a training step that changes the weights. Not a timing.
"""
from __future__ import annotations

import argparse
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from lmtrain.batch import Batch, Example, Noise, collate
from lmtrain.objective import CLM, nll, shift
from lmtrain.pretrained import Pretrained
from lmtrain.train import Trainer

SMALL = {
    **dict.fromkeys(("vocab_size",), 64), **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "multi_query_group_num"), 2), **dict.fromkeys(("head_dim", "d_kv"), 8),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim",
                     "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length"), 64),
    "sliding_window": 8, "logits_scaling": 8.0, "attention_window": 8, "local_attention": 8, "embedding_size": 32, "word_embed_proj_dim": 32, "word_embedding_size": 32,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2), "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "kv_lora_rank": 8, "q_lora_rank": 8, "rotary_dim": 4, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
PAD = {"roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "roberta-prelayernorm", "ibert", "data2vec-text", "esm", "mpnet", "luke", "xmod"}


def built(kind: str, name: str) -> transformers.PreTrainedModel:
    "A small model of a type with random weights. Raises what its configuration or its class raises."
    config_class = transformers.CONFIG_MAPPING[kind]
    known = config_class()
    free = lambda n: not isinstance(getattr(config_class, n, None), property)
    fields = {n: v for n, v in SMALL.items() if free(n) and getattr(known, n, None) is not None or n == "vocab_size"}
    if free("layer_types") and (layers := getattr(known, "layer_types", None)): fields["layer_types"] = [*dict.fromkeys(layers)][:2] * (2 if len({*layers}) == 1 else 1)
    if hasattr(known, "qk_rope_head_dim"): fields.pop("head_dim", None)  # there it is made of others
    fields["pad_token_id"] = 1 if kind in PAD else 0
    if kind in PAD: fields["bos_token_id"] = 0
    config = config_class(**fields)
    model = getattr(transformers, name)
    with torch.device("meta"): size = sum(p.numel() for p in model(config).parameters())
    if size > 3e6: raise ValueError(f"it has {size / 1e6:.0f} million weights with the standard fields made small")
    torch.manual_seed(0)
    net = model(config).eval()
    for p in net.parameters(): p.data.mul_(3 if p.ndim > 1 else 1)
    try: net(input_ids=torch.arange(5, 13)[None])
    except Exception as e: raise ValueError(f"its own forward fails at this size: {(str(e) or type(e).__name__).splitlines()[0][:70]}") from None
    return net


def question(model: Pretrained) -> tuple[Batch, Batch]:
    "A row, and the same with everything in the loss that the model's own loss counts."
    n = min(24, model.room or 24)
    row = collate([Example((5 + torch.randint(model.vocab - 5, (n,), generator=torch.Generator().manual_seed(1))).tolist())])
    both = row.set(order=torch.zeros_like(row.order))
    if "MaskedLM" in type(model.net).__name__: return row, both.set(targets=row.ids, weights=torch.ones(row.ids.shape))
    return row, shift(row if model.causal else both)


def verdict(kind: str, name: str) -> tuple[str, str]:
    "`agrees`, `refused`, `not built` or `DISAGREES`, and why."
    try: net = built(kind, name)
    except Exception as e: return "not built", (str(e) or type(e).__name__).splitlines()[0][:110]
    try: model = Pretrained(net)
    except ValueError as e: return "refused", str(e).split("mask: ")[-1][:110]
    row, q = question(model)
    try:
        with torch.no_grad(): ours = float(nll(model.eval(), q).sum() / (q.weights > 0).sum()); own = float(net(input_ids=row.ids, labels=row.ids).loss)
        with torch.no_grad(): aligned = float(torch.nn.functional.cross_entropy(net(input_ids=row.ids).logits[0], row.ids[0]))
        if model.causal and abs(aligned - own) < 1e-4 * abs(own): return "agrees", f"loss {own:.3f}; its own loss wants labels that are shifted already"
        if abs(ours - own) > 1e-4 * abs(own): return "DISAGREES", f"loss {ours:.4f}, its own {own:.4f}"
        before = [p.detach().clone() for p in net.parameters()]
        loss = Trainer(model, CLM(), [CLM().corrupt(row, Noise())], lr=1e-3, steps=1, bf16=False).fit()["loss"][0]
        moved = any(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    except Exception as e: return "DISAGREES", f"{type(e).__name__}: {str(e).splitlines()[0][:90]}"
    return ("agrees", f"loss {own:.3f}") if moved and loss == loss else ("DISAGREES", "a training step changes nothing")


def sweep(only: set[str] | None = None) -> list[tuple[str, str, str, str]]:
    "(type, class, verdict, why) of all, sorted."
    transformers.logging.set_verbosity(50); warnings.simplefilter("ignore")
    found = []
    for names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES):
        for kind, name in sorted(names.items()):
            if only is None or kind in only: found.append((kind, name, *verdict(kind, name))); print(*found[-1], sep=" | ", flush=True)
    return found


def page(found: list[tuple[str, str, str, str]]) -> str:
    count = Counter(v for _, _, v, _ in found)
    rows = "".join(f"| {k} | {n} | {v} | {why.replace('|', '/')} |\n" for k, n, v, why in found)
    return (f"# Models of transformers under a batch's columns\n\nMade by `python -m benchmarks.models` with transformers "
            f"{transformers.__version__} and torch {torch.__version__}, each model small and random. *Agrees*: hidden states, logits and loss are its own, "
            "alone and packed, and a training step changes its weights. *Refused*: `Pretrained` says why, in this line. *Not built*: it does not "
            f"shrink by the standard fields of a configuration.\n\n{', '.join(f'{n} {v}' for v, n in count.most_common())}.\n\n"
            f"| type | class | verdict | why |\n|---|---|---|---|\n{rows}")


if __name__ == "__main__":
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--only", default=""); words.add_argument("--out", default="docs/models.md")
    a = words.parse_args()
    found = sweep({*a.only.split(",")} if a.only else None)
    if not a.only: Path(a.out).write_text(page(found), encoding="utf-8")
