"""The order in which a job writes the shapes of its network, and the moves around the network."""

from typing import Any

import numpy as np
import pytest
from chunkq_worker.runtimes.axis_moves import Move
from chunkq_worker.runtimes.item_shapes import ItemShapes
from chunkq_worker.runtimes.network_layout import NetworkLayout
from chunkq_worker.steps import Steps

from chunkq.errors import ErrorCode, ModelError
from chunkq.job.axis_order import FIRST, LAST, WrittenOrders, channels_first, join, split
from chunkq.job.model_config import ModelConfig
from tests.harness.assertions import assert_contains

Shape = tuple[int, ...]
NONE, TO_LAST, TO_FIRST = Move.NONE, Move.TO_LAST, Move.TO_FIRST
ADD_FIRST, ADD_LAST = Move.ADD_FIRST, Move.ADD_LAST
DROP_FIRST, DROP_LAST = Move.DROP_FIRST, Move.DROP_LAST
BEFORE, AFTER = Steps(preprocessing=lambda x: x), Steps(postprocessing=lambda y: y)


def model(shape: Shape, output: Shape | None = None, **keys: Any) -> ModelConfig:
    values = {"runtime": "tensorflow", "type": "file", "model_file": "m.keras"} | keys
    return ModelConfig(model_input_shape=shape, model_output_shape=output, **values)


def layout(
    axes: tuple[int | None, ...] | None,
    shape: Shape,
    output: Shape | None = None,
    rank: int = 2,
    steps: Steps | None = None,
    inputs: int | None = None,
    **keys: Any,
) -> NetworkLayout:
    shapes = ItemShapes.of(model(shape, output, **keys), rank, inputs=inputs)
    return NetworkLayout(shapes, axes, steps or Steps())


# ------------------------------------------------------------------------ shapes of the job


@pytest.mark.parametrize(
    ("shape", "output", "expected"),
    [
        ((1, 8, 8), (3, 8, 8), ((1, 8, 8), (3, 8, 8))),
        ((8, 8, 1), (8, 8, 3), ((1, 8, 8), (3, 8, 8))),
        # each shape is read on its own if only one order is valid
        ((8, 8, 1), (3, 8, 8), ((1, 8, 8), (3, 8, 8))),
        ((1, 8, 8), (8, 8, 3), ((1, 8, 8), (3, 8, 8))),
        ((8, 8), (8, 8, 3), ((8, 8), (3, 8, 8))),
        ((8, 8), (3, 8, 8), ((8, 8), (3, 8, 8))),
        ((8, 8, 1), (8, 8), ((1, 8, 8), (8, 8))),
        ((8, 8, 1), None, ((1, 8, 8), None)),
        ((8, 8), None, ((8, 8), None)),
        # an output that is smaller than the input
        ((8, 6, 1), (4, 2, 5), ((1, 8, 6), (5, 4, 2))),
        # both orders are valid: the one with the size of the input
        ((8, 8, 1), (8, 8, 4), ((1, 8, 8), (4, 8, 8))),
        ((1, 8, 8), (8, 8, 4), ((1, 8, 8), (4, 8, 8))),
        ((8, 8, 1), (4, 8, 8), ((1, 8, 8), (4, 8, 8))),
        ((8, 8), (8, 8, 4), ((8, 8), (4, 8, 8))),
        ((8, 8), (4, 8, 8), ((8, 8), (4, 8, 8))),
        # neither has its size: the one of the input
        ((8, 8, 1), (6, 4, 4), ((1, 8, 8), (4, 6, 4))),
        ((1, 8, 8), (6, 4, 4), ((1, 8, 8), (6, 4, 4))),
        ((8, 8), (6, 4, 4), ((8, 8), (6, 4, 4))),
        # a cube looks the same in both orders
        ((1, 8, 8), (8, 8, 8), ((1, 8, 8), (8, 8, 8))),
        # a patch of one voxel along an axis: the output decides
        ((1, 8, 1), (8, 1, 3), ((1, 8, 1), (3, 8, 1))),
        ((1, 8, 1), (3, 8, 1), ((1, 8, 1), (3, 8, 1))),
        ((1, 8, 1), (1, 8, 3), ((1, 1, 8), (3, 1, 8))),
        ((1, 1, 1), (3, 1, 1), ((1, 1, 1), (3, 1, 1))),
    ],
)
def test_shapes_are_read_in_either_order(
    shape: Shape, output: Shape | None, expected: tuple[Shape, Shape | None]
) -> None:
    read = channels_first(model(shape, output), 2)
    assert (read.model_input_shape, read.model_output_shape) == expected


@pytest.mark.parametrize("runtime", ["torch", "numpy"])
def test_shapes_of_other_runtimes_have_channels_first(runtime: str) -> None:
    written = model((8, 8, 1), (8, 8, 3), runtime=runtime)
    assert channels_first(written, 2) is written


@pytest.mark.parametrize(
    ("key", "written", "expected"),
    [
        ("lost_dim", 0, 1),  # axes of (5, 8, 8, 1) and of (1, 5, 8, 8)
        ("lost_dim", 2, 3),
        ("lost_dim", 3, 0),  # the channel axis, which `resolve` reports
        ("lost_dim", 4, 4),
        ("join_dim", 1, 2),  # axes of batches, of which axis 0 is N
        ("join_dim", 4, 1),
        ("join_dim", 5, 5),
    ],
)
def test_keys_that_name_an_axis_count_the_entries_as_written(
    key: str, written: int, expected: int
) -> None:
    read = channels_first(model((5, 8, 8, 1), (1, 8, 8, 21), **{key: written}), 3)
    assert getattr(read, key) == expected
    assert read.model_input_shape == (1, 5, 8, 8)


@pytest.mark.parametrize(
    ("shape", "output", "is_ambiguous"),
    [
        ((1, 8, 1), None, True),
        ((1, 8, 1), (1, 8, 1), True),
        ((1, 8, 1), (3, 8, 1), False),
        ((1, 1, 1), None, False),
        ((1, 8, 8), None, False),
        ((8, 1), None, False),
    ],
)
def test_a_shape_with_one_entry_at_both_ends_is_ambiguous_unless_the_output_decides(
    shape: Shape, output: Shape | None, is_ambiguous: bool
) -> None:
    assert WrittenOrders.of(model(shape, output), 2).is_ambiguous is is_ambiguous
    assert not WrittenOrders.of(model(shape, output, runtime="torch"), 2).is_ambiguous


@pytest.mark.parametrize("order", [FIRST, LAST, None])
def test_split_and_join_are_inverse(order: Any) -> None:
    assert join(*split((2, 3, 4), order), order) == (2, 3, 4)


# -------------------------------------------------------------------------- moves of arrays


@pytest.mark.parametrize("move", Move)
def test_a_move_of_an_array_has_the_shape_that_it_predicts_and_an_inverse(move: Move) -> None:
    item = (1, 3, 1)
    batch = np.arange(6).reshape(2, *item)
    moved = move.apply(batch, np.transpose)
    assert moved.shape == (2, *move.after(item))
    assert move.before(moved.shape[1:]) == item
    if move in (TO_LAST, TO_FIRST):
        np.testing.assert_array_equal(
            moved, np.moveaxis(batch, *((1, -1), (-1, 1))[move is TO_FIRST])
        )


# ----------------------------------------------------------------------- input of a network


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        # the declared shape decides, in whichever order the job is written
        ((8, 8, 1), (1, 8, 8), [TO_LAST]),
        ((8, 8, 1), (8, 8, 1), [TO_LAST]),
        ((8, 8, 1), (8, 8), [ADD_LAST]),
        ((1, 8, 8), (1, 8, 8), [NONE]),
        ((1, 8, 8), (8, 8, 1), [NONE]),
        ((1, 8, 8), (8, 8), [ADD_FIRST]),
        ((8, 8), (8, 8), [NONE]),
        # dynamic axes
        ((None, None, 1), (1, 8, 8), [TO_LAST]),
        ((None, None, 1), (8, 8), [ADD_LAST]),
        ((1, None, None), (8, 8, 1), [NONE]),
        ((None, None, None), (1, 8, 8), [NONE, TO_LAST]),
        ((None, None, None), (8, 8, 1), [TO_LAST, NONE]),
        ((None, None, None), (8, 8), [ADD_FIRST, ADD_LAST]),
        # nothing is declared: as written first
        (None, (1, 8, 8), [NONE, TO_LAST]),
        (None, (8, 8, 1), [TO_LAST, NONE]),
        (None, (8, 8), [NONE, ADD_FIRST, ADD_LAST]),
        # a network that may accept another patch than the one that it declares
        ((32, 32, 1), (1, 8, 8), [TO_LAST]),
        ((32, 32, 1), (8, 8), [ADD_LAST]),
        ((1, 32, 32), (1, 8, 8), [NONE]),
        # nothing fits
        ((32, 32, 3), (1, 8, 8), [NONE]),
        ((8, 8, 8, 1), (1, 8, 8), [NONE]),
    ],
)
def test_the_declared_shape_of_the_network_decides_where_its_channels_are(
    axes: tuple[int | None, ...] | None, shape: Shape, expected: list[Move]
) -> None:
    found = layout(axes, shape, (3, 8, 8))
    assert found.input_moves(found.shapes.input) == expected


@pytest.mark.parametrize(
    ("axes", "item", "expected"),
    [
        ((8, 8, 2), (2, 8, 8), [TO_LAST]),
        ((2, 8, 8), (2, 8, 8), [NONE]),
        # as many channels as voxels along each axis: fixed at one end only
        ((None, None, 8), (8, 8, 8), [TO_LAST]),
        ((8, None, None), (8, 8, 8), [NONE]),
    ],
)
def test_joined_inputs_are_the_channels_of_the_network(
    axes: tuple[int | None, ...], item: Shape, expected: list[Move]
) -> None:
    found = layout(axes, (1, 8, 8), (3, 8, 8), inputs=item[0], join_dim=1)
    assert found.input_moves(item) == expected


def test_as_many_channels_as_voxels_are_refused_if_the_network_fixes_both_ends() -> None:
    found = layout((8, 8, 8), (1, 8, 8), (3, 8, 8), inputs=8, join_dim=1)
    with pytest.raises(ModelError) as caught:
        found.input_moves((8, 8, 8))
    assert caught.value.code is ErrorCode.MODEL_UNUSABLE
    assert_contains(str(caught.value), "model_config.model_input_shape: [1, 8, 8]", "patch size")


@pytest.mark.parametrize(
    ("axes", "shape", "keys", "expected"),
    [
        # slices are the channels of 2.5-D networks, and one slice is the one of a 2-D network
        ((8, 8, 5), (5, 8, 8), {"lost_dim": 0}, [TO_LAST]),
        ((5, 8, 8), (5, 8, 8), {"lost_dim": 0}, [NONE]),
        ((8, 8, 1), (1, 8, 8), {}, [TO_LAST]),
        # other slices are not
        ((8, 8, 5), (5, 8, 8), {}, [NONE]),
        ((5, 8, 8, 1), (5, 8, 8), {"lost_dim": 0}, [ADD_LAST]),
        ((5, 8, 8, 1), (5, 8, 8, 1), {"lost_dim": 0}, [TO_LAST]),
    ],
)
def test_slices_of_a_volume_can_be_the_channels_of_a_network(
    axes: tuple[int | None, ...], shape: Shape, keys: dict[str, int], expected: list[Move]
) -> None:
    found = layout(axes, shape, None, 3, **keys)
    assert found.input_moves(found.shapes.input) == expected


@pytest.mark.parametrize(
    ("axes", "item", "expected"),
    [
        ((8, 8, 1), (8, 8, 1), [NONE]),  # the step has moved the channels
        ((8, 8, 4), (4, 8, 8), [TO_LAST]),  # the step has added channels
        ((4, 8, 8), (4, 8, 8), [NONE]),
        (None, (8, 8, 1), [NONE]),
    ],
)
def test_a_batch_that_a_step_has_changed_fits_the_network_too(
    axes: tuple[int | None, ...] | None, item: Shape, expected: list[Move]
) -> None:
    assert layout(axes, (1, 8, 8), (3, 8, 8), steps=BEFORE).input_moves(item) == expected


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        ((16, 16, 1), (1, 8, 8), [1, 16, 16]),
        ((16, 16, 1), (8, 8, 1), [16, 16, 1]),
        ((16, None, 1), (8, 8), [16, 8]),
        ((1, 16, 16), (8, 8, 1), [16, 16, 1]),
        ((8, 8, 8, 1), (1, 8, 8), None),
    ],
)
def test_the_shape_to_set_is_written_as_in_the_job(
    axes: tuple[int | None, ...], shape: Shape, expected: list[int] | None
) -> None:
    assert layout(axes, shape, (3, 8, 8)).shape_to_set() == expected


# ---------------------------------------------------------------------- output of a network


@pytest.mark.parametrize(
    ("shape", "output", "actual", "expected"),
    [
        ((8, 8, 1), (8, 8, 3), (8, 8, 3), TO_FIRST),
        ((1, 8, 8), (3, 8, 8), (8, 8, 3), TO_FIRST),
        ((8, 8, 1), (8, 8, 3), (3, 8, 8), NONE),
        ((8, 8), (3, 8, 8), (8, 8, 3), TO_FIRST),
        ((8, 8), (8, 8), (8, 8, 1), DROP_LAST),
        ((8, 8), (8, 8), (1, 8, 8), DROP_FIRST),
        ((8, 8), (8, 8), (8, 8), NONE),
        ((8, 8), (3, 8, 8), (None, None, 3), TO_FIRST),
        ((8, 8), (3, 8, 8), (8, 8, 4), NONE),  # the batcher reports it
    ],
)
def test_the_output_has_the_order_that_fits_its_declared_shape(
    shape: Shape, output: Shape, actual: tuple[int | None, ...], expected: Move
) -> None:
    found = layout((8, 8, 1), shape, output)
    item = found.shapes.input
    assert found.output_move(item, found.input_moves(item)[0], actual) is expected
    assert found.outputs_fit([actual]) is (actual != (8, 8, 4))


@pytest.mark.parametrize(
    ("axes", "expected"), [((8, 8, 1), TO_FIRST), ((1, 8, 8), NONE), ((8, 8), NONE)]
)
def test_an_output_that_fits_both_orders_has_the_one_of_the_input(
    axes: Shape, expected: Move
) -> None:
    found = layout(axes, (8, 8), (8, 8, 8))
    move = found.input_moves((8, 8))[0]
    assert found.output_move((8, 8), move, (8, 8, 8)) is expected


@pytest.mark.parametrize(
    ("axes", "shape", "output", "channels"),
    [
        ((8, 8, 1), (8, 8), (8, 8, 4), None),  # read as 4 channels, last
        ((8, 8, 1), (8, 8, 1), (8, 8, 4), None),
        ((8, 8, 1), (1, 8, 8), (8, 8, 4), None),
        ((1, 8, 8), (1, 8, 8), (8, 8, 4), 4),
        ((1, 8, 8), (8, 8), (8, 8, 4), 4),
        ((8, 8), (8, 8), (8, 8, 4), 4),
        ((8, 8), (8, 8), (4, 8, 8), None),  # read as 4 channels, first
        ((1, 8, 8), (8, 8), (4, 8, 8), None),
        ((8, 8, 1), (1, 8, 8), (6, 4, 4), 4),  # read as 6 channels, first
    ],
)
def test_an_output_shape_that_was_read_in_another_order_than_the_network_has_is_refused(
    axes: Shape, shape: Shape, output: Shape, channels: int | None
) -> None:
    found = layout(axes, shape, output)
    item = found.shapes.input
    move = found.input_moves(item)[0]
    if channels is None:
        is_last = found.shapes.heads[0].order is LAST
        assert found.output_move(item, move, output) is (TO_FIRST if is_last else NONE)
        return
    with pytest.raises(ModelError) as caught:
        found.output_move(item, move, output)
    assert caught.value.code is ErrorCode.MODEL_UNUSABLE
    key = f"model_config.model_output_shape: {list(output)}"
    assert_contains(str(caught.value), key, f"set it to {[channels, *output[:-1]]}")


@pytest.mark.parametrize(
    ("actual", "expected"), [((8, 8, 21), TO_FIRST), ((1, 8, 8, 21), TO_FIRST), ((21, 8, 8), NONE)]
)
def test_the_output_of_a_network_with_lost_dim_can_lack_this_axis(
    actual: Shape, expected: Move
) -> None:
    found = layout((8, 8, 5), (5, 8, 8), (21, 1, 8, 8), 3, lost_dim=0)
    assert found.output_move((5, 8, 8), TO_LAST, actual) is expected


# -------------------------------------------------------------------------- steps of a user


@pytest.mark.parametrize(
    ("item", "move", "actual", "expected"),
    [
        ((1, 8, 8), TO_LAST, (8, 8, 5), TO_FIRST),
        ((1, 8, 8), NONE, (5, 8, 8), NONE),
        ((1, 8, 8), TO_LAST, (6, 6, 5), TO_FIRST),  # a step can crop
        ((8, 8, 1), NONE, (8, 8, 5), NONE),  # a step has moved the input, so one moves the output
        ((1, 8, 8), TO_LAST, (8, 8), NONE),
    ],
)
def test_steps_after_the_network_get_channels_first_unless_a_step_before_moves_them(
    item: Shape, move: Move, actual: Shape, expected: Move
) -> None:
    found = layout((8, 8, 1), (1, 8, 8), (3, 8, 8), steps=AFTER)
    assert found.output_move(item, move, actual) is expected


def test_steps_after_the_network_are_refused_if_the_order_of_its_output_is_not_visible() -> None:
    found = layout((8, 8, 1), (1, 8, 8), (8, 8, 8), steps=AFTER)
    with pytest.raises(ModelError) as caught:
        found.output_move((1, 8, 8), TO_LAST, (8, 8, 8))
    assert caught.value.code is ErrorCode.MODEL_UNUSABLE
    assert_contains(str(caught.value), "model_config.processing_steps", [8, 8, 8])
    assert found.output_move((8, 8, 1), NONE, (8, 8, 8)) is NONE


def test_the_first_order_with_which_the_network_returns_the_declared_output_is_used() -> None:
    found, tried = layout(None, (1, 8, 8), (3, 8, 8)), []

    def attempt(move: Move) -> list[Shape]:
        tried.append(move)
        if move is NONE:
            raise ValueError("another number of channels")
        return [(8, 8, 3)]

    moves = found.input_moves((1, 8, 8))
    assert moves == [NONE, TO_LAST]
    assert found.choose(moves, attempt, is_final=lambda error: False) is TO_LAST
    assert tried == [NONE, TO_LAST]
    assert found.choose(moves, lambda move: [(7,)], is_final=lambda error: False) is NONE
    with pytest.raises(ValueError, match="channels"):
        found.choose(moves, attempt, is_final=lambda error: True)


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        (((1, 8, 3), (8, 8, 5)), TO_LAST),  # a step selects 3 of 5 channels
        (((1, 8, 3), (6, 6, 5)), NONE),  # a step crops: neither fits, and both run
        ((None, (6, 6, 5)), TO_LAST),
    ],
)
def test_steps_after_the_network_can_change_what_it_returns(
    outputs: tuple[Shape | None, Shape], expected: Move
) -> None:
    def attempt(move: Move) -> list[Shape]:
        output = outputs[move is TO_LAST]
        if output is None:
            raise ValueError("another number of channels")
        return [output]

    found = layout(None, (1, 8, 8), (3, 8, 8), steps=AFTER)
    moves = found.input_moves((1, 8, 8))
    assert found.choose(moves, attempt, is_final=lambda error: False) is expected


def test_a_cube_that_a_step_can_have_moved_is_refused() -> None:
    found = layout((None, None, 8), (1, 8, 8), (3, 8, 8), inputs=8, steps=BEFORE, join_dim=1)
    with pytest.raises(ModelError, match=r"^model_config\.model_input_shape: .*patch size"):
        found.input_moves((8, 8, 8))
