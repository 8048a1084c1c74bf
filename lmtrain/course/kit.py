"What an exercise is, and how an answer to it is checked."
# An exercise is a function of an answer that raises `Wrong`, above it the decorator `exercise`. It tests properties (an
# identity, a brute-force sum, a planted leak), never equality with a kept solution, and no message holds the answer.
from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

EMPTY, WRONG, RIGHT = "empty", "wrong", "right"
SIGNS = {EMPTY: "○", WRONG: "✗", RIGHT: "✓"}


class Wrong(Exception):
    "An answer is wrong; the message says in the reader's terms where, and does not hold the answer."


@dataclass
class Exercise:
    "One exercise of a chapter; `given` hints were shown since the kernel started, and `state` is that of the last answer."
    id: str
    title: str
    level: str
    minutes: int
    hints: tuple[str, str, str]
    test: Callable[[Any], None]
    given: int = 0
    state: str = EMPTY


def exercise(id: str, title: str, level: str, minutes: int, *hints: str) -> Callable[[Callable[[Any], None]], Exercise]:
    """Make an exercise of a function that raises `Wrong`. `level` is ●, ●● or ●●●.

    The three hints are: where to look, the first step, and a different case that is solved.
    """
    where, first, other = hints
    return lambda test: Exercise(id, title, level, minutes, (where, first, other), test)


@dataclass(frozen=True)
class Report:
    "What `check` found. It is true only if the answer is right."
    id: str
    state: str
    message: str

    def __bool__(self) -> bool: return self.state == RIGHT

    def __repr__(self) -> str: return f"{SIGNS[self.state]} {self.id}: {self.message}"


class States(str):
    "A list of exercises with their states, a line each."
    def __repr__(self) -> str: return str(self)


def chapters() -> list[str]:
    "The chapters that have exercises."
    return sorted(p.stem for p in Path(__file__).parent.glob("[a-z]*.py") if p.stem not in ("kit", "copies"))


def exercises(chapter: str) -> dict[str, Exercise]:
    "The exercises of a chapter by their ids."
    found = vars(import_module(f"lmtrain.course.{chapter}")).values()
    return {e.id: e for e in found if isinstance(e, Exercise)}


def find(id: str) -> Exercise:
    "The exercise of this id. Raises ValueError if there is none, with names that are close."
    chapter = str(id).rpartition("-")[0]
    known = exercises(chapter) if chapter in chapters() else {}
    if id in known: return known[id]
    near = list(known) or get_close_matches(chapter or str(id), chapters(), 3, 0.3) or chapters()
    raise ValueError(f"no exercise {id!r}: " + (f"choose from {', '.join(near)}" if known else
                                               f"ids are a chapter and a number; chapters are {', '.join(near)}"))


@contextmanager
def apart() -> Iterator[None]:
    "Random numbers from seed 0, gradients on, the CPU; and afterwards all random states as they were."
    import numpy as np
    import torch
    kept, grad, dtype = (random.getstate(), np.random.get_state()), torch.is_grad_enabled(), torch.get_default_dtype()
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
            random.seed(0); np.random.seed(0); torch.random.default_generator.manual_seed(0)
            torch.set_default_dtype(torch.float32)
            yield
    finally:
        random.setstate(kept[0]); np.random.set_state(kept[1])
        torch.set_grad_enabled(grad); torch.set_default_dtype(dtype)


def judged(e: Exercise, answer: Any) -> tuple[str, str]:
    "The state of an answer, and what is to be said of it. Never raises on an answer."
    if answer is None or answer is ... or (isinstance(answer, str) and not answer.strip()):
        return EMPTY, f"no answer yet ({e.title}; {e.level}, {e.minutes} min)"
    try:
        with apart(): e.test(answer)
    except Wrong as fault: return WRONG, str(fault)
    except NotImplementedError: return EMPTY, f"not written yet ({e.title}; {e.level}, {e.minutes} min)"
    except (Exception, SystemExit) as fault:
        return WRONG, f"your answer stopped with {type(fault).__name__}: {fault}"
    return RIGHT, f"right ({e.title})"


def check(id: str | None = None, answer: Any = ...) -> Report | States:
    """Check an answer; without arguments list the exercises that were tried, and the other ones of their chapters.

    A wrong answer gets a diagnosis and the next of three hints. Raises ValueError if there is no such exercise.
    """
    if id is None: return states()
    e = find(id)
    e.state, message = judged(e, answer)
    if e.state == WRONG: message += f"\n  {_next(e)}"
    return Report(id, e.state, message)


def _next(e: Exercise) -> str:
    "The next hint of an exercise; after the third, the third."
    e.given = min(e.given + 1, 3)
    return f"hint {e.given} of 3: {e.hints[e.given - 1]}"


def hint(id: str) -> States:
    "The next hint of an exercise, without an attempt. Raises ValueError if there is no such exercise."
    return States(_next(find(id)))


def states() -> States:
    "A line an exercise, of the chapters in which something was tried; if nothing was, of all."
    every = {c: exercises(c).values() for c in chapters()}
    begun = {c: es for c, es in every.items() if any(e.given or e.state != EMPTY for e in es)} or every
    return States("\n".join(f"{SIGNS[e.state]} {e.id:<14} {e.level:<4} {e.minutes:>2} min  {e.title}"
                            for es in begun.values() for e in es))


# ---- what specifications are made of

def expect(holds: Any, otherwise: str) -> None:
    "Raise `Wrong` unless `holds`."
    if not holds: raise Wrong(otherwise)


def number(answer: Any) -> float:
    "An answer that is to be a number. Raises Wrong if it is none."
    try: value = float(answer)
    except (TypeError, ValueError, RuntimeError): value = float("nan")
    expect(value == value and abs(value) != float("inf"), f"one number is wanted here, and this is {kind(answer)}")
    return value


def kind(answer: Any) -> str:
    "What an answer is, in a few words."
    shape = getattr(answer, "shape", None)
    if shape is not None: return f"a {type(answer).__name__} of shape {tuple(shape)}"
    name = "nothing: is a `return` missing?" if answer is None else f"{re.sub('^<|>$', '', repr(answer))[:40]}"
    return name


def callable_of(answer: Any, what: str) -> Callable:
    "An answer that is to be a function. Raises Wrong if it is none."
    expect(callable(answer), f"{what} is wanted here, and this is {kind(answer)}")
    return answer


def result(found: Any, wanted: type) -> Any:
    "A result that is to be of a type. Raises Wrong, with the type it has instead."
    article = "an" if wanted.__name__[0] in "AEIO" else "a"
    expect(isinstance(found, wanted), f"the result must be {article} {wanted.__name__}, and it is {type(found).__name__}")
    return found


def tensor(value: Any, shape: tuple[int, ...], of: str) -> Any:
    "A result that is to be a tensor of this shape. Raises Wrong, with what it is instead."
    import torch
    expect(isinstance(value, torch.Tensor), f"{of} must be a tensor, and it is {kind(value)}")
    expect(tuple(value.shape) == shape, f"{of} must have the shape {shape}, and it has {tuple(value.shape)}")
    return value
