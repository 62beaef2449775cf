"""The safetensors reader and writer: every dtype, sharding, and every way a file can be damaged."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxopt_models.checkpoint import safetensors as st
from jaxopt_models.checkpoint.safetensors_writer import write_sharded
from jaxopt_models.errors import UserError


def random_bits(rng, shape, dtype):
    """An array of any dtype whose bytes are random, NaN payloads included."""
    dtype = np.dtype(dtype)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(np.bool_)
    count = int(np.prod(shape)) * dtype.itemsize
    return rng.integers(0, 256, count).astype(np.uint8).view(dtype).reshape(shape)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.fixture
def tensors(rng):
    """One tensor of each dtype with an odd number of bytes, besides scalars and empty tensors."""
    table = {f"odd.{code}": random_bits(rng, (3, 5), dtype) for code, dtype in st.DTYPES.items()}
    table["scalar"] = np.float32(2.5).reshape(())
    table["empty"] = np.zeros((0, 4), np.float32)
    return table


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("max_shard_bytes", [2**30, 64, 1])
def test_write_then_read_keeps_every_bit(tmp_path, tensors, max_shard_bytes):
    write_sharded(tmp_path / "new", tensors, max_shard_bytes=max_shard_bytes)
    index = st.open_index(tmp_path / "new")
    assert index.names() == tuple(sorted(tensors))
    for name, array in tensors.items():
        assert index.dtype(name) == array.dtype and index.shape(name) == array.shape
        assert same_bits(index.read(name), array), name


def test_every_tensor_starts_at_a_multiple_of_its_item_size(tmp_path, tensors):
    (file,) = write_sharded(tmp_path, tensors)
    for tensor in st.open_index(file).tensors.values():
        assert tensor.start % tensor.dtype.itemsize == 0


def test_the_safetensors_package_reads_what_we_write(tmp_path, rng):
    dtypes = (np.float32, np.float16, ml_dtypes.bfloat16, np.int8)
    tensors = {np.dtype(d).name: random_bits(rng, (4, 6), d) for d in dtypes}
    (file,) = write_sharded(tmp_path, tensors)
    theirs = safetensors.numpy.load_file(file)
    assert all(same_bits(theirs[name], array) for name, array in tensors.items())


def test_we_read_what_the_safetensors_package_writes(tmp_path, rng):
    dtypes = (np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu)
    tensors = {np.dtype(d).name: random_bits(rng, (4, 6), d) for d in dtypes}
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    index = st.open_index(tmp_path / "a.safetensors")
    assert all(same_bits(index.read(name), array) for name, array in tensors.items())


def test_reading_is_a_read_only_view(tmp_path, rng):
    write_sharded(tmp_path, {"w": random_bits(rng, (4, 4), np.float32)})
    view = st.open_index(tmp_path).read("w")
    assert not view.flags.owndata and not view.flags.writeable


def test_shards_respect_the_limit_and_are_listed(tmp_path):
    tensors = [(f"t{i}", np.full(10, i, np.uint8)) for i in range(7)]
    *shards, index = write_sharded(tmp_path, iter(tensors), max_shard_bytes=25)
    assert [s.name for s in shards] == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    text = json.loads(index.read_text())
    assert text["metadata"] == {"total_size": 70}
    assert text["weight_map"]["t6"] == shards[-1].name
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        path.name for path in (*shards, index)
    )


def test_writing_takes_one_tensor_at_a_time(tmp_path):
    alive = []

    def stream():
        for i in range(4):
            array = np.zeros(1000, np.uint8)
            alive.append(array.__array_interface__["data"][0])
            yield f"t{i}", array
            del array

    write_sharded(tmp_path, stream())
    assert len(set(alive)) <= 2  # freed memory is used again


def test_writing_refuses_what_it_cannot_write(tmp_path):
    four_bit = np.zeros((2, 2), ml_dtypes.int4)
    with pytest.raises(UserError, match="'w' has dtype int4.*pack"):
        write_sharded(tmp_path / "a", {"w": four_bit})
    with pytest.raises(UserError, match="'w' would be written twice"):
        write_sharded(tmp_path / "b", [("w", np.zeros(1)), ("w", np.zeros(1))])
    assert not list((tmp_path / "a").iterdir()) and not list((tmp_path / "b").iterdir())
    write_sharded(tmp_path / "c", {"w": np.zeros(1)})
    with pytest.raises(UserError, match="already exists"):
        write_sharded(tmp_path / "c", {"w": np.zeros(1)})


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def raw(header, data=b"\0" * 8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


DAMAGED = {
    "empty": (b"", "truncated"),
    "short": (b"\x01\x00", "truncated"),
    "header beyond the file": ((10**6).to_bytes(8, "little") + b"{}", "truncated"),
    "not JSON": (raw(b"{oops"), "not valid JSON"),
    "not text": (raw(b"\xff\xfe"), "not valid JSON"),
    "not an object": (raw(b"[1]"), "not a JSON object"),
    "a name twice": (raw(b'{"a": 1, "a": 2}'), "occurs twice"),
    "no dtype": (raw({"w": {"shape": [2], "data_offsets": [0, 8]}}), "'w' has a malformed"),
    "negative shape": (raw({"w": entry(shape=(-2,))}), "'w' has a malformed"),
    "three offsets": (raw({"w": entry(offsets=(0, 4, 8))}), "'w' has a malformed"),
    "unknown dtype": (raw({"w": entry("F4")}), "'w' has dtype 'F4'"),
    "shape and offsets disagree": (raw({"w": entry(shape=(3,))}), "needs 12 bytes.*span 8"),
    "data beyond the file": (raw({"w": entry(shape=(4,), offsets=(0, 16))}), "truncated"),
    "overlap": (
        raw({"v": entry(), "w": entry(offsets=(4, 12))}, b"\0" * 12),
        "'w' overlaps its neighbour",
    ),
    "gap": (raw({"w": entry(offsets=(4, 12))}, b"\0" * 12), "'w' leaves a gap"),
    "bytes to spare": (raw({"w": entry()}, b"\0" * 9), "1 bytes belong to no tensor"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_file(tmp_path, case):
    data, message = DAMAGED[case]
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=f"(?s)model.safetensors.*{message}"):
        st.open_index(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match="nowhere.safetensors: no such file"):
        st.open_index(tmp_path / "nowhere.safetensors")
    with pytest.raises(UserError, match="holds neither"):
        st.open_index(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="pytorch_model.bin: pickled.*convert"):
        st.open_index(tmp_path)
    with pytest.raises(UserError, match="pytorch_model.bin: not a .safetensors file; convert"):
        st.open_index(tmp_path / "pytorch_model.bin")


def test_a_missing_tensor_is_named(tmp_path):
    write_sharded(tmp_path, {"w": np.zeros(1)})
    with pytest.raises(UserError, match="tensor 'v' is missing"):
        st.open_index(tmp_path).read("v")


@pytest.fixture
def sharded(tmp_path):
    *shards, index = write_sharded(
        tmp_path, {"a": np.zeros(4), "b": np.zeros(4)}, max_shard_bytes=32
    )
    return shards, index


def rewrite(index, change):
    text = json.loads(index.read_text())
    change(text)
    index.write_text(json.dumps(text))


def test_missing_shard(sharded):
    shards, index = sharded
    shards[1].unlink()
    with pytest.raises(UserError, match="00002-of-00002.safetensors: listed in .*index.json"):
        st.open_index(index.parent)


def test_index_and_shards_disagree(sharded):
    shards, index = sharded
    rewrite(index, lambda text: text["weight_map"].update(c=shards[0].name))
    with pytest.raises(UserError, match="tensor 'c' is listed in .* but missing"):
        st.open_index(index.parent)
    rewrite(index, lambda text: text["weight_map"].update(a=shards[1].name))
    with pytest.raises(UserError, match="holds tensor 'a', which .* does not place there"):
        st.open_index(index.parent)


def test_index_is_checked(sharded):
    _, index = sharded
    rewrite(index, lambda text: text["weight_map"].update(a="../secret.safetensors"))
    with pytest.raises(UserError, match="lies outside its directory"):
        st.open_index(index.parent)
    index.write_text("{}")
    with pytest.raises(UserError, match="no 'weight_map'"):
        st.open_index(index.parent)
