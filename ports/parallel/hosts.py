"""Several hosts as one run: JAX's own processes (`jax.distributed`), and what one tells the others.

Every host runs the same command. Hosts count from 0, and host 0 speaks for all.
"""

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def join(address: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """Makes this process one of several hosts; call it before anything else of JAX.

    Args:
        address: host 0's, as "HOST:PORT"; None where the cluster tells it (TPU pods, Slurm, MPI).
        count, index: how many hosts there are, and which of them this is; None as above.

    Raises ValueError when the three don't fit, or the hosts do not find each other.
    """
    given = (address, count, index)
    if any(value is None for value in given) and any(value is not None for value in given):
        raise ValueError(
            f"got address {address}, {count} hosts, index {index}; expected all three, or none "
            "where the cluster tells them"
        )
    if count is not None and index is not None and not 0 <= index < count:
        raise ValueError(f"host index is {index}; expected 0 to {count - 1}, of {count} hosts")
    try:
        jax.distributed.initialize(address, count, index)
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        if address is None:
            raise ValueError(
                f"no cluster tells this process its hosts ({first}); start it on a TPU pod slice, "
                "by Slurm or by MPI, or give ADDRESS:PORT,COUNT,INDEX"
            ) from error
        raise ValueError(
            f"the hosts did not find each other ({first}); give each the address of host 0, the "
            "number of hosts and its own index"
        ) from error


def is_first() -> bool:
    """Whether this is host 0, or the only one."""
    return jax.process_index() == 0


def tell(value: Any) -> Any:
    """Host 0's JSON value, on every host; all of them must call it. Waits for the slowest."""
    if jax.process_count() == 1:
        return value
    content = np.frombuffer(json.dumps(value).encode() if is_first() else b"", np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = np.zeros(length, np.uint8)
    padded[: len(content)] = content
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())
