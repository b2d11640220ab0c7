"""Messages out of Ray's store, and what it means where one cannot be had: the one home of Ray's errors."""

from typing import Any

from halve.errors import HalveError, one_line
from halve.workers import terms
from halve.workers.messages import Message


class LostError(Exception):
    """A worker, or what it has answered, is gone; the text says why."""


def fetch(reference: Any) -> Message:
    """Return the message that a reference stands for.

    Raises:
        LostError: the worker was lost, or its answer was.
        HalveError: there is no room for it, or the worker failed by an error of the program.
    """
    import ray

    errors = ray.exceptions
    try:
        found: Any = ray.get(reference)
    except (errors.ObjectStoreFullError, errors.OutOfDiskError) as error:
        raise terms.no_room(error) from error
    except errors.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, Exception) else error
        if isinstance(cause, errors.ObjectStoreFullError | errors.OutOfDiskError):
            raise terms.no_room(cause) from error
        raise HalveError(f"a worker failed ({one_line(cause)}): this is a fault of the program") from error
    except errors.RayError as error:
        raise LostError(one_line(error)) from error
    message: Message = found
    return message
