"""Tries the installed wheel as a user would, from outside the source tree. ``make smoke`` runs it."""

from __future__ import annotations

import sys
import sysconfig
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from pathlib import Path

import sqlalchemy
from sqlalchemy import String, create_engine, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import sqla_byok
from sqla_byok import Byok, Encrypted, LocalKms

package = Path(sqla_byok.__file__).parent
assert package.parent == Path(sysconfig.get_path("purelib")), f"not the installed package: {package}"
assert (package / "py.typed").is_file(), "type checkers would ignore the package's annotations"
for foreign in ("tests", "docs", "examples", "benchmarks"):
    assert not (package.parent / foreign).exists(), f"the wheel ships {foreign}/"

plugins = [each.value for each in entry_points(group="pytest11") if each.name == "sqla_byok"]
assert [find_spec(name) is not None for name in plugins] == [True], "pytest would not find the plugin"


class Base(DeclarativeBase):
    pass


class Patient(Base):
    __tablename__ = "patient"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(Encrypted(String(120)))
    mrn: Mapped[str] = mapped_column(Encrypted(String(20), searchable=True), unique=True)


# one connection each, or every connection would see an empty database of its own
memory = {"poolclass": sqlalchemy.StaticPool, "connect_args": {"check_same_thread": False}}
engine = create_engine("sqlite://", **memory)
keystore = create_engine("sqlite://", **memory)

byok = Byok(keystore=keystore)
byok.create_keystore()
byok.attach(engine)
Base.metadata.create_all(engine)
for tenant in ("org-1", "org-2"):
    byok.onboard(tenant, LocalKms.create(f"{tenant}.key"))

with byok.session("org-1", engine) as session:
    session.add(Patient(name="Ada Lovelace", mrn="A-1"))
    session.commit()

find_ada = select(Patient).where(Patient.mrn == "A-1")
byok.forget_keys()
with Session(engine.execution_options(byok_tenant="org-1")) as session:  # opened by the statement itself
    assert session.scalars(find_ada).one().name == "Ada Lovelace"
byok.forget_keys()
with byok.session("org-1", engine) as session:
    assert session.scalars(find_ada).one().name == "Ada Lovelace"
with byok.session("org-2", engine) as session:
    assert session.scalars(find_ada).all() == [], "another tenant's search found the row"

with engine.connect() as connection:
    (row,) = connection.execute(text("SELECT * FROM patient")).all()
assert not any(b"Ada" in cell for cell in row if isinstance(cell, bytes)), "a stored value is readable"
assert "Ada Lovelace" not in row, "a stored value is readable"

byok.close()
print(
    f"sqla-byok {version('sqla-byok')} from its wheel works: Python {sys.version.split()[0]}, "
    f"SQLAlchemy {sqlalchemy.__version__}"
)
