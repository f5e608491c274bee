"""The arms of the suite and the ways their weights are deployed, by name, so that experiments share them."""

from __future__ import annotations

import dataclasses

from l2a_jax.research.absorption.definitions import DENSE, HARD, SOFT_GATE, Arm, Attention, TransformerConfig

ORACLE = Attention(select="oracle")
RANDOM = Attention(select="random")
WINDOW = Attention(select="window")
SELECTOR = Attention(select="selector")
SOFT_USED = Attention("multiplicative", "used")

dense = Arm("dense")
soft_learned = Arm("soft_learned", SOFT_GATE)
soft_random = Arm("soft_random", SOFT_GATE, gate_trained=False)
soft_constant = Arm("soft_constant", SOFT_GATE, gate_std=0.0, gate_trained=False)
additive_learned = Arm("additive_learned", Attention("additive"))
additive_random = Arm("additive_random", Attention("additive"), gate_trained=False)
hard_before = Arm("hard_before", HARD._replace(convention="before"))
hard_after = Arm("hard_after", HARD)
straight_through = Arm("straight_through", HARD._replace(straight_through=True))
oracle_trained = Arm("oracle_trained", ORACLE)
stochastic = Arm("stochastic", RANDOM._replace(convention="before"))
closed_learned = Arm("closed_learned", Attention("multiplicative", "gate", hard_rows=0.5))
closed_random = dataclasses.replace(closed_learned, name="closed_random", gate_trained=False)
indexer = Arm("indexer", HARD._replace(indexer=True))


def soft_random_large(config: TransformerConfig) -> Arm:
    """Frozen random at deviation 1 / sqrt(D): sd(G) = 1, a gate that is no constant."""
    return Arm("soft_random_large", SOFT_GATE, gate_std=config.width**-0.5, gate_trained=False)


def pair(name: str, **fields) -> tuple[Arm, Arm]:
    """A learned and a frozen random soft gate that differ from the standard ones in `fields`."""
    return (dataclasses.replace(soft_learned, name=f"{name}_learned", **fields),
            dataclasses.replace(soft_random, name=f"{name}_random", **fields))


def sweep() -> dict[tuple[float, float], tuple[Arm, Arm]]:
    """(learned, frozen random) by the rates of the model and of the gate; a frozen gate has none."""
    def paced(arm: Arm, rate: float, gate: float) -> Arm:
        standard = rate == gate == 1
        return arm if standard else dataclasses.replace(arm, name=f"{arm.name}_{rate:g}_{gate:g}", rate=rate,
                                                        gate_rate=gate)

    return {(rate, gate): (paced(soft_learned, rate, gate), paced(soft_random, rate, 1.0))
            for rate in (0.3, 1.0, 3.0) for gate in (0.1, 1.0, 10.0)}


def experts() -> tuple[Arm, Arm, Arm]:
    """The same model with its feed-forward layers divided among experts: learned, frozen random and hash routing."""
    return tuple(Arm(f"experts_{kind}", DENSE, routing=kind) for kind in ("learned", "random", "hash"))


def native(arm: Arm) -> Attention:
    """How an arm's weights are used as trained: a closed-loop arm in its soft form, masks drawn anew."""
    if arm.attention.hard_rows < 1:
        return Attention(arm.attention.soft)
    return arm.attention._replace(straight_through=False, indexer=False)
