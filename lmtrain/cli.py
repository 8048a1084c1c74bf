"The command line: `lmtrain tour`, `train`, `reproduce`, `lab`, `course`, `generate`, `evaluate`, `data`, `doctor`."
# Heavy imports wait inside the commands, so that `lmtrain --help` answers at once. Every error is one line that says
# what is wrong and what to do; `--debug` adds the traceback.
from __future__ import annotations

import ctypes
import errno
import io
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Optional

import typer

from . import __version__

app = typer.Typer(name="lmtrain", no_args_is_help=True, pretty_exceptions_enable=False,
                  context_settings={"help_option_names": ["-h", "--help"]})
data_app = typer.Typer(no_args_is_help=True, help="Text to train on: what is known by name, and where it comes from.")
app.add_typer(data_app, name="data")


_SCALED = "; by default that of the scale in settings.ini (LMTRAIN_SCALE)."


def _completed(names: Iterable[str], begun: str) -> list[str]: return [n for n in names if n.startswith(begun)]


# What the shell completes. Without pandas and torch, which would keep it waiting.
def _corpora(begun: str) -> list[str]:
    import json
    from .settings import data_file
    known = json.loads(data_file("catalogue.json").read_text(encoding="utf-8"))
    return _completed(["python-docs", *(e["name"] for e in known)], begun)


def _labs(begun: str) -> list[str]:
    from .labs.serve import CLASSES
    return _completed(CLASSES, begun)


def _scales(begun: str) -> list[str]:
    from .settings import scales
    return _completed(scales(), begun)


def _experiments(begun: str) -> list[str]:
    files = sorted(Path(__file__).parent.glob("experiments/[!_]*.py"))
    return _completed([p.stem.replace("_", "-") for p in files], begun)


def _version(wanted: bool) -> None:
    if wanted: print(f"lmtrain {__version__}"); raise typer.Exit


@app.callback()
def _lmtrain(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                                   help="Print the version and stop.")] = False,
             debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    "Train small language models, and see how it is done."


@app.command()
def tour(data: Annotated[str, typer.Option(help="A name of `lmtrain data list`, a path, or owner/name on the hub.",
                                           autocompletion=_corpora)] = "shakespeare",
         minutes: Annotated[Optional[float], typer.Option(help="How long to train; by default 3.")] = None,
         steps: Annotated[Optional[int], typer.Option(help="How many steps to train, instead of minutes.")] = None,
         column: Annotated[str, typer.Option(help="Which column of the data is the text.")] = "text",
         lines: Annotated[bool, typer.Option("--lines", help="Each line of a text file is a document.")] = False,
         out: Annotated[str, typer.Option(help="Where the report, the samples and the model go.")] = "tour",
         scale: Annotated[Optional[str], typer.Option(help="Sizes: laptop, classroom or gpu.", autocompletion=_scales)] = None,
         ) -> None:
    "Train a small language model on real text, and write a report about its life."
    _quick_on_cpu()
    from .doctor import too_little
    from .settings import scale as sizes
    wanted = sizes(scale)
    if little := too_little(scale): print(f"lmtrain: {little}", file=sys.stderr)
    print("Starting ...", flush=True)
    from .tour import tour as run
    run(data, minutes, steps, out, sizes=wanted, column=column, lines=lines)


@app.command()
def train(data: Annotated[str, typer.Option(help="A name of `lmtrain data list`, a path, or owner/name on the hub.",
                                            autocompletion=_corpora)] = "shakespeare",
          objective: Annotated[str, typer.Option(help='What to ask, such as "PrefixLM(cut=.5)", or module.Class.'
                                                 )] = "CLM",
          model: Annotated[str, typer.Option(help='A folder to go on from, or "Size(dim=256)"; by default a new one.'
                                             )] = "",
          steps: Annotated[int, typer.Option(help="How many steps to train.")] = 1000,
          out: Annotated[str, typer.Option(help="Where checkpoints, histories and the model go.")] = "run",
          column: Annotated[str, typer.Option(help="Which column of the data is the text.")] = "text",
          lines: Annotated[bool, typer.Option("--lines", help="Each line of a text file is a document.")] = False,
          rows: Annotated[Optional[int], typer.Option(min=1, help=f"Rows of a batch, on each process{_SCALED}")] = None,
          length: Annotated[Optional[int], typer.Option(min=1, help=f"Tokens of a row{_SCALED}")] = None,
          window: Annotated[int, typer.Option(help="Batches of a step.")] = 1,
          lr: Annotated[Optional[float], typer.Option(help=f"The highest learning rate{_SCALED}")] = None,
          seed: Annotated[int, typer.Option(help="Another seed, another run.")] = 0,
          lora: Annotated[int, typer.Option(min=0, help="Train an adapter of this rank, and merge it at the end.")] = 0,
          ) -> None:
    "Train any model on any text with any objective; under torchrun or accelerate launch on all their processes."
    _quick_on_cpu()
    sys.path.insert(0, "")  # an objective of one's own lies in the folder one is in
    from .run import Job, train as run
    if lr is not None and not lr > 0: raise ValueError(f"lr must be more than 0, not {lr}")
    run(Job(objective, model, data, column, lines, steps, rows or 0, length or 0, window, lr or 0.0, seed, lora), out)


@app.command()
def reproduce(wanted: Annotated[Optional[list[str]], typer.Argument(help="Names of experiments, as --list prints them.",
                                                                    autocompletion=_experiments)] = None,
              every: Annotated[bool, typer.Option("--all", help="Run all experiments.")] = False,
              listing: Annotated[bool, typer.Option("--list", help="Print the experiments and stop.")] = False,
              seeds: Annotated[int, typer.Option(help="How many seeds each.")] = 3,
              size: Annotated[float, typer.Option(help="Multiplies the numbers of steps.")] = 1.0,
              out: Annotated[str, typer.Option(help="Where the runs and the page of results go.")] = "results",
              page: Annotated[Optional[str], typer.Option(help="Where the page goes, if not beside the runs.")] = None,
              budget: Annotated[Optional[float], typer.Option(help="Minutes; the stalest runs come first.")] = None,
              again: Annotated[bool, typer.Option("--again", help="Make runs anew that are kept.")] = False,
              as_json: Annotated[bool, typer.Option("--json", help="Print verdicts and rows as JSON.")] = False) -> None:
    "Measure claims of papers again, and write the page of results."
    _quick_on_cpu()
    from .reproduce import experiment, names, reproduce as run, told
    if listing:
        for name in names(): print(f"{name:<12} {experiment(name).claim.text}\n{'':<12} {experiment(name).claim.source}")
        return
    if not (wanted or every): raise ValueError("name an experiment, or --all; lmtrain reproduce --list prints them")
    chosen = names() if every else [n.replace("_", "-") for n in wanted or []]
    say = (lambda text: print(text, file=sys.stderr)) if as_json else print
    run(chosen, seeds, size, out, budget, again, say, page)
    if as_json: print(told(chosen, out))


@app.command()
def generate(model: Annotated[str, typer.Argument(help="A folder with a model, such as tour/model.")],
             prompt: Annotated[str, typer.Option(help="What the text begins with.")] = "",
             tokens: Annotated[Optional[int], typer.Option(help="How many tokens at most; by default 1,024, or as many as the model reads.")] = None,
             temperature: Annotated[float, typer.Option(help="0: the likeliest; 1: as the model says.")] = 0.7,
             top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens with this probability.")] = 0.8,
             seed: Annotated[int, typer.Option(help="Another seed, another text.")] = 0) -> None:
    "Write a text with a saved model."
    from .generation import generate as write
    from .run import opened, roomy
    from .train import fitting_device
    if not 0 <= seed < 2**32: raise ValueError(f"seed must be from 0 to 2**32 - 1, not {seed}")
    lm, tok = opened(model)
    if not lm.causal: raise ValueError("this model was trained with both sides in view and cannot write left to right")
    words = tok(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    ids = [tok.bos_token_id, *words]  # type: ignore[misc]
    room = roomy(lm) - len(ids)
    if room < 1: raise ValueError(f"the prompt has {len(ids)} tokens, and the model reads {roomy(lm)}: shorten it")
    if tokens is not None and tokens < 1: raise ValueError(f"tokens must be more than 0, not {tokens}")
    t = write(lm.to(fitting_device()), [ids], min(tokens or 1024, room), temperature, top_p, tok.eos_token_id, seed)
    print(tok.decode(t.ids[0][t.when[0] >= 0], skip_special_tokens=True))


@app.command()
def evaluate(model: Annotated[str, typer.Argument(help="A folder with a model, such as tour/model.")],
             data: Annotated[str, typer.Option(help="Whose held-out documents to score.", autocompletion=_corpora)] = "shakespeare",
             column: Annotated[str, typer.Option(help="Which column of the data is the text.")] = "text",
             lines: Annotated[bool, typer.Option("--lines", help="Each line of a text file is a document.")] = False) -> None:
    "Score a saved model on held-out documents, in bits per byte."
    _quick_on_cpu()
    from .corpora import corpus
    from .evaluate import between, document_bits
    from .run import opened, roomy
    from .text import examples
    from .train import fitting_device
    lm, tok = opened(model)
    rows = examples(corpus(data, column, lines=lines)["validation"]["text"][:], tok, min(roomy(lm), 1024))
    bits, sizes = document_bits(lm.to(fitting_device()), rows)
    print(f"{bits.sum() / sizes.sum():.3f} bits per byte ({between(bits, sizes)}) on {rows.nbytes:,} bytes of {data}")


@app.command()
def lab(name: Annotated[Optional[str], typer.Argument(help="masking, noise or loss; without one, the notebooks.",
                                                             autocompletion=_labs)] = None,
        voila: Annotated[bool, typer.Option("--voila", help="Serve the lab alone, as an app.")] = False,
        html: Annotated[Optional[str], typer.Option(help="Write the lab as one page that needs no kernel, and stop.")] = None,
        folder: Annotated[str, typer.Option(help="Where your copy of the notebooks is.")] = "lmtrain-notebooks",
        port: Annotated[int, typer.Option(help="The server's port; by default a free one.")] = 0,
        browser: Annotated[bool, typer.Option(help="Open a browser.")] = True,
        copy: Annotated[bool, typer.Option("--copy", help="Copy the notebooks for a Jupyter of your own, and stop.")] = False,
        ) -> None:
    "Open a lab, or the notebooks, in JupyterLab: on this machine only, behind a token."
    from .labs.serve import copied, serve, write_page
    if copy: return print("\n".join(copied(Path(folder))))
    if html is None: return serve(name, Path(folder), voila, port, browser)
    if name is None: raise ValueError("name the lab that is to be written: lmtrain lab masking --html masking.html")
    print(f"written: {write_page(name, Path(html))}")


@app.command()
def course(student: Annotated[Optional[Path], typer.Option(help="Copy the chapters here, without solutions.")] = None,
           teacher: Annotated[Optional[Path], typer.Option(help="Copy the chapters here, with solutions.")] = None,
           clear: Annotated[bool, typer.Option("--clear", help="Drop all outputs from the student's copy.")] = False) -> None:
    "Copy the chapters for a class: exercises for students, solutions for teachers."
    from .course.copies import course as copies
    print("\n".join(copies(student, teacher, clear)))


@data_app.command("list")
def data_list() -> None:
    "Print the corpora that are known by name."
    from .corpora import catalogue
    for name, c in catalogue().iterrows():
        size = f"{c.megabytes:.1f} MB" if c.megabytes else "no download"
        print(f"{name:<12} {size:>11}  {c.about}\n{'':<26}licence: {c.licence}")
    from .finetuning.models import known_models
    print("\nPretrained models:")
    for name, m in known_models().iterrows(): print(f"{name:<12} {m.megabytes:>8.1f} MB  {m.about}\n{'':<26}licence: {m.licence}")
    print("\nA path to txt, jsonl, csv, tsv or parquet, also .gz, works as well, and owner/name on the hub.")


@data_app.command("get")
def data_get(name: Annotated[str, typer.Argument(help="A name of `lmtrain data list`, a path, or owner/name.", autocompletion=_corpora)],
             column: Annotated[str, typer.Option(help="Which column of the data is the text.")] = "text",
             lines: Annotated[bool, typer.Option("--lines", help="Each line of a text file is a document.")] = False) -> None:
    "Fetch a corpus or a pretrained model, check it, and say what is in it."
    from .finetuning.models import fetched, known_models
    if name in (models := known_models()).index:
        print(f"{models.loc[name].about}\nlicence: {models.loc[name].licence}", flush=True)
        return print(f"kept in {fetched(name)}")
    from .corpora import catalogue, corpus
    from .settings import cache_dir
    known = catalogue()
    if name in known.index: print(f"{known.loc[name].about}\nlicence: {known.loc[name].licence}", flush=True)
    for split, rows in corpus(name, column, lines=lines).items():
        print(f"{split:<10} {len(rows):>7,} documents, {sum(len(t.encode()) for t in rows['text'][:]) / 1e6:.2f} MB")
    if name in known.index: print(f"kept in {cache_dir()}")


@app.command()
def doctor() -> None:
    "Say what this machine has, and what is missing."
    from .doctor import doctor as examine
    if not examine(): raise typer.Exit(1)


def _quick_on_cpu() -> None:
    "Settings of a CPU process, before torch is loaded: a sixth of a step, and half of one on a busy machine."
    from .doctor import cores
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # a thread that waits gives its core to others soon
    if (n := cores()) < (os.cpu_count() or 1): os.environ.setdefault("OMP_NUM_THREADS", str(n))  # as a container allows
    if sys.platform == "linux":
        try: mallopt = ctypes.CDLL(None).mallopt
        except AttributeError: return  # another C library
        for option, size in ((-3, 2**30), (-1, 2**31 - 1)): mallopt(option, size)  # keep freed memory for the next step


def _explained(e: BaseException) -> str:
    full = isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(e)
    if full:  # libraries wrap it in errors of their own
        where = getattr(e, "filename", None) or "while writing"
        return (f"the disk is full ({where}): free some space, or choose another place with --out, or with "
                "LMTRAIN_CACHE for downloads")
    if isinstance(e, MemoryError) or any(t in str(e) for t in ("can't allocate memory", "out of memory", "bad_alloc")):
        return ("the memory is full: give more of it, or take less with --scale classroom (tour), or with smaller --rows "
                "or --length (train)")
    if isinstance(e, PermissionError) and e.filename and os.path.exists(e.filename) and not os.access(e.filename, os.R_OK):
        return f"{e.filename} may not be read by this user: ask its owner to allow it, with chmod -R a+rX"
    if isinstance(e, PermissionError) and e.filename:
        return f"{e.filename} may not be written: choose another place with --out, or with LMTRAIN_CACHE for downloads"
    if isinstance(e, ImportError): return f"{e}: install it with pip, or run lmtrain doctor to see what is missing"
    text = e.strerror + f": {e.filename}" if isinstance(e, OSError) and e.strerror and e.filename else str(e)
    return " ".join(text.split()) or type(e).__name__


def _at_home() -> None:
    "Where there is no home that may be used, libraries below get a place as well, instead of a folder called ~."
    from .settings import at_home, private_dir
    if at_home(): return
    for name, folder in {"HF_HOME": "huggingface", "MPLCONFIGDIR": "matplotlib"}.items():
        if name not in os.environ: os.environ[name] = str(private_dir() / folder)


def main() -> None:
    "Run a command; 0 is fine, 1 an error, 2 a wrong command line, 130 stopped by Ctrl-C."
    debug, words = "--debug" in sys.argv[1:], [w for w in sys.argv[1:] if w != "--debug"]
    warnings.formatwarning = lambda message, *_, **__: f"lmtrain: {message}\n"  # one line, as errors are
    for stream in (sys.stdout, sys.stderr):  # a letter that a terminal has not is a question mark there, and no error
        if isinstance(stream, io.TextIOWrapper): stream.reconfigure(errors="replace")
    try:
        _at_home()
        code = app(words, prog_name="lmtrain", standalone_mode=False) or 0
        sys.stdout.flush()
        if code == 130: print("\nlmtrain: stopped", file=sys.stderr)
        sys.exit(code)
    except (KeyboardInterrupt, typer.Abort): print("\nlmtrain: stopped", file=sys.stderr); sys.exit(130)
    except BrokenPipeError: os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()); sys.exit(1)
    except Exception as e:
        if hasattr(e, "format_message"):  # typer's own errors, about the command line; empty after printing help
            if wrong := e.format_message().rstrip("."): print(f"lmtrain: {wrong}; see lmtrain --help", file=sys.stderr)
            sys.exit(2)
        if debug: raise
        print(f"lmtrain: {_explained(e)}", file=sys.stderr); sys.exit(1)
