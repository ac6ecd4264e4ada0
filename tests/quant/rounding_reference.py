"""Layers to round, and GPTQ in NumPy float64 as its paper has it."""

import numpy as np


def layer(inputs, outputs, seed=0, samples=None):
    """A weight, and the Hessian of correlated inputs of very different size."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(inputs, inputs)) * np.arange(1, inputs + 1)[:, None] ** -0.7
    x = rng.normal(size=(samples or 4 * inputs, inputs)) @ mix
    x = x * np.exp(rng.normal(size=inputs))
    weight = rng.normal(size=(inputs, outputs)) / np.sqrt(inputs)
    return weight.astype(np.float32), (x.T @ x).astype(np.float32)


def error(weight, rounded, hessian):
    """tr(Dᵀ H D) in float64."""
    d = np.asarray(weight, np.float64) - np.asarray(rounded, np.float64)
    return float(np.sum(d * (np.asarray(hessian, np.float64) @ d)))


def symmetric(x, bits):
    """Rounds `[in, out]` values with one scale for each output; returns values and scales."""
    high = 2 ** (bits - 1) - 1
    scale = np.abs(x).max(0) / high
    return np.clip(np.rint(x / scale), -high, high) * scale, scale


def asymmetric(x, bits):
    """Likewise with a zero point."""
    low, high = np.minimum(x.min(0), 0), np.maximum(x.max(0), 0)
    scale = (high - low) / (2**bits - 1)
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(x / scale) + zero, 0, 2**bits - 1) - zero) * scale, (scale, zero)


def gptq(weight, hessian, bits, damping=0.01, order=False, group=None, zero=False):
    """The paper's algorithm by columns, one at a time: inverse Hessian, Cholesky, update."""
    w, h = np.asarray(weight, np.float64).copy(), np.asarray(hessian, np.float64).copy()
    inputs, high = len(w), 2 ** (bits - 1) - 1
    h[np.diag_indices(inputs)] += damping * np.mean(np.diag(h))
    group = group or inputs
    fixed = [_scales(w[g : g + group], bits, zero) for g in range(0, inputs, group)]
    turn = np.argsort(-np.diag(h), kind="stable") if order else np.arange(inputs)
    upper = np.linalg.cholesky(np.linalg.inv(h[np.ix_(turn, turn)])).T
    w = w[turn]
    rounded = np.zeros_like(w)
    for i, place in enumerate(turn):
        if group < inputs and not order and i % group == 0:
            fixed[i // group] = _scales(w[i : i + group], bits, zero)
        scale, zeros = fixed[place // group]
        if zero:
            q = (np.clip(np.rint(w[i] / scale) + zeros, 0, 2**bits - 1) - zeros) * scale
        else:
            q = np.clip(np.rint(w[i] / scale), -high, high) * scale
        rounded[i] = q
        w[i + 1 :] -= np.outer(upper[i, i + 1 :], (w[i] - q) / upper[i, i])
    out = np.empty_like(rounded)
    out[turn] = rounded
    return out


def _scales(x, bits, zero):
    return asymmetric(x, bits)[1] if zero else (symmetric(x, bits)[1], None)


def scaled(weight, hessian, magnitude, bits, points):
    """AWQ's search of the exponent, one scale for each output; returns values and scales."""
    weight, best = np.asarray(weight, np.float64), (np.inf, None, None)
    base = magnitude / np.exp(np.mean(np.log(magnitude)))
    for power in np.linspace(0, 1, points):
        scales = base[:, None] ** power
        rounded = symmetric(weight * scales, bits)[0] / scales
        best = min(best, (error(weight, rounded, hessian), power, rounded), key=lambda b: b[0])
    return best[2], base ** best[1]


def half_quadratic(weight, bits, p=0.7, beta=10.0, growth=1.01, steps=20, starts=4):
    """HQQ with one symmetric scale for each output, an output at a time; the best scales met."""
    weight, high = np.asarray(weight, np.float64), 2 ** (bits - 1) - 1
    out = np.zeros_like(weight)
    for k, w in enumerate(weight.T):
        best = np.inf
        for start in range(starts):
            scale, b = (1 - start / 10) * np.abs(w).max() / high, beta
            for _ in range(steps + 1):
                code = np.clip(np.rint(w / scale), -high, high)
                left = w - code * scale
                if (found := np.sum(left**2)) < best:
                    best, out[:, k] = found, code * scale
                unit = 2 * scale * high / 2**bits
                r = np.abs(left) / unit
                threshold = np.maximum(r, 1e-12) ** (p - 1) / b
                shrunk = np.sign(left) * np.maximum(r - threshold, 0) * unit
                scale, b = np.sum(code * (w - shrunk)) / np.sum(code * code), b * growth
    return out


def up_or_down(weight, hessian, bits, steps, rate=0.01, strength=10.0, warmup=0.2):
    """AdaRound with one symmetric scale for each output: Adam by hand, all in float64."""
    weight, hessian = np.asarray(weight, np.float64), np.asarray(hessian, np.float64)
    high = 2 ** (bits - 1) - 1
    scale = np.abs(weight).max(0) / high
    near = np.clip(np.rint(weight / scale), -high, high)
    low = np.clip(np.where(weight > near * scale, near, near - 1), -high, high)
    top = np.clip(low + 1, -high, high)
    top = np.where(weight > near * scale, np.clip(near + 1, -high, high), near)
    gap = (top - low) * scale
    fraction = np.divide(weight - low * scale, gap, where=gap > 0, out=np.full_like(gap, 0.5))
    inner = (np.clip(fraction, 0, 1) + 0.1) / 1.2
    v = np.log(inner / (1 - inner))
    factor = weight.size / error(weight, near * scale, hessian)
    m, n = np.zeros_like(v), np.zeros_like(v)
    for t in range(steps):
        beta = 20 - 18 * np.clip((t / steps - warmup) / (1 - warmup), 0, 1)
        sigmoid = 1 / (1 + np.exp(-v))
        h = np.clip(1.2 * sigmoid - 0.1, 0, 1)
        d = weight - low * scale - h * gap
        g = -2 * factor * gap * (hessian @ d)
        if t / steps >= warmup:
            g = g - strength * 2 * beta * np.sign(2 * h - 1) * np.abs(2 * h - 1) ** (beta - 1)
        g = g * 1.2 * sigmoid * (1 - sigmoid) * ((h > 0) & (h < 1))
        m, n = 0.9 * m + 0.1 * g, 0.999 * n + 0.001 * g * g
        v = v - rate * (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(n / (1 - 0.999 ** (t + 1))) + 1e-8)
    h = np.clip(1.2 / (1 + np.exp(-v)) - 0.1, 0, 1)
    rounded = np.where(h > 0.5, top, low) * scale
    for k in range(weight.shape[1]):
        own = [error(weight[:, k], c[:, k], hessian) for c in (rounded, near * scale)]
        if own[0] >= own[1]:
            rounded[:, k] = near[:, k] * scale[k]
    return rounded
