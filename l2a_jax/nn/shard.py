"""What one device holds of a call, and what it asks of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from l2a_jax.attention.reference import segment_starts


class Shard:
    """A device alone: every token, and all of every weight. Who deals a call over several overrides what differs
    (`sharding.dealt`)."""

    def ends(self, params: Any) -> Any:
        """A tree of parameters, of which this device holds a part, with all that is outside the layers whole."""
        return params

    def gathered(self, layer: Any) -> Any:
        """The leaves of one layer, whole."""
        return layer

    def tokens(self, x: Shaped[Array, "*A B T"]) -> Shaped[Array, "*A B t"]:
        """This device's tokens of whole rows."""
        return x

    def joined(self, x: Shaped[Array, "*A B t"]) -> Shaped[Array, "*A B T"]:
        """Whole rows again, in true order."""
        return x

    def chosen(self, x: Shaped[Array, "B t D"], picks: Int[Array, "B M"]) -> Shaped[Array, "B M D"]:
        """The tokens of each row whose numbers are `picks`, on whichever device they are."""
        return jnp.take_along_axis(x, picks[:, :, None], axis=1)

    def spread(self, x: Shaped[Array, "B t D"], picks: Int[Array, " M"]) -> Shaped[Array, " m D"]:
        """This device's part of the tokens `picks` (row x T + token, over all rows of the call): as many for each
        device, wherever they are."""
        return x.reshape(-1, x.shape[-1])[picks]

    def positions(self, segment_ids: Int[Array, "B T"] | None, shape: tuple[int, int]) -> Int[Array, "B T"]:
        """0..T-1 of this device's tokens, restarting with every document."""
        index = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
        return index if segment_ids is None else index - segment_starts(segment_ids, shape)

    def attention(self, plain: Any) -> Any:
        """What the layers call (`models.layer.Attention`) for this device's tokens, from that for whole rows."""
        return plain

    def drawn(self, draw: Callable[[tuple[int, ...]], Array], shape: tuple[int, ...]) -> Shaped[Array, "*A B T"]:
        """This device's part ([..., B, T] of `shape`) of what `draw` makes at random for all tokens of a call: what is
        drawn for a token does not depend on which device holds it."""
        return draw(shape)

    def imbalance(self, decisions: Bool[Array, "L B t"]) -> Float[Array, ""] | None:
        """This device's part of a sum over all, which says how unevenly routed rows lie on them
        (`sharding.attention.routed_imbalance`); None where there are no others."""
        return None

    def total(self, found: Any) -> Any:
        """The sum over all devices of what each found of its tokens."""
        return found


ALONE = Shard()
