"""The study's flags at the ends of their ranges, and those that change nothing."""

from __future__ import annotations

import jax
import pytest

from train.study import main

BAD = [
    (["--limit", "0"], "--limit is 0; expected at least 1"), (["--limit", "-3"], "--limit is -3"),
    (["--limit", str(2**31)], "--limit is 2147483648"), (["--time-limit", "nan"], "--time-limit is nan"),
    (["--time-limit", "-1"], "--time-limit is -1.0"), (["--time-limit", "inf"], "--time-limit is inf"),
    (["--compile-ahead", "-1"], "--compile-ahead is -1; expected between 0 and 256"),
    (["--compile-ahead", "100000"], "--compile-ahead is 100000"),
    (["--backend", "flash"], "--backend is 'flash'; expected one of auto, reference, xla"),
    (["--out", ""], "--out is empty; expected a path"), (["--data-dir", " "], "--data-dir is empty"),
    *([] if jax.default_backend() == "gpu" else [
        (["--backend", name], f"--backend {name} cannot be used on this machine") for name in ("pallas", "cudnn")]),
]


@pytest.mark.parametrize(("flags", "said"), BAD, ids=str)
def test_flags_are_refused_by_name_before_anything_is_opened(flags, said, capsys):
    assert main(["--group", "main", *flags]) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_what_listing_does_not_use_is_said(caplog, capsys):
    with caplog.at_level("WARNING", "l2a_jax"):
        assert main(["--group", "collapse", "--list", "--keep", "--compile-ahead", "1"]) == 0
    assert sorted(line.split()[0] for line in caplog.messages) == ["--compile-ahead", "--keep"]
