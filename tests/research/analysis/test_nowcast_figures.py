"""The figures of nowcasts: every frame stands where its time is, in the colour of its value."""

import itertools
import json

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.textpath import TextPath
from PIL import Image, ImageDraw

from research.analysis import figures, nowcast_figures

BANDS = ["0.1", "0.2", "0.5", "1", "2", "5", "10", "20", "50", "100"]
SIZE = (12, 16)  # height and width differ, so that they cannot be confused


def frames(count, seed=0, size=SIZE):
    return np.random.default_rng(seed).random((count, *size), np.float32)


@pytest.fixture
def sequence():
    """Four inputs, six frames that followed, and two models."""
    return frames(4), frames(6, 1), {"ConvLSTM": frames(6, 2), "persistence": frames(6, 3)}


def row_names(figure):
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def images_by_row(figure):
    """Images as [left, array], a list a row, the first row on top."""
    found = sorted((image.get_extent()[3], image.get_extent()[0], id(image), image) for image in figure.axes[0].images)
    rows = itertools.groupby(found, key=lambda item: item[0])
    return [[(left, np.asarray(image.get_array())) for _, left, _, image in row] for _, row in rows]


def legend_texts(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def lines(axis):
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines() if len(line.get_xdata())]


# Strips


def test_a_strip_shows_every_frame_in_its_place(sequence):
    inputs, truth, predictions = sequence
    figure = nowcast_figures.strip(inputs, truth, predictions)
    assert row_names(figure) == ["input", "truth", "ConvLSTM", "persistence"]
    assert texts(figure) == ["t-3", "t-2", "t-1", "t", "t+1", "t+2", "t+3", "t+4", "t+5", "t+6"]
    rows = images_by_row(figure)
    for row, given in zip(rows, (inputs, truth, *predictions.values()), strict=True):
        np.testing.assert_array_equal([array for _, array in row], given)
        assert [left for left, _ in row] == [left for left, _ in rows[1]][: len(row)]  # columns stand in line
    for image in figure.axes[0].images:
        assert image.get_interpolation() == "nearest" and image.get_clim() == (0, 1)


def test_every_counts_from_t(sequence):
    inputs, truth, predictions = sequence
    figure = nowcast_figures.strip(inputs, truth, predictions, every=3, minutes=5)
    assert texts(figure) == ["-15 min", "0 min", "+15 min", "+30 min"]
    expected = (inputs[[0, 3]], truth[[2, 5]], *(given[[2, 5]] for given in predictions.values()))
    for row, given in zip(images_by_row(figure), expected, strict=True):
        np.testing.assert_array_equal([array for _, array in row], given)


@pytest.mark.parametrize(("size", "count", "width"), [(SIZE, 3, 464), ((64, 64), 10, 128), ((100, 90), 20, 70)])
def test_a_frame_is_as_large_as_a_row_allows(size, count, width):
    given = frames(count, size=size)
    figure = nowcast_figures.strip(given[:2], given, {"a": given})
    left, right, bottom, top = figure.axes[0].images[0].get_extent()
    assert right - left == width and bottom - top == round(width * size[0] / size[1])


def test_a_pixel_of_a_frame_is_a_square_of_pixels_of_the_file(sequence, tmp_path):
    """No row or column of a frame is broader than another: what nearest neighbours give only at whole scales."""
    inputs, truth, predictions = sequence
    figure = nowcast_figures.strip(inputs, truth, predictions)
    axis, images = figure.axes[0], [(image.get_extent(), image.get_array()) for image in figure.axes[0].images]
    box, width = axis.get_position(), figure.get_figwidth() * 150
    png, _ = figures.save(figure, tmp_path / "strip", {})
    with Image.open(png) as file:
        drawn = np.asarray(file.convert("L")).astype(float)
    x, y = round(box.x0 * width), round((1 - box.y1) * len(drawn))
    for (left, right, bottom, top), array in images:
        zoom = (right - left) // SIZE[1]
        assert zoom * SIZE[1] == right - left and zoom * SIZE[0] == bottom - top and zoom > 5
        found = drawn[y + top : y + bottom, x + left : x + right][2:-2, 2:-2]  # within the border
        expected = 255 * np.kron(array, np.ones((zoom, zoom)))[2:-2, 2:-2]
        assert np.abs(found - expected).max() < 2


@pytest.mark.parametrize(("minutes", "every"), [(None, 1), (5, 1), (5, 2)])
def test_labels_of_twenty_columns_stand_apart(minutes, every):
    given = frames(20, size=(64, 64))
    figure = nowcast_figures.strip(given[:10], given, {"a": given}, minutes=minutes, every=every)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)


def test_names_have_room(sequence):
    inputs, truth, _ = sequence
    figure = nowcast_figures.strip(inputs, truth, {"ConvLSTM (9x9)-1x1-128-1x1-128, no peepholes": truth})
    figure.canvas.draw()
    assert min(label.get_window_extent().x0 for label in figure.axes[0].get_yticklabels()) >= 0


def test_rain_is_drawn_in_bands_with_a_scale(sequence, saved):
    inputs, truth, predictions = sequence
    truth = 40 * truth
    truth[0, 0, :2] = np.nan
    figure = nowcast_figures.strip(40 * inputs, truth, predictions, minutes=5, scale="rain")
    image = figure.axes[0].images[4]
    np.testing.assert_array_equal(np.ma.filled(image.get_array(), np.nan), truth[0])
    # White below the first band, grey where nothing is known; one colour a band, each darker than the one before.
    assert to_hex(image.cmap(image.norm(0.09))) == "#ffffff" == to_hex(image.cmap(image.norm(0)))
    assert to_hex(image.to_rgba(np.ma.masked_invalid([[np.nan]]))[0, 0]) == to_hex("0.85")
    within = [0.1, 0.3, 0.7, 1.5, 3, 7, 15, 30, 70, 150]
    for low, high, value in zip(
        nowcast_figures.RAIN_BANDS, (*nowcast_figures.RAIN_BANDS[1:], 1e9), within, strict=True
    ):
        assert low <= value < high and image.cmap(image.norm(value)) == image.cmap(image.norm(low))
    light = [sum(np.array(image.cmap(image.norm(value)))[:3] * (0.3, 0.59, 0.11)) for value in (0, *within)]
    assert light == sorted(light, reverse=True) and len(set(light)) == 11
    _, bar = figure.axes
    assert bar.get_ylabel() == "rain (mm/h)\nwhite: below 0.1, grey: unknown"
    assert [label.get_text() for label in bar.get_yticklabels()] == BANDS
    figure.canvas.draw()
    assert bar.get_tightbbox().x1 <= figure.bbox.x1 and bar.get_tightbbox().x0 > figure.axes[0].bbox.x1
    saved(figure)
    known = nowcast_figures.strip(inputs, np.nan_to_num(truth), predictions, scale="rain")
    assert known.axes[1].get_ylabel() == "rain (mm/h)\nwhite: below 0.1"


def test_unknown_is_light_grey_among_grey_values(sequence):
    inputs, truth, predictions = sequence
    inputs[3, 2, 5] = np.nan
    image = nowcast_figures.strip(inputs, truth, predictions).axes[0].images[3]
    coloured = image.to_rgba(image.get_array())
    assert to_hex(coloured[2, 5]) == to_hex("0.85")
    assert coloured[2, 6, 0] == pytest.approx(inputs[3, 2, 6], abs=1 / 255)


def test_frames_that_do_not_belong_together(sequence, tmp_path):
    inputs, truth, predictions = sequence
    for draw in (nowcast_figures.strip, lambda *a: nowcast_figures.animation(*a, tmp_path / "a", {})):
        with pytest.raises(ValueError, match="of one size"):
            draw(inputs[:, 1:], truth, predictions)
        with pytest.raises(ValueError, match="of one size"):
            draw(inputs, truth[0], predictions)
        with pytest.raises(ValueError, match="ConvLSTM: "):
            draw(inputs, truth[1:], predictions)
    with pytest.raises(ValueError, match="one frame of 7 leaves none of 6 forecasts"):
        nowcast_figures.strip(inputs, truth, predictions, every=7)
    assert not list(tmp_path.iterdir())


# Animations


@pytest.fixture
def drawn_texts(monkeypatch):
    """Every text that is drawn into a picture, with its place."""
    found, text = [], ImageDraw.ImageDraw.text

    def record(self, xy, string, *args, **options):
        found.append((string, xy))
        return text(self, xy, string, *args, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return found


def panels_of(path, count, size=SIZE, zoom=4):
    """What a GIF shows: its header, and for every frame and panel the pixels within the border, and the border."""
    with Image.open(path) as file:
        shown = []
        for number in range(file.n_frames):
            file.seek(number)
            pixels = np.asarray(file.convert("RGB")).astype(int)
            cell = (pixels.shape[1] - 12) // count
            row = []
            for column in range(count):
                top, left = 26 + 3, 6 + column * cell + cell // 2 - zoom * size[1] // 2
                within = pixels[top : top + zoom * size[0], left : left + zoom * size[1]]
                row.append((within, to_hex(pixels[top + 5, left - 1] / 255).upper()))
            shown.append((row, file.info["duration"]))
        file.seek(0)
        return shown, dict(file.info)


def test_an_animation_shows_inputs_and_then_forecasts(sequence, tmp_path, drawn_texts):
    inputs, truth, predictions = sequence
    truth[1, :3] = np.nan
    made_from = {"commands": "launch/run nowcast " + 300 * "x"}
    path = nowcast_figures.animation(inputs, truth, predictions, tmp_path / "a", made_from, milliseconds=200)
    assert path == tmp_path / "a.gif"
    shown, info = panels_of(path, 3)
    assert len(shown) == 10 and [duration for _, duration in shown] == [200] * 10 and info["loop"] == 0
    assert json.loads(info["comment"]) == made_from
    for time, (row, _) in enumerate(shown):
        for given, (pixels, edge) in zip((truth, *predictions.values()), row, strict=True):
            expected = np.kron(np.concatenate([inputs, given])[time], np.ones((4, 4)))
            expected = 255 * np.where(np.isnan(expected), 0.85, expected)
            assert np.abs(pixels - expected[..., None]).max() < 3  # of 255: 252 greys, and two roundings
            assert edge == (figures.COLOURS[0] if time < 4 else "#333333" if given is truth else figures.COLOURS[1])
    words = [text for text, _ in drawn_texts]
    assert words[:6] == ["truth", "input t-3", "ConvLSTM", "input t-3", "persistence", "input t-3"]
    assert words[18:24] == ["truth", "input t", "ConvLSTM", "input t", "persistence", "input t"]
    assert words[24:30] == ["truth", "t+1", "ConvLSTM", "forecast t+1", "persistence", "forecast t+1"]
    assert words[-1] == "forecast t+6"


def test_the_same_arrays_give_the_same_bytes(sequence, tmp_path):
    files = [nowcast_figures.animation(*sequence, tmp_path / name, {"a": "b"}) for name in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()
    with Image.open(files[0]) as file:
        assert file.info["duration"] == 250


def test_an_animation_of_rain_has_its_bands(tmp_path, drawn_texts):
    rain = np.broadcast_to(np.array([np.nan, 0, 0.05, 0.15, 3, 150, 30, 0.7]), (5, 8, 8)).copy()
    rain[:, 0, 0] = np.arange(5)
    path = nowcast_figures.animation(rain[:2], rain[2:], {}, tmp_path / "a", {}, scale="rain", minutes=5, zoom=2)
    words = [text for text, _ in drawn_texts]
    assert words[1:14] == ["input -5 min", *BANDS, "mm/h", "truth"]
    assert "+15 min" in words and "input 0 min" in words
    with Image.open(path) as file:
        pixels = np.asarray(file.convert("RGB"))
        assert all(0 <= x < file.width and 0 <= y < file.height for _, (x, y) in drawn_texts)
    left = drawn_texts[0][1][0] - 8  # half a panel from where its name stands
    found = pixels[26 + 3 + 9, left : left + 16 : 2].astype(float)
    image = nowcast_figures.strip(rain[:2], rain[2:], {}, scale="rain").axes[0].images[0]
    expected = 255 * image.to_rgba(np.ma.masked_invalid(rain[0]))[4, :, :3]
    assert np.abs(found - expected).max() < 1  # bytes round down
    np.testing.assert_array_equal(found[1:3], np.full((2, 3), 255))


def test_long_names_have_room_in_small_panels(tmp_path, drawn_texts):
    small = frames(3, size=(4, 4))
    names = ("ConvLSTM 3x3-64-64", "optical flow and advection")
    nowcast_figures.animation(small[:1], small[1:], dict.fromkeys(names, small[1:]), tmp_path / "a", {})
    middles = [x for text, (x, _) in drawn_texts if text in ("truth", *names)][:3]
    first, second = (TextPath((0, 0), name, size=13).get_extents().width for name in names)
    assert middles[2] - middles[1] > (first + second) / 2 and middles[0] > second / 2


# Scores


def test_scores_against_the_lead_time(saved):
    panels = {
        "light": {
            "persistence": np.array([[0.9, 0.5, 0.1]]),
            "ConvLSTM": np.array([[1, 0.8, 0.6], [0.8, 0.6, 0.2], [np.nan] * 3]),
            "flow": np.array([[0.9, 0.7, 0.5]]),
            "FC-LSTM": np.array([[0.4, 0.3, 0.2]]),
        },
        "heavy": {"ConvLSTM": np.array([[0.5, np.nan, np.nan], [0.3, 0.2, np.nan]])},
    }
    figure = nowcast_figures.score_against_lead(panels, "CSI", minutes=5, baselines=("flow", "persistence"))
    light, heavy = figure.axes
    assert [axis.get_title() for axis in figure.axes] == ["light", "heavy"]
    assert [axis.get_ylabel() for axis in figure.axes] == ["CSI", ""] and light.get_ylim() == heavy.get_ylim()
    assert {axis.get_xlabel() for axis in figure.axes} == {"lead time (minutes)"}
    minutes = [5, 10, 15]
    expected = [[0.9, 0.5, 0.1], [0.9, 0.7, 0.4], [0.9, 0.7, 0.5], [0.4, 0.3, 0.2]]
    assert lines(light) == [(minutes, pytest.approx(values)) for values in expected]
    assert lines(heavy) == [(minutes, pytest.approx([0.4, 0.2, np.nan], nan_ok=True))]
    (band,) = light.collections
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices}
    assert corners == {(5, 1), (10, 0.8), (15, 0.6), (5, 0.8), (10, 0.6), (15, 0.2)}
    assert legend_texts(figure) == ["persistence", "ConvLSTM (n = 2)", "flow", "FC-LSTM (n = 1)"]
    saved(figure)


def test_baselines_are_grey_and_all_others_keep_their_colour():
    row = np.ones((1, 4))
    panels = {"a": {"flow": row, "ConvLSTM": row, "persistence": row}, "b": {"FC-LSTM": row, "ConvLSTM": row}}
    figure = nowcast_figures.score_against_lead(panels, "CSI", baselines=("persistence", "flow"))
    drawn = [[line for line in axis.get_lines() if len(line.get_xdata())] for axis in figure.axes]
    flow, conv, persistence = drawn[0]
    for line in (flow, persistence):
        assert len(set(to_hex(line.get_color())[1::2])) == 1 and line.get_marker() == "None"
    assert (flow.get_color(), flow.get_linestyle()) != (persistence.get_color(), persistence.get_linestyle())
    assert conv.get_color() == drawn[1][1].get_color() == figures.COLOURS[0]
    assert drawn[1][0].get_color() == figures.COLOURS[1]
    assert lines(figure.axes[0])[0][0] == [1, 2, 3, 4] and figure.axes[0].get_xlabel() == "lead time (frames)"


def test_panels_of_different_scores_have_scales_of_their_own(saved):
    scores = {"CSI": "CSI", "FAR": "false alarms", "MSE": "MSE", "correlation": "r"}
    panels = {title: {"ConvLSTM": 10**k * frames(3, k, (15,))} for k, title in enumerate(scores)}
    figure = nowcast_figures.score_against_lead(panels, scores)
    assert [axis.get_ylabel() for axis in figure.axes] == list(scores.values())
    assert len({axis.get_ylim() for axis in figure.axes}) == 4
    assert figure.axes[0].get_gridspec().get_geometry() == (2, 2)
    saved(figure)


def test_five_panels_and_a_model_that_diverged():
    scores = {"ConvLSTM": frames(2, size=(6,)), "tanh": np.full((2, 6), np.nan)}
    figure = nowcast_figures.score_against_lead({f"panel {k}": scores for k in range(5)}, "CSI")
    assert len(figure.axes) == 5 and all(len(lines(axis)) == 1 for axis in figure.axes)
    assert [axis.get_ylabel() for axis in figure.axes] == ["CSI", "", "", "CSI", ""]
    assert legend_texts(figure) == ["ConvLSTM (n = 2)", "tanh (n = 0)"]


# Receptive fields


def field(kernel, steps=9, size=21):
    """A field of 3 pixels in diameter that grows with the kernel, fading with distance in time and space."""
    rows, columns = np.abs(np.indices((size, size)) - size // 2)
    reach = [1 + step * (kernel // 2) for step in range(steps)]
    fades = np.exp(-0.1 * (rows**2 + columns**2))
    return 40 * np.stack([np.where(np.maximum(rows, columns) <= r, fades * 0.5**d, 0) for d, r in enumerate(reach)])


@pytest.mark.parametrize("kernels", [(3,), (1, 3)])
def test_maps_and_sizes_of_receptive_fields(kernels, saved):
    maps = {f"{kernel}x{kernel} to state": field(kernel) for kernel in kernels}
    sizes = {name: [3 + d * (kernel - 1) for d in range(9)] for name, kernel in zip(maps, kernels, strict=True)}
    figure = nowcast_figures.receptive_field(maps, sizes)
    cells = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in cells[:5]] == [f"$d = {d}$" for d in (0, 2, 4, 6, 8)]
    assert [axis.get_ylabel().replace("\n", " ") for axis in cells[::5]] == list(maps)
    for axis, (found, step) in zip(cells, itertools.product(maps.values(), (0, 2, 4, 6, 8)), strict=True):
        (image,) = axis.images
        np.testing.assert_allclose(np.ma.filled(image.get_array(), 0), found[step] / 40)
        np.testing.assert_array_equal(np.ma.getmaskarray(image.get_array()), found[step] == 0)
        # White is 0 and nothing else, however little it is.
        assert to_hex(image.to_rgba(np.ma.masked_equal([[0.0]], 0))[0, 0]) == "#ffffff"
        assert to_hex(image.to_rgba(np.array([[1e-30]]))[0, 0]) != "#ffffff"
        assert image.get_interpolation() == "nearest"
    bar, curve = [axis for axis in figure.axes if not axis.images]
    assert bar.get_yscale() == "log" and "dh_T" in bar.get_ylabel()
    assert lines(curve) == [(list(range(9)), values) for values in sizes.values()]
    assert (curve.get_xlabel(), curve.get_ylabel()) == ("steps $d$ since the input", "diameter (pixels of the map)")
    assert legend_texts(figure) == list(sizes) and curve.get_ylim()[0] == 0
    saved(figure)


def test_maps_of_few_steps_or_of_nothing():
    figure = nowcast_figures.receptive_field({"dead": np.zeros((2, 5, 5))}, {"dead": [0, 0]})
    cells = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in cells] == ["$d = 0$", "$d = 1$"]
    assert all(axis.images[0].get_array().mask.all() for axis in cells)
    figure.canvas.draw()
