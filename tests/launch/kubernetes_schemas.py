"""Published schemas, made strict: what they do not name is refused, and what a list is keyed by is unique."""

import json
from functools import cache
from pathlib import Path

import jsonschema

SCHEMAS = Path(__file__).with_suffix("")
META = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
CORE = {
    ("apps/v1", "Deployment"): "io.k8s.api.apps.v1.Deployment",
    ("v1", "Service"): "io.k8s.api.core.v1.Service",
    ("v1", "ServiceAccount"): "io.k8s.api.core.v1.ServiceAccount",
    ("v1", "ConfigMap"): "io.k8s.api.core.v1.ConfigMap",
    ("v1", "PersistentVolumeClaim"): "io.k8s.api.core.v1.PersistentVolumeClaim",
    ("rbac.authorization.k8s.io/v1", "Role"): "io.k8s.api.rbac.v1.Role",
    ("rbac.authorization.k8s.io/v1", "RoleBinding"): "io.k8s.api.rbac.v1.RoleBinding",
}
CLUSTER_WIDE = ("ClusterQueue", "ResourceFlavor")


def problems(item: dict) -> list[str]:
    """What the API server would refuse in an object; empty where it would take it."""
    known = validator(item.get("apiVersion"), item.get("kind"))
    if known is None:
        return [f"{item.get('apiVersion')} has no {item.get('kind')}"]
    found = [f"{'/'.join(map(str, e.absolute_path))}: {e.message[:200]}" for e in known.iter_errors(item)]
    if ("namespace" in item.get("metadata", {})) == (item["kind"] in CLUSTER_WIDE):
        found.append("a namespace where there is none, or none where there is one")
    return found + twice(known.schema, item, definitions=known.schema["$defs"])


@cache
def validator(version: str, kind: str) -> jsonschema.Draft7Validator | None:
    """A strict validator for objects of this kind; None where nothing is published of that name."""
    definitions = strict(json.loads((SCHEMAS / "core.json").read_text("utf-8")))["$defs"]
    if (version, kind) in CORE:
        schema = definitions[CORE[version, kind]]
    else:
        published = SCHEMAS / f"{kind}.json"
        stored = json.loads(published.read_text("utf-8")) if published.exists() else None
        if stored is None or stored["apiVersion"] != version:
            return None
        schema = strict(stored["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"$ref": f"#/$defs/{META}"}
    head = {"required": ["apiVersion", "kind", "metadata"]}
    return jsonschema.Draft7Validator({"$defs": definitions, **schema, **head})


def strict(schema):
    """The same with no further fields wherever fields are named."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
    return made


def twice(schema, value, where: str = "", *, definitions) -> list[str]:
    """Items of a list that is a map by some of its fields, which it holds twice."""
    schema = definitions[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    found = []
    if isinstance(value, list):
        keys = schema.get("x-kubernetes-list-map-keys")
        if keys:
            names = [tuple(part.get(key) for key in keys) for part in value]
            found = [f"{where}: {name} twice" for name in set(names) if names.count(name) > 1]
        for index, part in enumerate(value):
            found += twice(schema.get("items", {}), part, f"{where}/{index}", definitions=definitions)
    elif isinstance(value, dict):
        for key, part in value.items():
            below = schema.get("properties", {}).get(key, {})
            found += twice(below, part, f"{where}/{key}", definitions=definitions)
    return found
