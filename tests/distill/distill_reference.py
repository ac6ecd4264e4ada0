"""The losses in float64 NumPy, one example or batch at a time, written from the papers."""

import numpy as np


def slope(f, x, step=1e-5):
    """The gradient of the scalar `f` at `x`, by central differences."""
    x = np.array(x, np.float64)
    result = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        kept = x[index]
        x[index] = kept + step
        above = f(x)
        x[index] = kept - step
        below = f(x)
        x[index] = kept
        result[index] = (above - below) / (2 * step)
    return result


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    return np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.where(p > 0, q, 1)), 0), -1)


def kd(s, t, T=1.0):
    return T**2 * kl(softmax(t / T), softmax(s / T))


def reverse_kl(s, t, T=1.0):
    return T**2 * kl(softmax(s / T), softmax(t / T))


def js(s, t, w=0.5, T=1.0):
    p, q = softmax(t / T), softmax(s / T)
    m = w * p + (1 - w) * q
    return T**2 * (w * kl(p, m) + (1 - w) * kl(q, m))


def standardized_kd(s, t, T=2.0):
    s, t = ((x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) for x in (s, t))
    return kd(s, t, T)


def l1(s, t, of="probabilities", T=1.0):
    change = softmax if of == "probabilities" else (lambda x: x)
    return np.abs(change(s / T) - change(t / T)).sum(-1)


def mse(s, t, of="logits", T=1.0):
    change = softmax if of == "probabilities" else (lambda x: x)
    return ((change(s / T) - change(t / T)) ** 2).mean(-1)


def dkd(s, t, labels, alpha=1.0, beta=8.0, T=4.0):
    loss = []
    for a, b, label in zip(s, t, labels, strict=True):
        p, q = softmax(b / T), softmax(a / T)
        binary = [np.array([x[label], 1 - x[label]]) for x in (p, q)]
        others = [np.delete(x, label) / (1 - x[label]) for x in (p, q)]
        loss.append(T**2 * (alpha * kl(*binary) + beta * kl(*others)))
    return np.array(loss)


def dist(s, t, inter=1.0, intra=1.0, T=1.0):
    q, p = softmax(s / T), softmax(t / T)
    rows = np.array([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
    columns = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    return T**2 * (inter * rows + intra * columns)


def hard(s, labels, smoothing=0.0):
    log_q = np.log(softmax(s))
    own = log_q[np.arange(len(labels)), labels]
    return -(1 - smoothing) * own - smoothing * log_q.mean(-1)


def sequence(s, tokens, normalize=False):
    log_q = np.log(softmax(s))
    loss = [-sum(row[i, k] for i, k in enumerate(y)) for row, y in zip(log_q, tokens, strict=True)]
    return np.array(loss) / (tokens.shape[1] if normalize else 1)
