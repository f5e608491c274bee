"""The checker behind jaxtyping's import hook: beartype, with an int accepted where a float is wanted (PEP 484)."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
