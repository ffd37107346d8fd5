"""The teacher, token by token: rows at one position, their keys and values kept."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from powerinfer_tools.reference import Layer
from powerinfer_tools.sparsify.model import Teacher


def row_bytes(teacher: Teacher, length: int) -> int:
    """Of the keys and values of one row."""
    config = teacher.config
    return 2 * config.n_layer * config.n_head_kv * config.head_dim * length * teacher.dtype.itemsize


class Decoder:
    """keys, values: a tensor a layer, [rows, n_head_kv, length, head_dim]; the first `position` of them are set."""

    def __init__(self, teacher: Teacher, length: int) -> None:
        self.teacher, self.length, self.position = teacher, length, 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def begin(self, prompt: list[int], rows: int) -> Tensor:
        """The same prompt in all rows, computed once: logits [rows, n_vocab]."""
        teacher, self.position = self.teacher, len(prompt)
        hidden = teacher.embed(torch.tensor([prompt], device=teacher.device))
        for layer in teacher.layers:
            _, k, v = layer.attn.heads(layer.attn_norm(hidden))
            self.keys.append(self._room(k, rows))
            self.values.append(self._room(v, rows))
            hidden = layer(hidden)
        return teacher.logits(hidden[:, -1]).expand(rows, -1)

    def _room(self, x: Tensor, rows: int) -> Tensor:
        room = torch.empty(rows, x.shape[1], self.length, x.shape[3], dtype=self.teacher.dtype, device=x.device)
        room[:, :, : self.position] = x
        return room

    def step(self, tokens: list[int]) -> Tensor:
        """One more token in each row: logits [rows, n_vocab]."""
        teacher = self.teacher
        hidden = teacher.embed(torch.tensor(tokens, device=teacher.device)[:, None])
        for i, layer in enumerate(teacher.layers):
            after = hidden + self._attend(layer, hidden, i)
            hidden = after + layer.ffn(layer.ffn_input(hidden, after))
        self.position += 1
        return teacher.logits(hidden[:, 0])

    def _attend(self, layer: Layer, hidden: Tensor, i: int) -> Tensor:
        """[rows, 1, n_embd] -> the same; the query heads of a key head stand in the place of positions."""
        q, k, v = layer.attn.heads(layer.attn_norm(hidden), self.position)
        self.keys[i][:, :, self.position], self.values[i][:, :, self.position] = k[:, :, 0], v[:, :, 0]
        end = self.position + 1
        grouped = q.reshape(*k.shape[:2], -1, k.shape[3]).to(self.teacher.dtype)  # [rows, n_head_kv, group, head_dim]
        mixed = scaled_dot_product_attention(grouped, self.keys[i][:, :, :end], self.values[i][:, :, :end])
        return layer.attn.merge(mixed.reshape(len(hidden), 1, -1))

    def keep(self, rows: list[int]) -> None:
        """Drops all other rows."""
        chosen = torch.tensor(rows, device=self.teacher.device)
        self.keys = [x[chosen] for x in self.keys]
        self.values = [x[chosen] for x in self.values]
