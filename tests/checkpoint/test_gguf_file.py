"""The GGUF container: metadata, every tensor type, and every way a file can be damaged."""

import struct

import gguf
import ml_dtypes
import numpy as np
import pytest

from jaxopt_models.checkpoint.gguf_file import GgufFile
from jaxopt_models.errors import UserError

QUANTIZABLE = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
# Byte offsets of the float16 scales in one block of the types that gguf cannot quantize to.
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def write(path, metadata=(), tensors=()):
    writer = gguf.GGUFWriter(path, "llama")
    for add, key, value in metadata:
        getattr(writer, add)(key, value)
    for name, data, kind in tensors:
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(rng, kind, rows, blocks):
    """Rows of random blocks whose scales are finite."""
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    data = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for at in SCALES[kind]:
        scale = rng.normal(size=(rows, blocks, 1)).astype(np.float16)
        data[:, :, at : at + 2] = scale.view(np.uint8)
    return data.reshape(rows, blocks * size)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("kind", [*QUANTIZABLE, *SCALES])
def test_every_type_dequantizes_as_in_the_gguf_package(tmp_path, rng, kind, monkeypatch):
    number = gguf.GGMLQuantizationType[kind]
    if kind in SCALES:
        data = random_blocks(rng, kind, rows=7, blocks=2)
    else:
        data = gguf.quants.quantize(rng.normal(size=(7, 64)).astype(np.float32), number)
    expected = gguf.quants.dequantize(data, number)
    file = GgufFile(write(tmp_path / "a.gguf", tensors=[("w", data, number)]))
    # Rows in steps of two, the last one alone.
    monkeypatch.setattr("jaxopt_models.checkpoint.gguf_file._CHUNK", 2 * expected.shape[1])
    assert file.type_name("w") == kind and file.shape("w") == expected.shape
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(file.read("w"), expected)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_a_tensor_in_its_own_dtype_is_a_view_of_the_file(tmp_path, rng, kind):
    data = rng.normal(size=(7, 64)).astype(np.float32)
    number = gguf.GGMLQuantizationType[kind]
    stored = gguf.quants.quantize(data, number)
    file = GgufFile(write(tmp_path / "a.gguf", tensors=[("w", stored, number)]))
    dtypes = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    view = file.read("w", dtypes[kind])
    assert not view.flags.owndata and not view.flags.writeable
    assert view.shape == (7, 64) and view.dtype == dtypes[kind]
    np.testing.assert_array_equal(view.astype(np.float32), gguf.quants.dequantize(stored, number))


def test_shapes_and_vectors(tmp_path, rng):
    tensors = {"v": rng.normal(size=5), "t": rng.normal(size=(2, 3, 4))}
    rows = [(name, array.astype(np.float32), None) for name, array in tensors.items()]
    file = GgufFile(write(tmp_path / "a.gguf", tensors=rows))
    assert file.names() == ("t", "v") and "v" in file and "w" not in file
    for name, array in tensors.items():
        np.testing.assert_array_equal(file.read(name), array.astype(np.float32))


METADATA = [
    ("add_uint8", "u8", 200),
    ("add_int8", "i8", -100),
    ("add_uint16", "u16", 60000),
    ("add_int16", "i16", -30000),
    ("add_uint32", "u32", 4_000_000_000),
    ("add_int32", "i32", -2_000_000_000),
    ("add_uint64", "u64", 2**63),
    ("add_int64", "i64", -(2**62)),
    ("add_float32", "f32", 0.5),
    ("add_float64", "f64", 0.1),
    ("add_bool", "yes", True),
    ("add_string", "text", "añb▁\n"),
    ("add_array", "texts", ["a", "", "ü"]),
    ("add_array", "numbers", [1, 2, 3]),
    ("add_array", "floats", [0.5, -2.0]),
]


def test_metadata_of_every_type(tmp_path):
    found = GgufFile(write(tmp_path / "a.gguf", METADATA)).metadata
    for _, key, value in METADATA:
        got = found[key]
        assert (got.tolist() if isinstance(got, np.ndarray) else got) == value, key


def test_alignment_key_moves_the_data(tmp_path, rng):
    data = rng.normal(size=(2, 8)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_custom_alignment(256)
    writer.add_tensor("w", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    np.testing.assert_array_equal(GgufFile(tmp_path / "a.gguf").read("w"), data)


def damage(path, change):
    path.write_bytes(change(bytearray(path.read_bytes())))


def overwrite(at, data):
    def change(content):
        content[at : at + len(data)] = data
        return content

    return change


DAMAGED = {
    "empty": (lambda content: b"", "truncated or not a GGUF"),
    "other file": (overwrite(0, b"PK\x03\x04"), "not a GGUF file"),
    "old version": (overwrite(4, struct.pack("<I", 1)), "GGUF version 1"),
    "big-endian": (overwrite(4, struct.pack(">I", 3)), "version .*byte order"),
    "cut in the header": (lambda content: content[:60], "truncated or damaged"),
    "endless string": (overwrite(24, struct.pack("<Q", 2**62)), "truncated or damaged"),
    "unknown value type": (overwrite(24 + 8 + 20, struct.pack("<I", 77)), "truncated or damaged"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_file(tmp_path, rng, case):
    path = write(tmp_path / "a.gguf", METADATA, [("w", np.zeros((4, 32), np.float32), None)])
    change, message = DAMAGED[case]
    damage(path, change)
    with pytest.raises(UserError, match=f"a.gguf: .*{message}"):
        GgufFile(path)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="a.gguf: no such file"):
        GgufFile(tmp_path / "a.gguf")


def test_tensor_errors_name_the_tensor(tmp_path):
    unsupported = gguf.GGMLQuantizationType.IQ4_NL
    blocks = np.zeros((2, 18), np.uint8)
    tensors = [("odd", blocks, unsupported), ("last", np.zeros((4, 32), np.float32), None)]
    path = write(tmp_path / "a.gguf", tensors=tensors)
    damage(path, lambda content: content[:-200])
    file = GgufFile(path)
    with pytest.raises(UserError, match="'odd' has type IQ4_NL; supported are"):
        file.read("odd")
    with pytest.raises(UserError, match="'last' is truncated"):
        file.read("last")
    with pytest.raises(UserError, match="'other' is missing"):
        file.read("other")
