"""What all demos have in common; what they print is tested with their framework."""

from __future__ import annotations

import pytest

from tests.integrations.demos import DEMOS


@pytest.mark.parametrize("demo", DEMOS, ids=lambda demo: demo.stem)
def test_demos_are_short_and_begin_with_their_command(demo):
    lines = demo.read_text(encoding="utf-8").splitlines()

    assert len(lines) < 60
    assert lines[0].startswith(f'"""python demos/{demo.name}')
