"""The main forms of writing over AsyncSession and the async drivers."""

from __future__ import annotations

import pytest
from orm.fill_forms import AS_GIVEN, FORMS, REFUSED, Base, Patient, check_stored, patient, recorded
from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncEngine

from sqla_byok import Byok, UnsupportedQueryError


@AS_GIVEN
@pytest.mark.parametrize("group", [*FORMS, "refused"])
async def test_every_form_of_writing_works_over_async_drivers(
    abyok: Byok, async_engine: AsyncEngine, group: str
) -> None:
    """Async drivers send the same ciphertext and hashes as sync ones, and the same is refused."""
    async with async_engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    failures: list[str] = []
    with recorded(async_engine.sync_engine) as sql:
        for form in REFUSED if group == "refused" else FORMS[group]:
            if async_engine.dialect.name in form.kinds:
                async with abyok.asession("t1", async_engine) as session:
                    failures += await session.run_sync(
                        lambda sync, form=form: form.failures(abyok, sync, sql)
                    )
    assert not failures, "\n".join(failures)


async def test_awaited_statements_keep_hashes_in_step(abyok: Byok, async_engine: AsyncEngine) -> None:
    """The session's own awaitable methods: flush, bulk, Core, and a refusal among them."""
    async with async_engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with abyok.asession("t1", async_engine) as session:
        person = Patient(mrn="secret-a", email="secret-e")
        session.add_all([person, Patient(mrn="secret-b")])
        await session.flush()
        await session.execute(insert(Patient), [{"mrn": "secret-c"}, {"mrn": "secret-d"}])
        await session.execute(update(Patient).where(Patient.mrn == "secret-b").values(mrn="secret-2"))
        connection = await session.connection()
        await connection.execute(patient.update().where(patient.c.mrn == "secret-c").values(name="secret-n"))
        person.mrn = "secret-1"
        await session.flush()
        with pytest.raises(UnsupportedQueryError):
            await session.execute(update(Patient).values(mrn=Patient.email))
        await connection.run_sync(lambda sync: check_stored(abyok, sync))
        found = await session.execute(select(Patient.mrn, Patient.email, Patient.name).order_by(Patient.id))
        assert found.all() == [
            ("secret-1", "secret-e", None),
            ("secret-2", None, None),
            ("secret-c", None, "secret-n"),
            ("secret-d", None, None),
        ]
