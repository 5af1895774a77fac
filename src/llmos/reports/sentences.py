"""Sentences that follow from a certificate's records: the values in a text are read from its basis.

A sentence is made from a template and JSON pointers (RFC 6901) into the predicate. What stands in
the text was read at those pointers and nowhere else, so whoever holds the predicate can make the
sentence again and compare. The templates belong to the predicate's version: a change of one word
makes a new version, or certificates that were issued before would not verify any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Predicate = Mapping[str, Any]
Sentence = dict[str, Any]  # id, text, basis
Reading = str | tuple[str, Callable[[Any], str]]  # a pointer, or one with how to write its value


def sentence(predicate: Predicate, name: str, template: str, *readings: Reading) -> Sentence:
    """Fill a template with what stands at the pointers; those it leaves out are support.

    Raises:
        KeyError, ValueError, TypeError: a pointer leads nowhere.
    """
    values = []
    for reading in readings:
        pointer, write = (reading, words) if isinstance(reading, str) else reading
        values.append(write(value_at(predicate, pointer)))
    basis = [reading if isinstance(reading, str) else reading[0] for reading in readings]
    return {"id": name, "text": template.format(*values), "basis": list(dict.fromkeys(basis))}


def value_at(document: Any, pointer: str) -> Any:  # noqa: ANN401 - any JSON value
    """Return what stands at a JSON pointer.

    >>> value_at({"a": [{"b/c": 1}]}, "/a/0/b~1c")
    1

    Raises:
        KeyError, ValueError, TypeError: nothing stands there.
    """
    for token in pointer.split("/")[1:]:
        name = token.replace("~1", "/").replace("~0", "~")
        try:
            document = document[int(name)] if isinstance(document, list) else document[name]
        except IndexError as error:
            raise KeyError(name) from error
    return document


def words(value: object) -> str:
    """Write a JSON value in a sentence; 8 and 8.0 are the same number in JSON.

    >>> [words(v) for v in (None, True, 8.0, 0.00001, ["a", 2], {"a": {"loss": 0.123456789}})]
    ['none', 'yes', '8', '1e-05', 'a, 2', 'a (loss 0.123457)']
    """
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.6g}"
        case Mapping():
            return ", ".join(f"{name} {_inner(value[name])}" for name in sorted(value))
        case list():
            return ", ".join(map(words, value))
        case _:
            return str(value)


def _inner(value: object) -> str:
    return f"({words(value)})" if isinstance(value, Mapping) else words(value)
