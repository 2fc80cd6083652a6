"""Import rules that import-linter cannot say, since it sees other libraries as one name each: DESIGN's boundaries inside torch, optional
libraries, and no remote code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import nemotune

SOURCE = Path(nemotune.__file__).parent
OPTIONAL = (
    "bitsandbytes",
    "torchao",
    "peft",
    "fla",
    "flash_attn",
    "liger_kernel",
    "tensorboard",
    "wandb",
    "mlflow",
    "trl",
    "unsloth",
    "tiktoken",
    "xllamacpp",
)


def trees(*packages: str) -> Iterator[tuple[Path, ast.AST]]:
    for path, tree in _all_trees():
        if not packages or path.relative_to(SOURCE).parts[0] in packages:
            yield path, tree


@cache
def _all_trees() -> list[tuple[Path, ast.AST]]:
    return [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in sorted(SOURCE.rglob("*.py"))]


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a module imports, also inside functions; `from a import b` as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", ["ops", "models", "lora"])
def test_one_device_code_knows_no_processes(package: str) -> None:
    for path, tree in trees(package):
        assert not [name for name in imported(tree) if name.startswith("torch.distributed")], path
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed"], path


@pytest.mark.parametrize("library", OPTIONAL)
def test_optional_library_is_imported_in_one_file_on_use(library: str) -> None:
    users = [(path, tree) for path, tree in trees() if any(name.partition(".")[0] == library for name in imported(tree))]
    assert len(users) <= 1
    for path, tree in users:
        assert isinstance(tree, ast.Module)
        top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        assert not [name for name in imported(top) if name.partition(".")[0] == library], path


def test_triton_is_imported_by_its_kernels_alone_and_they_on_use() -> None:
    for path, tree in trees():
        assert isinstance(tree, ast.Module)
        top = list(imported(ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])))
        if not path.name.startswith("triton_"):
            assert not [name for name in imported(tree) if name.partition(".")[0] == "triton"], path
            assert not [name for name in top if name.startswith("nemotune.ops.triton_")], path


def test_torch_distributed_in_these_rules_would_be_found() -> None:
    assert list(imported(ast.parse("def f():\n    from torch.distributed import nn\nimport torch.distributed as d"))) == [
        "torch.distributed",
        "torch.distributed.nn",
    ]


OF_PICKLE = {  # what is used of it: an Unpickler that finds DCP's own classes alone, and an error
    "weights/dcp_metadata.py": {"Unpickler", "dumps"},
    "train/storage.py": {"UnpicklingError"},
}


def test_no_remote_code_and_no_pickle() -> None:
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword):
                assert node.arg != "trust_remote_code", path
                assert not (node.arg == "weights_only" and isinstance(node.value, ast.Constant) and node.value.value is False), path
        assert not {name.partition(".")[0] for name in imported(tree)} & {"dill", "cloudpickle"}, path
        if "pickle" in imported(tree):
            used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle"}
            assert used == OF_PICKLE.get(f"{path.parent.name}/{path.name}"), f"{path}: only DCP's metadata are a pickle"
            assert not any(isinstance(node, ast.ImportFrom) and node.module == "pickle" for node in ast.walk(tree))


def test_every_module_says_what_it_is() -> None:
    for path, tree in trees():
        assert isinstance(tree, ast.Module) and ast.get_docstring(tree), path
