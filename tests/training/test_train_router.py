"""`train_router`: somebody's own model and texts through the same run, and nothing but the router changed."""

import jax
import numpy as np
import pytest

import l2a_jax as l2a
from l2a_jax import device
from l2a_jax.errors import UserError
from l2a_jax.models.params import by_path
from l2a_jax.runs import router
from l2a_jax.training.run_files import read_run

TEXTS = [f"keep metal {kept} . the quiet river runs near the old bridge . tell metal {kept} ."
         for kept in ("copper", "iron", "nickel", "silver", "zinc", "lead", "tin", "steel")]
SMALL = {"tokens": "1K", "seq_len": 32, "batch_size": 4, "window": 4, "router_lr": 1e-2, "unroll": False}


@pytest.fixture(scope="module")
def own():
    model = l2a.load_pretrained("qwen2.5-tiny", "float32")
    config, params = model.config, jax.tree.map(lambda leaf: leaf + 1e-3, model.params)
    return l2a.Pretrained(config, None, params, model.tokenizer, "")


@pytest.fixture(scope="module")
def trained(own, tmp_path_factory):
    out = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("L2A_CACHE", str(out / "cache"))
        return out / "out", *l2a.train_router(own, TEXTS, out=out / "out", local=0.8, **SMALL)


def test_the_base_is_bit_for_bit_what_it_was_and_the_router_is_not(own, trained):
    _, model, _ = trained
    before, after = by_path(own.params), by_path(model.params)
    assert {*after} - {*before} == {"layers/router/kernel"} and np.any(after.pop("layers/router/kernel"))
    for path, leaf in after.items():
        assert leaf.dtype == before[path].dtype
        np.testing.assert_array_equal(leaf, before[path], err_msg=path)
    assert model.l2a_config.window == 4 and model.config == own.config


def test_it_is_a_run_like_any_other(trained):
    out, model, report = trained
    recorded = read_run(out / "run").settings
    assert (recorded.regime, recorded.target_local, recorded.tokens) == ("router_strict", 0.8, 1_000)
    assert report["target"]["asked"] == 0.8 and report["tokens_seen"] >= 1_000
    assert report["trained_parameters"] == model.config.num_layers * model.config.hidden_size
    again = l2a.load_pretrained(report["run_dir"], "float32")
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


@pytest.mark.parametrize(("changed", "said"), [
    ({"local": None}, "^expected either local .* or penalty"),
    ({"penalty": 0.3}, "^expected either local .* or penalty"),
    ({"texts": None}, "^expected either texts .* or data"),
    ({"data": ["a.txt"]}, "^expected either texts .* or data"),
    ({"texts": "one long string"}, "^texts and data are lists"),
    ({"texts": []}, "^texts is empty"),
    ({"windw": 4}, "^windw is no setting of train_router; expected one of .*window"),
    ({"regime": "full_ft"}, "^regime is no setting of train_router"),
    ({"local": 1.5}, "^--target-local is 1.5"),
    ({"preset": "no-such"}, "^--preset is 'no-such'"),
    ({"router_sees": ["no-such"]}, "^--router-sees is .*no-such.*; expected a list, each one of"),
])
def test_what_is_wrong_is_said_before_anything_runs(changed, said, own, tmp_path, monkeypatch):
    monkeypatch.setattr(router, "train", None)
    asked = {"texts": TEXTS, "local": 0.8, **SMALL, **changed}
    with pytest.raises(UserError, match=said):
        l2a.train_router(own, asked.pop("texts"), out=tmp_path / "out", **asked)


def test_a_model_needs_a_tokenizer_and_the_run_a_new_folder(own, tmp_path, monkeypatch):
    monkeypatch.setattr(router, "train", None)
    with pytest.raises(UserError, match=r"^source has no tokenizer"):
        l2a.train_router(own._replace(tokenizer=None), TEXTS, out=tmp_path / "out", local=0.8)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not empty; expected a new folder"):
        l2a.train_router(own, TEXTS, out=tmp_path, local=0.8)


def test_the_model_comes_back_in_what_it_was_trained_in(own, tmp_path, monkeypatch):
    monkeypatch.setattr(router, "train", lambda settings, run_dir: {})
    monkeypatch.setattr(router, "load_pretrained", lambda source, dtype: own._replace(source_hash=dtype.name))
    for given, name in (({}, device.default_dtype()), ({"dtype": "bfloat16"}, "bfloat16")):
        found, _ = l2a.train_router("qwen2.5-tiny", TEXTS, out=tmp_path / str(name), local=0.8, **SMALL, **given)
        assert found.source_hash == name
