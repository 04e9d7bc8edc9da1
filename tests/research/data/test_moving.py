"""Moving digits: the sequence that a loop makes step by step, the same one in every batch and on every device."""

import functools
import hashlib
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.data import moving
from research.data.moving import Moving
from research.errors import CarouselError, UsageError

pytestmark = pytest.mark.usefixtures("quick_compilation")

POOL = np.random.default_rng(0).integers(1, 256, (30, 8, 8), dtype=np.uint8)
SMALL = Moving(frame=24, time=6)


@functools.partial(jax.jit, static_argnames="how")
def make(pool, index, seed, how):
    return moving.sequences(pool, index, seed=seed, moving=how)


def sequences(index, *, pool=POOL, seed=0, how=SMALL):
    return np.asarray(make(pool, jnp.asarray(index), seed, how))


@functools.partial(jax.jit, static_argnames="how")
def drawn(index, how):
    """Which digits of the pool (modulo its size), their starts and velocities in 2^-30 of the way from wall to wall."""
    key = jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), index)
    numbers = jax.random.bits(key, (how.digits, 5), jnp.uint32)
    return numbers[:, 0], *moving._motion(numbers[:, 1:], how)


def by_loop(index, pool, how):
    """Step by step in float64, each coordinate turning round where it meets a wall."""
    numbers, starts, velocities = map(np.asarray, drawn(index, how))
    frames = np.zeros((how.time, how.frame, how.frame))
    bounces = 0
    for number, start, velocity in zip(numbers, starts / 2**30, velocities / 2**30, strict=True):
        digit = pool[number % len(pool)] * np.float32(1 / 255)
        height, width = digit.shape
        room = np.array([how.frame - height, how.frame - width])
        at, velocity = start * room, velocity * room
        for frame in frames:
            top, left = (int(np.floor(x + 0.5)) for x in at)
            part = frame[top : top + height, left : left + width]
            assert part.shape == digit.shape  # the whole digit inside the frame
            part[:] = np.maximum(part, digit)
            at = at + velocity
            for axis in (0, 1):
                while not 0 <= at[axis] <= room[axis]:
                    wall = 0 if at[axis] < 0 else room[axis]
                    at[axis], velocity[axis] = 2 * wall - at[axis], -velocity[axis]
                    bounces += 1
    return frames[..., None], bounces


@pytest.mark.parametrize(
    ("how", "size"),
    [
        (Moving(), (28, 28)),
        (Moving(frame=24, digits=3, time=25), (8, 8)),
        (Moving(frame=20, time=12), (6, 13)),  # less room in width than in height
        (Moving(frame=8, time=3), (8, 8)),  # no room at all
    ],
    ids=str,
)
def test_every_pixel_is_that_of_a_loop_that_reflects_step_by_step(how, size):
    pool = np.random.default_rng(1).integers(0, 256, (9, *size), dtype=np.uint8)
    made = sequences(np.arange(4), pool=pool, how=how)
    assert made.shape == (4, how.time, how.frame, how.frame, 1) and made.dtype == np.float32
    bounces = 0
    for index, sequence in enumerate(made):
        expected, more = by_loop(index, pool, how)
        np.testing.assert_array_equal(sequence, expected)
        bounces += more
    assert bounces > 10 or how.frame == 8


def test_a_long_way_ends_where_it_should():
    """The integers overflow on it many times."""
    how = Moving(frame=10, time=300, speed=(30, 36), digits=1)
    expected, bounces = by_loop(0, POOL, how)
    assert bounces > 200
    np.testing.assert_array_equal(sequences([0], how=how)[0], expected)


def test_an_index_has_one_sequence_whatever_the_batch():
    whole = sequences(np.arange(8))
    order = [5, 0, 3, 3, 7, 1, 0, 2]
    np.testing.assert_array_equal(sequences(order), whole[order])
    # Without jit, alone in a scan, and under vmap over seeds.
    some = jnp.array(order[:3])
    np.testing.assert_array_equal(moving.sequences(POOL, some, seed=0, moving=SMALL), whole[order[:3]])
    _, scanned = jax.lax.scan(lambda carry, index: (carry, make(POOL, index[None], 0, SMALL)[0]), 0, jnp.arange(8))
    np.testing.assert_array_equal(scanned, whole)
    seeds = jax.vmap(lambda seed: make(POOL, jnp.arange(8), seed, SMALL))(jnp.arange(2))
    np.testing.assert_array_equal(seeds, [whole, sequences(np.arange(8), seed=1)])


def test_seeds_and_indices_differ():
    made = [sequences(np.arange(first, first + 8), seed=seed) for first in (0, 8, 10_000) for seed in (0, 1, 2)]
    assert len({sequence.tobytes() for sequence in np.concatenate(made)}) == 72


DEVICES = """
import hashlib, jax
jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp, numpy as np
from research.data import moving

pool = np.random.default_rng(0).integers(1, 256, (30, 8, 8), dtype=np.uint8)
make = lambda index: moving.sequences(pool, index, seed=0, moving=moving.Moving(frame=24, time=6))
index = jnp.arange(8)
mapped = np.asarray(jax.pmap(make)(index.reshape(4, 2)))
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
sharded = np.asarray(jax.jit(make)(jax.device_put(index, sharding)))
for made in (mapped, sharded):
    print(hashlib.sha256(made.tobytes()).hexdigest())
"""


def test_several_devices_make_the_same_sequences(commands):
    """There the compiler does all that it can; here, as in all of this file, little."""
    done = commands.script(DEVICES, NPROC="16", XLA_FLAGS="")
    assert done.returncode == 0, done.stderr
    expected = hashlib.sha256(sequences(np.arange(8)).tobytes()).hexdigest()
    assert done.stdout.split() == [expected, expected]


def test_positions_speeds_and_directions_are_uniform():
    """Seen from outside: one white square a sequence, large frames so that whole pixels tell the velocity."""
    room, size, examples = 160, 1, 1200
    how = Moving(frame=room + size, digits=1, time=2)
    white = np.full((1, size, size), 255, np.uint8)
    places = jax.jit(
        lambda index: jax.lax.map(
            lambda i: jnp.argmax(moving.sequences(white, i[None], seed=0, moving=how)[0].reshape(2, -1), axis=1), index
        )
    )(jnp.arange(examples))
    at = np.stack(np.divmod(np.asarray(places), room + size), axis=-1)
    start = at[:, 0]
    # Mean and standard deviation of U[0, 1], to 4 standard errors.
    assert np.abs(start.mean(axis=0) / room - 0.5).max() < 4 * 0.289 / np.sqrt(examples)
    assert np.abs(start.std(axis=0) / room - 0.289).max() < 4 * 0.129 / np.sqrt(examples)
    assert abs(np.corrcoef(start.T)[0, 1]) < 4 / np.sqrt(examples)

    # Away from the walls, 5 / 36 of the room off, nothing has been reflected. In pixels of the paper:
    free = ((start > 0.14 * room) & (start < 0.86 * room)).all(axis=1)
    step = (at[:, 1] - start)[free] * 36 / room
    speed, pixel = np.hypot(*step.T), np.sqrt(2) * 36 / room
    assert 3 - pixel < speed.min() < 3.1 and 4.9 < speed.max() < 5 + pixel
    assert abs(speed.mean() - 4) < 4 * 0.577 / np.sqrt(len(speed))
    counts, _ = np.histogram(speed, bins=4, range=(3, 5))
    assert chi_square(counts) < 16.3  # 3 degrees of freedom, 1 in 1,000
    octants = np.floor(np.arctan2(*step.T) * 4 / np.pi + 0.01).astype(int) % 8
    assert chi_square(np.bincount(octants, minlength=8)) < 24.3  # 7 degrees of freedom


def chi_square(counts):
    assert counts.sum() > 500
    return ((counts - counts.mean()) ** 2 / counts.mean()).sum()


def test_all_digits_of_the_pool_move():
    pool = np.arange(50, 250, dtype=np.uint8)[:, None, None]
    brightest = sequences(np.arange(2000), pool=pool, how=Moving(frame=4, digits=1, time=1)).max(axis=(1, 2, 3, 4))
    counts = np.bincount(np.round(brightest * 255).astype(int), minlength=250)[50:]
    assert counts.sum() == 2000 and chi_square(counts) < 267  # 199 degrees of freedom, 1 in 1,000


def test_where_digits_meet_the_brighter_one_shows():
    pool = np.array([100, 200], np.uint8)[:, None, None] * np.ones((1, 8, 8), np.uint8)
    made = sequences(np.arange(40), pool=pool, how=Moving(frame=12, time=4))
    values, counts = np.unique(made, return_counts=True)
    np.testing.assert_array_equal(values, np.array([0, 100, 200], np.float32) * np.float32(1 / 255))
    # Both in one frame, and the darker digit with a corner covered: fewer pixels than it has.
    both = [frame for frame in made.reshape(-1, 144) if len(np.unique(frame)) == 3]
    assert len(both) > 40
    assert all((frame == values[2]).sum() == 64 for frame in both)
    assert all((frame == values[1]).sum() < 64 for frame in both)


def test_what_cannot_be_made_is_refused():
    with pytest.raises(UsageError, match="digits of 8x8 pixels do not fit frames of 7x7: give larger frames"):
        moving.sequences(POOL, jnp.arange(2), seed=0, moving=Moving(frame=7))
    for wrong, message in [
        ({"time": 0}, "time is 0: give at least 1"),
        ({"digits": -1}, "digits is -1"),
        ({"frame": 4096}, "give at most 2048"),
        ({"speed": (5.0, 3.0)}, "speed is 5.0 to 3.0 pixels a frame"),
        ({"speed": (3.0, 37.0)}, "give two from 0 to 36"),
    ]:
        with pytest.raises(UsageError, match=message):
            Moving(**wrong)


def test_the_pool_is_a_fixed_choice():
    images = np.arange(100, dtype=np.uint8)[:, None, None] * np.ones((1, 3, 2), np.uint8)
    chosen = moving.pool(images, 10)
    assert chosen.shape == (10, 3, 2) and chosen.dtype == np.uint8
    np.testing.assert_array_equal(chosen, moving.pool(images[..., None], 10))
    assert chosen[:, 0, 0].tolist() == [9, 30, 32, 34, 41, 46, 72, 90, 94, 98]
    np.testing.assert_array_equal(moving.pool(images, 100), images)
    for size in (0, 101):
        with pytest.raises(UsageError, match=f"a pool of {size} of 100 images: give 1 to 100"):
            moving.pool(images, size)


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_published_file_is_read_with_sequences_first(order, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 6), dtype=np.uint8)
    np.save(tmp_path / "seq.npy", np.asarray(frames, order=order))
    read = moving.load_published(str(tmp_path / "seq.npy"))
    assert read.shape == (3, 4, 5, 6, 1) and read.dtype == np.uint8 and type(read) is np.ndarray
    for n, t in np.ndindex(3, 4):
        np.testing.assert_array_equal(read[n, t, ..., 0], frames[t, n])


def npy(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


GOOD = npy(np.zeros((4, 3, 5, 6), np.uint8))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD[:-1], "is truncated or not an .npy file"),
        (GOOD[:60], "is truncated or not an .npy file"),
        (b"", "is truncated or not an .npy file"),
        (b"<html>404 Not Found</html>", "is truncated or not an .npy file"),
        (GOOD.replace(b"(4, 3, 5, 6)", b"((((((((((4,"), "is truncated or not an .npy file"),
        (npy(np.array([{}], object)), "is truncated or not an .npy file"),  # never unpickled
        (npy(np.zeros((4, 3, 5, 6), np.float32)), r"holds float32 \[4, 3, 5, 6\], expected uint8"),
        (npy(np.zeros((4, 3, 5), np.uint8)), r"holds uint8 \[4, 3, 5\], expected uint8 \[time, n, height, width\]"),
    ],
    ids=["truncated", "header", "empty", "html", "brackets", "pickle", "float", "rank"],
)
def test_another_file_is_refused_in_one_line(content, message, tmp_path):
    path = tmp_path / "seq.npy"
    path.write_bytes(content)
    with pytest.raises(CarouselError, match=message) as raised:
        moving.load_published(path)
    text = str(raised.value)
    assert text.startswith(str(path)) and text.endswith(f": get {moving.URL}") and "\n" not in text


def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(CarouselError, match=r"seq.npy is missing: get http://"):
        moving.load_published(tmp_path / "seq.npy")
    with pytest.raises(CarouselError, match=r"cannot read .*: Is a directory"):
        moving.load_published(tmp_path)
