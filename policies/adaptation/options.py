"""The settings of every adaptation method as data, for command lines and help texts."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import types
import typing
from dataclasses import dataclass
from typing import Any

from policies.adaptation import ADAPTATIONS, AdaptationConfig


@dataclass(frozen=True)
class Option:
    """One setting of one method."""

    name: str
    type: Any
    """int, float, bool or str, or one of them ``| None``."""
    default: Any
    choices: tuple[str, ...]
    """Values that it may have, where these are listed."""
    help: str
    """What it is for."""


@functools.cache
def method_options(method: str) -> tuple[Option, ...]:
    """What a method of :data:`ADAPTATIONS` can be told beside the encoder to adapt.

    Types, defaults and choices are those of the fields of its configuration, and the help is the text written
    below each.
    """
    config = ADAPTATIONS[method].config_class
    hints = typing.get_type_hints(config)
    shared = {field.name for field in dataclasses.fields(AdaptationConfig)}
    texts = _field_texts(config)
    found = []
    for field in dataclasses.fields(config):
        if field.name not in shared:
            kind, choices = _plain_type(hints[field.name])
            found.append(Option(field.name, kind, field.default, choices, texts[field.name]))
    return tuple(found)


def _plain_type(hint: Any) -> tuple[Any, tuple[str, ...]]:
    """A type without ``Literal``, and the strings that one listed."""
    if typing.get_origin(hint) is typing.Literal:
        return str, typing.get_args(hint)
    arms = typing.get_args(hint) if isinstance(hint, types.UnionType) else ()
    literal = next((arm for arm in arms if typing.get_origin(arm) is typing.Literal), None)
    if literal is not None:
        return str | None, typing.get_args(literal)
    return hint, ()


def _field_texts(config: type) -> dict[str, str]:
    """The docstring below each field of a dataclass and of those it extends, on one line each."""
    texts: dict[str, str] = {}
    for cls in reversed(config.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, below in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                texts[statement.target.id] = " ".join(str(below.value.value).split())
    return texts
