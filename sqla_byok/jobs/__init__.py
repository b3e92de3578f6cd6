"""Jobs: long work over rows that are there already, online, in pages, resumable."""

from sqla_byok.jobs.kinds import How, cancel, reencrypt, rehash, resume, verify
from sqla_byok.jobs.leaks import Leakage, leakage
from sqla_byok.jobs.rotation import Rotation, destroy, restore, retire, rotate
from sqla_byok.jobs.rows import Failure
from sqla_byok.jobs.runner import Pace, Report
from sqla_byok.keys.jobs import Progress

__all__ = [
    "Failure",
    "How",
    "Leakage",
    "Pace",
    "Progress",
    "Report",
    "Rotation",
    "cancel",
    "destroy",
    "leakage",
    "reencrypt",
    "rehash",
    "restore",
    "resume",
    "retire",
    "rotate",
    "verify",
]
