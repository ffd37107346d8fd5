"""Bytes that a token reads in a layer's FFN, by how its neurons are chosen."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from powerinfer_tools.artifact.layout import TensorPlan, matrix_type
from powerinfer_tools.checkpoint.config import Config


@dataclass(frozen=True)
class FfnCosts:
    """Bytes of weight rows in one FFN. A neuron: one row that decides (select) and `further` rows where it fires.

    taking_part: of the neurons, the share that a token's experts have.
    """

    n_embd: int
    n_ff: int
    further: int
    quant: str
    taking_part: float = 1.0

    @classmethod
    def of(cls, config: Config, quant: str) -> "FfnCosts":
        return cls(config.n_embd, config.n_ff, config.n_rows - 1, quant, config.taking_part)

    def row(self, length: int) -> int:
        """Bytes of one matrix row of `length` numbers."""
        return TensorPlan("", matrix_type(self.quant, length), (length,)).n_bytes

    @property
    def neuron_row(self) -> int:
        return self.row(self.n_embd)

    def asking(self, rank: int) -> int:
        """Bytes of asking the predictor about one neuron: its output row and its bias."""
        return self.row(rank) + 4

    def gate(self, fired: float) -> float:
        """Bytes a token in mode gate, `fired` neurons firing: all select rows, the further rows of those that fire."""
        return self.neuron_row * (self.taking_part * self.n_ff + self.further * fired)

    def predictor(self, rank: int, always: int, computed: float, found: float) -> float:
        """Bytes a token in mode predictor.

        computed: neurons whose select row is read (the `always` first ones and those let through); found: those of
        them that fire.
        """
        asked = rank * self.neuron_row + self.taking_part * (self.n_ff - always) * self.asking(rank)
        return asked + self.neuron_row * (computed + self.further * found)

    def always(self, rank: int, let_through: npt.NDArray[np.floating]) -> int:
        """The prefix of the stored order that is cheaper computed than asked about.

        let_through: share of tokens for which the predictor lets each neuron through, in the stored order.
        """
        spared = self.taking_part * self.asking(rank) + self.neuron_row * (let_through - self.taking_part)
        return int(np.argmax(np.concatenate([[0.0], np.cumsum(spared)])))

    def least(self, rank: int, fired: float) -> float:
        """Bytes a token if a predictor of this rank made no mistake."""
        return self.predictor(rank, 0, fired, fired)
