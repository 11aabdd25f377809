"""Speculative decoding with the MTP block: drafts, and which of them the main model accepts."""

from dsv4serve.speculative.chain import Advance, MtpChain
from dsv4serve.speculative.judge import judge

__all__ = ["Advance", "MtpChain", "judge"]
