"""Which drafts of a verify step are accepted, and the token after them: exact for greedy and for sampled requests."""

from dsv4_kernels.spec_accept.reference import accept_drafts, match_drafts

__all__ = ["accept_drafts", "match_drafts"]
