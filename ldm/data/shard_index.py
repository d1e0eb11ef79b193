"""Where records are, by the first 64 bits of their keys: an index in memory of 20 bytes a record."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

RECENT = 1 << 14  # entries of the index that are in a dict (250 bytes each) and not yet in its arrays (20 bytes each)
MERGED_ENTRIES = 1 << 17  # entries of index files that are sorted at once
PLACE = np.dtype([("shard", "u4"), ("offset", "u4"), ("length", "u4")])


class Place(NamedTuple):
    """Where a record is: the place of its shard in the list of shards, and its bytes in the file."""

    shard: int
    offset: int
    length: int


class PlaceIndex:
    """The places of records by the first 64 bits of their keys.

    Most are in sorted arrays of 20 bytes for a record. Those that were added one by one are in a dict, which takes
    precedence and is merged into the arrays when it has RECENT entries (40 ms with a million in the arrays).
    """

    def __init__(self) -> None:
        self._prefixes = np.empty(0, np.uint64)
        self._places = np.empty(0, PLACE)
        self._recent: dict[int, Place] = {}  # a removed one has the length 0
        self._unsorted: list[tuple[np.ndarray, np.ndarray]] = []  # prefixes and places, newer than all others

    def find(self, prefix: int) -> Place | None:
        self._settle()
        place = self._recent.get(prefix)
        if place is None:
            row = int(self._prefixes.searchsorted(np.uint64(prefix)))
            if row == len(self._prefixes) or int(self._prefixes[row]) != prefix:
                return None
            place = Place(*self._places[row].item())
        return place if place.length else None

    def add(self, prefix: int, place: Place) -> None:
        self._settle()
        self._recent[prefix] = place
        if len(self._recent) >= RECENT:
            self._merge()

    def remove(self, prefix: int) -> None:
        self.add(prefix, Place(0, 0, 0))

    def add_all(self, prefixes: np.ndarray, places: np.ndarray) -> None:
        """Add many. A later one replaces earlier ones of the same prefix."""
        self._unsorted.append((prefixes, places))
        # Not at every call: with 123 files of 8192 entries, a million take 0.4 s instead of 2.4 s.
        if sum(len(prefixes) for prefixes, _ in self._unsorted) >= MERGED_ENTRIES:
            self._merge()

    def _settle(self) -> None:
        """Put what `add_all` has left where it is found."""
        if not self._unsorted:
            return
        if len(self._recent) + sum(len(prefixes) for prefixes, _ in self._unsorted) >= RECENT:
            self._merge()
            return
        for prefixes, places in self._unsorted:
            self._recent.update(zip(prefixes.tolist(), map(Place._make, places.tolist())))
        self._unsorted = []

    def _merge(self) -> None:
        """Move everything into the sorted arrays. What is not needed any more is freed early."""
        recent = np.fromiter(self._recent, np.uint64, len(self._recent))
        recent_places = np.array([tuple(place) for place in self._recent.values()], PLACE)
        prefixes = np.concatenate([self._prefixes, recent, *(prefixes for prefixes, _ in self._unsorted)])
        places = np.concatenate([self._places, recent_places, *(places for _, places in self._unsorted)])
        self._prefixes, self._places, self._recent, self._unsorted = prefixes, places, {}, []
        order = np.argsort(prefixes, kind="stable")
        prefixes = self._prefixes = prefixes[order]
        kept = np.append(prefixes[1:] != prefixes[:-1], True)  # the last of each
        self._prefixes, self._places = prefixes[kept], places[order[kept]]
