"""Ray, and nothing else of it than is used: a cluster, actors on it, and messages to and from them."""

import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any

import torch

from halve.errors import InputError, counted, one_line
from halve.workers import terms
from halve.workers.messages import Message
from halve.workers.worker import Worker

Pending = Any
"""A reference to what a worker is going to answer."""
_CONNECTS = 10.0
"""Seconds within which a cluster has to accept a connection."""
_LOOK = 1.0
"""Seconds between two looks at who is late."""


class Hand:
    """What reaches one worker."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def call(self, method: str, *args: Any) -> Pending:
        """Let the worker do something after all that it was told before."""
        return getattr(self._actor, method).remote(*args)

    def kill(self) -> None:
        """End the worker at once."""
        import ray

        with suppress(Exception):  # it may be gone already
            ray.kill(self._actor)

    def close(self) -> None:
        """Let the worker tidy up."""
        import ray

        with suppress(ray.exceptions.RayError):
            ray.get(self._actor.close.remote(), timeout=10)


class Cluster:
    """A cluster that workers are hired on.

    Args:
        workers: how many there are to be.
        threads: of the CPU for each.
        device: that each works on.
        own: whether the cluster is this process's own, on this machine.
        early: whether workers are to come up at once.

    Attributes:
        workers: see above.
        own: see above.
    """

    def __init__(self, workers: int, threads: int, device: torch.device, *, own: bool, early: bool) -> None:
        import ray

        gpus = 1 if device.type == "cuda" else 0
        self._actor = ray.remote(Worker).options(
            num_cpus=threads, num_gpus=gpus, max_restarts=0, scheduling_strategy="SPREAD"
        )
        self.workers = workers
        self.own = own
        # They come up while the driver loads the model.
        self._waiting = [Hand(self._actor.remote()) for _ in range(workers)] if early else []

    def hire(self) -> Hand:
        """Return one of the workers that are coming up, or ask for one more."""
        return self._waiting.pop() if self._waiting else Hand(self._actor.remote())

    def put(self, message: Message) -> Any:
        """Put a message where all workers can read it.

        Raises:
            HalveError: there is no room for it.
        """
        import ray

        try:
            return ray.put(message)
        except ray.exceptions.RayError as error:
            raise terms.no_room(error) from error

    def first_of(self, pending: Sequence[Pending]) -> Pending | None:
        """Return an answer that is there, None if there is none within a second."""
        import ray

        ready, _ = ray.wait(list(pending), num_returns=1, timeout=_LOOK, fetch_local=False)
        return ready[0] if ready else None


@contextmanager
def cluster(workers: int | str, threads: int, device: torch.device, *, early: bool) -> Iterator[Cluster]:
    """Start workers on this machine, or reach those of a cluster.

    Args:
        workers: how many to start on this machine, or on the cluster that ``RAY_ADDRESS`` names; or the address of a
            cluster, all of which is used.
        threads: of the CPU for each worker.
        device: that each works on.
        early: whether they are to come up at once, before they are hired.

    Raises:
        InputError: the cluster cannot be reached, or it has no room for so many workers.
    """
    import ray

    address = workers if isinstance(workers, str) else os.environ.get("RAY_ADDRESS", "")
    begun = not ray.is_initialized()
    own = begun and not address
    if begun:
        _connect(address, workers, threads, device)
    try:
        room = _room(threads, device)
        wanted = workers if isinstance(workers, int) else room
        if not 1 <= wanted <= room:
            raise InputError(
                f"workers = {workers!r} asks for {wanted} with {counted(threads, 'CPU thread')} each, and the cluster "
                f"has room for {room}: ask for fewer, or for fewer worker_threads"
            )
        yield Cluster(wanted, threads, device, own=own, early=early)
    finally:
        if begun:
            ray.shutdown()


def _room(threads: int, device: torch.device) -> int:
    """Return how many workers have room on the nodes of the cluster."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    room = 0
    for node in nodes:
        resources = node["Resources"] if node["Alive"] else {}
        here = resources.get("CPU", 0) // threads
        room += int(min(here, resources.get("GPU", 0)) if device.type == "cuda" else here)
    return room


def check_cluster(workers: int | str) -> None:
    """Refuse workers that cannot be had, before anything expensive is done.

    Raises:
        InputError: Ray is not installed, or nothing listens at the address.
    """
    if find_spec("ray") is None:
        raise InputError("workers need Ray: pip install 'halve[ray]', or leave workers out")
    if address := workers if isinstance(workers, str) else os.environ.get("RAY_ADDRESS", ""):
        _check_listening(address)


def _check_listening(address: str) -> None:
    """Refuse an address where nothing listens, for which Ray itself would wait for minutes.

    Raises:
        InputError: it is no address, or no connection can be made.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address in ("auto", "local"):
        return
    if not host or not port.isdecimal():
        raise InputError(f"workers = {address!r} is neither a number nor an address: give 4, auto or ray://host:10001")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECTS).close()
    except OSError as error:
        raise InputError(
            f"the cluster at {address} cannot be reached ({one_line(error)}): see ray status, or leave workers out"
        ) from error


def _connect(address: str, workers: int | str, threads: int, device: torch.device) -> None:
    """Start a cluster on this machine, which other machines cannot reach, or join the one at an address.

    From version 2.59 Ray lets nobody into the former who has not the token of this user.
    """
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address:
        options["address"] = address
    elif isinstance(workers, int):
        gpus = torch.cuda.device_count() if device.type == "cuda" else 0
        options |= {
            "address": "local",
            "num_cpus": workers * threads,
            "num_gpus": gpus,
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
        }
    ours = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Ray's own, on what it is going to change
            ray.init(**options)
    except Exception as error:
        where = f"the cluster at {address} cannot be reached" if address else "Ray cannot be started on this machine"
        raise InputError(f"{where} ({one_line(error)}): see ray status, or leave workers out") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)  # which Ray replaces
