"""Layers whose weight the module around them reads by itself: what takes their place would not be called.

It is found in the source of that module, for the way on which a weight is read may need a device or a library that is
not at hand: the fused kernels of a state space model read what its slow path calls.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from types import CodeType
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

GUARDED = ("dtype", "device", "requires_grad")  # of a factorized layer, its guard answers these as a weight would
NOT_RUN = ("init", "reset", "tie_", "resize", "set_input_size")  # in names of methods that build or change a model
SETTINGS: tuple[type[ast.AST], ...] = (
    ast.expr_context,
    ast.operator,
    ast.boolop,
    ast.unaryop,
    ast.cmpop,
    ast.Constant,
)
SETTINGS += (ast.Name, ast.Attribute, ast.BoolOp, ast.UnaryOp, ast.Compare, ast.Tuple)
"""What a test consists of that asks for nothing but settings of a module and arguments."""


class Read(NamedTuple):
    """A place in the source of a module that reads a weight.

    Attributes:
        path: attributes that lead from the module to the layer: `("attention", "output")`.
        conditions: tests around it, with the outcome that leads there.
        defaults: arguments of the method, where they are not given.
    """

    path: tuple[str, ...]
    conditions: tuple[tuple[CodeType, bool], ...]
    defaults: dict[str, Any]


def read_by_others(model: nn.Module, attribute: str = "weight") -> dict[int, str]:
    """Return the layers whose weight other code reads than their own.

    What a module reads only in other settings than its own, or if it is called with other arguments than its defaults,
    does not count.

    Args:
        model: the model.
        attribute: name of the weight.

    Returns:
        Id of each such layer to the type of the module that reads it.
    """
    found: dict[int, str] = {}
    for module in model.modules():
        kind: Any = type(module)
        for read in _reads_of(kind, attribute):
            layer: Any = module
            for name in read.path:
                layer = getattr(layer, name, None)
            if isinstance(layer, nn.Module) and id(layer) not in found and _happens(read, module):
                found[id(layer)] = kind.__name__
    return found


def _happens(read: Read, module: nn.Module) -> bool:
    known = {"__builtins__": {}, **read.defaults, "self": module}
    for test, outcome in read.conditions:
        try:
            holds = bool(eval(test, known))  # of names, attributes, constants and comparisons; see `SETTINGS`
        except (AttributeError, NameError, TypeError):  # it depends on more than settings
            continue
        if holds is not outcome:
            return False
    return True


@cache
def _reads_of(kind: type[nn.Module], attribute: str) -> tuple[Read, ...]:
    found: list[Read] = []
    for name in sorted(set(dir(kind)) - set(dir(PreTrainedModel)) | {"forward"}):
        method = inspect.unwrap(getattr(kind, name))
        if inspect.isfunction(method) and not any(part in name for part in NOT_RUN):
            found += _reads_in(method, attribute) if attribute in _names(method.__code__) else []
    return tuple(found)


def _names(code: CodeType) -> set[str]:
    """Return the names of attributes in a function, and in those inside of it."""
    inner = (const for const in code.co_consts if inspect.iscode(const))
    return set(code.co_names).union(*map(_names, inner))


def _reads_in(method: Any, attribute: str) -> list[Read]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):  # there is no source, or not of this function alone
        return []
    parameters = inspect.signature(method).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    visitor = _Reads(attribute, _harmless(tree))
    visitor.visit(tree)
    return [Read(path, conditions, defaults) for path, conditions in visitor.found]


def _harmless(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield what is only asked for its type or device, for being a tensor, or for being there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in GUARDED:
            yield node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            yield from node.args
        elif isinstance(node, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
            yield node.left


class _Reads(ast.NodeVisitor):
    """Finds `self.….weight`, or another attribute, with the tests around it."""

    def __init__(self, attribute: str, harmless: Iterable[ast.AST]) -> None:
        self.attribute, self.harmless, self.conditions = attribute, set(harmless), list[tuple[CodeType, bool]]()
        self.found: list[tuple[tuple[str, ...], tuple[tuple[CodeType, bool], ...]]] = []

    def visit_Attribute(self, node: ast.Attribute) -> None:
        path = _path(node.value)
        if node.attr == self.attribute and isinstance(node.ctx, ast.Load) and path and node not in self.harmless:
            self.found.append((path, tuple(self.conditions)))
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        self._visit_branches(node.test, node.body, node.orelse)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._visit_branches(node.test, [node.body], [node.orelse])

    def _visit_branches(self, test: ast.expr, body: Sequence[ast.AST], orelse: Sequence[ast.AST]) -> None:
        self.visit(test)
        parts = list(ast.walk(test))
        settled = all(isinstance(part, SETTINGS) and getattr(part, "attr", None) != "training" for part in parts)
        conditions = self.conditions
        for outcome, branch in ((True, body), (False, orelse)):
            if settled:
                self.conditions = [*conditions, (compile(ast.Expression(test), "<a test>", "eval"), outcome)]
            for node in branch:
                self.visit(node)
        self.conditions = conditions


def _path(node: ast.AST) -> tuple[str, ...]:
    """Return the attributes that lead from `self` to a module; nothing where it is come by otherwise."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return tuple(reversed(names)) if isinstance(node, ast.Name) and node.id == "self" else ()
