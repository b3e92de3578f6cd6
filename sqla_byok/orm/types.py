"""The column types: :class:`Encrypted`, and the :class:`SearchHash` of its sibling column."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from datetime import date
from functools import cache, partial
from typing import Any, Generic, Literal, NoReturn, TypeVar
from uuid import UUID

from sqlalchemy import BigInteger, Boolean, Date, Dialect, LargeBinary, String, Uuid, inspect
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import ArgumentError
from sqlalchemy.sql.cache_key import NO_CACHE
from sqlalchemy.sql.operators import OperatorType
from sqlalchemy.types import TypeDecorator, TypeEngine, to_instance
from sqlalchemy.util import memoized_property

from sqla_byok.crypto.codecs import Codec, UnfitError
from sqla_byok.crypto.formats import OVERHEAD, check_tenant
from sqla_byok.crypto.hashes import ALGORITHMS, Scope
from sqla_byok.crypto.values import Opening, hash_with, open_with, seal_with
from sqla_byok.errors import (
    DeclarationError,
    DecryptError,
    EncodeError,
    TamperedError,
    UnsupportedQueryError,
)
from sqla_byok.keys.searchable import HashSpec
from sqla_byok.normalize import identity, returned
from sqla_byok.orm import direct, upstream
from sqla_byok.orm.current import attachment_of, taker_of
from sqla_byok.orm.fetches import Reader
from sqla_byok.orm.plain import (
    Ours,
    Process,
    cache_key_of,
    chain,
    checked,
    codec_of,
    comparing_otherwise,
    decorators,
    driver_binary,
    driver_bytes,
    layers,
    none_when_sealed,
    plain_steps,
    undecorated,
)
from sqla_byok.orm.sealed import Sealed

__all__ = ["Digest", "Encrypted", "IndexHash", "IndexedValue", "LeakWarning", "SearchHash"]

_T = TypeVar("_T")

# By which a type makes another value of one.
_CONVERTING = (
    "process_bind_param",
    "process_result_value",
    "process_literal_param",
    "bind_processor",
    "result_processor",
    "literal_processor",
    "bind_expression",
    "column_expression",
    "load_dialect_impl",
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


class LeakWarning(UserWarning):
    """A column that shows its values by their frequencies was declared searchable."""


class Digest(bytes):
    """A search hash as the database holds it (32 bytes); compared with a hash column it is used as it is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"Digest({self.hex()})"


class _Kept(Digest):
    """A search hash that is written as it is, where the values themselves are bytes too."""

    __slots__ = ()


class Encrypted(Ours, TypeDecorator[_T], Generic[_T]):
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

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = [method for method in _CONVERTING if method in vars(cls)]
        if own:
            raise DeclarationError(
                f"{cls.__name__}: a subclass of Encrypted takes no {own[0]}(), which would be passed over or run on "
                "ciphertext; convert values in a TypeDecorator inside it: Encrypted(YourType)"
            )

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
        self.type_: TypeEngine[_T] = to_instance(type_)
        # SQLAlchemy goes by impl_instance: bytes. Form and schema makers go by impl, and by the class and its impl.
        self.impl_instance = LargeBinary()
        self.impl = undecorated(self.type_)  # type: ignore[assignment] # an instance's, as SQLAlchemy has it
        self.__class__ = _telling(_declared_class(type(self)), _kinds(self.type_))
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
        # Of evaluates_none(), and of JSON: the ORM then binds a None that was set, where it would leave it out.
        self.should_evaluate_none = self.type_.should_evaluate_none

    def _check_options(self) -> None:
        codec = codec_of(self.type_)
        for dialect_name, variant in upstream.variants(self.type_).items():
            if codec_of(variant).name != codec.name:
                raise DeclarationError(
                    f"the variant of {self.type_!r} for {dialect_name!r} takes other values than the type itself; wrap "
                    "one of them, since on each database the same bytes are stored"
                )
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
        if self.searchable:
            self._check_search(codec)
        elif self.hash != "sha256" or self.salt_scope is not None or self.normalize is not None:
            raise DeclarationError("hash, salt_scope and normalize need searchable=True")

    def _check_search(self, codec: Codec) -> None:
        if codec.text is None:
            raise DeclarationError(
                f"a column of type {self.type_!r} cannot be searchable: it has no canonical text"
            )
        rule = None if self.normalize is not None else comparing_otherwise(self.type_)
        if rule is not None:
            raise DeclarationError(
                f"a searchable column of type {self.type_!r} is compared by its hashes, which are exact, and not by "
                f"{rule}; say with normalize= what is equal (sqla_byok.normalize.casefold ignores case), or declare it "
                "with a plain type"
            )
        if codec.name in ("bool", "enum"):
            warnings.warn(
                f"Encrypted({self.type_!r}, searchable=True): its hashes have as few values as the column, so whoever "
                "reads the database sees by their frequencies which rows have which; leave out searchable=True, or "
                "ignore LeakWarning where that is known",
                LeakWarning,
                stacklevel=4,
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
        codec = codec_of(self.type_)
        return self.scope, self.hash, codec.name, self.normalize, self.owner

    @memoized_property
    def spec(self) -> HashSpec:
        """How the hashes of this column are made, as the keystore keeps it."""
        normalizer = None if self.normalize is None else identity(self.normalize)
        made = (self.hash, codec_of(self.type_).name, normalizer, *self.scope)
        around = decorators(self.type_, "process_bind_param")
        return HashSpec.of(self.column_id or "", self.table, *made, *around, owner=self.owner)

    def as_loaded(self, dialect: Dialect) -> Process:
        """What makes of a value what it will be when it is read back: ``Decimal("1.00")`` of 1."""
        to_plain, codec, from_plain = plain_steps(self.type_, dialect)
        if codec.name == "str" and to_plain is None and from_plain is None:
            return lambda value: value
        steps = (to_plain, codec.encode, codec.decode, from_plain)
        return chain(*steps)

    # -- what SQLAlchemy asks --------------------------------------------------------------------------------------

    @memoized_property
    def _static_cache_key(self) -> Any:
        # SQLAlchemy gathers positional arguments only; here the column id and the rest must count too, or two
        # columns would share one compiled statement.
        inner = cache_key_of(self.type_)
        if inner is NO_CACHE:
            return NO_CACHE
        return (
            _declared_class(type(self)), inner, self.searchable, self.hash, self.salt_scope, self.normalize,
            self.column_id, self.pad_to, self.owner, self.mode,
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
        size = codec_of(self.type_, dialect).max_size
        if self.mode == "direct" or (size is not None and OVERHEAD + size + (self.pad_to or 0) < 1 << 16):
            # BLOB, which takes 64 KiB; what a KMS makes of a direct value is at most some 6 KiB. With a size it would
            # become a TINYBLOB, and Alembic would find another type in the database each time.
            return self.impl_instance
        return mysql.LONGBLOB()

    def bind_processor(self, dialect: Dialect) -> Any:
        if self.column_id is None:
            return _unbound
        attachment, column = attachment_of(dialect), self.column_id
        taker = taker_of(attachment, column, self.owner)
        to_plain, codec, _ = plain_steps(self.type_, dialect)
        length = getattr(undecorated(self.type_, dialect), "length", None)
        seal = seal_with(
            taker,
            column,
            codec,
            limit=length,
            pad_to=self.pad_to,
            kept=(Sealed, lambda value: direct.resealed(attachment, column, taker.ring(), value)),
        )
        step = checked(to_plain, column, EncodeError)
        if step is not None and self.should_evaluate_none:
            step = none_when_sealed(step, taker.ring)
        if self.mode == "direct":
            return direct.writer(attachment, column, taker, chain(step, seal), driver_binary(dialect))
        return chain(step, seal, driver_binary(dialect))

    def result_processor(self, dialect: Dialect, coltype: object) -> Any:
        if self.column_id is None:
            return _unbound
        attachment, opening = attachment_of(dialect), self.opening(dialect)
        to_bytes = driver_bytes(dialect, coltype)
        own_code = any(decorators(self.type_, "process_result_value"))
        taker = taker_of(attachment, self.column_id, self.owner)
        if self.mode == "direct":
            cells = direct.Cells(attachment, self.column_id, to_bytes, is_async=dialect.is_async)
            return Reader(taker, opening, own_code=own_code, cells=cells)
        longest = codec_of(self.type_, dialect).max_size
        return Reader(taker, opening.after(to_bytes), own_code=own_code, longest=longest)

    def opening(self, dialect: Dialect) -> Opening:
        """What makes Python values of stored values' bytes."""
        attachment, column = attachment_of(dialect), self.column_id or ""
        _, codec, from_plain = plain_steps(self.type_, dialect)
        opening = open_with(partial(attachment.foreign, column), column, codec)
        return opening.then(checked(from_plain, column, DecryptError))

    def literal_processor(self, dialect: Dialect) -> Any:
        _refuse_rendering(self.column_id)

    def __getattr__(self, key: str) -> Any:
        """The length, precision or names of the type inside, which form makers ask for."""
        return getattr(self.impl, key)

    def __reduce__(self) -> tuple[Any, ...]:
        # Without what names the class that was made for it, and is made anew: its cache key and its listeners.
        state = {
            key: value for key, value in vars(self).items() if key not in ("_static_cache_key", "dispatch")
        }
        return _rebuilt, (_declared_class(type(self)), _kinds(self.type_)), state

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


def _kinds(type_: TypeEngine[Any]) -> tuple[type[TypeEngine[Any]], ...]:
    """The classes of a type and of what is inside its TypeDecorators, each with those that it inherits from."""
    kinds = [cls for each in layers(type_) for cls in type(each).__mro__]
    return tuple(
        cls
        for cls in kinds
        if issubclass(cls, TypeEngine)
        and cls not in (TypeEngine, TypeDecorator)
        and not cls.__name__.startswith("_")
    )


@cache
def _telling(cls: Any, kinds: tuple[type[TypeEngine[Any]], ...]) -> Any:
    """A class of encrypted types that tells what is inside: by the names in its MRO, and by their impl.

    An instance's impl is not enough: sqladmin reads that of its class, and Flask-Admin the names of its classes.
    """
    for kind in reversed(kinds):
        cls = type(kind.__name__, (cls,), {"impl": kind, "_tells": True, "__module__": cls.__module__})
    return cls


def _declared_class(cls: Any) -> Any:
    """The class that somebody wrote, of one that tells what is inside."""
    return next(each for each in cls.__mro__ if "_tells" not in vars(each))


def _rebuilt(cls: Any, kinds: tuple[type[TypeEngine[Any]], ...]) -> Encrypted[Any]:
    told = _telling(cls, kinds)
    rebuilt: Encrypted[Any] = told.__new__(told)
    return rebuilt


class SearchHash(Ours, TypeDecorator[Digest]):
    """The type of a hash column: 32 bytes. A Python value bound to it is hashed; a :class:`Digest` is kept.

    :param source: the type of the encrypted column that it follows.
    :param nth: by which of the tenant's live search salts a value is hashed; 0 is the active one.
    """

    impl = LargeBinary
    cache_ok = True

    def __init__(self, source: Encrypted[Any], nth: int = 0) -> None:
        super().__init__(32)
        self.source = source
        self.nth = nth
        self._by_salt: dict[int, SearchHash] = {nth: self}

    @property
    def spec(self) -> HashSpec:
        """How the hashes are made."""
        return self.source.spec

    @property
    def column_id(self) -> str | None:
        """The id of the encrypted column."""
        return self.source.column_id

    @property
    def owner(self) -> str | None:
        """Whose keys the column takes; None: the tenant's of the statement."""
        return self.source.owner

    def at(self, nth: int) -> SearchHash:
        """The same type by another of the live search salts; kept, since SQLAlchemy keeps its processors with it."""
        found = self._by_salt.get(nth)
        if found is None:
            found = self._by_salt.setdefault(nth, SearchHash(self.source, nth))
        return found

    def kept(self, digest: Digest) -> Digest:
        """What is bound to have this hash stored as it is."""
        return _Kept(digest) if codec_of(self.source.type_).name == "bytes" else digest

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        # BLOB cannot be indexed whole there.
        return mysql.BINARY(32) if dialect.name in ("mysql", "mariadb") else self.impl_instance

    def coerce_compared_value(self, op: OperatorType | None, value: Any) -> TypeEngine[Any]:
        return self

    def bind_processor(self, dialect: Dialect) -> Any:
        source = self.source
        if source.column_id is None:
            return _unbound
        attachment, column = attachment_of(dialect), source.column_id
        to_plain, codec, _ = plain_steps(source.type_, dialect)
        taker = taker_of(attachment, column, source.owner)
        to_hash = hash_with(
            taker,
            column,
            codec,
            source.hash,
            source.scope,
            source.normalize,
            self.nth,
        )
        process = chain(checked(to_plain, column, EncodeError), to_hash)

        def bind(value: Any) -> bytes | None:
            if type(value) is not Digest:
                hashed: bytes | None = process(value)
                return hashed
            ring = taker.ring()
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
        hash_or_keep: Process = bind_bytes if codec.name == "bytes" else bind
        if source.mode == "direct" or source.normalize is not None:
            hash_or_keep = direct.refusing(hash_or_keep, column)
        return chain(hash_or_keep, driver_binary(dialect))

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

        return chain(driver_bytes(dialect, coltype), to_digest)

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
            [source.column_id, codec_of(source.type_).name, *decorators(source.type_, *both)]
            for source in self.sources
        ]
        made = (self.hash, codec_of(self.type_).name, identity(self.transform), *self.scope)
        ids = [source.column_id or "" for source in self.sources]
        return HashSpec.of(self.column_id or "", self.table, *made, of, sources=ids, owner=self.owner)

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
        made = _declared_class(type(self)), self.column_id, self.transform, keys
        return NO_CACHE if NO_CACHE in keys else made


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
                taken = [as_loaded(value) for as_loaded, value in zip(loaded, values, strict=True)]
                # JSON's null is read as None too.
                return None if any(each is None for each in taken) else transform(*taken)
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
