"""Our models as lm-eval sees them. Importing this file imports lm-eval, which takes seconds: import it late."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from l2a_jax.config import position_limit
from l2a_jax.errors import UserError, needs, shown
from l2a_jax.evaluation.continuations import Prompt, continuations
from l2a_jax.evaluation.loglikelihood import Request, log_likelihoods
from l2a_jax.sources import Pretrained

TemplateLM = needs("lm_eval.api.model", "eval", "a benchmark").TemplateLM
NEW_TOKENS = 256
"""How many a text may have where its task does not say; lm-eval's own default."""
GREEDY = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}
"""What a task may say of its texts: the last two mean nothing where nothing is drawn."""


def greedy(settings: dict[str, Any], where: str) -> tuple[tuple[str, ...], int]:
    """(texts that end a text, its most tokens) as a task's `generation_kwargs` say them, read as lm-eval does.

    UserError, beginning with `where`, on settings that are not those of greedy decoding.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    asked = normalize_gen_kwargs(settings, NEW_TOKENS)
    if asked["do_sample"]:
        raise UserError(f"{where} draws its texts at temperature {asked.get('temperature', 1)}; only greedy decoding "
                        "is served (temperature 0)")
    others = sorted(asked.keys() - GREEDY)
    if others:
        raise UserError(f"{where} sets {others[0]} = {shown(asked[others[0]])} for its texts; greedy decoding has only "
                        f"{', '.join(sorted(GREEDY))}")
    return tuple(stop for stop in asked["until"] if stop), asked["max_gen_toks"]


class HarnessModel(TemplateLM):
    """Log-likelihoods and greedy texts for lm-eval's tasks.

    Contexts and continuations become tokens by TemplateLM's rules (encoded whole, then cut where the context ends;
    spaces at the context's end belong to the continuation; an empty context is the prefix token), all in one batch.
    `requests` and `truncated` count those of the last call, and of them those that were cut from the left.
    `batch_tokens` and `mesh` are those of `log_likelihoods` and `continuations`. Raises UserError where the model has
    no tokenizer or no prefix token.
    """

    def __init__(self, model: Pretrained, backend: str = "auto", label: str = "log-likelihoods",
                 batch_tokens: int | None = None, mesh: Mesh | None = None):
        super().__init__()
        if model.tokenizer is None:
            raise UserError("the model has no tokenizer, which tasks need; expected tokenizer.json beside its weights")
        self.model, self.tokenizer = model, model.tokenizer
        self.label, self._passes = label, {"backend": backend, "batch_tokens": batch_tokens,
                                           "mesh": mesh}
        self.requests = self.truncated = 0
        if self.prefix_token_id is None:
            raise UserError("the model's tokenizer names neither bos_token nor eos_token; an empty context needs one")

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int | None:
        """What an empty context becomes: bos_token where the tokenizer names one, as lm-eval's HFLM has it."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens is not False)

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Request]:
        """(context, continuation) texts as requests; each distinct text is tokenised once, all of them together.

        UserError on a continuation without a token of its own (empty, or merged into the context's last): lm-eval
        refuses it too.
        """
        moved = []
        for context, continuation in pairs:
            stripped = context.rstrip()
            moved.append((stripped, context[len(stripped) :] + continuation, context == ""))
        with_context = dict.fromkeys(text for context, rest, bare in moved if not bare
                                     for text in (context, context + rest))
        without = dict.fromkeys(rest for _, rest, bare in moved if bare)
        ids = dict(zip(with_context, self.tokenizer.encode_batch(list(with_context)), strict=True))
        alone = dict(zip(without, self.tokenizer.encode_batch(list(without), add_special_tokens=False), strict=True))
        requests = []
        for (context, rest, bare), pair in zip(moved, pairs, strict=True):
            if not bare:
                request = Request(ids[context], ids[context + rest][len(ids[context]) :])
            elif alone[rest][:1] == [self.prefix_token_id]:
                request = Request(alone[rest][:1], alone[rest][1:])
            else:
                request = Request([self.prefix_token_id], alone[rest])
            if not request.context or not request.continuation:
                empty = "continuation" if request.context else "context"
                raise UserError(f"{self.label}: in {shown(pair[0])} + {shown(pair[1])} the {empty} has no token of "
                                "its own, so there is nothing to score")
            requests.append(request)
        return requests

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability in nats, would greedy decoding write it) of each request."""
        return self._score(self.encode_pairs([request.args for request in requests]))

    def _loglikelihood_tokens(self, requests: list, **kwargs: Any) -> list[tuple[float, bool]]:
        return self._score([Request(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Log-probability in nats of each whole text, in windows as long as the model's positions allow."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        limit = position_limit(self.model.config, self.model.l2a_config)
        windows, counts = [], []
        for ids in self.tokenizer.encode_batch([request.args[0] for request in requests]):
            rolled = list(map(make_disjoint_window, get_rolling_token_windows(ids, self.prefix_token_id, limit, 1)))
            windows += [Request(*pair) for pair in rolled]
            counts.append(len(rolled))
        scores = iter(self._score(windows))
        return [sum(score for score, _ in itertools.islice(scores, count)) for count in counts]

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """The greedy continuation of each request, cut before the first of its stops."""
        contexts, settings = zip(*(request.args for request in requests), strict=True)
        prompts = []
        for ids, said in zip(self.tokenizer.encode_batch(contexts), settings, strict=True):
            until, most = greedy(said, self.label)
            prompts.append(Prompt(ids or [self.prefix_token_id], most, until))
        found = continuations(self.model, prompts, label=self.label, **self._passes)
        self.requests, self.truncated = len(prompts), int(found.truncated.sum())
        return found.texts

    def _score(self, requests: list[Request]) -> list[tuple[float, bool]]:
        scores = log_likelihoods(self.model, requests, label=self.label, **self._passes)
        self.requests, self.truncated = len(requests), int(scores.truncated.sum())
        return list(zip(scores.log_probabilities.tolist(), scores.greedy.tolist(), strict=True))
