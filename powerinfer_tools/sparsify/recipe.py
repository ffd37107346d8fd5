"""What a sparsification is asked for, checked before anything is read or computed."""

from dataclasses import dataclass

from powerinfer_tools.checkpoint.source import Checkpoint
from powerinfer_tools.errors import PowerinferError

ACTIVATIONS = {"cut": "silu", "relu": "relu", "fatrelu": "fatrelu", "drelu": "drelu"}
"""The student's activation by the word that asks for it; cut: silu, 0 where |silu(gate)| is below a threshold."""

PRECISIONS = ("auto", "float32", "bfloat16")
FULL_RATE, PATCH_RATE = 3e-4, 3e-3  # peak learning rates: of whole matrices, of low-rank patches


@dataclass(frozen=True)
class Recipe:
    """All that decides the result, besides the model and the texts.

    active: wanted share of neurons that fire; n_tokens: of training; rank: of the patches, None to train whole
    matrices; rate: peak learning rate, None for the default; step_tokens: tokens of one optimiser step;
    self_tokens: of chat that the model writes itself; chat_share: of the training windows, taken from those chats;
    precision: float32, bfloat16 or auto.
    """

    to: str = "cut"
    active: float = 0.25
    n_tokens: int = 32768
    rank: int | None = None
    rate: float | None = None
    step_tokens: int = 1024
    window: int = 512
    self_tokens: int = 0
    chat_share: float = 0.5
    precision: str = "auto"
    seed: int = 0

    @property
    def activation(self) -> str:
        """As a Config names it."""
        return ACTIVATIONS[self.to]

    @property
    def peak_rate(self) -> float:
        """The learning rate after warming up."""
        return self.rate or (PATCH_RATE if self.rank else FULL_RATE)

    @property
    def step_windows(self) -> int:
        """Windows of one optimiser step."""
        return max(1, self.step_tokens // self.window)

    @property
    def n_steps(self) -> int:
        return max(1, round(self.n_tokens / (self.step_windows * self.window)))


def check(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Errors: a model that is sparse already or has no gate, an unknown activation, a number out of its range."""
    config = checkpoint.config
    if config.exactly_sparse:
        raise PowerinferError(
            f"{checkpoint.path}: its activation, {config.activation}, gives exact zeros already: "
            "powerinfer build takes this model as it is",
            "usage",
        )
    if not config.gated or config.learned_positions or config.sub_norms or config.softcap or config.experts:
        raise PowerinferError(
            f"{checkpoint.path}: expected a gated FFN without experts, no learned positions, sub-norms or softcap: "
            "sparsify trains no other model",
            "unsupported",
        )
    if recipe.to not in ACTIVATIONS:
        raise PowerinferError(f"--to: expected one of {', '.join(ACTIVATIONS)}, found {recipe.to}", "usage")
    if recipe.precision not in PRECISIONS:
        raise PowerinferError(
            f"--precision: expected one of {', '.join(PRECISIONS)}, found {recipe.precision}", "usage"
        )
    if recipe.rank is not None and recipe.to != "cut":
        raise PowerinferError(
            f"--rank goes with --to cut: {recipe.to} begins with a new down matrix, which no patch of low rank holds",
            "usage",
        )
    _check_numbers(recipe, config.n_ctx)


def _check_numbers(recipe: Recipe, n_ctx: int) -> None:
    for name, value, low, high in (
        ("--active", recipe.active, 0.0, 1.0),
        ("--lr", recipe.peak_rate, 0.0, 1.0),
        ("--chat-share", recipe.chat_share, 0.0, 1.0),
    ):
        if not low < value <= high:
            raise PowerinferError(f"{name}: expected a number above {low:g}, at most {high:g}, found {value}", "usage")
    if not 2 <= recipe.window <= n_ctx:
        raise PowerinferError(f"--window: expected 2 to {n_ctx}, the model's context, found {recipe.window}", "usage")
