"""The chunked cross-entropy against log-softmax over full logits: values and gradients, odd sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.models.transformer import unembed
from l2a_jax.nn.softmax_kernel import softmax_rows
from l2a_jax.research.speed.compiled import lower_for_cuda
from l2a_jax.training import loss
from l2a_jax.training.loss import cross_entropy, logits_dtype_of, token_nll
from tests import compiler
from tests.models.cases import CONFIG, UNTIED, make_params


def reference(params, hidden, targets, weights, config):
    log_p = jax.nn.log_softmax(unembed(params, hidden, config), axis=-1)
    return -jnp.sum(weights * jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0])


@pytest.mark.parametrize("config", [CONFIG, UNTIED])
@pytest.mark.parametrize("chunk", [1, 7, 26, 1000])
def test_values_and_gradients(config, chunk):
    params = make_params(None, config)
    hidden = jax.random.normal(jax.random.key(0), (2, 13, config.hidden_size))
    targets = jax.random.randint(jax.random.key(1), (2, 13), 0, config.vocab_size)
    weights = jax.random.uniform(jax.random.key(2), (2, 13)).at[1, 7:].set(0.0)

    def ours(params, hidden):
        return 0.3 * cross_entropy(params, hidden, targets, weights, config, chunk).nll

    def theirs(params, hidden):
        return 0.3 * reference(params, hidden, targets, weights, config)

    (value, gradients), (expected, slopes) = (jax.jit(jax.value_and_grad(f, (0, 1)))(params, hidden)
                                              for f in (ours, theirs))
    assert value == pytest.approx(float(expected), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradients, slopes)
    # A frozen head: the same gradient of hidden, through the path that makes no [V, D] gradient.
    np.testing.assert_allclose(jax.grad(ours, 1)(params, hidden), slopes[1], atol=2e-5)


def test_counts_and_per_token_losses():
    params = make_params(None)
    hidden = jax.random.normal(jax.random.key(0), (2, 13, CONFIG.hidden_size))
    logits = unembed(params, hidden, CONFIG)
    targets = jnp.where(jnp.arange(13) % 3 == 0, jnp.argmax(logits, axis=-1), 5)
    nll, correct = token_nll(params, hidden, targets, CONFIG, chunk=5)
    np.testing.assert_array_equal(correct, jnp.argmax(logits, axis=-1) == targets)
    assert float(nll.sum()) == pytest.approx(float(reference(params, hidden, targets, jnp.ones((2, 13)), CONFIG)))
    summed = cross_entropy(params, hidden, targets, jnp.ones((2, 13)), CONFIG, chunk=5)
    assert summed.correct == correct.sum()


def test_no_full_logits_in_the_compiled_program():
    """[B, T, V] float32 never exists: the largest buffer of the compiled gradient stays a chunk's."""
    config, params = CONFIG, make_params(None)
    hidden = jnp.zeros((4, 512, config.hidden_size))
    targets = jnp.zeros((4, 512), jnp.int32)
    step = jax.jit(jax.grad(lambda h: cross_entropy(params, h, targets, jnp.ones((4, 512)), config, 64).nll))
    temporary = step.lower(hidden).compile(compiler.AS_USERS).memory_analysis().temp_size_in_bytes
    full = 4 * 512 * config.vocab_size * 4
    assert temporary < full + 3 * hidden.nbytes
    assert f"f32[2048,{config.vocab_size}]" not in step.lower(hidden).compile(compiler.AS_USERS).as_text()


def softmax_case(rows, vocabulary, dtype):
    """Logits with a tie at the top, a row that is all ties, one that starts with -inf; targets and weights."""
    logits = jax.random.normal(jax.random.key(5), (rows, vocabulary)) * 4
    logits = logits.at[2].set(0.5).at[3, vocabulary // 2].set(logits[3].max()).at[4, 0].set(-jnp.inf)
    return (logits.astype(dtype), jax.random.randint(jax.random.key(6), (rows,), 0, vocabulary),
            jax.random.uniform(jax.random.key(7), (rows,)).at[1].set(0.0))


def check_softmax(kernel, rows, vocabulary, dtype, slopes_dtype):
    case = softmax_case(rows, vocabulary, dtype)
    *ours, slopes = jax.jit(lambda *case: kernel(*case, slopes_dtype))(*case)
    *plain, expected = loss._plain_softmax(*case, slopes_dtype)
    for one, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6)
    if slopes_dtype is None:
        assert slopes is None
        return
    assert slopes.dtype == slopes_dtype
    np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (slopes, expected)),
                               rtol=1e-2 if slopes_dtype == jnp.bfloat16 else 1e-5, atol=1e-7)
    broken = case[0].at[0, vocabulary - 1].set(jnp.nan), *case[1:]
    assert not np.isfinite(kernel(*broken, slopes_dtype)[2][0]), "a NaN must not pass"


@pytest.mark.parametrize("vocabulary", [50, 64, 1_000])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
@pytest.mark.parametrize("slopes_dtype", [None, jnp.bfloat16, jnp.float32])
def test_the_softmax_kernel_in_interpret_mode(vocabulary, dtype, slopes_dtype):
    check_softmax(functools.partial(softmax_rows, block=64, interpret=True), 7, vocabulary, dtype, slopes_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [50, 4_097, 151_936])
@pytest.mark.parametrize("dtype, slopes_dtype", [(jnp.float16, jnp.bfloat16), (jnp.float32, jnp.float32),
                                                 (jnp.float16, None)])
def test_the_softmax_kernel_compiled(vocabulary, dtype, slopes_dtype):
    check_softmax(softmax_rows, 301, vocabulary, dtype, slopes_dtype)


@pytest.mark.parametrize("vocabulary, dtype", [(151_936, jnp.float16), (151_936, jnp.float32), (257, jnp.float16)])
def test_the_softmax_kernel_lowers_for_cuda(vocabulary, dtype):
    shapes = (jax.ShapeDtypeStruct((512, vocabulary), dtype), jax.ShapeDtypeStruct((512,), jnp.int32),
              jax.ShapeDtypeStruct((512,), jnp.float32))
    for slopes_dtype in (None, jnp.bfloat16):
        run = functools.partial(softmax_rows, slopes_dtype=slopes_dtype)
        assert "l2a_softmax_rows" in lower_for_cuda(run, *shapes).as_text()


def test_the_softmax_kernel_refuses_more_than_it_can_count():
    shapes = (jax.ShapeDtypeStruct((20_000, 151_936), jnp.float16), jax.ShapeDtypeStruct((20_000,), jnp.int32),
              jax.ShapeDtypeStruct((20_000,), jnp.float32))
    with pytest.raises(ValueError, match="32 bits"):
        jax.eval_shape(softmax_rows, *shapes)


def test_float16_logits_are_the_float32_ones_to_eleven_bits():
    params = make_params(None)
    hidden = 6 * jax.random.normal(jax.random.key(0), (2, 13, CONFIG.hidden_size))
    targets = jax.random.randint(jax.random.key(1), (2, 13), 0, CONFIG.vocab_size)
    largest = float(jnp.abs(unembed(params, hidden, CONFIG)).max())
    assert largest > 16, "logits small enough would be exact in any format"

    def value(dtype):
        return jax.jit(jax.value_and_grad(
            lambda h: cross_entropy(params, h, targets, jnp.ones((2, 13)), CONFIG, 8, dtype).nll))

    assert jnp.dtype(logits_dtype_of(jnp.bfloat16)) == jnp.float16 and logits_dtype_of(jnp.float32) == jnp.float32
    (half, half_slope), (full, slope) = (value(dtype)(hidden) for dtype in (jnp.float16, jnp.float32))
    assert 0 < abs(float(half - full)) / 26 < largest * 2**-11
    assert np.abs(half_slope - slope).max() < 4 * largest * 2**-11 * np.abs(slope).max()
    assert not np.isfinite(value(jnp.float16)(hidden * 1e5)[0]), "beyond float16 the loss is not finite, never wrong"
