"""The generation loop: one record a token feeds chat, generate, bench and serve."""

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from powerinfer_tools.engine.engine import Engine, Sampling
from powerinfer_tools.errors import PowerinferError

PIECE = 128  # tokens of a prompt that run together; between two pieces Ctrl-C is heard
CARD_PIECE = 256  # with a card, which is faster the more it is given: the engine's largest batch


@dataclass(frozen=True)
class Token:
    """One generated token. finish_reason is set on the last: stop (a stop id, which is this token) or length.

    seconds: since the call for the first token (its prompt included), since the token before for the others;
    sample_s: of these, drawing it.
    """

    id: int
    finish_reason: str | None
    seconds: float
    sample_s: float


class Context:
    """The token ids that an engine holds, so that a prompt that continues them is not run again."""

    def __init__(self) -> None:
        self.ids: list[int] = []


def generate(
    engine: Engine,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    max_tokens: int,
    stop_ids: Collection[int] = (),
    seed: int = 0,
    context: Context | None = None,
) -> Iterator[Token]:
    """Yields tokens that continue `prompt` until a stop id, max_tokens or the end of the context.

    `context` remembers what the engine holds: only the part of the prompt that differs is run. Without it the engine
    starts anew. Leaving the loop early keeps the engine consistent. Errors: an empty prompt, or one that fills it.
    """
    if not prompt:
        raise PowerinferError("the prompt is empty: expected at least one token", "usage")
    if len(prompt) >= engine.ctx_size:
        raise PowerinferError(
            f"the prompt has {len(prompt)} tokens: expected fewer than the context of {engine.ctx_size} (--ctx-size)",
            "usage",
        )
    context = context if context is not None else Context()
    start = time.perf_counter()
    engine.seed(seed)
    _run_prompt(engine, list(prompt), context)
    limit = min(max_tokens, engine.ctx_size - len(prompt))
    recent = list(prompt)
    for done in range(1, limit + 1):
        computed = time.perf_counter()
        token = engine.sample(sampling, recent[-sampling.repeat_last_n :] if sampling.repeat_last_n else ())
        reason = "stop" if token in stop_ids else "length" if done == limit else None
        now = time.perf_counter()
        yield Token(token, reason, now - start, now - computed)
        if reason is not None:
            return
        start = time.perf_counter()
        engine.decode(token)
        context.ids.append(token)
        recent.append(token)


def _run_prompt(engine: Engine, prompt: list[int], context: Context) -> None:
    """Brings the engine to hold exactly the prompt; at least the last token is run, for its logits."""
    if engine.position < len(context.ids):
        context.ids = context.ids[: engine.position]
    same = 0
    while same < min(len(context.ids), len(prompt) - 1) and context.ids[same] == prompt[same]:
        same += 1
    engine.truncate(same)
    context.ids = prompt[:same]
    size = CARD_PIECE if engine.info.card_bytes else PIECE
    for at in range(same, len(prompt), size):
        engine.prefill(prompt[at : at + size])
        context.ids += prompt[at : at + size]
