"""The command: text as it comes, shades, pruning, and what is refused; and pruning by itself."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from l2a_jax.config import MODELS, L2AConfig
from l2a_jax.data.counts import parse_layers
from l2a_jax.errors import UserError
from l2a_jax.inference import generate as module
from l2a_jax.inference import pruning, stream
from l2a_jax.inference.cache import cache_bytes, layout_of
from l2a_jax.inference.stream import Writer, prepare
from l2a_jax.sources import load_pretrained
from l2a_jax.weights import save_pretrained
from l2a_jax.weights.tokenizer import byte_level_bpe
from tests.inference.cases import QUICK

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "keep stone amber . keep tree maple . tell"


@pytest.fixture(autouse=True, scope="module")
def quick():
    """The same functions, compiled in half the time."""
    saved = stream._start, stream._advance, module._generate
    stream._start = jax.jit(stream.start, static_argnames=("options", "room"), compiler_options=QUICK)
    stream._advance = jax.jit(stream.advance, static_argnames=("options",), donate_argnums=1, compiler_options=QUICK)
    module._generate = jax.jit(module._generate.__wrapped__, static_argnames=("options", "room"),
                               compiler_options=QUICK)
    yield
    stream._start, stream._advance, module._generate = saved


@pytest.fixture(scope="module")
def command():
    spec = importlib.util.spec_from_file_location("generate_command", ROOT / "eval" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_a_stream_is_the_whole_generation_in_pieces():
    model = pruning.pruned(prepare("qwen2.5-tiny", window=16, sinks=2, dtype="float32"), (1,))
    ids = model.tokenizer.encode(PROMPT)
    options = {"max_new_tokens": 21, "temperature": 0.7, "top_p": 0.9, "key": jax.random.key(1), "backend": "xla"}
    pieces = list(stream.stream(model, ids, chunk=4, **options))
    whole = module.generate(model.params, model.config, model.l2a_config, [ids], **options)
    assert [token for piece in pieces for token, _ in piece] == whole.tokens[0].tolist()
    assert [len(piece) for piece in pieces] == [0, 4, 4, 4, 4, 5]
    # An untrained router routes everything, but in the pruned layer; nobody reads the last token.
    assert [routed for piece in pieces for _, routed in piece] == [model.config.num_layers - 1] * 20 + [None]


def test_the_command_prints_the_prompt_and_what_follows(command, capsys):
    arguments = ["qwen2.5-tiny", "--max-new-tokens", "12", "--dtype", "float32", "--backend", "xla", "--colour"]
    assert command([*arguments, "--prompt", PROMPT]) == 0
    out, err = capsys.readouterr()
    model = load_pretrained("qwen2.5-tiny", jnp.float32)
    ids, stop = model.tokenizer.encode(PROMPT), model.tokenizer.eos_token_id
    pieces = stream.stream(model, ids, max_new_tokens=12, stop_tokens=() if stop is None else (stop,), backend="xla")
    tokens = [token for piece in pieces for token, _ in piece]
    assert out == PROMPT + model.tokenizer.decode(ids + tokens)[len(model.tokenizer.decode(ids)) :] + "\n"
    assert f"{len(tokens)} tokens written" in err and "\033" not in out  # no terminal, no colour


@pytest.mark.parametrize(("arguments", "message"), [
    (["--prompt", ""], "prompt is empty"),
    (["--prompt-file", "/nowhere.txt"], "--prompt-file /nowhere.txt does not exist"),
    (["--prompt", "a", "--prune-layers", "1"], "--prune-layers: qwen2.5-tiny is plain, and only"),
    (["--prompt", "a", "--window", "0"], "window is 0"),
    (["--prompt", "a", "--window", "4", "--prune-layers", "3"], "layers [3] cannot be pruned"),
    (["--prompt", "a", "--window", "4", "--prune-layers", "one"], "'one' is no layer"),
    (["--prompt", "a", "--route-last", "8"], "--route-last is 8, but qwen2.5-tiny is plain: all"),
    (["--prompt", "a", "--top-p", "2"], "--top-p is 2"), (["--prompt", "a", "--max-new-tokens", "2000"], "longer than"),
    (["--prompt", "a", "--dtype", "int8"], "int8")])
def test_bad_arguments_end_with_one_line(command, capsys, arguments, message):
    assert command(["qwen2.5-tiny", "--dtype", "float32", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_characters_are_printed_whole_and_shaded_by_their_layers():
    letters = sorted(ByteLevel.alphabet())  # the visible bytes are themselves, the others come in order after them
    visible = [ord(letter) for letter in letters if ord(letter) < 256]
    ids = visible + sorted(set(range(256)) - set(visible))
    one_byte = byte_level_bpe(dict(zip(letters, ids, strict=True)), [], [], {}, normalise=False)
    text = "né → 😀"
    plain, shaded = io.StringIO(), io.StringIO()
    writers = [Writer(one_byte, plain, [65], None), Writer(one_byte, shaded, [65], 4)]
    for number, byte in enumerate(text.encode()):
        for writer in writers:
            writer.write(byte, number % 5)
            assert "\ufffd" not in writer.out.getvalue()
    for writer in writers:
        writer.close()
    assert plain.getvalue() == text + "\n" == re.sub(r"\033\[[\d;]*m", "", shaded.getvalue())
    assert shaded.getvalue().startswith("\033[38;5;250mn\033[0m") and "\033[38;5;208m \033" in shaded.getvalue()


def test_layers_above_the_threshold_are_pruned_and_stay_pruned_when_saved(tmp_path):
    assert pruning.prune_by_sparsity([0.5, 0.99, 1.0, 0.98], 0.98) == (1, 2)
    for bad in ([0.5, float("nan")], [1.2]):
        with pytest.raises(UserError, match="expected shares"):
            pruning.prune_by_sparsity(bad, 0.9)
    with pytest.raises(UserError, match="threshold is 1"):
        pruning.prune_by_sparsity([0.5], 1.5)
    model = pruning.pruned(pruning.pruned(prepare("qwen2.5-tiny", window=16, dtype="float32"), (2,)), (0,))
    assert model.l2a_config.pruned_layers == (0, 2)
    save_pretrained(tmp_path / "out", model.params, model.config, model.l2a_config, model.tokenizer)
    again = load_pretrained(tmp_path / "out", jnp.float32)
    assert again.l2a_config == model.l2a_config
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    with pytest.raises(UserError, match="has a routed layer of its own"):
        prepare(tmp_path / "out", window=4)


def test_ranges_of_layers():
    assert parse_layers("3, 5-8,5") == (3, 5, 6, 7, 8)
    for bad in ("", "3-1", "-1", "a-b"):
        with pytest.raises(UserError, match="--prune-layers"):
            parse_layers(bad)


def test_cache_bytes_count_what_is_kept():
    config, tokens = MODELS["qwen2.5-0.5b"], 32_768
    token = 2 * 2 * 64 * 2  # k and v, two heads, bfloat16
    assert cache_bytes(config, None, 3, tokens) == 3 * 24 * tokens * token
    shared, half = L2AConfig(window=256, sinks=4), tuple(range(12))
    assert cache_bytes(config, shared, 1, tokens) == 24 * tokens * token
    pruned = dataclasses.replace(shared, pruned_layers=half)
    assert cache_bytes(config, pruned, 1, tokens) == 12 * (tokens + 260) * token
    separate = dataclasses.replace(shared, share_attention=False, pruned_layers=half)
    assert cache_bytes(config, separate, 1, tokens) == (12 * tokens + 24 * 260) * token
    layout = layout_of(config, separate, tokens)
    assert layout.full[11:13] == (None, 0) and layout.ring == tuple(range(24)) and layout.ring_slots == 260
