"""What the packages promise to their users."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import softrag

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "softrag": "softrag",
    "langchain_softrag": "integrations/langchain_softrag",
    "llama_index_softrag": "integrations/llama_index_softrag",
    "softrag_trainers": "trainers/softrag_trainers",
}


@pytest.mark.parametrize("package", FOLDERS)
def test_public_names_are_sorted_and_importable(package):
    module = importlib.import_module(package)

    assert list(module.__all__) == sorted(set(module.__all__))
    for name in module.__all__:
        assert getattr(module, name) is not None


@pytest.mark.parametrize("package", FOLDERS)
def test_public_classes_and_functions_are_documented(package):
    module = importlib.import_module(package)

    for name in module.__all__:
        value = getattr(module, name)
        if callable(value) and getattr(value, "__module__", "").startswith(package):
            assert value.__doc__, f"{package}.{name} has no docstring"


@pytest.mark.parametrize("folder", FOLDERS.values())
def test_packages_are_typed(folder):
    assert (ROOT / folder / "py.typed").exists()


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'SoftRagg'"):
        _ = softrag.SoftRagg


def test_dir_lists_the_public_names():
    assert set(softrag.__all__) <= set(dir(softrag))


def test_version_and_changelog_agree():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"', project, re.MULTILINE)
    released = re.search(r"^## \[(\d.+?)\]", changelog, re.MULTILINE)

    assert version is not None
    assert released is not None
    assert version[1] == released[1] == softrag.__version__
