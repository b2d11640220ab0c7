"""Keeping the mask under ``transformers.Trainer`` and what is built on it (TRL's trainers, axolotl), in one line."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from halve.checkpoint.durable import write_file, writing
from halve.checkpoint.shards import file_of
from halve.errors import InputError
from halve.learning.keeping import KeptMasks, keep_masks, keep_these
from halve.learning.pruned_weights import MASKS, check_written, read_masks
from halve.maths.pattern import Pattern


class KeepMasks(TrainerCallback):
    """A callback that keeps the pruned weights of a model at zero, as `keep_masks`: ``Trainer(callbacks=[…])``.

    The masks are taken when training begins, and stay fixed: a file ``halve.masks`` in the output directory and in
    every checkpoint has them, and a resumed training takes them from there. After each checkpoint, and at the end, all
    pruned weights are looked at, in memory and, where the checkpoint has files of safetensors, in their bytes.

    Args:
        pattern: that the model's matrices have; None takes that on record, or 2:4.
        record: the directory of the pruned checkpoint, or of a training's checkpoint with ``halve.masks``; None looks
            where the model was loaded from, and on resuming in the output directory.

    Raises:
        PatternError: ``pattern`` is none.
    """

    def __init__(self, pattern: str | Pattern | None = None, record: str | Path | None = None) -> None:
        self._pattern = None if pattern is None else Pattern.parse(pattern)
        self._record = record
        self._kept: KeptMasks | None = None
        self._packed: dict[str, Tensor] = {}

    @property
    def kept(self) -> KeptMasks | None:
        """The handle of the masks that are kept; None before training has begun."""
        return self._kept

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_others: Any,
    ) -> None:
        """Take the masks, or on resuming those of the checkpoint.

        Raises:
            InputError: as `keep_masks`; a resumed training has no masks; the trainer uses DeepSpeed, or searches
                hyperparameters.
        """
        if model is None:
            raise InputError("KeepMasks was called without a model: use it as a callback of transformers.Trainer")
        if args.deepspeed or getattr(args, "deepspeed_plugin", None):
            raise InputError(
                "KeepMasks does not work with DeepSpeed, whose optimisers step flattened copies of the weights, which "
                "no mask reaches: use FSDP2 or plain data parallelism"
            )
        if state.is_hyper_param_search:
            raise InputError("KeepMasks does not work with hyperparameter_search: train each setting by itself")
        saved = self._saved(args, state) if state.global_step else None
        if saved is None:
            self._kept = keep_masks(model, self._pattern, record=self._record)
        else:
            self._kept = keep_these(model, lambda inner: read_masks(inner, saved))
        if args.save_strategy != "no":
            packed = self._kept.state_dict()
            if args.should_save:
                self._packed = packed
                self._write(Path(str(args.output_dir)))

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_others: Any,
    ) -> None:
        """Write the masks into the checkpoint that was just written, and check its bytes.

        Raises:
            HalveError: a pruned weight is not zero; the volume is full, or failed.
        """
        self._check()
        if args.should_save and model is not None:
            directory = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            self._write(directory)
            check_written(model, self._packed, directory)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_others: Any,
    ) -> None:
        """Check the pruned weights; they are kept on after it, until ``kept.remove()``.

        Raises:
            HalveError: one is not zero.
        """
        self._check()

    def _check(self) -> None:
        if self._kept is not None:
            self._kept.check()

    def _saved(self, args: TrainingArguments, state: TrainerState) -> Path | None:
        """Return the file of masks of a training that goes on; None where there is none, and a record was given."""
        out = Path(str(args.output_dir))
        given = [Path(args.resume_from_checkpoint)] if isinstance(args.resume_from_checkpoint, str) else []
        for directory in (*given, out / f"checkpoint-{state.global_step}", out):
            if (directory / MASKS).is_file():
                return directory / MASKS
        if self._record is not None:
            return None
        raise InputError(
            f"training goes on after step {state.global_step}, and there is no {MASKS} in {out}, so which weights were "
            "pruned is not known: give KeepMasks(record=…) the directory of the checkpoint that has it, or, if it was "
            "begun without KeepMasks, that of the pruned model"
        )

    def _write(self, directory: Path) -> None:
        with writing(directory):
            write_file(directory / MASKS, file_of(self._packed), "masks")
