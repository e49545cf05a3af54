import errno
import os
import pathlib

import pytest

from MaxText.launchers import preflight

VERSIONS = {"code": "abc", "python": "3.12.1", "jax": "0.10.2"}


def probe(worker: str, **different: object) -> dict:
    same = {"host": f"host-{worker}", "clock_skew": 0.2, "free_bytes": 50e9, "bucket_error": "", "jax_error": ""}
    same["rename_error"] = ""
    return {
        "worker": worker,
        "devices": 16,
        "local_devices": 4,
        "kind": "TPU v6 lite",
        "versions": VERSIONS,
        **same,
        **different,
    }


def problems(**different: object) -> list[str]:
    """Of four workers of which one differs."""
    probes = [probe(f"0.{index}") for index in range(3)] + [probe("0.3", **different)]
    return preflight.problems(probes, workers=4, chips=16, min_free_gb=5.0)


def test_all_is_well():
    assert problems() == []
    words = preflight.summary([probe("0.0", clock_skew=-1.5), probe("0.1", free_bytes=7e9)])
    assert "16 x TPU v6 lite, jax 0.10.2; clocks within 1.5 s, at least 7 GB free" in words


@pytest.mark.parametrize(
    ("different", "message"),
    [
        ({"devices": 12}, "worker 0.3 (host-0.3): JAX sees 12 devices, 4 of them here, and this TPU has 16"),
        ({"jax_error": "no TPU"}, "worker 0.3 (host-0.3): JAX does not start: no TPU"),
        ({"clock_skew": -90.0}, "worker 0.3 (host-0.3): the clock is -90.0 s off"),
        ({"free_bytes": 4.9e9}, "worker 0.3 (host-0.3): 4.9 GB of disk are free, fewer than --MIN_FREE_GB=5"),
        ({"bucket_error": "denied"}, "worker 0.3 (host-0.3): cannot write to the bucket: denied"),
        (
            {"rename_error": "below /bucket: Too many open files"},
            "worker 0.3 (host-0.3): cannot rename a directory below /bucket: Too many open files; so a run names",
        ),
        ({"versions": VERSIONS | {"jax": "0.10.1"}}, "jax differs: 0.10.1 on 0.3; 0.10.2 on 0.0, 0.1, 0.2"),
        ({"versions": {"code": "abc", "jax": "0.10.2"}}, "python differs: 3.12.1 on 0.0, 0.1, 0.2; missing on 0.3"),
        ({"versions": VERSIONS | {"code": "old"}}, "code differs: abc on 0.0, 0.1, 0.2; old on 0.3"),
    ],
)
def test_one_worker_differs(different, message):
    found = problems(**different)
    assert len(found) == 1
    assert found[0].startswith(message)


def test_a_worker_is_missing_and_all_problems_are_told():
    found = preflight.problems([probe("0.0", clock_skew=60.0), probe("0.1", devices=1)], 3, 16, 5.0)
    assert len(found) == 3
    assert found[0] == "2 of 3 workers answered"


def test_any_number_of_devices_is_right_where_none_is_known():
    assert preflight.problems([probe("0.0", devices=3)], workers=1, chips=0, min_free_gb=5.0) == []


def test_clocks_may_differ_a_little():
    limit = preflight.MAX_CLOCK_SKEW_SECONDS
    assert problems(clock_skew=limit) == []
    assert len(problems(clock_skew=limit + 0.1)) == 1


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A directory that passes for a mount; what was renamed there is in its attribute `renamed`."""
    mount = tmp_path / "bucket"
    mount.mkdir()
    monkeypatch.setenv("MY_HOME", str(tmp_path))
    monkeypatch.setattr(pathlib.Path, "is_mount", lambda path: path in (mount, pathlib.Path("/")))
    return mount


@pytest.mark.parametrize("given", ["$MY_HOME/bucket/runs", "bucket", "bucket/not/there/yet"])
def test_directories_are_renamed_where_checkpoints_will_be(bucket, monkeypatch, given):
    """As gcsfuse does it in a flat bucket without a limit; with one, nothing is left behind."""
    renamed, rename = [], os.rename

    def note(old, new):
        renamed.append(sorted(str(path.relative_to(old)) for path in pathlib.Path(old).rglob("*")))
        rename(old, new)

    def refuse(old, new):
        raise OSError(errno.EMFILE, "Too many open files", str(old))

    monkeypatch.setattr(pathlib.Path, "rename", note)
    assert preflight.rename_error(str(bucket.parent), given) == ""
    assert renamed == [["state", "state/file"]]
    monkeypatch.setattr(pathlib.Path, "rename", refuse)
    assert preflight.rename_error(str(bucket.parent), given) == f"below {bucket}: Too many open files"
    assert list(bucket.iterdir()) == []


def test_a_mount_that_cannot_be_written_is_told_and_what_is_no_mount_is_left_alone(bucket, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(preflight.tempfile, "TemporaryDirectory", refuse)
    assert preflight.rename_error(str(tmp_path), "bucket/runs") == f"below {bucket}: Permission denied"
    for elsewhere in ("", "outputs", str(tmp_path / "other")):
        assert preflight.rename_error(str(tmp_path), elsewhere) == ""
