"""Checkpoints: what others publish, read lazily under one set of names.

`open_checkpoint(path)` returns a `Checkpoint` for a Hugging Face folder or a GGUF file, with `patch` for either with
what a patch changes. Tensor names are those of
artifact.layout, per matrix: blk.N.attn_q|k|v|output, ffn_gate, ffn_up, ffn_down, attn_norm, ffn_norm, token_embd,
position_embd, output_norm, output, each `.weight` and where present `.bias`. Matrices have torch's shape [out, in];
q and k rows are in the half-split rotary layout.
"""

from powerinfer_tools.checkpoint.config import Config, Experts, Rope
from powerinfer_tools.checkpoint.patch import Merged, merge
from powerinfer_tools.checkpoint.source import Checkpoint, check_finite, open_checkpoint

__all__ = ["Checkpoint", "Config", "Experts", "Merged", "Rope", "check_finite", "merge", "open_checkpoint"]
