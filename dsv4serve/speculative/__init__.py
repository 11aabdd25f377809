"""Speculative decoding with the MTP block: drafts, and which of them the main model accepts."""

from dsv4serve.speculative.chain import Advance, MtpChain
from dsv4serve.speculative.judge import judge, pad_drafts

__all__ = ["Advance", "MtpChain", "judge", "pad_drafts"]
