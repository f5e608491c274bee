"""Shapes of JSON values: what fits, and the sentence for what does not."""

import math

import pytest

from l2a_jax.errors import UserError
from l2a_jax.shapes import at_least, each, misfit, nullable, one_of, require, share, some

SHAPE = {"name": str, "tokens": at_least(1), "interval": [float, 2], "share?": share, "rows": each({"worse": float}),
         "bits?": some(one_of(0, 1)), "size": nullable(str), "text?": {"hash": str}}
GOOD = {"name": "a", "tokens": 3, "interval": [0, math.nan], "rows": {"x": {"worse": -1.5, "more": None}}, "size": None}


@pytest.mark.parametrize("change", [{}, {"share": 0.5}, {"share": None}, {"share": math.nan}, {"bits": [0, 1]},
                                    {"rows": {}}, {"size": "b"}, {"text": {"hash": "h", "unknown": 1}}])
def test_what_fits(change):
    require({**GOOD, **change}, SHAPE, "file")


@pytest.mark.parametrize(("change", "said"), [
    ({"name": None}, "name is null; expected a text"), ({"name": ...}, "name is missing; expected a text"),
    ({"tokens": 0}, "tokens is 0; expected a whole number, at least 1"),
    ({"tokens": True}, "tokens is True; expected a whole number, at least 1"),
    ({"tokens": "3"}, "tokens is '3'; expected a whole number, at least 1"),
    ({"tokens": math.nan}, "tokens is nan; expected a whole number, at least 1"),
    ({"interval": [1]}, "interval is a list of 1; expected a list of 2"),
    ({"interval": [1, "2"]}, "interval[1] is '2'; expected a number"),
    ({"interval": {}}, "interval is an object; expected a list of 2"),
    ({"share": 1.5}, "share is 1.5; expected a number from 0 to 1"),
    ({"rows": []}, "rows is a list; expected an object"),
    ({"rows": {"x": {}}}, "rows.x.worse is missing; expected a number"),
    ({"bits": []}, "bits is a list; expected a list of one or more entries, each one of 0, 1"),
    ({"bits": [1, True]}, "bits is a list; expected a list of one or more entries, each one of 0, 1"),
    ({"size": 5}, "size is 5; expected null, or a text"), ({"size": ...}, "size is missing; expected null, or a text"),
    ({"text": {"hash": "h" * 100}}, None), ({"text": "x" * 100}, f"text is '{'x' * 36}...; expected an object")])
def test_what_does_not_is_named(change, said):
    value = {name: entry for name, entry in {**GOOD, **change}.items() if entry is not ...}
    assert misfit(value, SHAPE) == said
    if said is not None:
        with pytest.raises(UserError, match=r"^some\.json: "):
            require(value, SHAPE, "some.json")


@pytest.mark.parametrize("value", [[], "text", None, 3])
def test_the_whole_file_may_be_the_wrong_kind(value):
    assert misfit(value, SHAPE).startswith("the file is ") and misfit(value, SHAPE).endswith("; expected an object")
