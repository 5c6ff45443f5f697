"""The structure rules of docs/contributing.md: direction of imports, light import, sizes and names of files."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = "hf_lossless_lr"
PACKAGE_DIR = Path(__file__).resolve().parent.parent / PACKAGE
FILES = sorted(PACKAGE_DIR.rglob("*.py"))

# A module imports only from strictly lower levels. Every file (or subpackage) of the package is listed here.
_NAMES_BY_LEVEL = {
    -1: "errors",
    0: "files renamed",
    1: "linalg curves report heads masks fingerprint timing modes bounds",
    2: "modules batches allocation verdict",
    3: "config layouts splits",
    4: "targets replacement statistics rank_selection",
    5: "quantizer factorization verification outcomes statistics_io search sizes",
    6: "neighbourhood refit calibration certificate",
    7: "trials budgets model_card comparison",
    8: "reporting",
    9: "compressor",
    10: "data console baselines",
    11: "plots demo evaluation lm_eval",
    12: "commands",
    13: "cli",
}
LEVELS = {name: level for level, names in _NAMES_BY_LEVEL.items() for name in names.split()}
PUBLIC_LEVEL = 9  # `__init__` gathers levels up to this one, so only modules above it may import from `__init__`

FORBIDDEN_AT_IMPORT = ("datasets", "evaluate", "matplotlib", "sklearn", "peft")
FORBIDDEN_FILE_NAMES = ("utils.py", "helpers.py", "common.py")
MAX_FILE_LINES = 320
MAX_FUNCTION_LINES = 60


def imported_modules(tree: ast.AST, parts: tuple[str, ...]) -> list[tuple[int, str]]:
    """The package's own modules that a file imports, at any depth of nesting.

    Args:
        tree: the parsed file.
        parts: where the file lies in the package, as in `("linalg",)`, `("__init__",)` or `("evaluation", "glue")`.

    Returns:
        Pairs of line number and top-level module name; "" is the package itself.
    """
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (PACKAGE, *parts)[: len(parts) + 1 - node.level] if node.level else ()
            stem = ".".join([*base, *([node.module] if node.module else [])])
            paths = [stem]
            if stem == PACKAGE:  # `from package import name` reaches the module of that name, else the package itself
                paths = [f"{stem}.{alias.name}" if alias.name in LEVELS else stem for alias in node.names]
        else:
            continue
        for path in paths:
            top, _, rest = path.partition(".")
            if top == PACKAGE:
                found.append((node.lineno, rest.partition(".")[0]))
    return found


def import_violations(source: str, *parts: str) -> list[str]:
    """What the file at `parts` does against the direction of imports, one message each."""
    name = parts[0]
    if name != "__init__" and name not in LEVELS:
        return [f"{'/'.join(parts)}.py: {name!r} is not listed; give it a level in LEVELS of {Path(__file__).name}"]
    own_level = PUBLIC_LEVEL + 1 if name == "__init__" else LEVELS[name]
    problems = []
    for line, target in imported_modules(ast.parse(source), parts):
        if target == name and len(parts) > 1:  # inside one subpackage
            continue
        where = f"{'/'.join(parts)}.py:{line}"
        if target and target not in LEVELS:
            problems.append(f"{where}: imports {target!r}, which is not listed in LEVELS of {Path(__file__).name}")
            continue
        level = LEVELS[target] if target else PUBLIC_LEVEL
        if level >= own_level:
            shown = target or PACKAGE
            problems.append(
                f"{where}: {name!r} may import only from below level {own_level}, and {shown!r} is level {level}"
            )
    return problems


def size_violations(source: str, where: str) -> list[str]:
    """Files above `MAX_FILE_LINES`, and functions above `MAX_FUNCTION_LINES` not counting their docstring."""
    problems = []
    lines = len(source.splitlines())
    if lines > MAX_FILE_LINES:
        problems.append(f"{where}: {lines} lines, more than {MAX_FILE_LINES}; split it by concept")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node, clean=False) is not None:
                length -= node.body[0].end_lineno - node.body[0].lineno + 1
            if length > MAX_FUNCTION_LINES:
                problems.append(
                    f"{where}:{node.lineno}: {node.name} has {length} lines without its docstring, "
                    f"more than {MAX_FUNCTION_LINES}"
                )
    return problems


def name_violations(path: Path) -> list[str]:
    """A file name that says nothing about the one concept in the file."""
    return [f"{path.name}: name the file after its one concept"] if path.name in FORBIDDEN_FILE_NAMES else []


def imported_at_import(code: str) -> list[str]:
    """Which of `FORBIDDEN_AT_IMPORT` are loaded once `code` has run in a fresh interpreter."""
    probe = f"{code}\nimport sys\nprint(*(name for name in {FORBIDDEN_AT_IMPORT!r} if name in sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=False, cwd=PACKAGE_DIR.parent
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_the_package_has_files():
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE_DIR)))
class TestEveryFile:
    def test_imports_only_from_lower_levels(self, path):
        parts = path.relative_to(PACKAGE_DIR).with_suffix("").parts
        assert import_violations(path.read_text(encoding="utf-8"), *parts) == []

    def test_is_short_and_so_are_its_functions(self, path):
        assert size_violations(path.read_text(encoding="utf-8"), path.name) == []

    def test_is_named_after_a_concept(self, path):
        assert name_violations(path) == []


def test_importing_the_package_loads_no_heavy_optional_library():
    assert imported_at_import(f"import {PACKAGE}") == []


def test_importing_the_tasks_does_not_load_evaluate():
    assert "evaluate" not in imported_at_import(f"import {PACKAGE}.evaluation.tasks")


@pytest.mark.parametrize(
    ("parts", "source", "message"),
    [
        (("linalg",), "from .modules import FactorizedLinear", "'modules' is level 2"),
        (("linalg",), "from . import modules", "'modules' is level 2"),
        (("linalg",), "from .curves import LossCurve", "'curves' is level 1"),
        (("linalg",), "import hf_lossless_lr.compressor as c", "'compressor' is level 9"),
        (("linalg",), "from hf_lossless_lr.config import x", "'config' is level 3"),
        (("linalg",), "from hf_lossless_lr import config", "'config' is level 3"),
        (("linalg",), "def f():\n    from .cli import main", "linalg.py:2"),
        (("linalg",), "from . import LowRankCompressor", "'hf_lossless_lr' is level 9"),
        (("linalg",), "import hf_lossless_lr", "'hf_lossless_lr' is level 9"),
        (("compressor",), "from .data import load", "'data' is level 10"),
        (("__init__",), "from .evaluation import glue", "'evaluation' is level 11"),
        (("evaluation", "glue"), "from ..plots import draw", "'plots' is level 11"),
        (("evaluation", "__init__"), "from ..plots import draw", "'plots' is level 11"),
        (("novel",), "import torch", "'novel' is not listed; give it a level"),
        (("compressor",), "from .novel import x", "imports 'novel', which is not listed"),
    ],
)
def test_the_import_check_rejects(parts, source, message):
    problems = import_violations(source, *parts)
    assert len(problems) == 1
    assert message in problems[0]


@pytest.mark.parametrize(
    ("parts", "source"),
    [
        (("modules",), "import torch\nfrom .linalg import metric_svd\nfrom . import errors"),
        (("__init__",), "from .compressor import LowRankCompressor\nfrom .errors import LosslessLowRankError"),
        (("demo",), "from . import LowRankCompressor"),
        (("cli",), "def f():\n    from .demo import run"),
        (("evaluation", "glue"), "from .base import Task\nfrom ..compressor import LowRankCompressor"),
        (("linalg",), "import hf_lossless_lr_extras"),
    ],
)
def test_the_import_check_accepts(parts, source):
    assert import_violations(source, *parts) == []


def test_the_size_check_rejects_a_long_file():
    assert "split it by concept" in size_violations("x = 1\n" * (MAX_FILE_LINES + 1), "f.py")[0]
    assert size_violations("x = 1\n" * MAX_FILE_LINES, "f.py") == []


def test_the_size_check_counts_a_function_without_its_docstring():
    docstring = '    """' + "text\n" * 20 + '    """\n'
    longest = docstring + "    x = 1\n" * (MAX_FUNCTION_LINES - 1)
    assert size_violations("def f():\n" + longest, "f.py") == []
    assert "f has 61 lines" in size_violations("def f():\n" + longest + "    x = 2\n", "f.py")[0]


def test_the_name_check_rejects_a_catch_all():
    assert name_violations(Path("utils.py")) != []


def test_the_light_import_check_rejects():
    assert imported_at_import("import sys, types; sys.modules['peft'] = types.ModuleType('peft')") == ["peft"]
