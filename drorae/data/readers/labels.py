"""How labels come from each kind of source.

A label is text, the name of a class. Whatever a source states (a number, a name, a member `.cls`, a
field of JSON, a cell of a table) goes through `label_text`, so that the same label written in two
ways is the same class, and what is no label is never one.
"""

import math
import numbers
import unicodedata
from typing import Any

__all__ = ["BadLabel", "label_text"]


class BadLabel(ValueError):
    """A stated label that names no class; the text is the reason."""


def label_text(value: Any) -> str:
    """Class name of a stated label; empty where none is stated (None, empty text, NaN, -1).

    Whole numbers lose their decimals (2.0 is class "2"); names are stripped of spaces and a byte
    order mark and brought to Unicode's form NFC, in which macOS and Linux agree.

    Raises:
        BadLabel: It is no single class: a list, a mapping, a truth value, a fraction.
    """
    if value is None:
        return ""
    if isinstance(value, bytes):
        value = value.decode("utf-8-sig", "backslashreplace")
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value.strip("\ufeff \t\r\n\0"))
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise BadLabel(f"label {str(value)[:40]!r} is no name and no number")
    if math.isnan(value):
        return ""
    if value != int(value):
        raise BadLabel(f"label {value} is no whole number")
    return "" if value < 0 else str(int(value))
