"""What a number of customers costs: KMS calls, shares of the clouds' quotas, keystore queries, memory.

Plain arithmetic over the rules by which keys are kept in memory; docs/capacity.md explains how to read it. It is about
columns in envelope mode: ``mode="direct"`` adds a KMS call for each value read or written.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, exp, inf
from typing import Literal

from sqla_byok.errors import ConfigurationError
from sqla_byok.keys.clock import REFRESH_FROM, REFRESH_TO
from sqla_byok.keys.keyrings import LOOKED_AT_ONCE, POLL_EVERY

__all__ = ["Plan", "Quota", "plan"]

# Calls in 10 seconds, for each vault:
# https://learn.microsoft.com/azure/key-vault/general/service-limits
_AZURE_SOFTWARE_KEYS = {2048: 4_000, 3072: 1_000, 4096: 500}
_AZURE_HSM_KEYS = {2048: 2_000, 3072: 500, 4096: 250}


@dataclass(frozen=True)
class Quota:
    """A limit of a cloud, and what of it is used.

    :param name: what is limited.
    :param account: whose limit it is: ``"vendor"``, one for all tenants, or ``"customer"``, one for each tenant.
    :param limit: calls per second that the cloud allows.
    :param calls: calls per second in steady use.
    :param restart_calls: calls per second, at most, while all processes are replaced.
    """

    name: str
    account: Literal["vendor", "customer"]
    limit: float
    calls: float
    restart_calls: float

    @property
    def share(self) -> float:
        """What of the limit steady use takes, 1.0 being all of it."""
        return self.calls / self.limit

    @property
    def restart_share(self) -> float:
        """What of the limit a restart takes at most. Above 1.0 it is throttled: spread it over a longer time."""
        return self.restart_calls / self.limit


@dataclass(frozen=True)
class Plan:
    """What the library needs for so many tenants and processes, while every KMS answers.

    :param open_tenants: tenants whose keys each process keeps open; ``Byok(max_tenants=…)`` must not be below it.
    :param refresh_every: seconds from one refresh of a tenant in use to the next, in one process, on average.
    :param kms_calls: KMS calls per second, of all processes for all tenants.
    :param token_calls: calls per second for a role's or an application's credential (AWS STS, Microsoft Entra ID).
    :param cold_starts: KMS calls after a restart of all processes, one for each tenant in use and process.
    :param restart_calls: KMS calls per second, at most, while all processes are replaced.
    :param quotas: the clouds' limits that these calls count against.
    :param keystore_queries: statements per second that the keystore's database answers, from all processes: at most,
        and at least half of it.
    :param memory: bytes that the keys take in each process.
    :param heard_within: seconds after which the "no" of a KMS that answers has reached every process that uses the
        tenant, at most.
    :param dark_within: seconds after which a tenant is dark at most, whatever its KMS does.
    """

    open_tenants: int
    refresh_every: float
    kms_calls: float
    token_calls: float
    cold_starts: int
    restart_calls: float
    quotas: tuple[Quota, ...]
    keystore_queries: float
    memory: int
    heard_within: float
    dark_within: float


def plan(
    tenants: int,
    processes: int,
    revoke_within: float = 300.0,
    *,
    provider: Literal["aws", "azure"] = "aws",
    active: float = 1.0,
    requests: float = inf,
    outage_grace: float = 0.0,
    restart_within: float = 60.0,
    assume_role: bool = False,
    key_bits: int = 2048,
    hsm: bool = False,
    aws_quota: float = 10_000,
    sts_quota: float = 600,
    tenant_bytes: int = 16 * 1024,
) -> Plan:
    """What a number of tenants, processes and a deadline cost.

    Each process opens and refreshes each of its tenants on its own, and leaves those alone that nobody uses. All
    tenants are taken to have their keys at one provider; for a mixed house, add two plans up.

    :param tenants: how many customers there are.
    :param processes: how many processes use their keys: workers, not machines.
    :param revoke_within: seconds, 1 to 86,400, as for ``Byok(revoke_within=…)``.
    :param provider: ``"aws"`` or ``"azure"``, each tenant with a key and an account or vault of its own.
    :param active: the part of the tenants that each process serves at a time, 0 to 1.
    :param requests: units of work per second of all processes together, each for one tenant, spread evenly. Calls and
        looks are made by requests that find them due. Unless given, no open tenant is taken to be idle for a moment:
        that makes the most KMS calls, but the fewest keystore queries, since busy tenants share them.
    :param outage_grace: seconds, 0 to 3,600, as for the tenants' ``outage_grace``.
    :param restart_within: seconds in which a deployment replaces all processes, one after the other.
    :param assume_role: AWS: the tenants gave a ``role_arn``, so each opening and refresh asks STS as well, and the KMS
        calls count against the customer's account instead of the vendor's.
    :param key_bits: Azure: size of the RSA key, 2048, 3072 or 4096.
    :param hsm: Azure: the key is kept in hardware (not in a Managed HSM, whose limits depend on its size).
    :param aws_quota: symmetric KMS calls per second that AWS allows an account in the region; 10,000 in most.
    :param sts_quota: calls per second that AWS STS allows an account in the region.
    :param tenant_bytes: memory of an open tenant, 16 KiB by design.
    :raises ConfigurationError: if an argument is out of its range.

    Example::

        >>> house = plan(1_000, 20, revoke_within=300)
        >>> round(house.kms_calls), f"{house.quotas[0].share:.1%}"
        (107, '1.1%')

    Sources: https://docs.aws.amazon.com/kms/latest/developerguide/requests-per-second.html and
    https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_iam-quotas.html (STS), and
    https://learn.microsoft.com/azure/key-vault/general/service-limits.
    """
    _check(tenants >= 0 and processes >= 1, "tenants is at least 0, processes at least 1")
    _check(1 <= revoke_within <= 86_400, "revoke_within takes 1 to 86,400 seconds")
    _check(0 <= active <= 1, "active is a part of all tenants, 0 to 1")
    _check(requests > 0, "requests is above 0 per second")
    _check(0 <= outage_grace <= 3_600, "outage_grace takes 0 to 3,600 seconds")
    _check(restart_within > 0, "restart_within is above 0 seconds")
    _check(provider in ("aws", "azure"), 'provider is "aws" or "azure"')
    _check(key_bits in _AZURE_SOFTWARE_KEYS, "key_bits is 2048, 3072 or 4096")
    _check(min(aws_quota, sts_quota) > 0, "aws_quota and sts_quota are above 0 calls per second")

    open_tenants = round(tenants * active)
    keyrings = open_tenants * processes
    refresh_every = revoke_within * (REFRESH_FROM + REFRESH_TO) / 2
    uses = requests / keyrings if keyrings else inf  # of a tenant in a process, per second
    calls = keyrings / (refresh_every + 1 / uses)  # made by the first use that finds it due
    restart_calls = min(calls + keyrings / restart_within, requests)
    one = processes / refresh_every, processes / refresh_every + processes / restart_within
    tokens = calls if provider == "azure" or assume_role else 0.0

    quotas: tuple[Quota, ...]
    if provider == "azure":
        limit = (_AZURE_HSM_KEYS if hsm else _AZURE_SOFTWARE_KEYS)[key_bits] / 10
        kind = "HSM" if hsm else "software"
        quotas = (Quota(f"Key Vault, RSA-{key_bits}, {kind} key", "customer", limit, *one),)
    elif assume_role:
        quotas = (
            Quota("AWS KMS, symmetric keys", "customer", aws_quota, *one),
            Quota("AWS STS", "vendor", sts_quota, calls, restart_calls),
        )
    else:
        quotas = (Quota("AWS KMS, symmetric keys", "vendor", aws_quota, calls, restart_calls),)

    return Plan(
        open_tenants=open_tenants,
        refresh_every=refresh_every,
        kms_calls=calls,
        token_calls=tokens,
        cold_starts=keyrings,
        restart_calls=restart_calls,
        quotas=quotas,
        # for each call the whole row
        keystore_queries=_looks(open_tenants, processes, uses, calls, revoke_within) + calls,
        memory=open_tenants * tenant_bytes,
        heard_within=revoke_within * REFRESH_TO,
        dark_within=revoke_within + outage_grace,
    )


def _looks(open_tenants: int, processes: int, uses: float, calls: float, revoke_within: float) -> float:
    """How often a second the processes ask for epochs, at most.

    One query looks after all tenants that were used in the last POLL_EVERY seconds. It does not do for one that is to
    be refreshed, nor for one that nobody used for so long: these two ask for themselves.

    :param uses: of a tenant in a process, per second.
    :param calls: KMS calls per second.
    """
    left_to_expire = revoke_within * (1 - (REFRESH_FROM + REFRESH_TO) / 2)
    refreshes = calls * (
        1 - exp(-uses * left_to_expire)
    )  # the other calls are openings: no look, but the row alone
    in_use = open_tenants * (1 - exp(-uses * POLL_EVERY))
    shared = processes * ceil(in_use / LOOKED_AT_ONCE) / POLL_EVERY
    if uses == inf:
        return shared + refreshes
    found_open = open_tenants * processes * uses - (calls - refreshes)
    # A tenant is looked after until POLL_EVERY after its last use, which is good for as long again; half at least.
    return min(shared + refreshes + found_open * exp(-uses * 1.5 * POLL_EVERY), found_open)


def _check(fits: bool, message: str) -> None:
    if not fits:
        raise ConfigurationError(message)
