"""Containers of one source of which some list the names of their classes and others only numbers.

The numbers of a container without a list mean nothing alone. If all others have the same list, and
the numbers fit, they count it; else there is no right reading.
"""

from collections.abc import Sequence
from dataclasses import replace

from drorae.data.readers.candidates import (
    Listing,
    Note,
    dictionary_of,
    is_number,
    printable,
    with_values,
)

__all__ = ["with_shared_names"]


def with_shared_names(
    names: Sequence[str], listings: Sequence[Listing]
) -> tuple[list[Listing], list[Note]]:
    """Listings whose numbers have names, where other containers of the source list them.

    Args:
        names: Name of each container.
        listings: Their listings.

    Returns:
        The listings, and what was decided.

    Raises:
        ValueError: The lists differ, or a number is beyond the list.
    """
    lists = {listing.class_names for listing in listings if listing.class_names}
    numbered = [i for i, listing in enumerate(listings) if lists and _has_numbers_only(listing)]
    if not numbered:
        return list(listings), []
    most = max(int(text) for i in numbered for text in _labels(listings[i]))
    class_names = max(lists, key=len)
    first = printable(names[numbered[0]])
    if len(lists) > 1 or most >= len(class_names):
        raise ValueError(
            f"{len(numbered)} of {len(listings)} containers have labels up to {most} but no names "
            f"of classes, such as {first!r}, and the others list {len(lists)} different sets of "
            f"up to {len(class_names)} names: expected one list for all. Write the tables anew "
            "with their ClassLabel, or set shard.source to those that belong together."
        )
    text = f"{len(numbered)} containers, such as {first!r}, list no names of classes: their "
    text += f"numbers count the {len(class_names)} names that all the others list"
    named = list(listings)
    for i in numbered:
        named[i] = _named(listings[i], class_names)
    return named, [Note(text, is_doubtful=True)]


def _labels(listing: Listing) -> set[str]:
    return set(dictionary_of(listing.table, "class_name")[1]) - {""}


def _has_numbers_only(listing: Listing) -> bool:
    labels = _labels(listing)
    is_numbered = bool(labels) and all(is_number(text) for text in labels)
    return is_numbered and listing.has_stated_labels and not listing.class_names


def _named(listing: Listing, class_names: Sequence[str]) -> Listing:
    codes, numbers = dictionary_of(listing.table, "class_name")
    texts = [class_names[int(number)] if number else "" for number in numbers]
    return replace(listing, table=with_values(listing.table, "class_name", codes, texts))
