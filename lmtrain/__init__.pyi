# The names of `import lmtrain` and their modules, in the order of reading: for editors and type checkers, and for
# __init__.py, which looks a name up in its module at first use.
__version__: str

from .batch import (
    Example as Example, Batch as Batch, Noise as Noise, Trace as Trace, sees as sees, collate as collate,
)
from .text import (
    train_bpe as train_bpe, train_chars as train_chars, load_tokenizer as load_tokenizer, examples as examples,
    chat as chat,
)
from .corpora import catalogue as catalogue, corpus as corpus, apis as apis, link_graph as link_graph
from .model import (
    Size as Size, LM as LM, Transformer as Transformer, Cache as Cache, with_heads as with_heads, load as load,
    save as save, to_transformers as to_transformers,
)
from .pretrained import Pretrained as Pretrained, obeys_mask as obeys_mask
from .objective import (
    Objective as Objective, CLM as CLM, PrefixLM as PrefixLM, shift as shift, hide as hide, nll as nll,
    logp as logp, annotated as annotated, for_trainer as for_trainer,
)
from .optim import adamw as adamw, muon as muon, warmup_decay as warmup_decay
from .loader import Loader as Loader
from .train import Task as Task, Trainer as Trainer, Callback as Callback, Progress as Progress, History as History
from .checkpoint import (
    Save as Save, save_state as save_state, load_state as load_state, verify as verify, latest as latest,
    resume as resume,
)
from .generation import (
    generate as generate, fill as fill, left_to_right as left_to_right, confident as confident,
    random_order as random_order, blocks as blocks, until as until,
)
from .evaluate import (
    Evaluate as Evaluate, bits_per_byte as bits_per_byte, bits_interval as bits_interval, held_loss as held_loss,
    likelihood as likelihood, pseudo_likelihood as pseudo_likelihood, minimal_pairs as minimal_pairs,
    choose as choose, exact_match as exact_match, interval as interval,
)
from .objectives.masked import (
    MLM as MLM, Spans as Spans, Anneal as Anneal, RTD as RTD, Electra as Electra, words_of as words_of,
    span_corrupt as span_corrupt,
)
from .objectives.mixed import (
    Mix as Mix, Curriculum as Curriculum, Parts as Parts, by_token as by_token, by_sequence as by_sequence,
    by_gradient as by_gradient, ul2 as ul2, fim as fim,
)
from .objectives.diffusion import (
    Diffusion as Diffusion, Uniform as Uniform, BlockDiffusion as BlockDiffusion, nelbo as nelbo,
    nelbo_bits as nelbo_bits, linear as linear, cosine as cosine, polynomial as polynomial, exact_k as exact_k,
)
from .objectives.samplers import (
    unmask as unmask, ancestral as ancestral, first_hitting as first_hitting, most_confident as most_confident,
    threshold as threshold, semi_autoregressive as semi_autoregressive,
)
from .views import (
    paint as paint, paint_loss as paint_loss, paint_sees as paint_sees, paint_trace as paint_trace,
    replay as replay, compare as compare, explore as explore, Watch as Watch,
)
