"""Our models as lm-eval sees them. Importing this file imports lm-eval, which takes seconds: import it late."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from l2a_jax.errors import UserError, needs, shown
from l2a_jax.evaluation.loglikelihood import Request, Scores, log_likelihoods
from l2a_jax.sources import Pretrained

TemplateLM = needs("lm_eval.api.model", "eval", "a benchmark").TemplateLM


class HarnessModel(TemplateLM):
    """Log-likelihoods for lm-eval's multiple-choice tasks.

    Contexts and continuations become tokens by TemplateLM's rules (encoded whole, then cut where the context ends;
    spaces at the context's end belong to the continuation; an empty context is the prefix token), all in one batch.
    `scores` keeps the last call's. Raises UserError where the model has no tokenizer or no prefix token.
    """

    def __init__(self, model: Pretrained, backend: str = "auto", label: str = "log-likelihoods"):
        super().__init__()
        if model.tokenizer is None:
            raise UserError("the model has no tokenizer, which tasks need; expected tokenizer.json beside its weights")
        self.model, self.tokenizer = model, model.tokenizer
        self.label, self._backend = label, backend
        self.scores: Scores | None = None
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

    def _score(self, requests: list[Request]) -> list[tuple[float, bool]]:
        self.scores = log_likelihoods(self.model, requests, backend=self._backend, label=self.label)
        return list(zip(self.scores.log_probabilities.tolist(), self.scores.greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("rolling log-likelihoods are not served; see l2a_jax.evaluation.perplexity")

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError("only multiple-choice tasks are served; see l2a_jax.inference.generate")
