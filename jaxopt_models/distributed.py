"""Several processes as one run: each has devices of its own and executes the same program.

What is written, one process writes; arrays are saved by all of them together.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxopt_models.errors import UserError


def initialize_distributed(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    local_device_ids: Sequence[int] | None = None,
) -> None:
    """Joins this process to the others of a run.

    It belongs at the entry of a command, before anything else of JAX; the library never calls it.
    Under Slurm, Open MPI, Kubernetes and on TPU the environment tells what is not given.

    Args:
      coordinator_address: "host:port" of process 0.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      local_device_ids: devices of this host that this process uses. None is one for each process of
        a host where the environment tells which one this is, and all if the other arguments are
        given.

    Raises:
      UserError: when an argument is wrong, or missing and the environment does not tell it; or when
        the processes do not find each other.
    """
    if coordinator_address is not None and not coordinator_address.rpartition(":")[2].isdecimal():
        raise UserError(f"coordinator {coordinator_address!r} has no port; give it as HOST:PORT")
    given = None not in (coordinator_address, num_processes, process_id)
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            local_device_ids,
            cluster_detection_method="deactivate" if given else None,
        )
    except (ValueError, TypeError) as error:
        raise UserError(
            f"this process cannot join a distributed run ({error}); give the coordinator's "
            "address, the number of processes and which one this is"
        ) from error
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the processes of the run did not find each other ({reason}); start all of them, with "
            "a port of process 0's host that is free and that they reach"
        ) from error


def agree(settings: Mapping[str, Any]) -> None:
    """Waits for all processes and compares what they were told.

    Args:
      settings: JSON values by name, the same names on each process.

    Raises:
      UserError: on every process, for the first setting in which one differs from process 0.
    """
    if jax.process_count() == 1:
        return
    own = [zlib.crc32(json.dumps(value, sort_keys=True).encode()) for value in settings.values()]
    found = multihost_utils.process_allgather(np.array(own, np.uint32))
    for name, sums in zip(settings, np.asarray(found).T, strict=True):
        if (sums != sums[0]).any():
            process = int(np.argmax(sums != sums[0]))
            raise UserError(
                f"process {process} has another {name!r} than process 0; start all processes of a "
                "run with the same settings"
            )


def on_host(array: jax.Array) -> np.ndarray:
    """The whole array, for every process; all of them have to ask for it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
