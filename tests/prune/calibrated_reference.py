"""Pruning on data in NumPy float64, as the papers have it; weights are `[in, out]`."""

import numpy as np


def damped(hessian, damping):
    hessian = np.asarray(hessian, np.float64).copy()
    hessian[np.diag_indices(len(hessian))] += damping * np.mean(np.diag(hessian))
    return hessian


def sparsegpt(weight, hessian, sparsity, *, nm=None, block=128, damping=0.01, bits=None):
    """Algorithm 1 of the paper: the inverse, its Cholesky factor, blocks, lazy updates.

    Returns the weights and the mask of what stays.
    """
    w = np.asarray(weight, np.float64).copy()
    inputs, outputs = w.shape
    upper = np.linalg.cholesky(np.linalg.inv(damped(hessian, damping))).T
    high = None if bits is None else 2 ** (bits - 1) - 1
    scale = None if bits is None else np.abs(w).max(0) / high
    mask, new = np.ones(w.shape, bool), np.zeros(w.shape)
    gone = 0
    for start in range(0, inputs, block):
        end = min(start + block, inputs)
        errors = np.zeros((end - start, outputs))
        if nm is None:
            costs = (w[start:end] / np.diag(upper)[start:end, None]) ** 2
            count = round(sparsity * end * outputs) - gone
            gone += count
            flat = mask[start:end].reshape(-1)  # a copy-free view
            flat[np.argsort(costs, axis=None, kind="stable")[:count]] = False
        for i in range(start, end):
            if nm is not None and i % nm[1] == 0:
                n, m = nm
                costs = (w[i : i + m] / np.diag(upper)[i : i + m, None]) ** 2
                lowest = np.argsort(costs, axis=0, kind="stable")[: m - n]
                np.put_along_axis(mask[i : i + m], lowest, False, axis=0)
            value = w[i]
            if bits is not None:
                value = np.clip(np.rint(value / scale), -high, high) * scale
            new[i] = np.where(mask[i], value, 0)
            errors[i - start] = (w[i] - new[i]) / upper[i, i]
            w[i:end] -= np.outer(upper[i, i:end], errors[i - start])
        w[end:] -= upper[start:end, end:].T @ errors
    return new, mask


def wanda(weight, x, sparsity, nm=None):
    """What stays, of `[in, out]`, given the inputs `[examples, in]`."""
    scores = np.abs(np.asarray(weight, np.float64)) * np.linalg.norm(x, axis=0)[:, None]
    mask = np.ones(scores.shape, bool)
    if nm is None:
        lowest = np.argsort(scores, axis=0, kind="stable")[: round(sparsity * len(scores))]
        np.put_along_axis(mask, lowest, False, axis=0)
        return mask
    n, m = nm
    for start in range(0, len(scores), m):
        lowest = np.argsort(scores[start : start + m], axis=0, kind="stable")[: m - n]
        np.put_along_axis(mask[start : start + m], lowest, False, axis=0)
    return mask


def least_squares(weight, x, mask, targets=None):
    """Each output's kept weights, by least squares on the inputs `[examples, in]`."""
    weight, x = np.asarray(weight, np.float64), np.asarray(x, np.float64)
    targets = x @ weight if targets is None else targets
    new = np.zeros(weight.shape)
    for o in range(weight.shape[1]):
        kept = mask[:, o]
        new[kept, o] = np.linalg.lstsq(x[:, kept], targets[:, o], rcond=None)[0]
    return new


def error(weight, new, x):
    """Σ (x w - x w̃)²."""
    return float(np.sum((np.asarray(x, np.float64) @ (np.asarray(weight, np.float64) - new)) ** 2))
