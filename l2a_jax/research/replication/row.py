"""A row of the study: one declared value, from which its command, its hash and its settings follow.

    Row -> Settings (training, exactly `train/run.py`'s) + Measures (what is evaluated, and on how much)

`{data}` in a path stands for the folder of texts and benchmarks, so that a row says the same on every machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from dataclasses import dataclass, field
from typing import Any

from l2a_jax.data.counts import format_count
from l2a_jax.training.presets import PRESETS
from l2a_jax.training.run_files import LATER
from l2a_jax.training.settings import Settings, compiled_in, layer_of, resolve
from l2a_jax.training.tables import FIRST_PRESET, REGIME_PRESET

WIKITEXT, DIVERSE = ("wikitext={data}/train",), ("diverse={data}/train",)
TEST, VALID = "{data}/eval/wikitext2_test.raw.txt", "{data}/eval/wikitext2_valid.raw.txt"
BENCHMARKS = ("hellaswag", "piqa", "arc_challenge")
_LATER = {field.name: field.default for field in dataclasses.fields(Settings)
          if field.name in LATER - {"unroll", "flip", "attention_layers", "given"}}
"""Settings that came after the first rows were run, with what those rows did (the defaults): left out of their hash."""
_SPELLED = {"tokens": lambda n: format_count(n) if _exact(n) else str(n)}


@dataclass(frozen=True)
class Measures:
    """What a trained row is asked. `tasks`: perplexity, audit, contexts, needle, absorption, collapse, benchmarks,
    task_controls, reach, ruler, all_routed, or instruments by name. Lengths are tokens; None: all there is.

    The audit scores the first `audit_windows` windows; `contexts` are further window lengths of the same text, of which
    `context_tokens` are scored; `controls` repeats the needle under random decisions and a static choice of layers.
    `held_out`: training looks at held-out text of its own sources now and then. `faults`: those of the autopsy, by name
    (none: all of them). `under`: the row whose learned decisions these weights are evaluated under, and the share of
    tokens that the other decisions route in each layer. `far_context`: windows of reach; RULER is asked
    `ruler_items` prompts a task and length. `all_routed` asks all of this row again with everything routed.
    """

    tasks: tuple[str, ...] = ("perplexity", "audit", "needle", *BENCHMARKS)
    text: str = TEST
    context: int = 2_048
    windows: int | None = None
    audit_windows: int = 32
    audit_seeds: int = 2
    contexts: tuple[int, ...] = ()
    context_tokens: int = 131_072
    needle_lengths: tuple[int, ...] = (2_048,)
    needle_depths: int = 5
    needle_seeds: int = 8
    haystack: str = VALID
    controls: bool = False
    limit: int | None = None
    task_data: str = "{data}/eval"
    held_out: bool = True
    faults: tuple[str, ...] = ()
    under: tuple[str, tuple[float, ...]] | None = None
    far_context: int = 32_768
    ruler_lengths: tuple[int, ...] = (4_096, 8_192, 16_384, 32_768)
    ruler_items: int = 25


@dataclass(frozen=True)
class Row:
    """`given` are `train/run.py`'s flags beyond regime, model and data, by name, in pairs. `baseline` names the row
    that differences are taken with. `factors` say where a row stands in a designed experiment. `not_run`: why this row
    is only a command."""

    name: str
    group: str
    question: str
    size: str
    regime: str
    given: tuple[tuple[str, Any], ...] = ()
    data: tuple[str, ...] = DIVERSE
    measures: Measures = field(default_factory=Measures)
    baseline: str | None = None
    factors: tuple[tuple[str, str], ...] = ()
    not_run: str | None = None

    def settings(self, model: str = "MODEL", data_dir: str = "DATA") -> Settings:
        """The very settings of `train/run.py`; UserError where they contradict."""
        data = tuple(entry.replace("{data}", data_dir) for entry in self.data)
        return resolve(self.regime, {**dict(self.given), "model": model, "data": data}, begins=FIRST_PRESET)

    def flags(self, model: str = "MODEL", data_dir: str = "DATA", run_dir: str | None = None) -> list[str]:
        """The arguments of `train/run.py` that train this row."""
        out = ["--regime", self.regime, "--model", model, "--data",
               *(entry.replace("{data}", data_dir) for entry in self.data)]
        first = FIRST_PRESET.get(self.regime)
        if first is not None and PRESETS[first].values != PRESETS[REGIME_PRESET[self.regime]].values:
            out += ["--preset", first]
        for name, value in self.given:
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                out.append(f"--{flag}" if value else f"--no-{flag}")
            elif isinstance(value, tuple):
                out += [f"--{flag}", ",".join(map(str, value))]
            else:
                out += [f"--{flag}", _SPELLED.get(name, str)(value)]
        return [*out, *(() if run_dir is None else ("--run-dir", run_dir))]

    def commands(self, model: str = "MODEL", data_dir: str = "DATA") -> list[str]:
        """The commands that repeat this row one by one: training, then evaluation. Decisions that training forced are
        evaluated by the study alone."""
        m, run_dir = self.measures, f"runs/{self.name}"
        lines = [] if self.regime == "baseline" else [
            f"python train/run.py {shlex.join(self.flags(model, data_dir, run_dir))}"]
        if dict(self.given).get("forced") is not None:
            return lines
        source = [model, "--out", run_dir] if self.regime == "baseline" else [run_dir]
        own = [name for name in m.tasks if name in ("perplexity", "collapse")]
        if own:
            text = ["--text", m.text, "--context", m.context, "--audit-seeds", m.audit_seeds]
            lines.append(_evaluation([*source, "--tasks", ",".join(own), *text,
                                      *(("--max-windows", m.windows) if m.windows else ())], data_dir))
        if "contexts" in m.tasks:
            lines += [_evaluation([source[0], "--tasks", "perplexity", "--text", m.text, "--context", context,
                                   "--max-windows", max(1, m.context_tokens // context), "--out",
                                   f"{run_dir}-{context}"], data_dir) for context in m.contexts]
        if "needle" in m.tasks:
            lines.append(_evaluation([*source, "--tasks", "needle", "--needle-lengths",
                                      ",".join(map(str, m.needle_lengths)), "--needle-depths", m.needle_depths,
                                      "--needle-seeds", m.needle_seeds, "--haystack", m.haystack], data_dir))
        if "reach" in m.tasks:
            lines.append(_evaluation([*source, "--tasks", "reach", "--text", m.text, "--context", m.far_context,
                                      "--audit-seeds", m.audit_seeds], data_dir))
        if "ruler" in m.tasks:
            lines.append(_evaluation([*source, "--tasks", "ruler", "--lengths", ",".join(map(str, m.ruler_lengths)),
                                      "--ruler-items", m.ruler_items, "--haystack", m.haystack], data_dir))
        tasks = [name for name in m.tasks if name in BENCHMARKS]
        if tasks:
            lines.append(_evaluation([*source, "--tasks", ",".join(tasks), "--task-data", m.task_data,
                                      *(("--limit", m.limit) if m.limit else ())], data_dir))
        return lines

    @property
    def program(self) -> tuple:
        """What rows must share to share a compiled training step, from their settings alone: nothing is opened."""
        s = self.settings()
        return self.size, layer_of(s), compiled_in(s)

    @property
    def training_hash(self) -> str:
        """Of everything that decides what is trained, by content and not by where files lie."""
        fields = dataclasses.asdict(self.settings(self.size, "DATA"))
        return digest({name: value for name, value in fields.items()
                       if name not in ("given", "preset") and (name, value) not in _LATER.items()})

    def task_hash(self, task: str) -> str:
        """Of everything that decides the result of one evaluation of a trained row."""
        m = self.measures
        text = (m.text, m.context, m.windows)
        parts = {
            "perplexity": text, "audit": (m.text, m.context, m.audit_windows, m.audit_seeds), "collapse": text,
            "absorption": (m.text, m.context, m.audit_windows, m.audit_seeds),
            "contexts": (m.text, m.contexts, m.context_tokens),
            "needle": (m.needle_lengths, m.needle_depths, m.needle_seeds, m.haystack, m.controls),
            **{name: (m.limit, m.task_data) for name in (*BENCHMARKS, "task_controls")},
            "thresholds": (m.text, m.context, m.audit_windows, m.needle_lengths, m.needle_depths, m.needle_seeds,
                           m.haystack),
            "reach": (m.text, m.far_context, m.audit_seeds),
            "ruler": (m.ruler_lengths, m.ruler_items, m.haystack),
            "all_routed": (*text, m.contexts, m.context_tokens, m.needle_lengths, m.needle_depths, m.needle_seeds,
                           m.haystack, m.limit, m.task_data, sorted({"contexts", "needle", *BENCHMARKS} & {*m.tasks})),
            "under": (m.text, m.context, m.audit_windows, m.under),
            "picture": (m.context, "beyond the window"),
            **({"autopsy": (m.text, m.context, m.audit_windows, m.faults)} if m.faults else {}),
        }
        return digest([task, parts.get(task, (m.text, m.context, m.audit_windows))])

    def accepts(self, task: str, hash_: str) -> bool:
        """Whether a result of this hash answers `task`: the same question, or a benchmark's over all its items."""
        whole = dataclasses.replace(self, measures=dataclasses.replace(self.measures, limit=None))
        return hash_ in (self.task_hash(task), whole.task_hash(task))

    def with_limit(self, limit: int | None) -> Row:
        """The row with the first `limit` items of every benchmark only."""
        return self if limit is None else dataclasses.replace(
            self, measures=dataclasses.replace(self.measures, limit=limit))


def digest(value: Any) -> str:
    """Twelve hexadecimal digits of a JSON value's hash."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=list).encode()).hexdigest()[:12]


def _evaluation(arguments: list, data_dir: str) -> str:
    return "python eval/run.py " + shlex.join(str(part).replace("{data}", data_dir) for part in arguments)


def _exact(count: int) -> bool:
    from l2a_jax.data.counts import parse_count

    return parse_count(format_count(count)) == count
