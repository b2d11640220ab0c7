"""The compiled part of the runtime: there, absent, or there and not to be loaded; each in a process of its own."""

import json
import subprocess
import sys

import pytest

REPORT = "import json; from halve.runtime import compiled as c; print(json.dumps([c.library is None, c.broken]))"
BROKEN = """
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import spec_from_file_location

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "halve.runtime._native":
            file = sys.argv[1]
            return spec_from_file_location(name, file, loader=ExtensionFileLoader(name, file))

sys.meta_path.insert(0, Finder)
"""


@pytest.fixture
def reported(tmp_path):
    """What a process finds after some code: whether there is no module, and why it could not be loaded."""
    file = tmp_path / "_native.so"
    file.write_bytes(b"no library\n" * 100)

    def call(code):
        command = [sys.executable, "-c", f"{code}\n{REPORT}", str(file)]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    return call


def test_a_module_that_is_there_and_does_not_load_says_why(reported):
    absent, why = reported(BROKEN)
    assert absent
    assert "_native.so: " in why
    assert "\n" not in why


def test_what_was_not_built_is_not_broken(reported):
    assert reported("import sys; sys.modules['halve.runtime._native'] = None") == [True, ""]


def test_a_module_that_loads_is_not_broken(reported):
    assert reported("")[1] == ""
