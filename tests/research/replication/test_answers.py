"""Sentences of the report's first page, from facts made up for the rules that choose their words."""

from l2a_jax.research.replication import answers


def fact(**given):
    low, high = given.pop("ratio_95", (1.0, 1.0))
    return {"name": "row", "group": "main", "size": "0.5b", "regime": "l2a_ft", "data": "diverse", "settings": {},
            "perplexity_ratio": {"ratio": given.pop("ratio", 1.0), "ratio_95": [low, high]}, "needle": None,
            "non_finite": None, "verdict": "healthy", "tokens_per_trained_parameter": 0.1, "tokens_seen": 1_000_000,
            "sparsity": 0.9, "absorption": None, "audit": None, **given}


def found(share):
    return {"exact_match": share}


def test_what_a_run_without_a_fault_shows_is_not_the_faults():
    names = ("zero loss", "loops", "needle lost", "bad perplexity")
    rows = [{"fault": fault, "symptoms": {name: name in shown for name in names}, "settings": {"name": fault}}
            for fault, shown in (("none", ("needle lost",)), ("NaN", ("zero loss", "loops", "needle lost")),
                                 ("leak", ("zero loss", "bad perplexity")))]
    sentence, = answers._autopsy({"autopsy": {"rows": rows}})
    assert sentence == ("**Autopsy** (`autopsy`, 2 faults tried): 3 of the 4 reported symptoms at once, from NaN; "
                        "without a fault the run shows needle lost. Missing: bad perplexity, which comes from leak.")
    sentence, = answers._autopsy({"autopsy": {"rows": rows[:2]}})
    assert sentence.endswith("Missing: bad perplexity, which none of them gives.")


def test_a_collapse_counts_what_was_asked_and_keeps_mixtures_apart():
    rows = [fact(ratio=0.8, needle=found(0.2)), fact(ratio=1.2, needle=found(1.0), tokens_seen=4_000_000),
            fact(ratio=2.0, data="wikitext"), fact(ratio=9.0, settings={"lr": 3e-3}, verdict="constant output"),
            fact(ratio=5.0, regime="router_only")]
    sentence, = answers._collapse(rows)
    assert "3 of 3 runs stayed finite, trained on diverse at perplexity x0.80 to x1.20, trained on wiki" in sentence
    assert "1 of the 2 that were asked have lost the needle, all with at most 1M tokens." in sentence
    assert sentence.endswith("of all: `row` (constant output, x9).")


def test_noise_is_judged_by_intervals_and_names_both_sparsities():
    quiet = fact(group="noise", settings={"flip": 0.0}, ratio=0.98, ratio_95=(0.975, 0.985), sparsity=0.912)
    for low, high, said in ((0.96, 0.97, "helps training"), (0.99, 1.0, "damages training"), (0.98, 0.99, "changes")):
        noisy = fact(group="noise", settings={"flip": 0.3}, ratio=low, ratio_95=(low, high), sparsity=0.884)
        sentence, = answers._noise([noisy, quiet])
        assert said in sentence and "unrouted 91.2% and 88.4%" in sentence
    assert answers._noise([quiet]) == []


def test_absorption_is_half_of_what_was_carried_and_is_held_against_static_layers():
    for after, said in ((0.73, ": not absorbed, at least half is left."), (0.3, ": absorbed.")):
        row = fact(absorption={"before": {"carried": 0.72}, "after": {"carried": after}},
                   audit={"worse": {"static": 0.08, "none": 0.2}})
        sentence, = answers._absorption([row])
        assert said in sentence and sentence.endswith(" Beyond a static choice of layers it carries 0.40 after.")
