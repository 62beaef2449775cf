"""Random 4-bit weights, packed and as they are, and what tests of kernels do with them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from kernels_pallas import FourBit, pack_int4, pack_mxfp4, pack_nvfp4
from kernels_pallas.four_bit import SCALE_WORDS, Kind

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def random_weight(kind: str, n: int, k: int, seed: int = 0) -> tuple[FourBit, np.ndarray]:
    """A random packed weight, and its values in float64."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (n, k))
    if kind == "int4":
        scales = rng.uniform(0.01, 3, (n, k // 128)).astype(ml_dtypes.bfloat16)
        packed = jax.jit(pack_int4)(jnp.asarray(codes - 8, jnp.int8), jnp.asarray(scales))
        return packed, (codes - 8) * np.repeat(scales.astype(np.float64), 128, 1)
    values = E2M1[codes & 7] * np.where(codes & 8, -1, 1)
    if kind == "nvfp4":
        patterns = rng.integers(0, 127, (n, k // 16)).astype(np.uint8)  # all E4M3 from 0 to 448
        scales = patterns.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        scale = jnp.float32(0.37)
        packed = jax.jit(pack_nvfp4)(jnp.asarray(codes), jnp.asarray(scales), scale)
        return packed, values * np.repeat(scales.astype(np.float64), 16, 1) * float(scale)
    exponents = rng.integers(-20, 12, (n, k // 32))
    packed = jax.jit(pack_mxfp4)(jnp.asarray(codes), jnp.asarray(exponents, jnp.int32))
    return packed, values * np.repeat(2.0**exponents, 32, 1)


@pytest.fixture(scope="session")
def weight():
    return random_weight


def random_activations(m: int, k: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (m, k), jnp.bfloat16)


def error_of_product(found: jax.Array, x: jax.Array, values: np.ndarray) -> float:
    """Relative, of `x @ values.T` in float64."""
    exact = np.asarray(x, np.float64) @ values.T
    return float(np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact))


def lowered_for_h100(
    product: Callable[[jax.Array, FourBit], jax.Array], kind: Kind, m: int, n: int, k: int
) -> str:
    """A product as compiled for an H100, which needs none."""
    h100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
    rows, groups = -(-n // 64) * 4, -(-k // 512) * 4
    weight = jax.eval_shape(
        lambda: FourBit(
            codes=jnp.zeros((rows, 256 * groups), jnp.int32),
            scales=jnp.zeros((rows, SCALE_WORDS[kind] * groups), jnp.int32),
            factor=jnp.zeros(rows),
            kind=kind,
            shape=(n, k),
        )
    )
    x = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=h100)):
        return jax.jit(product).trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture(scope="session")
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture(scope="session")
def activations():
    return random_activations


@pytest.fixture(scope="session")
def relative_error():
    return error_of_product


@pytest.fixture(scope="session")
def lowered():
    return lowered_for_h100
