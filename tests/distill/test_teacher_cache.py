"""Teachers on disk: what is read is what the model says, whole or not at all."""

import json
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from teachers import CONFIG, MOMENTS, K, N, T, V, made_of, model, rows, write

import jaxopt_models as jom
from jaxopt_models.data import PackedBatches
from jaxopt_models.distill import losses, teacher_cache
from jaxopt_models.distill.logit_loss import LogitLoss
from jaxopt_models.errors import UserError
from jaxopt_models.models.transformer import hidden_states, logits
from jaxopt_models.sharding import make_mesh, shard
from jaxopt_models.train.objectives import Term, next_token_loss
from jaxopt_models.train.step import Sums


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    target = tmp_path_factory.mktemp("cache") / "below" / "teacher"
    write(target)
    return target


@pytest.fixture(scope="module")
def whole():
    """The teacher's logits, of all rows at once."""
    text, params = rows(), model().params
    hidden = hidden_states(CONFIG, params, jnp.asarray(text["tokens"]), jnp.asarray(text["starts"]))
    return logits(CONFIG, params, hidden)


def _rounded(known):
    return replace(known, log_probs=known.log_probs.astype(jnp.float16))


def test_what_is_read_is_what_the_teacher_says(directory, whole):
    found = teacher_cache.read(directory, made_of(), K)
    expected = losses.top_k(whole, K, 2.0)
    assert [x.dtype for x in jax.tree.leaves(found)] == [np.uint16, np.float16, np.float32]
    assert all(isinstance(x, np.memmap) for x in jax.tree.leaves(found))
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, rtol=2**-10, atol=1e-6)
    np.testing.assert_allclose(found.tail, expected.tail, rtol=1e-4)
    sizes = [(directory / f"{name}.npy").stat().st_size for name in ("indices", "log_probs")]
    assert sizes == [128 + 2 * K * N * T] * 2
    large = replace(made_of(), vocabulary=2**16 + 1)
    assert teacher_cache._arrays(large, K).indices.dtype == jnp.int32


def test_rounding_moves_little_probability():
    """2^-10 of the entropy; and none of it makes a loss where the student agrees."""
    teacher = 4 * jax.random.normal(jax.random.key(0), (500, V))
    for k, temperature in ((1, 1.0), (8, 1.0), (8, 3.0), (V, 1.0)):
        exact = losses.top_k(teacher, k, temperature)
        read = losses.widened(_rounded(exact))
        p, other = (_all(known, np.exp) for known in (exact, read))
        log_p = np.where(p > 0, _all(exact, np.asarray), 0.0)
        np.testing.assert_allclose(other.sum(-1), 1.0, rtol=1e-6)
        entropy = -np.sum(p * log_p, -1)
        assert np.all(np.abs(other - p).sum(-1) <= 2**-10 * entropy + 2e-6)
        agreeing = losses.top_k_kl(teacher, read, temperature)
        assert jnp.all(jnp.abs(agreeing) <= temperature**2 * (2**-10 * entropy) ** 2 + 1e-5)


def _all(known, function):
    return np.concatenate([function(known.log_probs), function(known.tail)[..., None]], axis=-1)


def test_fewer_tokens_are_as_if_found_so(whole):
    known = losses.top_k(whole, 9, 2.0)
    for k in (1, 4, 9):
        found, expected = losses.narrowed(known, k), losses.top_k(whole, k, 2.0)
        np.testing.assert_array_equal(found.indices, expected.indices)
        np.testing.assert_array_equal(found.log_probs, expected.log_probs)
        np.testing.assert_allclose(found.tail, expected.tail, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="top_k is 10, and 9 tokens of the teacher are known"):
        losses.narrowed(known, 10)


def test_training_sees_what_it_would_see_online(directory):
    """Loss and gradient of shuffled rows of several documents, of fewer tokens than are known:
    2^-10 of the loss and 2^-9 of the gradient, for an entropy of about 2 nats."""
    text, teacher = rows(), model()
    text["mask"][:, 4] = False
    known = teacher_cache.read(directory, made_of(), K)
    stream = PackedBatches(text | {"teacher": known}, batch_size=4, seed=3)
    student = jom.init(CONFIG, jax.random.key(7))
    loss = next_token_loss(CONFIG, (Term(LogitLoss("forward_kl", 2.0, top_k=K - 2)),))

    def total(params, context, batch) -> tuple[jax.Array, Sums]:
        sums = loss(params, context, batch, jnp.int32(0))
        return sums.total / sums.count, sums

    of = jax.jit(jax.value_and_grad(total, has_aux=True))
    for step in (0, 1):
        batch = jax.tree.map(jnp.asarray, stream.batch(step))
        (found, sums), gradient = of(student, None, batch)
        del batch["teacher"]
        (expected, others), its_gradient = of(student, teacher.params, batch)
        assert sums.count == others.count == 4 * (T - 2 - 1)
        assert abs(found - expected) < 2**-10 * expected
        apart, size = (
            jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree)))
            for tree in (jax.tree.map(jnp.subtract, gradient, its_gradient), its_gradient)
        )
        assert apart < 2**-9 * size


def test_more_tokens_tell_more(directory, whole):
    student = 3 * jax.random.normal(jax.random.key(5), whole.shape)
    known = losses.widened(teacher_cache.read(directory, made_of(), K))
    of = jax.jit(
        lambda k: losses.top_k_kl(student, losses.narrowed(known, k), 2.0), static_argnums=0
    )
    found = [of(k) for k in range(1, K + 1)]
    for less, more in zip(found, [*found[1:], losses.forward_kl(student, whole, 2.0)], strict=True):
        assert jnp.all(less <= more * (1 + 2**-8))
    assert jnp.all(found[0] < found[-1])


@pytest.mark.parametrize("shape", [{"data": 4, "model": 2}, {"data": 2, "model": 1}])
def test_a_mesh_writes_the_same(directory, tmp_path, shape):
    mesh = make_mesh(shape)
    write(
        tmp_path / "teacher", model=replace(model(), params=shard(model().params, mesh)), mesh=mesh
    )
    found, expected = (
        teacher_cache.read(x, made_of(), K) for x in (tmp_path / "teacher", directory)
    )
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, rtol=2**-10, atol=1e-6)
    np.testing.assert_allclose(found.tail, expected.tail, rtol=1e-4)


def test_another_teacher_is_refused(directory):
    others = {
        "model": made_of(model=model(1)),
        "tokens": made_of(rows=rows(1)),
        "starts": made_of(rows={"tokens": rows()["tokens"]}),
        "temperature": made_of(1.0),
        "length": made_of(rows={name: x[:, :8] for name, x in rows().items()}),
        "rows": made_of(rows={name: x[:4] for name, x in rows().items()}),
        "dtype": replace(made_of(), dtype="bfloat16"),
        "vocabulary": replace(made_of(), vocabulary=65),
    }
    for name, other in others.items():
        with pytest.raises(UserError, match=f"teacher, made of tiny, has {name} .* this run"):
            teacher_cache.read(directory, other, K)
    theta = replace(model(), config=replace(CONFIG, rms_norm_eps=1e-2))
    with pytest.raises(UserError, match="has model '"):
        teacher_cache.read(directory, made_of(model=theta), K)
    with pytest.raises(UserError, match=f"has the {K} most likely tokens, and this run needs 9"):
        teacher_cache.read(directory, made_of(), 9)


def test_what_is_no_teacher(tmp_path):
    target = tmp_path / "teacher"
    with pytest.raises(UserError, match=r"holds no teacher \(it has no readable teacher.json\)"):
        teacher_cache.read(target, made_of(), K)
    write(target)
    marker, tail = target / "teacher.json", target / "tail.npy"
    described, content = json.loads(marker.read_text()), tail.read_bytes()
    for wrong in (content[:-4], content[:20], b"", None):
        tail.unlink() if wrong is None else tail.write_bytes(wrong)
        with pytest.raises(UserError, match=r"tail.npy is damaged .* remove .*teacher"):
            teacher_cache.read(target, made_of(), K)
    np.save(tail, np.zeros((N, T)))
    with pytest.raises(UserError, match=r"tail.npy is damaged \(it is float64 \[6, 12\]\)"):
        teacher_cache.read(target, made_of(), K)
    marker.write_text(json.dumps(described | {"format": 2}))
    with pytest.raises(UserError, match="has format 2, and this run 1"):
        teacher_cache.read(target, made_of(), K)
    marker.write_text("[]")
    with pytest.raises(UserError, match="holds no teacher"):
        teacher_cache.read(target, made_of(), K)


def test_what_cannot_be_written(tmp_path):
    broken = model()
    broken.params["norm"]["weight"] = broken.params["norm"]["weight"].at[0].set(jnp.nan)
    refused = partial(pytest.raises, UserError)
    with refused(match="logits of tiny are not finite in rows 0 to 3 of the text"):
        write(tmp_path / "teacher", model=broken)
    with refused(match="top_k is 65; choose 1 to 64"):
        write(tmp_path / "teacher", k=V + 1)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with refused(match=r"cannot write .*teacher \(.*\); it takes .* GB"):
        write(tmp_path / "file" / "teacher")


def test_a_run_beside_this_one_may_be_faster(directory, tmp_path):
    """Several that begin together all end with the same teacher."""
    target = tmp_path / "teacher"

    def other(items, description):
        yield from items
        write(target)

    write(target, progress=other)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]
    teacher_cache.read(target, made_of(), K)


def test_a_killed_writer_leaves_nothing_that_loads(tmp_path):
    script = Path(__file__).parent / "teachers.py"
    command = [sys.executable, str(script), str(tmp_path), *MOMENTS]
    subprocess.run(command, check=True, timeout=240, capture_output=True)
    for moment in MOMENTS:
        target = tmp_path / moment / "teacher"
        assert any(target.parent.iterdir()) and not target.exists()
        with pytest.raises(UserError, match="holds no teacher"):
            teacher_cache.read(target, made_of(), K)
    write(target)
    assert [path.name for path in target.parent.iterdir()] == ["teacher"]
    teacher_cache.read(target, made_of(), K)


def test_processes_of_a_distributed_run_write_together(directory, tmp_path):
    """Each the rows that it has, and each reads those of its own devices."""
    code = """
import sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
from jaxopt_models.distributed import initialize_distributed
from jaxopt_models.sharding import make_mesh, shard
process, port, target = int(sys.argv[1]), *sys.argv[2:]
initialize_distributed(f"localhost:{port}", 2, process)
from dataclasses import replace
from jaxopt_models.data import global_batch
from jaxopt_models.distill import teacher_cache
from teachers import K, made_of, model, write
mesh = make_mesh({"data": 2, "model": 2})
write(target, model=replace(model(), params=shard(model().params, mesh)), mesh=mesh)
known = teacher_cache.read(target, made_of(), K)
batch = global_batch(known.indices, np.array([5, 2, 0, 1]), mesh, jax.P("data"))
for part in batch.addressable_shards:
    np.testing.assert_array_equal(part.data, known.indices[[[5, 2], [0, 1]][process]])
"""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(i), str(port), str(tmp_path / "teacher")],
            cwd=Path(__file__).parent,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        for i in range(2)
    ]
    errors = [child.communicate(timeout=240)[1].decode() for child in children]
    assert [child.returncode for child in children] == [0, 0], "\n".join(errors)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]
    found, expected = (
        teacher_cache.read(x, made_of(), K) for x in (tmp_path / "teacher", directory)
    )
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_allclose(found.tail, expected.tail, rtol=1e-4)
