import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jaxopt_models import data
from jaxopt_models.errors import UserError


class ByteTokenizer:
    """One id a byte, with a beginning-of-sequence id unless told otherwise."""

    def encode(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True):
        return [256] * add_special_tokens + list(text.encode())


# Text


def test_builtin_splits_are_long_and_disjoint():
    calibration, evaluation = data.builtin_text("calibration"), data.builtin_text("evaluation")
    assert len(calibration) > 600_000 and len(evaluation) > 300_000
    prose = [
        {paragraph for paragraph in text.split("\n\n") if len(paragraph) > 60}
        for text in (calibration, evaluation)
    ]
    assert not prose[0] & prose[1]


def test_builtin_text_imports_nothing_it_reads():
    """`import this` prints and `import antigravity` opens a browser: sources are parsed instead."""
    code = (
        "import sys; from jaxopt_models.data import builtin_text; before = set(sys.modules);"
        "builtin_text('calibration'), builtin_text('evaluation');"
        "print(*sorted(set(sys.modules) - before))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


def test_builtin_text_without_library_sources_names_the_file(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    data.builtin_text.cache_clear()
    with pytest.raises(UserError, match=r"topics\.py"):
        data.builtin_text("evaluation")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_text_file_is_read_whole(tmp_path, encoding):
    path = tmp_path / "text.txt"
    path.write_text("naïve\ntext\n", encoding=encoding)
    assert data.load_text(str(path)) == "naïve\ntext\n"


def test_hub_dataset_is_its_text_column(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "train.txt").write_text("one\ntwo\n")
    (folder / "test.txt").write_text("three\n")
    assert data.load_text(f"hf:{folder}") == "one\n\ntwo"
    assert data.load_text(f"hf:{folder}", "evaluation") == "three"
    assert data.load_text(f"hf:{folder}::train[:1]", "evaluation") == "one"


def _named(tmp_path: Path, name: str) -> str:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin1.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "numbers").mkdir()
    (tmp_path / "numbers" / "train.jsonl").write_text('{"number": 2, "square": 4}\n')
    return f"hf:{tmp_path / name[3:]}" if name.startswith("hf:") else str(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.txt", r"missing\.txt: No such file.*UTF-8 text file"),
        ("folder", r"folder: Is a directory"),
        ("empty.txt", r"empty\.txt is empty"),
        ("latin1.txt", r"latin1\.txt is not UTF-8 text \(byte 2\)"),
        ("hf:absent", r"cannot load the dataset hf:.*absent \(split train\)"),
        ("hf:numbers", r"numbers has no text column, only number, square"),
        ("hf:numbers::other", r"numbers::other \(split other\): Unknown split"),
        ("hf:numbers:cfg", r"numbers:cfg .*BuilderConfig 'cfg' not found"),
    ],
)
def test_unreadable_sources_are_named(tmp_path, monkeypatch, name, message):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(UserError, match=message):
        data.load_text(_named(tmp_path, name))


# Windows


def test_tokenize_adds_no_special_tokens():
    ids = data.tokenize(ByteTokenizer(), "abc")
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, [97, 98, 99])


def test_windows_start_at_multiples_of_the_stride():
    ids = np.arange(11, dtype=np.int32)
    np.testing.assert_array_equal(data.windows(ids, 3, 2), [[0, 1], [3, 4], [6, 7]])
    with_bos = data.windows(ids, 3, 4, bos=99)
    np.testing.assert_array_equal(with_bos, [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]])


@given(
    tokens=st.integers(0, 200),
    count=st.integers(1, 9),
    length=st.integers(2, 40),
    bos=st.none() | st.just(1000),
)
def test_windows_never_overlap_nor_run_past_the_end(tokens, count, length, bos):
    ids, body = np.arange(tokens, dtype=np.int32), length - (bos is not None)
    if tokens < count * body:
        with pytest.raises(UserError, match=rf"{tokens} tokens .* need {count * body};"):
            data.windows(ids, count, length, bos)
        return
    rows = data.windows(ids, count, length, bos)
    assert rows.shape == (count, length) and rows.dtype == np.int32
    text = rows if bos is None else rows[:, 1:]
    assert bos is None or (rows[:, 0] == bos).all()
    assert len(np.unique(text)) == count * body
    np.testing.assert_array_equal(np.diff(text[:, 0]), tokens // count)
    assert (np.diff(text, axis=1) == 1).all()


@pytest.mark.parametrize(("count", "length"), [(0, 8), (-1, 8), (4, 1), (4, 0)])
def test_windows_that_measure_nothing_are_refused(count, length):
    with pytest.raises(UserError, match="measure nothing"):
        data.windows(np.arange(100, dtype=np.int32), count, length)


def test_batches_keep_the_order_and_every_row():
    rows = np.arange(10, dtype=np.int32).reshape(5, 2)
    groups = data.batches(rows, 2)
    assert [len(group) for group in groups] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(groups), rows)


@pytest.mark.parametrize("size", [0, -3])
def test_an_empty_batch_is_refused(size):
    rows = np.zeros((4, 2), np.int32)
    for make in (data.batches, data.PackedBatches):
        with pytest.raises(UserError, match=f"batch_size is {size}"):
            make(rows, size)


# Training stream


def test_pack_puts_eos_between_documents_and_drops_the_rest():
    rows = data.pack([[1, 2, 3], np.array([4]), [5, 6]], length=4, eos=0)
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(rows, [[1, 2, 3, 0], [4, 0, 5, 6]])
    rows = data.pack([[1, 2, 3], np.array([4]), [5, 6]], length=3)
    np.testing.assert_array_equal(rows, [[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    ("documents", "length", "message"),
    [
        ([[1, 2]], 4, "3 tokens but one row needs 4"),
        ([], 4, "0 tokens"),
        ([[1]], 1, "train nothing"),
    ],
)
def test_pack_refuses_what_fills_no_row(documents, length, message):
    with pytest.raises(UserError, match=message):
        data.pack(documents, length, eos=0)


@given(
    count=st.integers(1, 12),
    batch_size=st.integers(1, 30),
    seed=st.integers(0, 2**32),
    stop=st.integers(0, 6),
)
def test_a_resumed_stream_goes_on_as_if_never_stopped(count, batch_size, seed, stop):
    rows = np.arange(2 * count, dtype=np.int32).reshape(count, 2)
    whole = data.PackedBatches(rows, batch_size, seed)
    expected = [whole.batch(step) for step in range(8)]
    resumed = data.PackedBatches(rows.copy(), batch_size, seed)
    for step in range(stop, 8):
        np.testing.assert_array_equal(resumed.batch(step), expected[step])


@given(count=st.integers(1, 12), batch_size=st.integers(1, 30), seed=st.integers(0, 2**32))
def test_every_row_is_seen_once_an_epoch(count, batch_size, seed):
    rows = np.arange(2 * count, dtype=np.int32).reshape(count, 2)
    stream = data.PackedBatches(rows, batch_size, seed)
    seen = np.concatenate([stream.batch(step) for step in range(count)])  # batch_size epochs
    for epoch in seen.reshape(batch_size, count, 2):
        np.testing.assert_array_equal(np.sort(epoch, axis=0), rows)


def test_epochs_and_seeds_are_shuffled_differently():
    rows = np.arange(128, dtype=np.int32).reshape(64, 2)
    first, second = (data.PackedBatches(rows, 64).batch(step) for step in (0, 1))
    assert (first != second).any()
    assert (data.PackedBatches(rows, 64, seed=1).batch(0) != first).any()


@pytest.mark.parametrize("spec", [P("data"), P("data", "model"), P(None, "model"), P()])
def test_global_batch_is_split_over_the_mesh(spec):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows = np.arange(96, dtype=np.uint16).reshape(12, 4, 2)
    for numbers in (np.array([7, 0, 11, 3, 3, 9, 1, 2]), np.arange(11, 3, -1).reshape(4, 2)):
        array = data.global_batch(rows, numbers, mesh, spec)
        whole = rows[numbers]
        assert array.dtype == np.uint16 and array.sharding == jax.NamedSharding(mesh, spec)
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index])


def test_each_shard_is_read_once_and_nothing_else():
    """So that processes of a distributed run read their own rows of a file only."""
    read = []

    class Rows(np.ndarray):
        def __getitem__(self, index):
            read.append(index)
            return np.asarray(self)[index]

    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows = np.arange(48).reshape(12, 4).astype(np.int32).view(Rows)
    data.global_batch(rows, np.array([7, 0, 11, 3]), mesh, P("data"))
    assert sorted(int(numbers[0]) for numbers in read) == [0, 3, 7, 11]


def test_global_batch_that_does_not_divide_is_refused():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(UserError, match=r"\(6, 4\) does not divide .*'data': 8"):
        data.global_batch(np.zeros((9, 4), np.int32), np.arange(6), mesh, P("data"))
