"""Losses against the formulas of the authors' PyTorch code, values and gradients."""

import jax
import numpy as np
import pytest

from jopt import distill

torch = pytest.importorskip("torch")
F = torch.nn.functional

T = 4.0


def logits(seed, *shape):
    return 2 * np.random.default_rng(seed).normal(size=shape).astype(np.float32)


LABELS = np.array([0, 6, 3, 3, 1, 2])


def kd(s, t):
    log_q, p = F.log_softmax(s / T, 1), F.softmax(t / T, 1)
    return F.kl_div(log_q, p, reduction="batchmean") * T**2


def reverse_kl(s, t):
    log_q, log_p = F.log_softmax(s / T, 1), F.log_softmax(t / T, 1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * T**2


def js(s, t):
    w = torch.tensor(0.3, dtype=s.dtype)
    log_q, log_p = F.log_softmax(s / T, 1), F.log_softmax(t / T, 1)
    mixture = torch.logsumexp(torch.stack([log_q + (1 - w).log(), log_p + w.log()]), 0)
    to_teacher = F.kl_div(mixture, log_p, reduction="batchmean", log_target=True)
    to_student = F.kl_div(mixture, log_q, reduction="batchmean", log_target=True)
    return (w * to_teacher + (1 - w) * to_student) * T**2


def dkd(s, t):
    labels = torch.tensor(LABELS)
    target = F.one_hot(labels, s.shape[1]).bool()
    q, p = F.softmax(s / T, 1), F.softmax(t / T, 1)
    pairs = [torch.stack([x[target], x.masked_fill(target, 0.0).sum(1)], 1) for x in (q, p)]
    sure = F.kl_div(pairs[0].log(), pairs[1], reduction="batchmean")
    log_q = F.log_softmax(s / T - 1000.0 * target, 1)
    others = F.kl_div(log_q, F.softmax(t / T - 1000.0 * target, 1), reduction="batchmean")
    return (sure + 8.0 * others) * T**2


def dist(s, t):
    q, p = F.softmax(s / T, 1), F.softmax(t / T, 1)

    def relation(a, b):
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return 1 - F.cosine_similarity(a, b, dim=1, eps=1e-12).mean()

    return T**2 * (relation(q, p) + relation(q.T, p.T))


def standardized(s, t):
    centered = [x - x.mean(1, keepdim=True) for x in (s, t)]
    s, t = (x / (1e-7 + x.pow(2).mean(1, keepdim=True).sqrt()) for x in centered)
    return kd(s, t)


PAIRS = {
    "kd": (kd, lambda s, t: distill.kd(s, t, temperature=T)),
    "reverse_kl": (reverse_kl, lambda s, t: distill.reverse_kl(s, t, temperature=T)),
    "js": (js, lambda s, t: distill.js(s, t, weight=0.3, temperature=T)),
    "dkd": (dkd, lambda s, t: distill.dkd(s, t, LABELS, temperature=T)),
    "dist": (dist, lambda s, t: distill.dist(s, t, temperature=T)),
    "standardized_kd": (standardized, lambda s, t: distill.standardized_kd(s, t, temperature=T)),
    "mse": (F.mse_loss, distill.mse),
    "l1": (
        lambda s, t: 8 * F.l1_loss(F.softmax(s, 1), F.softmax(t, 1)),
        distill.l1,
    ),
    "hard": (
        lambda s, t: F.cross_entropy(s, torch.tensor(LABELS), label_smoothing=0.1),
        lambda s, t: distill.hard(s, LABELS, smoothing=0.1),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_values_and_gradients(name):
    theirs, ours = PAIRS[name]
    check(theirs, ours, logits(0, 6, 8), logits(1, 6, 8))


def check(theirs, ours, student, teacher):
    s = torch.tensor(student, dtype=torch.float64, requires_grad=True)
    loss = theirs(s, torch.tensor(teacher, dtype=torch.float64))
    loss.backward()
    found, gradient = jax.value_and_grad(ours)(student, teacher)
    np.testing.assert_allclose(found, loss.item(), rtol=3e-5)
    np.testing.assert_allclose(gradient, s.grad.numpy(), rtol=3e-4, atol=3e-6)


@pytest.mark.parametrize("late", [4, 2])
def test_the_flow_between_two_layers(late):
    """Channels first there; the larger map is reduced by `adaptive_max_pool2d`."""
    early = [logits(seed, 3, 4, 4, 2) for seed in (0, 1)]

    def gram(first, second):
        first, second = (
            F.adaptive_max_pool2d(x.movedim(-1, 1), late).flatten(2) for x in (first, second)
        )
        return torch.bmm(first, second.transpose(1, 2)) / first.shape[2]

    def theirs(s, t):
        first = [torch.tensor(x, dtype=torch.float64) for x in early]
        return F.mse_loss(gram(first[0], s), gram(first[1], t))

    ours = lambda s, t: distill.fsp((early[0], s), (early[1], t))  # noqa: E731
    check(theirs, ours, logits(2, 3, late, late, 5), logits(3, 3, late, late, 5))


@pytest.mark.parametrize("known", [False, True])
def test_contrast(known):
    """Scores over Z, the first batch's mean times n; then noise-contrastive estimation."""
    n, others, temperature = 12, 6, 0.2
    bank = distill.crd_bank(jax.random.key(0), n, 4)
    if known:
        bank = bank._replace(scale=np.array([20.0, 30.0], np.float32))
    own = np.array([7, 2, 5])
    negatives = np.random.default_rng(0).integers(0, n, (3, others))
    rows = torch.tensor(np.concatenate([own[:, None], negatives], 1))

    def theirs(s, t):
        total, noise = 0.0, others / n
        for x, memory, scale in zip((s, t), (bank.teacher, bank.student), bank.scale, strict=True):
            memory = torch.tensor(np.asarray(memory), dtype=torch.float64)
            x = x / x.pow(2).sum(1, keepdim=True).sqrt()
            score = torch.exp(torch.bmm(memory[rows], x.unsqueeze(2)).squeeze(2) / temperature)
            z = float(scale) if known else score.mean().item() * n
            score = score / z
            positive = torch.log(score[:, :1] / (score[:, :1] + noise))
            negative = torch.log(noise / (score[:, 1:] + noise))
            total = total - (positive.sum() + negative.sum()) / len(x)
        return total

    def ours(s, t):
        return distill.crd(s, t, bank, own, negatives, temperature=temperature)

    check(theirs, ours, logits(2, 3, 4), logits(3, 3, 4))
    # Both embeddings learn.
    check(lambda t, s: theirs(s, t), lambda t, s: ours(s, t), logits(3, 3, 4), logits(2, 3, 4))


@pytest.mark.parametrize("normalize", [False, True])
def test_what_the_teacher_wrote(normalize):
    """Tokens that do not count have the index that `cross_entropy` ignores."""
    written, counts = np.array([[1, 0, 4, 2], [3, 3, 0, 1]]), np.array([[1, 1, 1, 0], [1, 1, 0, 0]])

    def theirs(s, _):
        tokens = torch.tensor(np.where(counts, written, -100))
        each = F.cross_entropy(s.movedim(-1, 1), tokens, reduction="none").sum(1)
        return (each / torch.tensor(counts.sum(1)) if normalize else each).mean()

    def ours(s, _):
        return distill.sequence(s, written, normalize=normalize, where=counts == 1)

    check(theirs, ours, logits(0, 2, 4, 5), logits(1, 1))
