"""Guards of the house: which way imports point, how long files are, that the README's file map is true."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "safecrit"
CEILING = 400

# Lower rows know nothing of higher ones. Modules in one set may know each other; sets of one row may not.
ROWS: list[list[set[str]]] = [
    [{"errors"}],
    [{"machine"}, {"costs"}, {"strided"}, {"files"}, {"hub"}, {"progress"}, {"statistics"}],
    [{"layout"}, {"tensorfile"}, {"outputs"}, {"ops"}, {"faults"}],
    [{"distributed"}],
    [{"components", "checkpoint_map", "anatomy"}, {"fingerprint"}, {"maskfile", "maskformat"}, {"scorefile"}],
    [{"models"}, {"prompts"}, {"chatserver"}, {"chat"}, {"bridge", "vocabulary"}],
    [{"judges"}, {"traindata"}, {"placement"}, {"checkpoint"}, {"account", "metamodel", "trainaccount"}],
    [{"delta"}, {"verification"}, {"activations", "fsdp", "divided"}],
    [
        {"generation"},
        {"relaxation", "gradients", "estimators", "scoring", "turns", "weightscores", "sharding"},
        {"selection", "selection_together"},
        {"perturbation"},
        {"perplexity"},
        {"harness"},
        {
            "sparse",
            "masked",
            "protection",
            "mixture",
            "movement",
            "modelcard",
            "traincheckpoint",
            "trainloop",
            "training",
            "training_output",
            "adapter",
            "lora",
        },
        {"answers", "results", "evaluation"},
        {"tables", "figures", "plots", "distribution", "markup", "report"},
        {"doctor"},
    ],
    [{"demo"}, {"comparison"}, {"cardfigures"}],
    [{"api"}],
    [{"cli"}],
]


def modules() -> dict[str, Path]:
    return {path.relative_to(ROOT).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Top-level parts of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "safecrit":
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("safecrit."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found.update(alias.name.split(".")[1] for alias in node.names if alias.name.startswith("safecrit."))
    return {name for name in found if not name.startswith("__")}


def home(name: str) -> tuple[int, int]:
    for row, sets in enumerate(ROWS):
        for column, members in enumerate(sets):
            if name in members:
                return row, column
    pytest.fail(f"safecrit/{name}: in no row of tests/test_architecture.py")


@pytest.mark.parametrize("relative", modules())
def test_imports_point_one_way(relative: str) -> None:
    parts = Path(relative).with_suffix("").parts
    if len(parts) == 2 and parts[1] in ("__init__", "__main__"):
        return  # the public names, loaded when used
    row, column = home(parts[1])
    for name in imports(ROOT / relative):
        other_row, other_column = home(name)
        assert other_row < row or (other_row, other_column) == (row, column), f"{relative} must not import {name}"


@pytest.mark.parametrize("pattern", ["safecrit/**/*.py", "tests/**/*.py", "kernels/*.py", "csrc/*", "benchmarks/*.py"])
def test_files_stay_short(pattern: str) -> None:
    long = {
        str(p.relative_to(ROOT)): n
        for p in ROOT.glob(pattern)
        if p.is_file() and (n := len(p.read_bytes().splitlines())) > CEILING
    }
    assert not long


def test_readme_file_map_is_true() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## File map", 1)[1]
    block = section.split("```", 2)[1]
    named, folders = set(), {0: ""}
    for line in block.splitlines():
        match = re.match(r"^( *)(\S+)(?:  +(\S.*))?$", line)
        if not match:
            continue
        depth, path = len(match[1]) // 2, match[2]
        assert match[3], f"{path}: has no comment"
        full = folders[depth] + path
        assert (ROOT / full).exists(), f"README names {full}, which does not exist"
        named.add(full)
        if path.endswith("/"):
            folders[depth + 1] = full
    covered = tuple(
        name for name in named if name.endswith("/") and not any(o != name and o.startswith(name) for o in named)
    )
    for relative in modules():
        if not relative.endswith("__init__.py"):
            assert relative in named or relative.startswith(covered), f"README's file map lacks {relative}"


def test_import_and_help_are_light() -> None:
    code = (
        "import sys; sys.argv = ['safecrit', '--help']\n"
        "import safecrit\n"
        "from safecrit.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "score" in done.stdout


def test_no_folder_of_tests_is_left_out() -> None:
    folders = {path.name for path in (ROOT / "tests").rglob("*") if path.is_dir()}
    assert not folders & {"dist", "build", "venv", "env", "site-packages"}  # pytest and ruff pass these by
