import json
import os
import signal

import pytest
import typer

from halve.cli.errors import (
    EXIT_FAILED,
    EXIT_FALLBACKS,
    EXIT_INTERRUPTED,
    EXIT_REFUSED,
    EXIT_STOPPED,
    reporting,
)
from halve.errors import (
    AlreadyCompleteError,
    CalibrationError,
    CorruptFileError,
    InputError,
    UnreadableFileError,
    UnsupportedModelError,
)


def ended(error, out=None):
    """Return the exit code with which a command ends that this error stopped."""
    with pytest.raises(typer.Exit) as caught, reporting(out):
        raise error
    return caught.value.exit_code


def test_every_kind_of_error_has_its_code(capsys):
    assert ended(InputError("bad")) == EXIT_REFUSED
    assert ended(UnsupportedModelError("odd")) == EXIT_REFUSED
    assert ended(CalibrationError("nan")) == EXIT_FAILED
    assert ended(KeyboardInterrupt()) == EXIT_INTERRUPTED
    said = capsys.readouterr().err.splitlines()
    assert said == ["error: bad", "error: odd", "error: nan", "interrupted"]


def test_what_can_be_resumed_says_so(tmp_path, capsys):
    error = CalibrationError("nan")
    error.unfinished = tmp_path
    assert ended(error) == EXIT_STOPPED
    assert f"continue with `halve resume {tmp_path}`" in capsys.readouterr().err
    (tmp_path / ".halve").mkdir()
    assert ended(KeyboardInterrupt(), tmp_path) == EXIT_STOPPED
    assert ended(KeyboardInterrupt(), tmp_path / "other") == EXIT_INTERRUPTED


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("fell_back", EXIT_FALLBACKS)])
def test_a_run_that_is_complete_already_has_the_code_of_its_record(tmp_path, status, code):
    (tmp_path / "halve.json").write_text(json.dumps({"matrices": [{"tensors": [], "status": status}]}))
    assert ended(AlreadyCompleteError("done"), tmp_path) == code


def test_a_run_that_is_complete_with_a_damaged_record_says_so(tmp_path, capsys):
    (tmp_path / "halve.json").write_text('{"matrices": [{"status": "ok"}]}')
    assert ended(AlreadyCompleteError("done"), tmp_path) == EXIT_REFUSED
    assert "halve.json is not as Halve writes it: `matrices[0]`: object missing" in capsys.readouterr().err


def test_a_termination_is_an_interruption_and_the_handler_goes_again():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(typer.Exit) as caught, reporting():
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.exit_code == EXIT_INTERRUPTED
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_file_that_cannot_be_read_is_refused_as_a_damaged_one_is():
    assert ended(UnreadableFileError("gone")) == ended(CorruptFileError("cut")) == EXIT_REFUSED
