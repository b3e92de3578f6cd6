"""Jobs: long work over rows that are there already, online, in pages, resumable."""

from sqla_byok.jobs.kinds import How, reencrypt, rehash, resume, verify
from sqla_byok.jobs.rows import Failure
from sqla_byok.jobs.runner import Pace, Progress, Report

__all__ = ["Failure", "How", "Pace", "Progress", "Report", "reencrypt", "rehash", "resume", "verify"]
