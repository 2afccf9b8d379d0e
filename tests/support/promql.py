"""What a PromQL expression needs to be true of the metrics: names, labels and label values."""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum

import promql_parser as promql
from metric_names import exposed

from shoal.telemetry import labels
from shoal.wire.handoff_messages import Carrier, CarrierReason
from shoal.wire.messages import Depth, Stage

# Grafana's variables, as it would fill them in.
_VARIABLES = {"$__rate_interval": "1m", "${datasource}": "prometheus"}

_ENUMS: dict[str, tuple[type[StrEnum], ...]] = {
    "carrier": (Carrier,),
    "check": (labels.VerifyCheck,),
    "depth": (Depth,),
    "endpoint": (labels.Endpoint,),
    "error_type": (labels.ErrorType,),
    "part": (labels.Part,),
    "pool": (Stage,),
    "reason": (labels.HandoffReason, labels.RejectReason, CarrierReason),
    "rung": (labels.FallbackRung,),
    "source": (labels.TokenSource,),
    "stage": (labels.TtftStage, labels.CancelStage, Stage),
    "state": (labels.LeaseState, labels.BlockState),
    "transport": (labels.Transport,),
    "way": (labels.PromptWay, labels.GrantWay),
}
# The values of each label, of all metrics that have it.
VALUES: dict[str, set[str]] = {
    name: {str(value) for enum in enums for value in enum} for name, enums in _ENUMS.items()
} | {
    "job": {"shoal"},
    "role": {"gateway", "prefill", "decode"},
    "status": {labels.status_label(status) for status in range(600)},
}


def faults_of(expression: str) -> list[str]:
    """Names of metrics, labels and label values in ``expression`` that no process has. Raises ValueError if it can't
    be parsed."""
    return [fault for node in _nodes(parse(expression)) for fault in _faults_of(node)]


def parse(expression: str) -> promql.Expr:
    for variable, value in _VARIABLES.items():
        expression = expression.replace(variable, value)
    parsed: promql.Expr = promql.parse(expression)
    return parsed


def labels_left(node: promql.Expr) -> frozenset[str]:
    """Labels that a result of ``node`` can have."""
    match node:
        case promql.AggregateExpr():
            # Without `by` nothing is left; `without` isn't used here.
            return frozenset(node.modifier.labels if node.modifier else ())
        case promql.VectorSelector():
            return exposed().get(node.name, frozenset())
        case promql.MatrixSelector():
            return labels_left(node.vector_selector)
        case promql.ParenExpr():
            return labels_left(node.expr)
        case promql.Call():
            left = frozenset[str]().union(*(labels_left(argument) for argument in node.args))
            return left - {"le"} if node.func.name == "histogram_quantile" else left
        case promql.BinaryExpr():
            return labels_left(node.lhs) or labels_left(node.rhs)
    return frozenset()


def _nodes(expression: promql.Expr) -> list[promql.Expr]:
    nodes: list[promql.Expr] = []
    promql.walk(expression, nodes.append)
    return nodes


def _faults_of(node: promql.Expr) -> Iterator[str]:
    match node:
        case promql.VectorSelector():
            if node.name not in exposed():
                yield f"there is no metric {node.name}"
                return
            for matcher in node.matchers.matchers:
                if matcher.name not in exposed()[node.name]:
                    yield f"{node.name} has no label {matcher.name}"
                elif not any(re.fullmatch(matcher.value, value) for value in VALUES[matcher.name]):
                    yield f"no {matcher.name} is {matcher.value}"
        case promql.AggregateExpr() if node.modifier is not None:
            for label in set(node.modifier.labels) - labels_left(node.expr):
                yield f"sum by ({label}): {node.expr} has no such label"
        case promql.BinaryExpr() if node.modifier is not None and node.modifier.matching is not None:
            for label in node.modifier.matching.labels:
                if label not in labels_left(node.lhs) & labels_left(node.rhs):
                    yield f"on ({label}): not both sides of {node} have it"
