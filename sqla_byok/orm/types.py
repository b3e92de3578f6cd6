"""The column types: :class:`Encrypted`, and the :class:`SearchHash` of its sibling column."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import date
from typing import Any, Generic, Literal, NoReturn, TypeVar
from uuid import UUID

from sqlalchemy import BigInteger, Boolean, Date, Dialect, LargeBinary, String, Uuid, inspect
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import ArgumentError
from sqlalchemy.sql import sqltypes
from sqlalchemy.sql.cache_key import NO_CACHE
from sqlalchemy.sql.operators import OperatorType
from sqlalchemy.types import TypeDecorator, TypeEngine, to_instance
from sqlalchemy.util import memoized_property

from sqla_byok.crypto import codecs
from sqla_byok.crypto.codecs import Codec, UnfitError
from sqla_byok.crypto.formats import DIRECT_SIZE, OVERHEAD, check_tenant
from sqla_byok.crypto.hashes import ALGORITHMS, Scope
from sqla_byok.crypto.values import Ring, hash_with, open_with, seal_with
from sqla_byok.errors import (
    DeclarationError,
    DecryptError,
    EncodeError,
    TamperedError,
    UnsupportedQueryError,
)
from sqla_byok.keys.searchable import HashSpec
from sqla_byok.normalize import identity, returned
from sqla_byok.orm import direct
from sqla_byok.orm.sealed import Sealed
from sqla_byok.orm.slots import slot_of

__all__ = ["Digest", "Encrypted", "IndexHash", "IndexedValue", "SearchHash", "owners"]

_T = TypeVar("_T")
_Process = Callable[[Any], Any]

owners: set[str] = set()
"""The tenants that some column names as its owner; empty in most applications."""

# Drivers that take and give bytes as they are. LargeBinary would wrap each value in the driver's Binary(): with
# psycopg that alone made an insert of five columns 1.4 times as long.
_PLAIN_BYTES = frozenset(
    ["pysqlite", "aiosqlite", "psycopg", "psycopg_async", "asyncpg", "pymysql", "aiomysql", "asyncmy"]
)

# What a transform may return, and the type that a column of it would have.
_RESULTS: dict[type, type[TypeEngine[Any]]] = {
    str: String,
    int: BigInteger,
    bool: Boolean,
    date: Date,
    bytes: LargeBinary,
    UUID: Uuid,
}


class Digest(bytes):
    """A search hash as the database holds it (32 bytes); compared with a hash column it is used as it is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"Digest({self.hex()})"


class _Kept(Digest):
    """A search hash that is written as it is, where the values themselves are bytes too."""

    __slots__ = ()


class Encrypted(TypeDecorator[_T], Generic[_T]):
    """A column whose values are encrypted under the tenant's key before they reach the database.

    ::

        class Patient(Base):
            __tablename__ = "patient"
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str] = mapped_column(Encrypted(String(120)))
            mrn: Mapped[str] = mapped_column(Encrypted(String(20), searchable=True), unique=True)

    A value is stored as AES-256-GCM ciphertext with a random nonce, 46 bytes longer than its plaintext, and bound to
    its tenant and its column: moved to another column or read for another tenant, it does not open.

    :param type_: the SQLAlchemy type of the Python value: String, Text, Unicode, LargeBinary, Integer, BigInteger,
        SmallInteger, Float, Numeric, Boolean, Date, DateTime, Time, Interval, Uuid, Enum, JSON, or a
        :class:`~sqlalchemy.types.TypeDecorator` of your own over one of them. What the database would have checked
        is checked here: ``String(120)`` refuses 121 characters.
    :param searchable: keep a sibling column ``<column>_hash`` (32 bytes, indexed) in step, so that ``==``, ``!=``,
        ``in_`` and ``not_in`` become look-ups on it. Equal values of a tenant then have equal hashes: whoever reads
        the database sees which rows share a value.
    :param hash: ``"sha256"`` (SHA-256 over the text and a salt of 32 characters) or ``"hmac-sha256"``.
    :param salt_scope: columns with one named scope share their salt and can be compared with each other;
        ``"tenant"`` is the tenant's search salt itself (``sha256`` only); by default each column has its own.
    :param normalize: a function of :mod:`sqla_byok.normalize`, or your own, applied before hashing, so that a search
        finds what it regards as equal. The stored value is not changed. Give your own a name that lasts with
        :func:`~sqla_byok.normalize.named`.
    :param column_id: the name bound into the ciphertext and the salt; by default ``table.column`` (with the schema in
        front, where there is one). Give it to keep data readable when a table or column is renamed: the old name.
    :param pad_to: pad the plaintext to a multiple of so many bytes (2 to 65,536), where the length would tell.
    :param owner: the tenant whose keys the column takes, whatever the statement's tenant is, and also where there is
        none: for an e-mail address that has to be found before the tenant is known. Not with ``mode="direct"``.
    :param mode: ``"envelope"``: values are encrypted here, under the tenant's data key. ``"direct"``: each value is
        then encrypted by the customer's KMS as well, so that every read and write of one is a call to it and stands in
        the customer's own log; values are limited to what the customer key takes (144 bytes for RSA-2048, 4,050 for
        AWS). On async engines reads give :class:`~sqla_byok.Sealed`.
    :raises DeclarationError: when the column is declared, for what cannot work on ciphertext: a primary or foreign
        key, ``server_default``, a CHECK, ``unique`` without ``searchable``, ``with_variant``.
    """

    impl = LargeBinary
    cache_ok = True

    def __init__(
        self,
        type_: TypeEngine[_T] | type[TypeEngine[_T]],
        *,
        searchable: bool = False,
        hash: str = "sha256",  # noqa: A002 - what it sets
        salt_scope: str | None = None,
        normalize: Callable[[Any], Any] | None = None,
        column_id: str | None = None,
        pad_to: int | None = None,
        owner: str | None = None,
        mode: Literal["envelope", "direct"] = "envelope",
    ) -> None:
        super().__init__()
        self.type_: TypeEngine[_T] = to_instance(type_)
        self.searchable = searchable
        self.hash = hash
        self.salt_scope = salt_scope
        self.normalize = normalize
        self.column_id = column_id
        self.pad_to = pad_to
        self.owner = owner
        self.mode = mode
        self.declared_id = column_id
        self.table = ""
        self._check_options()
        self.hashable = self.type_.hashable

    def _check_options(self) -> None:
        codec = _codec(self.type_)
        if self.pad_to is not None and not 2 <= self.pad_to <= 65_536:
            raise DeclarationError("pad_to takes 2 to 65,536 bytes")
        if self.mode not in ("envelope", "direct"):
            raise DeclarationError("mode takes 'envelope' or 'direct'")
        if self.owner is not None:
            check_tenant(self.owner)
            if self.mode == "direct":
                raise DeclarationError(
                    "mode='direct' takes no owner: its values are encrypted by the tenant's KMS"
                )
            owners.add(self.owner)
        if not self.searchable:
            if self.hash != "sha256" or self.salt_scope is not None or self.normalize is not None:
                raise DeclarationError("hash, salt_scope and normalize need searchable=True")
            return
        if codec.text is None:
            raise DeclarationError(
                f"a column of type {self.type_!r} cannot be searchable: it has no canonical text"
            )
        if self.hash not in ALGORITHMS:
            raise DeclarationError(f"hash takes one of {', '.join(ALGORITHMS)}")
        if self.salt_scope == "tenant" and self.hash != "sha256":
            raise DeclarationError("salt_scope='tenant' goes with hash='sha256' only")
        if self.salt_scope == "":
            raise DeclarationError("salt_scope takes a name")
        if self.normalize is not None:
            identity(self.normalize)

    # -- what the schema asks --------------------------------------------------------------------------------------

    def bound_to(self, column_id: str, table: str) -> Encrypted[_T]:
        """A copy for one column, which carries its id and the name of its table."""
        bound = self.copy()
        bound.column_id, bound.table = column_id, table
        for known in ("hash_type", "spec", "_static_cache_key"):
            bound.__dict__.pop(known, None)
        return bound

    @memoized_property
    def hash_type(self) -> SearchHash:
        """The type of the sibling column, and of every value that is compared with this one."""
        return SearchHash(self)

    @property
    def scope(self) -> Scope:
        """Which salt the search hashes of this column take."""
        if self.salt_scope is None:
            return Scope("column", self.column_id or "")
        return Scope("tenant", "") if self.salt_scope == "tenant" else Scope("scope", self.salt_scope)

    @property
    def search_key(self) -> tuple[Any, ...]:
        """Two columns whose keys are equal have equal hashes for equal values."""
        codec = _codec(self.type_)
        return self.scope, self.hash, codec.name, self.normalize, self.owner

    @memoized_property
    def spec(self) -> HashSpec:
        """How the hashes of this column are made, as the keystore keeps it."""
        normalizer = None if self.normalize is None else identity(self.normalize)
        made = (self.hash, _codec(self.type_).name, normalizer, *self.scope)
        decorators = _decorators(self.type_, "process_bind_param")
        return HashSpec.of(self.column_id or "", self.table, *made, *decorators)

    def as_loaded(self, dialect: Dialect) -> _Process:
        """What makes of a value what it will be when it is read back: ``Decimal("1.00")`` of 1."""
        to_plain, codec, from_plain = _plain(self.type_, dialect)
        if codec.name == "str" and to_plain is None and from_plain is None:
            return lambda value: value
        steps = (to_plain, codec.encode, codec.decode, from_plain)
        return _chain(*steps)

    # -- what SQLAlchemy asks --------------------------------------------------------------------------------------

    @memoized_property
    def _static_cache_key(self) -> Any:
        # SQLAlchemy gathers positional arguments only; here the column id and the rest must count too, or two
        # columns would share one compiled statement.
        inner = _cache_key(self.type_)
        if inner is NO_CACHE:
            return NO_CACHE
        return (
            type(self), inner, self.searchable, self.hash, self.salt_scope, self.normalize, self.column_id, self.pad_to,
            self.owner, self.mode,
        )  # fmt: skip

    @property
    def python_type(self) -> type[Any]:
        return self.type_.python_type

    def compare_values(self, x: Any, y: Any) -> bool:
        if type(x) is Sealed or type(y) is Sealed:
            return type(x) is type(y) and bool(x == y)
        return self.type_.compare_values(x, y)

    def coerce_compared_value(self, op: OperatorType | None, value: Any) -> TypeEngine[Any]:
        if type(value) is not str and inspect(value, raiseerr=False) is not None:
            # A class or an object of the ORM's is meant for another place, as SQLAlchemy says too.
            raise ArgumentError("a SQL expression element or a literal value is expected")
        return self.hash_type if self.searchable else self

    def with_variant(self, type_: Any, *dialect_names: str) -> Any:
        raise DeclarationError(
            "Encrypted takes no with_variant: a variant would write plaintext on its dialect"
        )

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name not in ("mysql", "mariadb"):
            return self.impl_instance
        if self.mode == "direct":
            return LargeBinary(DIRECT_SIZE)
        size = _codec(self.type_).max_size
        if size is None:
            return mysql.LONGBLOB()
        return LargeBinary(OVERHEAD + size + (self.pad_to or 0))

    def bind_processor(self, dialect: Dialect) -> Any:
        if self.column_id is None:
            return _unbound
        slot, column = slot_of(dialect), self.column_id
        current = slot.binding_of(self.owner)
        to_plain, codec, _ = _plain(self.type_, dialect)
        length = getattr(_undecorated(self.type_, dialect), "length", None)
        seal = seal_with(
            current,
            lambda: slot.nobody(column, self.owner),
            column,
            codec,
            limit=length,
            pad_to=self.pad_to,
            kept=(Sealed, lambda value: direct.resealed(slot, column, current(), value)),
        )
        checked = _checked(to_plain, column, EncodeError)
        if self.mode == "direct":
            return direct.writer(slot, column, _chain(checked, seal), _driver_binary(dialect))
        return _chain(checked, seal, _driver_binary(dialect))

    def result_processor(self, dialect: Dialect, coltype: object) -> Any:
        if self.column_id is None:
            return _unbound
        slot = slot_of(dialect)
        to_bytes, opened = _driver_bytes(dialect, coltype), self.opened(dialect, slot.reading_of(self.owner))
        if self.mode == "direct":
            return direct.Reader(slot, self.column_id, to_bytes, opened, dialect.is_async)
        return _chain(to_bytes, opened)

    def opened(self, dialect: Dialect, current: Callable[[], Ring | None]) -> _Process:
        """What makes the Python value of a stored value's bytes, under the keyring that ``current`` gives."""
        slot, column = slot_of(dialect), self.column_id or ""
        _, codec, from_plain = _plain(self.type_, dialect)
        opened = open_with(current, lambda ring, blob: slot.foreign(column, ring, blob), column, codec)
        return _chain(opened, _checked(from_plain, column, DecryptError))

    def literal_processor(self, dialect: Dialect) -> Any:
        _refuse_rendering(self.column_id)

    def __repr__(self) -> str:
        options = {
            "searchable": self.searchable or None,
            "hash": None if self.hash == "sha256" else self.hash,
            "salt_scope": self.salt_scope,
            "normalize": self.normalize,
            "column_id": self.column_id,
            "pad_to": self.pad_to,
            "owner": self.owner,
            "mode": None if self.mode == "envelope" else self.mode,
        }
        given = "".join(f", {name}={value!r}" for name, value in options.items() if value is not None)
        return f"Encrypted({self.type_!r}{given})"


class SearchHash(TypeDecorator[Digest]):
    """The type of a hash column: 32 bytes. A Python value bound to it is hashed; a :class:`Digest` is kept.

    :param source: the type of the encrypted column that it follows.
    :param slot: by which of the tenant's live search salts a value is hashed; 0 is the active one.
    """

    impl = LargeBinary
    cache_ok = True

    def __init__(self, source: Encrypted[Any], slot: int = 0) -> None:
        super().__init__(32)
        self.source = source
        self.slot = slot
        self._slots: dict[int, SearchHash] = {slot: self}

    @property
    def spec(self) -> HashSpec:
        """How the hashes are made."""
        return self.source.spec

    def at(self, slot: int) -> SearchHash:
        """The same type by another of the live search salts; kept, since SQLAlchemy keeps its processors with it."""
        found = self._slots.get(slot)
        if found is None:
            found = self._slots.setdefault(slot, SearchHash(self.source, slot))
        return found

    def kept(self, digest: Digest) -> Digest:
        """What is bound to have this hash stored as it is."""
        return _Kept(digest) if _codec(self.source.type_).name == "bytes" else digest

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        # BLOB cannot be indexed whole there.
        return mysql.BINARY(32) if dialect.name in ("mysql", "mariadb") else self.impl_instance

    def coerce_compared_value(self, op: OperatorType | None, value: Any) -> TypeEngine[Any]:
        return self

    def bind_processor(self, dialect: Dialect) -> Any:
        source = self.source
        if source.column_id is None:
            return _unbound
        slot, column = slot_of(dialect), source.column_id
        to_plain, codec, _ = _plain(source.type_, dialect)
        current = slot.binding_of(source.owner)
        to_hash = hash_with(
            current,
            lambda: slot.nobody(column, source.owner),
            column,
            codec,
            source.hash,
            source.scope,
            source.normalize,
            self.slot,
        )
        process = _chain(_checked(to_plain, column, EncodeError), to_hash)

        def bind(value: Any) -> bytes | None:
            if type(value) is not Digest:
                hashed: bytes | None = process(value)
                return hashed
            ring = current()
            if ring is not None and len(ring.live_salts) > 1:
                raise UnsupportedQueryError(
                    f"{column}: a search hash cannot be looked up while the search salts are being rotated, since "
                    "rows with the same value may have another; look the value up",
                    column=column,
                )
            return bytes(value)

        def bind_bytes(value: Any) -> bytes | None:
            hashed: bytes | None = bytes(value) if type(value) is _Kept else process(value)
            return hashed

        # Where the values themselves are bytes, a digest is a value like any other.
        hash_or_keep: _Process = bind_bytes if codec.name == "bytes" else bind
        if source.mode == "direct" or source.normalize is not None:
            hash_or_keep = direct.refusing(hash_or_keep, column)
        return _chain(hash_or_keep, _driver_binary(dialect))

    def result_processor(self, dialect: Dialect, coltype: object) -> Any:
        column = self.source.column_id

        def to_digest(value: Any) -> Digest | None:
            if value is None:
                return None
            if not isinstance(value, bytes | bytearray | memoryview):
                raise TamperedError(
                    f"{column}: its hash column holds something that is no hash", column=column
                )
            return Digest(value)

        return _chain(_driver_bytes(dialect, coltype), to_digest)

    def literal_processor(self, dialect: Dialect) -> Any:
        _refuse_rendering(self.source.column_id)

    def __repr__(self) -> str:
        return "LargeBinary(length=32)"


class IndexedValue(Encrypted[Any]):
    """What a :class:`~sqla_byok.hash_index` searches, as if it were a searchable column: the results of its transform.

    :param transform: takes the values of the sources.
    :param sources: the types of the encrypted columns.
    :param column_id: the id of the index, which has salts of its own like a column.
    """

    cache_ok = True

    def __init__(
        self, transform: Callable[..., Any], sources: tuple[Encrypted[Any], ...], column_id: str
    ) -> None:
        result = _RESULTS.get(returned(transform))
        if result is None:
            names = ", ".join(known.__name__ for known in _RESULTS)
            raise DeclarationError(f"{column_id}: a transform returns one of {names}", column=column_id)
        direct_too = any(source.mode == "direct" for source in sources)
        owner = sources[0].owner
        if any(source.owner != owner for source in sources):
            raise DeclarationError(
                f"{column_id}: its columns have different owners; whose salt would it take?", column=column_id
            )
        super().__init__(
            result,
            searchable=True,
            column_id=column_id,
            owner=owner,
            mode="direct" if direct_too else "envelope",
        )
        self.declared_id, self.table = sources[0].declared_id, sources[0].table
        self.transform = transform
        self.sources = sources

    @memoized_property
    def spec(self) -> HashSpec:
        both = ("process_bind_param", "process_result_value")  # it takes values as they are read back
        of = [
            [source.column_id, _codec(source.type_).name, *_decorators(source.type_, *both)]
            for source in self.sources
        ]
        made = (self.hash, _codec(self.type_).name, identity(self.transform), *self.scope)
        ids = [source.column_id or "" for source in self.sources]
        return HashSpec.of(self.column_id or "", self.table, *made, of, sources=ids)

    @property
    def search_key(self) -> tuple[Any, ...]:
        return self.spec.column, self.spec.digest

    @memoized_property
    def written_type(self) -> IndexHash:
        """The type of the hash column. :attr:`hash_type` is that of every value that is compared with it."""
        return IndexHash(self)

    @memoized_property
    def _static_cache_key(self) -> Any:
        keys = tuple(source._static_cache_key for source in self.sources)
        return NO_CACHE if NO_CACHE in keys else (type(self), self.column_id, self.transform, keys)


class IndexHash(SearchHash):
    """The type of a hash column of :class:`~sqla_byok.hash_index`.

    What is written is hashed after its transform: the source's value, or a tuple of all sources' values. What is
    compared with it is taken as the transform's result.
    """

    cache_ok = True
    source: IndexedValue

    def kept(self, digest: Digest) -> Digest:
        return _Kept(digest)

    def coerce_compared_value(self, op: OperatorType | None, value: Any) -> TypeEngine[Any]:
        return self.source.hash_type

    def bind_processor(self, dialect: Dialect) -> Any:
        indexed = self.source
        to_hash = direct.refusing(super().bind_processor(dialect), indexed.column_id or "")
        column, transform, several = indexed.column_id, indexed.transform, len(indexed.sources) > 1
        loaded = [source.as_loaded(dialect) for source in indexed.sources]

        def transformed(values: Any) -> Any:
            try:
                return transform(*[as_loaded(value) for as_loaded, value in zip(loaded, values, strict=True)])
            except UnfitError as error:
                reason = str(error)
            except Exception as error:  # noqa: BLE001 - a user's function; its text could carry the value
                reason = f"its transform raised {type(error).__name__}"
            raise EncodeError(f"{column}: {reason}", column=column)

        def bind(value: Any) -> Any:
            if type(value) is _Kept:
                return to_hash(super(IndexHash, self).kept(Digest(value)))
            values = value if several and type(value) is tuple else (value,)
            if any(each is None for each in values):
                return to_hash(None)
            sealed = next((each for each in values if type(each) is Sealed), None)
            return to_hash(transformed(values) if sealed is None else sealed)

        return bind


def _refuse_rendering(column: str | None) -> NoReturn:
    # Raised here and not by a processor: SQLAlchemy would tell the value in what it makes of its exception.
    raise UnsupportedQueryError(
        f"{column or 'an Encrypted type'}: its values are not rendered into SQL text, where they would stand in the "
        "clear; execute the statement with bound parameters, without literal_binds and literal_execute, and print "
        "str(statement), which shows no values",
        column=column,
    )


def _unbound(value: Any) -> Any:
    if value is None:
        return None
    raise DeclarationError(
        "an Encrypted type that belongs to no column was used for a value; give it column_id='table.column'"
    )


# -- from a SQLAlchemy type to bytes ---------------------------------------------------------------------------------


def _undecorated(type_: TypeEngine[Any], dialect: Dialect | None = None) -> TypeEngine[Any]:
    """The type inside all TypeDecorators; for a dialect, the one that they choose for it."""
    while _is_plain_decorator(type_):
        type_ = _inside(type_, dialect)
    return type_


def _decorators(type_: Any, *methods: str) -> Iterator[str]:
    """The names of the TypeDecorators around a type that may make another value of one, by these methods."""
    while _is_plain_decorator(type_):
        if any(_overrides(type_, method) for method in methods):
            yield type(type_).__name__
        type_ = _inside(type_, None)


def _inside(decorator: Any, dialect: Dialect | None) -> TypeEngine[Any]:
    inside: TypeEngine[Any] = decorator.impl_instance
    if dialect is not None and _overrides(decorator, "load_dialect_impl"):
        inside = decorator.load_dialect_impl(dialect)
    return inside


def _codec(type_: TypeEngine[Any], dialect: Dialect | None = None) -> Codec:
    """The codec of a type, whatever TypeDecorators are around it."""
    type_ = _undecorated(type_, dialect)
    if isinstance(type_, sqltypes.Enum):
        return codecs.enum_codec(type_.enums)
    if isinstance(type_, sqltypes.String):
        return codecs.text_codec(type_.length)
    if isinstance(type_, sqltypes.LargeBinary | sqltypes._Binary):
        return codecs.bytes_codec(type_.length)
    if isinstance(type_, sqltypes.Boolean):
        return codecs.bool_codec()
    if isinstance(type_, sqltypes.Integer):
        return codecs.int_codec(16 if isinstance(type_, sqltypes.SmallInteger) else 64)
    if isinstance(type_, sqltypes.Float):
        return codecs.float_codec(as_decimal=type_.asdecimal)
    if isinstance(type_, sqltypes.Numeric):
        return codecs.decimal_codec(type_.precision, type_.scale, as_float=not type_.asdecimal)
    if isinstance(type_, sqltypes.DateTime):
        return codecs.datetime_codec(aware=type_.timezone)
    if isinstance(type_, sqltypes.Date):
        return codecs.date_codec()
    if isinstance(type_, sqltypes.Time):
        return codecs.time_codec(aware=type_.timezone)
    if isinstance(type_, sqltypes.Interval):
        return codecs.interval_codec()
    if isinstance(type_, sqltypes.Uuid):
        return codecs.uuid_codec(as_uuid=type_.as_uuid)
    if isinstance(type_, sqltypes.JSON):
        dumps = getattr(dialect, "_json_serializer", None) or json.dumps
        loads = getattr(dialect, "_json_deserializer", None) or json.loads
        # None is SQL NULL; JSON.NULL is JSON's null, encrypted.
        return codecs.json_codec(lambda value: "null" if value is sqltypes.JSON.NULL else dumps(value), loads)
    raise DeclarationError(
        f"Encrypted cannot wrap {type(type_).__name__}; wrap String, LargeBinary, JSON or another standard type, or a "
        "TypeDecorator over one"
    )


def _is_plain_decorator(type_: Any) -> bool:
    """Whether it is a decorator that works by process_bind_param and process_result_value, and not below them."""
    return (
        isinstance(type_, TypeDecorator)
        and not isinstance(type_, sqltypes.Interval | Encrypted | SearchHash)
        and not _overrides(type_, "bind_processor")
        and not _overrides(type_, "result_processor")
    )


def _plain(type_: Any, dialect: Dialect) -> tuple[_Process | None, Codec, _Process | None]:
    """How values of ``type_`` become what its codec takes, the codec, and the way back."""
    if isinstance(type_, sqltypes.Enum):
        before, after = _enum_steps(type_)
        return before, _codec(type_, dialect), after
    if not _is_plain_decorator(type_):
        return None, _codec(type_, dialect), None
    before, codec, after = _plain(_inside(type_, dialect), dialect)
    bind = type_.process_bind_param if _overrides(type_, "process_bind_param") else None
    result = type_.process_result_value if _overrides(type_, "process_result_value") else None
    to_plain = None if bind is None else lambda value: bind(value, dialect)
    from_plain = None if result is None else lambda value: result(value, dialect)
    return _chain_or_none(to_plain, before), codec, _chain_or_none(after, from_plain)


def _overrides(type_: TypeDecorator[Any], method: str) -> bool:
    return getattr(type(type_), method) is not getattr(TypeDecorator, method)


def _cache_key(type_: TypeEngine[Any]) -> Any:
    """SQLAlchemy's own key, and what it leaves out: what is inside a TypeDecorator, and the names of an Enum."""
    key = type_._static_cache_key
    if key is NO_CACHE:
        return NO_CACHE
    if isinstance(type_, sqltypes.Enum):
        return key, type_.enum_class, tuple(type_.enums)
    if _is_plain_decorator(type_):
        inside = _cache_key(_inside(type_, None))
        return NO_CACHE if inside is NO_CACHE else (key, inside)
    return key


def _enum_steps(type_: sqltypes.Enum) -> tuple[_Process | None, _Process | None]:
    """From the members of the Enum's class to the names that stand for them in the database, and back."""
    cls = type_.enum_class
    if cls is None:
        return None, None
    members = list(cls)
    if len(members) != len(type_.enums):  # omit_aliases=False
        members = list(cls.__members__.values())
    names = dict(zip(members, type_.enums, strict=True))
    by_name = dict(zip(type_.enums, members, strict=True))
    return (
        lambda value: names[value] if isinstance(value, cls) else value,
        lambda value: None if value is None else by_name[value],
    )


def _checked(
    step: _Process | None, column: str, error: type[EncodeError] | type[DecryptError]
) -> _Process | None:
    """Keep the wrapped type's own code from telling a value in its exception, and from sealed values."""
    if step is None:
        return None

    def convert(value: Any) -> Any:
        if type(value) is Sealed:
            return value
        try:
            return step(value)
        except Exception as raised:  # noqa: BLE001 - a user's code
            name = type(raised).__name__
        raise error(f"{column}: the column's own type raised {name} for a value", column=column)

    return convert


def _driver_binary(dialect: Dialect) -> _Process | None:
    if getattr(dialect, "driver", None) in _PLAIN_BYTES:  # that of str(statement) has none
        return None
    return LargeBinary().dialect_impl(dialect).bind_processor(dialect)


def _driver_bytes(dialect: Dialect, coltype: object) -> _Process | None:
    if getattr(dialect, "driver", None) in _PLAIN_BYTES:
        return None
    return LargeBinary().dialect_impl(dialect).result_processor(dialect, coltype)


def _chain_or_none(*steps: _Process | None) -> _Process | None:
    return _chain(*steps) if any(steps) else None


def _chain(*steps: _Process | None) -> _Process:
    """One function that runs the steps that are there, in order; the only step itself where there is one."""
    there = [step for step in steps if step is not None]
    if len(there) == 1:
        return there[0]
    first, *rest = there

    def run(value: Any) -> Any:
        value = first(value)
        for step in rest:
            value = step(value)
        return value

    return run
