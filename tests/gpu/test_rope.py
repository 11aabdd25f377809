"""Rotations made on a GPU, inside a CUDA graph: plain torch can do it, if the frequencies are there."""

import torch

from dsv4_kernels.rope import rope_frequencies, rope_table


def test_a_captured_table_follows_its_positions_to_the_end_of_the_context():
    frequencies = rope_frequencies(64, 160_000.0, (16.0, 65_536, 32.0, 1.0))
    on_device = frequencies.to("cuda", torch.float32)
    positions = torch.zeros(6, device="cuda", dtype=torch.int32)
    rope_table(positions, on_device)  # loads what a capture cannot
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        table = rope_table(positions, on_device)
    new = torch.tensor([0, 1, 127, 65_535, 1_000_003, 1_048_576], dtype=torch.int32)
    positions.copy_(new)
    graph.replay()
    assert table.dtype == torch.complex64
    assert (table.cpu() - rope_table(new, frequencies)).abs().max() < 1e-6
