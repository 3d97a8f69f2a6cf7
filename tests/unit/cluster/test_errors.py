import errno
import pickle

import pytest

from cluster import errors


def all_errors(kind: type[errors.HeliostatError]) -> list[type[errors.HeliostatError]]:
    """Those of the tree; others are below them, where they are raised."""
    found = [kind, *(e for child in kind.__subclasses__() for e in all_errors(child))]
    return [error for error in found if error.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", all_errors(errors.HeliostatError))
def test_an_error_survives_pickling(kind: type[errors.HeliostatError]) -> None:
    error = pickle.loads(pickle.dumps(kind("went wrong", hint="do this", param="inputs")))
    assert type(error) is kind
    assert (error.message, error.hint, error.param) == ("went wrong", "do this", "inputs")
    assert str(error) == "went wrong; do this"


def test_codes_are_unique() -> None:
    codes = [kind.code for kind in all_errors(errors.HeliostatError)]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("kind", all_errors(errors.HeliostatError))
def test_every_error_is_drawn_in_the_tree(kind: type[errors.HeliostatError]) -> None:
    assert errors.__doc__ is not None
    assert kind.__name__ in errors.__doc__


def test_a_hint_follows_a_question_without_a_semicolon() -> None:
    assert (
        str(errors.UsageError("did you mean 'a'?", hint="write a")) == "did you mean 'a'? write a"
    )


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_known_by_whatever_says_it(error: Exception) -> None:
    found = errors.as_full_disk(error)
    assert found is not None
    assert "no space left" in str(found)
    assert errors.as_full_disk(ValueError("no")) is None


def test_of_a_copy_the_full_disk_is_the_one_it_is_written_to() -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "/the/source", None, "/the/copy")
    assert "'/the/copy'" in str(errors.as_machine_error(error))
    denied = OSError(errno.EACCES, "Permission denied", "/the/source", None, "/the/copy")
    assert "'/the/source'" in str(errors.as_machine_error(denied))
