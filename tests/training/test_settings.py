"""Settings of a run: every one at the ends of its range, before anything slow; and a run records what it uses."""

from __future__ import annotations

import dataclasses
import json
import logging
import math

import jax
import pytest

from l2a_jax.attention import api
from l2a_jax.config import L2AConfig, ModelConfig, RopeScaling, position_limit
from l2a_jax.errors import Unsupported, UserError
from l2a_jax.fields import declared, problem
from l2a_jax.runs.about import announce
from l2a_jax.runs.plan import dials_of, make_plan
from l2a_jax.training.loop import stacked_batch
from l2a_jax.training.presets import PRESETS
from l2a_jax.training.settings import Settings, idle, layer_of, resolve
from tests.training.test_bad_input import load_command

NUMBERS = [name for name, hint in declared(Settings).items() if (problem("", hint) or "")[:8] == "a number"]
REFUSED = [
    *((name, value) for name in sorted({*NUMBERS, "temperature", "threshold", "lr", "weight_decay", "penalty_ramp"})
      for value in (math.nan, math.inf, -1.0)),
    ("lr", 0.0), ("lr", 1e-39), ("router_lr", 0.0), ("router_lr", -1e-4), ("clip", 0.0), ("weight_decay", 1e39),
    ("threshold", 0.0), ("threshold", 1.0), ("threshold", 1 - 1e-9), ("temperature", 0.0), ("temperature", 1e39),
    ("echo", 1.5), ("ask", 1.5), ("unique", 0), ("flip", 1.01), ("warmup", 1.0001),
    *((name, value) for name in ("steps", "batch_size", "grad_accum", "save_every", "eval_every", "eval_batches",
                                 "window", "seq_len") for value in (0, -1, 2**31, 2**63)),
    ("sinks", -1), ("sinks", 10**12), ("window", 2**40), ("seq_len", 1), ("seed", -1), ("seed", 2**32), ("seed", 2**64),
    ("tokens", 0), ("tokens", 2**63), ("attention_layers", ()), ("attention_layers", (1, 1)),
    ("attention_layers", (-1,)), ("model", ""), ("data", ("",)), ("dtype", "float64"), ("master_dtype", "float16"),
    ("remat", "some"), ("packing", "none"), ("topology", ""), ("router_input", "post"), ("backend", "cuda"),
    *(("rope", text) for text in ("theta:inf", "theta:nan", "yarn:1e9", "linear:0.5", "theta:-2", "", "none:2",
                                  "yarn:1e400", "theta:x")),
]


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=str)
def test_numbers_at_the_ends_are_refused_by_the_flags_name(name, value):
    given = {"model": "m", "data": ("d",)} | {name: value}
    with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} is "):
        resolve("l2a_ft", given)


@pytest.mark.parametrize("given", [
    {"seed": 2**32 - 1}, {"threshold": 1e-6}, {"temperature": 1e-6}, {"clip": 1e30}, {"lr": 1e-30}, {"window": 2**30},
    {"sinks": 0}, {"steps": 2**31 - 1}, {"rope": "none"}, {"rope": "yarn:40"}, {"leakage": 0}, {"flip": 1},
    {"attention_layers": (0,)}, {"master_dtype": "bfloat16"}])
def test_numbers_within_the_ends_pass(given):
    resolve("l2a_ft", given)


def test_a_seed_beyond_32_bits_would_draw_what_another_draws():
    """Why seeds end there: JAX takes 32 bits of them."""
    assert (jax.random.key_data(jax.random.key(0)) == jax.random.key_data(jax.random.key(2**32))).all()


MODEL = ModelConfig(32, 16, 32, 2, 2, 1, 8)


@pytest.mark.parametrize(("make", "said"), [
    (lambda: dataclasses.replace(MODEL, max_positions=0), "max_positions is 0; expected at least 1"),
    (lambda: dataclasses.replace(MODEL, max_positions=2**31), "max_positions is 2147483648"),
    (lambda: dataclasses.replace(MODEL, vocab_size=2**40), "vocab_size is"),
    (lambda: dataclasses.replace(MODEL, rope_theta=math.inf), "rope_theta is inf; expected above 0, and finite"),
    (lambda: dataclasses.replace(MODEL, rms_norm_eps=-1e-6), "rms_norm_eps is -1e-06"),
    (lambda: RopeScaling("yarn", 1e9), "rope factor is 1000000000.0; expected between 1 and 10000"),
    (lambda: RopeScaling("yarn", 4.0, original_max_positions=0), "rope original_max_positions is 0"),
    (lambda: RopeScaling("yarn", 4.0, attention_factor=math.nan), "rope attention_factor is nan"),
    (lambda: RopeScaling("yarn", 4.0, beta_fast=math.inf), "rope beta_fast is inf"),
    (lambda: L2AConfig(temperature=math.inf), "temperature is inf"),
    (lambda: L2AConfig(leakage=math.nan), "leakage is nan; expected a probability"),
    (lambda: L2AConfig(pruned_layers=(-1,)), "pruned_layers is "),
    (lambda: L2AConfig(window=2**31), "window is 2147483648"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_what_no_model_or_layer_is(make, said):
    with pytest.raises(ValueError, match="^" + said.replace("(", r"\(")):
        make()


def test_the_longest_position_stays_an_int32():
    long = dataclasses.replace(MODEL, max_positions=2**30, rope=RopeScaling("linear", 10_000.0))
    assert position_limit(long) == 2**30


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="what a machine without a GPU says")
@pytest.mark.parametrize("backend", ("pallas", "cudnn"))
def test_a_backend_that_this_machine_lacks_is_refused_before_anything_is_read(backend, tmp_path, capsys):
    arguments = ["--regime", "l2a_ft", "--backend", backend, "--run-dir", str(tmp_path / "run")]
    assert load_command()(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: --backend {backend} cannot be used on this machine: ")
    with pytest.raises(Unsupported, match="NVIDIA GPU"):
        make_plan(resolve("l2a_ft", {"backend": backend, "model": "nowhere", "data": ("nothing",)}))
    for usable in ("auto", "reference", "xla", "pallas_interpret"):
        api.check(usable)


OWN = L2AConfig(window=12, sinks=2, topology="sequential", share_attention=False, flip=0.1,
                rope=RopeScaling("theta", 5.0))
PARALLEL = dataclasses.replace(OWN, topology="parallel", share_attention=True)


def plan_of(layer, given, named=()):
    """A plan that continues a run with this layer, on the demo's text."""
    settings = resolve("router_only", given, named)
    settings = dataclasses.replace(settings, model="RUN", data=(), echo=0.0, seq_len=512)
    config = dataclasses.replace(MODEL, max_positions=1_024)
    plan = make_plan(settings, read=lambda source: (config, layer, None))
    return plan


@pytest.mark.parametrize(("given", "named", "expected"), [
    ({}, (), {}), ({"window": 20}, (), {"window": 20}), ({"rope": "none"}, (), {"rope": RopeScaling()}),
    ({}, ("repair-far",), {"window": 1_024, "sinks": 4, "flip": 0.3, "leakage": 1.0, "rope": RopeScaling()}),
    ({"flip": 0.0}, ("repair-far",), {"window": 1_024, "sinks": 4, "flip": 0.0, "rope": RopeScaling()}),
    ({}, ("3b-24gb",), {})])
def test_a_run_from_a_routed_source_records_the_layer_that_it_uses(given, named, expected, monkeypatch):
    monkeypatch.setattr("l2a_jax.runs.plan.RecallCorpus", lambda *_, **__: type("Data", (), {"tokens_per_batch": 1})())
    plan = plan_of(PARALLEL, {**given, "data": ("x",), "model": "RUN"}, named)
    assert plan.l2a_config == dataclasses.replace(PARALLEL, **expected)
    assert layer_of(plan.settings) == plan.l2a_config
    # And once more from what was recorded, as `--resume` reads it.
    recorded = json.loads(json.dumps(dataclasses.asdict(plan.settings)))
    again = Settings(**{name: tuple(v) if isinstance(v, list) else v for name, v in recorded.items()})
    assert make_plan(again, read=lambda source: (plan.config, PARALLEL, None)).l2a_config == plan.l2a_config


def test_names_of_presets_stay():
    """Run folders name them."""
    assert {"paper", "repair", "repair-2025", "repair-far", "repair-target", "0.5b-24gb", "1.5b-24gb",
            "3b-24gb"} <= {*PRESETS}


def test_wiring_is_the_sources_and_who_asked_is_named():
    given = {"data": ("x",), "model": "RUN"}
    with pytest.raises(UserError, match=r"^--topology is parallel by --preset repair, but RUN was trained with seq"):
        plan_of(OWN, given, ("repair",))
    with pytest.raises(UserError, match=r"^--router-input is post_local, but RUN was trained with pre"):
        plan_of(OWN, {**given, "router_input": "post_local"})


def test_a_flag_may_repeat_the_sources_wiring(monkeypatch):
    monkeypatch.setattr("l2a_jax.runs.plan.RecallCorpus", lambda *_, **__: type("Data", (), {"tokens_per_batch": 1})())
    plan = plan_of(OWN, {"data": ("x",), "model": "RUN", "topology": "sequential"})
    assert plan.l2a_config == OWN


IDLE = [
    ("router_strict", {"weight_decay": 0.1}, ("weight_decay",)),
    ("router_only", {"weight_decay": 0.1, "master_dtype": "bfloat16"}, ("weight_decay",)),  # its first moments are
    ("l2a_ft", {"weight_decay": 0.1, "lr": 1e-4, "window": 8}, ()),
    ("baseline", {"window": 8, "lr": 1.0, "seq_len": 64}, ("window", "lr")),
    ("pretrain", {"router_lr": 1.0, "penalty": 1.0, "lr": 1.0, "flip": 0.1}, ("router_lr", "penalty", "flip")),
    ("router_strict", {"lr": 1.0}, ("lr",)), ("router_only", {"lr": 1.0}, ()),
    ("l2a_ft", {"packing": "concat"}, ("packing",)), ("l2a_ft", {"answer_weight": 8.0}, ()),
    ("l2a_ft", {"answer_weight": 8.0, "model": "m", "data": ("d",)}, ("answer_weight",)),
    ("pretrain", {"answer_weight": 8.0}, ("answer_weight",)),
    ("l2a_ft", {"packing": "concat", "model": "m", "data": ("d",)}, ()),
    ("l2a_ft", {"penalty": 0.0, "penalty_ramp": 0.1}, ("penalty_ramp",)),
]


@pytest.mark.parametrize(("regime", "given", "expected"), IDLE, ids=str)
def test_a_flag_without_effect_is_said(regime, given, expected, caplog):
    from l2a_jax import commands

    with caplog.at_level(logging.WARNING, "l2a_jax"):
        commands.say_idle(given, idle(resolve(regime, given)))
    assert [line.split()[0] for line in caplog.messages] == [f"--{name.replace('_', '-')}" for name in
                                                             given if name in expected]


def test_what_a_plain_model_does_not_read_of_a_preset_is_said(caplog):
    for names, said in (((), ""), (("repair-target",), "what --preset repair-target says of a layer")):
        caplog.clear()
        with caplog.at_level(logging.INFO, "l2a_jax"):
            announce(make_plan(resolve("norms_only", {"echo": 0.0, "seq_len": 128}, names)))
        assert said in caplog.text and (said or "layer:" not in caplog.text)


def test_the_rate_without_effect_has_none():
    """What the table says of `lr` in `router_strict`: the router has a rate of its own there."""
    plan = make_plan(resolve("router_strict", {"lr": 1.0}))
    assert float(dials_of(plan).router_lr) == pytest.approx(1e-2)


def test_deterministic_reaches_the_compiler(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    make_plan(resolve("router_strict", {"deterministic": True}))
    import os

    assert os.environ["XLA_FLAGS"].split() == ["--xla_gpu_deterministic_ops=true"]


def test_a_steps_batch_has_the_shapes_that_it_is_compiled_for():
    plan = make_plan(resolve("router_strict", {"grad_accum": 3, "batch_size": 2, "steps": 1}))
    one = plan.data.batch(0)
    assert stacked_batch(plan.data, 0, 3).tokens.shape == (3, *one.tokens.shape)


def test_errors_say_which_preset_asked():
    real = {"model": "qwen2.5-tiny", "data": ("x",)}

    def refused(regime, given, names=()):
        settings = resolve(regime, given, names)
        with pytest.raises(UserError) as error:
            make_plan(settings)
        return str(error.value)

    beyond = {"seq_len": 128, "target_local": 0.8}
    assert refused("router_strict", {**real, **beyond}).startswith(
        "--target-tokens beyond (by --preset repair) counts tokens with keys beyond --window 1024 and --sinks 4, and "
        "rows of 128 tokens have none; expected")
    assert refused("router_strict", {**beyond, "target_tokens": "beyond", "window": 124}).startswith(
        "--target-tokens beyond counts")
    named = {"curriculum": "64:0.5,128:0.5", "seq_len": 128}
    assert "rows of 128 tokens have none" in refused("router_strict", {**real, **named}, ("repair-target",))
    sequential = {**real, "topology": "sequential", "share_attention": False}
    assert refused("router_strict", sequential).startswith("--objective mixed (by --preset repair) takes the model")
    assert refused("router_strict", {**sequential, "objective": "mixed"}).startswith("--objective mixed takes the")
    assert refused("l2a_ft", real, ("repair",)).startswith("--objective mixed (by --preset repair) takes the model")
