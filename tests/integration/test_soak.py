"""A short soak; `make prove PART=soak` runs a long one."""

from tests.fuzz.soak import soak


def test_a_disturbed_job_ends_with_the_same_files_and_no_remains() -> None:
    report = soak(0, seed=3, backends=("sqlite",), round_seconds=5, jobs=1)
    assert report.findings == []
    assert report.rounds == 1
    assert sum(report.commands.values()) > 1
