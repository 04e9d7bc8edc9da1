"""Language models from a text file to a table, a sample and the text that is made up later; requests that are refused.

The tiny text has two kinds of line in random order: all but the first letter of a line can be known.
"""

import contextlib
import io
import json
import math
import pathlib
import random
import re
import shutil
import types

import jax
import pytest
from absl import flags

from experiments import command_line, generate, runner
from experiments.language_model import EXPERIMENT, Config, cells
from research.files import write_json_atomic

LINES = ("cat sat", "dog ran")
TEXT = "\n".join([*random.Random(7).choices(LINES, k=100), ""])
# Ragged, with empty lines and none at the end; validation and test have words that training has not.
WORDS = {
    "train": "  cat\tsat \n<unk> hid\n\n dog ran\n" * 40,
    "valid": "cat sat\nfish  hid\n\ndog ran\n" * 2,
    "test": "cat sat\n\tbird hid\n \ndog ran\ncat sat",
}
CHARACTERS = ("--cells=gru", "--seeds=3,1", "--units=12", "--batch_size=4", "--time=10")
CHARACTERS += ("--steps=60", "--steps_per_call=15", "--evaluations=2", "--learning_rate=0.03")
RUN = "characters-text-gru-12-seeds3.1"


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Compiling is most of the time of these tests."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def train(command, tmp_path_factory):
    """`(text, *flags) -> run`: trains, and deletes the text. What a run wrote is not to be written to."""

    def call(content, *arguments):
        folder = tmp_path_factory.mktemp("run")
        written(folder / "text", content)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert command(EXPERIMENT, f"--text={folder / 'text'}", f"--workdir={folder / 'work'}", *arguments) == 0
        delete = shutil.rmtree if isinstance(content, dict) else pathlib.Path.unlink
        delete(folder / "text")
        (path,) = (folder / "work" / "runs").iterdir()
        return types.SimpleNamespace(
            path=path, out=out.getvalue(), result=json.loads((path / "result.json").read_text())
        )

    return call


def written(path, content):
    """A text file, or a folder in the layout of the Penn Treebank."""
    if isinstance(content, dict):
        path.mkdir()
        for part, text in content.items():
            written(path / f"{part}.txt", text)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture(scope="module")
def characters(train):
    return train(TEXT, *CHARACTERS)


@pytest.fixture(scope="module")
def words(train):
    recipe = ("--units=12", "--batch_size=2", "--time=10", "--steps=60", "--learning_rate=0.1")
    return train(WORDS, "--tokens=words", "--cells=4-gram", *recipe)


# Training, and what it leaves


def row(out, label):
    """The table's row of a kind of network, by column."""
    lines = [re.split("  +", line.strip()) for line in out.splitlines()]
    (names,) = (line for line in lines if line[0] == "cell")
    (found,) = (line for line in lines if line[0] == label)
    return dict(zip((name for name in names if name != "diverged"), found, strict=True))


def test_characters_are_learned_and_counted_in_bits(characters):
    result = characters.result
    vocabulary = json.loads((characters.path / "vocabulary.json").read_text())
    assert vocabulary == sorted(set(TEXT)) and len(vocabulary) == 11
    assert result["predicted"] == {"train": 719, "validation": 39, "test": 39}
    assert "\n--- GRU, characters: predicted once each 39 of validation, 39 of test\n" in characters.out
    assert "\ncharacters, bits per character where the validation loss was lowest\n" in characters.out
    for split in ("train", "validation", "test"):
        bits = [nats / math.log(2) for nats in result[f"{split}_loss"]]
        # One bit in eight characters is all there is to know; a model without an idea takes 3.46.
        assert len(bits) == 2 and all(0.05 < each < 0.15 * math.log2(11) for each in bits)
        assert row(characters.out, "GRU")[split].startswith(f"{sum(bits) / 2:.4g} ± ")


def test_the_sample_is_text_like_that_which_was_read(characters):
    sample = characters.result["sample"]
    assert len(sample) == 400 and characters.out.endswith(f" of test\n{sample}\n")
    whole = sample.split("\n")[:-1]
    assert sum(line in LINES for line in whole) > 0.8 * len(whole) > 30
    assert set(whole) >= set(LINES)


def test_words_are_counted_in_perplexity(words):
    result = words.result
    vocabulary = json.loads((words.path / "vocabulary.json").read_text())
    assert vocabulary[0] == "<eos>" and sorted(vocabulary[1:]) == ["<unk>", "cat", "dog", "hid", "ran", "sat"]
    assert result["predicted"] == {"train": 40 * 10 - 1, "validation": 2 * 10 - 1, "test": 10 + 3 - 1}
    assert "\nwords, perplexity where the validation loss was lowest\n" in words.out
    for split in ("train", "validation", "test"):
        (nats,) = result[f"{split}_loss"]
        assert 1 < math.exp(nats) < 3
        assert row(words.out, "4-gram")[split] == f"{math.exp(nats):.4g}"
    assert {"cat sat", "dog ran", "<unk> hid", ""} == set(result["sample"].split("\n")[:-1])
    assert len(result["sample"].split()) + result["sample"].count("\n") == 100


def test_an_interrupted_run_goes_on_to_the_bit(command, write, characters, tmp_path, capsys):
    """Stopped between two evaluations, in the middle of the text: the carried state goes on."""
    arguments = (*CHARACTERS, f"--text={written(tmp_path / 'text', TEXT)}", f"--workdir={tmp_path}")
    asked = iter([False, False, True])  # before the cell, before its first step, after 15 steps
    assert command(EXPERIMENT, *arguments, stop=lambda: next(asked)) == 75
    path = tmp_path / "runs" / RUN
    assert f"interrupted: {path}: stopped at step 15 of 60; the same command goes on" in capsys.readouterr().err
    code, _, err = write(path)
    assert code == 1 and re.fullmatch(
        f"error: {path}/checkpoints/best.safetensors is missing: the run has not come to .*; start it again\n", err
    )
    assert command(EXPERIMENT, *arguments) == 0
    result = json.loads((path / "result.json").read_text())
    timed = ("seconds", "examples_per_second")
    one, other = ({n: v for n, v in r.items() if n not in timed} for r in (result, characters.result))
    assert one == other and one["final_state_sha256"]
    assert (path / "metrics.jsonl").read_bytes() == (characters.path / "metrics.jsonl").read_bytes()


# Writing with what was trained


@pytest.fixture
def write(capsys):
    """`(run folder, *flags) -> exit code, output, errors` of the command that writes."""
    before = set(flags.FLAGS)

    def call(folder, *arguments):
        capsys.readouterr()
        code = 0
        try:
            generate._define_flags()
            generate.main(command_line.parse_flags(["generate", *([f"--run={folder}"] if folder else []), *arguments]))
        except SystemExit as stopped:
            code = stopped.code
        finally:
            for name in set(flags.FLAGS) - before:
                delattr(flags.FLAGS, name)
            flags.FLAGS.unparse_flags()
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def text(write):
    def call(run, *arguments):
        code, out, err = write(run.path, *arguments)
        assert (code, err) == (0, "") and out.endswith("\n")
        return out[:-1]

    return call


def test_the_run_folder_alone_writes_what_the_run_wrote(text, characters, words):
    assert text(characters, "--seed=3") == characters.result["sample"]
    assert text(words, "--length=100") == words.result["sample"]


def test_the_likeliest_goes_on_from_the_prompt(text, characters):
    options = ("--prompt=dog r", "--length=59")
    found = text(characters, *options, "--temperature=0")
    assert found.startswith("dog ran\n") and found.endswith("\n") and len(found) == len("dog r") + 59
    assert set(found.splitlines()) <= set(LINES)
    assert text(characters, *options, "--top_k=1") == found
    # A line end in the prompt.
    found = text(characters, r"--prompt=dog ran\nc", "--temperature=0", "--length=7")
    assert found == "dog ran\ncat sat\n"


def test_draws_are_those_of_the_seed_and_of_the_models_seed(text, characters):
    options = ("--temperature=1", "--top_k=0", "--length=160")
    found = text(characters, *options)
    assert text(characters, *options, "--seed=0", "--model_seed=3") == found  # the first of 3 and 1
    assert text(characters, *options, "--seed=1") != found != text(characters, *options, "--model_seed=1")


def test_words_go_on_from_words_line_by_line(text, words):
    options = ("--temperature=0", "--length=2")
    assert text(words, "--prompt=cat", *options) == "cat sat\n"
    assert text(words, "--prompt=dog ran", *options).startswith("dog ran\n")  # no blank before a line's end
    assert text(words, r"--prompt=cat sat\ndog", *options) == "cat sat\ndog ran\n"
    assert text(words, r"--prompt=cat sat\n", *options) in ("cat sat\ndog ran", "cat sat\n<unk> hid", "cat sat\n\n")
    assert text(words, "--prompt=fish", *options) == "fish hid\n"  # <unk> stands for it


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt=cat\\nz"], "the prompt, line 2 of it: 'z' does not stand in the training text"),
        (["--prompt="], "the prompt is empty"),
        (["--temperature=-1"], "--temperature=-1.0: give 0 or more"),
        (["--temperature=nan"], "--temperature=nan: give 0 or more"),
        (["--model_seed=0"], "--model_seed=0: the run has 3, 1"),
        (["--length=0"], "length"),
        (["--seed=4294967296"], "seed 4294967296 does not fit 32 bits"),
        (["cat"], "unexpected argument 'cat'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_requests_for_text(write, characters, arguments, message):
    code, out, err = write(characters.path, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and message in err


def test_a_run_that_cannot_write(write, characters, words, tmp_path):
    code, out, err = write(None)
    assert (code, out, err) == (2, "", "error: --run is missing: give the run folder of a trained language model\n")

    def refusal(path, *arguments, code=1):
        done = write(path, *arguments)
        assert done[:2] == (code, "") and done[2].startswith("error: ") and done[2].count("\n") == 1
        return done[2]

    for path in (tmp_path / "nothing", characters.path.parent):
        assert f"cannot read {path}/config.json: " in refusal(path) and "is this the folder of a run?" in refusal(path)
    write_json_atomic(tmp_path / "config.json", {"task": "adding", "seed": [0]})
    assert f"{tmp_path} is not the run of a language model" in refusal(tmp_path)
    # The recurrence ablation trains on text as well.
    shutil.copytree(words.path, tmp_path / "words")
    vocabulary = json.loads((words.path / "vocabulary.json").read_text())
    write_json_atomic(tmp_path / "words/vocabulary.json", [word.strip("<>") for word in vocabulary])
    line = refusal(tmp_path / "words", "--prompt=cat fish", code=2)
    assert "the prompt, line 1 of it: 'fish' does not stand in the training text and there is no <unk>" in line
    (tmp_path / "words/vocabulary.json").unlink()
    assert f"{tmp_path / 'words'} is not the run of a language model" in refusal(tmp_path / "words")


# What cannot be trained

FILES = {
    "missing": (None, "{} is missing"),
    "empty": ("", r"{} \(training\) has no text"),
    "one character": ("a", r"{} \(validation\) has no text"),
    "not UTF-8": (b"ab\n\xff" * 50, "{}, line 2: not UTF-8"),
    "unknown character": (f"{TEXT}z", r"{} \(test part\), line \d+ of it: 'z' does not stand in the training text; "),
    "too short": ("abcd" * 30, r"6 tokens do not make 32 streams .*: give a smaller --batch_size or more text"),
    "empty folder": ({}, r"{} has no file \*train.txt"),
    "no test": ({"train": "a", "valid": "a"}, r"{} has no file \*test.txt"),
    "empty part": ({"train": "a", "valid": "", "test": "a"}, "{}/valid.txt has no text"),
    "unknown word": (
        {"train": "a cat\n", "valid": "a cat", "test": "a cat\na dog"},
        r"{}/test.txt, line 2 of it: 'dog' does not .* and there is no <unk>; take it out or add it to the training",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_text_that_cannot_be_used_is_one_line(command, capsys, tmp_path, name):
    content, message = FILES[name]
    path = tmp_path / "text"
    if content is not None:
        written(path, content)
    tokens = "words" if name == "unknown word" else "characters"
    assert command(EXPERIMENT, f"--text={path}", f"--tokens={tokens}", f"--workdir={tmp_path / 'work'}") == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert re.match("error: " + message.replace("{}", re.escape(str(path))), err), err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens=bytes"], "tokens=bytes.*characters|words"),
        (["--cells=lstm,attention"], "'attention' is unknown; choose from 4-gram, tanh"),
        (["--cells=4-gram,gru", "--dropout=0.5"], "--dropout=0.5: 4-gram has no layers to drop between"),
        (["--cells=4-gram,gru", "--units=8,9"], "--units=8,9: 4-gram has one hidden layer"),
        (["--recipes=zaremba2014_small"], "--recipes=zaremba2014_small says nothing of characters: it is for words"),
        (["--time=0"], "--time=0: give at least 1"),
        (["--steps=2", "--epochs=2"], "--epochs=2 and --steps=2: give exactly one of them"),
        (["--dropout=1"], "--dropout=1.0: give a probability below 1"),
        (["--devices=2", "--batch_size=3"], "--batch_size=3 does not divide by 2 devices"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_requests_for_training(refusal, tmp_path, arguments, message):
    assert re.search(message, refusal(EXPERIMENT, *arguments, f"--workdir={tmp_path / 'work'}"))
    assert not (tmp_path / "work").exists()


def test_no_text_at_all(command, capsys, tmp_path):
    assert command(EXPERIMENT, f"--data_dir={tmp_path}", f"--workdir={tmp_path / 'work'}") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}/ptb is missing: give --text=FILE_OR_FOLDER")


def test_another_text_of_the_same_name_is_another_run(refusal, tmp_path):
    names = []
    for folder, content in (("a", TEXT), ("b", TEXT[::-1])):
        (tmp_path / folder).mkdir()
        path = written(tmp_path / folder / "text.txt", content)
        (cell,) = cells(Config(text=str(path), cells=("gru",)))
        names.append((cell.name, runner.identity(cell)))
    assert names[0][0] == names[1][0] == "characters-text-gru-128-seeds0" and names[0][1] != names[1][1]
    # The same text elsewhere is the same run.
    written(tmp_path / "elsewhere.txt", TEXT).rename(tmp_path / "b" / "text.txt")
    (again,) = cells(Config(text=str(tmp_path / "b" / "text.txt"), cells=("gru",)))
    assert (again.name, runner.identity(again)) == names[0]
    assert "--segment=3" in refusal(EXPERIMENT, f"--text={path}", "--segment=3")
