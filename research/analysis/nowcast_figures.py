"""Figures of nowcasts: frames in strips and in motion, scores against the lead time, receptive fields.

Frames are grey values in 0..1 (`scale="grey"`) or rain rates in mm/h (`scale="rain"`); NaN is where nothing is known,
such as outside of the radars' reach. Time is counted from the last input: inputs are t-9 ... t and forecasts t+1 ...,
or minutes, where the caller says how many there are between two frames.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps, get_data_path
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, LogNorm, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath
from PIL import Image, ImageDraw, ImageFont

from research.analysis import gif
from research.analysis.figures import COLOURS, legend_below, line_style, new, styled

RAIN_BANDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)  # mm/h; less is white
_UNKNOWN = "0.85"
# From light to dark, evenly to the eye and to a colour-blind one, and in print.
_RAIN = colormaps["viridis_r"].with_extremes(under="white", bad=_UNKNOWN)
_SCALES = {
    "grey": {"norm": Normalize(0, 1), "cmap": colormaps["gray"].with_extremes(bad=_UNKNOWN)},
    "rain": {"norm": BoundaryNorm(RAIN_BANDS, _RAIN.N, extend="both"), "cmap": _RAIN},
}
# Strips are laid out in pixels of their PNG, so that each pixel of a frame becomes a whole number of them.
_DPI, _STRIP, _GAP, _TIMES, _MARGIN, _BAR = 150, 1400, 6, 28, 12, 160
_BORDER = {"fill": False, "edgecolor": "0.5", "linewidth": 0.5, "clip_on": False}
# Of an animation, in its pixels.
_INPUT, _TRUTH, _FORECAST = COLOURS[0], "0.2", COLOURS[1]
_EDGE, _LINE, _SWATCH = 3, 20, 34
_BASELINES = [{"color": c, "linestyle": s} for c, s in (("0.2", ":"), ("0.55", "-."), ("0.4", "--"))]
_FAINTEST = 1e-6  # of a network's largest derivative: what is less, and not 0, is drawn as this


@styled
def strip(
    inputs: np.ndarray,
    truth: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    *,
    minutes: int | None = None,
    every: int = 1,
    scale: str = "grey",
) -> Figure:
    """A sequence frame by frame: a row of inputs, below it the truth, then a row a model.

    Args:
      inputs: `[time_in, height, width]`.
      truth: `[time_out, height, width]`, what followed.
      predictions: model -> `[time_out, height, width]`.
      minutes: between two frames, for the labels; without it they count frames.
      every: show one frame of so many, counted from t.
      scale: "grey" or "rain".

    Raises:
      ValueError: frames of different sizes or numbers, or no forecast left to show.
    """
    inputs, truth, predictions = _checked(inputs, truth, predictions)
    past = [time for time in range(1 - len(inputs), 1) if time % every == 0]
    future = [time for time in range(1, len(truth) + 1) if time % every == 0]
    if not future:
        raise ValueError(f"one frame of {every} leaves none of {len(truth)} forecasts")
    rows = [("input", inputs, past), ("truth", truth, future)]
    rows += [(name, frames, future) for name, frames in predictions.items()]

    columns = max(len(past), len(future))
    zoom = _STRIP / (columns * truth.shape[2])
    height, width = (round(size * (int(zoom) or zoom)) for size in truth.shape[1:])
    # The times stand above the inputs, and again above the first row of what follows.
    tops = [_TIMES + row * (height + _GAP) + (_TIMES if row else 0) for row in range(len(rows))]
    names = [name for name, *_ in rows]
    whole = columns * (width + _GAP) - _GAP
    figure, axis = _canvas(names, whole, tops[-1] + height, right=_BAR if scale == "rain" else 0)
    for row, (top, (_, frames, times)) in enumerate(zip(tops, rows, strict=True)):
        for column, time in enumerate(times):
            left = column * (width + _GAP)
            box = (left, left + width, top + height, top)
            # Of the inputs the last is t, of the others the first is t+1: both are at time - 1.
            axis.imshow(frames[time - 1], extent=box, interpolation="nearest", aspect="auto", **_SCALES[scale])
            axis.add_patch(Rectangle((left, top), width, height, **_BORDER))
            if row < 2:
                place = {"ha": "center", "va": "bottom", "fontsize": 7}
                axis.text(left + width / 2, top - 5, _when(time, minutes), **place)
    axis.set(xlim=(0, whole), ylim=(tops[-1] + height, 0))
    axis.set_yticks([top + height / 2 for top in tops], names)
    if scale == "rain":
        _rain_bar(figure, axis, unknown=any(np.isnan(frames).any() for _, frames, _ in rows))
    return figure


def animation(
    inputs: np.ndarray,
    truth: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    path: Path,
    made_from: Mapping[str, str],
    *,
    milliseconds: int = 250,
    zoom: int = 4,
    scale: str = "grey",
    minutes: int | None = None,
) -> Path:
    """Writes `path.gif`: the truth and each model side by side, first the inputs and then what they make of them.

    It loops for ever, carries its provenance as JSON in its comment and has the same bytes each time it is made from
    the same arrays. The frame around a panel tells inputs from forecasts, and so do the words below it.

    Args:
      inputs: `[time_in, height, width]`.
      truth: `[time_out, height, width]`, what followed.
      predictions: model -> `[time_out, height, width]`.
      path: of the file; its suffix becomes .gif.
      made_from: what made it, such as `research.analysis.figures.provenance`.
      milliseconds: of a frame, in whole hundredths of a second.
      zoom: side of a pixel.
      scale: "grey" or "rain".
      minutes: between two frames, for the labels; without it they count frames.

    Raises:
      ValueError: frames of different sizes or numbers, or a duration that a GIF cannot say.
      CarouselError: the file cannot be written.
    """
    inputs, truth, predictions = _checked(inputs, truth, predictions)
    panels = {name: np.concatenate([inputs, frames]) for name, frames in {"truth": truth, **predictions}.items()}
    # Matplotlib's own font, laid out without what another machine might have.
    font_file = Path(get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    font = ImageFont.truetype(font_file, 13, layout_engine=ImageFont.Layout.BASIC)
    times = range(1 - len(inputs), len(truth) + 1)
    texts = [*panels, *(_caption(name, time, minutes) for name in ("truth", "") for time in times)]
    cell = max(zoom * truth.shape[2] + 2 * _EDGE, *(math.ceil(font.getlength(text)) for text in texts)) + _MARGIN
    pictures = []
    for number, time in enumerate(times):
        shown = {name: _enlarged(frames[number], scale, zoom) for name, frames in panels.items()}
        captions = {name: _caption(name, time, minutes) for name in panels}
        pictures.append(_picture(shown, captions, time, cell, font, scale))
    colours = {_byte(colour) for colour in (_INPUT, _TRUTH, _FORECAST, _UNKNOWN)}
    colours |= set(_band_colours()) if scale == "rain" else set()
    return gif.write(path, pictures, made_from, milliseconds=milliseconds, colours=colours)


@styled
def score_against_lead(
    panels: Mapping[str, Mapping[str, np.ndarray]],
    ylabel: str | Mapping[str, str],
    *,
    minutes: int | None = None,
    baselines: Collection[str] = (),
) -> Figure:
    """A score against the lead time: mean and range over seeds, a line a model and a panel a title.

    A score that is not a finite number is left out of its mean, as where no rain fell to be hit; a seed without any
    finite one is not counted.

    Args:
      panels: title -> model -> `[seeds, lead]`, the first being that of t+1; a baseline has one row.
      ylabel: of all panels, which then have one scale, or title -> that of its panel.
      minutes: between two frames; without it the axis counts frames.
      baselines: models that learn nothing, drawn in grey; all others have a colour of their own in all panels.
    """
    rows = -(-len(panels) // 3)
    columns = -(-len(panels) // rows)
    one = isinstance(ylabel, str)
    width, height = (3.6, 2.9) if columns > 1 else (5.2, 3.6)
    figure, axes = new(columns, rows, width=width, height=height, sharey=one)
    names = list(dict.fromkeys(name for by_model in panels.values() for name in by_model))
    styles, counts = _styles(names, baselines), {name: set() for name in names}
    for number, (axis, (title, by_model)) in enumerate(zip(axes, panels.items(), strict=False)):
        for name, scores in by_model.items():
            scores = np.ma.masked_invalid(np.atleast_2d(scores))
            scores = scores[scores.count(axis=1) > 0]
            counts[name].add(len(scores))
            if not len(scores):
                continue
            lead = (minutes or 1) * np.arange(1, scores.shape[1] + 1)
            marks = {"markersize": 4, "markevery": max(1, len(lead) // 6)}
            axis.plot(lead, scores.mean(axis=0).filled(np.nan), **marks, **styles[name])
            if len(scores) > 1:
                band = {"color": styles[name]["color"], "alpha": 0.15, "linewidth": 0}
                axis.fill_between(lead, scores.min(axis=0), scores.max(axis=0), **band)
        axis.set(title=title, xlabel=f"lead time ({'minutes' if minutes else 'frames'})")
        if not one or number % columns == 0:
            axis.set(ylabel=ylabel if one else ylabel[title])
        axis.locator_params(axis="x", integer=True)
    for axis in axes[len(panels) :]:
        axis.remove()
    for name in names:
        seeds = "-".join(map(str, sorted(counts[name])))
        label = name if name in baselines and counts[name] == {1} else f"{name} (n = {seeds})"
        axes[0].plot([], [], markersize=4, label=label, **styles[name])
    legend_below(figure, axes[0])
    return figure


@styled
def receptive_field(maps: Mapping[str, np.ndarray], sizes: Mapping[str, Sequence[int]]) -> Figure:
    """What of earlier inputs a state sees: derivatives as maps, a row a network, and the size of the field over time.

    With k x k kernels from state to state the field grows by k - 1 pixels in diameter with every step since the input;
    with 1 x 1 it does not grow at all. Maps are relative to their network's largest value, on a logarithmic scale;
    white is exactly 0.

    Args:
      maps: network -> `[steps, height, width]`, |dh_T / dx_{T-d}| of one state and each pixel, d = 0, 1, ... first.
      sizes: network -> diameter in pixels of what is not 0, d = 0, 1, ... first.

    Source: Shi et al. 2015, section 3.1: larger state-to-state kernels capture faster motions.
    """
    steps = min(len(found) for found in maps.values())
    shown = sorted({round(d) for d in np.linspace(0, steps - 1, 5)})
    widths = {"width_ratios": [1] * len(shown) + [0.45 * (len(shown) + 1)]}
    size = {"width": 10.2 / (len(shown) + 1), "height": max(1.5, 3.2 / len(maps))}
    figure, axes = new(len(shown) + 1, len(maps), gridspec_kw=widths, **size)
    grid, cells = axes[0].get_gridspec(), np.reshape(axes, (len(maps), -1))
    colours = {"norm": LogNorm(_FAINTEST, 1), "cmap": colormaps["viridis_r"].with_extremes(bad="white")}
    for row, (name, found) in zip(cells, maps.items(), strict=True):
        found = np.asarray(found, float) / (np.max(found) or 1)
        for axis, distance in zip(row[:-1], shown, strict=True):
            axis.imshow(np.ma.masked_equal(found[distance], 0), interpolation="nearest", **colours)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(visible=True, color="0.5", linewidth=0.5)
        row[0].set_ylabel(name.replace(" ", "\n", 1), fontsize=8)
        row[-1].remove()
    for axis, distance in zip(cells[0], shown, strict=False):
        axis.set_title(f"$d = {distance}$")
    bar = figure.colorbar(ScalarMappable(**colours), ax=list(cells[:, :-1].flat), extend="min", pad=0.02, aspect=30)
    bar.set_label(r"$|dh_T\,/\,dx_{T-d}|$, largest = 1 (white: 0)", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    axis = figure.add_subplot(grid[:, -1])
    for number, (name, diameters) in enumerate(sizes.items()):
        axis.plot(range(len(diameters)), diameters, markersize=4, label=name, **line_style(number))
    axis.set(
        title="receptive field",
        xlabel="steps $d$ since the input",
        ylabel="diameter (pixels of the map)",
        ylim=(0, None),
    )
    axis.locator_params(integer=True)
    legend_below(figure, axis)
    return figure


def _checked(inputs, truth, predictions):
    """Arrays of frames of one size, as many of each model as of the truth."""
    inputs, truth = np.asarray(inputs), np.asarray(truth)
    predictions = {name: np.asarray(frames) for name, frames in predictions.items()}
    if truth.ndim != 3 or inputs.ndim != 3 or inputs.shape[1:] != truth.shape[1:]:
        raise ValueError(f"inputs {inputs.shape} and truth {truth.shape} must be [time, height, width] of one size")
    for name, frames in predictions.items():
        if frames.shape != truth.shape:
            raise ValueError(f"{name}: {frames.shape} is not {truth.shape}, the shape of the truth")
    return inputs, truth, predictions


def _when(time: int, minutes: int | None) -> str:
    if minutes is None:
        return f"t{time:+d}" if time else "t"
    return f"{time * minutes:+d} min" if time else "0 min"


def _styles(names: Sequence[str], baselines: Collection[str]) -> dict[str, dict]:
    """Colours for what learns, greys without marks for what does not."""
    learned = [name for name in names if name not in baselines]
    greys = {name: _BASELINES[k % len(_BASELINES)] for k, name in enumerate(n for n in names if n in baselines)}
    return greys | {name: line_style(number) for number, name in enumerate(learned)}


# Strips


def _canvas(names: Sequence[str], width: int, height: int, right: int) -> tuple[Figure, Axes]:
    """An empty panel of just that many pixels, with room for the names at its left and for `right` more pixels."""
    points = max(TextPath((0, 0), name, size=9).get_extents().width for name in names)
    left = 2 * _MARGIN + math.ceil(points * _DPI / 72)
    whole, tall = left + width + _MARGIN + right, height + 2 * _MARGIN
    edges = {"left": left / whole, "right": (left + width) / whole, "bottom": _MARGIN / tall, "top": 1 - _MARGIN / tall}
    size = {"width": whole / _DPI, "height": tall / _DPI}
    figure, (axis,) = new(1, **size, layout="none", gridspec_kw=edges)
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    axis.set_xticks([])
    return figure, axis


def _rain_bar(figure: Figure, axis: Axes, unknown: bool) -> None:
    box, pixel = axis.get_position(), 1 / (_DPI * figure.get_figwidth())
    place = figure.add_axes((box.x1 + 2 * _MARGIN * pixel, box.y0, 20 * pixel, box.height * 0.95))
    bar = figure.colorbar(ScalarMappable(**_SCALES["rain"]), cax=place, ticks=RAIN_BANDS, format="%g")
    bar.ax.tick_params(labelsize=7)
    bar.set_label(f"rain (mm/h)\nwhite: below 0.1{', grey: unknown' if unknown else ''}", fontsize=7)


# Animations


def _caption(name: str, time: int, minutes: int | None) -> str:
    kind = "input " if time <= 0 else "" if name == "truth" else "forecast "
    return kind + _when(time, minutes)


def _coloured(values: np.ndarray, scale: str) -> np.ndarray:
    """Red, green and blue in 0..255 of every value."""
    norm, cmap = _SCALES[scale]["norm"], _SCALES[scale]["cmap"]
    return cmap(norm(np.ma.masked_invalid(values)), bytes=True)[..., :3]


def _enlarged(frame: np.ndarray, scale: str, zoom: int) -> Image.Image:
    return Image.fromarray(_coloured(frame, scale).repeat(zoom, axis=0).repeat(zoom, axis=1))


def _picture(shown, captions, time, cell, font, scale):
    """One moment of an animation: panels in frames, their names above and captions below, and the scale of rain."""
    bands = len(RAIN_BANDS) + 1 if scale == "rain" else 0
    tall = next(iter(shown.values())).height + 2 * _EDGE
    wide = max(len(shown) * cell, bands and (bands + 2) * _SWATCH) + _MARGIN
    picture = Image.new("RGB", (wide, tall + 2 * _LINE + _MARGIN + (2 * _LINE if bands else 0)), "white")
    draw = ImageDraw.Draw(picture)
    for column, (name, frame) in enumerate(shown.items()):
        middle = _MARGIN // 2 + column * cell + cell // 2
        left, top = middle - frame.width // 2 - _EDGE, _LINE + _MARGIN // 2
        colour = _INPUT if time <= 0 else _TRUTH if column == 0 else _FORECAST
        draw.rectangle((left, top, left + frame.width + 2 * _EDGE - 1, top + tall - 1), fill=_byte(colour))
        picture.paste(frame, (left + _EDGE, top + _EDGE))
        draw.text((middle, top - 6), name, "black", font, anchor="ms")
        draw.text((middle, top + tall + 3), captions[name], "black", font, anchor="ma")
    for band, (low, colour) in enumerate(zip((0, *RAIN_BANDS), _band_colours(), strict=True) if bands else ()):
        left, top = _MARGIN + band * _SWATCH, tall + 2 * _LINE + _MARGIN
        draw.rectangle((left, top, left + _SWATCH, top + 12), fill=colour, outline=_byte("0.5"))
        if band:
            draw.text((left, top + 14), f"{low:g}", "black", font, anchor="ma")
    if bands:
        draw.text((left + _SWATCH + 8, top + 6), "mm/h", "black", font, anchor="lm")
    return picture


def _band_colours() -> list[tuple[int, ...]]:
    """Of each band of rain, what is below the first included."""
    return [tuple(map(int, colour)) for colour in _coloured(np.array((0, *RAIN_BANDS)), "rain")]


def _byte(colour: str) -> tuple[int, ...]:
    return tuple(round(255 * part) for part in to_rgb(colour))
