"""Every kind of weight read as w_OSC, and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmgraph.nm.grouping import FLAT, blocks, canonical, restore

SHAPES = st.lists(st.integers(1, 5), min_size=2, max_size=5).map(tuple)


def numbered(*shape):
    return torch.arange(float(torch.tensor(shape).prod())).reshape(shape)


@settings(deadline=None)
@given(SHAPES, st.sampled_from([0, 1]))
def test_restore_undoes_canonical(shape, axis):
    weight = numbered(*shape)
    w_OSC = canonical(weight, axis)
    assert w_OSC.dim() == 3
    assert w_OSC.shape[-1] == shape[axis]
    assert torch.equal(restore(w_OSC, shape, axis), weight)


@settings(deadline=None)
@given(SHAPES.filter(lambda s: len(s) > 2))
def test_canonical_puts_one_output_channel_and_kernel_position_in_a_row(shape):
    weight = numbered(*shape)
    w_OSC = canonical(weight)
    kernel = shape[2:]
    for o in range(shape[0]):
        for s in range(w_OSC.shape[1]):
            position = torch.unravel_index(torch.tensor(s), kernel)
            assert torch.equal(w_OSC[o, s], weight[(o, slice(None), *position)])


def test_a_linear_weight_keeps_its_rows():
    weight = numbered(3, 8)
    assert torch.equal(canonical(weight), weight.unsqueeze(1))


def test_a_transposed_layout_is_reduced_along_its_first_axis():
    weight = numbered(8, 3)  # Hugging Face's Conv1D: [in, out]
    assert torch.equal(canonical(weight, 0)[:, 0], weight.T)


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((6, 8), torch.contiguous_format),
        ((6, 8, 3), torch.contiguous_format),
        ((6, 8, 3, 5), torch.contiguous_format),
        ((6, 8, 3, 5), torch.channels_last),
        ((6, 8, 1, 1), torch.channels_last),
        ((6, 8, 2, 3, 4), torch.contiguous_format),
        ((6, 8, 2, 3, 4), torch.channels_last_3d),
    ],
)
def test_reading_a_weight_copies_nothing(shape, memory_format):
    weight = numbered(*shape).contiguous(memory_format=memory_format)
    w_OSC = canonical(weight)
    w_OSC[1, 0, 2] = -1.0
    assert w_OSC.data_ptr() == weight.data_ptr()
    assert weight.flatten(2)[1, 2].flatten()[0] == -1.0 if weight.dim() > 2 else weight[1, 2] == -1.0
    assert restore(w_OSC, shape).data_ptr() == weight.data_ptr()


def test_blocks_are_neighbours_on_the_last_axis_and_never_cross_a_row():
    w_OSC = canonical(numbered(2, 8))
    assert blocks(w_OSC, 4).tolist() == [[[[0, 1, 2, 3], [4, 5, 6, 7]]], [[[8, 9, 10, 11], [12, 13, 14, 15]]]]


def test_a_block_of_a_convolution_lies_along_the_input_channels():
    weight = numbered(2, 4, 3, 3)
    assert torch.equal(blocks(canonical(weight), 4)[1, 5, 0], weight[1, :, 1, 2])


def test_the_gradient_flows_through_both_ways():
    weight = numbered(2, 4, 3).requires_grad_()
    (restore(canonical(weight) * 2, (2, 4, 3)) * numbered(2, 4, 3)).sum().backward()
    assert torch.equal(weight.grad, 2 * numbered(2, 4, 3))


@settings(deadline=None)
@given(SHAPES)
def test_restore_undoes_the_flat_reading(shape):
    weight = numbered(*shape)
    w_OSC = canonical(weight, FLAT)
    assert w_OSC.shape == (shape[0], 1, weight[0].numel())
    assert torch.equal(restore(w_OSC, shape, FLAT), weight)


def test_read_flat_a_block_runs_along_the_kernel_and_spills_over_to_the_next_channel():
    weight = numbered(2, 4, 3, 3)
    found = blocks(canonical(weight, FLAT), 4)
    assert found.shape == (2, 1, 9, 4)
    assert found[1, 0, 0].tolist() == [weight[1, 0, 0, 0], weight[1, 0, 0, 1], weight[1, 0, 0, 2], weight[1, 0, 1, 0]]
    assert found[1, 0, 2].tolist() == [weight[1, 0, 2, 2], weight[1, 1, 0, 0], weight[1, 1, 0, 1], weight[1, 1, 0, 2]]


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 1), (6, 8, 1, 1)])
def test_where_no_kernel_is_larger_than_1_both_readings_are_one(shape):
    assert torch.equal(canonical(numbered(*shape), FLAT), canonical(numbered(*shape)))


def test_the_flat_reading_does_not_depend_on_the_memory_format():
    weight = numbered(6, 8, 3, 5)
    assert torch.equal(canonical(weight.contiguous(memory_format=torch.channels_last), FLAT), canonical(weight, FLAT))


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 3), (6, 8, 3, 5), (6, 8, 2, 3, 4)])
def test_reading_a_contiguous_weight_flat_copies_nothing(shape):
    weight = numbered(*shape)
    w_OSC = canonical(weight, FLAT)
    assert w_OSC.data_ptr() == weight.data_ptr()
    assert restore(w_OSC, shape, FLAT).data_ptr() == weight.data_ptr()
    w_OSC[1, 0, -1] = -1.0
    assert weight[1].flatten()[-1] == -1.0


def test_the_gradient_flows_through_the_flat_reading():
    weight = numbered(2, 4, 3).requires_grad_()
    (restore(canonical(weight, FLAT) * 2, (2, 4, 3), FLAT) * numbered(2, 4, 3)).sum().backward()
    assert torch.equal(weight.grad, 2 * numbered(2, 4, 3))
