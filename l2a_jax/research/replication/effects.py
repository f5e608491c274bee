"""Main effects of a designed experiment: least squares on factors, with intervals, partial sums of squares, pure error.

A factor's levels are compared with its first one (treatment coding): a coefficient is what moving to that level adds to
the response, all else equal. Intervals are Student's, on the residual degrees of freedom; where cells are repeated,
the residual is split into pure error (between repeats) and lack of fit (everything the model leaves out, interactions
above all). Terms are factors, or products of indicator columns named by the caller (`Interaction`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from l2a_jax.errors import UserError, needs

stats = needs("scipy.stats", "research", "an interval of the designed experiment")

Cell = Mapping[str, Any]
Factors = Mapping[str, Sequence[Any]]


class Interaction(NamedTuple):
    """One column: 1 where every named factor is at the named level, such as {"sinks": 0, "window": 256}."""

    name: str
    where: Mapping[str, Any]


class Design(NamedTuple):
    """X with a leading column of ones; `spans` says which columns belong to a term."""

    matrix: Float64[np.ndarray, "R P"]
    columns: tuple[tuple[str, Any], ...]
    spans: dict[str, tuple[int, ...]]


def design(cells: Sequence[Cell], factors: Factors, interactions: Sequence[Interaction] = ()) -> Design:
    """The matrix of the cells. UserError on a level that its factor does not have."""
    columns, parts, spans = [("mean", None)], [np.ones(len(cells))], {}
    for factor, levels in factors.items():
        for cell in cells:
            if cell[factor] not in levels:
                raise UserError(f"{factor} is {cell[factor]!r}; expected one of {', '.join(map(str, levels))}")
        spans[factor] = tuple(range(len(parts), len(parts) + len(levels) - 1))
        for level in levels[1:]:
            columns.append((factor, level))
            parts.append(np.array([float(cell[factor] == level) for cell in cells]))
    for term in interactions:
        spans[term.name] = (len(parts),)
        columns.append((term.name, True))
        parts.append(np.array([float(all(cell[f] == level for f, level in term.where.items())) for cell in cells]))
    return Design(np.stack(parts, axis=1), tuple(columns), spans)


def inflation(made: Design) -> dict[str, float]:
    """Generalised variance inflation of each term, GVIF^(1/df) (Fox and Monette, 1992): 1 where a term is orthogonal to
    all others; by how much the squared width of its intervals grows where it is not. inf where it cannot be told."""
    centred = made.matrix[:, 1:] - made.matrix[:, 1:].mean(axis=0)
    norms = np.linalg.norm(centred, axis=0)
    if (norms == 0).any():
        return {name: float("inf") for name in made.spans}
    correlation = (centred / norms).T @ (centred / norms)
    whole = np.linalg.det(correlation)
    out = {}
    for name, span in made.spans.items():
        mine = np.array(span) - 1
        rest = np.setdiff1d(np.arange(correlation.shape[0]), mine)
        product = np.linalg.det(correlation[np.ix_(mine, mine)]) * np.linalg.det(correlation[np.ix_(rest, rest)])
        out[name] = float((product / whole) ** (1 / len(mine))) if whole > 1e-12 else float("inf")
    return out


def fit(cells: Sequence[Cell], response: Sequence[float] | np.ndarray, factors: Factors,
        interactions: Sequence[Interaction] = ()) -> dict[str, Any]:
    """Effects of `response` in JSON types: per term its levels' differences from the first level with 95 % intervals,
    the partial sum of squares (what leaving the term out adds to the residual), its share and its F test.

    UserError where the design cannot tell the terms apart, no degree of freedom is left, or a response is not finite.
    """
    y = np.asarray(response, np.float64)
    if not np.isfinite(y).all():
        raise UserError(f"cell {int(np.flatnonzero(~np.isfinite(y))[0])} has a response that is not finite")
    made = design(cells, factors, interactions)
    runs, parameters = made.matrix.shape
    rank = int(np.linalg.matrix_rank(made.matrix))
    if rank < parameters:
        raise UserError(f"the design has rank {rank} for {parameters} coefficients: some effects cannot be told apart")
    if runs == parameters:
        raise UserError(f"{runs} cells for {parameters} coefficients leave no degree of freedom for an error")
    coefficients, residual = _least_squares(made.matrix, y)
    left = runs - parameters
    variance = residual / left
    errors = np.sqrt(variance * np.diag(np.linalg.inv(made.matrix.T @ made.matrix)))
    reach = float(stats.t.ppf(0.975, left))
    total = float(np.square(y - y.mean()).sum())
    vif = inflation(made)
    terms = {}
    for name, span in made.spans.items():
        without = _least_squares(np.delete(made.matrix, span, axis=1), y)[1]
        squares = without - residual
        statistic = squares / len(span) / variance if variance > 0 else float("inf")
        levels = {str(made.columns[i][1]): {
            "difference": float(coefficients[i]), "error": float(errors[i]),
            "interval": [float(coefficients[i] - reach * errors[i]), float(coefficients[i] + reach * errors[i])]}
            for i in span}
        reference = str(factors[name][0]) if name in factors else "absent"
        terms[name] = {"reference": reference, "levels": levels, "df": len(span), "sum_of_squares": float(squares),
                       "share": float(squares / total) if total > 0 else 0.0, "F": float(statistic),
                       "p": float(stats.f.sf(statistic, len(span), left)), "inflation": vif[name]}
    return {"runs": runs, "coefficients": parameters, "residual_df": left, "residual_sd": float(np.sqrt(variance)),
            "total_sum_of_squares": total, "r_squared": float(1 - residual / total) if total > 0 else 1.0,
            "mean_at_reference": float(coefficients[0]), "terms": terms,
            "pure_error": _pure_error(cells, y, residual, left, tuple(factors))}


def _least_squares(matrix, y) -> tuple[np.ndarray, float]:
    coefficients, *_ = np.linalg.lstsq(matrix, y, rcond=None)
    return coefficients, float(np.square(y - matrix @ coefficients).sum())


def _pure_error(cells, y, residual, left, names) -> dict[str, Any] | None:
    """Between repeats of one cell; None where no cell is repeated."""
    groups: dict[tuple, list[float]] = {}
    for cell, value in zip(cells, y, strict=True):
        groups.setdefault(tuple(cell[name] for name in names), []).append(float(value))
    df = sum(len(group) - 1 for group in groups.values())
    if df == 0:
        return None
    squares = sum(float(np.square(np.array(group) - np.mean(group)).sum()) for group in groups.values())
    out: dict[str, Any] = {"df": df, "sd": float(np.sqrt(squares / df)), "lack_of_fit_df": left - df}
    if left > df and squares > 0:
        statistic = (residual - squares) / (left - df) / (squares / df)
        out |= {"F": float(statistic), "p": float(stats.f.sf(statistic, left - df, df))}
    return out
