"""Packed, batched log-likelihoods against one forward pass a request with log-softmax over all logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.errors import UserError
from l2a_jax.evaluation import loglikelihood
from l2a_jax.evaluation.loglikelihood import Request
from l2a_jax.models.transformer import forward
from l2a_jax.sources import Pretrained
from tests.models.cases import CONFIG, LAYERS, make_params

reference_forward = jax.jit(forward, static_argnums=(2, 3))
LIMIT = CONFIG.max_positions
FIFTY = dataclasses.replace(CONFIG, vocab_size=50)


def log_likelihoods(model, requests, batch_tokens=LIMIT):
    """Rows of one length, one a batch: few shapes to compile."""
    return loglikelihood.log_likelihoods(model, requests, batch_tokens=batch_tokens)


def make_model(l2a_config=None):
    return Pretrained(CONFIG, l2a_config, make_params(l2a_config), None, "")


def make_requests(count=23, seed=0):
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(0, CONFIG.vocab_size, 40).tolist() for _ in range(count)]
    cuts = [(int(rng.integers(1, 30)), int(rng.integers(1, 10))) for _ in range(count)]
    return [Request(ids[:context], ids[context : context + rest]) for ids, (context, rest) in
            zip(tokens, cuts, strict=True)]


def reference(model, request):
    """The whole sequence alone in a row of the model's length (padding comes after it, so it is not seen)."""
    whole = [*request.context, *request.continuation][-(LIMIT + 1) :]
    row = np.zeros((1, LIMIT), np.int32)
    row[0, : len(whole) - 1] = whole[:-1]
    logits = reference_forward(model.params, jnp.asarray(row), CONFIG, model.l2a_config).logits[0]
    count = len(request.continuation)
    predicted = np.asarray(jax.nn.log_softmax(logits))[len(whole) - 1 - count : len(whole) - 1]
    return predicted[np.arange(count), request.continuation].sum(), (
        predicted.argmax(-1) == np.asarray(request.continuation)).all()


# Decisions within rounding of the threshold would differ between two computations; temperature 1 and weights this
# large leave none there.
@pytest.mark.parametrize("layer", [None, "shared", "sequential sinks"])
def test_equals_one_pass_a_request(layer):
    model = make_model(None if layer is None else LAYERS[layer])
    requests = make_requests()
    found = log_likelihoods(model, requests)
    expected = [reference(model, request) for request in requests]
    np.testing.assert_allclose(found.log_probabilities, [value for value, _ in expected], atol=2e-4)
    np.testing.assert_array_equal(found.greedy, [top for _, top in expected])
    assert not found.truncated.any()
    assert found.log_probabilities.std() > 1


def test_greedy_is_true_for_what_greedy_decoding_writes():
    model, request = make_model(), make_requests(1)[0]
    written = []
    for _ in range(3):
        scores = [log_likelihoods(model, [Request(request.context, [*written, token]) for token in
                                          range(CONFIG.vocab_size)])]
        best = int(np.argmax(scores[0].log_probabilities))
        assert np.flatnonzero(scores[0].greedy).tolist() == [best]
        written.append(best)


def test_the_same_in_any_batching_and_order(monkeypatch):
    model, requests = make_model(), make_requests()
    packed = log_likelihoods(model, requests).log_probabilities
    monkeypatch.setattr(loglikelihood, "ROW", 32)  # rows of 32 and 64, four and two in a batch
    monkeypatch.setattr(loglikelihood, "SMALLEST", 32)
    backwards = log_likelihoods(model, requests[::-1]).log_probabilities[::-1]
    np.testing.assert_allclose(backwards, packed, atol=2e-5)


def test_few_shapes_and_little_padding():
    rng = np.random.default_rng(0)
    requests = [Request(rng.integers(0, 50, n).tolist(), [1] * 20) for n in rng.integers(20, 180, 2_000)]
    batches = list(loglikelihood._batches(loglikelihood._table(requests, 32_768, FIFTY), 32_768))
    assert len({(batch.tokens.shape, batch.picks.shape) for batch in batches}) == 1
    real = sum(len(request.context) + 19 for request in requests)
    assert sum(int((batch.segment_ids > 0).sum()) for batch in batches) == real
    # all batches but the last are full of full rows
    assert all((batch.segment_ids > 0).mean() > 0.97 for batch in batches[:-1])
    assert sorted(np.concatenate([batch.requests for batch in batches]).tolist()) == list(range(2_000))


def test_a_row_for_each_long_request_has_no_segments():
    requests = [Request([token] * 3_000, [1, 2]) for token in range(3)]
    batches = list(loglikelihood._batches(loglikelihood._table(requests, 4_096, FIFTY), 1_024))
    assert [batch.tokens.shape for batch in batches] == [(1, 4_096)] * 3
    assert all(batch.segment_ids is None for batch in batches)


def test_answers_of_one_token_share_a_row():
    requests = [Request([1, 2, 3], [token]) for token in range(40)] + [Request([1, 2], [3, 4])]
    (batch,) = loglikelihood._batches(loglikelihood._table(requests, 4_096, FIFTY), 1_024)
    assert batch.work == 3 and batch.requests.size == 41


@pytest.mark.parametrize(("requests", "message"), [
    ([Request([1], [2]), Request([], [2])], "request 1 has an empty context"),
    ([Request([1], [2]), Request([1, 2], [])], "request 1 has an empty continuation"),
    ([Request([], [])], "request 0 has an empty context"), ([], "there is no request to score")])
def test_a_score_over_no_token_is_refused(requests, message):
    with pytest.raises(UserError, match=message):
        log_likelihoods(make_model(), requests)


def test_a_context_longer_than_the_model_is_cut_from_the_left():
    model = make_model()
    rng = np.random.default_rng(5)
    ids = rng.integers(0, CONFIG.vocab_size, LIMIT + 40).tolist()
    requests = [Request(ids[:-3], ids[-3:]), Request(ids[-LIMIT - 1 : -3], ids[-3:]), Request(ids[5:9], ids[9:12])]
    found = log_likelihoods(model, requests)
    assert found.truncated.tolist() == [True, False, False]
    assert found.log_probabilities[0] == pytest.approx(found.log_probabilities[1], abs=1e-5)
    assert found.log_probabilities[0] == pytest.approx(float(reference(model, requests[0])[0]), abs=2e-4)
    longer_only = log_likelihoods(model, [Request(ids[:3], ids[3 : LIMIT + 3])])  # the continuation fills the model
    assert longer_only.truncated.tolist() == [True]
    with pytest.raises(UserError, match=f"request 0 continues for {LIMIT + 1} tokens; .* end at {LIMIT}"):
        log_likelihoods(model, [Request([1], ids[: LIMIT + 1])])


def test_bad_tokens_and_weights_that_are_not_finite():
    model = make_model()
    with pytest.raises(UserError, match="outside the vocabulary"):
        log_likelihoods(model, [Request([1], [CONFIG.vocab_size])])
    scale = model.params["norm_final"]["scale"]
    broken = {**model.params, "norm_final": {"scale": scale * jnp.nan}}
    with pytest.raises(UserError, match=r"request 0 is nan.*not finite"):
        log_likelihoods(model._replace(params=broken), [Request([1], [2])])


def test_every_layer_pruned_sees_only_its_window():
    """Nothing routed: a change beyond all windows changes nothing; the same change does change the routed model."""
    layer = LAYERS["shared"]
    pruned = dataclasses.replace(layer, pruned_layers=tuple(range(CONFIG.num_layers)))
    params = make_params(layer)
    ids = np.random.default_rng(1).integers(0, CONFIG.vocab_size, 40).tolist()
    other = [*ids[:5], (ids[5] + 1) % CONFIG.vocab_size, *ids[6:]]  # behind the sinks, before every window's reach
    near, far = [], []
    for config, out in ((pruned, near), (layer, far)):
        silent = {"kernel": 0 * params["layers"]["router"]["kernel"]}  # which routes everything
        routed = {**params, "layers": {**params["layers"], "router": silent}}
        model = Pretrained(CONFIG, config, routed, None, "")
        out.append(log_likelihoods(model, [Request(one[:36], one[36:]) for one in (ids, other)]).log_probabilities)
    assert near[0][0] == pytest.approx(near[0][1], abs=1e-6)
    assert abs(far[0][0] - far[0][1]) > 1e-4
