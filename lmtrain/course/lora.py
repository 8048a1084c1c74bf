"The exercises of the chapter `lora`."
from typing import Any

import torch
from torch import nn

from .kit import Wrong, callable_of, exercise, expect, number, tensor


def parts(m: int = 6, n: int = 9, r: int = 2) -> tuple[torch.Tensor, ...]:
    return torch.randn(m, n), torch.randn(r, n), torch.randn(m, r)                     # W (m,n) A (r,n) B (m,r)


@exercise("lora-1", "The size of an adapter", "●", 5,
          "Two thin matrices: how many rows and columns has each?",
          "A has r rows of n numbers and B has m rows of r numbers.",
          "Rank 2 on a map from 3 to 5 trains 16 numbers.")
def adapter_size(answer: Any) -> None:
    value, n, m, r = number(answer), 4096, 11008, 16
    A, B = torch.empty(r, n, device="meta"), torch.empty(m, r, device="meta")
    truth = A.numel() + B.numel()
    expect(value != n * m, "that is the size of the weight itself")
    expect(value not in (A.numel(), B.numel()), "that is one of the two matrices")
    expect(value != r * n * m, "the sizes are added, not multiplied")
    expect(value == truth, "the two matrices were made just now, and together they have another number of entries")


@exercise("lora-2", "The output of an adapted map", "●", 5,
          "Multiply x with A first; the result is thin.",
          "The plain output is x @ W.T. The adapter's goes through A, then through B, then times s.",
          "For a map without adapter it would be x @ W.T alone.")
def low_rank(answer: Any) -> None:
    f = callable_of(answer, "a function of x, W, A, B and s")
    W, A, B = parts()
    x = torch.randn(4, 9)                                                              # (4,n)
    got = tensor(f(x, W, A, B, 2.0), (4, 6), "the output")
    want = x @ (W + 2.0 * B @ A).T                                                     # (4,m)
    expect(not torch.allclose(got, x @ W.T, atol=1e-4), "that is the plain map; the adapter is missing")
    expect(not torch.allclose(got, x @ (W + B @ A).T, atol=1e-4), "the scale is missing")
    expect(not torch.allclose(got, x @ (2.0 * B @ A).T, atol=1e-4), "that is the adapter alone; the plain map is missing")
    expect(torch.allclose(got, want, atol=1e-4), "the output differs from that of the merged weight")
    expect(torch.allclose(f(x, W, A, B, 0.0), x @ W.T, atol=1e-5), "with s = 0 it must be the plain map")


@exercise("lora-3", "Merging", "●", 5,
          "What is the scale, and in which order are the two matrices multiplied?",
          "The scale is alpha over r. The product must have the shape of W.",
          "With alpha = r the scale is 1.")
def merge(answer: Any) -> None:
    f = callable_of(answer, "a function of W, A, B, alpha and r")
    W, A, B = parts()
    got = tensor(f(W, A, B, 8.0, 2), (6, 9), "the merged weight")
    expect(not torch.allclose(got, W + 8.0 * B @ A, atol=1e-4), "the scale is alpha itself; it must be divided by r")
    expect(not torch.allclose(got, W + B @ A, atol=1e-4), "the scale is missing")
    expect(torch.allclose(got, W + 4.0 * B @ A, atol=1e-4), "with the merged weight the map gives another output than with the adapter")
    expect(not torch.allclose(W, got), "the weight did not change")


@exercise("lora-4", "The best adapter of a rank", "●●", 15,
          "The singular value decomposition orders the directions of a matrix by their size.",
          "Keep the r largest singular values; give each factor its share, for example all of them to B.",
          "For a matrix of rank 1, u times v, the best A of rank 1 is v and the best B is u.")
def best_adapter(answer: Any) -> None:
    f = callable_of(answer, "a function of a matrix and a rank")
    for r in (1, 3, 6):
        delta = torch.randn(8, 6)                                                      # (m,n)
        found = f(delta, r)
        expect(isinstance(found, tuple | list) and len(found) == 2, "the result must be two matrices, A and B")
        A, B = tensor(found[0], (r, 6), "A"), tensor(found[1], (8, r), "B")
        left = (delta - B @ A).norm()
        least = torch.linalg.svdvals(delta)[r:].norm()                                 # Eckart and Young (1936)
        expect(left < least + 1e-3, f"rank {r}: BA is {left:.2g} away, and a matrix of that rank comes closer")


@exercise("lora-5", "Merging in few bits", "●●", 15,
          "Each operation in bfloat16 rounds to about three digits.",
          "Convert all four to bfloat16 first; add s B A, subtract it again, convert back, and compare with the float32 W.",
          "In float32 the same round trip differs by about a millionth.")
def drift(answer: Any) -> None:
    f = callable_of(answer, "a function of W, A, B and s")
    W, A, B = parts(32, 48, 4)
    half = lambda t: t.to(torch.bfloat16)                                              # noqa: E731
    there = half(W) + 2.0 * half(B) @ half(A)
    truth = ((there - 2.0 * half(B) @ half(A)).float() - W).abs().max().item()
    value = number(f(W, A, B, 2.0))
    exact = ((W + 2.0 * B @ A - 2.0 * B @ A) - W).abs().max().item()
    expect(value > 0, "the difference is 0 or less: is it the largest absolute one, and against the float32 W?")
    expect(value > 10 * exact, "that is the drift in float32; convert to bfloat16 first")
    expect(truth / 4 < value < truth * 4, "the round trip was made just now, and its drift has another size")


@exercise("lora-6", "VeRA", "●●●", 45,
          "What is trained here, and what is only kept? Frozen tensors of a module are buffers.",
          "In __init__: keep plain, register A and B as buffers, make two parameters. In forward: the plain output plus b times B(d times Ax).",
          "A module that trains only a scale per output has one parameter (m,), and its forward is self.g * self.plain(x).")
def vera(answer: Any) -> None:
    if not (isinstance(answer, type) and issubclass(answer, nn.Module)): raise Wrong("a subclass of nn.Module is wanted here, not an instance or a function")
    _, A, B = parts(6, 9, 4)
    plain, x = nn.Linear(9, 6), torch.randn(5, 9)                                      # (5,n)
    m: Any = answer(plain, A.clone(), B.clone())
    expect(torch.allclose(m(x), plain(x), atol=1e-6), "at first it must compute what the plain map does: b begins with 0")
    trained = {n: p for n, p in m.named_parameters() if p.requires_grad}
    shapes = sorted(tuple(p.shape) for p in trained.values())
    expect(shapes == [(4,), (6,)], f"exactly d (r,) and b (m,) are trained, and here it is {', '.join(sorted(trained)) or 'nothing'}")
    expect({"d", "b"} <= {n.rpartition(".")[2] for n in trained}, "the parameters must be called d and b")
    d, b = m.d, m.b
    expect(torch.allclose(d.detach(), torch.full((4,), .1)), "d must begin with 0.1")
    with torch.no_grad(): b.normal_(); d.normal_()
    expect(torch.allclose(m(x), plain(x) + (d * (x @ A.T)) @ B.T * b, atol=1e-4), "the output is not Wx + b * B(d * Ax)")
