"""Prints the bytes of memory that an open tenant takes: ``memory.py keystore-url``.

Each tenant of the keystore is opened and makes hashes for 40 columns; what is counted begins after the first 100. In a
process of its own, since freed memory stays with a process.
"""

from __future__ import annotations

import resource
import sys

from sqlalchemy import Column, Integer, MetaData, String, Table, create_engine

from sqla_byok import Byok, Encrypted

FIRST = 100
COLUMNS = [Column(f"c{number}", Encrypted(String(40), searchable=True)) for number in range(40)]
Table("bench_memory", MetaData(), Column("id", Integer, primary_key=True), *COLUMNS)


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main(keystore: str) -> None:
    byok = Byok(keystore)
    byok.attach(create_engine("sqlite://"))
    tenants = byok.tenants()

    def open_(tenant: str) -> None:
        with byok.tenant(tenant):
            for column in COLUMNS:
                byok.hash(column, "A-1")

    for tenant in tenants[:FIRST]:
        open_(tenant)
    before = resident()
    for tenant in tenants[FIRST:]:
        open_(tenant)
    print((resident() - before) / len(tenants[FIRST:]))
    byok.close()


if __name__ == "__main__":
    main(sys.argv[1])
