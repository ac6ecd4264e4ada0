"""The one place where jopt chooses per backend, with the measurement behind each choice.

A choice is a plain value looked up by platform name (`"cpu"`, `"cuda"`, `"tpu"`). Everything else
in jopt asks here, so that a better measurement on new hardware is one line changed.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Choices:
    """What one platform is good at."""

    # How `jopt.nn` convolves: "lax" is one `conv_general_dilated`; "slices" is shifted slices,
    # concatenated, and one matrix product.
    convolution: str
    # How `jopt.nn` pools without overlap: "lax" is `reduce_window`; "reshape" is reshape and max.
    pooling: str
    # Whether a training step that contains `conv_general_dilated` may sit inside a loop that XLA
    # compiles. Steps without a convolution are always looped.
    loops_convolutions: bool
    # How a product of floats and quantized weights runs where no time was measured (`jopt.quant`
    # has a table of times for cpu): "dense" dequantizes the whole weight, "tiled" a part at a time.
    weights_alone: str
    # The density, padding included, up to which a product that skips a weight's zeros
    # (`jopt.prune.CSR`) wins over the dense product; 0: never, or not measured.
    sparse: float


# cpu, measured on two AMD EPYC cores, JAX 0.10.2, one epoch of the classic CIFAR-10 network against
# PyTorch eager = 1: `lax` stepped 2.6, `lax` scanned 32 (jax-ml/jax#12868), slices scanned 1.7,
# slices with reshape pooling scanned 0.84 (docs/benchmarks.md).
# cpu, a product with a weight of int8: XLA:CPU never fuses the dequantization into the product, so
# that a dense weight takes four times the bytes of its codes while it lasts.
# cpu, a sparse float32 product of 4096 x 4096 on two AMD EPYC cores, JAX 0.10.2, against the dense
# one: with 1, 8, 64, 512 rows it is 0.9, 1.2, 2.3, 2.0 times as fast at a padded density of 0.17,
# 1.2, 2.1, 2.3, 3.4 times at 0.118 (scripts/bench_sparse).
# cuda and tpu: XLA's own convolutions are the vendor's; not yet measured by us.
CHOICES = {
    "cpu": Choices(
        convolution="slices",
        pooling="reshape",
        loops_convolutions=False,
        weights_alone="tiled",
        sparse=0.125,
    ),
    "cuda": Choices(
        convolution="lax", pooling="lax", loops_convolutions=True, weights_alone="dense", sparse=0.0
    ),
    "tpu": Choices(
        convolution="lax", pooling="lax", loops_convolutions=True, weights_alone="dense", sparse=0.0
    ),
}


def choices(platform: str) -> Choices:
    """The choices for `platform`; `"gpu"` and `"rocm"` are taken as `"cuda"`, others as `"tpu"`."""
    platform = {"gpu": "cuda", "rocm": "cuda"}.get(platform, platform)
    return CHOICES.get(platform, CHOICES["tpu"])
