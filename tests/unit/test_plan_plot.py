"""The picture of a plan: what is drawn, for any number of axes and blocks."""

from typing import Any

import numpy as np
import pytest
from chunkq_producer.plan_plot import MAX_CELLS, MAX_LINES, Layer, draw_plan, line_step
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.patches import Rectangle

from chunkq.blend.plot import draw
from tests.strategies import JobPlan, plan_for

NAMES = ("t", "z", "y", "x")


def plan_of(shape: tuple[int, ...], **more: Any) -> JobPlan:
    rank = len(shape)
    keys = {"inference_type": "sliding_window", "strides": [4] * rank, "chunksize": [16] * rank}
    return plan_for(shape, (8,) * rank, **keys | {"storage_chunks": [4] * rank} | more)


def rectangles(axes: Any) -> list[tuple[float, ...]]:
    """Return the left, top, width and height of the filled shapes of a panel."""
    shapes = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    return [(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in shapes]


@pytest.mark.parametrize(
    ("shape", "labels"),
    [
        ((40,), [("x", "")]),
        ((40, 60), [("x", "y")]),
        ((40, 60, 20), [("y", "z"), ("x", "z"), ("x", "y")]),
        ((20, 40, 60, 20), [("y", "z"), ("x", "z"), ("x", "y")]),
    ],
)
def test_each_pair_of_axes_is_a_panel(shape: tuple[int, ...], labels: Any) -> None:
    names = NAMES[-len(shape) :]
    figure = draw_plan(plan_of(shape), names)
    assert [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes] == labels


def test_a_region_is_drawn_over_the_chunks_that_reach_into_it() -> None:
    # The region needs chunk 0 along axis 0, whose block ends before it.
    plan = plan_of((64, 64), roi=[[16, 40], [32, 64]])
    [axes] = draw_plan(plan, "yx").axes
    volume, chunks, region = rectangles(axes)
    assert volume == (0, 0, 64, 64)
    assert chunks == (16, 0, 48, 48)
    assert region == (32, 16, 32, 24)
    assert next(iter(plan.active_indices())) == (0, 1)


def test_many_blocks_have_a_bounded_number_of_lines() -> None:
    plan = plan_of((1_000_000, 2000))
    [axes] = draw_plan(plan, "yx").axes
    counts = [len(c.get_segments()) for c in axes.collections if isinstance(c, LineCollection)]
    assert max(counts) <= MAX_LINES
    assert line_step(plan.axes[0]) * MAX_LINES >= plan.blocks[0]


def test_a_layer_is_drawn_where_one_of_its_chunks_lies() -> None:
    plan = plan_of((16 * 1000, 32, 48))
    empty = np.zeros(plan.index_bounds.shape, np.bool_)
    empty[500, 1, 2] = True
    figure = draw_plan(plan, "zyx", [Layer("empty chunks", "gray", empty)])
    for axes, shape in zip(figure.axes, [(1000, 2), (1000, 3), (2, 3)], strict=True):
        [mesh] = [c for c in axes.collections if isinstance(c, QuadMesh)]
        colors = mesh.get_array().reshape(-1, 4)  # before it is drawn, faces have none
        assert len(colors) <= np.prod(np.minimum(shape, MAX_CELLS))
        [shown] = colors[colors[:, 3] > 0]
        [legend] = figure.legends
        entries = {text.get_text(): patch for text, patch in _entries(legend)}
        np.testing.assert_allclose(entries["empty chunks"].get_facecolor(), shown)


def _entries(legend: Any) -> Any:
    return zip(legend.get_texts(), legend.legend_handles, strict=True)


@pytest.mark.parametrize("shape", [(48, 96, 96), (96, 96, 96), (40, 96, 60)])
def test_a_voxel_is_as_large_in_each_panel(shape: tuple[int, ...]) -> None:
    values = np.ones(shape, np.uint8)
    figure = draw(values, values)
    figure.canvas.draw()
    sizes = [axes.get_window_extent().width / np.ptp(axes.get_xlim()) for axes in figure.axes]
    assert max(sizes) < 1.03 * min(sizes)
