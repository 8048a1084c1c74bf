"""A dozen entries of transformers' mappings by the sweep of benchmarks/models.py; the whole table is docs/models.md."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.models import sweep, verdict  # noqa: E402

DOZEN = {"gpt2": "agrees", "llama": "agrees", "mistral": "agrees", "gemma2": "agrees", "granite": "agrees", "mpt": "agrees", "phi3": "agrees", "bert": "agrees",
         "roberta": "agrees", "distilbert": "agrees", "modernbert": "agrees", "qwen3_moe": "agrees", "mamba": "refused"}


@pytest.mark.parametrize("kind", DOZEN)
def test_it_agrees_or_is_refused(kind):
    "Under both mappings: states, logits, loss and a step are the model's own, or one line refuses it; nothing in between."
    found = sweep({kind})
    assert found and all(v == DOZEN[kind] for _, _, v, _ in found), found


def test_a_disagreement_is_seen(monkeypatch):
    "Negative control: Granite with its head taken for its last matrix alone, as it once was."
    import lmtrain.pretrained as module
    monkeypatch.setattr(module.Pretrained, "head", property(lambda self: self.net.get_output_embeddings()))
    assert verdict("granite", "GraniteForCausalLM") == ("refused", "its logits are not those of its own forward")
    monkeypatch.setattr(module, "disobeys", lambda model: "")
    assert verdict("granite", "GraniteForCausalLM")[0] == "DISAGREES"
