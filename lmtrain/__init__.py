"""Notebooks that define, explain and are the code of every way to train a language model"""

__version__ = "0.1.0"

# Nothing heavy is imported here: these names are looked up in their modules at first use.
_names = {
    "batch": "Example Batch Noise Trace sees collate",
    "text": "train_bpe train_chars load_tokenizer examples chat",
    "corpora": "catalogue corpus apis link_graph",
    "model": "Size LM Transformer Cache with_heads load save to_transformers",
    "pretrained": "Pretrained obeys_mask",
    "objective": "Objective CLM PrefixLM shift hide nll logp annotated for_trainer",
    "optim": "adamw muon warmup_decay",
    "loader": "Loader",
    "train": "Task Trainer Callback Progress History",
    "checkpoint": "Save save_state load_state verify latest resume",
    "generation": "generate fill left_to_right confident random_order blocks until",
    "evaluate": "Evaluate bits_per_byte bits_interval held_loss likelihood pseudo_likelihood minimal_pairs choose "
                "exact_match interval",
    "objectives.masked": "MLM Spans Anneal RTD Electra words_of span_corrupt",
    "objectives.mixed": "Mix Curriculum Parts by_token by_sequence by_gradient ul2 fim",
    "objectives.diffusion": "Diffusion Uniform BlockDiffusion nelbo nelbo_bits linear cosine polynomial exact_k",
    "objectives.samplers": "unmask ancestral first_hitting most_confident threshold semi_autoregressive",
    "views": "paint paint_loss paint_sees paint_trace replay compare explore Watch",
}
_where = {name: module for module, names in _names.items() for name in names.split()}
__all__ = ["__version__", *_where]


def __getattr__(name: str):
    from importlib import import_module
    if name in _where: return getattr(import_module(f"lmtrain.{_where[name]}"), name)
    raise AttributeError(f"module 'lmtrain' has no attribute {name!r}")


def __dir__() -> list[str]: return sorted({*globals(), *__all__})
