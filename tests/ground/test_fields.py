"""Declared settings: types, ranges in float32, choices, and the sentence that names the field."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pytest

from l2a_jax.errors import UserError
from l2a_jax.fields import Choice, Distinct, Filled, above, at_least, between, check, count, flag


@dataclass(frozen=True)
class Example:
    steps: Annotated[int | None, count()] = None
    seed: Annotated[int, between(0, 2**63 - 1)] = 0
    rate: Annotated[float, above(0)] = 0.1
    decay: Annotated[float, at_least(0)] = 0.0
    share: Annotated[float, between(0, 1, "a share of the rows")] = 0.5
    kind: Annotated[str, Choice("one", "two")] = "one"
    fast: bool = False
    layers: tuple[Annotated[int, count(0)], ...] | None = None
    name: Annotated[str | None, Filled()] = None
    places: Annotated[tuple[int, ...] | None, Distinct()] = None


GOOD = [{}, {"steps": 2**31 - 1}, {"rate": 1}, {"rate": 3e38}, {"share": 0}, {"share": 1.0}, {"layers": ()},
        {"layers": (0, 3)}, {"rate": np.float32(0.5)}, {"seed": 2**63 - 1}]
BAD = {
    "below": ({"steps": 0}, "--steps is 0; expected at least 1"),
    "beyond an int32": ({"steps": 2**31}, "--steps is 2147483648; expected at least 1, at most 2,147,483,647"),
    "far beyond": ({"steps": 10**400}, "expected at least 1"),
    "no whole number": ({"steps": 1.5}, "--steps is 1.5; expected a whole number"),
    "a truth for a number": ({"steps": True}, "--steps is True; expected a whole number"),
    "negative": ({"seed": -1}, "--seed is -1; expected at least 0, at most 9,223,372"),
    "nan": ({"rate": math.nan}, "--rate is nan; expected above 0"),
    "inf": ({"decay": math.inf}, "--decay is inf; expected at least 0, and finite"),
    "inf in float32": ({"decay": 1e39}, "--decay is 1e+39; expected at least 0, in float32 too"),
    "0 in float32": ({"rate": 1e-39}, "--rate is 1e-39; expected above 0, in float32 too"),
    "nothing": ({"name": " "}, "--name is ' '; expected a text that is not empty"),
    "no entries": ({"places": ()}, "--places is (); expected a list that is not empty, each entry once"),
    "an entry twice": ({"places": (3, 3)}, "--places is (3, 3); expected a list that is not empty, each entry once"),
    "beyond a share": ({"share": 1.01}, "--share is 1.01; expected a share of the rows, between 0 and 1"),
    "no number": ({"rate": "0.1"}, "--rate is '0.1'; expected a number, above 0"),
    "unknown name": ({"kind": "three"}, "--kind is 'three'; expected one of one, two"),
    "no name": ({"kind": None}, "--kind is None; expected a text, one of one, two"),
    "no truth": ({"fast": 1}, "--fast is 1; expected true or false"),
    "an element": ({"layers": (1, -1)}, "--layers is (1, -1); expected a list, each at least 0"),
    "no list": ({"layers": 3}, "--layers is 3; expected a list"),
}


@pytest.mark.parametrize("given", GOOD)
def test_what_fits_passes(given):
    check(Example(**given))


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_named(name):
    given, said = BAD[name]
    with pytest.raises(UserError) as error:
        check(Example(**given))
    assert str(error.value).startswith(said) or said in str(error.value)


def test_a_file_names_its_key():
    with pytest.raises(UserError, match=r"config.json: settings.steps is 0; expected at least 1"):
        check(Example(steps=0), spell=lambda name: f"config.json: settings.{name}")
    assert flag("grad_accum") == "--grad-accum"
