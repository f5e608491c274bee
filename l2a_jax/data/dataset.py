"""`open_data`: from what `--data` says to batches by index."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from l2a_jax.data import asking
from l2a_jax.data.batch import Batch
from l2a_jax.data.echo import with_echoes
from l2a_jax.data.encoder import Encoder, check_ids, make_encoder
from l2a_jax.data.mixing import Mix, held_out_identities, interleave, make_mix, permutation, ranks
from l2a_jax.data.packing import PACKINGS, Plan, best_fit, concatenate, some_rows
from l2a_jax.data.recipes import Domain, resolve
from l2a_jax.data.store import TokenStore, largest_id
from l2a_jax.data.tokenise import tokenised
from l2a_jax.errors import UserError

_DIGITS = 16
ORDER = 1
"""Raised whenever the same arguments would give other batches than before."""


class Part(NamedTuple):
    """A domain ready to read: its store, its share of the tokens trained on, its rows for training and held out."""

    domain: Domain
    store: TokenStore
    share: float
    train: Plan
    held_out: Plan
    train_documents: np.ndarray
    held_out_documents: np.ndarray


@dataclass(frozen=True, eq=False)
class PackedData:
    """Rows of packed documents from several domains; see `l2a_jax.data.batch.TrainingData` for what it promises.

    Row g of the stream, over all hosts, is fixed by the seed alone; micro-batch i is rows i*batch_size and on, of
    which process p takes the p-th of `process_count` equal shares.
    """

    parts: tuple[Part, ...]
    mix: Mix
    packing: str
    seq_len: int
    batch_size: int
    seed: int
    held_out_share: float
    encoder: Encoder
    fingerprint: str
    process_index: int = 0
    process_count: int = 1
    dropped: tuple[str, ...] = ()
    echo: float = 0.0
    ask: float = 0.0
    answer_weight: float = 1.0
    unique: int | None = None

    def batch(self, index: int) -> Batch:
        """Micro-batch `index`, int32/float32 [batch_size / process_count, seq_len]."""
        rows = self._mine(index)
        batch = self._fill([self._train_row(row) for row in rows])
        if self.echo:
            batch = with_echoes(batch, rows, self.echo, self.seed)
        if not self.ask:
            return batch
        return asking.with_questions(batch, rows, self.ask, self.seed, self.encoder.encode, self.answer_weight)

    def of_process(self, index: int, count: int) -> PackedData:
        """This data, of whose micro-batches the `index`-th of `count` equal shares of rows is read."""
        return replace(self, process_index=index, process_count=count)

    def held_out(self, batches: int | None = None, domain: str | None = None) -> Iterator[Batch]:
        """The held-out documents once, in the domains' shares as long as they last, at most `batches` batches.

        The last batch is filled with rows of padding (weights 0). `domain` restricts to one domain by name.
        """
        chosen = [part for part in self.parts if domain in (None, part.domain.name)]
        if not chosen:
            raise UserError(f"no domain {domain!r}; expected one of {', '.join(p.domain.name for p in self.parts)}")
        counts = [part.held_out.row_count for part in chosen]
        order = interleave(counts, [part.share for part in chosen], self.seed)
        nth = ranks(order, len(counts))
        total = -(-order.size // self.batch_size)
        for index in range(total if batches is None else min(batches, total)):
            rows = [r for r in self._mine(index) if r < order.size]
            located = [(chosen[order[r]], chosen[order[r]].held_out, int(nth[r])) for r in rows]
            yield self._fill(located)

    def _mine(self, index: int) -> range:
        size = self.batch_size // self.process_count
        first = index * self.batch_size + self.process_index * size
        return range(first, first + size)

    def _train_row(self, row: int) -> tuple[Part, Plan, int]:
        domain, nth = self.mix.locate(row)
        part = self.parts[domain]
        epoch, nth = divmod(nth, part.train.row_count)
        order = permutation(self.seed, part.domain.name, epoch, part.train.row_count)
        return part, part.train, int(order[nth])

    def _fill(self, rows: list[tuple[Part, Plan, int]]) -> Batch:
        shape = (self.batch_size // self.process_count, self.seq_len)
        tokens, targets = (np.full(shape, self.encoder.end_id, np.int32) for _ in range(2))
        weights, segments, positions = np.zeros(shape, np.float32), np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        counting = np.arange(self.seq_len, dtype=np.int32)
        for b, (part, plan, row) in enumerate(rows):
            ids, t = part.store.tokens, 0
            first, last = int(plan.rows[row]), int(plan.rows[row + 1])
            table = (column[first:last].tolist() for column in (plan.starts, plan.lengths, plan.ends))
            for segment, (start, length, ends) in enumerate(zip(*table, strict=True), start=1):
                counted = length - ends  # the last token of a document has no target
                tokens[b, t : t + length] = ids[start : start + length]
                targets[b, t : t + counted] = ids[start + 1 : start + 1 + counted]
                weights[b, t : t + counted] = 1
                segments[b, t : t + length] = segment
                positions[b, t : t + length] = counting[:length]
                t += length
        if self.packing == "concat":
            return Batch(tokens, targets, weights)
        return Batch(tokens, targets, weights, segments, positions)

    @cached_property
    def tokens_per_batch(self) -> float:
        """Tokens of the text, padding not counted, packed into a micro-batch over all processes, on average: what a
        budget of tokens is counted in (`tokens_read` counts what was read)."""
        per_row = np.array([part.train.tokens / part.train.row_count for part in self.parts])
        return float(self.batch_size * (per_row * self.mix.counts).sum() / self.mix.counts.sum())

    def usage(self, batches: int) -> dict[str, Any]:
        """What the first `batches` micro-batches hold: per domain and in all, tokens seen, unique tokens, epochs.

        Tokens exclude padding; a row that asks has none, whatever the row whose place it takes had. Unique tokens count
        each token of the text in these rows once, however often it was seen, and of a row that asks all that it had.
        """
        domains, more = {}, self._asking(batches * self.batch_size)
        for part, rows in zip(self.parts, self.mix.used(batches * self.batch_size), strict=True):
            plan, name = part.train, part.domain.name
            tokens = plan.row_tokens
            epochs, rest = divmod(rows, plan.row_count)
            partial = int(tokens[permutation(self.seed, name, epochs, plan.row_count)[:rest]].sum()) if rest else 0
            total = int(tokens.sum())
            domains[name] = {"tokens": epochs * total + partial + more.get(name, 0),
                             "unique_tokens": total if epochs else partial,
                             "epochs": round(rows / plan.row_count, 4), "rows": rows}
        summed = {key: sum(d[key] for d in domains.values()) for key in ("tokens", "unique_tokens", "rows")}
        for entry in domains.values():
            entry["share"] = round(entry["tokens"] / max(summed["tokens"], 1), 4)
        return {**summed, "domains": domains}

    def tokens_read(self, batches: int) -> int:
        """Tokens in the first `batches` micro-batches over all processes, padding not counted."""
        return self.usage(batches)["tokens"]

    def _asking(self, rows: int) -> dict[str, int]:
        """Of each domain the tokens that the first `rows` rows have more where they ask, having no padding then."""
        more: dict[str, int] = {}
        if self.ask:
            packed = {part.domain.name: part.train.row_tokens for part in self.parts}
            for row in asking.rows_that_ask(range(rows), self.seq_len, self.ask, self.seed, self.encoder.encode):
                part, _, nth = self._train_row(row)
                name = part.domain.name
                more[name] = more.get(name, 0) + self.seq_len - int(packed[name][nth])
        return more

    def describe(self) -> dict[str, Any]:
        """What there is to train on, as plain JSON values. Tokens include one end token a document."""
        domains = {}
        for part in self.parts:
            store, plan = part.store, part.train
            lengths = np.diff(store.offsets)
            kept = part.train_documents
            if self.unique is not None:
                kept = np.unique(np.searchsorted(store.offsets, plan.starts, side="right") - 1)
            _, first = np.unique(store.identities[kept], return_index=True)
            rows = plan.row_count
            tokens, unique = int(lengths[kept].sum()), int(lengths[kept][first].sum())
            if self.unique is not None:  # parts of documents
                tokens = unique = plan.tokens
            domains[part.domain.name] = {
                "share": round(part.share, 4), "documents": int(kept.size), "tokens": tokens,
                "unique_tokens": unique,
                "longest_document": int(lengths[kept].max()),
                "rows": rows,
                "packing_efficiency": round(plan.tokens / (rows * self.seq_len), 4),
                "held_out_documents": int(part.held_out_documents.size),
                "held_out_tokens": int(lengths[part.held_out_documents].sum()),
                "held_out_rows": part.held_out.row_count, "sources": _sources(part),
                **{key: store.meta[key] for key in ("empty_documents", "text_bytes", "files")},
            }
        keys = ("documents", "tokens", "unique_tokens", "rows", "held_out_documents", "held_out_tokens")
        total = {key: sum(domain[key] for domain in domains.values()) for key in keys}
        packed = sum(part.train.tokens for part in self.parts)
        return {
            **total, "packing": self.packing,
            "packing_efficiency": round(packed / (total["rows"] * self.seq_len), 4),
            "tokens_per_batch": round(self.tokens_per_batch, 1), "seq_len": self.seq_len, "batch_size": self.batch_size,
            "seed": self.seed, "held_out": self.held_out_share, "echo": self.echo,
            "ask": self.ask, **({"asking": asking.EDITION} if self.ask else {}),
            **({} if self.answer_weight == 1 else {"answer_weight": self.answer_weight}),
            **({} if self.unique is None else {"unique": self.unique}),
            "dropped_domains": list(self.dropped), "domains": domains,
            "tokenizer": self.parts[0].store.meta["key"]["tokenizer"][:_DIGITS],
            "fingerprint": self.fingerprint,
        }


def _sources(part: Part) -> dict[str, str]:
    """What a domain was read from, and a hash of the text of each: what `changes.difference` names."""
    meta = part.store.meta
    if part.domain.hub:  # known by its name; what was read under it, only its tokens tell
        tokens = json.dumps(meta["checksums"]["tokens.bin"])
        return {part.domain.hub.path: hashlib.sha256(tokens.encode()).hexdigest()[:_DIGITS]}
    return {str(path): text[:_DIGITS] for path, text in zip(part.domain.files, meta["key"]["source"], strict=True)}


def open_data(
    spec: str | Iterable[str],
    tokenizer: Any,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    cache_dir: str | os.PathLike | None = None,
    packing: str = "best_fit",
    weights: Mapping[str, float] | None = None,
    held_out: float = 0.01,
    text_field: str | None = None,
    join: str | None = None,
    end_id: int | None = None,
    echo: float = 0.0,
    ask: float = 0.0,
    answer_weight: float = 1.0,
    unique: int | None = None,
    vocab_size: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> PackedData:
    """Opens (and the first time tokenises) what the entries of `--data`, `spec`, name.

    Rows have `seq_len` tokens; a micro-batch has `batch_size` rows over all processes, of which this one reads an equal
    part. `seed` orders rows and domains. `tokenizer` and `end_id` are those of `encoder.make_encoder`, `cache_dir` that
    of `tokenise.cache_folder`; `vocab_size` is the rows of the embedding: a text with an id beyond them is refused.

    `packing`: `best_fit` (segments, positions restart), or `concat`: documents shuffled once by the seed, joined to one
    string and cut, without segments. `weights`: relative shares of the tokens by domain; 0 drops a domain, one that is
    not named counts 1; None: each entry by its size, and inside a recipe the recipe's weights. `held_out`: share of the
    documents held out, by hash of their text and not by the seed. `text_field`, `join`: as in `text.record_text`; None
    keeps the recipe's, and `join=""` joins nothing. `echo`: share of the rows trained on in which earlier text is
    repeated (`data.echo`), `ask`: of those that ask about themselves (`data.asking`); never held-out ones.
    `answer_weight`: of the answers in these, in the loss.
    `unique`: train on rows of so many tokens alone, over and over, whatever the seed: each domain gives its share.

    Raises UserError on anything wrong with the arguments or the files.
    """
    _check(seq_len, batch_size, packing, held_out, {"echo": echo, "ask": ask}, process_index, process_count)
    domains = resolve(spec)
    if weights is not None:
        _check_weights(weights, domains)
        domains = tuple(replace(domain, weight=float(weights.get(domain.name, 1.0))) for domain in domains)
    dropped = tuple(domain.name for domain in domains if domain.weight == 0)
    domains = tuple(replace(domain, text_field=text_field or domain.text_field,
                            join=domain.join if join is None else join or None)
                    for domain in domains if domain.weight != 0)
    encoder = make_encoder(tokenizer, end_id)
    stores = [tokenised(domain, encoder, cache_dir) for domain in domains]
    for domain, store in zip(domains, stores, strict=True):
        if vocab_size is not None:
            check_ids([largest_id(store)], vocab_size, f"the domain {domain.name!r} of --data")
    identities = held_out_identities([store.identities for store in stores], held_out)

    plans = []
    for domain, store in zip(domains, stores, strict=True):
        is_held = np.isin(store.identities, identities)
        train, held = np.flatnonzero(~is_held), np.flatnonzero(is_held)
        if not train.size:
            raise UserError(f"the domain {domain.name!r} has no document to train on: its {held.size} are held out, "
                            "each a copy of one held out in another domain")
        lengths = np.diff(store.offsets)
        plans.append([_plan(store.offsets[chosen], lengths[chosen], seq_len, packing, f"{seed} {domain.name}")
                      for chosen in (train, held)] + [train, held])
    tokens = np.array([train.tokens for train, *_ in plans], float)
    shares = _shares(domains, tokens, by_weight=weights is not None)
    if unique is not None:
        if unique > tokens.sum():
            raise UserError(f"--unique is {unique:,} tokens, and there are {int(tokens.sum()):,} to train on")
        for plan, domain, share in zip(plans, domains, shares, strict=True):
            plan[0] = _first_tokens(plan[0], share * unique, domain.name)
        tokens = np.array([train.tokens for train, *_ in plans], float)
    parts = tuple(Part(domain, store, float(share), *plan)
                  for domain, store, share, plan in zip(domains, stores, shares, plans, strict=True))

    # A share is of tokens, the stream is of rows: fuller rows come less often.
    rows = np.array([part.train.row_count for part in parts])
    order = {
        "order": ORDER, "stores": [store.folder.name for store in stores], "shares": [round(s, 12) for s in shares],
        "checksums": [store.meta["checksums"]["tokens.bin"] for store in stores], "packing": packing, "seed": seed,
        "seq_len": seq_len, "batch_size": batch_size, "held_out": held_out, **({"echo": echo} if echo else {}),
        **({"ask": ask, "asking": asking.EDITION} if ask else {}),
        **({} if answer_weight == 1 else {"answer_weight": answer_weight}),
        **({} if unique is None else {"unique": unique}),
    }
    return PackedData(
        parts, make_mix(shares * rows / tokens, int(rows.sum()), seed), packing, seq_len, batch_size, seed, held_out,
        encoder, hashlib.sha256(json.dumps(order).encode()).hexdigest(), process_index, process_count, dropped, echo,
        ask, answer_weight, unique,
    )


def _first_tokens(plan: Plan, budget: float, name: str) -> Plan:
    """Rows drawn from all, the same for every seed, until they hold the budget of tokens; one at least."""
    order = permutation(0, f"unique {name}", 0, plan.row_count)
    count = int(np.searchsorted(np.cumsum(plan.row_tokens[order]), budget)) + 1
    return some_rows(plan, np.sort(order[:count]))


def _plan(starts: np.ndarray, lengths: np.ndarray, seq_len: int, packing: str, key: str) -> Plan:
    if packing == "best_fit":
        return best_fit(starts, lengths, seq_len)
    shuffled = permutation(0, f"documents {key}", 0, starts.size)
    return concatenate(starts[shuffled], lengths[shuffled], seq_len)


def _shares(domains: tuple[Domain, ...], tokens: np.ndarray, by_weight: bool) -> np.ndarray:
    """Share of the tokens of each domain, in all 1."""
    weights = np.array([1.0 if domain.weight is None else domain.weight for domain in domains])
    if by_weight:
        return weights / weights.sum()
    entries = np.array([domain.entry for domain in domains])
    shares = np.zeros(len(domains))
    for entry in set(entries.tolist()):
        mine = entries == entry
        shares[mine] = tokens[mine].sum() / tokens.sum() * weights[mine] / weights[mine].sum()
    return shares


def _check(seq_len: int, batch_size: int, packing: str, held_out: float, changed: dict[str, float],
           index: int, count: int) -> None:
    def require(good: bool, message: str) -> None:
        if not good:
            raise UserError(message)

    require(seq_len >= 2, f"the sequence length is {seq_len}; expected at least 2 tokens")
    require(batch_size >= 1, f"the batch size is {batch_size}; expected at least 1 row")
    require(packing in PACKINGS, f"packing is {packing!r}; expected one of {', '.join(PACKINGS)}")
    require(0 <= held_out < 1, f"held_out is {held_out}; expected a share from 0 to below 1")
    for name, share in changed.items():
        require(0 <= share <= 1, f"{name} is {share}; expected a share of the rows, from 0 to 1")
    require(0 <= index < count, f"process_index is {index}; expected 0 to {count - 1}")
    require(batch_size % count == 0, f"a batch of {batch_size} rows does not divide among {count} processes")


def _check_weights(weights: Mapping[str, float], domains: tuple[Domain, ...]) -> None:
    names = [domain.name for domain in domains]
    for name, weight in weights.items():
        if name not in names:
            raise UserError(f"a weight names the domain {name!r}; expected one of {', '.join(names)}")
        if not (np.isfinite(weight) and weight >= 0):
            raise UserError(f"the weight of {name!r} is {weight}; expected a number of at least 0")
    if not any(weights.get(name, 1.0) > 0 for name in names):
        raise UserError("every domain has weight 0; expected at least one above 0")
