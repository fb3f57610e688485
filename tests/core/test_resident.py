"""What hot memories promise: the values of those asked for, within the bytes given."""

from __future__ import annotations

from dataclasses import replace

import torch

from softrag.decoder.resident import ResidentMemories
from softrag.memory import Memory

DEVICE = torch.device("cpu")


def memory(number: int, rows: int = 2) -> Memory:
    values = torch.full((rows, 4), float(number)) + torch.arange(rows)[:, None] / 8
    return Memory(values=values, key=f"{number:032x}", fingerprint="f", n_document_tokens=9)


def resident(rows: int) -> ResidentMemories:
    return ResidentMemories(rows * 16, hidden=4, dtype=torch.float32, device=DEVICE)


def test_memories_come_back_in_order_and_repeated():
    hot = resident(8)
    a, b = memory(1), memory(2, rows=3)

    for wanted in ([a, b, a], [b], [a, a]):
        assert torch.equal(hot.gather(wanted), torch.cat([each.values for each in wanted]))
    assert len(hot) == 2


def test_the_one_used_longest_ago_makes_room_and_none_that_is_wanted_now():
    hot = resident(6)
    a, b, c, d = map(memory, range(4))
    hot.gather([a, b, c])
    hot.gather([a])

    assert torch.equal(hot.gather([d, b]), torch.cat([d.values, b.values]))
    assert len(hot) == 3
    assert torch.equal(hot.gather([a, b, d]), torch.cat([a.values, b.values, d.values]))


def test_more_than_fits_is_passed_by():
    hot = resident(3)
    a, b = memory(1), memory(2)

    assert torch.equal(hot.gather([a, b]), torch.cat([a.values, b.values]))
    assert len(hot) == 0


def test_other_values_under_the_same_key_are_other_values():
    hot = resident(8)
    a = memory(1)
    rounded = replace(a, values=a.values + 1)

    assert torch.equal(hot.gather([a]), a.values)
    assert torch.equal(hot.gather([rounded]), a.values + 1)
