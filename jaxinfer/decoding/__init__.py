"""From ids to ids: the decode state, prefill, one step, and whole generations in one `lax.while_loop`."""

from jaxinfer.decoding.generate import Result, generate
from jaxinfer.decoding.model import Decoder, Model
from jaxinfer.decoding.state import FINISH, State, bucket
from jaxinfer.decoding.steps import decode_step, forward, prefill
from jaxinfer.decoding.stream import Delta, Stream, stream

__all__ = [
    "FINISH",
    "Decoder",
    "Delta",
    "Model",
    "Result",
    "State",
    "Stream",
    "bucket",
    "decode_step",
    "forward",
    "generate",
    "prefill",
    "stream",
]
