"""IAM's decision on a request, for policies that only allow and for the operators that ours use.

As https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_elements.html has it.
"""

import re
from typing import Any

from tests.cluster.exposure import as_list


def allows(document: dict[str, Any], action: str, resource: str, known: dict[str, str] | None = None) -> bool:
    """Whether a statement allows the action; ``known`` are the condition keys of the request."""
    return any(_matches(statement, action, resource, known or {}) for statement in document["Statement"])


def _matches(statement: dict[str, Any], action: str, resource: str, known: dict[str, str]) -> bool:
    assert statement["Effect"] == "Allow"
    return (
        any(_like(pattern.lower(), action.lower()) for pattern in as_list(statement["Action"]))
        and any(_like(pattern, resource) for pattern in as_list(statement["Resource"]))
        and all(
            _condition(operator, wanted, known.get(key))
            for operator, keys in statement.get("Condition", {}).items()
            for key, wanted in keys.items()
        )
    )


def _condition(operator: str, wanted: Any, given: str | None) -> bool:
    """False if the request does not have the key, as in IAM without IfExists."""
    if given is None:
        return False
    if operator == "StringLike":
        return any(_like(pattern, given) for pattern in as_list(wanted))
    if operator in ("StringEquals", "Bool"):
        return given in as_list(wanted)
    raise ValueError(f"condition operator {operator}: none of our policies' own")


def _like(pattern: str, text: str) -> bool:
    """IAM's patterns: ``*`` matches anything, including slashes, ``?`` one character."""
    regular = "".join({"*": ".*", "?": "."}.get(letter, re.escape(letter)) for letter in pattern)
    return re.fullmatch(regular, text, re.DOTALL) is not None
