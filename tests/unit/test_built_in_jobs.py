"""Each file of the folder `jobs` is a job."""

from pathlib import Path

import pytest

from catfeeder_cron import jobs

A_JOB = """
from catfeeder_cron.config import JobSettings
from catfeeder_cron.job import Job

JOB = Job(id="feed-cats", summary="feed the cats", settings=JobSettings, run=lambda context, settings: None)
"""


def test_a_file_is_a_job_unless_its_name_begins_with_an_underscore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "feed_cats.py").write_text(A_JOB)
    (tmp_path / "_no_job.py").write_text("raise AssertionError\n")
    before = jobs.built_in()
    monkeypatch.setattr(jobs, "__path__", [*jobs.__path__, str(tmp_path)])

    assert jobs.built_in().keys() == before.keys() | {"feed-cats"}
