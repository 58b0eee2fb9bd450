import os
from pathlib import Path

import pytest

from sidecar.config.references import References

CANARY = "canary-0123456789"
CONTROL = " has a line end or another control character inside the secret"
HOW_TO = "write env:NAME or file:PATH; a secret never stands in the file"


def refusal(references: References, reference: str) -> str:
    with pytest.raises(ValueError, match=r".+") as caught:
        references.secret(reference)
    error: BaseException | None = caught.value
    while error is not None:  # what a traceback would show
        assert CANARY not in str(error)
        error = error.__cause__ or error.__context__
    return str(caught.value)


def test_a_secret_comes_from_the_environment(tmp_path: Path) -> None:
    assert References(tmp_path, {"KEY": CANARY}).secret("env:KEY") == CANARY


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (CANARY, CANARY),
        (CANARY + "\n", CANARY),
        (CANARY + "\r\n", CANARY),
    ],
)
def test_one_newline_at_the_end_of_a_secret_file_is_cut(
    tmp_path: Path, content: str, value: str
) -> None:
    (tmp_path / "key").write_bytes(content.encode())
    assert References(tmp_path, {}).secret("file:key") == value


def test_a_relative_file_is_looked_for_beside_the_file_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "teams").mkdir()
    (tmp_path / "teams" / "key").write_text(CANARY)
    references = References(tmp_path, {})
    assert references.at(tmp_path / "teams").secret("file:key") == CANARY
    assert references.secret(f"file:{tmp_path}/teams/key") == CANARY
    assert references.files == {tmp_path / "teams" / "key"}


@pytest.mark.parametrize("reference", [CANARY, "", "env:", "env:A B", "file:", "ENV:X", "EXEC:x"])
def test_anything_but_a_reference_is_refused(tmp_path: Path, reference: str) -> None:
    assert refusal(References(tmp_path, {}), reference) == HOW_TO


@pytest.mark.parametrize("reference", ["exec:cat key", "exec:" + CANARY, "exec:"])
def test_a_program_is_refused_and_does_not_run(tmp_path: Path, reference: str) -> None:
    assert refusal(References(tmp_path, {}), reference) == (
        "`exec:` is refused, a configuration never runs programs: write env:NAME or file:PATH"
    )


def test_a_variable_that_is_not_set_is_refused(tmp_path: Path) -> None:
    assert refusal(References(tmp_path, {}), "env:KEY") == (
        "the environment variable KEY is not set"
    )


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert refusal(References(tmp_path, {}), "file:key") == f"there is no file {tmp_path}/key"
    assert refusal(References(tmp_path, {}), "file:a\0b").startswith("there is no file")


def test_a_directory_is_refused_as_one(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    references = References(tmp_path, {})
    assert refusal(references, "file:keys") == f"{tmp_path}/keys is a directory"
    assert refusal(references, "file:.") == f"{tmp_path} is a directory"
    with pytest.raises(ValueError, match="is a directory"):
        references.file("keys")


def test_a_pipe_is_refused_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "key")
    assert refusal(References(tmp_path, {}), "file:key").startswith("there is no file")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", " is empty"),
        (CANARY + " ", " has white space around the secret: remove it"),
        ("\t" + CANARY, " has white space around the secret: remove it"),
        (CANARY + "\n\n", " has white space around the secret: remove it"),
        ("1234567", " has less than 8 characters"),
        (CANARY + "\nline two", CONTROL),
        (CANARY + "\r\nline two", CONTROL),
        (CANARY + "\tmore", CONTROL),
        (CANARY + "\x7fmore", CONTROL),
        (CANARY + "\x9fmore", CONTROL),
    ],
)
def test_an_empty_padded_or_short_secret_is_refused(
    tmp_path: Path, value: str, message: str
) -> None:
    (tmp_path / "key").write_text(value)
    references = References(tmp_path, {"KEY": value})
    assert refusal(references, "env:KEY") == f"the environment variable KEY{message}"
    assert refusal(references, "file:key") == f"the file key{message}"


@pytest.mark.parametrize("value", [CANARY + "\0more", "\0" * 9])
def test_a_nul_in_a_secret_file_is_refused(tmp_path: Path, value: str) -> None:
    (tmp_path / "key").write_text(value)
    assert refusal(References(tmp_path, {}), "file:key") == f"the file key{CONTROL}"


def test_letters_of_any_script_may_stand_in_a_secret(tmp_path: Path) -> None:
    assert References(tmp_path, {"KEY": "schlüssel 密钥 key"}).secret("env:KEY")


def test_a_secret_file_that_is_no_text_is_refused_without_its_content(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(CANARY.encode() + b"\xff")
    assert refusal(References(tmp_path, {}), "file:key") == "the file key is not UTF-8 text"


def test_a_variable_that_is_no_text_is_refused(tmp_path: Path) -> None:
    value = (CANARY.encode() + b"\xff").decode(errors="surrogateescape")
    assert refusal(References(tmp_path, {"KEY": value}), "env:KEY") == (
        "the environment variable KEY is not UTF-8 text"
    )


def test_an_endless_secret_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"x" * (64 * 1024 + 1))
    assert refusal(References(tmp_path, {}), "file:key") == "the file key is larger than 64 KiB"


def test_a_secret_file_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(CANARY)
    references = References(tmp_path, {})
    references.secret("file:key")
    (tmp_path / "key").unlink()
    assert references.at(tmp_path).secret("file:key") == CANARY
