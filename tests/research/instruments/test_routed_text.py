"""What is routed: classes by hand, counts that add up, rates recovered from decisions made by rule, and the picture."""

import numpy as np
import pytest

from l2a_jax.errors import UserError
from l2a_jax.evaluation.perplexity import Windows
from l2a_jax.research.replication.routed_picture import draw_routed_text, lay_out
from l2a_jax.research.replication.routed_text import (
    FORMS,
    form_of,
    format_routed,
    repetitions,
    routed_share,
    what_is_routed,
)

PIECES = ["The", " cat", " sat", ".", "\n", "It", " was", " 3", "4", "\n\n", " ", "ing", " Zoë", "\ufffd", "\n  x",
          " +="]
EXPECTED = ["capitalised", "word-initial", "word-initial", "punctuation", "newline", "capitalised", "word-initial",
            "digit", "digit", "newline", "space", "continuation", "capitalised", "other", "newline", "punctuation"]


def decode(ids):
    return "".join(PIECES[i] for i in ids)


def windows_of(tokens, real=None):
    tokens = np.asarray(tokens, np.int32)
    real = np.ones(tokens.shape, bool) if real is None else real
    return Windows(tokens, tokens, real, real, {"name": "made up"})


def test_forms_by_hand():
    assert [form_of(piece) for piece in PIECES] == EXPECTED
    assert form_of("") == "space" and form_of("x1") == "continuation" and set(EXPECTED) == set(FORMS)


def test_repetitions_by_the_definition():
    rng = np.random.default_rng(0)
    tokens, reach = rng.integers(0, 9, (3, 60)), 5
    found = repetitions(tokens, reach)
    for row in range(3):
        for place in range(60):
            ids = tokens[row].tolist()
            ago = [place - other for other in range(place) if ids[other] == ids[place]]
            pairs = [place - other for other in range(1, place)
                     if ids[other - 1 : other + 1] == ids[place - 1 : place + 1]]
            for kind, distances in (("token", ago), ("pair", pairs)):
                if kind == "pair" and place == 0:
                    expected = [False] * 3
                else:
                    expected = [not distances, bool(distances) and min(distances) < reach,
                                bool(distances) and min(distances) >= reach]
                assert [found[f"{kind} {when}"][row, place] for when in ("new", "seen near", "seen beyond")] == expected


def test_rates_come_back_from_decisions_made_by_rule():
    """Layer 0 routes newlines, layer 1 tokens seen beyond the window, layer 2 everything, layer 3 is pruned."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, len(PIECES), (6, 80))
    real = np.arange(80) < np.array([80, 80, 80, 80, 50, 20])[:, None]
    seen = repetitions(tokens, 16)
    newline = np.isin(tokens, [i for i, form in enumerate(EXPECTED) if form == "newline"])
    decisions = np.stack([newline, seen["token seen beyond"], np.ones_like(newline), np.zeros_like(newline)]) & real
    report = what_is_routed(windows_of(tokens, real), decisions, decode, reach=16, pruned=(3,))
    classes = report["classes"]
    for kind in ("form", "position"):
        assert sum(row["tokens"] for row in classes.values() if row["kind"] == kind) == real.sum() == report["tokens"]
        assert sum(row["of_all_routed"] for row in classes.values() if row["kind"] == kind) == pytest.approx(1)
    share = decisions[:3].mean(axis=0)
    np.testing.assert_allclose(routed_share(decisions, (3,)), share)
    assert classes["newline"]["tokens"] == (newline & real).sum()
    assert classes["newline"]["share"] == pytest.approx(share[newline & real].mean())
    assert classes["newline"]["ratio"] == pytest.approx(share[newline & real].mean() / share[real].mean())
    assert classes["digit"]["share"] == pytest.approx((1 + decisions[1][np.isin(tokens, [7, 8]) & real].mean()) / 3)
    low, high = classes["newline"]["share_95"]
    assert low < classes["newline"]["share"] < high
    layers = report["layers"]
    assert layers[0]["most_routed"]["form"] == {"class": "newline", "share": 1.0}
    assert layers[1]["most_routed"]["repetition"]["class"] == "token seen beyond" and layers[2]["share"] == 1
    assert layers[3]["pruned"] and layers[3]["share"] == 0
    text = format_routed(report)
    assert "newline" in text and "pruned" in text


def test_nothing_routed_has_no_ratio_and_nothing_able_is_an_error():
    windows = windows_of(np.zeros((2, 9)))
    report = what_is_routed(windows, np.zeros((2, 2, 9), bool), decode, reach=4)
    assert report["share"] == 0 and report["classes"]["capitalised"]["ratio"] is None
    assert "capitalised" in format_routed(report)
    with pytest.raises(UserError, match="every layer is pruned"):
        routed_share(np.zeros((2, 2, 9), bool), (0, 1))


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
