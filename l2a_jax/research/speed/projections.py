"""Would it pay to skip the query and output projections of unrouted tokens? An upper bound, measured.

With separate attention sets the global path projects every token to a query and back, and uses one in five. The best
that skipping could do is to gather the routed rows, multiply those alone, and scatter them: measured here with the
number of rows known at compile time, which a real router does not offer.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from l2a_jax.config import MODELS
from l2a_jax.research.speed.timing import time_jax


def measure(model: str, tokens: int, rate: float) -> dict:
    """Milliseconds of both projections of one layer, forward and with the gradients of their inputs: every row
    ("all"), and only the routed rows with their gather and scatter ("routed")."""
    config = MODELS[model]
    width, inner = config.hidden_size, config.num_heads * config.head_dim
    count = int(tokens * rate)
    keys = jax.random.split(jax.random.key(0), 8)
    draw = lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16)  # noqa: E731
    w_q, w_o = draw(keys[0], width, inner) * width**-0.5, draw(keys[1], inner, width) * inner**-0.5
    rows = jnp.sort(jax.random.choice(keys[2], tokens, (count,), replace=False))
    sets = [(draw(key, tokens, width), draw(key, tokens, width)) for key in keys[3:6]]

    def every(x):
        return jnp.tanh(x @ w_q) @ w_o  # tanh stands for attention: something between the two products

    def routed(x):
        return jnp.zeros_like(x).at[rows].set(jnp.tanh(x[rows] @ w_q) @ w_o, unique_indices=True,
                                              indices_are_sorted=True)

    def with_gradient(function):
        def both(x, cotangent):
            out, pull = jax.vjp(function, x)
            return out, pull(cotangent)
        return both

    found = {"model": model, "tokens": tokens, "rate": rate}
    for name, function in (("all", every), ("routed", routed)):
        found[name] = [time_jax(lambda x, _, f=function: f(x), sets), time_jax(with_gradient(function), sets)]
    return found


def main() -> None:
    """Print the table for the models at hand."""
    print("| model | tokens | routed | all rows, fwd / fwd+bwd ms | routed rows | saved a layer |\n"
          "|---|---|---|---|---|---|")
    for model, tokens in (("qwen2.5-0.5b", 8_192), ("qwen2.5-0.5b", 32_768), ("qwen2.5-1.5b", 8_192)):
        row = measure(model, tokens, 0.2)
        saved = [one - other for one, other in zip(row["all"], row["routed"], strict=True)]
        print(f"| {model} | {tokens:,} | 20% | {row['all'][0]:.3f} / {row['all'][1]:.3f} | {row['routed'][0]:.3f} / "
              f"{row['routed'][1]:.3f} | {saved[0]:.3f} / {saved[1]:.3f} |", flush=True)
