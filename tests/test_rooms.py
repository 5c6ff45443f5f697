"""The rules of the house: one direction of imports, through the doors; light import; sizes and names of files."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "hf_lossless_lr"
FILES = sorted(PACKAGE.rglob("*.py"))

GROUND = (
    "errors",
    "files",
    "fingerprint",
    "processes",
    "renamed",
    "timing",
    "versions",
)  # imported by any room; import errors at most
FRONT = ("__init__", "lm_eval")  # stand before the rooms: they may import from any door
ROOMS = (
    *("report", "formats", "layers", "data", "statistics", "factors", "ranks", "verdict"),
    *("checkpoint", "pipeline", "evaluation", "baselines", "commands"),
)
"""The rooms; each imports from earlier ones only."""

OUTSIDE = {"report": ("torch", "transformers")}  # packages that a room does not import
UNSEEN = {"checkpoint": ("data", "statistics", "verdict")}  # rooms that a room does not see although they come earlier
STAGES = (
    "formats",
    "layers",
    "data",
    "statistics",
    "factors",
    "ranks",
    "verdict",
)  # take plain values, not a configuration
HEAVY = ("datasets", "evaluate", "matplotlib", "sklearn", "peft")  # not loaded by `import hf_lossless_lr`
CATCH_ALLS = ("utils.py", "helpers.py", "common.py")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 320, 60


def imports(path, package):
    """Triples of line, target inside the package as a tuple (or None), and name of an outside module (or None)."""
    own = path.relative_to(package).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [package.name, *own][: len(own) + 1 - node.level] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{stem}.{alias.name}" for alias in node.names] if stem == package.name else [stem]
        else:
            continue
        for name in names:
            top, *rest = name.split(".")
            yield node.lineno, tuple(rest) if top == package.name else None, None if top == package.name else name


def violations(package):
    """What the sources of a package do against the direction of imports, one message each."""
    found, inside = [], {}
    for path in sorted(package.rglob("*.py")):
        where = path.relative_to(package)
        room, own = where.parts[0], where.with_suffix("").parts
        if len(own) == 1:
            found += _of_the_top_level(path, package)
            continue
        if room not in ROOMS:
            found.append(f"{where}: {room!r} is no room; give it its place in ROOMS of {Path(__file__).name}")
            continue
        for line, target, outside in imports(path, package):
            at = f"{where}:{line}"
            if target is None:
                if outside.split(".")[0] in OUTSIDE.get(room, ()):
                    found.append(f"{at}: {room} never imports {outside}")
            elif not target or target[0] in FRONT:
                found.append(f"{at}: {room} may not import the front door")
            elif target[0] == room:
                inside.setdefault(room, {}).setdefault(own, set()).add(target)
            elif target[0] not in GROUND:
                found += _of_rooms(at, room, target)
    return found + [message for room, graph in inside.items() for message in _cycles(room, graph)]


def _of_the_top_level(path, package):
    """A file of the ground floor imports none but errors; the front door imports from doors."""
    found = []
    for line, target, _ in imports(path, package):
        if target is None or target[:1] == ("errors",):
            continue
        if path.stem in GROUND:
            found.append(f"{path.name}:{line}: the ground floor imports no {'.'.join(target)}")
        elif path.stem not in FRONT:
            found.append(f"{path.name}: belongs into a room")
        elif len(target) > 1:
            found.append(f"{path.name}:{line}: import from {target[0]}, not from its file {target[1]}")
    return found


def _of_rooms(at, room, target):
    known = target[0] in ROOMS and ROOMS.index(target[0]) < ROOMS.index(room)
    if not known or target[0] in UNSEEN.get(room, ()):
        return [f"{at}: {room} may not import {'.'.join(target)}"]
    return [f"{at}: import from {target[0]}, not from its file {target[1]}"] if len(target) > 1 else []


def _cycles(room, graph):
    try:
        TopologicalSorter(
            {file: targets - {file} for file, targets in graph.items() if file[-1] != "__init__"}
        ).prepare()
    except CycleError as error:
        return [f"{room}: {' -> '.join('.'.join(file) for file in error.args[1])}"]
    return []


def size_violations(source, where):
    """Files above `MAX_FILE_LINES`, and functions above `MAX_FUNCTION_LINES` not counting their docstring."""
    problems, lines = [], len(source.splitlines())
    if lines > MAX_FILE_LINES:
        problems.append(f"{where}: {lines} lines, more than {MAX_FILE_LINES}; split it by concept")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node, clean=False) is not None:
                length -= node.body[0].end_lineno - node.body[0].lineno + 1
            if length > MAX_FUNCTION_LINES:
                problems.append(f"{where}:{node.lineno}: {node.name} has {length} lines without its docstring")
    return problems


def loaded(code):
    """Which of `HEAVY` are loaded once `code` has run in a fresh interpreter."""
    probe = f"{code}\nimport sys\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=False, cwd=PACKAGE.parent
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_imports_go_in_one_direction_and_through_the_doors():
    assert len(FILES) > 50
    assert violations(PACKAGE) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_is_short_and_named_after_its_concept(path):
    assert size_violations(path.read_text(encoding="utf-8"), path.name) == []
    assert path.name not in CATCH_ALLS


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_is_for_and_what_it_offers(room):
    source = ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(source)
    imported = {a.asname or a.name for node in source.body if isinstance(node, ast.ImportFrom) for a in node.names}
    offered = [node.value for node in source.body if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"]
    assert imported == set(ast.literal_eval(offered[0]) if offered else ())


def test_no_stage_takes_a_configuration():
    for room in STAGES:
        for path in (PACKAGE / room).glob("*.py"):
            assert "LosslessLowRankConfig" not in path.read_text(encoding="utf-8").replace(
                "`LosslessLowRankConfig`", ""
            )


def code_of(path):
    """Names and attributes that the code of a file uses, without its comments and strings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {getattr(node, "attr", getattr(node, "id", None)) for node in ast.walk(tree)} | {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }


ALONE = {  # what only some places may name
    "the dense layer types": ({"Linear", "Conv1d", "Conv2d", "Conv3d", "Conv1D"}, "layers"),
    "the swapping of modules": ({"set_submodule"}, "layers/replacement.py"),
    "attributes of a user's model": ({"__dict__", "quantization_config"}, "checkpoint"),
    "attributes of a user's model, in one file": ({"__dict__"}, "checkpoint/attached.py"),
}


@pytest.mark.parametrize("case", ALONE)
def test_only_its_place_names(case):
    names, place = ALONE[case]
    users = {path.relative_to(PACKAGE).as_posix() for path in FILES if names & code_of(path)}
    assert users
    assert {user for user in users if not user.startswith(place)} - {"layers/targets.py"} == set()


def test_importing_the_package_loads_no_heavy_optional_library():
    assert loaded("import hf_lossless_lr") == []


PLANTED = {
    "an earlier room": ("layers/a.py", "from ..pipeline import verify", "layers may not import pipeline"),
    "a later room inside a function": ("layers/a.py", "def f():\n    from ..data import x", "a.py:2"),
    "an absolute import": ("factors/a.py", "import hf_lossless_lr.ranks", "factors may not import ranks"),
    "a file behind a door": ("data/a.py", "from ..layers.targets import x", "import from layers, not from its file"),
    "the front door": ("data/a.py", "from .. import LowRankCompressor", "data may not import LowRankCompressor"),
    "the whole package": ("data/a.py", "import hf_lossless_lr", "data may not import the front door"),
    "torch in the report": ("report/a.py", "import torch.nn", "report never imports torch.nn"),
    "data in the checkpoint": ("checkpoint/a.py", "from ..data import x", "checkpoint may not import data"),
    "a cycle": ("ranks/a.py", "from . import b\nfrom .b import x", "ranks: "),
    "the ground floor": ("files.py", "from .layers import x", "the ground floor imports no layers"),
    "a file in no room": ("novel.py", "from .layers import x", "novel.py: belongs into a room"),
    "a new room": ("novel/a.py", "import torch", "'novel' is no room"),
    "the front door past a door": ("__init__.py", "from .layers.targets import x", "import from layers"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_an_import_the_wrong_way_is_found(case, tmp_path):
    place, source, message = PLANTED[case]
    package = tmp_path / PACKAGE.name
    for name, text in {place: source, "ranks/b.py": "from .a import y" if case == "a cycle" else ""}.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text, encoding="utf-8")
    problems = violations(package)
    assert len(problems) == 1, problems
    assert message in problems[0]


def test_imports_the_right_way_are_none(tmp_path):
    package = tmp_path / PACKAGE.name
    allowed = "import torch\nfrom ..errors import DataError\nfrom ..layers import x\nfrom .b import y\n"
    for name, text in {"data/a.py": allowed, "data/b.py": "", "__init__.py": "from .data import z"}.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text, encoding="utf-8")
    assert violations(package) == []


def test_the_size_check_rejects_a_long_file():
    assert "split it by concept" in size_violations("x = 1\n" * (MAX_FILE_LINES + 1), "f.py")[0]
    assert size_violations("x = 1\n" * MAX_FILE_LINES, "f.py") == []


def test_the_size_check_counts_a_function_without_its_docstring():
    docstring = '    """' + "text\n" * 20 + '    """\n'
    longest = docstring + "    x = 1\n" * (MAX_FUNCTION_LINES - 1)
    assert size_violations("def f():\n" + longest, "f.py") == []
    assert "f has 61 lines" in size_violations("def f():\n" + longest + "    x = 2\n", "f.py")[0]


def test_the_light_import_check_rejects():
    assert loaded("import sys, types; sys.modules['peft'] = types.ModuleType('peft')") == ["peft"]
