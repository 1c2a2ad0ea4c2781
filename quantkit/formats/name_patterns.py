"""Which entry of a quantization_config speaks of a layer: exact names are looked up, and only true regular expressions are tried in turn.

Mixed checkpoints name every layer they except, so trying entry after entry would take layers times layers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from quantkit.errors import FormatError


class NamePatterns:
    """Regular expressions in order of precedence, each matched from the start of a name.

    Args:
        patterns: the regular expression of every entry, by the entry as the configuration writes it.

    Raises:
        FormatError: one is no regular expression.
    """

    def __init__(self, patterns: Mapping[str, str]) -> None:
        self._exact: dict[str, tuple[int, str]] = {}
        self._regexes: list[tuple[int, str, re.Pattern[str]]] = []
        for i, (entry, regex) in enumerate(patterns.items()):
            name = _exact_name(regex)
            if name is None:
                self._regexes.append((i, entry, _compiled(entry, regex)))
            else:
                self._exact.setdefault(name, (i, entry))

    def first(self, name: str) -> str | None:
        """The first entry that matches this name."""
        at, found = self._exact.get(name, (None, None))
        for i, entry, regex in self._regexes:
            if at is not None and at < i:
                break
            if regex.match(name):
                return entry
        return found

    def idle(self, names: Collection[str]) -> list[str]:
        """The entries that match none of these names."""
        without = [entry for name, (_, entry) in self._exact.items() if name not in names]
        return without + [entry for _, entry, regex in self._regexes if not any(map(regex.match, names))]


class Targets:
    """A list of layers as compressed-tensors writes it: exact names, `re:` patterns, and Linear for all."""

    def __init__(self, entries: Iterable[str]) -> None:
        entries = list(entries)
        self.names = {entry for entry in entries if not entry.startswith("re:")}
        self.patterns = NamePatterns({entry: entry[3:] for entry in entries if entry.startswith("re:")})

    def __contains__(self, name: str) -> bool:
        return name in self.names or "Linear" in self.names or self.patterns.first(name) is not None

    def idle(self, names: Collection[str]) -> list[str]:
        """The entries that match none of these names."""
        return [name for name in sorted(self.names) if name != "Linear" and name not in names] + self.patterns.idle(names)


def _exact_name(regex: str) -> str | None:
    """The one name that `^escaped$` matches; None for any other regular expression."""
    if not (regex.startswith("^") and regex.endswith("$")):
        return None
    name = re.sub(r"\\(.)", r"\1", regex[1:-1])
    return name if re.escape(name) == regex[1:-1] else None


def _compiled(entry: str, regex: str) -> re.Pattern[str]:
    try:
        return re.compile(regex)
    except re.error as error:
        raise FormatError(f"quantization_config has {entry!r}, which is no regular expression: {error}") from error
