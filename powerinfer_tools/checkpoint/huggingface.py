"""A Hugging Face folder: config.json, safetensors, tokenizer.json."""

import hashlib
from pathlib import Path

from powerinfer_tools.checkpoint.fields import Fields, read_json
from powerinfer_tools.checkpoint.huggingface_config import read_config
from powerinfer_tools.checkpoint.huggingface_tokenizer import read_special, read_template, read_tokenizer
from powerinfer_tools.checkpoint.safetensors_files import DTYPES, StoredTensor, stored_tensors, weight_files
from powerinfer_tools.checkpoint.source import Checkpoint, FloatArray, check_rows
from powerinfer_tools.checkpoint.tensors import bias_shapes, required_shapes
from powerinfer_tools.errors import PowerinferError

CONFIG_LIMIT = 1 << 20
TEXTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
CONVERTED = ("tokenizer.model", "added_tokens.json")  # what a folder without tokenizer.json has
OPT_OFFSET = 2  # the family's position p lies in row p + 2

LLAMA = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "layer": "model.layers",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OPT = {
    "token_embd": "model.decoder.embed_tokens",
    "position_embd": "model.decoder.embed_positions",
    "output_norm": "model.decoder.final_layer_norm",
    "output": "lm_head",
    "layer": "model.decoder.layers",
    "attn_norm": "self_attn_layer_norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.out_proj",
    "ffn_norm": "final_layer_norm",
    "ffn_up": "fc1",
    "ffn_down": "fc2",
}
NAMES = {"llama": LLAMA, "opt": OPT}


class HuggingFaceCheckpoint(Checkpoint):
    """Headers are read at once and checked against config.json; weights when they are asked for."""

    def __init__(self, path: Path, activation: str | None = None) -> None:
        self.path, self.notes = path, []
        values = read_json(path / "config.json", CONFIG_LIMIT)
        fields = Fields(str(path / "config.json"), values)
        self.config, biased = read_config(fields, path.resolve().name, self.notes)
        if activation not in (None, self.config.activation):
            raise PowerinferError(
                f"{path}: config.json says the activation {self.config.activation}, expected {activation}", "usage"
            )
        self._shapes = required_shapes(self.config) | bias_shapes(self.config, biased)
        self._tensors = self._match(stored_tensors(path))
        self.tokenizer_json, tokenizer = read_tokenizer(path)
        self.chat_template = read_template(path)
        self.special = read_special(path, values, tokenizer, self.config.n_vocab)
        self.metadata = {"name": self.config.name}
        if tokenizer.get_vocab_size() > self.config.n_vocab:
            self.notes.append(f"the tokenizer has tokens beyond the model's {self.config.n_vocab}: refused in prompts")
        if not self.special["eos"]:
            self.notes.append("no end-of-text token is recorded: answers end at the token limit")

    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def read(self, name: str, rows: slice | None = None) -> FloatArray:
        begin, end = check_rows(self.path, self._shapes, name, rows)
        offset = OPT_OFFSET if name == "position_embd.weight" else 0
        return self._tensors[name].read(name, begin + offset, end + offset)

    def digest(self) -> str:
        digest = hashlib.sha256()
        names = TEXTS if (self.path / "tokenizer.json").is_file() else TEXTS + CONVERTED
        texts = [self.path / name for name in names if (self.path / name).is_file()]
        for path in texts + weight_files(self.path):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        return digest.hexdigest()

    def _match(self, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """Our names to the stored tensors. Errors: one missing, of another shape, or one that config.json denies."""
        found = {}
        for name, shape in self._shapes.items():
            theirs = their_name(self.config.arch, name)
            offset = OPT_OFFSET if name == "position_embd.weight" else 0
            expected = (shape[0] + offset, *shape[1:])
            if theirs not in stored:
                raise PowerinferError(f"{self.path}: expected {theirs} {list(expected)}, found none", "mismatch")
            if stored[theirs].shape != expected:
                shown = list(stored[theirs].shape)
                raise PowerinferError(f"{self.path}: {theirs}: expected {list(expected)}, found {shown}", "mismatch")
            if stored[theirs].dtype not in DTYPES:
                known = ", ".join(DTYPES)
                raise PowerinferError(
                    f"{self.path}: {theirs}: expected type {known}, found {stored[theirs].dtype}", "unsupported"
                )
            found[name] = stored.pop(theirs)
        for theirs in stored:
            if not (theirs.endswith("rotary_emb.inv_freq") or (self.config.tied and theirs == "lm_head.weight")):
                raise PowerinferError(
                    f"{self.path}: {theirs}: expected no such tensor by config.json, found one", "unsupported"
                )
        return found


def their_name(arch: str, name: str) -> str:
    """The name that a Hugging Face checkpoint gives to our tensor `name`."""
    table = NAMES[arch]
    if not name.startswith("blk."):
        part, end = name.rsplit(".", 1)
        return f"{table[part]}.{end}"
    _, i, part, end = name.split(".")
    return f"{table['layer']}.{i}.{table[part]}.{end}"
