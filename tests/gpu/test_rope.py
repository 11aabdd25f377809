"""Rotations made on a GPU, inside a CUDA graph."""

import torch

from dsv4_kernels.rope import rope_frequencies, rope_table
from dsv4_kernels.rope.triton import rope_tables


def test_captured_tables_follow_their_positions_to_the_end_of_the_context():
    frequencies = rope_frequencies(64, 160_000.0, (16.0, 65_536, 32.0, 1.0)).float()
    positions = torch.zeros(6, device="cuda", dtype=torch.int32)
    rope_tables(positions, frequencies.cuda(), (1, 4))  # compiles what a capture cannot
    on_device = frequencies.cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tables = rope_tables(positions, on_device, (1, 4))
    new = torch.tensor([0, 1, 127, 65_535, 1_000_003, 1_048_575], dtype=torch.int32)
    positions.copy_(new)
    graph.replay()
    for table, rounded in zip(tables.cpu(), (new, new // 4 * 4), strict=True):
        assert (torch.view_as_real(table) - torch.view_as_real(rope_table(rounded, frequencies))).abs().max() < 1.5e-7
