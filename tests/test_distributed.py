"""Processes of one run: how they find each other, and that they mean the same run."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxopt_models import distributed
from jaxopt_models.errors import UserError


def test_initialize_distributed():
    code = """
import socket
import jax
from jaxopt_models.distributed import initialize_distributed
from jaxopt_models.errors import UserError
try:
    initialize_distributed()
except UserError as error:
    assert "give the coordinator's address, the number of processes" in str(error)
else:
    raise AssertionError("no error")
with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
initialize_distributed(f"localhost:{port}", 1, 0)
assert jax.process_count() == 1 and jax.distributed.is_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_processes_have_to_be_told_the_same(monkeypatch):
    """What is gathered are the sums of process 0, which asked first, and of process 1."""
    asked = []

    def gathered(sums):
        asked.append(sums)
        return np.stack([asked[0], sums])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed.multihost_utils, "process_allgather", gathered)
    distributed.agree({"steps": 4, "mesh": {"data": 2}})
    with pytest.raises(UserError, match="process 1 has another 'mesh' than process 0"):
        distributed.agree({"steps": 4, "mesh": {"fsdp": 2}})
