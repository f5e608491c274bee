"""Causality, proven by perturbation: what comes later, or belongs to a neighbour, changes nothing that came before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import cases
from tests.models.cases import CONFIG, LAYERS, make_params, make_tokens, packed


def run(params, tokens, layer, **options):
    return np.asarray(cases.hidden(params, tokens, CONFIG, layer, **options)[0])


@pytest.mark.parametrize(("train", "backend"), [(False, "reference"), (True, "xla")])
@pytest.mark.parametrize("name", [None, *LAYERS])
def test_the_future_changes_nothing(name, train, backend):
    layer = None if name is None else LAYERS[name]
    params, tokens, cut = make_params(layer), make_tokens(), 13
    future = tokens.at[:, cut:].set((tokens[:, cut:] + 1) % CONFIG.vocab_size)
    options = {"train": train, "key": jax.random.key(0), "backend": backend}
    before, after = run(params, tokens, layer, **options), run(params, future, layer, **options)
    np.testing.assert_array_equal(before[:, :cut], after[:, :cut])
    assert np.abs(before[:, cut:] - after[:, cut:]).max() > 1e-2  # the perturbation does arrive


@pytest.mark.parametrize("name", LAYERS)
def test_the_future_changes_nothing_under_forced_decisions(name):
    layer, tokens, cut = LAYERS[name], make_tokens(), 13
    params = make_params(layer)
    decisions = jax.random.bernoulli(jax.random.key(2), 0.5, (CONFIG.num_layers, *tokens.shape))
    future = tokens.at[:, cut:].set((tokens[:, cut:] + 1) % CONFIG.vocab_size)
    flipped = decisions.at[:, :, cut:].set(~decisions[:, :, cut:])
    before = run(params, tokens, layer, decisions=decisions)
    np.testing.assert_array_equal(before[:, :cut], run(params, future, layer, decisions=flipped)[:, :cut])


@pytest.mark.parametrize("name", LAYERS)
def test_unrouted_tokens_reach_back_by_the_window_alone(name):
    """With nothing routed, L layers of window W see at most L (W - 1) tokens back, and the sinks."""
    layer = LAYERS[name]
    params, tokens = make_params(layer), make_tokens(1, 24)
    decisions = jnp.zeros((CONFIG.num_layers, 1, 24), bool)
    reach = CONFIG.num_layers * (layer.window - 1)
    place = 24 - reach - 2  # beyond the reach of the last token, after the sinks
    changed = tokens.at[:, place].set((tokens[:, place] + 1) % CONFIG.vocab_size)
    before, after = (run(params, t, layer, decisions=decisions) for t in (tokens, changed))
    np.testing.assert_array_equal(before[:, -1], after[:, -1])
    assert np.abs(before[:, place + reach] - after[:, place + reach]).max() > 0


@pytest.mark.parametrize("name", [None, *LAYERS])
def test_a_packed_row_is_its_documents_alone(name):
    """Each document of a packed row gives what it gives by itself; changing one never changes another."""
    layer = None if name is None else LAYERS[name]
    params, tokens, ids = make_params(layer), make_tokens(), packed()
    backend = "xla" if name is None or "shared" in name else "reference"
    whole = run(params, tokens, layer, segment_ids=ids, backend=backend)
    for row, segment in [(0, 2), (1, 2)]:
        inside = np.flatnonzero(np.asarray(ids[row]) == segment)
        # Alone and moved to the front, its tail cut by padding: the same shapes, so the same compiled function.
        front = jnp.zeros_like(tokens).at[0, : inside.size].set(tokens[row, inside])
        alone = run(params, front, layer, segment_ids=jnp.zeros_like(ids).at[0, : inside.size].set(1), backend=backend)
        np.testing.assert_allclose(whole[row, inside], alone[0, : inside.size], atol=2e-4)
        changed = tokens.at[row, inside].set((tokens[row, inside] + 1) % CONFIG.vocab_size)
        other = run(params, changed, layer, segment_ids=ids, backend=backend)
        outside = np.setdiff1d(np.arange(tokens.shape[1]), inside)
        np.testing.assert_array_equal(whole[row, outside], other[row, outside])
        assert np.abs(whole[row, inside] - other[row, inside]).max() > 1e-2


@pytest.mark.parametrize("name", ["sequential", "shared"])
def test_one_document_with_segment_ids_is_the_row_without(name):
    layer, tokens = LAYERS[name], make_tokens()
    params = make_params(layer)
    packed_row = run(params, tokens, layer, segment_ids=jnp.full(tokens.shape, 7))
    np.testing.assert_allclose(packed_row, run(params, tokens, layer), atol=2e-4)


def test_padding_is_never_routed_and_counts_in_nothing():
    layer, ids = LAYERS["shared"], packed()
    _, routing = cases.hidden(make_params(layer), make_tokens(), CONFIG, layer, segment_ids=ids, train=True)
    assert not bool((routing.decisions & (ids == 0)).any())
