"""The laboratory: trains each distinct arm once, keeps what it trained and measured, and stops when its time is up.

    RUN/arms/NAME-HASH/      config.json, training.json, weights.safetensors (.partial: an arm in training)
    RUN/arms/HASH.lock       held by the process that trains the arm
    RUN/selectors/           distilled gates
    RUN/evaluations.json     every score, by a hash of what was scored

All names carry a hash of everything that determines the content, so experiments share arms, an interrupted suite
continues, and another recipe in the same folder never takes the wrong weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from l2a_jax.errors import UserError
from l2a_jax.files import check_file, claim, from_plain, native, plain, read_json, whole, write_json
from l2a_jax.models.params import Tree, map_with_path
from l2a_jax.progress import progress
from l2a_jax.research import leaves
from l2a_jax.research.absorption import arm_training, distill, scoring, small_model
from l2a_jax.research.absorption.corpora import Corpus
from l2a_jax.research.absorption.definitions import Arm, Attention, Recipe, SuiteConfig, TransformerConfig, digest
from l2a_jax.research.deadline import OutOfTime, check
from l2a_jax.shapes import each, number, require
from l2a_jax.training.checkpoints import LATEST, Checkpoints
from l2a_jax.training.metrics import MetricsLog, read_metrics, told

log = logging.getLogger("l2a_jax")
FORMAT = 1
"""Raised whenever the same arm would be trained to other weights than before."""


class Lab:
    """One suite: a preset, a corpus, a run folder. `deadline` in seconds of `time.monotonic()`."""

    def __init__(self, preset: SuiteConfig, corpus: Corpus, run_dir: pathlib.Path, deadline: float = float("inf"),
                 dense_backend: str | None = None):
        self.preset, self.corpus, self.run_dir, self.deadline = preset, corpus, run_dir, deadline
        self.dense_backend = dense_backend
        self.config: TransformerConfig = dataclasses.replace(preset.model, vocab_size=corpus.vocabulary)
        self.recipe: Recipe = preset.recipe
        self.seeds = np.asarray(preset.seeds, np.uint32)
        self.stream, self.held_out = jnp.asarray(corpus.train.stream), jnp.asarray(corpus.held_out.stream)
        self.scored = corpus.held_out.in_turn(preset.eval_batches, preset.recipe.batch_size)
        if not len(self.scored):
            raise UserError(f"the corpus holds out {corpus.held_out.starts.size} windows; expected at least one batch "
                            f"of {preset.recipe.batch_size}: give more text, or a larger --held-out")
        self._params: dict[str, Tree] = {}
        self._selectors: dict[str, Tree] = {}
        self._path = run_dir / "evaluations.json"
        check_file(self._path, "--run-dir")
        self._scores: dict[str, Any] = self._stored()
        self.seconds: dict[str, float] = {}

    # --- arms ---

    def key(self, arm: Arm) -> str:
        """A hash of all that determines an arm's weights; its name is not part of it."""
        k = self.preset.top_k if arm.attention.select != "none" else None
        return digest(FORMAT, arm.identity, self.model(arm), self.recipe, self.preset.seeds, k,
                      self.corpus.fingerprint)

    def model(self, arm: Arm) -> TransformerConfig:
        """The arm's model."""
        return arm.model(self.config, self.preset.experts)

    def program(self, arm: Arm) -> arm_training.Program:
        """What the arm's training compiles."""
        return arm_training.Program(self.model(arm), arm.attention, self.recipe, self.dense_backend)

    def prepare(self, arms: Sequence[Arm]) -> None:
        """Train those of `arms` that are not trained yet, up to `together` of one program side by side."""
        missing = []
        for arm in arms:
            if self._weights(arm) is None and self.key(arm) not in [self.key(other) for other in missing]:
                missing.append(arm)
        while missing:
            same = [arm for arm in missing if self.program(arm) == self.program(missing[0])]
            group = same[: max(1, self.preset.together)]
            self._train_claimed(group)
            missing = [arm for arm in missing if arm not in group]

    def _train_claimed(self, group: Sequence[Arm], wait: bool = True) -> None:
        """Train what nobody has trained; an arm that another process trains is waited for, or left to it."""
        self.check_time()
        with contextlib.ExitStack() as locks:
            for key in sorted(map(self.key, group)):
                lock = claim(self.run_dir / "arms" / f"{key}.lock", wait=float("inf") if wait else 0.0)
                if locks.enter_context(lock) is not None:
                    return
            group = [arm for arm in group if self._weights(arm) is None]
            if group:
                self._train(group)

    def train_unclaimed(self, arms: Sequence[Arm]) -> None:
        """Train, one after the other, those of `arms` that are neither trained nor in training by another process:
        several processes, each with a GPU of its own, share the arms of one run folder."""
        for arm in arms:
            self._train_claimed([arm], wait=False)
            self._params.clear()

    def params(self, arm: Arm) -> Tree:
        """Trained parameters, [seeds, ...]."""
        self.prepare([arm])
        return self._params[self.key(arm)]

    def is_trained(self, arm: Arm) -> bool:
        """Whether the run folder holds the arm's weights."""
        return self._weights(arm) is not None

    def metrics(self, arm: Arm) -> list[dict[str, Any]]:
        """Training metrics of an arm, one record for each dispatch. UserError where its file is damaged."""
        self.prepare([arm])
        path = self._weights(arm).parent / "training.json"
        members = [number, len(self.seeds)]
        record = {"step": int, "loss": number, "gate_grad_norm_max": members}
        try:
            found = read_json(path, list)
            require(found, [record], str(path))
            require(found[-1] if found else {}, {"gate_moved": members}, f"{path}: its last record")
        except UserError as error:
            raise UserError(f"{error}. Move {path.parent} away, and the arm is trained again") from error
        return from_plain(found)

    def _weights(self, arm: Arm) -> pathlib.Path | None:
        key = self.key(arm)
        found = next(iter(sorted((self.run_dir / "arms").glob(f"*-{key}/weights.safetensors"))), None)
        if found is not None and key not in self._params:
            self._params[key] = _load(found, small_model.param_shapes(self.model(arm)), len(self.seeds))
        return found

    def _train(self, group: Sequence[Arm]) -> None:
        """Train a group to its end; saves on the way, on interruption and when the time is up."""
        count, program, first = len(self.seeds), self.program(group[0]), group[0]
        name = "+".join(arm.name for arm in group)
        log.info("training %s: %d seeds, %d steps of %d x %d tokens", name, count, self.recipe.steps,
                 self.recipe.batch_size, self.recipe.seq_len)
        numbers = arm_training.member_axis([
            arm_training.arm_numbers(arm, program.config, self.recipe, self.preset.top_k) for arm in group], count)
        seeds = np.tile(self.seeds, len(group))
        folder = self.run_dir / "arms" / f"{first.name}-{digest(*[self.key(arm) for arm in group])}.partial"
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints = Checkpoints(folder)
        state = arm_training.init_members(seeds, numbers.gate_std, config=program.config)
        if checkpoints.metadata(LATEST) is not None:
            # Through the host: what comes back bound to a device would ask for a program of its own.
            state = jax.device_get(checkpoints.load(LATEST, jax.eval_shape(lambda s: s, state)))
            log.info("resuming after step %d", int(state.step))
        start_gates = jax.tree.map(np.asarray, arm_training.init_members(
            seeds, numbers.gate_std, config=program.config).trainable["layers"]["gate"])
        step, saved = int(state.step), int(state.step)
        history = read_metrics(folder / "metrics.jsonl", step)
        if step != (history[-1]["step"] if history else 0):
            raise UserError(f"{folder}: metrics.jsonl ends at step {history[-1]['step'] if history else 0}, the "
                            f"checkpoint is of step {step}; move the folder away, and the arm is trained again")
        records = MetricsLog(folder / "metrics.jsonl", step)
        began = time.monotonic()

        def save():
            checkpoints.save(LATEST, state, {"arms": [arm.name for arm in group]})

        try:
            with progress(name, self.recipe.steps, start=step) as report:
                while step < self.recipe.steps:
                    n = min(self.preset.scan, self.recipe.steps - step)
                    starts = self._starts(seeds, step, n)
                    started = time.monotonic()
                    state, metrics = arm_training.train_chunk(state, self.stream, starts, seeds, numbers,
                                                          program=program)
                    metrics = jax.device_get(metrics)
                    step += n
                    if not bool(state.healthy):
                        bad = np.argmax(~np.isfinite(metrics["loss"]) | ~np.isfinite(metrics["grad_norm"]))
                        at, member = divmod(int(bad), len(seeds))
                        raise UserError(f"arm {group[member // count].name}, seed {seeds[member]}: the loss or its "
                                        f"gradient is not finite at step {step - n + at + 1}; try a lower --lr")
                    tokens = n * self.recipe.batch_size * self.recipe.seq_len * len(seeds)
                    record = {"step": step, "loss": float(metrics["loss"].mean()),
                              "loss_per_member": metrics["loss"].mean(axis=0),
                              "grad_norm": metrics["grad_norm"].mean(axis=0),
                              "gate_grad_norm_mean": metrics["gate_grad_norm"].mean(axis=0),
                              "gate_grad_norm_max": metrics["gate_grad_norm"].max(axis=0),
                              "tokens_per_second": tokens / (time.monotonic() - started)}
                    records.write(record)
                    history.append(native(record))
                    report(step, told(record, self.recipe.steps))
                    if step < self.recipe.steps and time.monotonic() > self.deadline:
                        save()
                        raise OutOfTime(f"arm {name} is saved after step {step}")
                    if step - saved >= self.preset.save_every:
                        save()
                        saved = step
        except KeyboardInterrupt:
            if step > saved:
                save()
            raise
        finally:
            records.close()
        self.seconds[name] = time.monotonic() - began
        moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).reshape(len(seeds), -1).max(axis=1),
                             state.trainable["layers"]["gate"], start_gates)
        moved = np.maximum(*jax.tree.leaves(moved))
        for index, arm in enumerate(group):
            mine = slice(index * count, (index + 1) * count)
            self._finish(arm, jax.tree.map(lambda x, mine=mine: x[mine], state.trainable), history, mine, moved[mine])
        shutil.rmtree(folder)

    def _finish(self, arm: Arm, params: Tree, history: list, mine: slice, moved: np.ndarray) -> None:
        folder = self.run_dir / "arms" / f"{arm.name}-{self.key(arm)}"
        folder.mkdir(parents=True, exist_ok=True)
        own = [{name: value[mine] if isinstance(value, list) else value for name, value in record.items()}
               for record in history]
        own[-1]["gate_moved"] = plain(moved)
        write_json(folder / "training.json", own)
        write_json(folder / "config.json", {
            "arm": plain(dataclasses.asdict(arm)), "model": dataclasses.asdict(self.model(arm)),
            "recipe": dataclasses.asdict(self.recipe), "seeds": self.preset.seeds, "top_k": self.preset.top_k,
            "corpus": self.corpus.fingerprint})
        _save(folder / "weights.safetensors", params)
        self._params[self.key(arm)] = params

    def check_time(self) -> None:
        """Raise `OutOfTime` once the deadline has passed."""
        check(self.deadline)

    # --- distilled gates ---

    def selector(self, arm: Arm, native: Attention) -> Tree:
        """Gates distilled on the frozen weights of `arm`, in its forward pass `native`, [seeds, ...]."""
        name = digest(self.key(arm), native, "selector")
        path = self.run_dir / "selectors" / f"{arm.name}-{name}.safetensors"
        if name not in self._selectors and path.exists() and f"kl {name}" in self._scores:
            gate = small_model.param_shapes(self.model(arm))["layers"]["gate"]
            self._selectors[name] = _load(path, gate, len(self.seeds))
        if name not in self._selectors:
            params = self.params(arm)
            self.check_time()
            self._selectors[name], first, last = self._distil(arm, native, params)
            path.parent.mkdir(parents=True, exist_ok=True)
            _save(path, self._selectors[name])
            self._store(f"kl {name}", {"first": first, "last": last})
        return self._selectors[name]

    def distillation_kl(self, arm: Arm, native: Attention) -> dict[str, list[float]]:
        """KL in nats at the first step and over the last tenth, by seed."""
        self.selector(arm, native)
        members = [float, len(self.seeds)]
        return self._score(f"kl {digest(self.key(arm), native, 'selector')}", {"first": members, "last": members})

    def _distil(self, arm: Arm, native: Attention, params: Tree) -> tuple[Tree, list, list]:
        config, steps = self.model(arm), self.recipe.distill_steps
        log.info("distilling gates on %s: %d steps", arm.name, steps)
        selector = distill.fresh_selector(self.seeds, config=config)
        adam = distill.initial_adam(selector)
        values = []
        for done in range(0, steps, self.preset.scan):
            starts = self._starts(self.seeds.astype(int) + 10_007, done, min(self.preset.scan, steps - done))
            selector, adam, value = distill.distill_chunk(
                selector, adam, params, self.stream, starts, self._numbers(arm, None), native.indexed(), self.seeds,
                jnp.asarray(done, jnp.int32), config=config, recipe=self.recipe)
            values.append(np.asarray(value))
        values = np.concatenate(values)
        if not np.isfinite(values).all():
            raise UserError(f"distilling gates on {arm.name}: the KL is not finite; try a lower --distill-lr")
        return selector, values[0].tolist(), values[-max(1, len(values) // 10):].mean(axis=0).tolist()

    # --- scores ---

    def nll(self, arm: Arm, attention: Attention, k: int | None = None, *,
            change: tuple[str, Callable[[Tree], Tree]] | None = None, selector: Tree | None = None,
            selector_of: Any = None) -> np.ndarray:
        """Held-out nats per token [seeds] of an arm's weights under `attention` with `k` keys.

        `change` (a name and a function of the parameters) scores altered weights; `selector` is a distilled gate, and
        `selector_of` whatever names it.
        """
        name = digest("nll", self.key(arm), attention, k, change and change[0], selector_of)
        if name not in self._scores:
            params = self.params(arm)
            self.check_time()
            params = scoring.with_selector(params if change is None else change[1](params), selector)
            values = scoring.held_out_nll(
                params, self.held_out, self.scored, self._numbers(arm, k), attention.indexed(),
                config=self.model(arm), dtype=self.recipe.dtype, length=self.recipe.seq_len)
            values = np.asarray(values)
            if not np.isfinite(values).all():
                raise UserError(f"arm {arm.name} scores {values} under {attention}; expected finite nats per token")
            self._store(name, values.tolist())
        return np.asarray(self._score(name, [float, len(self.seeds)]))

    def statistics(self, arm: Arm, attention: Attention, ks: Sequence[int], *, selector: Tree | None = None,
                   selector_of: Any = None) -> dict[str, np.ndarray]:
        """`scoring.layer_statistics` of an arm, [seeds, L, ...]; at most 4 batches, since masks are what it counts."""
        name = digest("statistics", self.key(arm), attention, list(ks), selector_of)
        if name not in self._scores:
            params = scoring.with_selector(self.params(arm), selector)
            self.check_time()
            found = scoring.layer_statistics(
                params, self.held_out, self.scored[:4], self._numbers(arm, None), attention.indexed(),
                np.asarray(ks, np.int32), config=self.model(arm), dtype=self.recipe.dtype, length=self.recipe.seq_len)
            self._store(name, plain(jax.device_get(found)))
        return {key: np.asarray(value) for key, value in self._score(name, each(self._by_seed)).items()}

    def _numbers(self, arm: Arm, k: int | None) -> small_model.Numbers:
        return arm_training.arm_numbers(arm, self.model(arm), self.recipe, k or self.preset.top_k).model

    def _starts(self, seeds: np.ndarray, first: int, count: int) -> np.ndarray:
        """Where the windows of so many steps begin, for each seed: [count, seeds, batch]."""
        return np.stack([self.corpus.train.order(int(seed), first, count, self.recipe.batch_size) for seed in seeds],
                        axis=1)

    def _by_seed(self, value: Any) -> str | None:
        """The shape of an array whose leading axis is the seeds."""
        try:
            return None if np.asarray(value, float).shape[0] == len(self.seeds) else f"{len(self.seeds)} entries"
        except (TypeError, ValueError, IndexError):
            return f"numbers, {len(self.seeds)} seeds of them"

    def _store(self, name: str, value: Any) -> None:
        """Keep a score, beside those that other processes have stored meanwhile."""
        self._scores[name] = value
        with claim(self._path.with_name(".evaluations.lock"), wait=float("inf")):
            self._scores = {**self._stored(), **self._scores}
            write_json(self._path, self._scores)

    def _stored(self) -> dict[str, Any]:
        return read_json(self._path) if self._path.exists() else {}

    def _score(self, name: str, shape: Any) -> Any:
        """A score of the shape that is expected. UserError where the file holds something else."""
        try:
            require(self._scores[name], shape, f"{self._path}: {name!r}")
        except UserError as error:
            raise UserError(f"{error}. Move the file away, and everything is scored again") from error
        return self._scores[name]


def _save(path: pathlib.Path, tree: Tree) -> None:
    """Write a tree whole or not at all."""
    with whole(path) as temporary:
        save_file(leaves.by_path(jax.tree.map(np.ascontiguousarray, jax.device_get(tree))), temporary)


def _load(path: pathlib.Path, shapes: Tree, seeds: int) -> Tree:
    """A tree of these shapes, one of each seed. UserError where the file is damaged, or holds another one."""
    advice = "move it away and it is made again"
    try:
        found = load_file(path)
    except Exception as error:  # safetensors raises its own kind
        raise UserError(f"{path} is damaged ({error}); {advice}") from error
    shapes = map_with_path(lambda _, shape: (seeds, *shape), shapes)
    leaves.check(found, leaves.by_path(shapes), path, advice)
    return map_with_path(lambda name, _: jnp.asarray(found[name]), shapes)
