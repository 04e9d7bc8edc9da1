"""Radar sequences: pixels to rain by hand, what is one event, one line for what is none, and the real frames."""

import datetime
import gzip
import hashlib
import io
import os
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from research.data import radar, radar_files
from research.errors import CarouselError, UsageError

SHARED = pathlib.Path(os.environ.get("CAROUSEL_DATA", pathlib.Path(__file__).parents[4] / "shared/data")) / "radar"
SHAPE = (5, 7)


def encoded(pixels, kind, mode="P"):
    pixels = np.asarray(pixels, np.uint8)
    height, width = pixels.shape[:2]
    if kind == "pgm":
        return b"P5\n# a comment 3 4\n%d %d\n# another\n255\n" % (width, height) + pixels.tobytes()
    image = Image.frombytes(mode, (width, height), pixels.tobytes())
    if mode == "P":  # a palette that runs backwards: the indices count, not the colours
        image.putpalette([255 - number // 3 for number in range(768)])
    content = io.BytesIO()
    image.save(content, kind.upper(), optimize=False)  # a GIF would get other indices
    return content.getvalue()


def write(path, pixels, mode="P"):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = encoded(pixels, path.name.removesuffix(".gz").rpartition(".")[2], mode)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def frames(count, shape=SHAPE, top=256):
    return np.random.default_rng(count).integers(0, top, (count, *shape)).astype(np.uint8)


def sequence(folder, start="201607112345", count=5, minutes=5, name="{}.pgm"):
    first = datetime.datetime.strptime(start, "%Y%m%d%H%M")
    times = [first + datetime.timedelta(minutes=minutes * number) for number in range(count)]
    return [
        write(folder / name.format(f"{time:%Y%m%d%H%M}"), pixels)
        for time, pixels in zip(times, frames(count), strict=True)
    ]


def rename(path, name):
    path.rename(path.with_name(name))


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What a pixel is in mm/h, computed by hand from the formulas.
@pytest.mark.parametrize(
    ("source", "rows"),
    [
        # mm in 5 minutes: pixel 31 is 10^(-40.5 / 20) / 316 = 2.98768e-5, to the power 2/3 9.62813e-4 (the number in
        # pysteps' test of the file 2017-01-31 0945); pixel 151 (9441 / 316)^(2/3) = 9.62813. By 12.
        ("MeteoSwiss AQC", {0: 0, 1: 0, 31: 0.0115537560, 151: 115.537560, 251: 0, 254: 0, 255: np.nan}),
        # Pixel 64 is 0 dBZ: 223^(-1 / 1.53); pixel 144 is 40 dBZ: (10^4 / 223)^(1 / 1.53).
        ("FMI", {0: 0, 64: 0.0291850, 144: 12.0099, 255: np.nan}),
        # Pixel 51 is 4 dBZ, 255 is 60: (10^6 / 58.53)^(1 / 1.56).
        ("HKO-7", {0: 0, 51: 0.132885, 255: 516.677}),
        ("any", {0: 0, 51: 0.0798840, 255: 377.363}),
    ],
)
def test_a_pixel_is_rain(source, rows):
    table = radar.SOURCES[source].table
    assert table.dtype == np.float32
    np.testing.assert_allclose(table[list(rows)], list(rows.values()), rtol=1e-5)
    assert (np.diff(table[2:251]) > 0).all()


@pytest.mark.parametrize(
    ("name", "source", "time"),
    [
        ("AQC151351545F_00005.801.gif", "MeteoSwiss AQC", "2015-05-15 15:45"),
        ("AQC161940000V_00005.801.gif", "MeteoSwiss AQC", "2016-07-12 00:00"),
        ("201609281445_fmi.radar.composite.lowest_FIN_SUOMI1.pgm.gz", "FMI", "2016-09-28 14:45"),
        ("RAD151012101200.png", "HKO-7", "2015-10-12 10:12"),  # not the year 1510
        ("rain-20150515154500-x.png", "any", "2015-05-15 15:45"),
    ],
)
def test_the_name_tells_source_and_time(name, source, time):
    found, when = radar._source(pathlib.Path(name))
    assert (found, when) == (radar.SOURCES[source], datetime.datetime.fromisoformat(time))


def test_rain_reflectivity_and_grey():
    rain = np.asarray([0, 0.5, 1, 100, np.nan], np.float32)
    dbz = radar.to_dbz(rain)
    # 10 log10 118.239 = 20.72761, 10 * 1.5241 * log10 0.5 = -4.58800
    np.testing.assert_allclose(dbz, [-np.inf, 16.13961, 20.72761, 51.20961, np.nan], rtol=1e-6)
    np.testing.assert_allclose(radar.to_rain(dbz), rain, rtol=1e-5)
    np.testing.assert_allclose(radar.to_dbz(rain[2:4], a=200, b=1.6), [23.0103, 55.0103], rtol=1e-6)
    assert radar.to_dbz(1) == pytest.approx(20.72761)

    grey = radar.to_grey(np.asarray([0, 0.19, 0.5, 100, 1000, np.nan], np.float32))
    np.testing.assert_allclose(grey, [0, 0, 0.1227922, 0.8241922, 1, 0], rtol=1e-5)
    back = radar.to_rain_from_grey(grey)
    np.testing.assert_allclose(back, [0, 0, 0.5, 100, 377.363, 0], rtol=1e-5)
    assert {array.dtype for array in (dbz, grey, back)} == {np.dtype(np.float32)}
    np.testing.assert_allclose(radar.to_grey(rain[1:4], low=0, high=70), dbz[1:4] / 70, rtol=1e-6)
    np.testing.assert_allclose(radar.to_rain_from_grey(dbz[1:4] / 70, low=0, high=70), rain[1:4], rtol=1e-5)


def test_the_same_with_jax_and_its_gradients():
    def both(rain):
        grey = radar.to_grey(rain)
        return radar.to_dbz(rain), grey, radar.to_rain_from_grey(grey)

    def on_device(rain, grey):
        return both(rain), jax.grad(lambda grey: radar.to_rain_from_grey(grey).sum())(grey)

    rain = np.asarray([0, 0.1, 0.5, 100, 1000, np.nan], np.float32)
    found, slope = jax.jit(on_device)(rain, np.asarray([0, 0.5], np.float32))
    for ours, expected in zip(found, both(rain), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5)
        assert ours.dtype == np.float32
    # dR / dgrey = R ln 10 (high - low) / (10 b), R = 10^((35 - 20.72761) / 15.241) at grey 0.5
    np.testing.assert_allclose(slope, [0, 8.63869 * np.log(10) * 50 / 15.241], rtol=1e-4)


@pytest.mark.parametrize("suffix", ["gif", "png", "pgm", "gif.gz", "png.gz", "pgm.gz", "PGM"])
@pytest.mark.parametrize("mode", ["P", "L"])
def test_each_format_gives_back_its_pixels(tmp_path, suffix, mode):
    pixels = frames(2)
    for number in (0, 1):
        path = write(tmp_path / f"20150515000{number}.{suffix.lower()}", pixels[number], mode)
        path.rename(path.with_name(path.name.replace(suffix.lower(), suffix)))
    (tmp_path / "SOURCE.md").write_text("not a frame")
    (tmp_path / ".hidden.png").write_text("not a frame")
    (event,) = radar.load(str(tmp_path))
    assert (event.name, event.minutes, event.rain.dtype) == ("20150515", 1, np.float32)
    np.testing.assert_array_equal(event.rain, radar.SOURCES["any"].table[pixels])
    assert event.checksums == {
        f"20150515000{number}.{suffix}": hashlib.sha256(
            (tmp_path / f"20150515000{number}.{suffix}").read_bytes()
        ).hexdigest()
        for number in (0, 1)
    }


def test_an_event_runs_past_midnight_and_folders_are_apart(tmp_path):
    sequence(tmp_path / "b")  # 2345 to 0005
    sequence(tmp_path / "a/deep", "201607120010", 3, minutes=6)  # goes on with other steps, elsewhere
    sequence(tmp_path / "c", "201607120500", 2)
    sequence(tmp_path / "d", "201501010000", 2)
    sequence(tmp_path / ".git", "201401010000", 2)
    events = radar.load(tmp_path)
    assert [(event.name, event.minutes, len(event.rain), len(event.checksums)) for event in events] == [
        ("20150101", 5, 2, 2),
        ("20160711", 5, 5, 5),
        ("20160712", 6, 3, 3),
        ("20160712", 5, 2, 2),
    ]
    assert list(events[1].checksums)[-1] == "201607120005.pgm"


def test_days_of_one_folder_are_cut_where_midnight_interrupts(tmp_path):
    sequence(tmp_path, "201607111200", 3)
    for path, prefix in zip(sequence(tmp_path, "201607122350", 4), "dbca", strict=True):
        rename(path, f"{prefix}-{path.name}")  # the order is that of time
    events = radar.load(tmp_path)
    assert [(event.name, len(event.rain)) for event in events] == [("20160711", 3), ("20160712", 4)]
    np.testing.assert_array_equal(events[1].rain, radar.SOURCES["any"].table[frames(4)])
    assert list(events[1].checksums) == [
        "d-201607122350.pgm",
        "b-201607122355.pgm",
        "c-201607130000.pgm",
        "a-201607130005.pgm",
    ]


@pytest.mark.parametrize(
    ("start", "hours", "parts"),
    [
        (0, 25, [(0, 25)]),  # 0000 to 0000 of the next day: 24 hours
        (0, 26, [(0, 24), (24, 26)]),
        (20, 25, [(0, 25)]),
        (20, 54, [(0, 4), (4, 28), (28, 52), (52, 54)]),
        (0, 49, [(0, 24), (24, 49)]),  # a last frame at midnight is no event of its own
    ],
)
def test_what_is_longer_than_a_day_is_cut_at_midnight(start, hours, parts):
    first = datetime.datetime(2016, 7, 11, start)
    numbered = [(first + datetime.timedelta(hours=n), pathlib.Path(f"{n}.png")) for n in range(hours)]
    assert radar_files.sequences(numbered) == (60, [slice(*part) for part in parts])


def test_a_step_that_is_too_short_is_none_over_midnight_either():
    minutes = [0, 5, 10, 13]
    first = datetime.datetime(2016, 7, 11, 23, 48)
    numbered = [(first + datetime.timedelta(minutes=m), pathlib.Path(f"{m}.png")) for m in minutes]
    with pytest.raises(
        CarouselError, match=r"13.png is out of step: expected .* 2016-07-12 0003, found 2016-07-12 0001"
    ):
        radar_files.sequences(numbered)


def truncated(path, count=40):
    path.write_bytes(path.read_bytes()[:-count])


def flipped(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["{}.gif", "{}.png", "{}.pgm", "{}.gif.gz", "{}.png.gz", "{}.pgm.gz"])
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: truncated(path, 1), r"truncated"),
        (lambda path: truncated(path, 20), r"truncated"),
        (lambda path: flipped(path, 0), r"not a readable .gz|no header|does not begin"),
        (lambda path: path.write_bytes(b""), r"no header|does not end"),
        (lambda path: path.write_bytes(b"text;"), r"no header|does not (begin|end)|not a readable .gz"),
    ],
)
def test_a_damaged_frame_is_one_line_with_its_name(tmp_path, name, harm, message):
    damaged = sequence(tmp_path, name=name)[3]
    harm(damaged)
    with pytest.raises(CarouselError, match=message) as caught:
        radar.load(tmp_path)
    assert one_line(caught).startswith(str(damaged))
    assert "BytesIO" not in str(caught.value)


def test_flipped_bits_of_a_png_are_found(tmp_path):
    # Pillow's load() passes over the checksums and takes some of these with other pixels.
    path = write(tmp_path / "201507112345.png", frames(2)[0])
    content = path.read_bytes()
    for place in range(content.index(b"IDAT"), len(content)):
        for bit in (0, 5, 7):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            with pytest.raises(CarouselError, match=r"not a readable PNG of a radar: .*; get it again") as caught:
                radar_files.read_frame(path)
            assert one_line(caught).startswith(str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("png", lambda: encoded(np.zeros((5, 7, 3)), "png", "RGB"), "mode RGB; expected 8-bit grey .* no colour"),
        ("pgm", lambda: b"P6\n7 5\n255\n" + bytes(105), "in colour"),
        ("pgm", lambda: b"P5\n7 5\n127\n" + bytes(35), "the highest value is 127; expected 255"),
        ("pgm", lambda: b"P5\n7 5\n255\n" + bytes(36), "36 bytes of pixels, expected 7 x 5"),
        ("pgm", lambda: b"P5\n0 5\n255\n", "0 bytes of pixels"),
        ("gif", lambda: encoded(np.zeros(SHAPE), "png"), "not a readable GIF of a radar: it does not end as one"),
    ],
)
def test_what_is_not_one_byte_a_pixel_is_one_line(tmp_path, name, content, message):
    wrong = sequence(tmp_path)[2].with_suffix(f".{name}")
    wrong.with_suffix(".pgm").unlink()
    wrong.write_bytes(content())
    with pytest.raises(CarouselError, match=message) as caught:
        radar.load(tmp_path)
    assert str(wrong) in one_line(caught)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda paths: paths[2].unlink(),
            r"201607111255.pgm follows a gap: expected the frame of 2016-07-11 1250, found 2016-07-11 1255",
        ),
        (
            lambda paths: rename(paths[3], "201607111253.pgm"),
            r"201607111253.pgm is out of step: expected the frame of 2016-07-11 1255, found 2016-07-11 1253",
        ),
        (
            lambda paths: write(paths[1].with_suffix(".png"), frames(1)[0]),
            r"201607111245.png has the time of 201607111245.pgm, 2016-07-11 1245",
        ),
        (lambda paths: [path.unlink() for path in paths[1:]], r"201607111240.pgm is alone: a sequence takes 2 frames"),
        (
            lambda paths: write(paths[4], np.zeros((7, 5))),
            r"201607111300.pgm is 7 x 5 pixels .* but 201607111240.pgm is 5 x 7 pixels",
        ),
        (lambda paths: rename(paths[0], "first.pgm"), r"first.pgm has no time in its name: expected YYYYMMDDHHMM"),
        (lambda paths: rename(paths[0], "201613111240.pgm"), r"201613111240 in its name is no time"),
        (lambda paths: rename(paths[0], "AQC153991545F_00005.801.pgm"), r"153991545 in its name is no time"),
        (lambda paths: rename(paths[0], "AQC151351545F_00060.801.pgm"), r"has no time in its name"),
    ],
)
def test_what_is_no_sequence_is_one_line_with_the_file(tmp_path, harm, message):
    harm(sequence(tmp_path, "201607111240"))
    with pytest.raises(CarouselError, match=message) as caught:
        radar.load(tmp_path)
    assert one_line(caught).startswith(str(tmp_path))


def test_a_folder_that_is_missing_empty_or_a_file_is_one_line(tmp_path):
    (tmp_path / "SOURCE.md").write_text("nothing here")
    for folder, message in (
        (tmp_path, "holds no radar frames"),
        (tmp_path / "none", "does not exist"),
        (tmp_path / "SOURCE.md", "is not a folder"),
    ):
        with pytest.raises(CarouselError, match=message) as caught:
            radar.load(folder)
        assert one_line(caught).startswith(str(folder))


def test_scale_takes_means_of_whole_blocks(tmp_path):
    sequence(tmp_path, count=2)
    pixels = np.zeros((2, *SHAPE), np.uint8)
    pixels[:, :2, 2:4] = [[31, 151], [0, 1]]
    pixels[1, 3, 5] = 255
    for number, path in enumerate(sorted(tmp_path.iterdir())):
        path.unlink()
        write(tmp_path / f"AQC15135154{number}F_00005.801.gif", pixels[number])
    (event,) = radar.load(tmp_path, scale=2)
    expected = np.zeros((2, 2, 3), np.float32)
    expected[:, 0, 1] = (0.011553756 + 115.53756) / 4
    expected[1, 1, 2] = np.nan
    np.testing.assert_allclose(event.rain, expected, rtol=1e-6)
    for scale in (0, 6):
        with pytest.raises(UsageError, match=f"scale {scale} is") as caught:
            radar.load(tmp_path, scale=scale)
        one_line(caught)


def test_tiles_lie_side_by_side_and_are_whole():
    rain = np.arange(2 * 7 * 9, dtype=np.float32).reshape(2, 7, 9)
    rain[1, 4, 1] = np.nan  # in one frame only: the tile in row 1, column 0
    rain[0, 6, 8] = np.nan  # in what no tile covers
    found = radar.tiles(rain, size=3)
    places = [(0, 0), (0, 3), (0, 6), (3, 3), (3, 6)]
    np.testing.assert_array_equal(found, [rain[:, y : y + 3, x : x + 3] for y, x in places])
    for size in (0, 8):
        with pytest.raises(UsageError, match=f"tiles of {size} pixels"):
            radar.tiles(rain, size=size)


@pytest.mark.parametrize(
    ("length", "stride", "starts"), [(4, 1, [0, 1, 2, 3, 4, 5, 6]), (4, 3, [0, 3, 6]), (10, 2, [0])]
)
def test_windows(length, stride, starts):
    rain = np.random.default_rng(0).random((10, 2, 3), np.float32)
    found = radar.windows(rain, length=length, stride=stride)
    np.testing.assert_array_equal(found, [rain[start : start + length] for start in starts])
    assert np.shares_memory(found, rain) and not found.flags.writeable


@pytest.mark.parametrize(("length", "stride"), [(11, 1), (0, 1), (4, 0)])
def test_windows_that_do_not_fit(length, stride):
    with pytest.raises(UsageError, match=f"no windows of {length} frames every {stride} in 10 frames"):
        radar.windows(np.zeros((10, 2, 3)), length=length, stride=stride)


def events_of(*days):
    return [radar.Event(day, 5, np.zeros((2, 1, 1), np.float32), {}) for day in days]


@pytest.mark.parametrize(
    ("validation", "test", "expected"),
    [
        (None, None, (["1", "2", "2"], ["3"], ["4"])),
        (["1"], None, (["2", "2", "3"], ["1"], ["4"])),
        (None, ["4", "1"], (["2", "2"], ["3"], ["1", "4"])),
        (["2"], ["3"], (["1", "4"], ["2", "2"], ["3"])),
    ],
)
def test_a_day_is_in_one_part(validation, test, expected):
    parts = radar.split_days(events_of("1", "2", "2", "3", "4"), validation=validation, test=test)
    assert tuple([event.name for event in part] for part in parts) == expected


@pytest.mark.parametrize(
    ("days", "validation", "test", "message"),
    [
        ("112", None, None, r"2 days \(1, 2\) cannot be split in 3 parts"),
        ("123", ["4"], None, "no event is of day '4': one of 1, 2, 3"),
        ("123", ["1"], ["1"], "day 1 is named twice"),
        ("123", None, ["2", "2"], "day 2 is named twice"),
        ("123", ["1", "2"], ["3"], "no day of 1, 2, 3 is left to train on"),
        ("123", ["1", "2"], None, "no day of 1, 2, 3 is left to train on"),
    ],
)
def test_what_is_no_split_is_one_line(days, validation, test, message):
    with pytest.raises(UsageError, match=message) as caught:
        radar.split_days(events_of(*days), validation=validation, test=test)
    one_line(caught)


# Of every eighth frame, computed without the reader: strongest and weakest rain in mm/h, and the share of the pixels in
# reach with 0.5 mm/h and more.
REAL = {
    "20150515": ((40, 640, 710), 115.5376, 0.00990961, 0.12607),
    "20160711": ((40, 640, 710), 115.5376, 0.0115538, 0.10414),
    "20160928": ((40, 1226, 760), 91.5993, 0.000254881, 0.15303),
    "20170131": ((40, 640, 710), 29.0217, 0.0115538, 0.12400),
}


@pytest.fixture(scope="module")
def real():
    if not SHARED.is_dir():
        pytest.skip("no radar frames to read, set CAROUSEL_DATA")
    return radar.load(SHARED)


def test_the_real_folder_is_four_events(real):
    assert [(event.name, event.minutes, len(event.checksums)) for event in real] == [(day, 5, 40) for day in REAL]
    assert [[event.name for event in part] for part in radar.split_days(real)] == [
        ["20150515", "20160711"],
        ["20160928"],
        ["20170131"],
    ]


@pytest.mark.parametrize("day", REAL)
def test_the_real_frames(real, day):
    shape, strongest, weakest, wet = REAL[day]
    (rain,) = (event.rain for event in real if event.name == day)
    assert rain.shape == shape
    some = rain[::8]
    reached = some[~np.isnan(some)]
    assert 0.65 < reached.size / some.size < 0.8
    assert reached.max() == pytest.approx(strongest, rel=1e-4)
    assert reached[reached > 0].min() == pytest.approx(weakest, rel=1e-4)
    assert (reached >= radar.THRESHOLD).mean() == pytest.approx(wet, abs=1e-5)
    # Rain moves little in 5 minutes and much in 3 hours, so the frames are in order.
    grey = radar.to_grey(rain[:, 200:500, 200:500])
    assert np.abs(np.diff(grey, axis=0)).mean() < 0.5 * np.abs(grey[-1] - grey[0]).mean()
