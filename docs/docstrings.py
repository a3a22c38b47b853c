"""What mkdocstrings' reader of Python (Griffe) is told about this project's docstrings and annotations.

- ``Example:`` is a section of code, as ``Examples:`` is; ``>>>`` outside of it is code as well.
- ``left, right: their text`` are two parameters with the same text.
- A comment behind a field of a dataclass or a NamedTuple, and on the lines below it, describes the field: the class
  gets a list of them.
- The axes of an array stay in quotation marks: ``Float[Array, "features"]``, which Griffe would take for a class.
"""

import dataclasses
import re
from typing import Any

from griffe import Attribute, Expr, ExprSubscript, ExprTuple, Extension

ARRAYS = {"Bool", "Complex", "Float", "Inexact", "Int", "Num", "Real", "Shaped", "UInt"}


def griffe_style(text: str) -> str:
    """A docstring as Griffe reads it."""
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    text = re.sub(r"^(>>> .*(?:\n.+)*)", r"```pycon\n\1\n```", text, flags=re.MULTILINE)
    several = r"^(    \w+)((?:, \w+)+)(: .*(?:\n     +.*)*)"

    def one_each(match: re.Match) -> str:
        first, others, said = match.groups()
        return "\n".join([first + said, *(f"    {name}{said}" for name in others.split(", ")[1:])])

    return re.sub(several, one_each, text, flags=re.MULTILINE)


def quote_axes(annotation: Any) -> None:
    """Put the axes of every jaxtyping annotation within this one in double quotation marks."""
    if isinstance(annotation, ExprSubscript) and isinstance(annotation.slice, ExprTuple):
        elements = annotation.slice.elements
        if str(annotation.left) in ARRAYS and len(elements) == 2:
            elements[1] = '"' + str(elements[1]).strip("'\" ") + '"'
    if isinstance(annotation, Expr):
        for field in (each for each in dataclasses.fields(annotation) if each.name != "parent"):
            value = getattr(annotation, field.name)
            for each in value if isinstance(value, list) else [value]:
                quote_axes(each)


def comment_of(field: Attribute) -> str:
    """The comment behind a field, and on the lines below it that hold nothing else."""
    lines = field.filepath.read_text().splitlines()
    last = field.endlineno or field.lineno
    found = re.search(r"  # (.*)$", lines[last - 1])
    if found is None:
        return ""
    words = [found.group(1)]
    for line in lines[last:]:
        if not line.strip().startswith("# "):
            break
        words.append(line.strip().removeprefix("# "))
    return re.sub(r"\bfmt: skip\b", "", " ".join(words)).strip()


class Docstrings(Extension):
    """See the top of this file."""

    def on_instance(self, *, obj, **_: Any) -> None:
        if not obj.is_alias and obj.docstring is not None:
            obj.docstring.value = griffe_style(obj.docstring.value)

    def on_function_instance(self, *, func, **_: Any) -> None:
        quote_axes(func.returns)
        for parameter in func.parameters:
            quote_axes(parameter.annotation)

    def on_attribute_instance(self, *, attr, **_: Any) -> None:
        quote_axes(attr.annotation)

    def on_class_members(self, *, cls, **_: Any) -> None:
        fields = [each for each in cls.attributes.values() if each.annotation is not None and not each.docstring]
        said = {each.name: comment_of(each) for each in fields if each.is_public}
        if cls.docstring is not None and any(said.values()) and "\nAttributes:" not in cls.docstring.value:
            lines = [f"    {name}: {comment}" for name, comment in said.items() if comment]
            cls.docstring.value = "\n".join([cls.docstring.value, "", "Attributes:", *lines])
