import pytest

from l2a_jax.data.counts import format_count, parse_count
from l2a_jax.errors import UserError


@pytest.mark.parametrize(
    ("text", "count"),
    [("12M", 12_000_000), ("1.5k", 1500), ("2_048", 2048), ("12,000", 12_000), ("1e6", 10**6), ("1B", 10**9), (7, 7),
     ("9007199254740993", 9007199254740993), ("9223372036854775807", 2**63 - 1)],
)
def test_counts_as_people_write_them(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "M", "0", "-3", "1.5", "12 apples", "0.0001k", "nan", "inf", "1e400",
                                  "1e999999999", "1e20",
                                  "9" * 5_000, "\u0663", "12Mk"])
def test_anything_else_is_an_error_that_names_the_flag(text):
    with pytest.raises(UserError, match=r"--tokens is .*expected a whole number"):
        parse_count(text, "--tokens")


def test_counts_for_people():
    assert [format_count(n) for n in (999, 12_345_678, 1500, 999_499, 999_950)] == [
        "999", "12.3M", "1.5k", "999k", "1M"]


@pytest.mark.parametrize("text", ["1e999", "9" * 5_000, "1e400T", "9223372036854775808", "1e999999T", "1e" + "9" * 30,
                                  "1." + "3" * 5_000, "1e-3", "0.0", "inf"])
def test_counts_at_the_ends_are_refused_in_a_short_sentence(text):
    with pytest.raises(UserError, match=r"--tokens is .*expected a whole number above 0") as found:
        parse_count(text, "--tokens")
    assert len(str(found.value)) < 140


def test_long_counts_keep_their_last_digits():
    assert parse_count("9007199254740993") == 9_007_199_254_740_993 and parse_count(2**63 - 1) == 2**63 - 1
    assert parse_count("1.000000000000000001e18") == 10**18 + 1
