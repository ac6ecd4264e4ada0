"""Losses on features in float64 NumPy, loop by loop, written from the papers."""

import itertools

import numpy as np


def unit(x):
    return x / np.linalg.norm(x)


def hints(s, t, kernel, bias):
    return np.mean((s @ kernel + bias - t) ** 2, -1)


def attention_transfer(s, t, power=2.0):
    maps = [[unit((np.abs(example) ** power).sum(-1).ravel()) for example in f] for f in (s, t)]
    return np.array([np.mean((a - b) ** 2) for a, b in zip(*maps, strict=True)])


def flow(early, late):
    """Of one example; both of the same positions."""
    early, late = (x.reshape(-1, x.shape[-1]) for x in (early, late))
    return sum(np.outer(a, b) for a, b in zip(early, late, strict=True)) / len(early)


def fsp(s, t):
    flows = [[flow(*pair) for pair in zip(*f, strict=True)] for f in (s, t)]
    return np.array([np.mean((a - b) ** 2) for a, b in zip(*flows, strict=True)])


def similarity(s, t):
    n, grams = len(s), []
    for f in (s, t):
        rows = f.reshape(n, -1)
        gram = np.array([[a @ b for b in rows] for a in rows])
        grams.append(np.array([unit(row) for row in gram]))
    return np.sum((grams[0] - grams[1]) ** 2) / n**2


def huber(x):
    return x**2 / 2 if abs(x) < 1 else abs(x) - 0.5


def distances(f):
    n = len(f)
    d = np.array([[np.linalg.norm(f[i] - f[j]) for j in range(n)] for i in range(n)])
    return d / d[d > 0].mean()


def cosine(a, b):
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return a @ b / size if size else 0.0


def relational(s, t, distance=1.0, angle=2.0):
    n = range(len(s))
    apart = np.mean([huber(x) for x in (distances(s) - distances(t)).ravel()])
    turned = np.mean(
        [
            huber(cosine(s[i] - s[k], s[j] - s[k]) - cosine(t[i] - t[k], t[j] - t[k]))
            for i, j, k in itertools.product(n, n, n)
        ]
    )
    return distance * apart + angle * turned


def crd(s, t, ours, theirs, scale, indices, negatives, T=0.07):
    """`ours` and `theirs` are the bank's rows, `scale` its Z or None."""
    examples, loss = len(ours), np.zeros(len(s))
    scales = []
    for side, (f, rows) in enumerate(((s, theirs), (t, ours))):
        g = np.array(
            [
                [np.exp(unit(a) @ rows[k] / T) for k in (i, *others)]
                for a, i, others in zip(f, indices, negatives, strict=True)
            ]
        )
        Z = g.mean() * examples if scale is None else scale[side]
        scales.append(Z)
        g, share = g / Z, negatives.shape[1] / examples
        h = g / (g + share)
        loss -= np.log(h[:, 0]) + np.log(1 - h[:, 1:]).sum(-1)
    return loss, np.array(scales)
