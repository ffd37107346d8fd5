"""Sampling: each rule against its definition, and the same seed the same tokens."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from powerinfer_tools.engine import Engine, Sampling, generate
from powerinfer_tools.engine.engine import Logits
from powerinfer_tools.engine.generate import Context
from powerinfer_tools.errors import PowerinferError
from tests.artifacts import make_artifact
from tests.tiny import make_llama

PLAIN = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
PROMPT = [5, 17, 99, 3]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sampling")
    make_llama(folder / "model")
    make_artifact(folder / "model", folder / "a.gguf")
    return folder / "a.gguf"


@pytest.fixture
def engine(artifact: Path) -> Engine:
    return Engine(artifact)


def logits_of(engine: Engine) -> np.ndarray:
    logits = engine.prefill(PROMPT, logits=True)
    assert logits is not None
    return logits.astype(np.float64)


def softmax(x: np.ndarray) -> np.ndarray:
    p = np.exp(x - x.max())
    return p / p.sum()


def draws(engine: Engine, sampling: Sampling, n: int = 4000, recent: tuple[int, ...] = ()) -> Counter[int]:
    engine.seed(1)
    return Counter(engine.sample(sampling, recent) for _ in range(n))


def test_greedy_takes_the_best(engine: Engine) -> None:
    assert engine.sample is not None
    best = int(logits_of(engine).argmax())
    assert set(draws(engine, Sampling(temperature=0), 20)) == {best}
    assert set(draws(engine, Sampling(temperature=5, top_k=1), 20)) == {best}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_distribution(engine: Engine, temperature: float) -> None:
    p = softmax(logits_of(engine) / temperature)
    found = draws(engine, Sampling(temperature=temperature, top_k=0, top_p=1.0, min_p=0.0), 20000)
    for token in np.argsort(-p)[:5]:
        sigma = (p[token] * (1 - p[token]) / 20000) ** 0.5
        assert abs(found[int(token)] / 20000 - p[token]) < 5 * sigma


def test_top_k_top_p_min_p_keep_what_they_define(engine: Engine) -> None:
    p = softmax(logits_of(engine))
    order = np.argsort(-p)
    before = np.concatenate([[0], np.cumsum(p[order])[:-1]])
    cases = {
        Sampling(temperature=1, top_k=3, top_p=1.0, min_p=0.0): order[:3],
        Sampling(temperature=1, top_k=0, top_p=0.3, min_p=0.0): order[before < 0.3],
        Sampling(temperature=1, top_k=0, top_p=1.0, min_p=0.4): order[p[order] >= 0.4 * p.max()],
    }
    for sampling, kept in cases.items():
        assert set(draws(engine, sampling)) == set(kept.tolist())


def test_repeat_penalty_lowers_what_was_said(engine: Engine) -> None:
    logits = logits_of(engine)
    best = int(logits.argmax())
    penalised = logits.copy()
    penalised[best] = logits[best] / 1e4 if logits[best] > 0 else logits[best] * 1e4
    greedy = Sampling(temperature=0, repeat_penalty=1e4)
    assert engine.sample(greedy, [best]) == int(penalised.argmax()) != best
    assert engine.sample(Sampling(temperature=0, repeat_penalty=1e4, repeat_last_n=0), [best]) == best


@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "repeat_penalty"])
def test_bad_sampling_is_refused(engine: Engine, field: str) -> None:
    logits_of(engine)
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(PowerinferError, match=f"{field}: expected"):
            engine.sample(Sampling(**{field: value}))


def test_same_seed_same_tokens_whatever_the_threads(artifact: Path) -> None:
    def run(seed: int, threads: int) -> list[int]:
        with Engine(artifact, threads=threads) as engine:
            return [t.id for t in generate(engine, PROMPT, PLAIN, max_tokens=40, seed=seed)]

    assert run(7, 1) == run(7, 2) == run(7, 3)
    assert run(7, 1) != run(8, 1)


def test_generate_ends_at_stop_length_and_context(artifact: Path) -> None:
    with Engine(artifact, ctx_size=16) as engine:
        free = list(generate(engine, PROMPT, PLAIN, max_tokens=6, seed=3))
        assert [t.finish_reason for t in free] == [None] * 5 + ["length"]
        stopped = list(generate(engine, PROMPT, PLAIN, max_tokens=6, stop_ids={free[2].id}, seed=3))
        assert [t.id for t in stopped] == [t.id for t in free[: len(stopped)]]
        assert stopped[-1].finish_reason == "stop"
        full = list(generate(engine, PROMPT, PLAIN, max_tokens=99, seed=3))
        assert len(full) == 16 - len(PROMPT)
        with pytest.raises(PowerinferError, match="the prompt has 16 tokens: expected fewer than the context of 16"):
            list(generate(engine, [1] * 16, PLAIN, max_tokens=1))


def test_an_interrupted_prompt_is_continued_where_it_stopped(artifact: Path) -> None:
    prompt, greedy, pieces = [(7 * i) % 300 for i in range(200)], Sampling(temperature=0), list[int]()

    class Interrupted(Engine):
        def prefill(self, tokens: Sequence[int], logits: bool = False) -> Logits | None:
            pieces.append(len(tokens))
            found = super().prefill(tokens, logits)
            if len(pieces) == 1:
                raise KeyboardInterrupt
            return found

    with Interrupted(artifact) as engine, Engine(artifact) as fresh:
        context = Context()
        with pytest.raises(KeyboardInterrupt):
            next(generate(engine, prompt, greedy, max_tokens=8, context=context))
        found = [t.id for t in generate(engine, prompt, greedy, max_tokens=8, context=context)]
        assert found == [t.id for t in generate(fresh, prompt, greedy, max_tokens=8)]
        assert max(pieces) < len(prompt)


def test_a_prompt_that_continues_the_context_gives_what_a_fresh_one_gives(artifact: Path) -> None:
    greedy = Sampling(temperature=0)
    with Engine(artifact) as engine:
        context = Context()
        first = [t.id for t in generate(engine, PROMPT, greedy, max_tokens=10, context=context)]
        assert context.ids == PROMPT + first[:-1]
        engine.reset_stats()
        longer = PROMPT + first[:-1] + [42, 43]
        again = [t.id for t in generate(engine, longer, greedy, max_tokens=10, context=context)]
        assert engine.stats().n_prefill == 2
    with Engine(artifact) as engine:
        for token in longer[:-2]:
            engine.decode(token)
        engine.prefill(longer[-2:])
        expected = [engine.sample(greedy)]
    assert again[0] == expected[0]
