"""Who asks, and what they may ask for: HAProxy's rules and maps for keys, tenants and their endpoints. Pure.

    keys.map       SHA-256 of a key -> tenant. The only map that changes without a reload (`gateway.key_map`).
    tenants.map    tenant -> the name of its set of endpoints; tenants with equal lists share one
    endpoints.map  SET/MODEL -> backend, and SET -> backend where the set has only one
    models.map     SET/MODEL -> the model's card, and SET -> the whole list

Without tenants there are no sets, and models stand in the maps by themselves.
Must not know where keys come from, or how a request goes on once it is known whose it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from headrace.api.messages import GatewaySpec
from headrace.errors import ConfigError
from headrace.gateway import haproxy_answers as answers
from headrace.gateway.haproxy_words import return_text
from headrace.gateway.names import backend_name
from headrace.gateway.paths import GatewayPaths

OPEN_PATHS = ("/health", "/ready", "/version")
"""What may be asked without a key: it says nothing about models or tenants."""
MAX_LIST_BYTES = 65_536
"""Longest /v1/models answer: it must fit into HAProxy's buffer."""
MAX_MAP_LINES = 100_000
"""Most lines of endpoints.map: endpoints times different lists of them."""
_CHALLENGE = ("www-authenticate", "Bearer")
_HASH = "sha2(256),hex,lower"


def identity_rules(spec: GatewaySpec, paths: GatewayPaths) -> str:
    """Return the rules that find the tenant, refuse strangers, and take keys off the request.

    They set txn.tenant and txn.endpoints, the name of the tenant's set of endpoints.
    """
    forget_keys = """  http-request del-header authorization
  http-request del-header x-api-key"""
    if not spec.tenants:
        return forget_keys
    find = f"{_HASH},map_str({paths.key_map})"
    return f"""  acl is_open path {" ".join(OPEN_PATHS)}
  acl has_bearer http_auth_bearer -m found
  acl has_api_key req.fhdr(x-api-key) -m found
  acl has_tenant var(txn.tenant) -m found
  http-request set-var(txn.tenant) http_auth_bearer,{find} if has_bearer
  http-request set-var(txn.tenant) req.fhdr(x-api-key),{find} if has_api_key !has_bearer
  {return_text(401, answers.no_key(), "if !is_open !has_tenant !has_bearer !has_api_key", _CHALLENGE)}
  {return_text(401, answers.unknown_key(), "if !is_open !has_tenant", _CHALLENGE)}
  http-request set-var(txn.endpoints) var(txn.tenant),map_str({paths.tenant_map}) if has_tenant
{forget_keys}
  http-request set-header x-headrace-tenant %[var(txn.tenant)] if has_tenant"""


def lookup(spec: GatewaySpec, variable: str) -> str:
    """Return HAProxy's expression for a model's key in the maps; it fails for whoever has no set."""
    return f"var(txn.endpoints),concat(/,{variable})" if spec.tenants else f"var({variable})"


def identity_files(spec: GatewaySpec, paths: GatewayPaths) -> dict[str, str]:
    """Return {path: content} of every map but keys.map. Raises ConfigError if they would be too large."""
    names = served_names([rule.name for rule in spec.endpoints], spec)
    if not spec.tenants:
        _check_list(names)
        return {
            paths.endpoint_map: "".join(f"{name} {backend_name(owner)}\n" for name, owner in names.items()),
            paths.models: answers.models_list(names),
            paths.model_map: "".join(f"{name} {answers.model_card(name)}\n" for name in names),
            paths.tenant_map: "",
        }
    sets, set_of = endpoint_sets(spec)
    if sum(map(len, sets.values())) > MAX_MAP_LINES:
        raise ConfigError(
            f"the tenants have {len(sets)} different lists of {len(names)} endpoints; together they may have "
            f"{MAX_MAP_LINES} entries. Give more tenants the same `endpoints`."
        )
    backends, cards = [], []
    for name, endpoints in sets.items():
        members = served_names(endpoints, spec)
        _check_list(members)
        backends += [f"{name}/{member} {backend_name(owner)}\n" for member, owner in members.items()]
        backends += [f"{name} {backend_name(member)}\n" for member in endpoints if len(endpoints) == 1]
        cards += [f"{name}/{member} {answers.model_card(member)}\n" for member in members]
        cards.append(f"{name} {answers.models_list(members)}\n")
    return {
        paths.endpoint_map: "".join(backends),
        paths.models: answers.models_list([]),
        paths.model_map: "".join(cards),
        paths.tenant_map: "".join(f"{tenant} {name}\n" for tenant, name in set_of.items()),
    }


def served_names(endpoints: Sequence[str], spec: GatewaySpec) -> dict[str, str]:
    """Return each name of a model that these endpoints serve, and whose it is: their own, and adapters'."""
    adapters = {rule.name: rule.adapters for rule in spec.endpoints}
    return {name: endpoint for endpoint in endpoints for name in (endpoint, *adapters[endpoint])}


def endpoint_sets(spec: GatewaySpec) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return set name -> its endpoints, and tenant -> set name. A tenant without a list may use all."""
    names = [rule.name for rule in spec.endpoints]
    known: dict[tuple[str, ...], str] = {}
    set_of: dict[str, str] = {}
    for tenant in spec.tenants:
        allowed = set(tenant.endpoints or names)
        members = tuple(name for name in names if name in allowed)
        set_of[tenant.name] = known.setdefault(members, f"s{len(known)}")
    return {name: list(members) for members, name in known.items()}, set_of


def admin_keys(spec: GatewaySpec) -> dict[str, str]:
    """Return what admin-keys.map holds: a map like keys.map, with one key or none."""
    return {spec.admin_key_hash: "admin"} if spec.admin_key_hash else {}


def render_key_map(keys: Mapping[str, str]) -> str:
    """Return keys.map."""
    return "".join(f"{key_hash} {tenant}\n" for key_hash, tenant in keys.items())


def parse_key_map(text: str) -> dict[str, str]:
    """Return what `render_key_map` was given; lines that are not of it are left out."""
    pairs = (line.split(" ") for line in text.splitlines())
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2 and len(pair[0]) == 64}


def _check_list(names: Collection[str]) -> None:
    size = len(answers.models_list(names))
    if size > MAX_LIST_BYTES:
        raise ConfigError(
            f"{len(names)} endpoints make a /v1/models answer of {size} bytes; "
            f"at most {MAX_LIST_BYTES} fit. Use fewer endpoints or shorter names."
        )
