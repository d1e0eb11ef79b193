"""The index of a cache finds what a dict would find, in 20 bytes a record."""

import random

import numpy as np

from ldm.data import shard_index
from ldm.data.shard_index import PLACE, Place, PlaceIndex


def test_the_index_equals_a_dict_whatever_the_order_of_changes(monkeypatch):
    monkeypatch.setattr(shard_index, "RECENT", 8)
    monkeypatch.setattr(shard_index, "MERGED_ENTRIES", 30)
    rng, index, expected = random.Random(0), PlaceIndex(), {}
    prefixes = [
        0,
        1,
        2**62,
        2**62 + 1,
        2**63 - 1,
        2**63,
        2**63 + 1,
        2**64 - 1,
        *(rng.getrandbits(64) for _ in range(30)),
    ]
    for round_number in range(1, 2000):
        some = [rng.choice(prefixes) for _ in range(rng.choice([1, 3, 20]))]
        change = rng.random()
        if change < 0.4:
            place = Place(round_number, 5, 7)
            index.add(some[0], place)
            expected[some[0]] = place
        elif change < 0.6:
            index.remove(some[0])
            expected.pop(some[0], None)
        else:
            places = [Place(round_number, number, 7) for number in range(len(some))]
            index.add_all(np.array(some, np.uint64), np.array(places, PLACE))
            expected.update(zip(some, places))
        assert len(index._recent) <= 8
        if rng.random() < 0.5:
            assert {prefix: index.find(prefix) for prefix in prefixes} == {p: expected.get(p) for p in prefixes}
