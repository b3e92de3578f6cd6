"""The search forms over AsyncSession: the same rows and the same single statement as on a sync engine."""

from __future__ import annotations

from orm.search_forms import ENCRYPTED, FORMS, PLAIN, ciphertext_compared, ids, rows, selected, statements
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import selectinload

from sqla_byok import Byok


async def _create(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        for models in (ENCRYPTED, PLAIN):
            await connection.run_sync(models.Base.metadata.create_all)


async def test_each_form_finds_what_its_plaintext_twin_finds(async_engine: AsyncEngine, abyok: Byok) -> None:
    """All forms on the async drivers, whose parameters are typed otherwise than those of the sync ones."""
    await _create(async_engine)
    wrong: dict[str, object] = {}
    async with abyok.asession("t1", async_engine) as session:
        session.add_all(rows(ENCRYPTED) + rows(PLAIN))
        await session.flush()
        for name, form in FORMS.items():
            sent: list[str] = []
            try:
                with statements(async_engine.sync_engine) as sent:
                    found = ids((await session.scalars(form.build(ENCRYPTED, select))).all())
                    expected = ids((await session.scalars(form.build(PLAIN, select))).all())
                assert found == expected == form.found
                sql, _ = sent
                assert ciphertext_compared(sql) is None
                assert ("_hash" in sql.removeprefix(selected(sql))) is form.hashed
                assert "_hash" not in selected(sql)
            except Exception as error:
                wrong[name] = error, sent
    assert wrong == {}


async def test_streams_and_bulk_updates_search_by_hash(async_engine: AsyncEngine, abyok: Byok) -> None:
    """A streamed search, an eager load across the hashes and an UPDATE by a search, all awaited."""
    await _create(async_engine)
    person, visit = ENCRYPTED.Person, ENCRYPTED.Visit
    async with abyok.asession("t1", async_engine) as session:
        session.add_all(rows(ENCRYPTED))
        await session.commit()
        stream = await session.stream_scalars(
            select(person.mrn).where(person.nick == "ada").order_by(person.id)
        )
        assert [mrn async for mrn in stream] == ["A-1", "D-4"]
        loaded = await session.scalars(
            select(person).where(person.mrn.in_(["A-1", "B-2"])).options(selectinload(person.records))
        )
        assert {one.mrn: ids(one.records) for one in loaded} == {"A-1": [1], "B-2": [2, 3]}
        await session.execute(update(visit).where(visit.code == "x").values(code="z"))
        assert ids((await session.scalars(select(visit).where(visit.code == "z"))).all()) == [1, 4]
