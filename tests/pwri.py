"""A model file of the first PowerInfer, byte by byte from its format's description, and what it computes, in NumPy.

Only struct.pack writes it. Weights in Q4_0 are drawn as blocks, such as no quantiser would choose: rounded anew, they
would become others.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.gguf_bytes import F16, F32, Q4_0, STRING, array, gguf, scalar, tensor, text

FloatArray = npt.NDArray[np.float64]

U32, FLOAT32, INT32, BOOL = 4, 6, 5, 7
N_LAYER, N_EMBD, N_HEAD, N_HEAD_KV, N_FF, N_CTX = 12, 64, 4, 2, 160, 96
HEAD_DIM = N_EMBD // N_HEAD
RANKS = (32, 64)  # alternating: each layer has its own
EPS, OPT_EPS, OPT_OFFSET = 1e-5, 1e-5, 2
PIECES = "e t a o i n s h r l d u th he in er an the \u2581the \u2581a \u2581".split()
VOCAB = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES, "\u2581t", "\u2581th"]
N_VOCAB = len(VOCAB)
TOKENS = np.random.default_rng(5).integers(3, N_VOCAB, 8).tolist()


@dataclass
class Model:
    """used: every tensor as it is computed with, [out, in]; stored: its type and bytes in the file."""

    arch: str = "llama"
    kind: int = F16
    threshold: float | None = None
    seed: int = 31  # no logit of a predictor then is nearer than 1e-4 to the threshold 0.25, in F16
    used: dict[str, FloatArray] = field(default_factory=dict)
    stored: dict[str, tuple[int, tuple[int, ...], bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)
        self.gated, self.centred = self.arch in ("llama", "bamboo"), self.arch in ("opt", "falcon")
        self._matrix("token_embd.weight", N_VOCAB, N_EMBD, size=1.0)
        if self.arch == "opt":
            self._matrix("position_embd.weight", N_CTX + OPT_OFFSET, N_EMBD, size=0.5)
        else:
            self._matrix("output.weight", N_VOCAB, N_EMBD)
        self._norm("output_norm")
        for i in range(N_LAYER):
            self._layer(f"blk.{i}", RANKS[i % 2])

    def _layer(self, b: str, rank: int) -> None:
        opt = self.arch == "opt"
        if self.arch == "falcon":
            self._norm(f"{b}.attn_norm")  # the FFN's; attention has its own
            self._norm(f"{b}.attn_norm_2")
            self._fused(b)
        else:
            self._norm(f"{b}.attn_norm")
            self._norm(f"{b}.ffn_norm")
            self._attention_matrices(b, opt)
        for part in ("gate", "up", "down_t") if self.gated else ("up", "down_t"):
            self._matrix(f"{b}.ffn_{part}.weight", N_FF, N_EMBD)
        if opt:
            self._vector(f"{b}.ffn_up.bias", N_FF, 0.1)
            self._vector(f"{b}.ffn_down_t.bias", N_EMBD, 0.1)
        self._matrix(f"{b}.fc1.weight", rank, N_EMBD)
        self._matrix(f"{b}.fc2.weight", N_FF, rank)

    def _fused(self, b: str) -> None:
        self._matrix(f"{b}.attn_qkv.weight", N_EMBD + 2 * N_HEAD_KV * HEAD_DIM, N_EMBD)
        self.split_fused(b)
        self._matrix(f"{b}.attn_output.weight", N_EMBD, N_EMBD)

    def split_fused(self, b: str) -> None:
        kv = (len(self.used[f"{b}.attn_qkv.weight"]) - N_EMBD) // 2
        parts = np.split(self.used[f"{b}.attn_qkv.weight"], [N_EMBD, N_EMBD + kv])
        self.used |= {f"{b}.attn_{part}.weight": rows for part, rows in zip("qkv", parts, strict=True)}

    def _attention_matrices(self, b: str, opt: bool) -> None:
        kv = N_EMBD if opt else N_HEAD_KV * HEAD_DIM
        for part, n in (("q", N_EMBD), ("k", kv), ("v", kv), ("output", N_EMBD)):
            self._matrix(f"{b}.attn_{part}.weight", n, N_EMBD)
            if opt:
                self._vector(f"{b}.attn_{part}.bias", n, 0.1)
            elif part in "qk":
                self.used[f"{b}.attn_{part}.weight"] = half_split(self.used[f"{b}.attn_{part}.weight"])

    def _matrix(self, name: str, n_out: int, n_in: int, size: float | None = None) -> None:
        size = size or n_in**-0.5
        if self.kind == F16:
            halves = (size * self._rng.standard_normal((n_out, n_in))).astype("<f2")
            self._put(name, F16, halves, halves.tobytes())
            return
        scales = (size / 4 * self._rng.uniform(0.5, 1.5, (n_out, n_in // 32, 1))).astype("<f2")
        codes = self._rng.integers(4, 14, (n_out, n_in // 32, 32))  # the block's lower half, then its upper one
        packed = (codes[..., :16] | codes[..., 16:] << 4).astype(np.uint8)
        blocks = np.concatenate([scales.view(np.uint8), packed], axis=2)
        self._put(name, Q4_0, ((codes - 8) * scales.astype(np.float64)).reshape(n_out, n_in), blocks.tobytes())

    def _vector(self, name: str, n: int, size: float, around: float = 0.0) -> None:
        numbers = (around + size * self._rng.standard_normal(n)).astype("<f4")
        self._put(name, F32, numbers, numbers.tobytes())

    def _norm(self, name: str) -> None:
        self._vector(f"{name}.weight", N_EMBD, 0.1, around=1.0)
        if self.centred:
            self._vector(f"{name}.bias", N_EMBD, 0.1)

    def _put(self, name: str, kind: int, numbers: npt.NDArray[Any], data: bytes) -> None:
        self.used[name] = numbers.astype(np.float64)
        self.stored[name] = kind, numbers.shape[::-1], data

    def keys(self) -> list[bytes]:
        a, opt = self.arch.encode(), self.arch == "opt"
        sizes = {
            "context_length": N_CTX + OPT_OFFSET if opt else N_CTX,
            "embedding_length": N_EMBD,
            "block_count": N_LAYER,
            "feed_forward_length": N_FF,
            "attention.head_count": N_HEAD,
        }
        if not opt:
            sizes["attention.head_count_kv"] = N_HEAD_KV
        if self.gated:
            sizes["rope.dimension_count"] = HEAD_DIM
        pairs = [text(b"general.architecture", a), text(b"general.name", b"tiny")]
        pairs += [scalar(a + b"." + key.encode(), U32, n) for key, n in sizes.items()]
        if self.gated:
            pairs.append(scalar(a + b".attention.layer_norm_rms_epsilon", FLOAT32, EPS))
            pairs.append(scalar(a + b".rope.freq_base", FLOAT32, 10000.0))
        if self.arch == "falcon":
            pairs.append(scalar(a + b".attention.layer_norm_epsilon", FLOAT32, EPS))
            pairs.append(text(a + b".tensor_data_layout", b"jploski"))
        if self.threshold is not None:
            pairs.append(scalar(b"powerinfer.sparse_threshold", FLOAT32, self.threshold))
        kinds = [2, 3, 3, *[6] * 256, *[1] * (N_VOCAB - 259)]
        scores = [0.0] * 259 + [-float(i) for i in range(N_VOCAB - 259)]
        return [
            *pairs,
            text(b"tokenizer.ggml.model", b"llama"),
            array(b"tokenizer.ggml.tokens", STRING, [token.encode() for token in VOCAB]),
            array(b"tokenizer.ggml.scores", FLOAT32, scores),
            array(b"tokenizer.ggml.token_type", INT32, kinds),
            scalar(b"tokenizer.ggml.bos_token_id", U32, 1),
            scalar(b"tokenizer.ggml.eos_token_id", U32, 2),
        ]

    def file(self, magic: bytes = b"PWRI", without: str = "", **changed: Any) -> bytes:
        """The file's bytes. without: a tensor that is left out; changed: what tests.gguf_bytes.gguf takes."""
        infos, data = [], b""
        for name, (kind, shape, part) in self.stored.items():
            if name != without:
                data += bytes(-len(data) % 32)
                infos.append(tensor(name.encode(), shape, kind, len(data)))
                data += part
        return gguf(self.keys(), infos, data, magic=magic, **changed)

    def write(self, path: Path) -> Path:
        path.write_bytes(self.file())
        return path

    # what it computes

    def forward(
        self, tokens: list[int], predictor: str = "stream", cache: str = "<f2"
    ) -> tuple[FloatArray, list[FloatArray]]:
        """Logits [n, n_vocab] and, a layer, the predictor's logits less the threshold [n, n_ff].

        predictor: what it reads; "none": every neuron is computed. cache: in what keys and values are kept; the engine
        does so in float16.
        """
        used, margins = self.used, []
        stream = used["token_embd.weight"][tokens]
        if self.arch == "opt":
            stream = stream + used["position_embd.weight"][OPT_OFFSET : OPT_OFFSET + len(tokens)]
        for i in range(N_LAYER):
            b, parallel = f"blk.{i}", self.arch == "falcon"
            names = ("attn_norm_2", "attn_norm") if parallel else ("attn_norm", "ffn_norm")
            after = stream + self._attention(b, self._normalised(f"{b}.{names[0]}", stream), cache)
            read = stream if parallel else after
            x = self._normalised(f"{b}.{names[1]}", read)
            seen = read if predictor == "stream" else x
            hidden = np.maximum(seen @ used[f"{b}.fc1.weight"].T, 0)
            margins.append(hidden @ used[f"{b}.fc2.weight"].T - (self.threshold or 0.0))
            h = self.neurons(b, x)
            if predictor != "none":
                h = h * (margins[-1] >= 0)
            stream = after + h @ used[f"{b}.ffn_down_t.weight"] + used.get(f"{b}.ffn_down_t.bias", 0.0)
        head = used["token_embd.weight" if self.arch == "opt" else "output.weight"]
        return self._normalised("output_norm", stream) @ head.T, margins

    def neurons(self, b: str, x: FloatArray) -> FloatArray:
        up = x @ self.used[f"{b}.ffn_up.weight"].T + self.used.get(f"{b}.ffn_up.bias", 0.0)
        if not self.gated:
            return np.maximum(up, 0)
        gate = np.maximum(x @ self.used[f"{b}.ffn_gate.weight"].T, 0)
        return gate * (np.maximum(up, 0) if self.arch == "bamboo" else up)

    def _normalised(self, name: str, x: FloatArray) -> FloatArray:
        if self.centred:
            x = x - x.mean(-1, keepdims=True)
        scaled = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * self.used[f"{name}.weight"]
        return scaled + self.used.get(f"{name}.bias", 0.0)

    def _attention(self, b: str, x: FloatArray, cache: str) -> FloatArray:
        def heads(part: str) -> FloatArray:
            rows = x @ self.used[f"{b}.attn_{part}.weight"].T + self.used.get(f"{b}.attn_{part}.bias", 0.0)
            heads = rows.reshape(len(x), -1, HEAD_DIM).swapaxes(0, 1)
            return heads if part == "v" or self.arch == "opt" else rotated(heads)

        q, k, v = heads("q"), heads("k"), heads("v")
        k, v = (part.astype(cache).astype(np.float64) for part in (k, v))
        k, v = (part.repeat(len(q) // len(part), axis=0) for part in (k, v))
        scores = q @ k.swapaxes(1, 2) / HEAD_DIM**0.5 + np.triu(np.full((len(x), len(x)), -np.inf), 1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(len(x), -1)
        return mixed @ self.used[f"{b}.attn_output.weight"].T + self.used.get(f"{b}.attn_output.bias", 0.0)


def read(arch: str, path: Path) -> Model:
    """What a file with matrices in F16 computes, whoever wrote it; its sizes are those of this page, but n_vocab."""
    from gguf import GGUFReader

    def put(name: str, numbers: FloatArray) -> None:
        turned = model.gated and name.split(".")[-2] in ("attn_q", "attn_k")
        model.used[name] = half_split(numbers) if turned else numbers

    model = Model(arch)
    model.used = {}
    gguf_file = path.with_suffix(".as.gguf")
    gguf_file.write_bytes(b"GGUF" + path.read_bytes()[4:])
    for found in GGUFReader(gguf_file).tensors:
        assert found.tensor_type == (F16 if len(found.shape) > 1 else F32), found.name
        put(found.name, found.data.astype(np.float64))
        if found.name.endswith("attn_qkv.weight"):
            model.split_fused(found.name.removesuffix(".attn_qkv.weight"))
    return model


def half_split(rows: FloatArray) -> FloatArray:
    """Rows 2j and 2j + 1 of a head, which rotate together, come to places j and j + HEAD_DIM / 2."""
    pairs = rows.reshape(-1, HEAD_DIM // 2, 2, rows.shape[1])
    return np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(rows.shape)


def rotated(heads: FloatArray) -> FloatArray:
    """Rotary positions of [heads, n, HEAD_DIM], pairs (j, j + HEAD_DIM / 2)."""
    angles = np.outer(np.arange(heads.shape[1]), 10000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    left, right = heads[..., : HEAD_DIM // 2], heads[..., HEAD_DIM // 2 :]
    turned = left * np.cos(angles) - right * np.sin(angles), left * np.sin(angles) + right * np.cos(angles)
    return np.concatenate(turned, axis=-1)


def write_counts(folder: Path, n_layer: int = N_LAYER, n_ff: int = N_FF) -> npt.NDArray[np.int64]:
    """activation_<i>.pt of every layer, as torch.save writes a vector; returns the counts [n_layer, n_ff]."""
    import torch

    folder.mkdir()
    counts = np.random.default_rng(3).integers(0, 400_000, (n_layer, n_ff))
    for i in range(n_layer):
        torch.save(torch.from_numpy(counts[i]).float(), folder / f"activation_{i}.pt")
    return counts
