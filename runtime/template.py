"""Chat templates: Jinja in a sandbox that cannot hang the process or fill its memory.

A bundle may come from anywhere, so a template is a small language: text, ``if``, ``for``, ``set``, strings and whole
numbers, a few filters, ``range`` and ``raise_exception``, with every loop and every sum metered. Its values are text,
numbers and the messages, and nothing else can be made in it. White space is as in transformers.

Does not know what a prompt is for: ``text`` renders and tokenises it.
"""

from __future__ import annotations

import operator
import re
import time
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from runtime.errors import BundleError

__all__ = ["compiled", "rendered"]

_TEMPLATE_LIMIT = 1 << 16  # characters of template source
_PROMPT_LIMIT = 1 << 22  # characters of a prompt; 128 frames x 729 tokens x "<IMG_CONTEXT>" is 1.2 million
_WORK_LIMIT = 1 << 23  # loop passes and characters of sums while rendering
_SECONDS_LIMIT = 10  # of rendering, where an ordinary prompt takes a millisecond
_AGAIN = "export the bundle again"

_LANGUAGE = re.compile(
    "Template|Output|TemplateData|Const|Name|Getattr|Getitem|Slice|For|If|Assign|Break|Continue|CondExpr|"
    "Compare|Operand|And|Or|Not|Neg|Add|Sub|Mul|Mod|FloorDiv|Concat|Test|Filter|Call"
)
_FILTERS = frozenset({"default", "first", "last", "length", "lower", "string", "trim", "upper"})
_FUNCTIONS = frozenset({"raise_exception", "range"})
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "%": operator.mod,
    "//": operator.floordiv,
}
# jinja2's own tree, and what the expressions of a template raise besides
_TEMPLATE_ERRORS = (
    *(jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError),
    *(RecursionError, SyntaxError, TypeError, ValueError),
)


class _Meter:
    """Counts the work of one rendering and ends it where there is too much."""

    def __init__(self) -> None:
        self._left = _WORK_LIMIT
        self._deadline = time.monotonic() + _SECONDS_LIMIT

    def spend(self, work: int) -> None:
        self._left -= work
        if self._left < 0:
            raise SecurityError(f"more than {_WORK_LIMIT} loop passes and characters")
        if time.monotonic() > self._deadline:
            raise SecurityError(f"more than {_SECONDS_LIMIT} seconds")

    def passes(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.spend(1)
            yield item


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with metered operators; intercepting also keeps them from being folded on compiling."""

    intercepted_binops = frozenset(_OPERATORS)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """``left`` operator ``right`` for text + text, text * number and number with number."""
        meter: _Meter = context["_meter"]
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            meter.spend(len(left) + len(right))
        elif operator == "*" and isinstance(left, str) and isinstance(right, int):
            meter.spend(len(left) * max(right, 0))
        elif not (isinstance(left, int) and isinstance(right, int)):
            raise TypeError(f"{type(left).__name__} {operator} {type(right).__name__} is not offered")
        elif max(abs(left), abs(right)) > _WORK_LIMIT:
            raise OverflowError(f"a number above {_WORK_LIMIT}")
        return _OPERATORS[operator](left, right)


class _Metered(NodeTransformer):
    """Puts the meter on every loop and turns ``a ~ b`` into a sum, whose length is metered."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802  jinja2's name
        """Loop over ``iter | _metered``."""
        self.generic_visit(node)
        node.iter = _filter(node.iter, "_metered")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802  jinja2's name
        """``a | string + b | string``."""
        self.generic_visit(node)
        parts: list[nodes.Expr] = [_filter(part, "string") for part in node.nodes]
        return reduce(nodes.Add, parts)


def _filter(value: Any, name: str) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)


@jinja2.pass_context
def _metered(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    meter: _Meter = context["_meter"]
    return meter.passes(items)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _sandbox() -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        extensions=["jinja2.ext.loopcontrols"],
    )
    environment.filters["_metered"] = _metered
    environment.globals["raise_exception"] = _raise_exception
    return environment


def compiled(source: str) -> jinja2.Template:
    """Parse a template; a ``BundleError`` says what it holds that the language does not have."""
    if len(source) > _TEMPLATE_LIMIT:
        raise BundleError(
            f"the prompt template has {len(source)} characters, expected at most {_TEMPLATE_LIMIT}; {_AGAIN}"
        )
    environment = _sandbox()
    try:
        tree = environment.parse(source)
        _check_language(tree)
        code = environment.compile(_Metered().visit(tree))
    except _TEMPLATE_ERRORS as error:
        raise BundleError(f"the prompt template is not usable: {_reason(error)}; {_AGAIN}") from error
    return jinja2.Template.from_code(environment, code, environment.make_globals(None))


def _check_language(tree: nodes.Template) -> None:
    """Refuse, with its line, what the template language does not have."""
    for node in tree.find_all(nodes.Node):
        refused = None
        if not _LANGUAGE.fullmatch(type(node).__name__):
            refused = f"the construct {type(node).__name__}"
        elif isinstance(node, nodes.Name) and node.name.startswith("_"):
            refused = f"the name {node.name}"
        elif isinstance(node, nodes.Filter) and node.name not in _FILTERS:
            refused = f"the filter {node.name}"
        elif isinstance(node, nodes.Call) and getattr(node.node, "name", None) not in _FUNCTIONS:
            refused = "a call other than range() and raise_exception()"
        if refused:
            raise jinja2.TemplateSyntaxError(f"{refused} is not offered", node.lineno)


def rendered(template: jinja2.Template, **variables: Any) -> str:
    """The template's text; a ``BundleError`` where it fails or does too much."""
    pieces: list[str] = []
    length = 0
    try:
        for piece in template.generate(**variables, _meter=_Meter()):
            length += len(piece)
            if length > _PROMPT_LIMIT:
                raise SecurityError(f"a prompt of more than {_PROMPT_LIMIT} characters")
            pieces.append(piece)
    except _TEMPLATE_ERRORS as error:
        raise BundleError(f"the prompt template failed: {_reason(error)}; {_AGAIN}") from error
    return "".join(pieces)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
