"""Who may import whom: data flows one way, so imports do too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import softrag

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "softrag": ROOT / "softrag",
    "langchain_softrag": ROOT / "integrations" / "langchain_softrag",
    "llama_index_softrag": ROOT / "integrations" / "llama_index_softrag",
    "softrag_trainers": ROOT / "trainers" / "softrag_trainers",
}
# A module of the core imports from the lines above its own, and nothing else of softrag.
CORE_LAYERS = [
    {"errors"},
    {"checks", "extras"},
    {
        "config",
        "connector",
        "text",
        "memory",
        "adapters",
        "base_models",
        "batching",
        "chat_endpoint",
        "packing",
        "threads",
        "verbatim",
    },
    {"documents", "prompt", "codec", "handles", "embedder", "fused", "placeholders", "weights"},
    {"answer", "batch", "card", "evaluation", "files", "fingerprint", "reading"},
    {"checkpoint"},
    {"layouts"},
    {"backbones"},
    {"loading"},
    {"model", "asynchronous"},
    {"export"},
    {"convert"},
    {"compressor", "decoder", "store"},
    {"asking", "indexing", "router"},
    {"bulk", "fallback"},
    {"engine", "question_set"},
    {"bench", "comparison", "serve"},
    {"cli"},
    {"__main__"},
]
LAYER_OF = {module: number for number, layer in enumerate(CORE_LAYERS) for module in layer}
# What training shares with asking; it never sees how chunks are stored, found and asked about.
TRAINERS_MAY_IMPORT = {
    "adapters",
    "base_models",
    "batch",
    "chat_endpoint",
    "checkpoint",
    "config",
    "documents",
    "errors",
    "evaluation",
    "extras",
    "files",
    "model",
    "packing",
    "prompt",
    "text",
}
# With these missing the core still imports; `tests/test_extras.py` says which extra brings them.
OPTIONAL = (
    "bm25s datasets gguf hydra langchain_core llama_index omegaconf peft pydantic "
    "qdrant_client semantic_text_splitter typer vllm zstandard"
).split()


def files_of(package: str) -> list[Path]:
    return sorted(PACKAGES[package].rglob("*.py"))


def imported_names(path: Path, *, package: str) -> Iterator[str]:
    """Yield what a file imports at run time, as dotted names: `a.b` for `from a import b`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types_only:
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports from {package} in full"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def core_module(path: Path) -> str:
    return path.relative_to(PACKAGES["softrag"]).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", files_of("softrag"), ids=lambda path: path.stem)
def test_core_modules_import_downwards(path):
    importer = core_module(path)
    if importer == "__init__":
        return
    assert importer in LAYER_OF, f"softrag.{importer} is new: give it a line in CORE_LAYERS."
    for name in imported_names(path, package="softrag"):
        parts = name.split(".")
        if parts[0] != "softrag" or parts[1] == importer:
            continue
        assert LAYER_OF[parts[1]] < LAYER_OF[importer], f"softrag.{importer} imports {name}"


def test_every_layer_lists_modules_that_exist():
    existing = {core_module(path) for path in files_of("softrag")}

    assert set(LAYER_OF) - existing == set()


@pytest.mark.parametrize("package", ["langchain_softrag", "llama_index_softrag"])
def test_integrations_use_the_public_surface(package):
    public = {f"softrag.{name}" for name in softrag.__all__} | {"softrag.__version__"}
    for path in files_of(package):
        used = {n for n in imported_names(path, package=package) if n.split(".")[0] == "softrag"}
        assert used <= public, f"{path.name} reaches into softrag: {sorted(used - public)}"


def test_trainers_use_the_model_and_the_layout_only():
    for path in files_of("softrag_trainers"):
        for name in imported_names(path, package="softrag_trainers"):
            parts = name.split(".")
            if parts[0] == "softrag":
                assert parts[1] in TRAINERS_MAY_IMPORT, f"{path.name} imports {name}"


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_stand_on_the_core_alone(package):
    others = set(PACKAGES) - {package, "softrag"}
    for path in files_of(package):
        roots = {name.split(".")[0] for name in imported_names(path, package=package)}
        assert not roots & others, f"{path.name} imports a sibling package"
        # An editable install has these on the path too; they would be second copies.
        assert not roots & {"integrations", "trainers", "tests"}, path.name


def test_the_folders_of_packages_are_not_packages():
    assert not (ROOT / "integrations" / "__init__.py").exists()
    assert not (ROOT / "trainers" / "__init__.py").exists()


def test_the_core_imports_without_optional_packages():
    # Blocking a name in sys.modules makes its import fail as if it were not installed.
    program = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({OPTIONAL!r}))
for module in {sorted(set(LAYER_OF) - {"serve", "cli"})!r}:
    importlib.import_module(f"softrag.{{module}}")
"""

    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
