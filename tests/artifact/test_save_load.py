"""A saved model gives the same bits elsewhere, weighs what it says, and tells of its damage."""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jopt
from jopt import artifact, quant, trace, trees
from jopt.artifact import _manifest, _module, _weights

pytest.importorskip("safetensors")
pytest.importorskip("flatbuffers")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "zero_point"],
    meta_fields=["format"],
)
@dataclasses.dataclass(frozen=True)
class Codes(trace.Leaf):
    """A weight of few bits, the smallest typed leaf there is."""

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array
    format: str

    always_dense = True

    def materialise(self) -> jax.Array:
        codes = self.codes.astype(jnp.float32) - self.zero_point.astype(jnp.float32)
        return codes * self.scale

    def storage(self) -> dict[str, tuple[Any, int]]:
        return super().storage() | {"codes": (self.codes, 4), "zero_point": (self.zero_point, 4)}


def codes_of(weight: jax.Array, zero_points: bool) -> Codes:
    """Four-bit codes; with a zero point of its own for each output if `zero_points`."""
    scale = jnp.max(jnp.abs(weight), axis=-2, keepdims=True) / 3
    zero = jnp.arange(weight.shape[-1], dtype=jnp.int8).reshape(1, -1) % jnp.int8(4)
    zero = zero if zero_points else jnp.zeros_like(zero)
    codes = jnp.round(weight / scale).astype(jnp.int8) + zero
    return Codes(codes.astype(jnp.int4), scale, zero, "four bits")


def network(seed: int, sparsity: float = 0.0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((128, 64)) * (rng.random((128, 64)) >= sparsity)
    params = {
        "conv": {"kernel": rng.standard_normal((3, 3, 1, 8)), "bias": np.linspace(-1, 1, 8)},
        "hidden": {"kernel": hidden, "mask": np.arange(64) % 3 > 0},
        "out": rng.standard_normal((64, 10)),
    }
    params = jax.tree.map(
        lambda x: jnp.asarray(x, x.dtype if x.dtype == bool else "float32"), params
    )
    return dict(params, out=params["out"].astype(jnp.bfloat16))


def images_of(batch: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(batch).standard_normal((batch, 8, 8, 1)), jnp.float32)


def apply(params: Any, x: jax.Array) -> jax.Array:
    """Convolution, pooling, a masked layer, bfloat16 logits."""
    conv = params["conv"]
    numbers = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, conv["kernel"], (1, 1), "SAME", dimension_numbers=numbers)
    x = jax.nn.relu(x + conv["bias"].reshape(1, 1, 1, -1))
    x = x.reshape(x.shape[0], 4, 2, 4, 2, 8).max((2, 4)).reshape(x.shape[0], -1)
    x = jnp.where(params["hidden"]["mask"][None, :], jnp.tanh(x @ params["hidden"]["kernel"]), 0.0)
    return jax.nn.log_softmax((x.astype(jnp.bfloat16) @ params["out"]).astype(jnp.float32))


def with_codes(params: Any, zero_points: bool = True) -> Any:
    hidden = dict(params["hidden"], kernel=codes_of(params["hidden"]["kernel"], zero_points))
    return dict(params, hidden=hidden)


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return images_of(5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, images: jax.Array) -> Path:
    """One artifact for the tests that only look."""
    path = tmp_path_factory.mktemp("artifact") / "model"
    params = with_codes(network(0, 0.9))
    artifact.save(path, apply, params, images, metrics={"accuracy": 0.5}, recipe={"name": "test"})
    return path


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.mark.parametrize("typed", [False, True])
def test_the_artifact_gives_the_bits_of_the_model(tmp_path: Path, typed: bool) -> None:
    params = network(0, 0.9)
    params = with_codes(params) if typed else params
    artifact.save(tmp_path, apply, params, jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32))
    loaded = artifact.load(tmp_path)
    for batch in (1, 5, 32):
        x = images_of(batch)
        expected = jax.jit(trace.lift(apply))(params, x)
        np.testing.assert_array_equal(loaded(x), expected)


@pytest.mark.parametrize(
    "policy",
    [
        [("**/kernel", quant.Int(8))],
        [("**/kernel", quant.Int(8, symmetric=False))],
        [("hidden/kernel", quant.Int(3, granularity="group", group_size=32))],
        [("**/kernel", quant.Spec(quant.Int(8), quant.Int(8)))],
    ],
)
def test_a_quantized_model_gives_its_bits(
    tmp_path: Path, policy: list[Any], images: jax.Array
) -> None:
    params = quant.quantize(network(0, 0.9), policy)
    manifest = artifact.save(tmp_path, apply, params, images)
    loaded = artifact.load(tmp_path)
    np.testing.assert_array_equal(loaded(images), jax.jit(trace.lift(apply))(params, images))
    for found, expected in zip(loaded.arrays.values(), jax.tree.leaves(params), strict=True):
        assert found.dtype == expected.dtype
        assert found.tobytes() == np.asarray(expected).tobytes()
    kernel = next(leaf for leaf in manifest["leaves"] if leaf["path"] == "hidden/kernel")
    assert kernel["type"] == "QArray" and kernel["bits"] == params["hidden"]["kernel"].size().bits
    # 90 % pruned: far below one bit for each of 8192, and 8 for each nonzero.
    assert sum(entry["bytes"] for entry in kernel["arrays"]) < 0.8 * (8192 + 819 * 8) / 8 + 4 * 256


def test_a_new_process_without_the_source_gives_the_same_bits(
    saved: Path, images: jax.Array, tmp_path: Path
) -> None:
    expected = jax.jit(trace.lift(apply))(with_codes(network(0, 0.9)), images)
    np.save(tmp_path / "images.npy", images)
    code = (
        "import sys, numpy as np; from jopt import artifact\n"
        "model, images, out = sys.argv[1:]\n"
        "np.save(out, artifact.load(model)(np.load(images)))"
    )
    files = [saved, tmp_path / "images.npy", tmp_path / "out.npy"]
    subprocess.run([sys.executable, "-c", code, *files], check=True)
    np.testing.assert_array_equal(np.load(files[2]), expected)


def test_every_array_comes_back_with_its_bits(saved: Path) -> None:
    params = with_codes(network(0, 0.9))
    arrays = artifact.load(saved).arrays
    assert list(arrays) == [
        "conv/bias",
        "conv/kernel",
        "hidden/kernel/codes",
        "hidden/kernel/scale",
        "hidden/kernel/zero_point",
        "hidden/mask",
        "out",
    ]
    for found, expected in zip(arrays.values(), jax.tree.leaves(params), strict=True):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert found.tobytes() == np.asarray(expected).tobytes()


def test_the_manifest_says_what_is_there(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_bytes())
    assert manifest == artifact.load(saved).manifest | {"digest": manifest["digest"]}
    assert manifest["platforms"] == ["cpu", "cuda", "tpu"]
    assert manifest["inputs"] == [{"name": "0", "shape": ["b", 8, 8, 1], "dtype": "float32"}]
    assert manifest["outputs"] == [{"name": "", "shape": ["b", 10], "dtype": "float32"}]
    assert manifest["jopt"] == jopt.__version__ and manifest["jax"] == jax.__version__
    assert manifest["metrics"] == {"accuracy": 0.5} and manifest["recipe"] == {"name": "test"}
    kernel = next(leaf for leaf in manifest["leaves"] if leaf["path"] == "hidden/kernel")
    assert kernel["type"] == "Codes" and kernel["static"] == {"format": "'four bits'"}
    assert kernel["shape"] == [128, 64] and kernel["dtype"] == "float32"
    assert [entry["bits"] for entry in kernel["arrays"]] == [4, 32, 4]
    for name, entry in manifest["files"].items():
        data = (saved / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_sizes_are_those_of_the_tree_and_of_the_disk(saved: Path) -> None:
    params = with_codes(network(0, 0.9))
    sizes = artifact.load(saved).manifest["sizes"]
    assert {name: sizes[name] for name in trees.Size._fields} == trees.size(params)._asdict()
    assert sizes["weights_bytes"] == (saved / "weights.safetensors").stat().st_size
    assert sizes["weights_bytes"] == artifact.weights_bytes(params)
    assert sizes["weights_bytes"] < trees.size(params).bytes  # pruned, so fewer than its bits


@pytest.mark.parametrize("zero_points", [False, True])
def test_pruned_codes_weigh_a_thirtieth_of_the_dense_weights(zero_points: bool) -> None:
    dense = np.random.default_rng(0).standard_normal((512, 128)).astype(np.float32)
    bound = np.quantile(np.abs(dense), 0.9)
    pruned = jnp.asarray(np.where(np.abs(dense) >= bound, dense, 0))
    weight = artifact.weights_bytes({"kernel": dense})
    assert weight == 4 * 512 * 128 + 80  # the header
    assert weight > 30 * artifact.weights_bytes({"kernel": codes_of(pruned, zero_points)})


def test_a_dense_model_is_a_plain_safetensors_file(tmp_path: Path, images: jax.Array) -> None:
    from safetensors import numpy as reader

    params = {"kernel": network(0)["out"].astype(jnp.float32), "bias": jnp.arange(10.0)}
    artifact.save(tmp_path, lambda p, x: x.reshape(-1, 64) @ p["kernel"], params, images)
    tensors = reader.load_file(tmp_path / "weights.safetensors")
    assert set(tensors) == set(params)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, params[name])


def test_the_same_model_is_the_same_file(saved: Path, images: jax.Array, tmp_path: Path) -> None:
    params = with_codes(network(0, 0.9))
    artifact.save(
        tmp_path, apply, params, images, metrics={"accuracy": 0.5}, recipe={"name": "test"}
    )
    for name in os.listdir(saved):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()


def test_no_source_path_is_in_the_module(saved: Path) -> None:
    module = (saved / "model.stablehlo").read_bytes()
    assert b".py" not in module and os.path.dirname(__file__).encode() not in module
    assert jax.config.jax_traceback_in_locations_limit != 0


def test_the_module_is_for_three_platforms(saved: Path) -> None:
    exported = export.deserialize(bytearray((saved / "model.stablehlo").read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert str(exported.in_avals[-1].shape) == "(b, 8, 8, 1)"


def test_one_platform_is_enough(tmp_path: Path) -> None:
    manifest = artifact.save(
        tmp_path, lambda p, x: x * p[None], jnp.ones(3), jnp.ones((2, 3)), platforms=["tpu"]
    )
    assert manifest["platforms"] == ["tpu"]
    with pytest.raises(ValueError, match="tpu"):
        artifact.load(tmp_path)(jnp.ones((2, 3)))


class Pair(NamedTuple):
    left: Any
    right: Any


@pytest.mark.parametrize(
    ("params", "names"),
    [
        (jnp.ones(3), [""]),
        ((jnp.ones(3), [jnp.ones(3)]), ["0", "1/0"]),
        (Pair(jnp.ones(3), {"a": jnp.ones(3)}), ["left", "right/a"]),
        ({"a": np.ones(3), "rate": 0.5, "act": jnp.tanh, "none": None}, ["a"]),
        ({"a/b": jnp.ones(3), "a": {"b": jnp.ones(3)}}, ["a/b", "a/b'"]),
        ({}, []),
    ],
)
def test_any_tree_of_parameters(tmp_path: Path, params: Any, names: list[str]) -> None:
    def total(params: Any, x: jax.Array) -> jax.Array:
        for leaf in jax.tree.leaves(params):
            x = leaf(x) if callable(leaf) else x * jnp.broadcast_to(leaf, x.shape)
        return x

    artifact.save(tmp_path, total, params, jnp.ones((2, 3)))
    loaded = artifact.load(tmp_path)
    assert list(loaded.arrays) == names
    np.testing.assert_array_equal(loaded(jnp.ones((4, 3))), total(params, jnp.ones((4, 3))))


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "int4", "int8", "uint8", "bool", "int32"]
)
@pytest.mark.parametrize("shape", [(), (0,), (3, 1, 5), (2000,)])
def test_any_array_goes_through_the_module(
    tmp_path: Path, dtype: str, shape: tuple[int, ...]
) -> None:
    values = np.arange(np.prod(shape, dtype=int)).reshape(shape) % 7
    array = jnp.asarray(values.astype(bool) if dtype == "bool" else values).astype(dtype)
    artifact.save(tmp_path, lambda p, x: (p["a"], x), {"a": array}, jnp.ones(2))
    loaded = artifact.load(tmp_path)
    out, _ = loaded(jnp.ones(2))
    assert loaded.arrays["a"].tobytes() == np.asarray(array).tobytes()
    assert out.dtype == array.dtype and np.asarray(out).tobytes() == np.asarray(array).tobytes()


def test_inputs_and_outputs_may_be_nested(tmp_path: Path) -> None:
    def model(params: Any, batch: Any, scale: jax.Array) -> Any:
        return {"sum": batch["x"] + batch["y"], "both": (batch["x"] * scale, [params])}

    batch = {"x": jnp.ones((2, 3)), "y": jnp.ones((2, 3))}
    manifest = artifact.save(tmp_path, model, jnp.arange(3.0), batch, jnp.float32(2))
    assert [entry["name"] for entry in manifest["inputs"]] == ["0/x", "0/y", "1"]
    assert [entry["name"] for entry in manifest["outputs"]] == ["both/0", "both/1/0", "sum"]
    out = artifact.load(tmp_path)({"x": jnp.ones((7, 3)), "y": jnp.ones((7, 3))}, jnp.float32(3))
    assert out["sum"].shape == (7, 3) and float(out["both"][0][0, 0]) == 3


def test_the_artifact_works_inside_jit_and_vmap(saved: Path, images: jax.Array) -> None:
    loaded = artifact.load(saved)
    np.testing.assert_array_equal(jax.jit(lambda x: loaded(x))(images), loaded(images))
    assert jax.eval_shape(loaded, images).shape == (5, 10)


def test_a_batch_axis_elsewhere_and_a_fixed_batch(tmp_path: Path) -> None:
    params = jnp.ones((3, 2))
    manifest = artifact.save(
        tmp_path / "last", lambda p, x: p.T @ x, params, jnp.ones((3, 4)), batch_axis=-1
    )
    assert manifest["inputs"][0]["shape"] == [3, "b"]
    fixed = artifact.save(
        tmp_path / "fixed",
        lambda p, x: x.reshape(4, 3) @ p,
        params,
        jnp.ones((4, 3)),
        batch_axis=None,
    )
    assert fixed["inputs"][0]["shape"] == [4, 3]
    with pytest.raises(ValueError, match=r"is float32\[5, 3\]; expected float32\[4, 3\]"):
        artifact.load(tmp_path / "fixed")(jnp.ones((5, 3)))


@pytest.mark.parametrize(
    "model",
    [
        lambda p, x: x.reshape(4, 3) * p[None],
        lambda p, x: x.reshape(2, -1) * p[0],
        lambda p, x: jnp.stack([x[i] for i in range(x.shape[0])]) * p[None],
    ],
)
def test_a_model_of_one_batch_size_says_so(tmp_path: Path, model: Callable[..., Any]) -> None:
    message = r"runs on batches of \[4\], but cannot be traced .*(?s:.*)`batch_axis=None`"
    with pytest.raises(ValueError, match=message):
        artifact.save(tmp_path / "model", model, jnp.ones(3), jnp.ones((4, 3)))
    assert os.listdir(tmp_path) == []


def test_a_fault_of_the_model_is_left_to_speak(tmp_path: Path) -> None:
    def broken(params: Any, x: jax.Array) -> jax.Array:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        artifact.save(tmp_path / "model", broken, jnp.ones(3), jnp.ones((4, 3)))


def test_containers_that_need_the_source_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"model's outputs hold a `Pair`.*Use tuples"):
        artifact.save(tmp_path / "a", lambda p, x: Pair(x, p), jnp.ones(3), jnp.ones((4, 3)))
    with pytest.raises(TypeError, match=r"model's inputs hold a `Pair`"):
        artifact.save(tmp_path / "a", lambda p, x: x[0], jnp.ones(3), Pair(jnp.ones(3), None))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"key": jax.random.key(0)}, "`key` is a random key"),
        ({"z": np.ones(2, np.complex128)}, "complex128|complex64"),
        ({"n": np.ones(2, "S3")}, "."),
    ],
)
def test_arrays_that_cannot_be_saved_are_named(tmp_path: Path, params: Any, message: str) -> None:
    if "z" in params:
        artifact.save(tmp_path, lambda p, x: x, params, jnp.ones((4, 3)))  # as complex64
        return
    with pytest.raises(TypeError, match=message):
        artifact.save(tmp_path / "a", lambda p, x: x, params, jnp.ones((4, 3)))


def test_metrics_are_plain_json(tmp_path: Path) -> None:
    metrics = {"loss": jnp.float32(0.5), "nan": float("nan"), "list": (np.int64(1), None, True)}
    manifest = artifact.save(
        tmp_path, lambda p, x: x * p[None], jnp.ones(3), jnp.ones((2, 3)), metrics=metrics
    )
    assert manifest["metrics"] == {"loss": 0.5, "nan": "nan", "list": [1, None, True]}
    with pytest.raises(TypeError, match="numbers, text, lists and dictionaries"):
        artifact.save(tmp_path, apply, jnp.ones(3), jnp.ones((2, 3)), metrics={"x": object()})


def test_a_failed_save_leaves_the_old_artifact(
    copy: Path, images: jax.Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: (copy / name).read_bytes() for name in os.listdir(copy)}
    with pytest.raises(FileExistsError, match="overwrite=True"):
        artifact.save(copy, apply, network(1), images)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space left.*untouched"):
        patch.setattr(os, "fsync", full)
        artifact.save(copy, apply, network(1), images, overwrite=True)
    assert before == {name: (copy / name).read_bytes() for name in os.listdir(copy)}
    assert os.listdir(copy.parent) == ["model"]
    artifact.save(copy, apply, network(1), images, overwrite=True)
    assert (copy / "weights.safetensors").read_bytes() != before["weights.safetensors"]


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ((), TypeError, r"takes 0: float32\[b, 8, 8, 1\]; found 0 inputs"),
        ((np.ones((2, 8, 8, 1)),) * 2, TypeError, "found 2 inputs"),
        (([np.ones((2, 8, 8, 1))],), TypeError, "takes 0: float32"),
        ((np.ones((2, 8, 8, 1), np.int32),), TypeError, r"is int32\[.*\]; expected float32\[b, 8"),
        (
            (np.ones((2, 8, 8)),),
            ValueError,
            r"is float32\[2, 8, 8\]; expected float32\[b, 8, 8, 1\]",
        ),
        ((np.ones((2, 9, 8, 1)),), ValueError, r"is float32\[2, 9, 8, 1\]"),
        ((np.ones((0, 8, 8, 1)),), ValueError, r"is float32\[0, 8, 8, 1\]"),
    ],
)
def test_wrong_inputs_are_named(
    saved: Path, inputs: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        artifact.load(saved)(*inputs)


def test_inputs_of_unequal_batches_are_named(tmp_path: Path) -> None:
    artifact.save(tmp_path, lambda p, x, y: x + y, (), jnp.ones((2, 3)), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"input 1 is .*\[5, 3\]; expected .*\[b, 3\], with b = 4"):
        artifact.load(tmp_path)(jnp.ones((4, 3)), jnp.ones((5, 3)))


def test_describe_tells_the_essentials(saved: Path) -> None:
    text = artifact.load(saved).describe()
    assert "cpu, cuda, tpu" in text and "0: float32[b, 8, 8, 1]" in text
    assert "accuracy  0.5" in text
    (line,) = [line for line in text.splitlines() if line.startswith("hidden/kernel")]
    assert "(128, 64)" in line and "Codes" in line and "9" in line.split()[-2]


# Damage. Every file, cut, altered, gone, or lying about itself.


@pytest.mark.parametrize("name", ["manifest.json", "model.stablehlo", "weights.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "longer", "folder", "pipe"])
def test_a_damaged_file_is_named(copy: Path, name: str, damage: str) -> None:
    file = copy / name
    data = bytearray(file.read_bytes())
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage == "pipe":
        os.mkfifo(file)
    elif damage != "missing":
        data[len(data) // 2] ^= 1
        file.write_bytes({"cut": data[:-9], "flipped": data, "longer": data + b"!"}[damage])
    with pytest.raises(artifact.ArtifactError, match=f"`{name}`") as caught:
        artifact.load(copy)
    if damage == "flipped":
        assert "altered" in str(caught.value) or "not JSON" in str(caught.value)
    if damage in ("cut", "longer") and name != "manifest.json":
        assert str(len(data)) in str(caught.value)


def test_what_is_no_artifact_is_told(tmp_path: Path) -> None:
    with pytest.raises(artifact.ArtifactError, match="is not a folder"):
        artifact.load(tmp_path / "nowhere")
    with pytest.raises(artifact.ArtifactError, match=r"`manifest.json` is missing"):
        artifact.load(tmp_path)


def altered(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The artifact as someone would leave it who knows how to make its digest."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest.pop("digest")
    change(manifest)
    (folder / "manifest.json").write_bytes(_manifest.dump(manifest))
    return folder


def entry_of(manifest: dict[str, Any], name: str) -> dict[str, Any]:
    return _manifest.entries(manifest)[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=99), "format version 99; this jopt reads version 1"),
        (lambda m: m.update(format="zip"), "is not the manifest of an artifact"),
        (lambda m: m.pop("sizes"), "`sizes` is missing"),
        (lambda m: m["sizes"].update(bits=-1), "`sizes` has no `bits`"),
        (lambda m: m.update(inputs=[1]), "an input or output"),
        (lambda m: m.update(files={"../../etc/passwd": {}}), "its files are not"),
        (lambda m: m["files"].update({"/etc/passwd": {}}), "its files are not"),
        (lambda m: m["files"]["model.stablehlo"].update(bytes=-5), "has no size"),
        (lambda m: m["files"]["model.stablehlo"].pop("sha256"), "has no SHA-256"),
        (lambda m: m.update(leaves=[5]), "a leaf has no list"),
        (lambda m: m["leaves"][0].pop("dtype"), "leaf 'conv/bias' is incomplete"),
        (lambda m: entry_of(m, "out").update(name="conv/bias"), "no name of its own"),
        (lambda m: entry_of(m, "out").update(shape=[-1]), r"`out` has the shape \[-1\]"),
        (lambda m: entry_of(m, "out").update(shape=[True]), r"`out` has the shape \[True\]"),
        (lambda m: entry_of(m, "out").update(bytes="many"), "`out` has no dtype or size"),
        (lambda m: entry_of(m, "out").update(dtype="object"), "unknown dtype 'object'"),
        (lambda m: entry_of(m, "conv/bias").update(shape=[10**12]), "claim to be"),
        (lambda m: entry_of(m, "conv/bias").update(bytes=5), "`conv/bias`: 8 values take 32 bytes"),
        (lambda m: entry_of(m, "conv/bias").update(code={"values": "eval"}), "'eval' are unknown"),
        (lambda m: entry_of(m, "hidden/mask").update(shape=[65]), "`hidden/mask`"),
        (lambda m: entry_of(m, "hidden/kernel/codes").update(center="out"), "do not fit"),
        (lambda m: entry_of(m, "hidden/kernel/codes").update(center="hi"), "no zero points"),
        (
            lambda m: entry_of(m, "hidden/kernel/codes").update(center="hidden/kernel/codes"),
            "no zero points",
        ),
        (
            lambda m: entry_of(m, "conv/bias").update(shape=[2, 4]),
            "takes float32.8. for `conv/bias`",
        ),
        (lambda m: m["leaves"].pop(), "holds more than the manifest lists|does not take 6 arrays"),
        (lambda m: m["leaves"].append(m["leaves"][0] | {"arrays": []}), None),
    ],
)
def test_a_lying_manifest_is_refused(
    copy: Path, change: Callable[[dict[str, Any]], Any], message: str | None
) -> None:
    altered(copy, change)
    if message is None:
        artifact.load(copy)
        return
    with pytest.raises(artifact.ArtifactError, match=message):
        artifact.load(copy)


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 100_000, b"[]", b"null", b"\xff\xfe\x00"])
def test_a_manifest_that_is_no_json_is_refused(copy: Path, text: bytes) -> None:
    (copy / "manifest.json").write_bytes(text)
    with pytest.raises(artifact.ArtifactError, match=r"`manifest.json` is not"):
        artifact.load(copy)


def replaced(folder: Path, name: str, data: bytes) -> Path:
    """The artifact with another file, its size and hash put right."""
    (folder / name).write_bytes(data)
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return altered(folder, lambda manifest: manifest["files"].update({name: entry}))


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff" * 8 + b"{}", (10**12).to_bytes(8, "little") + b"{}", b"\x02" + b"\0" * 7 + b"{}"],
)
def test_weights_that_are_none_are_refused(copy: Path, data: bytes) -> None:
    with pytest.raises(artifact.ArtifactError, match=r"`weights.safetensors` is damaged"):
        artifact.load(replaced(copy, "weights.safetensors", data))


@pytest.mark.parametrize("cut", [0, 1, 4, 100, 1000])
def test_a_module_that_is_none_is_refused(copy: Path, cut: int) -> None:
    data = (copy / "model.stablehlo").read_bytes()[:cut]
    with pytest.raises(artifact.ArtifactError, match=r"`model.stablehlo` is refused"):
        artifact.load(replaced(copy, "model.stablehlo", data))


def test_a_module_that_calls_python_is_refused(copy: Path) -> None:
    """Built with the target that jaxlib's callbacks use, as a malicious module would be."""
    target = "xla_ffi_python_cpu_callback"
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((3,), jnp.float32))
    check = export.DisabledSafetyCheck.custom_call(target)
    exporter = export.export(
        jax.jit(lambda a, x: call(x)), platforms=["cpu"], disabled_checks=[check]
    )
    data = exporter([jnp.ones(3)], jnp.ones(3)).serialize()
    with pytest.raises(artifact.ArtifactError, match=f"calls `{target}`.*allow="):
        artifact.load(replaced(copy, "model.stablehlo", bytes(data)))
    assert _module.read(bytes(data), [target]).platforms == ("cpu",)


def test_a_module_with_a_module_inside_is_refused(copy: Path) -> None:
    """A derivative is a second module, that nobody would have looked into."""
    exporter = export.export(jax.jit(lambda a, x: x * a[0]), platforms=["cpu"])
    data = exporter([jnp.ones(3)], jnp.ones(3)).serialize(vjp_order=1)
    with pytest.raises(artifact.ArtifactError, match="brings a derivative"):
        artifact.load(replaced(copy, "model.stablehlo", bytes(data)))


def test_a_function_may_be_called_custom_call(tmp_path: Path) -> None:
    def model(params: jax.Array, x: jax.Array) -> jax.Array:
        with jax.named_scope("custom_call"):
            return x * params[None]

    artifact.save(tmp_path, model, jnp.ones(3), jnp.ones((2, 3)))
    np.testing.assert_array_equal(artifact.load(tmp_path)(jnp.ones((2, 3))), jnp.ones((2, 3)))


def test_linear_algebra_is_allowed(tmp_path: Path) -> None:
    artifact.save(
        tmp_path,
        lambda p, x: jnp.linalg.qr(x * p[None])[1],
        jnp.ones(3),
        jnp.ones((4, 3)),
        batch_axis=None,
    )
    x = images_of(1)[0, :4, :3, 0]
    np.testing.assert_array_equal(artifact.load(tmp_path)(x), jnp.linalg.qr(x)[1])


def test_a_symbolic_link_out_of_the_folder_gives_nothing_away(copy: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (copy / "weights.safetensors").unlink()
    (copy / "weights.safetensors").symlink_to(secret)
    with pytest.raises(artifact.ArtifactError, match=r"has 6 bytes, expected") as caught:
        artifact.load(copy)
    assert "secret" not in str(caught.value).replace(str(tmp_path), "")


def test_weights_of_arrays_far_larger_than_the_file_are_refused() -> None:
    data, entries = _weights.write({"a": np.zeros((1000, 1000), np.float32)})
    assert len(data) < 200
    assert not _weights.read(data, entries)["a"].any()
    entries["a"]["shape"] = [1 << 40]
    with pytest.raises(ValueError, match="claim to be"):
        _weights.read(data, entries)
