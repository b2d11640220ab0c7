"""Versions of installed packages, without which no measured figure can be repeated."""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import torch


def package_version(package: str) -> str:
    """Return the version of an installed package, or that it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Return the versions behind every figure: of Halve, torch and transformers."""
    return {
        "halve": package_version("halve"),
        "torch": torch.__version__,
        "transformers": package_version("transformers"),
    }


def named_versions(found: Mapping[str, str]) -> str:
    """Return versions in words: ``halve 1.0, torch 2.13.0``."""
    return ", ".join(f"{package} {number}" for package, number in found.items())
