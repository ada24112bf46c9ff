"""Names of TensorRT and cuda-python that a source file uses, found in its syntax tree.

``trt.A.B`` is followed through local names (``flags = trt.A``), constructors and the types that methods return, and,
in files that use TensorRT at all, untyped parameters of customary names (``engine``, ``context``) are taken for what
they are called. A name that ``hasattr`` or ``getattr`` asks for by a literal is optional. Runs nothing.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.trt.surface import Member, Module

__all__ = ["Uses", "cuda_uses", "tensorrt_uses"]

MODULES = {"trt": "tensorrt", "tensorrt": "tensorrt", "trtp": "plugin"}
CUSTOMARY = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "registry": "IPluginRegistry",
}
CLASSES = ("Builder", "Runtime", "ICudaEngine")  # whose create_* and deserialize_* methods are theirs alone
CUDA_NAME = re.compile(r"cuda[A-Z]\w+|cu[A-Z]\w+|CUDA_(?:ERROR_\w+|SUCCESS)|CU_[A-Z_0-9]+")


@dataclass
class Uses:
    """Dotted names, and the places (file:line) where they are used."""

    needed: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    optional: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, other: Uses) -> None:
        """Take over the uses of another file."""
        for name, places in other.needed.items():
            self.needed[name] += places
        for name, places in other.optional.items():
            self.optional[name] += places


@dataclass(frozen=True)
class Known:
    """What an expression is: a dotted name of a module, or an instance of a class."""

    module: str  # "tensorrt" or "plugin"
    dotted: str
    instance: bool = False
    guarded: bool = False  # reached through a lookup; what it has is optional as well


def tensorrt_uses(path: Path, newest: Module) -> dict[str, Uses]:
    """Names of ``tensorrt`` and of ``plugin`` = ``tensorrt.plugin`` in one file; types are those of a release."""
    tree = ast.parse(path.read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    if not names & MODULES.keys():
        return {}
    finder = _Finder(path, newest)
    finder.visit(tree)
    for uses in finder.uses.values():
        for name in uses.optional:
            uses.needed.pop(name, None)
    return finder.uses


def cuda_uses(path: Path) -> Uses:
    """Names of cuda-python in one file: attributes, and whole strings that look like one."""
    uses = Uses()
    for node in ast.walk(ast.parse(path.read_text())):
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "value", None)
        if isinstance(name, str) and isinstance(node, ast.Attribute | ast.Constant) and CUDA_NAME.fullmatch(name):
            uses.needed[name].append(f"{path.name}:{node.lineno}")
    return uses


class _Finder(ast.NodeVisitor):
    def __init__(self, path: Path, newest: Module) -> None:
        self.path = path
        self.newest = newest
        self.scopes: list[dict[str, Known | None]] = [{name: Known(module, "") for name, module in MODULES.items()}]
        self.uses: dict[str, Uses] = {"tensorrt": Uses(), "plugin": Uses()}
        self.fields: dict[tuple[str, str], Known | None] = {}  # ("self", attribute)
        pairs = [
            (name, self.returned(Known("", kind), name)) for kind in CLASSES for name in newest.classes[kind].members
        ]
        self.makers = {name: made for name, made in pairs if made and name.startswith(("create_", "deserialize_"))}

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        self.scopes.append({argument.arg: self.parameter(argument) for argument in arguments})
        self.generic_visit(node)
        self.scopes.pop()

    def parameter(self, argument: ast.arg) -> Known | None:
        """What a parameter is by its name, if it is not typed as something else."""
        untyped = argument.annotation is None or ast.unparse(argument.annotation) in ("Any", "object")
        if argument.arg in CUSTOMARY and untyped:
            return Known("tensorrt", CUSTOMARY[argument.arg], instance=True)
        return Known(MODULES[argument.arg], "") if argument.arg in MODULES and untyped else None

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self.assigned(target, self.known(node.value))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        if node.value is not None:
            self.assigned(node.target, self.known(node.value))

    def assigned(self, target: ast.expr, value: Known | None) -> None:
        if isinstance(target, ast.Name):
            self.scopes[-1][target.id] = value
        elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
            self.fields[target.value.id, target.attr] = value
            if target.attr == "__class__" and value is not None:  # TensorRT hands out base classes
                self.scopes[-1][target.value.id] = replace(value, instance=True)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        base = self.known(node.value)
        if base is not None:
            self.note(self.uses[base.module].needed, base, node.attr, node.lineno)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        asked = isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr") and len(node.args) > 1
        if asked and isinstance(node.args[1], ast.Constant) and (base := self.known(node.args[0])):
            self.note(self.uses[base.module].optional, base, str(node.args[1].value), node.lineno)

    def note(self, where: dict[str, list[str]], base: Known, name: str, line: int) -> None:
        dotted = f"{base.dotted}.{name}".lstrip(".")
        where = self.uses[base.module].optional if base.guarded else where
        if not name.startswith("__"):
            where[dotted].append(f"{self.path.name}:{line}")

    def known(self, node: ast.expr) -> Known | None:
        """What an expression is, None where that is not known."""
        if isinstance(node, ast.Name):
            for scope in reversed(self.scopes):
                if node.id in scope:
                    return scope[node.id]
            return None
        if isinstance(node, ast.Attribute):
            return self.attribute(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            return self.called(node.func)
        if (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "getattr"
            and isinstance(node.args[1], ast.Constant)
        ):
            base = self.known(node.args[0])
            return base and Known(base.module, f"{base.dotted}.{node.args[1].value}".lstrip("."), guarded=True)
        return None

    def attribute(self, node: ast.Attribute) -> Known | None:
        """A member of a module or class, the type of a property, or what a field of ``self`` was set to."""
        base = self.known(node.value)
        if base is None:
            return self.fields.get((node.value.id, node.attr)) if isinstance(node.value, ast.Name) else None
        if base.instance:
            return self.returned(base, node.attr) if self.is_property(base, node.attr) else None
        return Known(base.module, f"{base.dotted}.{node.attr}".lstrip("."), guarded=base.guarded)

    def called(self, function: ast.Attribute) -> Known | None:
        """What a method returns, or a new object."""
        base = self.known(function.value)
        if base is not None and base.instance:
            return self.returned(base, function.attr)
        made = self.known(function)
        if made is not None and made.module == "tensorrt" and made.dotted in self.newest.classes:
            return replace(made, instance=True)
        return self.makers.get(function.attr) if base is None else None

    def is_property(self, base: Known, name: str) -> bool:
        member = self.member(base, name)
        return member is not None and member.kind == "property"

    def member(self, base: Known, name: str) -> Member | None:
        """An attribute of a class or of one it inherits from."""
        info = self.newest.classes.get(base.dotted)
        kinds = self.newest.lineage(info) if info else ()
        return next((kind.members[name] for kind in kinds if name in kind.members), None)

    def returned(self, base: Known, name: str) -> Known | None:
        """The class that a method or property returns."""
        member = self.member(base, name)
        kinds = {re.split(r"::|\.", overload.returns)[-1] for overload in member.overloads} if member else set()
        kinds &= self.newest.classes.keys()
        return replace(base, module="tensorrt", dotted=kinds.pop(), instance=True) if len(kinds) == 1 else None
