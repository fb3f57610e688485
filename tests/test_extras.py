"""Extras, as `pyproject.toml` declares them and as error messages name them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from softrag.errors import MissingExtraError
from softrag.extras import load_extra

ROOT = Path(__file__).parent.parent
# Modules whose distribution has another name, or that another distribution brings.
DISTRIBUTIONS = {
    "grpc": "qdrant-client",
    "omegaconf": "hydra-core",
    "pyarrow": "datasets",
    "sklearn": "scikit-learn",
}


def declared() -> tuple[set[str], dict[str, set[str]]]:
    """Return what is always installed, and what each extra adds."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    return names(project["dependencies"]), {extra: names(extras[extra]) for extra in extras}


def names(requirements: list[str]) -> set[str]:
    return {Requirement(requirement).name for requirement in requirements}


def asked_for() -> list[tuple[str, str]]:
    """Return the module and the extra of every `load_extra` in the packages."""
    asked = set()
    for folder in ("softrag", "integrations", "trainers"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "load_extra":
                    extra = next(word.value for word in node.keywords if word.arg == "extra")
                    asked.add((ast.literal_eval(node.args[0]), ast.literal_eval(extra)))
    return sorted(asked)


@pytest.mark.parametrize(("module", "extra"), asked_for())
def test_the_extra_that_a_message_names_brings_the_module(module, extra):
    core, extras = declared()
    root = module.split(".")[0]
    distribution = DISTRIBUTIONS.get(root, root.replace("_", "-"))

    assert distribution in core | extras[extra]


def test_every_constraint_is_exact_and_covers_what_is_declared():
    core, extras = declared()
    # What the Makefile installs; the others need a GPU or a server.
    wanted = core.union(*(extras[name] for name in extras.keys() - {"vllm", "flash"}))
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]

    assert all(re.fullmatch(r"==[\w.!]+", str(pin.specifier)) for pin in pins)
    assert wanted <= {pin.name for pin in pins}


def test_a_missing_module_names_the_command_that_installs_it():
    with pytest.raises(MissingExtraError, match=r"pip install 'softrag-memory\[train\]'"):
        load_extra("no_such_module", extra="train", purpose="This test")


def test_an_installed_module_is_returned():
    assert load_extra("json", extra="train", purpose="This test").loads("1") == 1


def test_a_broken_dependency_is_not_reported_as_a_missing_extra(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("import not_there_at_all")
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(ModuleNotFoundError, match="not_there_at_all") as raised:
        load_extra("broken_module", extra="train", purpose="This test")

    assert not isinstance(raised.value, MissingExtraError)
