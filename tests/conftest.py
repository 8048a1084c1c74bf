"""What several test files share: real text, a small tokenizer, a tiny model, and seeds."""
from pydoc_data.topics import topics

import pytest
import torch
from hypothesis import settings

from lmtrain.model import Size, Transformer
from lmtrain.text import train_bpe

settings.register_profile("lmtrain", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("lmtrain")


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)


@pytest.fixture(scope="session")
def pages() -> list[str]:
    "The topics of Python's own help, in the order of their names: real text that needs no download."
    return [topics[name] for name in sorted(topics)]


@pytest.fixture(scope="session")
def tok(pages): return train_bpe(pages[:20], 400)


@pytest.fixture(scope="session")
def model(tok):
    "A tiny model with grouped heads, to read from: a test that trains makes its own."
    torch.manual_seed(0)
    return Transformer(Size(len(tok), dim=32, heads=4, kv_heads=2, layers=2, length=64)).eval()
