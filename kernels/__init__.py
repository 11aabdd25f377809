"""Operations of DeepSeek-V4 as pure functions on tensors; one folder each, see docs/kernels.md.

Imported as `dsv4_kernels`. Never imports `dsv4serve`.
"""
