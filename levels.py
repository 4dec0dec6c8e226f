"""Levels: the sparsities of parameters, and the parameters that are pruned at once."""

import contextlib
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from checks import check_integer

Wanted = list[tuple[list[str], int]]  # parameters that compete, and the number of their zeros


def matching(known: Iterable[str], argument: str, patterns: Any) -> list[str]:
    """The names that match one of the patterns, in the order of the patterns. A pattern is a name,
    else a glob, else a regular expression."""
    known = list(known)
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        raise ValueError(f"Invalid {argument}: {patterns!r}; it must be a list of names")
    found: dict[str, None] = {}
    for pattern in patterns:
        names: list[str] = []
        if isinstance(pattern, str):
            names = [name for name in known if name == pattern]
            names = names or [name for name in known if fnmatchcase(name, pattern)]
        if isinstance(pattern, (str, re.Pattern)) and not names:
            with contextlib.suppress(re.error):
                names = [name for name in known if re.fullmatch(pattern, name)]
        if not names:
            shown = getattr(pattern, "pattern", pattern)
            raise ValueError(
                f"The model has no parameter {shown!r}; it has {known}: see {argument}"
            )
        found |= dict.fromkeys(names)
    return list(found)


def matching_once(known: Iterable[str], argument: str, parts: Iterable[Any]) -> list[list[str]]:
    """The names that each part matches. A part is a pattern or a list of patterns. Raises
    ValueError if two parts match the same name."""
    found: list[list[str]] = []
    part_of: dict[str, Any] = {}
    for part in parts:
        patterns = part if isinstance(part, (list, tuple)) else [part]
        found.append(matching(known, argument, patterns))
        for name in found[-1]:
            if name in part_of:
                both = f"{part_of[name]!r} and {part!r}"
                raise ValueError(f"Invalid {argument}: both {both} match {name}; only one may")
            part_of[name] = part
    return found


def split_into_portions(
    sizes: Mapping[str, int], portions: int | Sequence[Any] | None
) -> list[list[str]]:
    """The names of parameters in portions: those that the entries match, or at most so many
    portions in the order of the parameters, the largest with as few weights as possible.

    Example:
        >>> split_into_portions({"a": 2, "b": 1, "c": 3}, 2)
        [['a', 'b'], ['c']]
        >>> split_into_portions({"a": 2, "b": 1, "c": 3}, ["b", ["a", "c"]])
        [['b'], ['a', 'c']]
    """
    if portions is None:
        return [list(sizes)]
    if isinstance(portions, (str, Mapping)):
        raise ValueError(f"Invalid portions: {portions!r}; it must be a number, or a list of names")
    if isinstance(portions, Iterable):
        found = matching_once(sizes, "portions", portions)
        if left_out := sizes.keys() - {name for names in found for name in names}:
            raise ValueError(f"Invalid portions: no entry matches {min(left_out)}; add one")
        return found
    count = check_integer("portions", portions)

    def filled(size: int) -> list[list[str]]:
        result: list[list[str]] = []
        room = 0
        for name, n in sizes.items():
            if n > room:
                result.append([])
                room = size
            result[-1].append(name)
            room -= n
        return result

    least, most = max(sizes.values()), sum(sizes.values())
    enough = bisect_left(range(least, most), True, key=lambda size: len(filled(size)) <= count)
    return filled(least + enough)


def levels_of_groups(
    target: Any, groups: Sequence[list[str]]
) -> list[tuple[list[str], float | None]]:
    """[(names that compete, their sparsity)] from one sparsity for all groups, a list with one for
    each group, or a dict by name, glob or regular expression. Keys of a dict split groups; a
    parameter that no key matches is on its own, with None: it loses no more weights.

    Example:
        >>> levels_of_groups({"b*": 0.5}, [["a", "b1", "b2"]])
        [(['b1', 'b2'], 0.5), (['a'], None)]
    """
    if isinstance(target, Mapping):
        names = [name for group in groups for name in group]
        found = matching_once(names, "sparsity", target)
        levels = numbers(target.values(), target)
        split: list[tuple[list[str], float | None]] = []
        for group in groups:
            parts = [[name for name in group if name in matched] for matched in found]
            split += [(part, level) for part, level in zip(parts, levels, strict=True) if part]
            split += [([name], None) for name in group if not any(name in part for part in parts)]
        return split
    single = isinstance(target, (str, set, frozenset)) or getattr(target, "ndim", 1) == 0
    several = isinstance(target, Iterable) and not single
    levels = numbers(target if several else [target] * len(groups), target)
    if len(levels) != len(groups):
        raise ValueError(f"Expected {len(groups)} target sparsities, got {len(levels)}")
    return list(zip(groups, levels, strict=True))


def numbers(values: Iterable[Any], target: Any) -> list[float]:
    """The values as floats. Raises ValueError, with `target`, if they are no numbers."""
    try:
        given = list(values)
        if any(isinstance(value, bool) for value in given):
            raise TypeError  # a mask of one entry perhaps
        return [float(value) for value in given]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Invalid sparsity: {target!r}; it must be a number, a list with one for each layer, "
            "or a dict from names to numbers"
        ) from error


def zeros_on_the_way(masks: Mapping[str, Tensor], wanted: Wanted, share: float) -> Wanted:
    """[(names, number of zeros)] after a `share` of the way from these masks to those wanted. Equal
    shares multiply the number of weights that stay by the same factor."""
    found = []
    for names, zeros in wanted:
        n = sum(masks[name].numel() for name in names)
        before = sum(int(masks[name].sum()) for name in names)
        stay = before * ((n - zeros) / before) ** share if before else 0
        found.append((names, zeros if share == 1 else n - round(stay)))
    return found
