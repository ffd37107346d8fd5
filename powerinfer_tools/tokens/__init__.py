"""Text on one side, token ids on the other: tokenizer, streams of text, chat templates, stop texts."""

from powerinfer_tools.tokens.chat import chat_ids, check_messages
from powerinfer_tools.tokens.library import load_tokenizer
from powerinfer_tools.tokens.stops import Stops
from powerinfer_tools.tokens.template import render_chat
from powerinfer_tools.tokens.tokenizer import Stream, Tokenizer

__all__ = ["Stops", "Stream", "Tokenizer", "chat_ids", "check_messages", "load_tokenizer", "render_chat"]
