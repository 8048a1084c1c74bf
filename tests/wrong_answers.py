"Typical wrong answers to each exercise, and a part of the diagnosis that each must meet."
import math

import torch
import torch.nn.functional as F
from torch import nn

from lmtrain import CLM, Example, Objective, nll, shift


class Backwards(Objective):
    "Right labels; attention stays as it was."
    def corrupt(self, b, noise):
        before = lambda c: F.pad(c[:, :-1], (1, 0))
        return b.set(targets=before(b.clean), weights=((before(b.doc) == b.doc) & (b.doc > 0)).float())


class First(Backwards):
    "Each document's first token is in the loss."
    def corrupt(self, b, noise):
        return super().corrupt(b, noise).set(weights=(b.doc > 0).float(), order=-b.doc_pos)


class Blind(Backwards):
    "A position reads only itself."
    def corrupt(self, b, noise):
        T = b.ids.shape[1]
        doc = torch.where(b.doc > 0, torch.arange(1, T + 1).expand_as(b.doc), 0)
        return super().corrupt(b, noise).set(doc=doc)


class ByRow(CLM):
    "Divides by rows."
    def count(self, b): return {"byrow": torch.tensor(len(b))}


class OwnCount(CLM):
    "Weights by document, and counts tokens all the same."
    def corrupt(self, b, noise):
        q = shift(b)
        own = q.weights[:, :, None] * (b.doc[:, :, None] == b.doc[:, None, :])
        return q.set(weights=q.weights / own.sum(1).clamp(min=1))


def halves_of(P, ids): return -P[ids[1:], ids[:-1]].log().mean()


def empty_rows(x, V):
    n = torch.bincount((x[:-2] * V + x[1:-1]) * V + x[2:], minlength=V**3).view(V, V, V).float()
    return n / n.sum(-1, keepdim=True).clamp(min=1)


def nan_rows(x, V):
    n = torch.bincount((x[:-2] * V + x[1:-1]) * V + x[2:], minlength=V**3).view(V, V, V).float()
    return n / n.sum(-1, keepdim=True)


def flat(x, V): return torch.full((V, V, V), 1 / V)


def sees_last(model, ids):
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 11
    return not torch.allclose(model(changed)[0, :-1], model(ids)[0, :-1])


def sees_itself(model, ids):
    for j in range(ids.shape[1]):
        changed = ids.clone()
        changed[0, j] = (changed[0, j] + 1) % 11
        if not torch.allclose(model(changed)[0, :j + 1], model(ids)[0, :j + 1]): return True
    return False


class NotConstant(CLM):
    "The belief is not detached."
    def loss(self, model, b):
        cost = nll(model, b)
        return {self.name: (b.weights.flatten()[b.loss_positions] * cost * (-cost).exp()).sum()}


class Negative(CLM):
    "Minus the probabilities."
    def loss(self, model, b): return {self.name: -(b.weights.flatten()[b.loss_positions] * (-nll(model, b)).exp()).sum()}


def first_fit_in_order(lengths, T):
    rows, room = [], []
    for i, n in enumerate(lengths):
        if not room or room[-1] < n: rows.append([]); room.append(T)
        rows[-1].append(i); room[-1] -= n
    return rows


class FullVera(nn.Module):
    "The plain map is trained too."
    def __init__(self, plain, A, B):
        super().__init__()
        self.plain, self.d, self.b, self.A, self.B = plain, nn.Parameter(torch.full((A.shape[0],), .1)), nn.Parameter(torch.zeros(B.shape[0])), A, B

    def forward(self, x): return self.plain(x) + self.b * ((self.d * (x @ self.A.T)) @ self.B.T)


class ZeroVera(FullVera):
    "Both vectors begin with 0."
    def __init__(self, plain, A, B):
        super().__init__(plain.requires_grad_(False), A, B)
        self.d.data.zero_()


WRONG = {
    "start-1": [(math.log2(27), "in bits"), (27, "perplexity"), (-math.log(27), "the sign"), (1.0, "another number"), ("three", "one number")],
    "start-2": [(lambda P, ids: P[ids[:-1], ids[1:]].log().mean(), "negative"), (lambda P, ids: -P[ids[:-1], ids[1:]].log().sum(), "sum over the pairs"),
                (halves_of, "after the second"), (lambda P, ids: 1.0, "another number"), (lambda P, ids: P, "one number")],
    "start-3": [(lambda loss: 2 ** loss, "which is for bits"), (lambda loss: loss, "the loss itself"), (lambda loss: 5.0, "another number")],
    "start-4": [(lambda z, t: z.softmax(-1), "nothing changed"), (lambda z, t: (z * t).softmax(-1), "wrong way round"),
                (lambda z, t: (z / t).softmax(-1), "division by zero"), (lambda z, t: z / max(t, 1e-9), "sum to 1"),
                (lambda z, t: None, "return")],
    "start-5": [(nan_rows, "divided by 0"), (empty_rows, "back off"), (flat, "not the share"), (lambda x, V: torch.zeros(V, V), "shape")],
    "start-6": [(lambda m, ids: False, "misses the leak"), (lambda m, ids: True, "sees a leak"), (sees_last, "misses the leak"),
                (sees_itself, "sees a leak"), (lambda m, ids: None, "True or False")],
    "objective-1": [(math.log2(1000), "in bits"), (1000, "perplexity"), (0.5, "another number"), ([1, 2], "one number")],
    "objective-2": [(shift, "every position"), (lambda b: (q := shift(b)).set(weights=q.weights * (torch.arange(b.ids.shape[1]) % 2 == 0)), "columns of the row"),
                    (lambda b: shift(b).set(weights=(b.doc_pos % 2 == 0).float()), "without a label"),
                    (lambda b: (q := shift(b)).set(weights=q.weights * (b.doc_pos % 2 == 1)), "positions 0, 2, 4"),
                    (lambda b: b.ids, "must be a Batch"),
                    (lambda b: (q := shift(b)).set(weights=q.weights * (b.doc_pos % 2 == 0), targets=b.clean), "labels changed")],
    "objective-3": [(18, "padding too"), (15, "has no label"), (14, "one document"), (11, "another number")],
    "objective-4": [(lambda p, r: Example(p + r), "prompt's own tokens"), (lambda p, r: Example(r), "the ids are"),
                    (lambda p, r: Example(p + r, [False] * (len(p) + 1) + [True] * (len(r) - 1)), "labels in the loss"), (lambda p, r: p + r, "Example")],
    "objective-5": [(lambda s, n: sum(a / b for a, b in zip(s, n, strict=True)) / len(s), "mean of the pieces"), (lambda s, n: sum(s), "not yet divided"),
                    (lambda s, n: 1.0, "another number"), (lambda s, n: sum(a / b for a, b in zip(s, n, strict=True) if b) / sum(b > 0 for b in n), "mean of the pieces")],
    "objective-6": [(CLM, "first token of a document"), (Backwards, "its own label"), (First, "first token of a document"), (Blind, "does not attend"), (3, "an objective is wanted")],
    "objective-7": [(lambda z, y, eps: F.cross_entropy(z, y, reduction="none"), "plain cross-entropy"),
                    (lambda z, y, eps: (1 - eps) * F.cross_entropy(z, y, reduction="none") - eps * z.log_softmax(-1).sum(-1), "all V of them"),
                    (lambda z, y, eps: F.cross_entropy(z, y, label_smoothing=eps), "shape"),
                    (lambda z, y, eps: F.cross_entropy(z, y, reduction="none") + eps, "differ from PyTorch's")],
    "objective-8": [(CLM, "mean over all tokens"), (OwnCount, "number of documents"), (ByRow, "documents' own means"), (7, "an objective is wanted")],
    "instruct-1": [(5, "never stop"), (9, "markers"), (15, "user's tokens"), (3, "another number")],
    "instruct-2": [(lambda row: [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answers"]}], "list of answers"),
                   (lambda row: [{"role": "human", "content": row["question"]}, {"role": "gpt", "content": row["answers"][0]}], "roles must be"),
                   (lambda row: row, "list of dicts"), (lambda row: [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answers"][-1]}], "first answer")],
    "instruct-3": [(lambda e: e, "nothing changed"), (lambda e: Example(list(e.ids), [False] * len(e)), "not wholly"), (lambda e: list(e.ids), "an Example"),
                   (lambda e: Example(list(e.ids), [i < 12 for i in range(len(e))]), "prompt is in the loss")],
    "instruct-4": [(lambda e, T: Example(list(e.ids)[:T], list(e.answer)[:T]), "not whole"), (lambda e, T: Example(list(e.ids)[-T:], list(e.answer)[-T:]), "must be None"),
                   (lambda e, T: e, "the result has"), (lambda e, T: Example([i for i, a in zip(e.ids, e.answer, strict=True) if a]), "more of the prompt")],
    "instruct-5": [(lambda n, T: [[i] for i in range(len(n))], "needs fewer"), (lambda n, T: [[*range(len(n))]], "longer than T"),
                   (lambda n, T: [n], "exactly one row"), (lambda n, T: 3, "list of rows"), (first_fit_in_order, "needs fewer")],
    "instruct-6": [(CLM, "plain one"), (NotConstant, "must be a constant"), (Negative, "negative"), (3, "a subclass of CLM")],
    "lora-1": [(4096 * 11008, "weight itself"), (16 * 4096, "one of the two"), (16 * 4096 * 11008, "not multiplied"), (7, "another number")],
    "lora-2": [(lambda x, W, A, B, s: x @ W.T, "adapter is missing"), (lambda x, W, A, B, s: x @ W.T + (x @ A.T) @ B.T, "scale is missing"),
               (lambda x, W, A, B, s: s * (x @ A.T) @ B.T, "adapter alone"), (lambda x, W, A, B, s: x, "must have the shape")],
    "lora-3": [(lambda W, A, B, alpha, r: W + alpha * B @ A, "divided by r"), (lambda W, A, B, alpha, r: W + B @ A, "scale is missing"),
               (lambda W, A, B, alpha, r: W, "another output"), (lambda W, A, B, alpha, r: B @ A @ B, "shape")],
    "lora-4": [(lambda d, r: (d[:r], d[:, :r]), "comes closer"), (lambda d, r: d, "two matrices"), (lambda d, r: (torch.randn(d.shape[0], r), torch.randn(r, d.shape[1])), "shape"),
               (lambda d, r: (torch.zeros(r, d.shape[1]), torch.zeros(d.shape[0], r)), "comes closer")],
    "lora-5": [(lambda W, A, B, s: ((W + s * B @ A - s * B @ A) - W).abs().max(), "in float32"), (lambda W, A, B, s: 0.0, "0 or less"), (lambda W, A, B, s: 100.0, "another size"),
               (lambda W, A, B, s: W, "one number")],
    "lora-6": [(nn.Linear, "stopped with"), (lambda plain, A, B: plain, "is wanted here"), (FullVera, "exactly d"), (ZeroVera, "begin with 0.1")],
    "adapt-1": [(90, "tenth of the new"), (1000, "in all"), (10, "is another")],
    "adapt-2": [(lambda a, b: max(b.count(c) for c in b) / len(b), "nobody knows"), (lambda a, b: sum(x == max(a, key=a.count) for x in b), "share is wanted"), (lambda a, b: .5, "another share"), (lambda a, b: a, "one number")],
    "adapt-3": [(lambda e, labels: e, "kind is missing"), (lambda e, labels: Example(list(e.ids), tokens={"kind": [-100 if v is None else v for v in labels]}), "are gone"),
                (lambda e, labels: Example(list(e.ids), tokens={**e.tokens, "kind": [v or 0 for v in labels]}), "other positions"),
                (lambda e, labels: Example(list(e.ids), tokens={**e.tokens, "kind": labels}), "None cannot")],
    "adapt-4": [(lambda h, doc: h.mean(1), "padding counts"), (lambda h, doc: (h * (doc > 0)[..., None]).sum(1) / 6, "divided by the number"), (lambda h, doc: h[:, -1], "real tokens is another"), (lambda h, doc: h, "shape")],
    "adapt-5": [(lambda m: m, "still trained"), (lambda m: m.requires_grad_(False), "nothing is trained"), (lambda m: None, "return")],
    "adapt-6": [(lambda m, s, f, k: k * sum((f[n] * (p - s[n]) ** 2).sum() for n, p in m.named_parameters()), "half is missing"),
                (lambda m, s, f, k: .5 * sum((f[n] * (p - s[n]) ** 2).sum() for n, p in m.named_parameters()), "strength is missing"),
                (lambda m, s, f, k: k / 2 * sum(((p - s[n]) ** 2).sum() for n, p in m.named_parameters()), "Fisher"),
                (lambda m, s, f, k: 3.0, "has not moved"), (lambda m, s, f, k: k / 2 * sum((f[n] * (p.detach() - s[n]) ** 2).sum() for n, p in m.named_parameters()), "with a gradient")],
    "economics-1": [(1500, "one training"), (1000, "three times"), (400, "is another")],
    "economics-2": [(lambda T: T * T, "all pairs"), (lambda T: T * (T - 1) / 2 + (T == 1), "itself"), (lambda T: T + 5, "number of ones"), (lambda T: "many", "one number")],
    "economics-3": [(lambda p, e: 1 - e / p, "still must be read"), (lambda p, e: p / max(e, 1), "at most 1"), (lambda p, e: .5, "another share")],
    "economics-4": [(lambda D, s, q, t, r, u: t * D / (r * s), "own price"), (lambda D, s, q, t, r, u: t * D / (r * (s + q) - u * q), "never pays"), (lambda D, s, q, t, r, u: 1., "another number")],
    "economics-5": [(lambda T, p, t, a, b, w: T / (p - t) if p > t else math.inf, "missing"), (lambda T, p, t, a, b, w: T / (p + w * a - t - w * b) if p + w * a > t + w * b else math.inf, "right answers"),
                    (lambda T, p, t, a, b, w: 7., "another number")],
    "economics-6": [(lambda T, a, b: T / (sum(a) / len(a) - sum(b) / len(b)), "three numbers"), (lambda T, a, b: (1., 2., 3.), "without width"),
                    (lambda T, a, b: (T / (sum(a) / len(a) - sum(b) / len(b)),) * 3, "inside the interval")],
    "embed-1": [(3, "query's own documents"), (32, "leaves out the hard negatives"), (65, "only the query's own hard"), (95, "leaves out the right"), (128, "counts the queries"), (9, "count all rows")],
    "embed-2": [(lambda h, keep: h.mean(1), "all positions"), (lambda h, keep: (h * keep[..., None]).mean(1), "length of the row"),
                (lambda h, keep: (h * keep[..., None]).sum(1), "that is the sum"), (lambda h, keep: F.normalize((h * keep[..., None]).sum(1), dim=-1), "unit length"),
                (lambda h, keep: h, "shape")],
    "embed-3": [(6, "in bits"), (math.log(63), "one of those compared"), (math.log(64) / .02, "stay equal"), (1, "same probability")],
    "embed-4": [(lambda q, d, tau: F.cross_entropy(d @ q.T / tau, torch.arange(len(q))), "over queries"),
                (lambda q, d, tau: F.cross_entropy(q @ d.T / tau, torch.arange(len(q)), reduction="sum"), "sum over queries"),
                (lambda q, d, tau: F.cross_entropy(q @ d.T * tau, torch.arange(len(q))), "divided by it"),
                (lambda q, d, tau: F.cross_entropy(q @ d.T, torch.arange(len(q))), "not used"), (lambda q, d, tau: q @ d.T, "shape")],
    "embed-5": [(lambda s, right, k: (s.argmax(1) == right).float().mean().item(), "recall at 1"),
                (lambda s, right, k: (s.topk(min(k + 1, s.shape[1])).indices == right[:, None]).any(1).float().mean().item(), "one document too many"),
                (lambda s, right, k: ((-s).topk(k).indices == right[:, None]).any(1).float().mean().item(), "smallest scores"),
                (lambda s, right, k: (s.topk(k).indices == right[:, None]).any(1).sum().item(), "number of queries")],
    "embed-6": [(lambda s, docs: s, "still counts"), (lambda s, docs: s.masked_fill(torch.tensor([[a == b for b in docs] for a in docs]), -math.inf), "right documents are lost"),
                (lambda s, docs: s.masked_fill(torch.tensor([[a == b for b in docs] for a in docs]) & ~torch.eye(len(docs)).bool(), 0.), "still counts"),
                (lambda s, docs: s.masked_fill(~torch.eye(len(docs)).bool(), -math.inf), "another text")],
    "grit-1": [(20_000, "read once with a cache"), (20_800, "without a cache"), (1_300, "with a cache"), (5, "both ways")],
    "grit-2": [(lambda n, e: list(range(n)) if e else [0] * n, "exchanged"), (lambda n, e: list(range(n)), "same number everywhere"),
               (lambda n, e: [0] * n, "counts its positions"), (lambda n, e: [0] * (n + 1), "must have")],
    "grit-3": [(3, "mean over rows"), (2.5, "mean over tokens"), (-.5, "sign"), (1, "both means")],
    "grit-4": [(lambda n, T: torch.ones(T, T).tril().bool(), "read causally"), (lambda n, T: torch.ones(T, T).tril().bool() | (torch.arange(T) < n)[:, None], "comes behind"),
               (lambda n, T: ~(torch.ones(T, T).tril().bool() | (torch.arange(T) < n)[:, None] & (torch.arange(T) < n)), "exchanged: true"),
               (lambda n, T: (torch.ones(T, T).tril().bool() | (torch.arange(T) < n)[:, None] & (torch.arange(T) < n)).T, "rows and columns"),
               (lambda n, T: torch.ones(T), "shape")],
    "grit-5": [(lambda rows, sub: sum(map(sum, rows)) / sum(map(len, rows)), "over all tokens"), (lambda rows, sub: sum(sum(r) / len(r) for r in rows) / len(rows), "mean over rows"),
               (lambda rows, sub: (lambda m, g: sum(sum(x) / len(x) for x in g(m)) / len(g(m)))([sum(r) / len(r) for r in rows], lambda m: [m[i:i + sub] for i in range(0, len(m), sub)]),
                "over tokens, not over rows"), (lambda rows, sub: 0., "another number")],
    "grit-6": [(lambda a, b, c, d, e: a * b * c * d * e, "keys and values"), (lambda a, b, c, d, e: 2 * a * b * c * d, "several bytes"),
               (lambda a, b, c, d, e: 2 * b * c * d * e, "every layer"), (lambda a, b, c, d, e: 7, "multiply")],
}
