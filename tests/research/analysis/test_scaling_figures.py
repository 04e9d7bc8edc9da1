"""The figure of a scaling curve: which mark stands where, references, and nothing over another part."""

from types import SimpleNamespace

import pytest

from research.analysis import scaling_figures

MIB = 2**20
DEVICES = SimpleNamespace(
    label="devices", examples="images", speed_guide="linear", memory_guide="1 / devices", memory_power=-1
)
WIDTH = SimpleNamespace(label="width", examples="images", speed_guide="equal", memory_guide="as width", memory_power=1)


def point(value, rates, reference, mebibytes, arguments):
    least, middle, most = rates
    return SimpleNamespace(
        value=value,
        examples_a_second=middle,
        least=least,
        most=most,
        reference=reference,
        bytes=mebibytes * MIB,
        argument_bytes=arguments * MIB,
    )


POINTS = [
    point(1, (90, 100, 105), 100, 40, 2),
    point(2, (120, 150, 151), 200, 22, 2),
    point(8, (40, 80, 90), 800, 7, 2),
]


def lines(axis):
    return {line.get_label(): line for line in axis.get_lines()}


def test_marks_are_medians_bars_reach_to_the_extremes_and_references_are_dotted():
    figure = scaling_figures.scaling(POINTS, DEVICES, "a network", 2)
    speed, memory = figure.axes
    (measured,) = speed.containers
    assert list(measured[0].get_xdata()) == [1, 2, 8] and list(measured[0].get_ydata()) == [100, 150, 80]
    assert [list(segment[:, 1]) for segment in measured[2][0].get_segments()] == [[90, 105], [120, 151], [40, 90]]
    assert list(lines(speed)["linear"].get_ydata()) == [100, 200, 800]
    assert list(lines(speed)["cores of the machine: 2"].get_xdata()) == [2, 2]
    assert list(lines(memory)["temporaries and arguments"].get_ydata()) == [40, 22, 7]
    assert list(lines(memory)["arguments: weights, momenta, data"].get_ydata()) == [2, 2, 2]
    assert list(lines(memory)["1 / devices"].get_ydata()) == [40, 20, 5]
    assert {lines(speed)["linear"].get_linestyle(), lines(memory)["1 / devices"].get_linestyle()} == {":"}
    # Told apart in grey: by marker as well as by colour.
    drawn = [measured[0], *(lines(memory)[name] for name in list(lines(memory))[:2])]
    assert len({line.get_marker() for line in drawn}) == len({line.get_color() for line in drawn}) == 3
    for axis in figure.axes:
        assert (axis.get_xscale(), axis.get_yscale(), axis.get_xlabel()) == ("log", "log", "devices")
        assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "2", "8"]
    assert (speed.get_ylabel(), memory.get_ylabel()) == ("images per second", "MiB per device")
    assert figure.get_suptitle() == "a network"


def test_memory_in_proportion_goes_through_the_largest_and_cores_belong_to_devices():
    wide = [point(8, (9, 9, 9), 9, 10, 1), point(16, (3, 3, 3), 2, 30, 2)]
    speed, memory = scaling_figures.scaling(wide, WIDTH, "", 8).axes
    assert list(lines(memory)["as width"].get_ydata()) == [15, 30]
    assert set(lines(speed)) >= {"equal"} and not any("cores" in name for name in lines(speed))
    for cores in (16, None):  # outside of what was measured, or not known
        speed, _ = scaling_figures.scaling(POINTS, DEVICES, "", cores).axes
        assert not any("cores" in name for name in lines(speed))


@pytest.mark.parametrize("points", [POINTS, POINTS[:1]])
def test_legends_and_labels_lie_inside_and_beside_each_other(saved, points):
    figure = scaling_figures.scaling(points, DEVICES, "a network of some name", 2)
    figure.canvas.draw()
    boxes = [axis.get_legend().get_window_extent() for axis in figure.axes]
    for box, axis in zip(boxes, figure.axes, strict=True):
        assert min(box.x0, box.y0, figure.bbox.x1 - box.x1) >= 0
        assert not box.overlaps(axis.get_window_extent()) and not box.overlaps(axis.xaxis.label.get_window_extent())
        assert any(label.get_text() and label.get_window_extent().height for label in axis.get_yticklabels())
    assert not boxes[0].overlaps(boxes[1])
    saved(figure)
