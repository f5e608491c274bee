"""Small pure functions: rotary embedding, normalisation and projections, and the routing decision."""
