"""Perplexity against the obvious computation: one window at a time, whole logits, float64 on the host."""

import gzip
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.errors import UserError
from l2a_jax.evaluation import intervals, perplexity, texts
from l2a_jax.models.params import init_params
from l2a_jax.models.transformer import forward
from l2a_jax.sources import Pretrained
from tests.models.cases import CONFIG, LAYERS, make_params

LENGTH = 16
whole = jax.jit(forward, static_argnums=(2, 3))


def make_model(l2a_config=None, seed=0):
    params = init_params(CONFIG, jax.random.key(seed)) if l2a_config is None else make_params(l2a_config, seed=seed)
    return Pretrained(CONFIG, l2a_config, params, None, "tiny")


def make_ids(count, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, count).astype(np.int32)


def obvious(model, ids, context, stride):
    """{index of the scored token: nats}, by the module's convention, and routed places of each layer."""
    found = {}
    for start in range(0, len(ids), stride):
        inputs, targets = ids[start : start + context], ids[start + 1 : start + context + 1]
        inputs = inputs[: len(targets)]
        # One shape, so one compilation: what is right of a causal model's input cannot matter.
        filled = np.full(LENGTH, 9, np.int32)
        filled[: len(inputs)] = inputs
        logits = np.asarray(whole(model.params, filled[None], CONFIG, model.l2a_config).logits[0], np.float64)
        for place, target in enumerate(targets):
            if start + place + 1 not in found:
                row = logits[place]
                found[start + place + 1] = float(np.log(np.exp(row - row.max()).sum()) + row.max() - row[target])
        if start + context >= len(ids) - 1:
            break
    return found


@pytest.mark.parametrize(("count", "context", "stride"), [(50, 16, 16), (50, 16, 5), (49, 16, 16), (45, 16, 8),
                                                          (33, 16, 1)])
def test_every_token_once_as_the_obvious_computation(count, context, stride):
    model, ids = make_model(), make_ids(count)
    windows = perplexity.text_windows(ids, context, stride, {"name": "random"})
    expected = obvious(model, ids, context, stride)
    assert sorted(expected) == list(range(1, count))
    assert windows.scored.sum() == count - 1
    scores = perplexity.score_windows(model, windows, batch_tokens=3 * context)
    assert scores.nll.sum() == pytest.approx(sum(expected.values()), rel=1e-5)
    assert perplexity.result(scores, windows)["perplexity"] == pytest.approx(
        math.exp(sum(expected.values()) / (count - 1)), rel=1e-5)


def test_windows_hold_what_the_convention_says():
    ids = np.arange(1, 24, dtype=np.int32)
    windows = perplexity.text_windows(ids, 8, 3, {})
    seen = [(int(k), int(windows.targets[k, t])) for k, t in np.argwhere(windows.scored)]
    assert [target for _, target in seen] == list(range(2, 24))
    for k, t in np.argwhere(windows.scored):
        assert windows.tokens[k, t] == windows.targets[k, t] - 1
        assert windows.tokens[k, 0] == 1 + 3 * k
        assert t >= 8 - 3 or k == 0
    limited = perplexity.text_windows(ids, 8, 3, {}, limit=2)
    np.testing.assert_array_equal(limited.tokens, windows.tokens[:2])
    assert limited.about["hash"] != windows.about["hash"]


def test_routing_is_counted_on_real_tokens_only():
    layer = LAYERS["shared"]
    model, ids = make_model(layer), make_ids(36)
    windows = perplexity.text_windows(ids, 16, 16, {})
    scores = perplexity.score_windows(model, windows, batch_tokens=48)
    result = perplexity.result(scores, windows)
    routed, real = 0, 0
    for start, stop in ((0, 16), (16, 32), (32, 35)):
        filled = np.zeros(LENGTH, np.int32)
        filled[: stop - start] = ids[start:stop]
        decisions = np.asarray(whole(model.params, filled[None], CONFIG, layer).routing.decisions)
        routed, real = routed + decisions[:, :, : stop - start].sum(axis=(1, 2)), real + stop - start
    np.testing.assert_allclose(result["sparsity_per_layer"], 1 - routed / real)
    assert 0 < result["sparsity"] < 1
    assert (result["router_entropy_per_layer"] > 0).all()


def test_the_batch_changes_nothing():
    model, ids = make_model(), make_ids(60)
    windows = perplexity.text_windows(ids, 16, 8, {})
    one, many = (perplexity.score_windows(model, windows, batch_tokens=size) for size in (32, 48))
    np.testing.assert_allclose(one.nll, many.nll, rtol=1e-5)


def test_a_loss_that_is_not_finite_names_its_window():
    model = make_model()
    embedding = model.params["embed"]["embedding"].at[7].set(jnp.nan)  # a tied row reaches every loss
    broken = model._replace(params={**model.params, "embed": {"embedding": embedding}})
    windows = perplexity.text_windows(np.ones(40, np.int32), 16, 16, {"name": "a text"})
    with pytest.raises(UserError, match="a text: the loss in window 0, first at its token 0, is not finite"):
        perplexity.score_windows(broken, windows)
    scored = windows.scored.copy()
    scored[0], scored[1, :5] = False, False
    with pytest.raises(UserError, match="window 1, first at its token 5"):
        perplexity.score_windows(broken, windows._replace(scored=scored))


@pytest.mark.parametrize(("stride", "count", "message"), [(0, 9, "--stride is 0"), (17, 9, "--stride is 17"),
                                                          (4, 1, "has 1 tokens")])
def test_windows_that_cannot_be(stride, count, message):
    with pytest.raises(UserError, match=message):
        perplexity.text_windows(make_ids(count), 16, stride, {})


def test_ids_beyond_the_vocabulary_are_an_error():
    windows = perplexity.text_windows(np.full(9, CONFIG.vocab_size, np.int32), 8, 8, {})
    with pytest.raises(UserError, match="outside the vocabulary"):
        perplexity.score_windows(make_model(), windows)


def test_the_interval_is_that_of_repeated_sampling():
    """Windows drawn again and again: the true mean lies in about 95 % of the intervals."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(400):
        tokens = rng.integers(50, 100, 40)
        nll = tokens * (3 + 0.5 * rng.standard_normal(40))
        low, high = intervals.around(*intervals.token_mean(nll, tokens))
        inside += low <= 3 <= high
    assert 0.91 < inside / 400 < 0.98


def test_pairs_find_what_two_intervals_cannot():
    rng = np.random.default_rng(0)
    tokens = np.full(50, 100)
    hard = rng.normal(300, 60, 50)
    better = hard - 5 + rng.normal(0, 1, 50)
    difference, (low, high) = intervals.paired_windows(better, hard, tokens)
    assert low < -0.05 < high < 0 and difference == pytest.approx((better - hard).sum() / 5_000)
    error = intervals.token_mean(hard, tokens)[1]
    assert error > 10 * (high - low) / 4
    assert intervals.paired_items([1, 1, 0, 1], [0, 1, 0, 1])[0] == 0.25
    assert intervals.share(0, 20)[0] == 0 and 0.1 < intervals.share(0, 20)[1] < 0.2
    assert math.isnan(intervals.token_mean(np.ones(1), np.ones(1, int))[1])


def test_the_wikitext_string(tmp_path):
    raw = " \n = Title = \n \n A line . \n \n"
    path = tmp_path / "wiki.test.raw"
    path.write_text(raw)
    text = texts.read_text(str(path))
    assert text.documents == ("\n\n = Title = \n\n\n\n\n A line . \n\n\n",) and text.rule == "wikitext"
    rows = [line + "\n" if line.strip() else "" for line in raw.split("\n")[:-1]]
    assert text.documents[0] == "\n\n".join(rows)
    plain = tmp_path / "other.txt"
    plain.write_bytes(b"one\r\ntwo\n")
    assert texts.read_text(str(plain)).documents == ("one\r\ntwo\n",) and texts.read_text(str(plain)).rule == "text"


def test_every_file_of_a_text_has_its_hash(tmp_path):
    for name in ("one/part.txt", "two/part.txt", "two/other.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = texts.read_text(str(tmp_path)).files
    assert list(found) == [str(tmp_path / "one/part.txt"), "other.txt", str(tmp_path / "two/part.txt")]
    assert len(set(found.values())) == 3


@pytest.mark.parametrize(("raw", "rows"), [
    (b" = Title = ", [" = Title = "]),
    (b" = Title = \n", [" = Title = \n"]),
    (b" = T = \n \n the last line", [" = T = \n", "", " the last line"]),
    (b" = T = \r\n \r\n A line . \r\n", [" = T = \n", "", " A line . \n"]),
    (b" = T = \r\n last", [" = T = \n", " last"]),
    (b" = T = \n\n \n\n", [" = T = \n", "", "", ""]),
    (b" a\n ", [" a\n", ""]),
    (b"\xef\xbb\xbf = T = \n b \xe2\x80\xa8 c \x0c d\n", [" = T = \n", " b \u2028 c \x0c d\n"]),
])
@pytest.mark.parametrize("packed", [False, True])
def test_the_rows_of_a_wikitext_file_are_the_lines_that_python_reads(tmp_path, raw, rows, packed):
    """As on the hub, whose rows were made with `for row in file`, blank ones emptied; published numbers join them."""
    path = tmp_path / ("wiki.test.raw" + ".gz" * packed)
    path.write_bytes(gzip.compress(raw) if packed else raw)
    plain = tmp_path / "lines"
    plain.write_bytes(raw)
    with plain.open(encoding="utf-8-sig") as file:
        assert [line if line.strip() else "" for line in file] == rows
    assert texts.read_text(str(path)).documents == ("\n\n".join(rows),)


def test_documents_are_divided_by_the_end_of_text(tmp_path):
    from l2a_jax.data.recall import EOS, IDS
    from l2a_jax.sources import recall_tokenizer

    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "the old"}) + "\n" + json.dumps({"text": "river"}) + "\n")
    (tmp_path / "b.txt").write_text("hill<|endoftext|>road")
    text = texts.read_text(str(tmp_path))
    assert text.rule == "documents" and len(text.files) == 2
    ids = texts.tokenise(text, recall_tokenizer(), 128)
    words = [IDS[word] for word in "the old river hill road".split()]
    assert ids.tolist() == [*words[:2], EOS, words[2], EOS, words[3], EOS, words[4]]
    with pytest.raises(UserError, match="vocabulary has 5"):
        texts.tokenise(text, recall_tokenizer(), 5)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("absent.txt", None, "no such file"), ("a.txt", " \n", "no text"), ("a.pdf", "x", "is no .txt")])
def test_texts_that_cannot_be_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        texts.read_text(str(tmp_path / name))


@pytest.mark.parametrize("l2a_config", [None, LAYERS["sequential"], LAYERS["shared"]])
def test_a_few_scored_places_score_as_among_all(l2a_config, monkeypatch):
    """Logits at the scored places alone: none in one window, the first and the last place in another."""
    model = make_model(l2a_config)
    windows = perplexity.text_windows(make_ids(5 * 64 + 1), 64, 64, {"name": "random"})
    scored = np.zeros_like(windows.scored)
    for row, places in enumerate(([5], [], [0, 63], range(20, 31), [7, 9])):
        scored[row, list(places)] = True
    windows = windows._replace(scored=scored)
    few = perplexity.score_windows(model, windows, batch_tokens=2 * 64)
    assert perplexity._scored_places(windows.scored).shape == (5, 16)
    monkeypatch.setattr(perplexity, "_scored_places", lambda scored: None)
    whole = perplexity.score_windows(model, windows, batch_tokens=2 * 64)
    np.testing.assert_allclose(few.nll, whole.nll, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(few.correct, whole.correct)
    np.testing.assert_array_equal(few.tokens, [1, 0, 2, 11, 2])
    if l2a_config is not None:
        np.testing.assert_array_equal(few.decisions, whole.decisions)
