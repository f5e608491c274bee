"""The picture of a routed text: its lines by hand, its shades in the file."""

import numpy as np
import pytest

from l2a_jax.errors import UserError
from l2a_jax.evaluation.routed_picture import draw_routed_text, lay_out
from tests.evaluation.test_token_kinds import PIECES, decode


def test_lines_of_the_picture():
    lines = lay_out(["ab", " cde", "f\n", "\n", "\tg", "日", "longer"], 4)
    texts = ["".join(text for _, _, text, _ in line) for line in lines]
    assert texts == ["ab", " cde", "f↵", "↵", "    ", "g□", "long", "er"]
    assert [index for index, *_ in lines[2]] == [2, 2]
    for line in lines:
        assert [column for _, column, _, _ in line] == np.cumsum([0, *(width for *_, width in line)])[:-1].tolist()


def test_the_picture_shows_more_ink_where_more_is_routed(tmp_path):
    import matplotlib.image

    tokens = np.arange(len(PIECES)).repeat(3)
    share = np.where(np.arange(len(tokens)) < 20, 0.0, 1.0)
    assert draw_routed_text(tokens, share, decode, tmp_path / "a" / "t.png", title="x $y_", columns=30) == len(tokens)
    drawn = matplotlib.image.imread(tmp_path / "a" / "t.png")[..., :3]
    blank = draw_routed_text(tokens, 0 * share, decode, tmp_path / "b.png", columns=30)
    plain = matplotlib.image.imread(tmp_path / "b.png")[..., :3]
    assert blank == len(tokens) and drawn.shape == plain.shape
    redder = (drawn[..., 0] - drawn[..., 2] > 0.3).mean(axis=(1,)), (plain[..., 0] - plain[..., 2] > 0.3).mean(axis=1)
    assert redder[0].sum() > 2 * redder[1].sum()  # the colour bar alone is in the second
    assert draw_routed_text(tokens, share, decode, tmp_path / "c.png", columns=30, max_lines=3) < len(tokens)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b.png", "c.png"]
    late = draw_routed_text(tokens, share, decode, tmp_path / "e.png", first=20, columns=30)
    assert late == len(tokens) - 20
    with pytest.raises(UserError, match=f"begins at token {len(tokens)} of {len(tokens)}; expected 0 to"):
        draw_routed_text(tokens, share, decode, tmp_path / "d.png", first=len(tokens))
    with pytest.raises(UserError, match="at least one"):
        draw_routed_text(tokens[:0], share[:0], decode, tmp_path / "d.png")
