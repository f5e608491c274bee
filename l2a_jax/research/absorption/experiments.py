"""The experiments of the paper and their controls. Each takes a laboratory and returns a report.

Figures beside the measured ones are the paper's (arXiv 2603.02227), or, marked *, an independent replication's of the
same recipe; both trained 50,000 steps on WikiText-103, so that only the `paper` preset may be compared with them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l2a_jax.models.params import Tree
from l2a_jax.research.absorption import arms
from l2a_jax.research.absorption.definitions import DENSE, HARD, Arm, Attention
from l2a_jax.research.absorption.lab import Lab
from l2a_jax.research.absorption.masks import f1
from l2a_jax.research.absorption.outcome import Cell, Panel, Report, Table, bars, mean_text, perplexity

_DEPLOYED = {"own gate, hard": HARD, "oracle mask": arms.ORACLE, "random mask": arms.RANDOM,
            "nearest keys": arms.WINDOW, "dense": DENSE}
"""How weights may be used, whatever they were trained under, by the column that shows it."""


def _perplexity(lab: Lab, arm: Arm, attention: Attention, **options: Any) -> Cell:
    """Held-out perplexity of an arm's weights; `options` are those of `Lab.nll`."""
    return Cell(perplexity(lab.nll(arm, attention, **options)))


def _deployed(lab: Lab, arm: Arm, *columns: str) -> dict[str, Cell]:
    return {column: _perplexity(lab, arm, _DEPLOYED[column]) for column in columns}


def soft_gate(lab: Lab) -> Report:
    """Learned against frozen random, constant and no gate, multiplicative and additive, under one recipe."""
    large = arms.soft_random_large(lab.config)
    rows = [(arms.dense, "37.32 (47.1*)"), (arms.soft_learned, "48.73 ± 0.60 (48.95 ± 0.70*)"),
            (arms.soft_random, "49.83 ± 0.04"), (arms.soft_constant, ""), (large, ""), (arms.additive_learned, ""),
            (arms.additive_random, "")]
    lab.prepare([arm for arm, _ in rows])
    nats = {arm: lab.nll(arm, arms.native(arm)) for arm, _ in rows}
    table = Table("Held-out perplexity", note="sigmoid(G): over visible pairs, heads and layers, of held-out text. A "
                  "constant additive gate would be dense attention exactly: the softmax takes no notice of a shift.")
    for arm, reported in rows:
        statistics = lab.statistics(arm, arms.native(arm), lab.preset.top_ks)
        table.rows[arm.name] = {
            "perplexity": Cell(perplexity(nats[arm]), reported),
            "nats above dense": Cell(nats[arm] - nats[arms.dense], digits=4),
            "mean sigmoid(G)": Cell(statistics["gate_mean"].mean(axis=1), digits=3),
            "sd sigmoid(G)": Cell(statistics["gate_sd"].mean(axis=1), digits=3)}
    gaps = (("learned - frozen random", arms.soft_learned, arms.soft_random),
            ("learned - constant 0.5", arms.soft_learned, arms.soft_constant),
            ("frozen random - constant 0.5", arms.soft_random, arms.soft_constant),
            ("frozen random at the larger scale - constant 0.5", large, arms.soft_constant),
            ("constant 0.5 - dense", arms.soft_constant, arms.dense),
            ("additive: learned - frozen random", arms.additive_learned, arms.additive_random))
    return Report("soft_gate", "Soft gates: learned, frozen random, constant, none", [table],
                  [bars("Soft gates", "held-out perplexity", table, "perplexity")],
                  [_gap(what, nats[left] - nats[right]) for what, left, right in gaps])


def _gap(what: str, nats: np.ndarray) -> str:
    """A difference seed by seed: arms of one seed share initial weights and data."""
    return f"{what}: {Cell(nats, digits=4).text()} nats, paired by seed"


def hard_topk(lab: Lab) -> Report:
    """The gate's gradient through a hard top k, and perplexities of what is trained under hard masks."""
    rows = [arms.hard_before, arms.hard_after, arms.straight_through, arms.oracle_trained, arms.soft_learned,
            arms.dense]
    lab.prepare(rows)
    gradient = Table("The gate in training", note="Largest norm of the language model's gradient on the gate over "
                     "all steps, and the largest change of a gate weight. A learned hard gate never moves: it is the "
                     "frozen random one, bit for bit. *hard_before*, the published order of top k and causal mask, is "
                     "not causal: keys of the future push past ones out of the top k.")
    scores = Table("Held-out perplexity", note=f"k = {lab.preset.top_k}. Own gate, oracle and random masks hold the "
                   "top k of the visible keys (after the causal mask).")
    for arm in rows:
        records = lab.metrics(arm)
        if arm.attention.select == "gate" or arm.attention.soft != "none":
            gradient.rows[arm.name] = {
                "largest gate gradient": Cell(np.max([r["gate_grad_norm_max"] for r in records], axis=0),
                                              "0" if arm in (arms.hard_before, arms.hard_after) else "", digits=6),
                "largest change of a gate weight": Cell(records[-1]["gate_moved"], digits=6)}
        scores.rows[arm.name] = {"as trained": _perplexity(lab, arm, arms.native(arm)), **_deployed(
            lab, arm, "own gate, hard", "oracle mask", "random mask", "dense")}
    return Report("hard_topk", "Hard top k: no gradient reaches the gate", [gradient, scores],
                  [bars("As trained", "held-out perplexity", scores, "as trained"),
                   bars("Own gate, hard", "held-out perplexity", scores, "own gate, hard", log=True)])


def distill(lab: Lab) -> Report:
    """Gates distilled on frozen weights that never saw a gate, and on weights trained along with one."""
    bases = {
        arms.dense: ("mask-agnostic", {"native": "37.32", "distilled gate": "48.6"}, "> 0.94"),
        arms.soft_learned: ("co-adapted", {
            "native": "48.73", "oracle mask": "582, 384, 506*", "random mask": "638, 414, 507*",
            "nearest keys": "577, 297, 385*", "own gate, hard": "310, 332, 240*", "distilled gate": "601.6"}, ""),
        arms.soft_random: ("co-adapted to a frozen random gate", {}, "")}
    lab.prepare(list(bases))
    k, at = lab.preset.top_k, lab.preset.top_ks.index(lab.preset.top_k)
    table = Table(f"Deployed with k = {k} of the visible keys: held-out perplexity", note="*Soft, masked by its own "
                  "logits*: the multiplier stays and the k largest of the logits in use are kept, which separates the "
                  "loss of the mask from the loss of the multiplier. Distilled minus oracle is the gate's error; "
                  "oracle minus native is what the weights do not bear.")
    layers = Table("F1 against the oracle mask, by layer", note="Contested queries: more than k visible keys.")
    by_k = Table("Share of the gap between random and oracle masks that the distilled gate closes (perplexity)")
    panels = []
    for arm, (words, reported, reported_share) in bases.items():
        native = arms.native(arm)
        gate = {"selector": lab.selector(arm, native), "selector_of": "distilled in its own forward pass"}
        kl = lab.distillation_kl(arm, native)
        counts = lab.statistics(arm, native, lab.preset.top_ks, **gate)["agreement"]
        cells = {"native": _perplexity(lab, arm, native),
                 **_deployed(lab, arm, "dense", "oracle mask", "random mask", "nearest keys")}
        if native != DENSE:
            cells |= {**_deployed(lab, arm, "own gate, hard"),
                      "soft, masked by its own logits": _perplexity(lab, arm, arms.SOFT_USED)}
        cells["distilled gate"] = _perplexity(lab, arm, arms.SELECTOR, **gate)
        for column, figure in reported.items():
            cells[column].reported = figure
        everywhere, contested = (f1(counts[:, :, at, three].sum(axis=1)) for three in (slice(0, 3), slice(3, 6)))
        table.rows[f"{arm.name} ({words})"] = {
            **cells, "F1": Cell(everywhere, digits=3), "F1, contested": Cell(contested, digits=3),
            "KL first": Cell(kl["first"], digits=3), "KL last": Cell(kl["last"], digits=3)}
        layers.rows[arm.name] = {f"layer {layer}": Cell(f1(counts[:, layer, at, 3:6]), digits=3)
                                 for layer in range(counts.shape[1])}
        panel = Panel(f"{words} weights", "held-out perplexity", "keys kept", log=True)
        panels.append(panel)
        by_k.rows[arm.name] = {}
        for each in lab.preset.top_ks:
            masked = {name: perplexity(lab.nll(arm, attention, each, **gate)) for name, attention in (
                ("random", arms.RANDOM), ("distilled", arms.SELECTOR), ("oracle", arms.ORACLE))}
            for name, values in masked.items():
                panel.add(f"{name} mask", each, values)
            closed = (masked["random"] - masked["distilled"]) / (masked["random"] - masked["oracle"])
            by_k.rows[arm.name][f"k = {each}"] = Cell(closed, reported_share, digits=3)
    return Report("distill", "Gates distilled on frozen weights", [table, by_k, layers], panels)


def stochastic(lab: Lab) -> Report:
    """Trained under masks drawn anew at every step; deployed dense, masked, and with a distilled gate."""
    lab.prepare([arms.stochastic, arms.dense])
    table = Table(f"Held-out perplexity, k = {lab.preset.top_k}", note="As trained: masks drawn among all keys (before "
                  "the causal mask), as published. The others hold the top k of the visible keys.")
    for arm, reported in ((arms.stochastic, "78.2"), (arms.dense, "37.3")):
        selector = lab.selector(arm, DENSE)
        table.rows[arm.name] = {
            "as trained": _perplexity(lab, arm, arms.native(arm)),
            "dense": Cell(perplexity(lab.nll(arm, DENSE)), reported),
            **_deployed(lab, arm, "random mask", "oracle mask"),
            "distilled gate": _perplexity(lab, arm, arms.SELECTOR, selector=selector, selector_of="dense"),
            **_deployed(lab, arm, "nearest keys")}
    return Report("stochastic", "Trained under random masks", [table],
                  [bars("Trained under random masks, deployed dense", "held-out perplexity", table, "dense"),
                   bars("... deployed with a distilled gate", "held-out perplexity", table, "distilled gate")])


def swap(lab: Lab) -> Report:
    """After joint training, another gate in place of the model's own: what changes is what was learned."""
    large = arms.soft_random_large(lab.config)
    rows = [arms.soft_learned, arms.soft_random, large, arms.additive_learned]
    lab.prepare(rows)
    table = Table("Held-out perplexity with another gate in place of the trained one", note="*Random, same norms*: "
                  "fresh weights with the root mean square of the trained ones, matrix by matrix. *Keys shuffled*: "
                  "each query's gate values in another order of its visible keys. *Another text's*: values of the same "
                  "positions in another text. The paper has it that a swap changes almost nothing.")
    for arm in rows:
        native = arms.native(arm)

        def changed(name, function, arm=arm, native=native):
            return _perplexity(lab, arm, native, change=(name, function))

        table.rows[arm.name] = {
            "own": _perplexity(lab, arm, native),
            "random, as drawn": changed("random", lambda p: _with_gate(p, _random_gate(p, lab.config.gate_std))),
            "random, same norms": changed("random, same norms", lambda p: _with_gate(p, _random_gate(p, None))),
            "constant 0.5": changed("constant", lambda p: _with_gate(p, jax.tree.map(jnp.zeros_like, _gate(p)))),
            "removed (dense)": _perplexity(lab, arm, DENSE),
            "keys shuffled": _perplexity(lab, arm, native._replace(scores="shuffled")),
            "another text's": _perplexity(lab, arm, native._replace(scores="other_text"))}
        if len(lab.seeds) > 1:
            table.rows[arm.name]["another seed's"] = changed(
                "another seed", lambda p: _with_gate(p, jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), _gate(p))))
    panel = Panel("Gates swapped after training (nats above own)", "nats")
    for column, cell in table.rows[arms.soft_learned.name].items():
        own = np.log(table.rows[arms.soft_learned.name]["own"].values)
        panel.add("learned", column, np.log(cell.values) - own)
    return Report("swap", "Gates swapped after joint training", [table], [panel])


def _gate(params: Tree) -> Tree:
    return params["layers"]["gate"]


def _with_gate(params: Tree, gate: Tree) -> Tree:
    return {**params, "layers": {**params["layers"], "gate": gate}}


def _random_gate(params: Tree, deviation: float | None) -> Tree:
    """Fresh gate weights of a deviation, or with each matrix's own root mean square (None)."""
    leaves, structure = jax.tree.flatten(_gate(params))
    keys = jax.random.split(jax.random.key(99), len(leaves))

    def fresh(key, leaf):
        scale = jnp.sqrt(jnp.mean(jnp.square(leaf), axis=(-2, -1), keepdims=True)) if deviation is None else deviation
        return scale * jax.random.normal(key, leaf.shape)

    return jax.tree.unflatten(structure, [fresh(*pair) for pair in zip(keys, leaves, strict=True)])


def closed_loop(lab: Lab) -> Report:
    """Backbones trained on their own hard path: does a gate trained jointly then deploy?"""
    rows = [(arms.soft_learned, "1.782*"), (arms.closed_learned, "0.0035*"), (arms.closed_random, ""),
            (arms.indexer, ""), (arms.hard_after, ""), (arms.straight_through, "0.786 ± 0.181*")]
    lab.prepare([arm for arm, _ in rows])
    table = Table(f"Held-out perplexity, hard masks with k = {lab.preset.top_k} of the visible keys", note=
                  "*closed*: half of the rows of every batch go through the hard path (the gate's own top k, no "
                  "multiplier), half through the soft one. *indexer*: all rows on the hard path, the gate trained by "
                  "its KL divergence to the model's attention alone. Excess: hard minus native, in nats; reported "
                  "excesses are a follow-up's, of other details.")
    for arm, reported in rows:
        native, hard = lab.nll(arm, arms.native(arm)), lab.nll(arm, HARD)
        table.rows[arm.name] = {
            "native": Cell(perplexity(native)), "own gate, hard": Cell(perplexity(hard)),
            "excess": Cell(hard - native, reported, digits=4),
            **_deployed(lab, arm, "oracle mask", "random mask", "dense")}
    hard = {arm: lab.nll(arm, HARD) for arm, _ in rows}
    notes = [_gap("closed loop, learned - frozen random, both deployed hard",
                  hard[arms.closed_learned] - hard[arms.closed_random]),
             _gap("indexer - frozen random hard gate (hard_after)", hard[arms.indexer] - hard[arms.hard_after])]
    return Report("closed_loop", "Trained on the hard path", [table],
                  [bars("Deployed hard with the own gate", "held-out perplexity", table, "own gate, hard", log=True),
                   bars("Native", "held-out perplexity", table, "native")], notes)


def _gaps(lab: Lab, table: Table, panel: Panel, rows: Sequence[tuple[str, float | str, tuple[Arm, Arm]]]
          ) -> tuple[Table, Panel]:
    """Learned, frozen random and their gap; a row is its label, its place in the panel, and the two arms."""
    for label, x, pair in rows:
        learned, random = (lab.nll(arm, Attention("multiplicative")) for arm in pair)
        table.rows[label] = {"learned": Cell(perplexity(learned)), "frozen random": Cell(perplexity(random)),
                             "random - learned, nats": Cell(random - learned, digits=4)}
        panel.add("random - learned", x, random - learned)
    return table, panel


def mechanism(lab: Lab) -> Report:
    """What the paper argues in words, measured: concentration, parameter asymmetry, compensation, experts."""
    layers, standard = lab.config.layers, (arms.soft_learned, arms.soft_random)
    every, half = tuple(range(layers)), tuple(range(layers // 2))
    other = tuple(layer for layer in every if layer not in half)
    widths = {width: arms.pair(f"width{width}", gate_width=width) for width in lab.preset.gate_widths}
    widths |= {lab.config.gate_width: standard}
    shares = {0.0: arms.pair("qkv_frozen", frozen_qkv=every), 0.5: arms.pair("qkv_half", frozen_qkv=other),
              1.0: standard}
    places = {"gates in all layers": standard,
              "gates in the first half": arms.pair("gates_half", gated_layers=half),
              "... Q/K/V frozen in the gated half": arms.pair("gated_frozen", gated_layers=half, frozen_qkv=half),
              "... Q/K/V frozen in the other half": arms.pair("other_frozen", gated_layers=half, frozen_qkv=other)}
    experts = arms.experts()
    pairs = [*shares.values(), *places.values(), *widths.values()]
    lab.prepare([arms.dense, *standard, *itertools.chain.from_iterable(pairs), *experts])

    mass = Table("Attention mass in the k largest keys, by layer", note="Mean over queries with more than k visible "
                 "keys, softmax of the scaled products. Reported: top 64 of 512, over all layers.")
    curve = Panel("Attention mass in the k largest keys", "share of the mass", "k")
    for arm in (arms.dense, arms.soft_learned):
        found = lab.statistics(arm, arms.native(arm), lab.preset.top_ks)["mass"]
        for index, k in enumerate(lab.preset.top_ks):
            paper = "0.906" if arm is arms.dense and k == 64 else ""
            mass.rows[f"{arm.name}, k = {k}"] = {
                "all layers": Cell(found[:, :, index].mean(axis=1), paper, digits=3),
                **{f"layer {layer}": Cell(found[:, layer, index], digits=3) for layer in range(layers)}}
            curve.add(arm.name, k, found[:, :, index].mean(axis=1))

    by_width = _gaps(lab, Table("Learned against frozen random, by gate width"),
                     Panel("Gap by gate width", "random - learned, nats", "gate width"),
                     [(f"width {width}", width, widths[width]) for width in sorted(widths)])
    by_share = _gaps(lab, Table("... by the share of layers whose Q/K/V are trained"),
                     Panel("Gap by share of Q/K/V trained", "random - learned, nats", "share of the layers"),
                     [(f"{share:.0%} of the layers", share, pair) for share, pair in shares.items()])
    by_place = _gaps(lab, Table("... by where the gates are, and where Q/K/V may adapt"),
                     Panel("Gap by place", "random - learned, nats"),
                     [(label, label, pair) for label, pair in places.items()])
    moe = Table(f"Mixture of {lab.preset.experts} experts of the same total size, one a token", note="Load: the "
                "largest share of tokens that one expert serves, mean over layers.")
    moe.rows["dense"] = {"perplexity": _perplexity(lab, arms.dense, DENSE)}
    for arm in experts:
        load = lab.statistics(arm, DENSE, lab.preset.top_ks)["load"]
        moe.rows[arm.name] = {"perplexity": _perplexity(lab, arm, DENSE),
                              "largest load": Cell(load.max(axis=-1).mean(axis=-1), digits=3)}
    tables, panels = zip(by_width, by_share, by_place, strict=True)
    return Report("mechanism", "Mechanisms of absorption", [mass, *tables, moe],
                  [curve, *panels, bars("Experts", "held-out perplexity", moe, "perplexity")],
                  [f"gate parameters: {mean_text([2 * lab.config.width * lab.config.heads * w * layers])} at width {w}"
                   for w in sorted(widths)])


def sign(lab: Lab) -> Report:
    """The main result alone, so that it can be trained for long: is a learned gate better than a random one?"""
    rows = [(arms.dense, "37.32"), (arms.soft_learned, "48.73 ± 0.60"), (arms.soft_random, "49.83 ± 0.04")]
    lab.prepare([arm for arm, _ in rows])
    nats = {arm: lab.nll(arm, arms.native(arm)) for arm, _ in rows}
    table = Table("Held-out perplexity", {arm.name: {"perplexity": Cell(perplexity(nats[arm]), reported)}
                                          for arm, reported in rows})
    return Report("sign", "Learned against frozen random gates", [table],
                  [bars("Soft gates", "held-out perplexity", table, "perplexity")],
                  [_gap("learned - frozen random", nats[arms.soft_learned] - nats[arms.soft_random])])


def sweep(lab: Lab) -> Report:
    """Learned against frozen random gates over the rates of the model and of the gate: does the sign hang on them?"""
    pairs, base = arms.sweep(), lab.recipe.learning_rate
    lab.prepare(list(dict.fromkeys(itertools.chain.from_iterable(pairs.values()))))
    table = Table("Learned against frozen random, by learning rates")
    panel = Panel("Gap by the gate's rate", "random - learned, nats", "gate's rate / model's")
    for (rate, gate), pair in pairs.items():
        learned, random = (lab.nll(arm, arms.native(arm)) for arm in pair)
        table.rows[f"model {rate * base:.3g}, gate {gate * base:.3g}"] = {
            "learned": Cell(perplexity(learned)), "frozen random": Cell(perplexity(random)),
            "random - learned, nats": Cell(random - learned, digits=4)}
        panel.add(f"model {rate * base:.3g}", gate / rate, random - learned)
    return Report("sweep", "Learning rates of the model and of the gate", [table], [panel])


EXPERIMENTS = {experiment.__name__: experiment for experiment in (
    soft_gate, hard_topk, distill, stochastic, swap, closed_loop, mechanism, sign, sweep)}
