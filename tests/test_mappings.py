"""A worker forgets its compiled programs before the mappings of memory that they take run out."""

import jax
import pytest

from tests import mappings


@pytest.mark.parametrize(("held", "limit", "forgotten"), [
    (26, "100\n", 1), (25, "100\n", 0), (26, None, 0), (None, "100\n", 0)])
def test_programs_are_forgotten_where_a_quarter_of_the_limit_is_held(tmp_path, monkeypatch, held, limit, forgotten):
    for name, text in (("HELD", None if held is None else "a mapping\n" * held), ("LIMIT", limit)):
        monkeypatch.setattr(mappings, name, tmp_path / name)
        if text is not None:
            (tmp_path / name).write_text(text)
    calls = []
    monkeypatch.setattr(jax, "clear_caches", lambda: calls.append(1))
    mappings.spare()
    assert len(calls) == forgotten


def test_this_process_is_counted():
    assert not mappings.HELD.exists() or mappings.held() > 10
