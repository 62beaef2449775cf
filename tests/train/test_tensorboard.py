"""What a run writes for TensorBoard, read back from its event files."""

import struct
import sys

import pytest
from tensorboardX.proto import event_pb2

from jaxopt_models.errors import UserError
from jaxopt_models.train.loop import Log
from jaxopt_models.train.tensorboard import board, summary_writer


def _scalars(directory):
    """(step, name, value) of every event: records of length, its check, content and its check."""
    found = []
    for file in sorted(directory.iterdir()):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (size,) = struct.unpack_from("<Q", content, at)
            event = event_pb2.Event.FromString(  # pyright: ignore[reportAttributeAccessIssue]
                content[at + 12 : at + 12 + size]
            )
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            at += 12 + size + 4
    return found


def test_every_line_is_there(tmp_path):
    with board(tmp_path / "board", 0) as also:
        log = Log(tmp_path / "log.jsonl", also=also)
        log(2, {"loss": 1.5, "skipped": 0.0})
        log(4, {"loss": 1.25})
    expected = [(2, "loss", 1.5), (2, "skipped", 0.0), (4, "loss", 1.25)]
    assert _scalars(tmp_path / "board") == expected
    assert [line["step"] for line in log.lines] == [2, 4]


def test_a_package_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match="run `pip install tensorboardX`, or leave out"):
        summary_writer()
