"""Teacher and student: the reference's layers with all weights in memory, the student's FFN trainable.

Attention, embedding and output matrix are shared and never change. With bfloat16, matrices that do not learn are kept
in it and products are computed in it; what learns, and the residual stream, stay float32.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import linear, relu

from powerinfer_tools.checkpoint import Checkpoint, Config
from powerinfer_tools.reference import Ffn, Layer, load_layer
from powerinfer_tools.reference.ffn import activate
from powerinfer_tools.reference.norm import Norm, load_norm
from powerinfer_tools.reference.weights import tensor

SAMPLE = 8192  # activations of a window and layer that thresholds are chosen from


def choose_precision(asked: str, device: str) -> str:
    """float32 or bfloat16; auto: bfloat16 where the device multiplies it faster than float32."""
    if asked != "auto":
        return asked
    able: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bfloat16" if device == "cuda" or able.get("avx512_bf16") or able.get("amx_bf16") else "float32"


@dataclass
class Teacher:
    """A dense model. embedding, head: [n_vocab, n_embd], one tensor where they are tied; dtype: of products."""

    config: Config
    device: str
    dtype: torch.dtype
    layers: list[Layer]
    embedding: Tensor
    output_norm: Norm
    head: Tensor

    def precision(self) -> AbstractContextManager[object]:
        """In which teacher and student are run."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device, self.dtype)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [b, n] -> [b, n, n_embd] float32."""
        return self.embedding[tokens].float()

    def logits(self, hidden: Tensor) -> Tensor:
        """The stream after the last layer [.., n_embd] -> [.., n_vocab]."""
        return linear(self.output_norm(hidden), self.head)

    @torch.no_grad()
    def streams(self, tokens: Tensor) -> list[Tensor]:
        """The residual stream after each layer, [b, n, n_embd] each."""
        hidden, streams = self.embed(tokens), []
        for layer in self.layers:
            hidden = layer(hidden)
            streams.append(hidden)
        return streams


def load_teacher(checkpoint: Checkpoint, device: str, precision: str) -> Teacher:
    """The model. precision: float32 or bfloat16; the FFN stays float32 until a student has taken it over."""
    config, dtype = checkpoint.config, {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
    embedding = tensor(checkpoint, "token_embd.weight", device).to(dtype)
    head = embedding if config.tied else tensor(checkpoint, "output.weight", device).to(dtype)
    layers = [load_layer(checkpoint, i, device) for i in range(config.n_layer)]
    for layer in layers:
        for part in (layer.attn.q, layer.attn.k, layer.attn.v, layer.attn.output):
            part.weight = part.weight.to(dtype)
    return Teacher(config, device, dtype, layers, embedding, load_norm(checkpoint, "output_norm", device), head)


@dataclass
class Projection:
    """x -> (W + A B) x + bias. weight: W [n_out, n_in]; a: [n_out, rank], b: [rank, n_in], or None."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight, self.bias)
        return y if self.a is None or self.b is None else y + linear(linear(x, self.b), self.a)


@dataclass
class Firing:
    """What a layer's neurons did in each of b windows.

    share: [b], of neurons that fired; magnitudes: [b, SAMPLE] of the activation before the cut;
    pressure: [b], how much gate activation there is, whatever the scale of the gate.
    """

    share: Tensor
    magnitudes: Tensor
    pressure: Tensor


@dataclass
class StudentFfn:
    """Ffn with trainable matrices. The gradient through a cut is the activation's where kept, else 0."""

    activation: str
    threshold: float
    gate: Projection
    up: Projection
    down: Projection

    def __call__(self, x: Tensor) -> tuple[Tensor, Firing]:
        """[b, n, n_embd] -> the same, and what fired."""
        gate, up, h = self.neurons(x)
        return self.down(h), self._firing(gate, up, h)

    def neurons(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """gate and up before their activation, and h, [b, n, n_ff] each."""
        gate, up = self.gate(x), self.up(x)
        a = activate(gate.float(), self.activation, self.threshold).to(gate.dtype)  # bfloat16 would round the cut
        return gate, up, a * (relu(up) if self.activation == "drelu" else up)

    def _firing(self, gate: Tensor, up: Tensor, h: Tensor) -> Firing:
        with torch.no_grad():
            share = (h != 0).flatten(1).float().mean(1)
            places = _places(gate[0].numel(), gate.device)
            magnitudes = activate(gate.flatten(1)[:, places].float(), self.activation).abs()
            if self.activation == "drelu":  # what is to fire must have both signs right
                magnitudes = magnitudes * (up.flatten(1)[:, places] > 0)
        return Firing(share, magnitudes, _pressure(gate) if self.activation == "relu" else torch.zeros_like(share))


def _pressure(gate: Tensor) -> Tensor:
    """Sum of relu(gate) over the norm of the gate, between 0 and 1, mean over each window: [b, n, n_ff] -> [b]."""
    norm = torch.linalg.vector_norm(gate, dim=-1).detach() * gate.shape[-1] ** 0.5
    pressure: Tensor = relu(gate).sum(-1) / (norm + 1e-6)  # a token
    return pressure.float().mean(1)


@lru_cache(maxsize=8)
def _places(n: int, device: torch.device) -> Tensor:
    """The same places for all layers and steps, spread at random: any stride would meet the same neurons again."""
    generator = torch.Generator().manual_seed(n)
    return torch.randint(n, (min(n, SAMPLE),), generator=generator).to(device)


@dataclass
class StudentLayer:
    """layer: with norms of its own, whose FFN is the teacher's; ffn takes its place."""

    layer: Layer
    ffn: StudentFfn

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Firing]:
        """The stream after the layer, and what fired."""
        after, x = self.layer.attention(hidden)
        y, firing = self.ffn(x)
        return after + y, firing


@dataclass
class Student:
    """What the teacher becomes. trained: every tensor that learns, by its name in a checkpoint.

    A patched matrix has two: its name with .a and .b behind.
    """

    teacher: Teacher
    layers: list[StudentLayer]
    output_norm: Norm
    trained: dict[str, Tensor]

    def logits(self, hidden: Tensor) -> Tensor:
        """As the teacher's."""
        return linear(self.output_norm(hidden), self.teacher.head)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """One activation threshold a layer."""
        return tuple(layer.ffn.threshold for layer in self.layers)

    def set_thresholds(self, thresholds: list[float]) -> None:
        """Rounded to float32, in which they are kept and compared."""
        for layer, threshold in zip(self.layers, torch.tensor(thresholds).tolist(), strict=True):
            layer.ffn.threshold = threshold


def make_student(teacher: Teacher, activation: str, rank: int | None, seed: int) -> Student:
    """A student with the teacher's weights and another activation; its patches begin as zero."""
    trained: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)

    def learn(name: str, weight: Tensor) -> Tensor:
        trained[name] = weight.float().clone().requires_grad_()
        return trained[name]

    def norm(name: str, of: Norm) -> Norm:
        return replace(of, weight=learn(f"{name}.weight", of.weight))

    def projection(name: str, weight: Tensor, bias: Tensor | None) -> Projection:
        own_bias = None if bias is None else learn(f"{name}.bias", bias)
        if rank is None:
            return Projection(learn(f"{name}.weight", weight), own_bias)
        n_out, n_in = weight.shape
        a = torch.zeros(n_out, rank, device=weight.device)
        b = torch.randn(rank, n_in, generator=generator).to(weight.device) / n_in**0.5
        return Projection(
            weight.to(teacher.dtype), own_bias, learn(f"{name}.weight.a", a), learn(f"{name}.weight.b", b)
        )

    def layer(i: int, of: Layer) -> StudentLayer:
        ffn, n = of.ffn, f"blk.{i}"
        assert ffn.gate is not None
        gate = projection(f"{n}.ffn_gate", ffn.gate, ffn.gate_bias)
        up = projection(f"{n}.ffn_up", ffn.up, ffn.up_bias)
        down = projection(f"{n}.ffn_down", ffn.down, ffn.down_bias)
        own = StudentFfn(activation, 0.0, gate, up, down)
        attn_norm, ffn_norm = norm(f"{n}.attn_norm", of.attn_norm), norm(f"{n}.ffn_norm", of.ffn_norm)
        return StudentLayer(replace(of, attn_norm=attn_norm, ffn_norm=ffn_norm), own)

    layers = [layer(i, of) for i, of in enumerate(teacher.layers)]
    for of in teacher.layers:
        _freeze(of.ffn, teacher.dtype)
    return Student(teacher, layers, norm("output_norm", teacher.output_norm), trained)


def _freeze(ffn: Ffn, dtype: torch.dtype) -> None:
    """After the student has its float32 copy."""
    assert ffn.gate is not None
    ffn.gate, ffn.up, ffn.down = ffn.gate.to(dtype), ffn.up.to(dtype), ffn.down.to(dtype)
