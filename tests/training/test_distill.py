"""Distillation from the everything-routed model: the divergence, its gradient, and the runs that have no teacher."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.errors import UserError
from l2a_jax.models.transformer import hidden_states, unembed
from l2a_jax.runs.plan import compile_run, make_plan
from l2a_jax.training import settings
from l2a_jax.training.distill import distillation, everything_routed
from l2a_jax.training.loss import cross_entropy
from l2a_jax.training.memory import checkpoint_policy
from tests import compiler
from tests.models.cases import CONFIG, LAYERS, UNTIED, make_params
from tests.training.test_step import OBJECTIVE, make_batch, set_up

LAYER = dataclasses.replace(LAYERS["shared"], temperature=5.0)  # so warm that no sigmoid saturates
SHAPE = (2, 13)


def drawn(config=CONFIG):
    """Parameters, student, teacher, targets, and the two weights of each token, some 0."""
    keys = jax.random.split(jax.random.key(0), 5)
    student, teacher = (jax.random.normal(key, (*SHAPE, config.hidden_size)) for key in keys[:2])
    targets = jax.random.randint(keys[2], SHAPE, 0, config.vocab_size)
    to_next, to_teacher = (jax.random.uniform(key, SHAPE).at[1, 9:].set(0.0) for key in keys[3:])
    return make_params(None, config), student, teacher, targets, to_next, to_teacher.at[1, 9].set(0.3)


def literal(params, student, teacher, targets, to_next, to_teacher, config):
    """Both losses written over full logits."""
    log_p, log_q = (jax.nn.log_softmax(unembed(params, x, config), axis=-1) for x in (student, teacher))
    nll = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    kl = jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)
    return jnp.sum(to_next * nll + to_teacher * kl), (nll, kl)


@pytest.mark.parametrize("config", [CONFIG, UNTIED])
@pytest.mark.parametrize("chunk", [1, 7, 26, 1000])
def test_values_and_gradient_are_those_of_full_logits(config, chunk):
    params, student, *rest = drawn(config)

    def ours(student):
        found = distillation(params, student, *rest, config, chunk)
        return 0.3 * found.loss, found[1:3]

    def theirs(student):
        loss, told = literal(params, student, *rest, config)
        return 0.3 * loss, told

    ((value, told), slope), ((wanted, expected), slopes) = (
        jax.jit(jax.value_and_grad(f, has_aux=True))(student) for f in (ours, theirs))
    assert value == pytest.approx(float(wanted), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), (told, slope), (expected, slopes))
    assert (told[1] > 0).all()


def test_without_divergence_it_is_next_token_loss_and_with_the_teacher_s_own_states_it_is_nothing():
    params, student, teacher, targets, weights, _ = drawn()
    found = distillation(params, student, teacher, targets, weights, jnp.zeros(SHAPE), CONFIG)
    plain = cross_entropy(params, student, targets, weights, CONFIG)
    assert float(found.loss) == pytest.approx(float(plain.nll), rel=1e-6)
    assert float(jnp.sum(weights * found.correct)) == pytest.approx(float(plain.correct))
    slope = jax.grad(lambda x: distillation(params, x, teacher, targets, 0 * weights, weights, CONFIG).loss)(teacher)
    assert np.abs(slope).max() < 1e-6


def test_no_full_logits_in_the_compiled_program():
    params, hidden, zeros = make_params(None), jnp.zeros((4, 512, CONFIG.hidden_size)), jnp.zeros((4, 512))

    def loss(student):
        return distillation(params, student, hidden, zeros.astype(jnp.int32), zeros + 1, zeros + 1, CONFIG, 64).loss

    memory = jax.jit(jax.grad(loss)).lower(hidden).compile(compiler.AS_USERS).memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 512 * CONFIG.vocab_size * 4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_is_right_in_the_training_dtype(dtype):
    """In bfloat16, with float16 logits, to what that dtype resolves, also where both nearly agree."""
    params, student, _, *rest = drawn()
    teacher = student + 0.05 * jax.random.normal(jax.random.key(8), student.shape)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    student, teacher = student.astype(dtype), teacher.astype(dtype)
    wide = [jax.tree.map(lambda x: x.astype(jnp.float32), x) for x in (params, student, teacher)]
    targets, _, weights = rest
    slope = jax.grad(lambda x: distillation(params, x, teacher, targets, 0 * weights, weights, CONFIG).loss)(student)
    want = jax.grad(lambda x: literal(wide[0], x, wide[2], targets, 0 * weights, weights, CONFIG)[0])(wide[1])
    error = jnp.linalg.norm(slope.astype(jnp.float32) - want) / jnp.linalg.norm(want)
    assert float(error) < (1e-4 if dtype == jnp.float32 else 0.05)


def test_the_teacher_is_the_model_with_everything_routed():
    params, batch = make_params(LAYER), jax.tree.map(lambda x: x[0], make_batch(1))
    forced = jnp.ones((CONFIG.num_layers, *batch.tokens.shape), bool)
    routed, _ = hidden_states(params, batch.tokens, CONFIG, LAYER, segment_ids=batch.segment_ids, decisions=forced)
    real = np.asarray(batch.segment_ids) != 0
    np.testing.assert_allclose(everything_routed(params, batch, CONFIG, LAYER)[real], routed[real], atol=2e-5)


@jax.jit
@jax.value_and_grad
def whole_loss(kernel, params, batch, part, penalty):
    """The objective of a step over all its micro-batches, from full logits, and its gradient for the router."""
    params = {**params, "layers": {**params["layers"], "router": {"kernel": kernel}}}
    forced = jnp.ones((CONFIG.num_layers, *batch.tokens.shape[1:]), bool)

    def one(micro):
        call = functools.partial(hidden_states, params, micro.tokens, CONFIG, LAYER, segment_ids=micro.segment_ids)
        (student, routed), (teacher, _) = call(train=True), call(decisions=forced)
        loss, (_, divergence) = literal(params, student, jax.lax.stop_gradient(teacher), micro.targets, micro.weights,
                                        jnp.zeros(micro.weights.shape), CONFIG)
        real = micro.segment_ids != 0
        divergences = jnp.sum(real * jnp.maximum(micro.weights, 1) * divergence)
        return loss, divergences, jnp.sum(jnp.where(real, routed.probabilities**2, 0.0))

    nll, kl, squares = (sums.sum() for sums in jax.lax.map(one, batch))
    real = (batch.segment_ids != 0).sum()
    return ((1 - part) * nll / batch.weights.sum() + part * kl / real
            + penalty * squares / (CONFIG.num_layers * real))


@pytest.mark.parametrize(("minimised", "part"), [("distill", 1.0), ("mixed", 0.3)])
@pytest.mark.parametrize(("unroll", "remat"), [(False, False), (True, checkpoint_policy("elementwise"))])
def test_a_step_takes_the_gradient_of_what_it_says(minimised, part, unroll, remat):
    """Three micro-batches of unequal token counts against one loss over all of them."""
    objective = OBJECTIVE._replace(l2a_config=LAYER, minimised=minimised, unroll=unroll, remat=remat)
    params, state, frozen, step = set_up("router_strict", objective, make_params(LAYER), distill_share=part)
    batch = make_batch(3)
    state = state._replace(step=jnp.asarray(1, jnp.int32))  # where the penalty has its full weight
    _, metrics = step(state, frozen, batch, jax.random.key(0))
    value, wanted = whole_loss(params["layers"]["router"]["kernel"], params, batch, part, 0.5)
    assert float(metrics["grad_norm"]) == pytest.approx(float(jnp.linalg.norm(wanted)), rel=1e-3)
    assert float(metrics["kl"]) > 0 and float(metrics["loss"]) > 0
    total = (1 - part) * metrics["loss"] + part * metrics["kl"] + 0.5 * metrics["penalty"]
    assert float(total) == pytest.approx(float(value), rel=1e-4)
    # What counts more in the loss counts as much more in the divergence.
    heavy = batch._replace(weights=jnp.where(batch.tokens % 3 == 0, 4.0, 1.0) * batch.weights)
    _, metrics = step(state, frozen, heavy, jax.random.key(0))
    _, wanted = whole_loss(params["layers"]["router"]["kernel"], params, heavy, part, 0.5)
    assert float(metrics["grad_norm"]) == pytest.approx(float(jnp.linalg.norm(wanted)), rel=1e-3)


def test_the_gradient_of_the_divergence_is_that_of_finite_differences():
    """Through the whole model with everything local, along a random change of its output kernels: a decision itself is
    a step, and what its gradient says is compared with full logits above."""
    params, batch = make_params(LAYER), jax.tree.map(lambda x: x[0], make_batch(1))
    forced = jnp.ones((CONFIG.num_layers, *batch.tokens.shape), bool)
    teacher, real = everything_routed(params, batch, CONFIG, LAYER), (batch.segment_ids != 0).astype(jnp.float32)
    kernel = params["layers"]["attention"]["o"]["kernel"]
    way = jax.random.normal(jax.random.key(5), kernel.shape) / kernel.size**0.5

    def moved(size):
        attention = {**params["layers"]["attention"], "o": {"kernel": kernel + size * way}}
        changed = {**params, "layers": {**params["layers"], "attention": attention}}
        hidden, _ = hidden_states(changed, batch.tokens, CONFIG, LAYER, segment_ids=batch.segment_ids,
                                  decisions=~forced)
        return distillation(params, hidden, teacher, batch.targets, 0 * real, real / real.sum(), CONFIG).loss

    found = float(jax.jit(jax.grad(moved))(0.0))
    moved = jax.jit(moved)
    assert found == pytest.approx(float(moved(0.05) - moved(-0.05)) / 0.1, rel=1e-2) and found != 0


@pytest.mark.parametrize(("regime", "given", "said"), [
    ("router_only", {}, "router_only changes the model too; expected --regime router_strict"),
    ("full_ft", {}, "full_ft changes the model too; expected --regime router_strict"),
    ("pretrain", {}, "pretrain has no router; expected --regime router_strict"),
    ("router_strict", {"topology": "sequential", "share_attention": False}, r"layer \(sequential\) .* expected --topo"),
    ("router_strict", {"share_attention": False}, "two attention sets.* expected --topology parallel and --share-att"),
])
def test_a_run_without_a_teacher_is_refused(regime, given, said):
    for objective in ("distill", "mixed"):
        with pytest.raises(UserError, match=f"--objective {objective} .*{said}"):
            make_plan(settings.resolve(regime, {"objective": objective, **given}))


def test_the_share_is_a_number_of_the_step_and_the_estimate_knows_the_teacher():
    needs = {}
    for objective in ("next-token", "mixed"):
        plan = make_plan(settings.resolve("router_strict", {"objective": objective, "distill_share": 0.25}))
        run = compile_run(plan)
        assert run.dials.distill_share == np.float32(0.25) and run.objective.minimised == objective
        needs[objective] = run.memory_bytes
    assert needs["mixed"] > needs["next-token"]
