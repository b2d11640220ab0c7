"""How a training was launched: how many processes train together, which of them this is, and what is refused."""

import os

from halve.errors import InputError


def is_first_process() -> bool:
    """Whether this is the process that writes, of several that train together."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """Return how many processes train together, as ``torchrun`` and ``accelerate launch`` say."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_launcher() -> None:
    """Refuse to train sharded: states are written by the first process alone, which would then have only a part.

    Raises:
        InputError: accelerate was told to shard the model.
    """
    sharding = {
        "ACCELERATE_USE_FSDP": "FSDP",
        "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
        "ACCELERATE_USE_MEGATRON_LM": "Megatron",
    }
    for name, what in sharding.items():
        if os.environ.get(name, "").lower() in {"1", "true", "yes"}:
            raise InputError(
                f"this training does not shard a model, and accelerate is told to use {what} ({name}): launch it "
                "without (torchrun, or accelerate launch --multi_gpu), or train in a loop of your own with "
                "halve.keep_masks"
            )
