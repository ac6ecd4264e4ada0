"""`Int` against `torch.fake_quantize` for any scale and zero point: bits, dtypes, ranges."""

import jax.numpy as jnp
import numpy as np
import pytest

from jopt.quant import Grid, Int

TYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def ours(x, bits, symmetric, scale, zero):
    """Values, and whether they were not clipped, of a format on a given grid."""
    format = Int(bits, symmetric=symmetric)
    point = None if symmetric else jnp.asarray(zero, jnp.int8)
    grid = Grid(jnp.asarray(scale, jnp.float32), point)
    values = format.decode(format.encode(x, grid), grid).astype(x.dtype)
    return np.asarray(values, np.float32), np.asarray(format.inside(x, grid))


def near(x, scale, zero):
    """Where the code is within one ulp of a boundary of rounding."""
    place = np.asarray(x, np.float64) / np.asarray(scale, np.float64) + zero
    off = np.abs(place - np.floor(place) - 0.5)
    return off <= np.spacing(np.float32(np.abs(place) + 1))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_values_are_those_of_torch(bits, symmetric, dtype):
    torch = pytest.importorskip("torch")
    format = Int(bits, symmetric=symmetric)
    for seed in range(6):
        rng = np.random.default_rng(100 * bits + seed)
        exponent = rng.uniform(-3, 3) if dtype == "float16" else rng.uniform(-20, 20)
        x = rng.normal(size=(8, 12)) * 10.0**exponent * rng.choice([1, 0.01, 1], (1, 12))
        x = torch.tensor(x.astype(np.float32)).to(getattr(torch, dtype))
        wide = x.float().numpy()
        scale = np.abs(wide).max(0) / 2 ** (bits - 1) * rng.uniform(0.3, 3, 12) + 1e-30
        scale = np.maximum(scale, 1e-6 if dtype == "float16" else 0).astype(np.float32)
        zero = np.zeros(12) if symmetric else rng.integers(format.low, format.high + 1, 12)
        mine = jnp.asarray(wide).astype(TYPES[dtype])
        ends = (format.low, format.high)

        theirs = torch.fake_quantize_per_tensor_affine(x, float(scale[0]), int(zero[0]), *ends)
        found, _ = ours(mine, bits, symmetric, scale[:1, None], zero[:1, None])
        same = found == theirs.float().numpy()
        assert np.all(same | near(wide, scale[0], zero[0])) and same.mean() > 0.95

        theirs = torch.fake_quantize_per_channel_affine(
            x.float(), torch.tensor(scale), torch.tensor(zero.astype(np.int32)), 1, *ends
        )
        found, inside = ours(mine.astype(jnp.float32), bits, symmetric, scale[None], zero[None])
        same = found == theirs.numpy()
        assert np.all(same | near(wide, scale, zero)) and same.mean() > 0.95
        place = np.rint(wide.astype(np.float64) / scale) + zero
        clear = ~near(wide, scale, zero)
        np.testing.assert_array_equal(
            inside[clear], ((place >= ends[0]) & (place <= ends[1]))[clear]
        )
