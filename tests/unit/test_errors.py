import errno
import json
import pickle

import pytest
from safetensors import SafetensorError

from gcml_ray import errors
from gcml_ray.errors import (
    CheckpointError,
    ClusterError,
    ConfigError,
    DataError,
    ExportError,
    GcmlError,
    SiteError,
    told,
    write_remedy,
)


@pytest.mark.parametrize("kind", [ConfigError, DataError, CheckpointError, ExportError, ClusterError])
def test_an_error_survives_pickling(kind: type[GcmlError]) -> None:
    copy = pickle.loads(pickle.dumps(kind("what happened")))  # noqa: S301 - our own bytes
    assert type(copy) is kind
    assert str(copy) == "what happened"


def test_a_site_error_survives_pickling_with_its_parts() -> None:
    copy = pickle.loads(pickle.dumps(SiteError("CS", 3, "train", "out of memory")))  # noqa: S301 - our own bytes
    assert isinstance(copy, SiteError)
    assert (copy.site, copy.round_number, copy.stage, copy.message) == ("CS", 3, "train", "out of memory")
    assert str(copy) == "site CS, round 3, train: out of memory"


def test_every_error_is_a_gcml_error_so_that_the_command_line_can_catch_it() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) == 9
    assert all(issubclass(kind, GcmlError) for kind in kinds)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(errno.EROFS, "read-only"), "let this user write there"),
        (SafetensorError("Error while serializing: I/O error: Operation not permitted (os error 1)"), "let this user"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "make room"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory"), "move away the file that stands where a folder must be"),
        (SafetensorError("something else"), "make room"),
    ],
)
def test_what_to_do_where_a_file_could_not_be_written(error: Exception, remedy: str) -> None:
    assert write_remedy(error).startswith(remedy)


def test_where_an_error_of_somebody_s_own_code_was_raised_is_told() -> None:
    """The last frame that is no library's; errors that are raised on purpose speak for themselves."""
    trace = (
        'File "/site/actors/site.py", line 3, in train\nFile "/mine/method.py", line 12, in train_round\n'
        'File "/lib/site-packages/torch/nn.py", line 5, in forward\nRuntimeError: shapes\n'
    )
    assert told("shapes", "RuntimeError", trace) == "shapes (RuntimeError at method.py:12)"
    assert told("no such file", "DataError", trace) == "no such file"
    assert told("it went away", "", "") == "it went away"
    library = trace + f'File "{json.__file__}", line 7, in loads\n'
    assert told("shapes", "ValueError", library) == "shapes (ValueError at method.py:12)"
