"""Token by token over a cache is the whole sequence at once: every wiring, forced and learned decisions, the edges."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.errors import UserError
from l2a_jax.inference import generate as generate_module
from l2a_jax.inference.generate import bucket, generate, request, unpad
from l2a_jax.nn import routing
from tests.inference.cases import QUICK, sequences_of, whole
from tests.models.cases import CONFIG, LAYERS, UNTIED, make_params, make_tokens

NEW = 16
ROW = np.asarray(make_tokens(3, 30, seed=4))
PROMPTS = [ROW[0, :29].tolist(), ROW[1, :1].tolist(), ROW[2, :12].tolist()]  # several windows; a single token
EPSILON = 1e-3  # learned decisions closer to the threshold than this are not compared


def _pruned(name, *layers):
    return dataclasses.replace(LAYERS[name], pruned_layers=layers)


# A pruned wiring has layers of both kinds. Each with learned decisions, or with forced ones; the reference backend
# compiles fastest, and what the others make of a step is tests/attention's.
WIRINGS = {
    "plain": (None, False, "xla"),
    "sequential sinks, pruned": (_pruned("sequential sinks", 1), False, "reference"),
    "parallel, pruned": (_pruned("parallel", 2), False, "xla"),
    "parallel post_local, a window beyond the cache": (
        dataclasses.replace(LAYERS["parallel post_local"], window=100, sinks=0), True, "reference"),
    "shared": (LAYERS["shared"], False, "xla"),
    "shared, pruned, a router that sees more": (
        dataclasses.replace(_pruned("shared", 1), router_sees=("position", "lse", "sink"), router_hidden=2), False,
        "reference"),
    "shared, pruned": (_pruned("shared", 0), True, "reference"),
    "shared post_local, pruned": (_pruned("shared post_local", 1), False, "reference"),
}


@pytest.fixture(autouse=True, scope="module")
def quick():
    """The same jitted function, compiled in half the time; float32 products exact on a GPU too."""
    whole = generate_module._generate
    generate_module._generate = jax.jit(whole.__wrapped__, static_argnames=("options", "room"), compiler_options=QUICK)
    with jax.default_matmul_precision("highest"):
        yield
    generate_module._generate = whole


def check(generation, prompts, layer, params, decisions=None, config=CONFIG):
    """Every chosen token, its log-probability and the decisions are those of the whole sequences."""
    sequences = sequences_of(prompts, generation)
    scores, routed = whole(params, sequences, layer, decisions, config)
    for row, (prompt, sequence) in enumerate(zip(prompts, sequences, strict=True)):
        first, last = len(prompt), len(sequence)
        mine = scores[row, first - 1 : last - 1]
        np.testing.assert_array_equal(generation.tokens[row, : last - first], jnp.argmax(mine, axis=-1))
        np.testing.assert_allclose(generation.log_probabilities[row, : last - first], mine.max(-1), atol=2e-5)
        if layer is not None:
            clear = np.ones((config.num_layers, last - 1), bool)
            if decisions is None:
                clear = np.abs(np.asarray(routed.logits[:, row, : last - 1])) > EPSILON
                assert clear.mean() > 0.9
            np.testing.assert_array_equal(np.asarray(generation.decisions[:, row, : last - 1])[clear],
                                          np.asarray(routed.decisions[:, row, : last - 1])[clear])
            assert not np.asarray(generation.decisions[:, row, last:]).any()


@pytest.mark.parametrize("name", WIRINGS)
def test_steps_are_the_whole_sequence(name):
    layer, forced, backend = WIRINGS[name]
    config = UNTIED if layer is None else CONFIG
    params = make_params(layer, config)
    decisions = routing.random(jax.random.key(9), [0.3, 0.5, 1.0], 3, 29 + NEW) if forced else None
    out = generate(params, config, layer, PROMPTS, max_new_tokens=NEW, decisions=decisions, backend=backend)
    assert out.lengths.tolist() == [NEW] * 3 and bool(out.finite.all()) and not bool(out.stopped.any())
    if layer is None:
        assert out.decisions is None
    else:
        assert out.decisions.shape == (CONFIG.num_layers, 3, 29 + NEW)
        assert not np.asarray(out.decisions)[list(layer.pruned_layers)].any()
    check(out, PROMPTS, layer, params, decisions, config)


@pytest.mark.parametrize("name", ["shared, pruned", "sequential sinks, pruned"])
def test_the_router_decides_after_a_prompt_of_forced_decisions(name):
    """Step by step: one full pass over the growing row, forced where the prompt stands, the router's own after it."""
    layer = WIRINGS[name][0]
    params = make_params(layer)
    given = np.array(routing.random(jax.random.key(9), [0.3, 0.5, 1.0], 3, 29))
    out = generate(params, CONFIG, layer, PROMPTS, max_new_tokens=6, room=NEW, decisions=given, backend="reference")
    assert out.tokens.shape == (3, 6) and out.decisions.shape == (CONFIG.num_layers, 3, 29 + 6)
    rows = [list(prompt) for prompt in PROMPTS]
    fixed = np.zeros((CONFIG.num_layers, 3, 29 + 6), bool)
    fixed[:, :, :29] = given
    able = np.isin(np.arange(CONFIG.num_layers), layer.pruned_layers, invert=True)[:, None]
    for step in range(6):
        for row, prompt in enumerate(PROMPTS):  # what stands at the row's newest place is the router's own choice
            fixed[:, row, len(prompt) + step :] = False
        scores, routed = whole(params, rows, layer, fixed)
        place = np.array([len(row) - 1 for row in rows])
        if step:
            # What a layer's router sees of the newest token depends on its decisions in the layers below: bottom up.
            for index in range(CONFIG.num_layers):
                logits = np.asarray(routed.logits)[index, np.arange(3), place]
                assert (np.abs(logits) > EPSILON).all()
                fixed[index, np.arange(3), place] = logits >= 0
                scores, routed = whole(params, rows, layer, fixed)
            np.testing.assert_array_equal(np.asarray(out.decisions)[:, np.arange(3), place],
                                          fixed[:, np.arange(3), place] & able)
        best = np.asarray(scores)[np.arange(3), place]
        np.testing.assert_array_equal(out.tokens[:, step], best.argmax(-1))
        np.testing.assert_allclose(out.log_probabilities[:, step], best.max(-1), atol=2e-5)
        for row, token in zip(rows, best.argmax(-1).tolist(), strict=True):
            row.append(token)
    for row, prompt in enumerate(PROMPTS):
        np.testing.assert_array_equal(np.asarray(out.decisions)[:, row, : len(prompt)],
                                      given[:, row, : len(prompt)] & able)


@pytest.mark.parametrize("name", ["shared, pruned", "sequential sinks, pruned"])
def test_the_end_of_a_prompt_and_what_is_written_are_routed(name):
    """As under the router's own decisions with these places set; in rows of other lengths at other places."""
    layer = WIRINGS[name][0]
    params = make_params(layer)
    own = np.asarray(whole(params, PROMPTS, layer)[1].decisions)[:, :, :29]
    real = np.arange(29) < np.array([[29], [1], [12]])
    for last in (0, 5):
        given = np.ones((CONFIG.num_layers, 3, 29 + 6), bool)
        for row, prompt in enumerate(PROMPTS):
            context = max(0, len(prompt) - last)
            given[:, row, :context] = own[:, row, :context]
        assert not given[:, :, :29][:, real].all()
        one, other = (generate(params, CONFIG, layer, PROMPTS, max_new_tokens=6, room=NEW, backend="reference", **how)
                      for how in ({"route_last": last}, {"decisions": given}))
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.decisions, other.decisions)
        np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=2e-5)
    free = generate(params, CONFIG, layer, PROMPTS, max_new_tokens=6, room=NEW, backend="reference")
    assert (free.log_probabilities != one.log_probabilities).any()


@pytest.mark.parametrize("name", ["shared, pruned", "sequential sinks, pruned"])
def test_a_cut_is_a_threshold_for_prompts_and_what_is_written(name):
    layer = WIRINGS[name][0]
    params, moved = make_params(layer), dataclasses.replace(layer, threshold=0.999)
    cut = np.full(CONFIG.num_layers, routing.least(moved.temperature, moved.threshold), np.float32)
    one, other, free = (generate(params, CONFIG, of, PROMPTS, max_new_tokens=6, room=NEW, backend="reference", cut=at)
                        for of, at in ((layer, cut), (moved, None), (layer, None)))
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.decisions, other.decisions)
    assert one.decisions.sum() < free.decisions.sum()
    with pytest.raises(ValueError, match="of a routed model"):
        generate(params, CONFIG, layer, PROMPTS, max_new_tokens=1, cut=cut[1:])


def test_a_row_alone_left_or_right_padded_gives_the_same():
    layer, params = LAYERS["shared"], make_params(LAYERS["shared"])
    together = generate(params, CONFIG, layer, PROMPTS, max_new_tokens=NEW, backend="xla")
    mask = np.arange(29) < np.array([[29], [1], [12]])
    right = np.zeros((3, 29), int)
    for row, prompt in zip(right, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    left = np.stack([np.roll(row, 29 - len(prompt)) for row, prompt in zip(right, PROMPTS, strict=True)])
    assert unpad(right, mask) == unpad(left, mask[:, ::-1]) == PROMPTS
    for row, prompt in enumerate(PROMPTS[1:], 1):
        alone = generate(params, CONFIG, layer, [prompt], max_new_tokens=NEW, backend="xla")
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        np.testing.assert_allclose(alone.log_probabilities[0], together.log_probabilities[row], atol=2e-5)
        np.testing.assert_array_equal(alone.decisions[:, 0], together.decisions[:, row, : len(prompt) + NEW])


def test_rows_stop_at_their_stop_token_and_the_others_go_on():
    params = make_params(None, UNTIED)
    free = generate(params, UNTIED, None, PROMPTS, max_new_tokens=NEW, backend="xla")
    tokens = np.asarray(free.tokens)
    stops = [int(tokens[1, 3]), 60]
    at = [next((i for i, token in enumerate(row) if token in stops), NEW) for row in tokens]
    assert min(at) < NEW and max(at) > min(at)
    out = generate(params, UNTIED, None, PROMPTS, max_new_tokens=NEW, stop_tokens=stops, backend="xla")
    assert out.lengths.tolist() == at and out.stopped.tolist() == [place < NEW for place in at]
    for row, place in enumerate(at):
        np.testing.assert_array_equal(out.tokens[row, : place + 1], tokens[row, : place + 1])
        assert not np.asarray(out.tokens[row, place + 1 :]).any()


@pytest.mark.gpu  # in interpret mode it passes too, but compiles for longer than all the rest
def test_the_kernel_inside_the_loop():
    """Its cache updated in place, step after step; a pruned layer beside others, and a batch that is not all done."""
    layer, config = _pruned("shared", 1), dataclasses.replace(CONFIG, head_dim=16, num_layers=2)
    params = make_params(layer, config)
    decisions = routing.random(jax.random.key(9), [0.5, 0.5], 2, 12 + 5)
    out = generate(params, config, layer, PROMPTS[1:], max_new_tokens=5, decisions=decisions, backend="pallas")
    check(out, PROMPTS[1:], layer, params, decisions, config)


@pytest.mark.parametrize(("prompts", "options", "message"), [
    ([], {}, "no prompt"), ([[1], []], {}, "prompt 1 is empty"), ([[61]], {}, "outside the vocabulary"),
    ([[1] * 120], {}, "longer than max_positions"), ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
    ([[1]], {"temperature": -1.0}, "temperature is -1"), ([[1]], {"temperature": 0.5}, "give a key"),
    ([[1]], {"temperature": float("nan")}, "temperature is nan"), ([[1]], {"top_p": 0.0}, "top_p is 0"),
    ([[1]], {"route_last": -1}, "route_last is -1"),
    ([[1]], {"route_last": 4}, "^route_last is 4, but the model is plain")])
def test_bad_requests_are_refused_by_name(prompts, options, message):
    with pytest.raises(UserError, match=message):
        generate(make_params(None), CONFIG, None, prompts, **{"max_new_tokens": NEW, **options})


def test_what_does_not_fit_the_model_is_refused():
    params = make_params(None)
    with pytest.raises(ValueError, match="does not fit the parameters"):
        generate(params, CONFIG, LAYERS["shared"], [[1]], max_new_tokens=1)
    with pytest.raises(ValueError, match="of a routed model"):
        generate(params, CONFIG, None, [[1]], max_new_tokens=1, decisions=np.ones((3, 1, 2), bool))
    with pytest.raises(ValueError, match="expected at least max_new_tokens"):
        generate(params, CONFIG, None, [[1]], max_new_tokens=2, room=1)
    with pytest.raises(NotImplementedError, match="cuDNN"):
        generate(params, CONFIG, None, [[1]], max_new_tokens=2, backend="cudnn")


def test_weights_that_are_not_finite_are_reported():
    params = make_params(None, UNTIED)
    params["norm_final"]["scale"] = params["norm_final"]["scale"].at[3].set(jnp.nan)
    assert not bool(generate(params, UNTIED, None, PROMPTS, max_new_tokens=NEW, backend="xla").finite.any())


def test_few_shapes_serve_all_lengths():
    assert [bucket(size, 32) for size in (1, 32, 33, 48, 49, 64, 65, 97, 131_072)] == [
        32, 32, 48, 48, 64, 64, 96, 128, 131_072]
    shapes = {request(dataclasses.replace(CONFIG, max_positions=4_096), None, [[1] * size], max_new_tokens=10)[0].shape
              for size in range(1, 4_000, 61)}
    assert len(shapes) <= 15
    # The longest prompt that the model takes is not padded beyond it.
    assert request(CONFIG, None, [[1] * 128], max_new_tokens=1)[0].shape == (1, 128)
