"""What a router routes and how far it then looks: mass against attention written out, shares against decisions by rule.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.attention import reference
from l2a_jax.config import L2AConfig
from l2a_jax.errors import UserError
from l2a_jax.evaluation import looks
from l2a_jax.evaluation.evaluate import evaluate
from l2a_jax.evaluation.far_mass import attention_rows, far_mass, mass_by_distance
from l2a_jax.evaluation.options import Options
from l2a_jax.evaluation.perplexity import text_windows
from l2a_jax.models.params import add_routing
from l2a_jax.models.transformer import probe_layers
from l2a_jax.sources import TINY, load_pretrained

LAYER = L2AConfig(window=6, sinks=1)
LENGTH, ROWS = 40, 3
BACK = (6, 12, 24)


@pytest.fixture(scope="module")
def base():
    return load_pretrained(TINY, jnp.float32)


def routed(base, layer):
    return base._replace(l2a_config=layer, params=add_routing(base.params, base.config, layer))


@pytest.fixture(scope="module")
def windows(base):
    """Text of an odd length: the last window is padded."""
    ids = np.random.default_rng(0).integers(0, base.config.vocab_size, LENGTH * ROWS - 11).astype(np.int32)
    return text_windows(ids, LENGTH, LENGTH, {"name": "noise"})


def rotated(x, config):
    """Head by head and place by place: pairs of entries half a head apart, turned by their angles."""
    half, out = config.head_dim // 2, np.array(x)
    for place in range(x.shape[0]):
        for pair in range(half):
            angle = place / config.rope_theta ** (2 * pair / config.head_dim)
            a, b = x[place, :, pair], x[place, :, half + pair]
            out[place, :, pair] = a * math.cos(angle) - b * math.sin(angle)
            out[place, :, half + pair] = b * math.cos(angle) + a * math.sin(angle)
    return out


def literal(model, layer, x):
    """The weights of full attention of one layer, [N, T, T], from the stream [T, D] that enters it."""
    config, l2a = model.config, model.l2a_config
    own = jax.tree.map(lambda leaf: np.asarray(leaf[layer], np.float64), model.params["layers"])

    def normed(x, name):
        return x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + config.rms_norm_eps) * own[name]["scale"]

    def heads(h, name, part):
        out = h @ own[name][part]["kernel"] + own[name][part]["bias"]
        return out.reshape(len(h), -1, config.head_dim)

    shared = l2a.share_attention
    if l2a.topology == "sequential":
        h = normed(x, "norm_local")
        q, k = (rotated(heads(h, "attention_local", part), config) for part in "qk")
        given = (jnp.asarray(one, jnp.float32)[None] for one in (q, k, heads(h, "attention_local", "v")))
        near = reference.local(*given, window=l2a.window, sinks=l2a.sinks)
        x = x + np.asarray(near[0], np.float64).reshape(len(x), -1) @ own["attention_local"]["o"]["kernel"]
    h = normed(x, "norm_attention" if shared else "norm_global")
    q, k = (rotated(heads(h, "attention" if shared else "attention_global", part), config) for part in "qk")
    weights = np.zeros((config.num_heads, len(x), len(x)))
    for head in range(config.num_heads):
        for row in range(len(x)):
            scores = k[: row + 1, head * config.num_kv_heads // config.num_heads] @ q[row, head] / config.head_dim**0.5
            weights[head, row, : row + 1] = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    return weights


@pytest.mark.parametrize("layer", [LAYER, dataclasses.replace(LAYER, share_attention=False),
                                   dataclasses.replace(LAYER, share_attention=False, topology="sequential")],
                         ids=["shared", "separate", "sequential"])
def test_the_mass_is_that_of_attention_written_out(base, windows, layer):
    model = routed(base, layer)
    tokens, layers = windows.tokens[0], model.config.num_layers
    decisions = np.random.default_rng(1).random((layers, LENGTH)) < 0.3
    places = np.random.default_rng(2).integers(7, LENGTH, (layers, 5))
    found = far_mass(model, tokens, decisions, places, BACK)
    streams = probe_layers(model.params, jnp.asarray(tokens)[None], model.config, layer, probe=lambda x: x,
                           decisions=jnp.asarray(decisions)[:, None])
    for index in range(layers):
        weights = literal(model, index, np.asarray(streams[index, 0], np.float64)).mean(axis=0)
        for place, mass in zip(places[index], found[index], strict=True):
            want = np.zeros(5)
            for key in range(place + 1):
                ago = place - key
                want[0 if key < 1 else 1 if ago < 6 else 2 if ago < 12 else 3 if ago < 24 else 4] += weights[place, key]
            np.testing.assert_allclose(mass, want, atol=1e-5)
    np.testing.assert_allclose(found.sum(axis=-1), 1, atol=1e-5)


def test_whole_rows_sum_to_one_and_their_parts_to_them():
    q, k = (jax.random.normal(jax.random.key(seed), shape) for seed, shape in ((0, (20, 4, 8)), (1, (20, 2, 8))))
    weights = attention_rows(q, k, jnp.arange(20))
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)
    assert (np.triu(weights, 1) == 0).all()
    mass = mass_by_distance(weights, jnp.arange(20), 2, (3, 9))
    np.testing.assert_allclose(mass.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(mass[15], [weights[15, :2].sum(), weights[15, 13:16].sum(), weights[15, 7:13].sum(),
                                          weights[15, 2:7].sum()], atol=1e-6)


@pytest.fixture(scope="module")
def found(base, windows):
    """Layer 0 routes every other token, layer 1 one in four, layer 2 nothing."""
    decisions = np.zeros((3, *windows.tokens.shape), bool)
    decisions[0, :, 1::2] = decisions[1, :, 1::4] = True
    return looks.looks(routed(base, LAYER), windows, decisions & windows.real, sample=5), decisions


def test_shares_are_those_of_the_decisions(found, windows, base):
    entry, decisions = found
    beyond = windows.scored & (np.arange(LENGTH) >= 7)
    assert entry["tokens"] == beyond.sum() and entry["distances"] == [6, 12, 24]
    assert entry["routed"] == pytest.approx(decisions[:, beyond].mean())
    assert [row["routed"] for row in entry["layers"]] == pytest.approx(decisions[:, beyond].mean(axis=1))
    seen = np.zeros(windows.tokens.shape, bool)
    for row in range(ROWS):
        for place in range(LENGTH):
            ago = [place - other for other in range(place) if windows.tokens[row, other] == windows.tokens[row, place]]
            seen[row, place] = bool(ago) and min(ago) >= LAYER.window
    kind = entry["kinds"]["token seen beyond"]
    assert kind["tokens"] == (seen & beyond).sum() > 0
    assert kind["of_all"] == pytest.approx((seen & beyond).sum() / beyond.sum())
    assert kind["routed"] == pytest.approx(decisions[:, seen & beyond].mean())
    np.testing.assert_allclose(kind["layers"], decisions[:, seen & beyond].mean(axis=1))
    forms = [row["tokens"] for name, row in entry["kinds"].items() if name in looks.token_kinds.FORMS]
    assert sum(forms) == entry["tokens"]


def test_every_window_and_layer_counts_as_often_as_it_decides(found, base, windows):
    """With a sample of every decision the mean is that over all of them."""
    entry, decisions = found
    whole = looks.looks(routed(base, LAYER), windows, decisions & windows.real, sample=LENGTH)
    beyond = windows.scored & (np.arange(LENGTH) >= 7)
    for name, which in (("routed", decisions), ("local", ~decisions)):
        look = whole["looks"][name]
        assert look["decisions"] == look["sampled"] == (which & beyond).sum()
        every = np.concatenate([far_mass(routed(base, LAYER), windows.tokens[row], (decisions & windows.real)[:, row],
                                         np.tile(np.arange(LENGTH), (3, 1)), BACK)[(which & beyond)[:, row]]
                                for row in range(ROWS)])
        np.testing.assert_allclose(look["mass"], every.mean(axis=0), atol=1e-5)
        assert entry["looks"][name]["sampled"] < look["sampled"]
        assert sum(entry["looks"][name]["mass"]) == pytest.approx(1, abs=1e-5)
    assert whole["layers"][2]["looks"]["routed"] == {"decisions": 0, "sampled": 0, "mass": None, "mass_95": None}
    by_layer = [row["looks"] for row in whole["layers"]]
    alike = sum(one["routed"]["decisions"] * np.array(one["local"]["mass"]) for one in by_layer[:2])
    np.testing.assert_allclose(whole["looks"][looks.ALIKE]["mass"], alike / whole["looks"]["routed"]["decisions"],
                               atol=0.01)  # these layers route as often in every window, but for rounding
    again = looks.looks(routed(base, LAYER), windows, decisions & windows.real, sample=5)
    assert again["looks"] == entry["looks"]


def test_tokens_are_ranked_by_how_often_they_are_routed():
    """Token 1 is always routed, 2 never, 3 in half its places; 4 is too rare to be ranked."""
    tokens = np.array([[1] * 20 + [2] * 30 + [3] * 40 + [4] * 19])
    decisions = np.isin(tokens, [1, 4])[None] | ((tokens == 3) & (np.arange(109) % 2 == 0))[None]
    ranked = looks._ranked(tokens, decisions, np.ones(tokens.shape, bool), lambda ids: f"t{ids[0]}")
    assert [(row["text"], row["tokens"], row["routed"]) for row in ranked["most"]] == [
        ("t1", 20, 1.0), ("t3", 40, 0.5), ("t2", 30, 0.0)]
    assert [row["text"] for row in ranked["least"]] == ["t2", "t3", "t1"]


def test_the_command_writes_tells_and_draws(tmp_path):
    found, _ = evaluate(Options(source=TINY, tasks=("looks",), out=tmp_path, layer={"window": 12, "sinks": 2},
                               max_windows=2, looks_sample=3, looks_from=20))
    entry = found["tasks"]["looks"]
    assert entry["routed"] == 1 and entry["looks"]["local"]["mass"] is None  # an untrained router routes all
    assert entry["picture"]["file"] == "looks.png" and entry["picture"]["first"] == 20
    assert (tmp_path / "looks.png").stat().st_size > 5_000
    told = looks.told(entry)
    assert "kind of token" in told and "from 12" in told and "local, layers as routed" in told


@pytest.mark.parametrize(("given", "said"), [
    ({"looks_from": 3}, "--looks-from is 3; expected a token beyond the window, from 14 to"),
    ({"layer": {}}, "--tasks looks: .*plain model"),
    ({"route": "none"}, "--tasks looks: --route none leaves no decision"),
])
def test_bad_input_is_said_before_weights_are_read(tmp_path, given, said, monkeypatch):
    monkeypatch.setattr("l2a_jax.evaluation.evaluate.load_pretrained", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=said):
        evaluate(Options(**{"source": TINY, "tasks": ("looks",), "out": tmp_path, "layer": {"window": 12, "sinks": 2},
                            **given}))
